"""The page of a run: its figures, and its samples token by token over the evaluations, in one file that
fetches nothing.

`python eval.py --out_dir DIR --html FILE` writes it. Here the files of a run become one JSON object;
assets/page.html says how the page looks and assets/page.js what it does. A page is to be mailed and kept, so
it has at most 2 MB: evaluations, groups and tokens are left out until it fits, and the page says so.

Texts come from data and samples, so nothing may run them: they stand in one JSON block in which no tag can
begin or end, the script makes text nodes of them, and the page's own policy forbids every script but this one
and every request (Content-Security-Policy with the hashes of script and style).
"""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

from support.curves import COLOURS, by_phase, merged, middle
from support.log import visible
from support.runs import figures_of, is_finite, last_step, portable
from support.samples import PALETTE, cut, indexed, number, samples_for_page, spaced, tokens_shown

ASSETS = Path(__file__).resolve().parent / "assets"
LARGEST = 2_000_000  # bytes of a page
# How many of each a page holds at first, and the cuts, in this order, until it fits: halved down to the
# number given.
LIMITS = {"evaluations": 60, "groups": 40, "rows": 24, "tokens": 6000, "characters": 6000, "points": 300,
          "figures": 80, "lines": 40, "runs": 40, "settings": 200, "compared": 40, "phases": 12}
CUTS = (
    ("evaluations", 15), ("points", 100), ("compared", 20), ("groups", 10), ("characters", 600),
    ("tokens", 800), ("evaluations", 5), ("groups", 3), ("rows", 8), ("tokens", 100), ("lines", 12),
    ("runs", 12), ("characters", 150), ("figures", 20), ("points", 25), ("evaluations", 2), ("rows", 4),
    ("tokens", 40), ("runs", 4), ("lines", 6), ("settings", 60), ("lines", 1), ("compared", 5),
)

# --------------------------------------------------------------------------------------------------- curves


def all_curves(groups):
    """[(phase, [(figure, [(mean, runs) a group])])] over groups of runs, [(label, runs)], whatever the
    limits: points (step, value); the mean (of counts: the median) is taken over the steps that all runs of a
    group have."""
    figures = [[figures_of(run["lines"]) for run in runs] for _, runs in groups]
    every = merged([f for members in figures for f in members])
    of = lambda phase, name: (name, [one_group(members, phase, name) for members in figures])
    return [(phase, [of(phase, name) for name in every[phase]]) for phase in by_phase(every)]


def one_group(figures, phase, name):
    """(mean, runs) of one figure in one group, figures_of each of its runs."""
    logged = [f[phase][name] for f in figures if name in f.get(phase, ())]
    curves = [{step: (step, y) for step, y in sorted(values.items())} for values in logged]
    return [(x, y) for x, _, y, _ in middle(curves)], [list(c.values()) for c in curves]


def curves_for_page(phases, limits, left_out):
    """[{"phase", "figures": [{"name", "groups": [{"mean", "runs"}]}]}], thinned."""
    points = lambda pairs: [[number(x), number(y)] for x, y in spaced(pairs, limits["points"])]
    found = []
    for phase, figures in phases[: limits["phases"]]:
        kept = [(name, groups[: limits["compared"]]) for name, groups in figures[: limits["figures"]]]
        longest = max((len(line) for _, groups in kept for _, runs in groups for line in runs), default=0)
        drawn = max((len(runs) for _, groups in kept for _, runs in groups), default=0)
        left_out.extend(
            [
                ("lines", "runs drawn in a group", min(drawn, limits["lines"]), drawn),
                ("figures", f"figures of {cut(phase, 40)}", len(kept), len(figures)),
                ("points", "points of a curve", min(longest, limits["points"]), longest),
            ]
        )
        shown = []
        for name, groups in kept:
            shorter = [(mean, runs[:limits["lines"]] if len(runs) > 1 else []) for mean, runs in groups]
            pairs = [{"mean": points(mean), "runs": [points(x) for x in runs]} for mean, runs in shorter]
            shown.append({"name": cut(name, 60), "groups": pairs})
        found.append({"phase": cut(phase, 40), "figures": shown})
    return found


# ------------------------------------------------------------------------------------------------- the page


def state_of(run):
    """(sentence, whether it ended well): summary.json is written last, so its presence is the sign."""
    seconds = (run["summary"] or {}).get("seconds")
    if run["summary"]:
        return "ended well" + (f" after {seconds:.0f} s" if is_finite(seconds) else ""), True
    return f"not finished (stopped, or still running): it stood at step {last_step(run['lines'])}", False


def listed(value):
    """A list that a file holds, none where it holds something else."""
    return value if isinstance(value, list) else []


def run_for_page(run, differing, limits):
    """Settings and figures of one run. Marked: what differs from the defaults, if config.json says it, or
    between runs."""
    config, summary, n = portable(run["config"]), run["summary"] or {}, limits["settings"]
    marked = set(differing) | set(map(str, listed(config.pop("changed", None))))
    settings = [[cut(k, 60), cut(v, 200) or "none", k in marked] for k, v in list(config.items())[:n]]
    known = [(k, v) for k, v in summary.items() if k not in config and k != "warnings"]
    figures = [[cut(k, 60), cut(v, 200) or "never", False] for k, v in known[:n]]
    return {"name": f"{visible(run['dir'])}: {state_of(run)[0]}", "settings": settings, "figures": figures}


def heading_of_one(run):
    """Title, state and warnings of the page of one run, and the prompt that it found."""
    config, summary = run["config"], run["summary"] or {}
    names = [str(config[k]) for k in ("task", "objective", "guidance") if k in config]
    prompt = summary.get("best_prompt")
    return {"title": cut(" \u00b7 ".join(names), 80), "what": cut(run["dir"], 200), "states": [state_of(run)],
            "lead": cut(f"Best prompt: {prompt.strip()}", 600) if isinstance(prompt, str) else "",
            "warnings": [cut(line, 600) for line in listed(summary.get("warnings"))[:20]],
            "curvesNote": "Every logged figure over training steps; point at a curve to read it."}


def heading_of_several(runs, settings, said):
    """The same of a page over several runs, each warning with its run."""
    ended = sum(state_of(run)[1] for run in runs)
    said_by = [(run, listed((run["summary"] or {}).get("warnings"))) for run in runs]
    warned = [f"{run['dir']}: {line}" for run, lines in said_by for line in lines]
    return {"title": f"{len(runs)} runs, {settings} {'settings' if settings > 1 else 'setting'}", "lead": "",
            "what": cut(said, 600), "states": [[f"{ended} of {len(runs)} ended well", ended == len(runs)]],
            "warnings": [cut(line, 600) for line in warned[:20]],
            "curvesNote": "Every logged figure over training steps; point at a curve to read it. Thin lines "
                          "are single runs, thick ones their mean (of counts: the median)."}


def payload(groups, tiles, tables, differing, said, samples, phases, limits, left_out):
    """What assets/page.js shows, as one object: `page` has the arguments, `samples` and `phases` are what
    `indexed` and `all_curves` make of the groups."""
    runs = [run for _, members in groups for run in members]
    found = heading_of_one(runs[0]) if len(runs) == 1 else heading_of_several(runs, len(groups), said)
    rows = [(title, [[cut(c, 200) for c in row] for row in cells[:60]]) for title, cells in tables[:6]]
    found |= {
        "tiles": [[cut(name, 60), cut(text, 40)] for name, text in tiles[:8]],
        "tables": [{"title": cut(title, 400), "rows": cells} for title, cells in rows],
        "palette": PALETTE,
        "colours": COLOURS,
        "groups": [cut(f"{label} (n={len(members)})", 200)
                   for label, members in groups[:limits["compared"]]],
        "samples": [samples_for_page(x, limits, left_out) for x in samples],
        "curves": curves_for_page(phases, limits, left_out),
        "runs": [run_for_page(run, differing, limits) for run in spaced(runs, limits["runs"])],
    }
    most = max(len(run["config"]) for run in runs)
    left_out += [
        ("settings", "settings of a run", min(most, limits["settings"]), most),
        ("runs", "runs whose settings are listed", len(found["runs"]), len(runs)),
        ("compared", "groups of runs", len(found["groups"]), len(groups)),
        ("phases", "phases", len(found["curves"]), len(phases)),
        (None, "groups whose samples are shown", len(samples), len(groups) if samples else 0),
    ]
    return found | {"notes": notes(left_out)}


def notes(left_out):
    """A sentence for each thing of which the page does not hold all: the largest gap of each."""
    gaps = {}
    for _, what, shown, there in left_out:
        if shown < there:
            gaps[what] = max(gaps.get(what, (0, 0)), (there, shown))
    said = ", ".join(f"{shown} of {there} {what}" for what, (there, shown) in gaps.items())
    return [f"Not everything is on this page: {said}. The run's folder has the rest."] if said else []


def inert(value):
    """JSON in which no tag and no comment can begin or end, wherever it stands in a page."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page(groups, tiles=(), tables=(), differing=(), said=""):
    """The page as text, at most LARGEST bytes.  groups: [(label, runs)], a run as support.runs.read_run gives
    it, with "lines" of metrics.jsonl and "samples"; tiles [(name, text)]; tables [(title, rows)]; differing:
    settings to mark; said: a sentence under the title of a page over several runs."""
    limits, phases, left_out = dict(LIMITS), all_curves(groups), []
    samples = [x for _, members in spaced(groups, 8) if (x := indexed(members[0]))]

    def made():
        """The page within the limits, None where it has surely too many tokens, of 12 bytes at least."""
        if sum(tokens_shown(x, limits) for x in samples) > LARGEST / 12:
            return None
        left_out.clear()
        return fill(payload(groups, tiles, tables, differing, said, samples, phases, limits, left_out))

    text = made()
    for name, floor in CUTS:
        while text is None or len(text.encode()) > LARGEST:
            there = max((there for limit, _, _, there in left_out if limit == name), default=limits[name])
            if min(limits[name], there) <= floor:  # this cut is made, or there is nothing to cut
                break
            limits[name] = max(floor, min(limits[name], there) // 2)
            text = made()
    return text


def fill(found):
    """assets/page.html with its script, its data and the policy that allows these and nothing else."""
    template, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    style = re.search(r"<style>(.*?)</style>", template, re.S)[1]
    sha = lambda part: "'sha256-" + base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() + "'"
    policy = (f"default-src 'none'; img-src data:; script-src {sha(script)}; style-src {sha(style)}; "
              f"base-uri 'none'; form-action 'none'")
    title = html.escape(found["title"])
    parts = {"@POLICY@": policy, "@TITLE@": title, "@SCRIPT@": script, "@DATA@": inert(found)}
    # One pass: what a part holds is not looked at again, whatever is written in the data.
    return re.sub("|".join(parts), lambda m: parts[m[0]], template)
