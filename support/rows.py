"""Rows of a file or of a hub data set: known names, known types, and one line for whatever is wrong with them.

    rows = read_rows("train.tsv", {"text": (("text", "sentence"), str), "label": (("label",), int)})

`fields` says what a task needs: canonical name -> (accepted names, type) or (accepted names, type, default).
"""
import gzip
import json
import math
import os
import zlib
from collections import Counter

from support.log import UserError, visible


class EmptyText(Exception):
    """A row whose text is there and empty, its field as the message. The readers leave such rows out and count them."""


def read_rows(path, fields, check=lambda where, row: None, say=print):
    """A .jsonl, .jsonl.gz or .tsv file -> [{canonical name: value}], checked; other fields of the file are ignored.
    `check(where, row)` raises what it finds wrong beyond types and may mend the row. By hand and not by `datasets`, whose
    errors for a hand-made file name neither the file nor the line."""
    tsv = str(path).endswith(".tsv")
    if not str(path).endswith((".jsonl", ".jsonl.gz", ".tsv")) or not os.path.isfile(path):
        got = "nothing" if not os.path.exists(path) else show(os.path.basename(path))
        raise UserError(f"{path}: expected a .jsonl, .jsonl.gz or .tsv file, got {got}")
    lines = [line.rstrip("\r") for line in open_text(path).split("\n")]  # splitlines() would cut at U+2028 too
    pairs = tsv_lines(path, lines) if tsv else json_lines(path, lines)
    return pick_rows(path, pairs, fields, check, say, tsv)


def pick_rows(source, pairs, fields, check, say, strings=False):
    """(line number, object) pairs -> the rows that have all their texts. Rows with an empty one are counted and said: a
    corpus may have a few, and no one would mend it for three holes in 200,000 lines."""
    rows, empty = [], Counter()
    for number, row in pairs:
        try:
            rows.append(pick_fields(f"{source}:{number}", row, fields, strings, check))
        except EmptyText as error:
            empty[str(error)] += 1
    missing, n = " or ".join(empty), sum(empty.values())
    if not rows:
        got = f"{n:,} with an empty {missing}" if n else "nothing"
        raise UserError(f"{source}: expected at least one row, got {got}")
    if n:
        say(f"{source}: {n:,} of {n + len(rows):,} rows had an empty {missing} and were left out")
    return rows


def open_text(path):
    """The whole file as text; UTF-8 is strict, because a silently replaced byte would become a training target."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as f:
            data = f.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: expected gzip data, got {first_line(error)}") from error
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, got {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")  # an editor's byte order mark is no part of the first field
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{number}: expected UTF-8 text, got byte {error.object[error.start]:#04x}") from error


def json_lines(path, lines):
    """(line number, object) for every line that is not blank."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: json: expected one object a line, got {show(line)}")
            yield number, row


def tsv_lines(path, lines):
    """(line number, {header name: string}); a quote is a character like any other."""
    names = lines[0].split("\t")
    for number, line in enumerate(lines[1:], 2):
        if line:  # two tabs alone are a row with empty fields, not a blank line
            values = line.split("\t")
            if len(values) != len(names):
                raise UserError(f"{path}:{number}: columns: expected {len(names)}, got {len(values)}")
            yield number, dict(zip(names, values))


def pick_fields(where, row, fields, strings=False, check=lambda where, row: None):
    """The wanted fields of one row under their canonical names; `where` (file:line) opens every message.

    Raises UserError where a field is missing or of another type, EmptyText where a text that is needed has no
    character to read. What may be missing may be empty: an empty text stays "", other fields get their default.
    """
    out, blank = {}, None
    for name, (accepted, kind, *default) in fields.items():
        key = next((a for a in accepted if a in row), None)
        value = row.get(key)
        if kind is str and isinstance(value, str) and not value.strip():
            out[name], blank = "", blank if default else blank or name
        elif default and value in ("", None):
            out[name] = default[0]
        else:
            out[name] = convert(value, kind, strings)
            if out[name] is None:
                got = "nothing" if key is None else show(value)
                raise UserError(f"{where}: {name}: expected {kind.__name__}, got {got}")
    if blank:  # only now: a wrong type beside it is still an error
        raise EmptyText(blank)
    check(where, out)
    return out


def convert(value, kind, strings=False):
    """The value as exactly `kind`, or None. The type is compared, not isinstance: to Python True is an int."""
    try:
        if kind is float and type(value) is int or strings and kind in (int, float):  # a tsv knows strings alone
            value = kind(value)
        if kind is str:
            value.encode()  # json can spell half a character ("\ud800"), which nothing could print later
    except (ValueError, OverflowError, TypeError, AttributeError):
        return None
    if type(value) is not kind or kind is float and not math.isfinite(value) or kind is str and not value.strip():
        return None  # a nan would spread to every weight, and an empty text says nothing
    return value


def find_file(folder, stem):
    """The first of stem.jsonl, stem.jsonl.gz, stem.tsv in a folder."""
    names = [stem + end for end in (".jsonl", ".jsonl.gz", ".tsv")]
    for name in names:
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise UserError(f"{folder}: expected one of {', '.join(names)}, got none of them")


def read_hub(spec, split, fields, check=lambda where, row: None, say=print):
    """`hub:<id>[:config]` -> rows like read_rows. `datasets` is imported here: it takes a second nobody else owes."""
    _, _, rest = spec.partition(":")
    id, _, config = rest.partition(":")
    try:
        from datasets import load_dataset
        table = load_dataset(id, config or None, split=split)
    except Exception as error:  # no network, no such data set, config or split: the library has a type for each
        raise UserError(f"{spec}: {split}: expected a data set of the hub, got {first_line(error)}") from error
    for name, (accepted, _, *default) in fields.items():
        if not default and not set(accepted) & set(table.column_names):
            got = visible(", ".join(table.column_names))
            raise UserError(f"{spec}: {name}: expected a column named {' or '.join(accepted)}, got columns {got}")
    return pick_rows(f"{spec}:{split}", enumerate(table, 1), fields, check, say)


def show(value):
    """A value as json, printable and short enough for a one-line message."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # an integer of too many digits to be written, lists in lists in lists
        text = type(value).__name__
    short = visible(text[:61])  # cut first: a field may hold a book
    return short if len(short) <= 60 else short[:57] + "..."


def first_line(error):
    """An exception as one printable line: its type and the first line of its text."""
    return visible(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
