"""Looking at runs: what a run reached, how it got there, and which tokens its reward likes.

A run folder is plain text, so looking needs no torch and works while the run goes on. Every number is marked "here"
(measured by the run in view) or "paper" (printed in the seed paper): a small model on a laptop and RoBERTa-large are
two experiments. One run says little about a method: --compare puts runs that differ only by seed into one row.

    python eval.py                                   the newest run under out/
    python eval.py --out_dir out/prompt              that run; --svg curve.svg, --html tokens.html draw it
    python eval.py --compare out/* --json rows.json  a table over runs, grouped by settings
"""
import argparse
import difflib
import html
import json
import math
import os
import statistics
import sys
from pathlib import Path

from support.log import as_value, command, leave_quietly, tolerant_terminal, visible
from support.log import fail as end

SETTINGS = ("task", "objective", "guidance", "agg", "seed", "device")
SCORES = ("rouge1", "rouge2", "rougeL", "meteor")
TWINS = tuple("sft_" + s for s in SCORES)       # the same scores before the alternate loop
# The columns of --compare, and the first figures of a run.
FIGURES = {"prompt": ("test_accuracy", "best_prompt_accuracy", "judge_queries", "queries_to_90", "rank_accuracy",
                      "seconds"),
           "summarize": (*SCORES, *TWINS, "exact", "rank_accuracy", "length", "ended"),
           "edits": ("win_rate", "edits_left", "start_edits_left", "token_auroc", "rank_accuracy", "seconds")}
# The score whose curve is drawn: the first of these that the evaluation lines hold.
MAIN = ("test_accuracy", "accuracy", "dev_accuracy", "meteor", "rougeL", "win_rate")
# What cannot change a result, or only names the run. init_from stays a setting: better a row too many than runs of
# different origin averaged.
NOT_SETTINGS = {"seed", "out_dir", "overwrite", "cache_dir", "log_every", "threads", "threads_used", "threads_reason",
                "compile", "versions", "version", "commit"}

# Yang et al. 2023, test accuracy (std); per cent there, fractions here as in our own files.
PAPER_PROMPT = """few-shot finetuning | 0.806 (0.039) | 0.849 (0.036)
soft prompt tuning  | 0.738 (0.109) | 0.826 (0.009)
BB Tuning-50        | 0.891 (0.009) | 0.835 (0.009)
AutoPrompt          | 0.750 (0.076) | 0.657 (0.019)
manual prompt       | 0.828         | 0.769
in-context demo     | 0.859 (0.007) | 0.749 (0.008)
instructions        | 0.890         | 0.548
GrIPS               | 0.871 (0.015) | 0.654 (0.098)
RLPrompt            | 0.905 (0.015) | 0.797 (0.021)
token guidance, avg | 0.926 (0.017) | 0.828 (0.015)
token guidance, min | 0.919 (0.018) | 0.824 (0.011)
token guidance, max | 0.912 (0.025) | 0.833 (0.014)"""
PAPER_SUMMARIZE = """token guidance, avg | 0.4309 (0.0006) | 0.2017 (0.0004) | 0.3999 (0.0007) | 0.3523 (0.0006)
token guidance, sum | 0.4286 (0.0008) | 0.1992 (0.0008) | 0.3976 (0.0011) | 0.3474 (0.0037)
token guidance, min | 0.4292 (0.0014) | 0.2001 (0.0002) | 0.3984 (0.0008) | 0.3488 (0.0013)
token guidance, max | 0.4238 (0.0017) | 0.1949 (0.0002) | 0.3934 (0.0009) | 0.3413 (0.0032)
supervised          | - | - | 0.343 | -
supervised + PPO    | - | - | 0.363 | -
supervised + NLPO   | - | - | 0.363 | -"""

# Yin et al. 2025, PPO with rewards of segments, tokens or whole answers; win rates and a score by a large judge model.
PAPER_EDITS = """Phi-3-mini, segment  | 31.05 | 34.0 | 7.65
Phi-3-mini, token    | 27.82 | 27.2 | 7.58
Phi-3-mini, bandit   | 27.05 | 31.3 | 7.46
Llama-3 8B, segment  | 25.11 | 30.4 | 7.15
Llama-3 8B, token    | 23.84 | 26.0 | 7.13
Llama-3 8B, bandit   | 21.20 | 18.7 | 7.11"""


def fail(message):
    """One line and exit status 2. Not data.UserError: importing data.py loads torch, too much to read four files."""
    end(message, program="eval.py")


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool)      # a JSON true is no figure


def num(x):
    """Four significant digits, but never 1.44e+04: query counts are whole numbers and should look it."""
    if not is_number(x):
        return "-"
    return f"{x:.0f}" if math.isfinite(x) and (isinstance(x, int) or abs(x) >= 1000) else f"{x:.4g}"


def table(rows, sides="<"):
    """Print rows of strings as aligned columns, by default the first left (names), the others right (numbers)."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  " + "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides.ljust(len(row), ">"), widths)).rstrip())


def read_lines(path):
    """The objects of a jsonl file. A run killed in mid write leaves half a line, and a resumed run may go on right
    behind it, so unreadable lines are left out wherever they stand, and said once."""
    good, bad = [], []
    for n, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else [], 1):
        try:
            value = json.loads(line.decode("utf-8") or "{}")        # decoded here: it may end in half a character
        except ValueError:
            value = None
        good.append(value) if isinstance(value, dict) else bad.append(n)
    if bad:
        print(visible(f"note: {path}: {len(bad)} unreadable line(s) ignored, the first is line {bad[0]}"))
    return good


def read_run(folder):
    """A run as a dict, or None without a readable config.json; summary is None unless the run ended well."""
    def read(name):                             # missing and half written are the same to us: not there
        try:
            value = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None
    config = read("config.json")
    summary = read("summary.json")
    return config and {"dir": folder, "config": config, "summary": summary, "task": str(config.get("task"))}


def newest_run(root=Path("out")):
    """The run written to last. The log's time counts, not the folder's: that stands still while its files grow."""
    def written(config):
        return max(f.stat().st_mtime for f in (config, config.with_name("metrics.jsonl")) if f.exists())
    configs = list(root.rglob("config.json"))
    return max(configs, key=written).parent if configs else fail(f"no run under {root}/, make one: python train.py")


def last_step(lines):
    """The furthest step in a log, wherever it stands: behind a resume the steps start again from the checkpoint."""
    return max((x["step"] for x in lines if is_number(x.get("step"))), default=0)


def show_state(run, lines):
    """The settings, and whether the run ended well: summary.json is written last, so its presence is the sign."""
    summary, folder = run["summary"] or {}, run["dir"]
    settings = " ".join(f"{k}={summary.get(k, run['config'].get(k, '-'))}" for k in SETTINGS)
    print(visible(f"run {folder}: {settings}"))
    if summary:
        return print("ended well; its figures:")
    # The files cannot tell a stopped run from one that still runs, so both are said.
    print(f"not finished (stopped, or still running): it stood at step {num(last_step(lines))}. To go on:\n  "
          + command("train.py", "--init_from", "resume", "--out_dir", as_value(folder)))
    if not (folder / "ckpt.pt").exists():
        print("  (no ckpt.pt yet: if it has stopped, start it anew with --overwrite)")


def show_figures(summary, task):
    """Every number of summary.json, the main ones first; README's glossary says what each means."""
    known = [k for k in FIGURES.get(task, ()) if k in summary]
    rest = [k for k, v in summary.items() if is_number(v) and k not in SETTINGS]
    table([[visible(k), "never" if summary[k] is None else num(summary[k]), "here"]
           for k in dict.fromkeys(known + rest)])
    if "best_prompt" in summary:
        print(f"  best_prompt: {visible(summary['best_prompt'])}")


def warnings(summary):
    """The sentences of a run that learned nothing from its reward, or where the weights did not matter, a line each."""
    said = (summary or {}).get("warnings")
    return [f"  warning: {visible(line)}" for line in said] if isinstance(said, list) else []


def show_papers(summary, task):
    """Our scores over the seed paper's rows, with the sentence that says what keeps the two apart."""
    def paper(text, *blank):
        rows = [[c.strip() for c in row.split("|")] for row in text.split("\n")]
        return [[name, *blank, *cells, "paper"] for name, *cells in rows]
    if task == "prompt":
        print("beside the paper's test accuracy (std); the paper's are RoBERTa-large judge numbers, not ours:")
        ours = ("test_accuracy", "best_prompt_accuracy", "random_search_accuracy", "random_accuracy",
                "reference_accuracy", "chance")
        table([["", "this run", "SST-2", "AG News", ""], *([k, num(summary.get(k)), "", "", "here"] for k in ours),
               *paper(PAPER_PROMPT, "")])
    elif task == "summarize":
        print("beside the paper's T5-base (std; stemmed ROUGE, full METEOR, most likely CNN/DailyMail), not ours:")
        after, before = ([summary.get(k) for k in names] for names in (SCORES, TWINS))
        delta = [f"{a - b:+.4f}" if is_number(a) and is_number(b) else "-" for a, b in zip(after, before)]
        table([["", *SCORES, ""], ["before the loop (sft_)", *map(num, before), "here"],
               ["after the loop", *map(num, after), "here"], ["delta", *delta, "here"], *paper(PAPER_SUMMARIZE)])
    elif task == "edits":
        print("Xu et al. 2024 report up to 5.1 points of win rate of dense over sequence-level PPO (AlpacaFarm, 7 B).")
        print("Beside Yin et al. 2025; theirs are large models under a judge model, not ours:")
        table([["", "AlpacaEval 2 LC", "Arena-Hard", "MT-Bench", ""],
               ["win rate here, per cent", num(100 * summary.get("win_rate", 0)), "", "", "here"], *paper(PAPER_EDITS)])


def eval_curve(lines):
    """-> (x name, score name, [(step, x, score)]). A resumed run repeats steps after its checkpoint: the last wins."""
    lines = [x for x in lines if x.get("phase") == "eval" and is_number(x.get("step"))]
    other = [k for x in lines for k in x if is_number(x[k]) and k not in ("step", "seconds", "judge_queries")]
    score = next((k for k in (*MAIN, *other) if any(is_number(x.get(k)) for x in lines)), "score")
    # Queries are what a method pays, so they are the axis wherever a run counts them.
    axis = "judge_queries" if any(is_number(x.get("judge_queries")) for x in lines) else "step"
    points = {x["step"]: (x["step"], x[axis], x[score]) for x in lines
              if is_number(x.get(axis)) and is_number(x.get(score)) and math.isfinite(x[score])}
    return axis, score, [points[step] for step in sorted(points)]


def show_curve(axis, score, points, rows=20):
    """The curve as a table; of a long run every k-th line, counted from the last, so that it fits a screen."""
    if not points:
        return print("evaluations: none yet")
    kept = points[::-1][::math.ceil(len(points) / rows)][::-1]
    top = max(abs(y) for _, _, y in kept) or 1
    axis, score = visible(axis), visible(score)
    print(f"evaluations: {score} over {axis} (here)")
    table([["step", axis, score, ""]] + [[*map(num, p), "#" * round(30 * max(0, p[2]) / top)] for p in kept], "<>><")


def svg(axis, score, points, width=480, height=240, pad=48):
    """The curve as an SVG by hand: a line, two axes and their ends need no plotting library."""
    if not points:
        fail("--svg: no evaluation to draw yet")
    _, xs, ys = zip(*points)
    (x0, x1), (y0, y1), right, low = (min(xs), max(xs)), (min(ys), max(ys)), width - pad / 2, height - pad
    # "or 1": a single point, or a flat curve, has no extent to divide by.
    across, up = (right - pad) / (x1 - x0 or 1), (low - pad / 2) / (y1 - y0 or 1)
    at = " ".join(f"{pad + (x - x0) * across:.1f},{low - (y - y0) * up:.1f}" for x, y in zip(xs, ys))
    labels = ((pad, low + 16, "start", num(x0)), (right, low + 16, "end", num(x1)), (pad - 6, low, "end", num(y0)),
              (pad - 6, pad / 2 + 4, "end", num(y1)),
              (width / 2, height - 12, "middle", visible(f"{score} over {axis}")))
    text = "".join(f'<text x="{x}" y="{y}" text-anchor="{a}">{html.escape(t)}</text>\n' for x, y, a, t in labels)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12">\n'
            f'<path d="M{pad} {pad / 2} V{low} H{right}" fill="none" stroke="#888"/>\n'
            f'<polyline points="{at}" fill="none" stroke="#1a9850" stroke-width="2"/>\n{text}</svg>\n')


def last_samples(lines):
    """The samples of the last evaluation. A reward belongs to a token by position: unequal lengths are dropped."""
    def whole(s):
        t, r = s.get("tokens"), s.get("rewards")
        return isinstance(t, list) and isinstance(r, list) and len(t) == len(r) and all(map(is_number, r))
    found = [s for s in lines if s.get("step") == last_step(lines) and whole(s)]
    return [s for i, s in enumerate(found) if s not in found[:i]]       # a resumed run may write the same ones again


def colour(reward, low, high):
    """Red at the lowest reward of the set, yellow half way, green at the highest -> (R, G, B), pale enough for black
    letters. Not over (0, 1): rewards of one run often lie close together, and it is their order that guides."""
    if not math.isfinite(reward):
        return 200, 200, 200
    red, yellow, green = (244, 109, 67), (255, 255, 191), (102, 189, 99)
    x = 2 * (reward - low) / (high - low) if high > low else 1.0
    start, end, x = (red, yellow, x) if x <= 1 else (yellow, green, x - 1)
    return tuple(round(p + (q - p) * x) for p, q in zip(start, end))


def paint(token, reward, low, high, mode):
    """One token for a terminal with colours ("ansi"), without ("plain"), or for a browser ("html")."""
    rgb, text = colour(reward, low, high), visible(token)
    if mode == "plain":
        return f"{text}({reward:.2f})"
    if mode == "ansi":
        return "\033[30;48;2;{};{};{}m".format(*rgb) + text + "\033[0m"
    span = '<span title="{:.4g}" style="background:#{:02x}{:02x}{:02x}">{}</span>'
    return span.format(reward, *rgb, html.escape(text))


def token_view(samples, mode):
    """The coloured view as text: a legend line, then each sample with its preference, context and reference."""
    rewards = [r for s in samples for r in s["rewards"] if math.isfinite(r)] or [0.0]
    low, high = min(rewards), max(rewards)
    lines = [f"samples of step {num(samples[0].get('step'))} (here), token rewards {num(low)} to {num(high)}"]
    if mode != "plain":                         # there the number behind each token is legend enough
        lines[0] += ": " + paint(" lowest ", low, low, high, mode) + paint(" highest ", high, low, high, mode)
    escape = html.escape if mode == "html" else str
    for s in samples:
        lines.append(f"\npreference {num(s.get('preference'))}  {escape(visible(s.get('kind', '')))}")
        for key in ("context", "reference"):
            text = visible(" ".join(str(s.get(key) or "").split()))     # newlines are layout here, unlike in a token
            lines += [f"  {key}: {escape(text[:300] + '...' * (len(text) > 300))}"] if text else []
        lines.append("  " + "".join(paint(t, r, low, high, mode) for t, r in zip(s["tokens"], s["rewards"])))
    return "\n".join(lines)


def show(folder, svg_file, html_file):
    """One run, from the figures down to the tokens."""
    run = read_run(folder) or fail(f"{folder}: no readable config.json, so no run; make one: python train.py")
    lines, samples = read_lines(folder / "metrics.jsonl"), last_samples(read_lines(folder / "samples.jsonl"))
    show_state(run, lines)
    if run["summary"]:
        show_figures(run["summary"], run["task"])
        print("".join(f"{line}\n" for line in warnings(run["summary"])), end="")
        show_papers(run["summary"], run["task"])
    show_curve(*eval_curve(lines))
    # Colours only for eyes: not into a file or pipe, and not where NO_COLOR (no-color.org) asks for none.
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    print(token_view(samples, "plain" if plain else "ansi") if samples else "samples: none yet")
    if svg_file:
        Path(svg_file).write_text(svg(*eval_curve(lines)), encoding="utf-8")
    if html_file:
        page = html.escape("".join(f"{line}\n" for line in warnings(run["summary"])))
        page += token_view(samples or fail("--html: no samples to show yet"), "html")
        Path(html_file).write_text('<!doctype html><meta charset="utf-8"><title>token rewards</title>\n'
                                   f'<pre style="white-space:pre-wrap">\n{page}\n</pre>\n', encoding="utf-8")


def spread(name, values, runs):
    """The figures of a group's runs -> an entry for --json, with its "text" for the table."""
    if name == "queries_to_90" and values:      # null: it took longer than any other run, so infinity, and a median
        values = [v if is_number(v) else math.inf for v in values]
        middle, reached = statistics.median(values), sum(map(math.isfinite, values))
        return {"median": middle if math.isfinite(middle) else None, "reached": reached, "n": len(values),
                "text": f"{num(middle)} ({reached}/{len(values)})"}
    values = [v for v in values if is_number(v) and math.isfinite(v)]
    mean = statistics.fmean(values) if values else None
    std = statistics.stdev(values) if len(values) > 1 else None         # of one run it does not exist: "-", not 0
    text = f"{num(mean)} +- {num(std)}" + (f" (n={len(values)})" if len(values) < runs else "")
    return {"mean": mean, "std": std, "n": len(values), "text": text if values else "-"}


def group_runs(runs):
    """Runs of one task -> rows. A setting is any config value that is not the seed, the folder or the machine; those
    equal in all runs say nothing and are left out."""
    settings = [{k: v for k, v in run["config"].items() if k not in NOT_SETTINGS and not k.startswith("device")}
                for run in runs]                # a key that a run lacks counts as null: older runs know fewer flags
    keys = dict.fromkeys(k for s in settings for k in s)
    differing = [k for k in keys if any(s.get(k) != settings[0].get(k) for s in settings)]
    groups = {}
    for run, s in zip(runs, settings):
        chosen = {k: s.get(k) for k in differing}
        groups.setdefault(json.dumps(chosen, sort_keys=True), (chosen, []))[1].append(run)
    return [{"task": runs[0]["task"], "settings": chosen, "runs": [str(r["dir"]) for r in members],
             "seeds": [r["config"].get("seed") for r in members],
             "figures": {k: spread(k, [r["summary"][k] for r in members if k in r["summary"]], len(members))
                         for k in FIGURES.get(runs[0]["task"], ())}} for chosen, members in groups.values()]


def show_groups(rows):
    """n counts runs; where a seed is there twice the runs are not independent, and n says so."""
    print(f"{visible(rows[0]['task'])}: mean +- sample standard deviation of n runs (here); "
          "queries_to_90: median (reached/n)")
    cells = [["settings that differ", "n", *rows[0]["figures"]]]
    for row in rows:
        n, seeds = len(row["runs"]), len(set(map(str, row["seeds"])))
        cells.append([visible(" ".join(f"{k}={v}" for k, v in row["settings"].items())) or "none",
                      f"{n}" if n == seeds else f"{n} ({seeds} seeds)", *(f["text"] for f in row["figures"].values())])
    table(cells)


def compare(folders, json_file):
    """One table a task: runs of two tasks share no score, and half their settings would differ. The last line
    shows how to look at one of the runs: the first of the last row, or one that has to go on where none has
    ended."""
    runs = {folder: read_run(folder) for folder in dict.fromkeys(map(Path, folders))}
    skipped = " ".join(str(folder) for folder, run in runs.items() if not run)
    runs = [run for run in runs.values() if run] or fail(f"--compare: no readable config.json in {skipped}")
    tasks, rows = {}, []
    for run in runs:
        if run["summary"]:
            tasks.setdefault(run["task"], []).append(run)
        else:
            step = num(last_step(read_lines(run["dir"] / "metrics.jsonl")))
            print(visible(f"unfinished, not averaged: {run['dir']} (step {step})"))
    for members in tasks.values():
        show_groups(groups := group_runs(members))
        rows += groups
    if skipped:
        print(visible(f"skipped, no readable config.json: {skipped}"))
    if json_file:
        Path(json_file).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n" + (command("eval.py", "--out_dir", as_value(rows[-1]["runs"][0])) if rows else
                  command("train.py", "--init_from", "resume", "--out_dir", as_value(runs[0]["dir"]))))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line with the nearest flag, instead of argparse's block of usage."""
        wrong = next((w.split("=")[0] for w in message.split() if w.startswith("--")), "")
        near = difflib.get_close_matches(wrong, self._option_string_actions, 1) if "unrecognized" in message else []
        fail(message + (f" (did you mean {near[0]}?)" if near else " (flags: python eval.py -h)"))


def main():
    tolerant_terminal()                                     # an ASCII terminal still shows the rest of a line
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out_dir", metavar="DIR", help="the run to look at (default: the newest under out/)")
    parser.add_argument("--svg", metavar="FILE", help="write the learning curve as a picture")
    parser.add_argument("--html", metavar="FILE", help="write the coloured tokens as a page")
    parser.add_argument("--compare", metavar="DIR", nargs="+", help="a table over these runs instead")
    parser.add_argument("--json", metavar="FILE", help="with --compare: write the rows of the table too")
    args = parser.parse_args()
    if args.json and not args.compare or args.compare and (args.out_dir or args.svg or args.html):
        parser.error("--json goes with --compare, the other flags with one run")
    try:
        if args.compare:
            compare(args.compare, args.json)
        else:
            show(Path(args.out_dir) if args.out_dir else newest_run(), args.svg, args.html)
        sys.stdout.flush()                                  # so that a broken pipe shows inside this try
    except BrokenPipeError:                                 # `| head` has seen enough: no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as problem:
        fail(f"{problem.filename}: {problem.strerror}")


if __name__ == "__main__":
    leave_quietly()
    main()
