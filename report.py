"""The page of a run: its figures, and its samples token by token over the evaluations, in one file that fetches nothing.

`python eval.py --out_dir DIR --html FILE` writes it. Here the files of a run become one JSON object; assets/page.html
says how the page looks and assets/page.js what it does. A page is to be mailed and kept, so it has at most 2 MB:
evaluations, groups and tokens are left out until it fits, and the page says so.

Texts come from data and samples, so nothing may run them: they stand in one JSON block in which no tag can begin
or end, the script makes text nodes of them, and the page's own policy forbids every script but this one and every
request (Content-Security-Policy with the hashes of script and style).
"""
import base64
import hashlib
import html
import json
import re
import statistics
from pathlib import Path

from support.curves import COLOURS, by_phase, curve, merged, middle
from support.log import visible
from support.runs import colour_range, figures_of, is_finite, last_step, portable, shown_rows

ASSETS = Path(__file__).resolve().parent / "assets"
LARGEST = 2_000_000  # bytes of a page
# Red, white, blue (ColorBrewer RdBu, its pale part): told apart by colour-blind people, and black letters can be read
# on each of them (contrast 5.6 at least).
PALETTE = ((214, 96, 77), (244, 165, 130), (253, 219, 199), (255, 255, 255), (209, 229, 240), (146, 197, 222), (67, 147, 195))
# How many of each a page holds at first, and the cuts, in this order, until it fits: halved down to the number given.
LIMITS = {"evaluations": 60, "groups": 40, "rows": 24, "tokens": 6000, "characters": 6000, "points": 300, "figures": 80,
          "lines": 40, "runs": 40, "settings": 200}
CUTS = (("evaluations", 15), ("points", 100), ("groups", 10), ("characters", 600), ("tokens", 800), ("evaluations", 5),
        ("groups", 3), ("rows", 8), ("tokens", 100), ("lines", 12), ("runs", 12), ("characters", 150), ("figures", 20),
        ("points", 25), ("evaluations", 2), ("rows", 4), ("tokens", 40), ("runs", 4), ("lines", 6), ("settings", 60))
KINDS = ("vocabulary", "credit")  # rows of samples.jsonl that hold no tokens with rewards


def spaced(items, n):
    """At most n of a list, evenly apart, its first and its last among them."""
    items = list(items)
    if len(items) <= n:
        return items
    if n < 2:
        return items[-1:]
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def number(x):
    """A figure for the page: five significant digits; None for what is none, as JSON knows no NaN."""
    return float(f"{x:.5g}") if is_finite(x) else None


def cut(text, n):
    """Text on one line, at most n characters of it."""
    text = visible(" ".join(str(text).split())) if text else ""
    return text if len(text) <= n else text[:n] + " \u2026"


# -------------------------------------------------------------------------------------------------------------- samples


def scales(run, rows):
    """{quantity: {"range": (low, neutral, high), "ends", "text"}} of the quantities that a run's rows hold."""
    found = {"rewards": reward_scale(run["config"], rows)}
    for name in ("weights", "log_ratio"):
        values = [x for row in rows for x in row.get(name) or () if is_finite(x)]
        if values:
            found[name] = even_scale(run["config"], name, values)
    if any(isinstance(row.get("errors"), list) for row in rows):
        found["errors"] = {"range": (-1, 0, 1), "ends": ("a true error", "no error"),
                           "text": "Red and underlined: the tokens that are wrong, as the task knows."}
    return found


def reward_scale(config, rows):
    """The fixed range of r, the same on every page; of a bound that nobody here knows what was seen, and it says so."""
    known = colour_range(config)
    if known:
        text = f"The whole range of r, the same in every run of this bound; white at {known[1]:.4g}, the neutral value."
    else:
        values = [x for row in rows for x in row["rewards"] if is_finite(x)] or [0.0]
        known = (min(values), (min(values) + max(values)) / 2, max(values))
        text = f"The range seen in this run, white half way, at {known[1]:.4g}."
    return {"range": known, "ends": (f"{known[0]:.4g}", f"{known[2]:.4g}"), "text": text}


def even_scale(config, name, values):
    """A scale with the neutral value in its middle: 0, or for weighted maximum likelihood, whose weights are all
    positive, the mean weight. Its ends hold 99 of 100 tokens, so that one outlier does not leave the rest white."""
    positive = name == "weights" and config.get("objective") in ("wmle", "mle")
    neutral = statistics.fmean(values) if positive else 0.0
    away = sorted(abs(x - neutral) for x in values)
    far = away[min(len(away) - 1, int(0.99 * len(away)))] or 1.0  # all neutral: nothing to stretch
    what = {"weights": "What the objective gives each token, after shaping", "log_ratio":
            "How much likelier the token is than under the starting policy, in nats"}[name]
    middle_is = f"{neutral:.4g}, the mean weight" if positive else "0"
    return {"range": (neutral - far, neutral, neutral + far), "ends": (f"{neutral - far:.4g}", f"{neutral + far:.4g}"),
            "text": f"{what}; white at {middle_is}. 99 of 100 tokens lie within the ends."}


def row_for_page(row, limits):
    """One sequence. The mean is taken before the cut; a quantity whose length differs from the tokens' is left out."""
    n = len(row["tokens"])

    def fitting(name):
        return row[name][:limits["tokens"]] if isinstance(row.get(name), list) and len(row[name]) == n else None
    known = [x for x in row["rewards"] if is_finite(x)]
    found = {"role": cut(row.get("role", ""), 60), "tokens": [visible(t)[:80] for t in fitting("tokens")],
             "mean": number(statistics.fmean(known)) if known else None,
             "preference": number(row.get("preference")), "score": number(row.get("score"))}
    for name in ("rewards", "weights", "log_ratio"):
        found[name] = fitting(name) and [number(x) for x in fitting(name)]
    found["errors"] = fitting("errors") and [bool(x) for x in fitting("errors")]
    return {k: v for k, v in found.items() if v is not None}


def group_of(row):
    """What tells siblings from strangers; older runs do not say it, there the input does."""
    return str(row.get("group", row.get("context") or ""))


def extra_for_page(row, limits):
    """A row of kind vocabulary or credit; None where it is not as it should be."""
    n, pairs = min(40, limits["tokens"]), {}
    if row["kind"] == "credit":
        lists = [row.get(name) for name in ("cues", "cue", "other")]
        if not all(isinstance(x, list) for x in lists) or len(set(map(len, lists))) != 1:
            return None
        return dict(zip(("cues", "cue", "other"), ([number(x) for x in values[:n]] for values in lists)))
    for side in ("top", "bottom"):
        good = isinstance(row.get(side), list) and all(isinstance(x, list) and len(x) == 2 for x in row[side])
        pairs[side] = [[visible(word)[:80], number(r)] for word, r in row[side][:n]] if good else []
    prefix = row.get("prefix") if isinstance(row.get("prefix"), list) else []
    return {"prefix": [visible(t)[:80] for t in prefix[:n]], **pairs}


def unique(rows):
    """Rows without repetition: a resumed run may write the same ones again."""
    return list({json.dumps(row, sort_keys=True): row for row in rows}.values())


def samples_for_page(run, limits, left_out):
    """The evaluations of a run, each with its groups and tables, or None without one."""
    rows, odd = shown_rows(run["samples"])
    extra = [x for x in run["samples"] if x.get("kind") in KINDS and is_finite(x.get("step"))]
    steps = sorted({row["step"] for row in rows})
    names = list(dict.fromkeys(map(group_of, rows)))
    kept, known = spaced(steps, limits["evaluations"]), spaced(names, limits["groups"])
    left_out.extend([("evaluations", len(kept), len(steps)), ("groups of siblings", len(known), len(names)),
                     ("rows whose tokens and rewards go together", len(rows), len(rows) + odd)])
    at, views = {}, []
    for row in rows:
        at.setdefault((row["step"], group_of(row)), []).append(row)
    for step in kept:
        groups = []
        for name in known:
            found = unique(at.get((step, name), ()))
            longest = max((len(row["tokens"]) for row in found), default=0)
            left_out.extend([("sequences of a group", min(len(found), limits["rows"]), len(found)),
                             ("tokens of a sequence", min(longest, limits["tokens"]), longest)])
            if found:
                title = " ".join(filter(None, (cut(found[0].get("kind"), 40), cut(found[0].get("group"), 60))))
                groups.append({"id": name[:200], "title": title, "rows": [row_for_page(r, limits) for r in found[:limits["rows"]]],
                               "context": cut(found[0].get("context"), limits["characters"]),
                               "reference": cut(found[0].get("reference"), limits["characters"])})
        tables = {kind: [t for x in unique(x for x in extra if x["step"] == step and x["kind"] == kind)[:4]
                         if (t := extra_for_page(x, limits))] for kind in KINDS}
        views.append({"step": step, "groups": groups, **tables})
    if not views:
        return None
    return {"run": visible(run["dir"]), "scales": scales(run, rows), "steps": views, "beside": alike(views[-1]),
            "resolution": number(run["config"].get("resolution")) or 0}


def alike(view):
    """Whether most siblings share half of their tokens, so that a candidate tells most beside the best one."""
    shares = []
    for group in view["groups"]:
        best = max(group["rows"], key=lambda row: row.get("preference", -1e30))["tokens"]
        shares += [len(set(best) & set(row["tokens"])) / max(1, len(set(best))) for row in group["rows"]]
        shares.remove(1.0) if 1.0 in shares else None  # the best one itself
    return bool(shares) and statistics.median(shares) >= 0.5


def colour(value, low, neutral, high):
    """A value of a scale as (R, G, B), which page.js does likewise: each half is stretched by itself, since the neutral
    value need not lie in the middle. Grey for what is no number."""
    if not is_finite(value):
        return 200, 200, 200
    half = neutral - low if value < neutral else high - neutral
    at = max(-1.0, min(1.0, (value - neutral) / half)) if half > 0 else 0.0
    place = (at + 1) / 2 * (len(PALETTE) - 1)
    i = min(int(place), len(PALETTE) - 2)
    return tuple(round(a + (b - a) * (place - i)) for a, b in zip(PALETTE[i], PALETTE[i + 1]))


# --------------------------------------------------------------------------------------------------------------- curves


def curves_for_page(groups, limits, left_out):
    """[{"phase", "figures": [{"name", "groups": [{"mean", "runs"}]}]}] over groups of runs, [(label, runs)]."""
    figures = [[figures_of(run["lines"]) for run in runs] for _, runs in groups]
    every, phases = merged([f for members in figures for f in members]), []
    for phase in by_phase(every):
        names = list(every[phase])[:limits["figures"]]
        left_out.append((f"figures of {phase}", len(names), len(every[phase])))
        shown = []
        for name in names:
            lines = [[c for f in members if (c := {s: (s, y) for s, (_, y) in curve(f, phase, name)[1].items()})]
                     for members in figures]
            left_out.append(("points of a curve", *min((min(len(c), limits["points"]), len(c)) for m in lines for c in m)))
            shown.append({"name": cut(name, 60), "groups": [thinned(members, limits) for members in lines]})
        phases.append({"phase": cut(phase, 40), "figures": shown})
    return phases


def thinned(curves, limits):
    """The mean (of counts: the median) of a group's runs and the runs themselves, as lists of points."""
    points = lambda pairs: [[number(x), number(y)] for x, y in spaced(pairs, limits["points"])]
    return {"mean": points((x, y) for x, _, y, _ in middle(curves)),
            "runs": [points(c.values()) for c in curves[:limits["lines"]]] if len(curves) > 1 else []}


# ------------------------------------------------------------------------------------------------------------- the page


def state_of(run):
    """(sentence, whether it ended well): summary.json is written last, so its presence is the sign."""
    seconds = (run["summary"] or {}).get("seconds")
    if run["summary"]:
        return "ended well" + (f" after {seconds:.0f} s" if is_finite(seconds) else ""), True
    return f"not finished (stopped, or still running): it stood at step {last_step(run['lines'])}", False


def run_for_page(run, differing, limits):
    """Settings and figures of one run. Marked: what differs from the defaults, if config.json says it, or between runs."""
    config, summary = portable(run["config"]), run["summary"] or {}
    marked = set(differing) | set(map(str, config.get("changed") or ()))
    return {"name": f"{visible(run['dir'])}: {state_of(run)[0]}",
            "settings": [[cut(k, 60), cut(v if v is not None else "none", 200), k in marked]
                         for k, v in list(config.items())[:limits["settings"]] if k != "changed"],
            "figures": [[cut(k, 60), cut(v if v is not None else "never", 200), False]
                        for k, v in list(summary.items())[:limits["settings"]] if k not in config and k != "warnings"]}


def payload(groups, tiles, tables, differing, said, limits):
    """What assets/page.js shows, as one object: groups [(label, runs)], runs with "lines" and "samples"."""
    runs, left_out = [run for _, members in groups for run in members], []
    first = runs[0]["config"]
    prompt = (runs[0]["summary"] or {}).get("best_prompt") if len(runs) == 1 else None
    lead = f"Best prompt: {prompt.strip()}" if isinstance(prompt, str) else ""
    states = [state_of(run) for run in runs]
    warned = [(run, w) for run in runs for w in (run["summary"] or {}).get("warnings") or () if isinstance(w, str)]
    looked = [members[0] for _, members in spaced(groups, 8)]
    found = {
        "title": cut(f"{first.get('task')} \u00b7 {first.get('objective')} \u00b7 {first.get('guidance')}", 80)
        if len(runs) == 1 else f"{len(runs)} runs, {len(groups)} {'settings' if len(groups) > 1 else 'setting'}",
        "what": cut(runs[0]["dir"], 200) if len(runs) == 1 else cut(said, 600),
        "lead": cut(lead, 600),
        "states": states if len(runs) == 1 else [[f"{sum(ok for _, ok in states)} of {len(runs)} ended well", all(ok for _, ok in states)]],
        "warnings": [cut(w if len(runs) == 1 else f"{run['dir']}: {w}", 600) for run, w in warned[:20]],
        "tiles": [[cut(name, 60), cut(text, 40)] for name, text in tiles[:8]],
        "tables": [{"title": cut(title, 400), "rows": [[cut(c, 200) for c in row] for row in rows[:60]]} for title, rows in tables[:6]],
        "palette": PALETTE, "colours": COLOURS, "groups": [cut(f"{label} (n={len(members)})", 200) for label, members in groups[:40]],
        "samples": [s for run in looked if (s := samples_for_page(run, limits, left_out))],
        "curves": curves_for_page(groups, limits, left_out),
        "curvesNote": "Every logged figure over training steps; point at a curve to read it."
        + (" Thin lines are single runs, thick ones their mean (of counts: the median)." if len(runs) > 1 else ""),
        "runs": [run_for_page(run, differing, limits) for run in spaced(runs, limits["runs"])]}
    left_out += [("runs whose settings are listed", len(found["runs"]), len(runs)), ("groups whose samples are shown", len(looked), len(groups))]
    return found | {"notes": notes(left_out)}


def notes(left_out):
    """A sentence for each thing of which the page does not hold all: the largest gap of each."""
    gaps = {}
    for what, shown, there in left_out:
        if shown < there:
            gaps[what] = max(gaps.get(what, (0, 0)), (there, shown))
    said = [f"{shown} of {there} {what}" for what, (there, shown) in gaps.items()]
    return ["Not everything is on this page: " + ", ".join(said) + ". The run's folder has the rest."] if said else []


def inert(value):
    """JSON in which no tag and no comment can begin or end, wherever it stands in a page."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page(groups, tiles=(), tables=(), differing=(), said=""):
    """The page as text, at most LARGEST bytes.  groups: [(label, runs)], a run as support.runs.read_run gives it, with
    "lines" of metrics.jsonl and "samples"; tiles [(name, text)]; tables [(title, rows)]; differing: settings to mark;
    said: a sentence under the title of a page over several runs."""
    limits = dict(LIMITS)
    text = fill(payload(groups, tiles, tables, differing, said, limits))
    for name, floor in CUTS:
        while len(text.encode()) > LARGEST and limits[name] > floor:
            limits[name] = max(floor, limits[name] // 2)
            text = fill(payload(groups, tiles, tables, differing, said, limits))
    return text


def fill(found):
    """assets/page.html with its script, its data and the policy that allows these and nothing else."""
    template, script = (ASSETS.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    style = re.search(r"<style>(.*?)</style>", template, re.S)[1]
    sha = lambda part: "'sha256-" + base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() + "'"
    policy = f"default-src 'none'; img-src data:; script-src {sha(script)}; style-src {sha(style)}; base-uri 'none'; form-action 'none'"
    parts = {"@POLICY@": policy, "@TITLE@": html.escape(found["title"]), "@SCRIPT@": script, "@DATA@": inert(found)}
    # One pass: what a part holds is not looked at again, whatever is written in the data.
    return re.sub("|".join(parts), lambda m: parts[m[0]], template)
