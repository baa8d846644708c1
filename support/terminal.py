"""Tables, curves and coloured tokens on a terminal: aligned text, a bar a point, black letters on red, white
or blue."""
import math

from support.groups import num
from support.log import visible
from support.runs import is_number, last_step, shown_rows
from support.samples import UNLEARNED, colour, reward_scale, unique, unlearned


def table(rows, sides="<"):
    """Print rows of strings as aligned columns, by default the first left (names), the others right
    (numbers)."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print(
            "  "
            + "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides.ljust(len(row), ">"), widths)).rstrip()
        )


def show_curve(axis, score, points, rows=20):
    """The curve as a table; of a long run every k-th line, counted from the last, so that it fits a
    screen."""
    if not points:
        return print("evaluations: none yet")
    kept = points[::-1][:: math.ceil(len(points) / rows)][::-1]
    top = max(abs(y) for _, _, y in kept) or 1
    axis, score = visible(axis), visible(score)
    print(f"evaluations: {score} over {axis} (here)")
    table(
        [["step", axis, score, ""]] + [[*map(num, p), "#" * round(30 * max(0, p[2]) / top)] for p in kept],
        "<>><",
    )


def paint(token, reward, scale, mode):
    """One token for a terminal with colours ("ansi") or without ("plain"): black letters on red, white or
    blue."""
    text = visible(token)
    if mode == "plain":
        return f"{text}({reward:.2f})" if is_number(reward) else f"{text}(-)"
    return "\033[30;48;2;{};{};{}m".format(*colour(reward, *scale)) + text + "\033[0m"


def token_view(run, mode):
    """The samples of the last evaluation as text: a legend line, then siblings below one another."""
    rows, left_out = shown_rows(run["samples"])
    if not rows:
        return "samples: none yet"
    scale = reward_scale(run["config"], rows)
    low, neutral, high = scale["range"]
    samples = unique(row for row in rows if row["step"] == last_step(rows))
    lines = [f"samples of step {num(samples[0]['step'])} (here), token rewards on a fixed scale: "
             f"{num(low)} lowest, {num(neutral)} neutral, {num(high)} highest"]
    if unlearned(run):
        lines.append(UNLEARNED)
    if mode != "plain":  # there the number behind each token is legend enough
        ends = ((" lowest ", low), (" neutral ", neutral), (" highest ", high))
        lines.append("  " + "".join(paint(*end, (low, neutral, high), mode) for end in ends))
    before = None
    for s in samples:
        score = f"  score {num(s['score'])}" if is_number(s.get("score")) else ""
        role = f", {visible(s['role'])}" if s.get("role") else ""
        lines.append(f"\npreference {num(s.get('preference'))}{score}  {visible(s.get('kind', ''))}{role}")
        group = (s.get("context"), s.get("reference"))
        for key in ("context", "reference") if group != before else ():  # siblings answer the same input
            text = " ".join(visible(x) for x in str(s.get(key) or "").split())  # newlines are layout here
            lines += [f"  {key}: {text[:300] + '...' * (len(text) > 300)}"] if text else []
        before = group
        lines.append(
            "  " + "".join(paint(t, r, scale["range"], mode) for t, r in zip(s["tokens"], s["rewards"]))
        )
    return "\n".join(
        lines + ([f"({left_out} rows left out: tokens and rewards differ in number)"] if left_out else [])
    )
