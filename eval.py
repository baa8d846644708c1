"""Looking at runs: what a run reached, how it got there, and which tokens its reward likes.

A run folder is plain text, so looking needs no torch and works while the run goes on. One run says little
about a method: --compare puts runs that differ only by seed into one row. The papers' own numbers come only
with --papers, in tables of their own: a small model on a laptop and RoBERTa-large are two experiments. The
page is report.py's.

    python eval.py                                     the newest run under out/
    python eval.py --out_dir out/prompt --html run.html   that run as a page; --svg FILE draws its curve
    python eval.py --compare out/* --html all.html     a table over runs, grouped by settings; --json, --svg
    python eval.py --compare out/* --curve queries --against world_names --svg law.svg
    python eval.py --tables                            the tables of docs/results.md, from results/
"""

import argparse
import difflib
import json
import os
import sys
from pathlib import Path

import report
from support import curves, law, paired, results, searches
from support.groups import as_row, group_runs, label_of, num, table_of
from support.log import as_value, command, leave_quietly, tolerant_terminal, visible
from support.log import fail as end
from support.papers import PAPERS
from support.runs import figures_of, is_finite, is_number, last_step, newest_run, read_lines, read_run
from support.terminal import show_curve, table, token_view

SETTINGS = ("task", "objective", "guidance", "agg", "seed", "device")
SCORES = ("rouge1", "rouge2", "rougeL", "meteor")
TWINS = tuple("sft_" + s for s in SCORES)  # the same scores before the alternate loop
# The columns of --compare for runs whose config.json names none ("figures"), as older ones do.
FIGURES = {
    "prompt": ("test_accuracy", "best_prompt_accuracy", "judge_queries", "queries_to_90", "rank_accuracy",
               "seconds"),
    "summarize": (*SCORES, *TWINS, "exact", "rank_accuracy", "length", "ended"),
    "edits": ("win_rate", "edits_left", "start_edits_left", "token_auroc", "rank_accuracy", "seconds"),
}
# The score whose curve is drawn where config.json names none ("curve"): the first of these that is logged.
MAIN = ("test_accuracy", "accuracy", "dev_accuracy", "meteor", "rougeL", "win_rate")


def fail(message):
    """One line and exit status 2."""
    end(message, program="eval.py")


def figure_names(run):
    """The figures to show first: those that config.json names, else those known here, else all numbers."""
    named = run["config"].get("figures")
    if isinstance(named, list) and named:
        return tuple(map(str, named))
    every = tuple(k for k, v in (run["summary"] or {}).items() if is_number(v) and k not in SETTINGS)
    return FIGURES.get(run["task"], every)


def selected(run, how):
    """The run with the column of the chosen prompt as asked for: "best" has the best prompt, "top3" the mean
    of the three best, as the paper reports it. A run that lacks it, an older one, stays as it is."""
    if how != "top3" or "top3_accuracy" not in (run["summary"] or {}):
        return run
    names = ["top3_accuracy" if name == "best_prompt_accuracy" else name for name in figure_names(run)]
    return run | {"config": run["config"] | {"figures": names}}


def with_logs(run):
    """The run with its log and its samples, as `lines` and `samples`."""
    lines, samples = (read_lines(run["dir"] / name) for name in ("metrics.jsonl", "samples.jsonl"))
    return run | {"lines": lines, "samples": samples}


# -------------------------------------------------------------------------------------------------- one run


def show_state(run):
    """The settings, and whether the run ended well: summary.json, written last, is the sign."""
    summary, folder = run["summary"] or {}, run["dir"]
    settings = " ".join(f"{k}={summary.get(k, run['config'].get(k, '-'))}" for k in SETTINGS)
    print(visible(f"run {folder}: {settings}"))
    if summary:
        return print("ended well; its figures:")
    step = num(last_step(run["lines"]))
    # The files cannot tell a stopped run from one that still runs, so both are said.
    print(f"not finished (stopped, or still running): it stood at step {step}. To go on:")
    print("  " + command("train.py", "--init_from", "resume", "--out_dir", as_value(folder)))
    if not (folder / "ckpt.pt").exists():
        print("  (no ckpt.pt yet: if it has stopped, start it anew with --overwrite)")


def figures_shown(run):
    """[(name, text)] of summary.json's numbers, the main ones first; docs/figures.md says what each means."""
    summary = run["summary"] or {}
    known = [k for k in figure_names(run) if k in summary]
    # null in queries to 0.9 says something: never
    rest = [k for k, v in summary.items() if is_number(v) and k not in SETTINGS or k.endswith("_to_90")]
    null = lambda k: "never" if k.endswith("queries_to_90") else "-"  # no reward was learned, say
    return [(k, null(k) if summary[k] is None else num(summary[k])) for k in dict.fromkeys(known + rest)]


def show_figures(run):
    """Every number, a prompt that was found, how far the scores moved, and what the run did not learn."""
    summary, shown = run["summary"], figures_shown(run)
    if shown:
        table([[visible(k), text, "here"] for k, text in shown])
    if "best_prompt" in summary:
        print(f"  best_prompt: {visible(summary['best_prompt'])}")
    after, before = ([summary.get(k) for k in names] for names in (SCORES, TWINS))
    if all(map(is_number, after + before)):
        deltas = [f"{a - b:+.4f}" for a, b in zip(after, before)]
        names = ("before the loop (sft_)", "after the loop", "delta")
        cells = (map(num, before), map(num, after), deltas)
        table([["", *SCORES, ""], *([name, *row, "here"] for name, row in zip(names, cells))])
    said = summary.get("warnings")
    for line in said if isinstance(said, list) else []:
        print(f"  warning: {visible(line)}")


def show_papers(task):
    """The papers' rows for a task, under their own column names: none of these numbers was measured here."""
    if task not in PAPERS:
        return print(visible(f"no paper's rows for task {task}"))
    paper, what, header, rows, more = PAPERS[task]
    print(f"{paper}, {what}. Another experiment than ours, not to be compared number by number:")
    table([["", *header, ""], *([c.strip() for c in row.split("|")] + ["paper"] for row in rows.split("\n"))])
    print(more + "\n" if more else "", end="")


def chosen(runs, name):
    """(phase, figure, [figures_of a run]) of the curve to draw; phase None where there is none yet."""
    logged = [figures_of(run["lines"]) for run in runs]
    try:
        found = curves.choose(curves.merged(logged), name, (str(runs[0]["config"].get("curve")), *MAIN))
    except KeyError as wrong:
        fail(f"--curve {wrong.args[0]}")
    return *(found or (None, None)), logged


def show(folder, svg_file=None, html_file=None, name=None, papers=False):
    """One run, from the figures down to the tokens.  name: the curve's figure, None for the task's score."""
    run = read_run(folder) or fail(f"{folder}: no readable config.json, so no run; make one: python train.py")
    run = with_logs(run)
    phase, score, logged = chosen([run], name)
    axis, points = curves.curve(logged[0], phase, score) if phase else ("step", {})
    if svg_file:  # files first: a reader of the screen (`| head`) may leave early
        write(svg_file, drawn([("", [points])], axis, score))
    if html_file:
        main = [k for k in figure_names(run) if k != "seconds"]
        tiles = [(k, text) for k, text in figures_shown(run) if k in main]
        write(html_file, report.page([("", [run])], tiles))
    show_state(run)
    if run["summary"]:
        show_figures(run)
    if papers:
        show_papers(run["task"])
    show_curve(axis, score, [(step, *point) for step, point in points.items()])
    # Colours only for eyes: not into a file or pipe, and not where NO_COLOR (no-color.org) asks for none.
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    print(token_view(run, "plain" if plain else "ansi"))


def write(file, text):
    """A picture or a page, whole: it is made before the file is opened."""
    Path(file).write_text(text, encoding="utf-8")
    print(visible(f"wrote {file}"))


def drawn(groups, axis, score):
    """The picture of some curves; one line where there is none yet."""
    groups = [(label, [c for c in members if c]) for label, members in groups]
    if not any(members for _, members in groups):
        fail("--svg: no evaluation to draw yet")
    return curves.svg([g for g in groups if g[1]], axis, score)


# ------------------------------------------------------------------------------------------------ over runs


def compare(args):
    """One table a task: runs of two tasks share no score, and half their settings would differ. The last line
    shows how to look at one of the runs: the first of the last row, or one that has to go on where none has
    ended."""
    found = {folder: read_run(folder) for folder in dict.fromkeys(map(Path, args.compare))}
    skipped = " ".join(str(folder) for folder, run in found.items() if not run)
    runs = [run for run in found.values() if run] or fail(f"--compare: no readable config.json in {skipped}")
    runs = [selected(run, args.select) for run in runs]
    unfinished = [f"{run['dir']} (step {num(step_of(run))})" for run in runs if not run["summary"]]
    for name in unfinished:
        print(visible(f"unfinished, not averaged: {name}"))
    rows, tables, groups = [], [], []
    for task in dict.fromkeys(run["task"] for run in runs if run["summary"]):
        grouped, new = rows_of([run for run in runs if run["summary"] and run["task"] == task])
        rows += new
        tables.append(table_of(new))
        groups += [(task, *group) for group in grouped]
        print(tables[-1][0])
        table(tables[-1][1])
        if args.papers:
            show_papers(task)
    if skipped:
        print(visible(f"skipped, no readable config.json: {skipped}"))
    if args.curve == searches.NAME:
        title, cells = searches.table(methods(groups))
        print(title)
        table(cells)
    if args.against:
        title, cells = law.table(law_lines(groups, args.against), args.against)
        print(title)
        table(cells)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    pictures(args, groups, tables, unfinished)
    resume = command("train.py", "--init_from", "resume", "--out_dir", as_value(runs[0]["dir"]))
    print("\n" + (command("eval.py", "--out_dir", as_value(rows[-1]["runs"][0])) if rows else resume))


def methods(groups):
    """The runs of a comparison and the black-box searches beside them, a line a method."""
    lines = searches.methods([group for _, *group in groups])
    return lines or fail("--curve searches: none of these runs holds a searches.jsonl, which runs of task "
                         "prompt write when they end")


def law_lines(groups, flag):
    """The lines of the law: a flag of numbers that differ between the runs, which hold searches."""
    methods(groups)  # or its one line
    values = {str(run["config"].get(flag)): run["config"].get(flag) for *_, runs in groups for run in runs}
    if len(values) < 2 or not all(map(is_finite, values.values())):
        fail(f"--against {flag}: expected a flag with numbers that differ between the runs, got "
             f"{', '.join(sorted(values))}")
    return law.methods([group for _, *group in groups], flag)


def step_of(run):
    """Where an unfinished run stands."""
    return last_step(read_lines(run["dir"] / "metrics.jsonl"))


def rows_of(runs):
    """Finished runs of one task -> (groups, [(settings that differ, runs)], and their rows of the table)."""
    names = tuple(dict.fromkeys(name for run in runs for name in figure_names(run)))
    grouped = group_runs(runs)
    rows = [as_row(settings, members, names) for settings, members in grouped]
    score = str(runs[0]["config"].get("curve"))
    if found := paired.beside([members for _, members in grouped], score):
        for row, entry in zip(rows, found[1]):
            row["figures"][found[0]] = entry
    return grouped, rows


def pictures(args, groups, tables, unfinished):
    """--svg and --html of a comparison.  groups: [(task, settings, runs)]; a label names the task where two
    are there."""
    if not args.svg and not args.html:
        return
    if not groups:
        fail("--compare: none of these runs has ended, so there is nothing to draw")
    tasks = len({task for task, _, _ in groups})
    loaded = [((f"{task}: " if tasks > 1 else "") + label_of(settings), [with_logs(run) for run in members])
              for task, settings, members in groups]
    if args.svg and args.curve == searches.NAME:
        write(args.svg, searches.picture(methods(groups)))
    elif args.svg and args.against:
        write(args.svg, law.picture(law_lines(groups, args.against), args.against))
    elif args.svg:
        draw_curves(args, loaded)
    if args.html:
        differing = {k for _, settings, _ in groups for k in settings}
        said = "Left out, not finished: " + ", ".join(unfinished) if unfinished else ""
        write(args.html, report.page(loaded, (), tables, differing, said))


def draw_curves(args, loaded):
    """--svg: one figure's curve of every group.  loaded: [(label, runs with their logs)]."""
    phase, score, logged = chosen([run for _, members in loaded for run in members], args.curve)
    left, drawable, axis = iter(logged), [], "step"
    for label, members in loaded:
        found = [curves.curve(next(left), phase, score) for _ in members] if phase else []
        axis = next((a for a, points in found if points), axis)
        drawable.append((label, [points for _, points in found]))
    write(args.svg, drawn(drawable, axis, score))


# ----------------------------------------------------------------------------------------------------- main


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line with the nearest flag, instead of argparse's block of usage."""
        wrong = next((w.split("=")[0] for w in message.split() if w.startswith("--")), "")
        near = difflib.get_close_matches(wrong, self._option_string_actions, 1)
        near = near if "unrecognized" in message else []
        fail(message + (f" (did you mean {near[0]}?)" if near else " (flags: python eval.py -h)"))


def flags():
    """What can be typed; -h prints it."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out_dir", metavar="DIR", help="the run to look at (default: the one under out/ that ended last)")
    add("--compare", metavar="DIR", nargs="+", help="a table over these runs instead")
    add("--select", choices=("best", "top3"), help="with --compare: the best prompt, or the mean of three")
    add("--html", metavar="FILE", help="write the page of the run, or of the runs of --compare")
    add("--svg", metavar="FILE", help="write the curve as a picture; of groups with a band of spread")
    add("--curve", metavar="NAME", help="the figure of the curve, as logged (default: the task's score); "
        "searches: best prompt so far of the run and of black-box searches, by queries")
    add("--against", metavar="FLAG", help="with --compare: queries to 0.9 of every method against a flag of "
        "numbers that differ between the runs (--curve queries)")
    add("--json", metavar="FILE", help="with --compare: write the rows of the table too")
    add("--papers", action="store_true", help="print the papers' own rows for the task, too")
    add("--tables", action="store_true", help="print the tables of docs/results.md from results/")
    add("--collect", metavar="X", nargs="+", help="TABLE ROW DIR ...: put finished runs into results/")
    return parser


def check(args, parser):
    """Flags that exclude one another or need one another."""
    given = {k for k, v in vars(args).items() if v}
    beside = {"compare": {"html", "svg", "curve", "json", "papers", "select", "against"}, "tables": set(),
              "collect": set()}
    for alone, allowed in beside.items():
        if alone in given and (others := given - {alone} - allowed):
            parser.error(f"--{alone} does not go with --{min(others)}")
    for name in ("json", "select", "against"):
        if getattr(args, name) and not args.compare:
            parser.error(f"--{name} goes with --compare")
    if bool(args.against) != (args.curve == law.NAME):
        parser.error(f"--against goes with --curve {law.NAME}")
    if args.compare and args.curve not in (None, searches.NAME, law.NAME) and not args.svg:
        parser.error("--curve of --compare goes with --svg")
    if args.collect and len(args.collect) < 3:
        parser.error("--collect: expected TABLE ROW DIR ...")


def look(args):
    """What the flags ask for."""
    if args.tables:
        print(results.as_blocks(results.tables()) or "no table in results/ yet")
    elif args.collect:
        name, row, *folders = args.collect
        print(visible(f"results/{name}/{row}: seeds {' '.join(results.collect(name, row, folders))}"))
    elif args.compare:
        compare(args)
    else:
        folder = Path(args.out_dir) if args.out_dir else newest_run()
        folder = folder or fail("no run under out/, make one: python train.py")
        if args.curve == searches.NAME:  # a comparison of one run with its searches
            args.compare = [folder]
            return compare(args)
        show(folder, args.svg, args.html, args.curve, args.papers)


def main():
    tolerant_terminal()  # an ASCII terminal still shows the rest of a line
    parser = flags()
    args = parser.parse_args()
    check(args, parser)
    try:
        look(args)
        sys.stdout.flush()  # so that a broken pipe shows inside this try
    except BrokenPipeError:  # `| head` has seen enough: no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except results.ResultsError as problem:
        fail(problem)
    except OSError as problem:
        fail(f"{problem.filename}: {problem.strerror}")


if __name__ == "__main__":
    leave_quietly()
    main()
