"""results/: the runs behind every table of docs/results.md, small enough to be kept beside the code.

    results/TABLE/table.json               {"title", "command", "commit", "columns": [[figure, header, how],
    ...],
                                            "rows": [[folder, label], ...], "against": folder}
                                           a folder is ROW, or ../TABLE/ROW where another table has the runs
    results/TABLE/ROW/SEED/                config.json, summary.json, metrics.jsonl (thinned) and, where there
                                           are any, scores.json and searches.jsonl of one run

`how` a column is made of the seeds' figures: "mean" (+- sample standard deviation), "median" (a figure that
is null was never reached and counts as infinite), "worst" (the lowest, of what is paid the highest),
"reached" (how many of n) or "paired" (the mean difference by test input to the row named by "against", with a
95 % bootstrap interval: support/paired.py).
"""

import json
import math
import re
import shutil
import statistics
from pathlib import Path

from support import paired
from support.runs import is_finite, portable, read_lines, read_object, read_run

ROOT = Path(__file__).resolve().parent.parent / "results"
HOWS = ("mean", "median", "worst", "reached", "paired")
PAID = ("judge_queries", "queries_to_90", "seconds", "kl", "edits_left")  # what ends so is better low
LINES = 20  # log lines of a phase that are kept
BLOCK = re.compile(r"<!-- table (\S+) -->\n(.*?)\n?<!-- end -->", re.S)


class ResultsError(ValueError):
    """What is wrong with results/ or with what shall go there, in one line."""


# ----------------------------------------------------------------------------------------------- filling it


def collect(name, row, folders, root=ROOT):
    """Copy runs that differ only by seed into results/name/row/, in place of what that row held.
    ResultsError (one line) on a run that did not end, a seed that is there twice, or a name that is no
    folder's name."""
    for word in (name, row):
        if not re.fullmatch(r"\w[\w.+-]*", word):
            raise ResultsError(f"{word}: expected a name of letters, digits, '.', '+' and '-'")
    runs = {}
    for folder in map(Path, folders):
        run = read_run(folder)
        if not run or not run["summary"]:
            raise ResultsError(f"{folder}: no finished run, so nothing to collect")
        seed = str(run["config"].get("seed"))
        if seed in runs:
            raise ResultsError(f"{folder}: seed {seed} is there already ({runs[seed]['dir']})")
        runs[seed] = run
    shutil.rmtree(root / name / row, ignore_errors=True)
    for seed, run in runs.items():
        copy(run, root / name / row / seed)
    note_row(root / name / "table.json", name, row, runs)
    return sorted(runs)


def copy(run, to):
    """One run: its settings without the machine's folders, its figures as they are, a thinned log."""
    to.mkdir(parents=True)
    for file, value in (("config.json", portable(run["config"])), ("summary.json", run["summary"])):
        (to / file).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    if scores := read_object(run["dir"] / "scores.json"):
        rounded = {k: [round(x, 4) for x in values] for k, values in scores.items()}
        (to / "scores.json").write_text(json.dumps(rounded) + "\n", encoding="utf-8")
    if (run["dir"] / "searches.jsonl").exists():
        shutil.copyfile(run["dir"] / "searches.jsonl", to / "searches.jsonl")
    phases = {}
    for line in read_lines(run["dir"] / "metrics.jsonl"):
        phases.setdefault(str(line.get("phase")), []).append(line)
    # Every k-th line of a phase, counted from its last one, which is the one that must not be lost.
    kept = [line for lines in phases.values() for line in lines[::-1][:: math.ceil(len(lines) / LINES)][::-1]]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    (to / "metrics.jsonl").write_text(text, encoding="utf-8")


def note_row(file, name, row, runs):
    """table.json knows the row: a new file gets the runs' own figures as columns, to be edited by hand."""
    first = next(iter(runs.values()))
    figures = first["config"].get("figures") or [k for k, v in first["summary"].items() if is_finite(v)]
    table = read_object(file) or {
        "title": name,
        "command": "",
        "commit": "",
        "columns": [[k, k, "mean"] for k in figures],
        "rows": [],
    }
    if row not in [folder for folder, _ in table["rows"]]:
        table["rows"].append([row, row])
    file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------- printing it


def figure(x):
    """Three decimals; numbers of a hundred and more are whole; infinite is "never"."""
    if x == math.inf:
        return "never"
    return f"{x:,.0f}" if isinstance(x, int) or abs(x) >= 100 else f"{x:.3f}"


def cell(values, key, how):
    """One column of one row.  values: the seeds' figures; null where a run never got there."""
    if how not in HOWS:
        raise ResultsError(f"{how}: expected one of {', '.join(HOWS)}")
    there = [x for x in values if is_finite(x)]
    if how == "reached":
        return f"{len(there)}/{len(values)}"
    if not there and how == "mean" or not values:
        return "-"
    if how == "mean":
        few = f" (n={len(there)})" if len(there) < len(values) else ""
        spread = f" +- {figure(float(statistics.stdev(there)))}" if len(there) > 1 else ""
        return figure(float(statistics.fmean(there))) + spread + few
    paid = key.endswith(PAID)
    known = [x if is_finite(x) else math.inf if paid else -math.inf for x in values]
    found = statistics.median(known) if how == "median" else max(known) if paid else min(known)
    return figure(found) if found > -math.inf else "-"


def markdown(folder):
    """The table of results/NAME/ as markdown lines, with the command and the commit that made it.
    ResultsError (one line) where table.json or a row's run is missing."""
    table = read_object(folder / "table.json")
    if not table:
        raise ResultsError(f"{folder}/table.json: not there, or no JSON object")
    lines = [
        "| "
        + " | ".join([str(table["title"]), "seeds", *(header for _, header, _ in table["columns"])])
        + " |",
        "| --- |" + " --- |" * (1 + len(table["columns"])),
    ]
    rows = {name: finished(folder / name) for name, _ in table["rows"]}
    for name, label in table["rows"]:
        summaries = [run["summary"] for run in rows[name]]
        cells = [cell([s[key] for s in summaries if key in s], key, how) if how != "paired" else
                 difference(rows, name, table.get("against"), key) for key, _, how in table["columns"]]
        lines.append("| " + " | ".join([label, str(len(summaries)), *cells]) + " |")
    made = [f"`{table['command']}`"] if table.get("command") else []
    made += made_by(table, rows)
    return "\n".join(lines + ([""] + [", ".join(made)] if made else []))


def made_by(table, rows):
    """["commit X; Y: row, row"] or []: X is what table.json has for runs that do not say it themselves."""
    said, every = {}, str(table.get("commit") or "")
    for name, label in table["rows"]:
        known = sorted({str(run["config"].get("commit") or "") for run in rows[name]} - {""})
        said.setdefault(" and ".join(known) or every, []).append(label)
    plain = {every} if len(said) > 1 else set(said)  # of these nobody asks which rows they made
    parts = [by if by in plain else f"{by}: {', '.join(labels)}" for by, labels in said.items()]
    text = "; ".join(filter(None, parts))
    return [f"commit {text}"] if text else []


def finished(folder):
    """The runs of one row. ResultsError where there is none."""
    runs = [read_run(config.parent) for config in sorted(folder.glob("*/config.json"))]
    runs = [run for run in runs if run and run["summary"]]
    if not runs:
        raise ResultsError(f"{folder}: no run of this row of the table")
    return runs


def difference(rows, name, base, key):
    """A "paired" cell: this row against the row `base`; "-" of that row itself, and without scores.json."""
    if base not in rows:
        raise ResultsError(f"against {base}: expected one of the rows {', '.join(rows)}")
    return "-" if name == base else paired.against(rows[name], rows[base], key)["text"]


def tables(root=ROOT):
    """{NAME: markdown} of every table below root."""
    return {file.parent.name: markdown(file.parent) for file in sorted(root.glob("*/table.json"))}


def as_blocks(found):
    """The tables as a page holds them, each between its two marks."""
    return "\n\n".join(f"<!-- table {name} -->\n{text}\n<!-- end -->" for name, text in found.items())


def differences(page, found):
    """Where a page and the tables differ, a line each: tables that one of the two lacks, and first differing
    lines."""
    held, said = dict(BLOCK.findall(page)), []
    said += [f"{name}: on the page, not in results/" for name in held if name not in found]
    said += [f"{name}: in results/, not on the page" for name in found if name not in held]
    for name in held.keys() & found.keys():
        ours, theirs = found[name].split("\n"), held[name].split("\n")
        pairs = [
            *zip(ours, theirs),
            *([(ours[-1], "")] if len(ours) > len(theirs) else []),
            *([("", theirs[-1])] if len(theirs) > len(ours) else []),
        ]
        said += [f"{name}: results/ say {a!r}, the page {b!r}" for a, b in pairs if a != b][:1]
    return sorted(said)
