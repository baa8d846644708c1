"""searches.jsonl: how good the best prompt was after so many queries, of a run and of the black-box searches
beside it (tasks/search.py writes the rows).

Rows stand where the best prompt so far became another one, so a curve is a staircase: between two rows
nothing has changed. Over seeds median and quartiles: a search that is late on one seed is late by any number
of queries.
"""

import statistics

from support import curves
from support.groups import label_of, num
from support.log import visible
from support.runs import is_finite, read_lines

NAME = "searches"  # --curve searches
TITLE = "accuracy on test of the best prompt so far"
ENOUGH = 0.9  # accuracy at which a prompt counts as found, as in queries_to_90
SHARES = (16, 8, 4, 2, 1)  # the table shows the accuracy after a 16th of the queries, an 8th, ...


def read(run):
    """{method: [(queries, accuracy)]} of a run's folder, in the order of its file, {} where it has none."""
    found = {}
    for row in read_lines(run["dir"] / "searches.jsonl"):
        if is_finite(row.get("queries")) and is_finite(row.get("accuracy")):
            found.setdefault(str(row.get("search")), []).append((row["queries"], row["accuracy"]))
    return found


def methods(groups):
    """[(settings that differ, runs)] -> [(label, [[(queries, accuracy)] a run])]: a line a method, and a
    method by itself in every group where there are several."""
    lines = []
    for settings, runs in groups:
        known = [(run, read(run)) for run in runs]
        beside = f", {label_of(settings)}" if settings else ""
        for name in dict.fromkeys(name for _, found in known for name in found):
            own = f"{runs[0]['config'].get('guidance')} guidance" if name == "run" else name
            lines.append((own + beside, [found[name] for _, found in known if name in found]))
    return lines


def after(points, queries):
    """The accuracy of a staircase after so many queries: its last row up to there, None before the first."""
    return next((y for x, y in reversed(points) if x <= queries), None)


def reached(points):
    """Queries at which a staircase first has 0.9, infinite where it never has."""
    return next((x for x, y in points if y >= ENOUGH), float("inf"))


def staircases(runs):
    """Some runs' [(queries, accuracy)] -> [{i: (x, y)}] as curves.svg takes them, all with the same i: two
    corners for each query at which any of them has a row."""
    grid = sorted({x for points in runs for x, _ in points})
    grid = [x for x in grid if all(after(points, x) is not None for points in runs)]
    stairs = []
    for points in runs:
        heights = [after(points, x) for x in grid]
        corners = [(x, y) for x, before, y in zip(grid, heights[:1] + heights, heights) for y in (before, y)]
        stairs.append(dict(enumerate(corners)))
    return stairs


def picture(lines):
    """The picture of all methods as SVG text. ValueError where there is nothing to draw."""
    return curves.svg([(label, staircases(runs)) for label, runs in lines], "judge queries", TITLE,
                      quartiles=True)


def table(lines):
    """(title, cells): a row a method, medians over its runs."""
    last = max(points[-1][0] for _, runs in lines for points in runs)
    at = sorted({max(1, last // share) for share in SHARES})
    title = f"{TITLE}: median of n runs (here); queries to {ENOUGH}: median (reached/n)"
    cells = [["method", "n", f"queries to {ENOUGH}", *(f"after {x}" for x in at)]]
    for label, runs in lines:
        times = [reached(points) for points in runs]
        there = sum(x < float("inf") for x in times)
        middle = lambda x: statistics.median(after(points, x) or 0.0 for points in runs)
        typical = statistics.median(times)
        typical = num(typical) if typical < float("inf") else "never"
        cells.append([visible(label), str(len(runs)), f"{typical} ({there}/{len(runs)})",
                      *(num(float(middle(x))) for x in at)])
    return title, cells
