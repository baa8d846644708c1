"""Runs that differ only by seed are one row: which runs belong together, and the middle and spread of their
figures."""

import json
import math
import statistics
from collections import Counter

from support.log import visible
from support.runs import is_finite, is_number

# What cannot change a result, or only names the run. init_from stays a setting: better a row too many than
# runs of different origin averaged.
NOT_SETTINGS = {
    "seed",
    "out_dir",
    "overwrite",
    "export",
    "cache_dir",
    "log_every",
    "threads",
    "threads_used",
    "threads_reason",
    "compile",
    "micro_batch",
    "processes",
    "versions",
    "version",
    "commit",
    "figures",
    "curve",
    "bounded",  # follow from guidance and objective
    "critic",
    "changed",
    "preset_set",  # said once more: each of these flags is a setting by itself
}


def num(x):
    """Four significant digits, but never 1.44e+04: query counts are whole numbers and should look it."""
    if not is_number(x):
        return "-"
    return f"{x:.0f}" if is_finite(x) and (isinstance(x, int) or abs(x) >= 1000) else f"{x:.4g}"


def spread(name, values, runs):
    """The figures of a group's runs -> an entry for --json, with its "text" for the table."""
    if (
        name.endswith("queries_to_90") and values
    ):  # null: it took longer than any other run: infinity, and a median
        values = [v if is_number(v) else math.inf for v in values]
        middle, reached = statistics.median(values), sum(map(math.isfinite, values))
        return {
            "median": middle if math.isfinite(middle) else None,
            "reached": reached,
            "n": len(values),
            "text": f"{num(middle) if math.isfinite(middle) else 'never'} ({reached}/{len(values)})",
        }
    values = [v for v in values if is_finite(v)]
    mean = statistics.fmean(values) if values else None
    std = statistics.stdev(values) if len(values) > 1 else None  # of one run it does not exist: "-", not 0
    text = f"{num(mean)} +- {num(std)}" + (f" (n={len(values)})" if len(values) < runs else "")
    return {"mean": mean, "std": std, "n": len(values), "text": text if values else "-"}


def group_runs(runs):
    """Runs of one task -> [(settings that differ, runs)]. A setting is any config value that is not the seed,
    the folder or the machine; those equal in all runs say nothing and are left out. What is unlike most runs
    comes first: a long name may be cut."""
    settings = [
        {k: v for k, v in run["config"].items() if k not in NOT_SETTINGS and not k.startswith("device")}
        for run in runs
    ]  # a key that a run lacks counts as null: older runs know fewer flags
    keys = dict.fromkeys(k for s in settings for k in s)
    differing = [k for k in keys if any(s.get(k) != settings[0].get(k) for s in settings)]
    usual = {k: Counter(str(s.get(k)) for s in settings).most_common(1)[0][0] for k in differing}
    groups = {}
    for run, s in zip(runs, settings):
        chosen_ones = {k: s.get(k) for k in sorted(differing, key=lambda k: str(s.get(k)) == usual[k])}
        groups.setdefault(json.dumps(chosen_ones, sort_keys=True), (chosen_ones, []))[1].append(run)
    return list(groups.values())


def as_row(settings, members, names):
    """A group as --json writes it."""
    return {
        "task": members[0]["task"],
        "settings": settings,
        "runs": [str(r["dir"]) for r in members],
        "seeds": [r["config"].get("seed") for r in members],
        "figures": {
            k: spread(k, [r["summary"][k] for r in members if k in r["summary"]], len(members)) for k in names
        },
    }


FIRST = ("objective", "guidance", "agg", "weights", "lr")


def label_of(settings):
    """A group's name in tables and legends: what a reader compares first comes first."""
    names = [k for k in FIRST if k in settings] + [k for k in settings if k not in FIRST]
    return " ".join(f"{k}={settings[k]}" for k in names) or "none"


def table_of(rows):
    """(title, cells) of one task's groups. n counts runs; where a seed is there twice they are not
    independent, and n says so."""
    names = tuple(rows[0]["figures"])
    medians = "".join(f"; {name}: median (reached/n)" for name in names if name.endswith("queries_to_90"))
    title = f"{rows[0]['task']}: mean +- sample standard deviation of n runs (here){medians}"
    cells = [["settings that differ", "n", *names]]
    for row in rows:
        n, seeds = len(row["runs"]), len(set(map(str, row["seeds"])))
        cells.append(
            [
                label_of(row["settings"]),
                f"{n}" if n == seeds else f"{n} ({seeds} seeds)",
                *(f["text"] for f in row["figures"].values()),
            ]
        )
    return visible(title), [[visible(cell) for cell in row] for row in cells]
