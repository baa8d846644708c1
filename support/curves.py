"""Curves over runs: figures by step, the middle and the spread of runs that differ by seed, and an SVG by
hand.

A line, a band, two axes and some ticks need no plotting library, and a picture made of text can be read by a
test.
"""

import difflib
import html
import math
import statistics

from support.log import visible

# Okabe and Ito's colours, told apart by colour-blind people too; behind the last one they start again,
# dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b")
LEGEND = 64  # characters of a label that fit beside its mark
PHASES = ("eval", "policy", "reward", "sft", "warmup", "judge")  # in this order a name is looked up


def by_phase(figures):
    """The phases of figures_of, the evaluations first, unknown ones last."""
    return sorted(figures, key=lambda phase: PHASES.index(phase) if phase in PHASES else len(PHASES))


def choose(figures, name=None, usual=()):
    """-> (phase, figure) to draw, of figures_of: `name`, a figure or PHASE/FIGURE; else the first of the
    `usual` ones among the evaluations, else their first figure.  None where there is no evaluation.
    KeyError, whose text names the nearest figure, where `name` is not logged."""
    known = [(phase, figure) for phase in by_phase(figures) for figure in figures[phase]]
    if name is None:
        scores = [figure for phase, figure in known if phase == "eval" and figure != "judge_queries"]
        found = next((x for x in (*usual, *scores) if x in scores), None)
        return ("eval", found) if found else None
    for phase, figure in known:
        if name in (figure, f"{phase}/{figure}"):
            return phase, figure
    names = [x for phase, figure in known for x in (figure, f"{phase}/{figure}")]
    near = difflib.get_close_matches(name, names, 1, cutoff=0)
    raise KeyError(f"{name}: no such figure is logged" + (f" (did you mean {near[0]}?)" if near else ""))


def curve(figures, phase, figure):
    """-> (name of the axis, {step: (x, y)}). Queries are what a method pays, so they are the axis of the
    evaluations wherever a run counts them."""
    values = figures.get(phase, {}).get(figure, {})
    queries = figures.get("eval", {}).get("judge_queries", {}) if phase == "eval" else {}
    if figure != "judge_queries" and any(step in queries for step in values):
        return "judge_queries", {
            step: (queries[step], y) for step, y in sorted(values.items()) if step in queries
        }
    return "step", {step: (step, y) for step, y in sorted(values.items())}


def middle(curves, quartiles=False):
    """Some runs' {step: (x, y)} -> [(x, low, middle, high)] at the steps that all of them have.

    Mean and sample standard deviation; of counts (whole numbers throughout), and where `quartiles` are asked
    for, the median and the quartiles, since one run that never gets there would carry a mean away. A single
    run has no spread: low and high are its own value.
    """
    counts = quartiles or is_count(curves)
    common = set(curves[0]).intersection(*curves[1:]) if curves else ()
    return [
        (math.fsum(c[step][0] for c in curves) / len(curves), *spread([c[step][1] for c in curves], counts))
        for step in sorted(common)
    ]


def is_count(curves):
    """Whether a figure is a count: JSON tells 3 from 3.0."""
    return all(isinstance(y, int) for c in curves for _, y in c.values())


def spread(values, counts):
    """(low, middle, high) of one step's values."""
    if len(values) == 1:
        return (values[0],) * 3
    if counts:
        return tuple(statistics.quantiles(values, n=4, method="inclusive"))
    mean = math.fsum(values) / len(values)
    # divisor: n - 1. Not statistics.stdev, whose exact fractions take seconds over 10,000 lines.
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))
    return mean - std, mean, mean + std


def ticks(low, high, about=5):
    """Round numbers between low and high, 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def look(k):
    """Colour and dashes of the k-th line."""
    return COLOURS[k % len(COLOURS)], 'stroke-dasharray="6 4"' if k >= len(COLOURS) else ""


class Picture:
    """An SVG in the making: a place for every value, and the parts drawn so far, bands below all lines."""

    def __init__(self, points, width=640, height=360):
        """points: all (x, y) that will be drawn; width and height in pixels."""
        (self.x0, self.x1), (self.y0, self.y1) = ((min(v), max(v)) for v in zip(*points))
        self.width, self.height = width, height
        self.left, self.right, self.top, self.low = 64, width - 20, 34, height - 52
        self.bands, self.parts = [], []

    def at(self, x, y):
        """(x, y) in pixels as text."""
        # divisor: the extent of the data; 1 where a single point or a flat curve has none
        across = (x - self.x0) / (self.x1 - self.x0 or 1) * (self.right - self.left)
        up = (y - self.y0) / (self.y1 - self.y0 or 1) * (self.low - self.top)
        return f"{self.left + across:.1f},{self.low - up:.1f}"

    def text(self, x, y, anchor, said):
        """A label that is only text, whatever stands in it."""
        said = html.escape(visible(said))
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{said}</text>')

    def axes(self, axis, title, across=None, up=None):
        """Ticks with their grid lines, the two axes, what they are.  across, up: [(value, what it says)] in
        the place of round numbers"""
        at_round = lambda low, high: [(v, f"{v:.6g}") for v in ticks(low, high)]
        for y, said in up or at_round(self.y0, self.y1):
            place = float(self.at(self.x0, y).split(",")[1])
            self.parts.append(f'<path d="M{self.left} {place} H{self.right}" stroke="#ddd"/>')
            self.text(self.left - 8, place + 4, "end", said)
        for x, said in across or at_round(self.x0, self.x1):
            place = float(self.at(x, self.y0).split(",")[0])
            self.parts.append(f'<path d="M{place} {self.low} v5" stroke="#888"/>')
            self.text(place, self.low + 18, "middle", said)
        self.text(self.left, 20, "start", title)
        self.text((self.left + self.right) / 2, self.height - 14, "middle", axis)
        corner = f"M{self.left} {self.top} V{self.low} H{self.right}"
        self.parts.append(f'<path d="{corner}" fill="none" stroke="#888"/>')

    def line(self, points, colour, more):
        """A line through some points; a dot where there is only one."""
        at = [self.at(x, y) for x, y in points]
        if len(at) == 1:
            x, y = at[0].split(",")
            return self.parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        self.parts.append(f'<polyline points="{" ".join(at)}" fill="none" stroke="{colour}" {more}/>')

    def scattered(self, k, middle, points):
        """One group in its colour: a line through its middle, [(x, y)], and a pale dot a run."""
        colour, dashed = look(k)
        for x, y in (self.at(*point).split(",") for point in points):
            self.parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}" opacity="0.35"/>')
        self.line(middle, colour, f'stroke-width="2.2" {dashed}')

    def group(self, k, line, curves):
        """One group in its colour: the band and the thin lines of its runs (`curves`, [] for none of them),
        and its middle.  line: see `middle`."""
        colour, dashed = look(k)
        if any(low < high for _, low, _, high in line):
            edge = [self.at(x, high) for x, _, _, high in line]
            edge += [self.at(x, low) for x, low, _, _ in reversed(line)]
            self.bands.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" opacity="0.15"/>')
        if len(curves) > 1:
            for some in curves:
                self.line(some.values(), colour, 'stroke-width="0.7" opacity="0.5"')
        self.line([(x, y) for x, _, y, _ in line], colour, f'stroke-width="2.2" {dashed}')

    def legend(self, labels):
        """A line a group below the picture, which grows by as much."""
        for k, label in enumerate(labels):
            colour, dashed = look(k)
            mark = f'stroke="{colour}" stroke-width="3" {dashed}'
            self.parts.append(f'<path d="M{self.left} {self.height - 4} h24" {mark}/>')
            self.text(self.left + 32, self.height, "start", label)
            self.height += 20

    def svg(self):
        """The picture as text, on white paper."""
        size = f'width="{self.width}" height="{self.height}"'
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'font-family="system-ui, sans-serif" font-size="12">\n<rect {size} fill="#fff"/>')
        return "\n".join([head, *self.bands, *self.parts, "</svg>\n"])


def svg(groups, axis, name, quartiles=False):
    """The picture of `groups`, [(label, [{step: (x, y)} a run])], as SVG text: a line a group, for several
    runs a band of their spread and a thin line each, ticks, a legend of more than one group.  `quartiles`:
    bands between the quartiles around the median, and no thin lines, which many groups would bury.
    ValueError where there is nothing to draw."""
    drawn = [(label, middle(curves, quartiles), curves) for label, curves in groups]
    points = [(x, y) for _, line, _ in drawn for x, *ys in line for y in ys]
    points += [point for _, _, curves in drawn for c in curves for point in c.values() if not quartiles]
    if not points:
        raise ValueError("nothing to draw")
    picture = Picture(points)
    counts = quartiles or is_count([c for _, curves in groups for c in curves])
    several = any(len(curves) > 1 for _, curves in groups)
    band = ", median and quartiles of runs" if counts else ", mean and standard deviation of runs"
    picture.axes(axis, name + (band if several else ""))  # first: no grid line hides a curve
    for k, (_, line, curves) in enumerate(drawn):
        picture.group(k, line, [] if quartiles else curves)
    if len(drawn) > 1:
        picture.legend([f"{shortened(label)} (n={len(curves)})" for label, _, curves in drawn])
    return picture.svg()


def shortened(label):
    """A label that does not run out of the picture: a comparison of many settings would."""
    return label if len(label) <= LEGEND else label[:LEGEND] + "..."


def merged(all_figures):
    """The phases and figures that any of several runs has logged, as figures_of would give them for one."""
    found = {}
    for figures in all_figures:
        for phase, known in figures.items():
            found.setdefault(phase, {}).update(known)
    return found
