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


def middle(curves):
    """Some runs' {step: (x, y)} -> [(x, low, middle, high)] at the steps that all of them have.

    Mean and sample standard deviation; of counts (whole numbers throughout) the median and the quartiles,
    since one run that never gets there would carry a mean away. A single run has no spread: low and high are
    its own value.
    """
    counts = is_count(curves)
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


def svg(groups, axis, name, width=640, height=360):
    """The picture of `groups`, [(label, [{step: (x, y)} a run])], as SVG text: a line and a band a group,
    thin lines for its runs, ticks, and a legend below where there is more than one group.  ValueError where
    there is nothing to draw."""
    drawn = [(label, middle(curves), curves) for label, curves in groups]
    points = [(x, y) for _, line, curves in drawn for x, *ys in line for y in ys]
    points += [point for _, _, curves in drawn for c in curves for point in c.values()]
    if not points:
        raise ValueError("nothing to draw")
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    left, right, top, low = 64, width - 20, 34, height - 52
    # divisor: the extent of the data; 1 where a single point or a flat curve has none
    at = lambda x, y: (
        f"{left + (x - x0) / (x1 - x0 or 1) * (right - left):.1f},"
        f"{low - (y - y0) / (y1 - y0 or 1) * (low - top):.1f}"
    )
    text = lambda x, y, anchor, said: (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">' f'{html.escape(visible(said))}</text>'
    )
    parts, bands = [], []  # bands lie below all lines
    for y in ticks(y0, y1):
        place = float(at(x0, y).split(",")[1])
        parts += [
            f'<path d="M{left} {place} H{right}" stroke="#ddd"/>',
            text(left - 8, place + 4, "end", f"{y:.6g}"),
        ]
    for x in ticks(x0, x1):
        place = float(at(x, y0).split(",")[0])
        parts += [f'<path d="M{place} {low} v5" stroke="#888"/>', text(place, low + 18, "middle", f"{x:.6g}")]
    for k, (label, line, curves) in enumerate(drawn):
        colour, dashed = COLOURS[k % len(COLOURS)], ' stroke-dasharray="6 4"' if k >= len(COLOURS) else ""
        if len(curves) > 1:
            edge = [at(x, high) for x, _, _, high in line] + [
                at(x, lowest) for x, lowest, _, _ in reversed(line)
            ]
            bands.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" opacity="0.15"/>')
            thin = [" ".join(at(*point) for point in c.values()) for c in curves]
            parts += [
                f'<polyline points="{t}" fill="none" stroke="{colour}" stroke-width="0.7" opacity="0.5"/>'
                for t in thin
            ]
        parts.append(
            f'<polyline points="{" ".join(at(x, y) for x, _, y, _ in line)}" fill="none" '
            f'stroke="{colour}" stroke-width="2.2"{dashed}/>'
        )
        parts += [
            f'<circle cx="{p[0]}" cy="{p[1]}" r="3" fill="{colour}"/>'
            for p in (at(x, y).split(",") for x, _, y, _ in line[:1])
            if len(line) == 1
        ]
        if len(drawn) > 1:
            below = height + 20 * k
            parts += [
                f'<path d="M{left} {below - 4} h24" stroke="{colour}" stroke-width="3"{dashed}/>',
                text(left + 32, below, "start", f"{label} (n={len(curves)})"),
            ]
    counts = is_count([c for _, curves in groups for c in curves])
    band = "median and quartiles" if counts else "mean and standard deviation"
    said = name + (f", {band} of runs" if any(len(curves) > 1 for _, curves in groups) else "")
    parts += [
        text(left, 20, "start", said),
        text((left + right) / 2, height - 14, "middle", axis),
        f'<path d="M{left} {top} V{low} H{right}" fill="none" stroke="#888"/>',
    ]
    full = height + (20 * len(drawn) if len(drawn) > 1 else 0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {full}" font-family="system-ui, sans-serif" '
        f'font-size="12">\n<rect width="{width}" height="{full}" fill="#fff"/>\n'
        + "\n".join(bands + parts)
        + "\n</svg>\n"
    )


def merged(all_figures):
    """The phases and figures that any of several runs has logged, as figures_of would give them for one."""
    found = {}
    for figures in all_figures:
        for phase, known in figures.items():
            found.setdefault(phase, {}).update(known)
    return found
