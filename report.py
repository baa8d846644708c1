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

from support.curves import COLOURS, by_phase, merged, middle
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
    away = sorted(abs(x - neutral) for x in spaced(values, 100_000))
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
    """Rows without repetition: a resumed run may write the same ones again, and then the last one counts."""
    names = ("step", "kind", "group", "role", "context", "tokens", "prefix")
    return list({repr([row.get(name) for name in names]): row for row in rows}.values())


def indexed(run):
    """What does not depend on the limits: {"run", "at": {step: {group: rows}}, "extra": {(step, kind): rows}, "odd": rows
    left out, "scales", ...}, or None of a run without samples."""
    rows, odd = shown_rows(run["samples"])
    at, extra = {}, {}
    for row in unique(rows):
        at.setdefault(row["step"], {}).setdefault(group_of(row), []).append(row)
    for row in unique(x for x in run["samples"] if x.get("kind") in KINDS and is_finite(x.get("step"))):
        extra.setdefault((row["step"], row["kind"]), []).append(row)
    return rows and {"run": visible(run["dir"]), "at": dict(sorted(at.items())), "extra": extra, "odd": odd, "n": len(rows),
                     "scales": scales(run, rows), "resolution": number(run["config"].get("resolution")) or 0}


def samples_for_page(x, limits, left_out):
    """The evaluations of one run as `indexed` gives it, each with its groups and tables."""
    names = list(dict.fromkeys(name for groups in x["at"].values() for name in groups))
    steps, known = spaced(x["at"], limits["evaluations"]), spaced(names, limits["groups"])
    left_out.extend([("evaluations", "evaluations", len(steps), len(x["at"])), ("groups", "groups of siblings", len(known), len(names)),
                     (None, "rows whose tokens and rewards go together", x["n"], x["n"] + x["odd"])])
    views = []
    for step in steps:
        groups = [group_for_page(name, x["at"][step][name], limits, left_out) for name in known if name in x["at"][step]]
        tables = {kind: [t for row in x["extra"].get((step, kind), ())[:4] if (t := extra_for_page(row, limits))]
                  for kind in KINDS}
        views.append({"step": step, "groups": groups, **tables})
    return {"run": x["run"], "scales": x["scales"], "resolution": x["resolution"], "steps": views, "beside": alike(views[-1])}


def tokens_shown(x, limits):
    """How many tokens a page shows of a run, counted without making it."""
    return sum(min(len(row["tokens"]), limits["tokens"]) for step in spaced(x["at"], limits["evaluations"])
               for rows in list(x["at"][step].values())[:limits["groups"]] for row in rows[:limits["rows"]])


def group_for_page(name, rows, limits, left_out):
    """The siblings of one evaluation, which answer the same input."""
    longest = max(len(row["tokens"]) for row in rows)
    left_out.extend([("rows", "sequences of a group", min(len(rows), limits["rows"]), len(rows)),
                     ("tokens", "tokens of a sequence", min(longest, limits["tokens"]), longest)])
    first, n = rows[0], limits["characters"]
    there = max(len(str(first.get(name) or "")) for name in ("context", "reference"))
    left_out.append(("characters", "characters of a text", min(n, there), there))
    return {"id": name[:200], "title": " ".join(filter(None, (cut(first.get("kind"), 40), cut(first.get("group"), 60)))),
            "context": cut(first.get("context"), n), "reference": cut(first.get("reference"), n),
            "rows": [row_for_page(row, limits) for row in rows[:limits["rows"]]]}


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


def all_curves(groups):
    """[(phase, [(figure, [(mean, runs) a group])])] over groups of runs, [(label, runs)], whatever the limits: points
    (step, value); the mean (of counts: the median) is taken over the steps that all runs of a group have."""
    figures = [[figures_of(run["lines"]) for run in runs] for _, runs in groups]
    every, phases = merged([f for members in figures for f in members]), []
    for phase in by_phase(every):
        shown = []
        for name in every[phase]:
            members = [[{s: (s, y) for s, y in sorted(f[phase][name].items())} for f in some if name in f.get(phase, ())]
                       for some in figures]
            shown.append((name, [([(x, y) for x, _, y, _ in middle(curves)], [list(c.values()) for c in curves])
                                 for curves in members]))
        phases.append((phase, shown))
    return phases


def curves_for_page(phases, limits, left_out):
    """[{"phase", "figures": [{"name", "groups": [{"mean", "runs"}]}]}], thinned."""
    points = lambda pairs: [[number(x), number(y)] for x, y in spaced(pairs, limits["points"])]
    found = []
    for phase, figures in phases:
        kept = figures[:limits["figures"]]
        longest = max((len(line) for _, groups in kept for _, runs in groups for line in runs), default=0)
        drawn = max((len(runs) for _, groups in kept for _, runs in groups), default=0)
        left_out.extend([("lines", "runs drawn in a group", min(drawn, limits["lines"]), drawn),
                         ("figures", f"figures of {cut(phase, 40)}", len(kept), len(figures)),
                         ("points", "points of a curve", min(longest, limits["points"]), longest)])
        shown = [{"name": cut(name, 60), "groups": [
            {"mean": points(mean), "runs": [points(line) for line in runs[:limits["lines"]]] if len(runs) > 1 else []}
            for mean, runs in groups]} for name, groups in kept]
        found.append({"phase": cut(phase, 40), "figures": shown})
    return found


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


def payload(groups, tiles, tables, differing, said, samples, phases, limits, left_out):
    """What assets/page.js shows, as one object: `page` has the arguments, `samples` and `phases` are what `indexed` and
    `all_curves` make of the groups."""
    runs = [run for _, members in groups for run in members]
    first = runs[0]["config"]
    prompt = (runs[0]["summary"] or {}).get("best_prompt") if len(runs) == 1 else None
    lead = f"Best prompt: {prompt.strip()}" if isinstance(prompt, str) else ""
    states = [state_of(run) for run in runs]
    warned = [(run, w) for run in runs for w in (run["summary"] or {}).get("warnings") or () if isinstance(w, str)]
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
        "samples": [samples_for_page(x, limits, left_out) for x in samples],
        "curves": curves_for_page(phases, limits, left_out),
        "curvesNote": "Every logged figure over training steps; point at a curve to read it."
        + (" Thin lines are single runs, thick ones their mean (of counts: the median)." if len(runs) > 1 else ""),
        "runs": [run_for_page(run, differing, limits) for run in spaced(runs, limits["runs"])]}
    listed = max(len(run["config"]) for run in runs)
    left_out += [("settings", "settings of a run", min(listed, limits["settings"]), listed), ("runs", "runs whose settings are listed", len(found["runs"]), len(runs)), (None, "groups whose samples are shown", len(samples), len(groups) if samples else 0)]
    return found | {"notes": notes(left_out)}


def notes(left_out):
    """A sentence for each thing of which the page does not hold all: the largest gap of each."""
    gaps = {}
    for _, what, shown, there in left_out:
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
    limits, phases, left_out = dict(LIMITS), all_curves(groups), []
    samples = [x for _, members in spaced(groups, 8) if (x := indexed(members[0]))]

    def made():
        """The page within the limits, None where it has surely too many tokens: a token takes 12 bytes at least."""
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
    template, script = (ASSETS.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    style = re.search(r"<style>(.*?)</style>", template, re.S)[1]
    sha = lambda part: "'sha256-" + base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() + "'"
    policy = f"default-src 'none'; img-src data:; script-src {sha(script)}; style-src {sha(style)}; base-uri 'none'; form-action 'none'"
    parts = {"@POLICY@": policy, "@TITLE@": html.escape(found["title"]), "@SCRIPT@": script, "@DATA@": inert(found)}
    # One pass: what a part holds is not looked at again, whatever is written in the data.
    return re.sub("|".join(parts), lambda m: parts[m[0]], template)
