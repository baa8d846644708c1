"""A run's samples as they are shown: colours and their scales, and the rows of samples.jsonl cut to what a
page can hold.

A row is a sequence with a number a token (train.py writes them at every evaluation): r, the weight that the
objective gives the token, log pi - log pi_start, true errors. Older runs know only r. Rows of one group are
siblings.
"""
import statistics

from support.log import visible
from support.runs import colour_range, is_finite, shown_rows

# Red, white, blue (ColorBrewer RdBu, its pale part): told apart by colour-blind people, and black letters can
# be read on each of them (contrast 5.6 at least).
PALETTE = (
    (214, 96, 77),
    (244, 165, 130),
    (253, 219, 199),
    (255, 255, 255),
    (209, 229, 240),
    (146, 197, 222),
    (67, 147, 195),
)
UNLEARNED = "This run learned no reward: r is that of a new net, and nobody used it."
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
    text = "" if text is None else visible(" ".join(str(text).split()))
    return text if len(text) <= n else text[:n] + " \u2026"


def scales(run, rows):
    """{quantity: {"range": (low, neutral, high), "ends", "text"}} of the quantities that a run's rows
    hold."""
    found = {"rewards": reward_scale(run["config"], rows)}
    if unlearned(run):
        found["rewards"]["text"] = f"{UNLEARNED} {found['rewards']['text']}"
    for name in ("weights", "log_ratio"):
        values = [x for row in rows for x in row.get(name) or () if is_finite(x)]
        if values:
            found[name] = even_scale(run["config"], name, values)
    if any(isinstance(row.get("errors"), list) for row in rows):
        found["errors"] = {
            "range": (-1, 0, 0),
            "ends": ("a true error", "no error"),
            "text": "Red and underlined: the tokens that are wrong, as the task knows.",
        }
    return found


def unlearned(run):
    """Whether a run learns no reward (plain MLE, bandit guidance by a task that can be asked): its rounds log
    no fit."""
    rounds = [line for line in run.get("lines", ()) if line.get("phase") == "reward"]
    return bool(rounds) and not any("reward_fit_steps" in line for line in rounds)


def reward_scale(config, rows):
    """The fixed range of r, the same on every page; of a bound that nobody here knows what was seen, and it
    says so."""
    known = colour_range(config)
    if known:
        text = "The whole range of r, the same in every run of this bound; white at "
        text += f"{known[1]:.4g}, the neutral value."
    else:
        values = [x for row in rows for x in row["rewards"] if is_finite(x)] or [0.0]
        known = (min(values), (min(values) + max(values)) / 2, max(values))
        text = f"The range seen in this run, white half way, at {known[1]:.4g}."
    return {"range": known, "ends": (f"{known[0]:.4g}", f"{known[2]:.4g}"), "text": text}


def even_scale(config, name, values):
    """A scale with the neutral value in its middle: 0, or of weights that are all positive, as those of
    weighted maximum likelihood, the mean weight; of an advantage always 0. Its ends hold 99 of 100 tokens, so
    that one outlier does not leave the rest white."""
    critic = config.get("critic", config.get("objective") == "ppo")  # older runs have only the name
    positive = name == "weights" and not critic and min(values) >= 0 and max(values) > 0
    neutral = statistics.fmean(values) if positive else 0.0
    away = sorted(abs(x - neutral) for x in spaced(values, 100_000))
    far = away[min(len(away) - 1, int(0.99 * len(away)))] or 1.0  # all neutral: nothing to stretch
    given = "What the objective gives each token, after shaping"
    advantage = "The advantage of each token, before it is whitened"
    what = {
        "weights": advantage if critic else given,
        "log_ratio": "How much likelier the token is than under the starting policy, in nats",
    }[name]
    middle_is = f"{neutral:.4g}, the mean weight" if positive else "0"
    return {
        "range": (neutral - far, neutral, neutral + far),
        "ends": (f"{neutral - far:.4g}", f"{neutral + far:.4g}"),
        "text": f"{what}; white at {middle_is}. 99 of 100 tokens lie within the ends.",
    }


def row_for_page(row, limits):
    """One sequence. The mean is taken before the cut; a quantity whose length differs from the tokens' is
    left out."""
    n = len(row["tokens"])

    def fitting(name):
        good = isinstance(row.get(name), list) and len(row[name]) == n
        return row[name][:limits["tokens"]] if good else None

    known = [x for x in row["rewards"] if is_finite(x)]
    found = {
        "role": cut(row.get("role", ""), 60),
        "tokens": [visible(t)[:80] for t in fitting("tokens")],
        "mean": number(statistics.fmean(known)) if known else None,
        "preference": number(row.get("preference")),
        "score": number(row.get("score")),
    }
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
    """What does not depend on the limits: {"run", "at": {step: {group: rows}}, "extra": {(step, kind): rows},
    "odd": rows left out, "scales", ...}, or None of a run without samples."""
    rows, odd = shown_rows(run["samples"])
    at, extra = {}, {}
    for row in unique(rows):
        at.setdefault(row["step"], {}).setdefault(group_of(row), []).append(row)
    for row in unique(x for x in run["samples"] if x.get("kind") in KINDS and is_finite(x.get("step"))):
        extra.setdefault((row["step"], row["kind"]), []).append(row)
    return rows and {
        "run": visible(run["dir"]),
        "at": dict(sorted(at.items())),
        "extra": extra,
        "odd": odd,
        "n": len(rows),
        "scales": scales(run, rows),
        "resolution": number(run["config"].get("resolution")) or 0,
    }


def samples_for_page(x, limits, left_out):
    """The evaluations of one run as `indexed` gives it, each with its groups and tables."""
    names = list(dict.fromkeys(name for groups in x["at"].values() for name in groups))
    steps, known = spaced(x["at"], limits["evaluations"]), spaced(names, limits["groups"])
    left_out.extend(
        [
            ("evaluations", "evaluations", len(steps), len(x["at"])),
            ("groups", "groups of siblings", len(known), len(names)),
            (None, "rows whose tokens and rewards go together", x["n"], x["n"] + x["odd"]),
        ]
    )
    views = []
    for step in steps:
        there = x["at"][step]
        groups = [group_for_page(name, there[name], limits, left_out) for name in known if name in there]
        extra = {kind: x["extra"].get((step, kind), ())[:4] for kind in KINDS}
        tables = {kind: [extra_for_page(row, limits) for row in rows] for kind, rows in extra.items()}
        views.append({"step": step, "groups": groups} | {k: [t for t in v if t] for k, v in tables.items()})
    return {"steps": views, "beside": alike(views[-1])} | {k: x[k] for k in ("run", "scales", "resolution")}


def tokens_shown(x, limits):
    """How many tokens a page shows of a run, counted without making it."""
    return sum(
        min(len(row["tokens"]), limits["tokens"])
        for step in spaced(x["at"], limits["evaluations"])
        for rows in list(x["at"][step].values())[: limits["groups"]]
        for row in rows[: limits["rows"]]
    )


def group_for_page(name, rows, limits, left_out):
    """The siblings of one evaluation, which answer the same input."""
    longest = max(len(row["tokens"]) for row in rows)
    left_out.extend(
        [
            ("rows", "sequences of a group", min(len(rows), limits["rows"]), len(rows)),
            ("tokens", "tokens of a sequence", min(longest, limits["tokens"]), longest),
        ]
    )
    first, n = rows[0], limits["characters"]
    there = max(len(str(first.get(name) or "")) for name in ("context", "reference"))
    left_out.append(("characters", "characters of a text", min(n, there), there))
    return {
        "id": name[:200],
        "title": " ".join(filter(None, (cut(first.get("kind"), 40), cut(first.get("group"), 60)))),
        "context": cut(first.get("context"), n),
        "reference": cut(first.get("reference"), n),
        "rows": [row_for_page(row, limits) for row in rows[: limits["rows"]]],
    }


def alike(view):
    """Whether most siblings share half of their tokens: then a candidate tells most beside the best one."""
    shares = []
    for group in view["groups"]:
        best = max(group["rows"], key=lambda row: row.get("preference", -1e30))
        words = set(best["tokens"])
        others = [set(row["tokens"]) for row in group["rows"] if row is not best]
        # divisor: the best one's words
        shares += [len(words & other) / max(1, len(words)) for other in others]
    return bool(shares) and statistics.median(shares) >= 0.5


def colour(value, low, neutral, high):
    """A value of a scale as (R, G, B), which page.js does likewise: each half is stretched by itself, since
    the neutral value need not lie in the middle. Grey for what is no number."""
    if not is_finite(value):
        return 200, 200, 200
    half = neutral - low if value < neutral else high - neutral
    at = max(-1.0, min(1.0, (value - neutral) / half)) if half > 0 else 0.0
    place = (at + 1) / 2 * (len(PALETTE) - 1)
    i = min(int(place), len(PALETTE) - 2)
    return tuple(round(a + (b - a) * (place - i)) for a, b in zip(PALETTE[i], PALETTE[i + 1]))
