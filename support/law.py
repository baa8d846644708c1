"""Queries to 0.9 against a flag that differs between runs, one line a method: a law as a picture.

The figure is that of `queries_to_90` (support/searches.py): queries until the best prompt so far, by
training score, first had 0.9 on test. Over seeds the median, "never" counted as infinite; every seed is a dot
beside it, since infinite values have no spread.
"""

import math
import statistics

from support import curves, searches
from support.groups import label_of, num
from support.log import visible

NAME = "queries"  # --curve queries --against FLAG
TITLE = f"queries to {searches.ENOUGH} on test, best prompt so far"
WIDE = 10  # values of the flag that are at least so many times apart stand on a logarithmic axis
ABOVE = 0.12  # how far "never" stands above all others, as a share of the axis
NEVER = math.inf


def methods(groups, flag):
    """[(settings that differ, runs)] -> [(label, {(value of the flag, seed): queries})] with NEVER among
    them: a line for each kind of run, then one a search (`joined`)."""
    own, others = {}, {}
    for settings, runs in groups:
        rest = {k: v for k, v in settings.items() if k != flag}
        beside = f", {label_of(rest)}" if rest else ""
        for run in runs:
            at = run["config"].get(flag), run["config"].get("seed")
            found = {name: searches.reached(points) for name, points in searches.read(run).items()}
            if "run" in found:
                label = f"{run['config'].get('guidance')} guidance{beside}"
                own.setdefault(label, {})[at] = found.pop("run")
            for name, queries in found.items():
                others.setdefault(name, {}).setdefault(beside, {})[at] = queries
    return [*own.items(), *(line for name, lines in others.items() for line in joined(name, lines))]


def joined(name, lines):
    """The lines of a method, {settings: {(value, seed): queries}}, as few as there are: a search knows
    nothing of how the run beside it learns, so runs that differ in that hold the same ones, seed by seed."""
    kept = []
    for beside, values in lines.items():
        for _, known in kept:
            shared = known.keys() & values.keys()
            if shared and all(known[at] == values[at] for at in shared):
                known.update(values)
                break
        else:
            kept.append((beside, dict(values)))
    return [(name + beside if len(kept) > 1 else name, values) for beside, values in kept]


def medians(values):
    """{(value, seed): queries} -> {value: (median over the seeds, how many arrived, seeds)}, by value."""
    by_value = {}
    for (x, _), y in values.items():
        by_value.setdefault(x, []).append(y)
    count = lambda ys: (statistics.median(ys), sum(y < NEVER for y in ys), len(ys))
    return {x: count(ys) for x, ys in sorted(by_value.items())}


def table(lines, flag):
    """(title, cells): a row a method, a column a value of the flag."""
    every = sorted({x for _, values in lines for x, _ in values})
    cell = lambda middle, there, n: f"{num(middle) if middle < NEVER else 'never'} ({there}/{n})"
    cells = [["method", *map(num, every)]]
    for label, values in lines:
        found = medians(values)
        cells.append([visible(label), *(cell(*found[x]) if x in found else "-" for x in every)])
    return visible(f"{TITLE}, against {flag}: median over seeds (reached/n) (here)"), cells


def picture(lines, flag):
    """The picture of `methods` as SVG text: queries on a logarithmic axis, "never" above them."""
    xs = sorted({x for _, values in lines for x, _ in values})
    across = math.log10 if xs[0] > 0 and xs[-1] >= WIDE * xs[0] else float
    known = [math.log10(y) for _, values in lines for y in values.values() if y < NEVER] or [0.0]
    low, high = min(known), max(known)
    never = high + ABOVE * (high - low or 1)
    up = lambda y: math.log10(y) if y < NEVER else never
    drawn = curves.Picture([(across(x), y) for x in xs for y in (low, never)])
    round_ones = [m * 10 ** k for k in range(int(low), int(high) + 1) for m in (1, 2, 5)]
    marks = [(up(y), num(y)) for y in round_ones if low <= up(y) <= high] + [(never, "never")]
    drawn.axes(flag, TITLE + ", median and runs", [(across(x), num(x)) for x in xs], marks)
    for k, (_, values) in enumerate(lines):
        middle = [(across(x), up(y)) for x, (y, *_) in medians(values).items()]
        drawn.scattered(k, middle, [(across(x), up(y)) for (x, _), y in values.items()])
    drawn.legend([curves.shortened(label) for label, _ in lines])
    return drawn.svg()
