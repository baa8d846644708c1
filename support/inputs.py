"""What people hand to a finished run: texts, rows of a file, own candidates.

All of it is read and checked before anything is computed. What is wrong is one line with file and line.
`fields` says what an input is, as support/rows.py has it, the text first: {"text": (("text",), str)}.
"""
import os
import sys

from support.log import UserError
from support.rows import (ENDS, EmptyText, convert, file_lines, json_lines, open_text, pick_fields,
                          plain_lines, read_rows, show)


def input_row(given, where, fields):
    """A text, or a dictionary of fields, as a checked row with "where" in it, for later messages."""
    row = given if isinstance(given, dict) else {next(iter(fields)): given}
    try:
        return pick_fields(where, row, fields) | {"where": row.get("where", where)}
    except EmptyText as empty:
        raise UserError(f"{where}: {empty}: expected a text, got an empty one") from empty


def read_inputs(source, fields, say):
    """A text, a file of texts or rows, or "-" for stdin -> rows. Blank lines of a file are no texts; rows
    with an empty field are left out and counted."""
    if source == "-":
        return line_rows("<stdin>", stdin_text(), fields)
    if os.path.isfile(source):
        if source.endswith(ENDS):  # any other file has one text a line
            return read_rows(source, fields, lambda where, row: row.update(where=where), say)
        return line_rows(source, open_text(source), fields)
    if os.path.isdir(source) or source.endswith((*ENDS, ".txt")):  # a mistyped name is no text to write for
        got = "a folder" if os.path.isdir(source) else "nothing"
        raise UserError(f"{source}: expected a text or a file, got {got}")
    return [input_row(source, "--input", fields)]


def stdin_text():
    """All of stdin; a byte that is no UTF-8 is said with its line."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise UserError(f"<stdin>:{number}: expected UTF-8 text, got byte {byte:#04x}") from error


def line_rows(name, text, fields):
    """One text a line. On stdin, which has no name to tell, lines that begin like JSON objects are rows."""
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{name}: expected one text a line, got nothing")
    if name == "<stdin>" and lines[0][1].lstrip().startswith("{"):
        return [input_row(row, f"{name}:{n}", fields) for n, row in json_lines(name, plain_lines(text))]
    return [input_row(line.strip(), f"{name}:{n}", fields) for n, line in lines]


def read_scored(path, fields, check):
    """Own candidates: [(where, row as it stands, input row or None, candidates, scores or None)].

    A row is {input, "candidates": [...], optional "scores"} or {input, "chosen", "rejected"}; the input may
    be called "document" or "prompt" whatever the task.
    fields: None where candidates answer no input; check(candidate, where) raises what is wrong with one
    """
    found = []
    for number, row in json_lines(path, file_lines(path)):
        where = f"{path}:{number}"
        candidates, scores = candidates_of(row, where)
        for x in candidates:
            check(x, where)
        given = fields and input_row(own_names(row, next(iter(fields))), where, fields)
        found.append((where, row, given, candidates, scores))
    if not found:
        raise UserError(f"{path}: expected at least one row, got nothing")
    return found


def candidates_of(row, where):
    """A row's candidates and their scores (None where nothing is said); of a pair the chosen one first."""
    if "candidates" not in row and "chosen" in row and "rejected" in row:
        return [row["chosen"], row["rejected"]], [1.0, 0.0]
    candidates = row.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        got = "nothing" if candidates is None else show(candidates)
        raise UserError(f"{where}: candidates: expected a list of texts (or chosen and rejected), got {got}")
    return candidates, checked_scores(row.get("scores"), where, len(candidates))


def checked_scores(scores, where, n):
    """A finite number a candidate as floats, or None."""
    if scores is None:
        return None
    if not isinstance(scores, list) or len(scores) != n:
        raise UserError(f"{where}: scores: expected a number a candidate, {n} in all, got {show(scores)}")
    wrong = [x for x in scores if convert(x, float) is None]
    if wrong:
        raise UserError(f"{where}: scores: expected numbers, got {show(wrong[0])}")
    return [float(x) for x in scores]


def own_names(row, field):
    """The row with its input under the task's own name, where it is called "document" or "prompt"."""
    other = next((name for name in ("document", "prompt") if name in row), field)
    return row if field in row or other not in row else row | {field: row[other]}
