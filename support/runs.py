"""Reading run folders: plain text, so no torch, and a run that still goes on can be read too.

A run's config.json is written first and its summary.json last, so the presence of the second is the sign that
the run ended well. What lies between is logs, a line of JSON each (train.py writes them).
"""

import json
import math
import sys
from pathlib import Path

from support.log import visible


def is_number(x):
    """Whether x is a figure. A JSON true is none, although Python calls it an int."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def is_finite(x):
    """Whether x is a figure that can be drawn: train.py writes NaN where a figure broke."""
    return (
        is_number(x) and abs(x) <= sys.float_info.max
    )  # not math.isfinite, which raises on an int of 400 digits


def read_object(path):
    """The object of a JSON file; None where it is missing, half written or no object, which are the same to
    us."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_lines(path, say=print):
    """The objects of a jsonl file. A run killed in mid write leaves half a line, and a resumed run may go on
    right behind it, so unreadable lines are left out wherever they stand, and said once."""
    good, bad = [], []
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line.decode("utf-8") or "{}")  # decoded here: it may end in half a character
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            good.append(value)
        else:
            bad.append(number)
    if bad:
        say(visible(f"note: {path}: {len(bad)} unreadable line(s) ignored, the first is line {bad[0]}"))
    return [x for x in good if x]  # the empty line behind the last newline is no object


def read_run(folder):
    """A run as {"dir", "config", "summary", "task"}, or None without a readable config.json of a run: a
    folder of weights has one too, but no task in it.  summary: None unless the run ended well."""
    folder = Path(folder)
    config = read_object(folder / "config.json")
    if not config or "task" not in config:
        return None
    summary = read_object(folder / "summary.json")
    return {"dir": folder, "config": config, "summary": summary, "task": str(config["task"])}


def ended_at(folder):
    """When a run ended, in seconds since 1970: the time of its summary.json, or of its last log line where it
    did not end. The folder's own time does not count, which stands still while its files grow."""
    files = [folder / name for name in ("summary.json", "metrics.jsonl", "config.json")]
    if read_object(files[0]) is None:
        files = files[1:]
    return next(file.stat().st_mtime for file in files if file.exists())


def newest_run(root=Path("out"), finished=False):
    """The folder of the run under `root` that ended last, or None where there is none.

    finished: only runs that ended well. Otherwise an unfinished run counts by its last log line, and the
    caller says that it is unfinished. Equal times: the last name, so that the answer is the same every time.
    """
    runs = [read_run(config.parent) for config in Path(root).rglob("config.json")]
    folders = [run["dir"] for run in runs if run and (run["summary"] or not finished)]
    return max(folders, key=lambda folder: (ended_at(folder), str(folder)), default=None)


def last_step(lines):
    """The furthest step in a log, wherever it stands: behind a resume the steps start again from the
    checkpoint. The phases before the loop count steps of their own, which are no updates of the policy."""
    in_loop = (x for x in lines if x.get("phase") not in ("judge", "sft", "warmup"))
    return max((x["step"] for x in in_loop if is_number(x.get("step"))), default=0)


def figures_of(lines):
    """{phase: {figure: {step: value}}} of a metrics.jsonl. A resumed run repeats the steps after its
    checkpoint: the last wins. Values that are no finite numbers are left out."""
    found = {}
    for line in lines:
        step, phase = line.get("step"), line.get("phase")
        if not is_finite(step) or not isinstance(phase, str):
            continue
        for name, value in line.items():
            if name not in ("step", "seconds") and is_finite(value):
                found.setdefault(phase, {}).setdefault(name, {})[step] = value
    return found


def colour_range(config):
    """(lowest, neutral, highest) value of the token reward by config.json's `bound` (E2), and None for a
    bound that this file does not know, or a guidance whose token rewards have none.  softplus: (0, log(1 +
    e)), and b(0) is neutral; runs without the key are of that kind."""
    older = config.get("guidance") not in ("red", "abc", "implicit")  # differences, shares, log-ratios
    if not config.get("bounded", older):
        return None
    ranges = {
        "softplus": (0.0, math.log1p(math.exp(1 - math.log1p(math.e))), math.log1p(math.e)),
        "sigmoid": (0.0, 0.5, 1.0),
    }
    return ranges.get(str(config.get("bound", "softplus")))


def shown_rows(lines):
    """(rows that can be shown, number left out) of a samples.jsonl: a reward belongs to a token by position,
    so a row with fewer or more rewards than tokens says nothing. Rows of kind vocabulary or credit are not
    looked at."""
    rows = [x for x in lines if x.get("kind") not in ("vocabulary", "credit") and is_finite(x.get("step"))]

    def whole(row):
        tokens, rewards = row.get("tokens"), row.get("rewards")
        if not isinstance(tokens, list) or not isinstance(rewards, list) or len(tokens) != len(rewards):
            return False
        return all(x is None or is_number(x) for x in rewards)

    good = [row for row in rows if whole(row)]
    return good, len(rows) - len(good)


def portable(config):
    """A config without the folders of the machine it ran on: names in place of paths, and no cache. hub:<id>
    is no path, and stays."""
    def name(k, v):
        folder = k in ("out_dir", "data", "world") and not str(v).startswith("hub:")
        return Path(v).name if isinstance(v, str) and (folder or v.startswith(("/", "~"))) else v
    return {k: name(k, v) for k, v in config.items() if k != "cache_dir"}
