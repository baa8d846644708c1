"""Rows of a file or of a hub data set: known names, known types, and one line for whatever is wrong with
them.

    rows = read_rows("train.csv", {"text": (("text", "sentence"), str), "label": (("label",), int)})

`fields` says what a task needs: canonical name -> (accepted names, type) or (accepted names, type, default).
"""
import codecs
import csv
import gzip
import json
import math
import os
import zlib
from collections import Counter
from dataclasses import dataclass

from support.files import digest, file_digest
from support.log import UserError, visible

# What a file may be called; where a folder has several of one name, the first goes first.
ENDS = (".jsonl", ".jsonl.gz", ".tsv", ".tsv.gz", ".csv", ".csv.gz")
NAMED = f"a {', '.join(ENDS[:-1])} or {ENDS[-1]} file"
csv.field_size_limit(2 ** 31 - 1)  # characters of a field; the library's own 131,072 refuse a long article


class EmptyText(Exception):
    """A row whose text is there and empty, its field as the message. The readers leave such rows out and
    count them."""


class NotThere(UserError):
    """A split that a folder or a hub data set does not have, while there may be others."""


@dataclass
class Source:
    """Where rows come from: a file, or a split of a hub data set as its table. `name` opens every message."""
    name: str
    table: object = None

    def rows(self, fields, check=lambda where, row: None, say=print):
        """The rows one after the other as {canonical name: value}, checked; nothing is kept of them.

        `check(where, row)` raises what it finds wrong beyond types and may mend the row. UserError for the
        first thing that is wrong.
        """
        if self.table is not None:
            check_columns(self.name.rpartition(":")[0], self.table.column_names, fields)
            return pick_rows(self.name, enumerate(self.table, 1), fields, check, say)
        name, lines = self.name.removesuffix(".gz"), file_lines(self.name)
        if name.endswith(".jsonl"):
            return pick_rows(self.name, json_lines(self.name, lines), fields, check, say)
        table = csv_lines(self.name, lines) if name.endswith(".csv") else tsv_lines(lines)
        return pick_rows(self.name, table_rows(self.name, table, fields), fields, check, say, strings=True)

    def content(self, memo):
        """What it holds, as plain values: how it is written and a hash of it. memo: the folder where the hash
        of a large file is remembered."""
        if self.table is None:
            end = next(x for x in ENDS if self.name.endswith(x))
            return [end, file_digest(self.name, memo)]
        return getattr(self.table, "_fingerprint", None) or digest(list(self.table))

    def size(self):
        """About how many bytes of text there are, for a progress line alone."""
        if self.table is None:
            return os.path.getsize(self.name) * (3 if self.name.endswith(".gz") else 1)
        return getattr(self.table, "dataset_size", None) or 1


def find_source(path):
    """The Source of a file of one of ENDS, which must be there."""
    if not str(path).endswith(ENDS) or not os.path.isfile(path):
        got = "nothing" if not os.path.exists(path) else show(os.path.basename(path))
        raise UserError(f"{path}: expected {NAMED}, got {got}")
    return Source(str(path))


def read_rows(path, fields, check=lambda where, row: None, say=print):
    """A file of one of ENDS -> [{canonical name: value}], checked; other fields of the file are ignored. By
    hand and not by `datasets`, whose errors for a hand-made file name neither the file nor the line."""
    return list(find_source(path).rows(fields, check, say))


def pick_rows(source, pairs, fields, check, say, strings=False):
    """(line number, object) pairs -> one by one the rows that have all their texts. Rows with an empty one
    are counted and said at the end: a corpus may have a few, and no one would mend it for three holes in
    200,000 lines."""
    n, empty = 0, Counter()
    for number, row in pairs:
        try:
            picked = pick_fields(f"{source}:{number}", row, fields, strings, check)
        except EmptyText as error:
            empty[str(error)] += 1
            continue
        n += 1
        yield picked
    missing, out = " or ".join(empty), sum(empty.values())
    if not n:
        got = f"{out:,} with an empty {missing}" if out else "nothing"
        raise UserError(f"{source}: expected at least one row, got {got}")
    if out:
        say(f"{source}: {out:,} of {out + n:,} rows had an empty {missing} and were left out")


def file_lines(path):
    """(line number, line with its end) of a file, gzip or not, one after the other: a corpus may be larger
    than the memory. UTF-8 is strict, because a silently replaced byte would become a training target."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as f:
            for number, line in enumerate(f, 1):
                yield number, decoded(path, number, line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: expected gzip data, got {first_line(error)}") from error
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, got {error.strerror}") from error


def decoded(path, number, line):
    """One line of a file as text, or UserError."""
    try:  # an editor's byte order mark is no part of the first field
        text = line.removeprefix(codecs.BOM_UTF8).decode() if number == 1 else line.decode()
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x}"
        raise UserError(f"{path}:{number}: expected UTF-8 text, got {got}") from error
    if "\0" in text:  # a binary file, or text of two bytes a character
        raise UserError(f"{path}:{number}: expected UTF-8 text, got a NUL byte")
    return text


def open_text(path):
    """The whole file as text; UTF-8 is strict, because a silently replaced byte would become a training
    target."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as f:
            data = f.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: expected gzip data, got {first_line(error)}") from error
    except OSError as error:
        raise UserError(f"{path}: expected a readable file, got {error.strerror}") from error
    line = lambda place: data.count(b"\n", 0, place) + 1
    try:
        text = data.decode("utf-8-sig")  # an editor's byte order mark is no part of the first field
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x}"
        raise UserError(f"{path}:{line(error.start)}: expected UTF-8 text, got {got}") from error
    if (place := data.find(b"\0")) >= 0:  # a binary file, or text of two bytes a character
        raise UserError(f"{path}:{line(place)}: expected UTF-8 text, got a NUL byte")
    return text


def plain_lines(text):
    """(line number, line) of a text whose rows are lines; splitlines() would cut at U+2028 too."""
    return enumerate(text.split("\n"), 1)


def json_lines(path, lines):
    """(line number, object) for every one of `lines`, (line number, line), that is not blank."""
    for number, line in lines:
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                got = show(line.removesuffix("\n").rstrip("\r"))
                raise UserError(f"{path}:{number}: json: expected one object a line, got {got}")
            yield number, row


def tsv_lines(lines):
    """(line number, [strings]) for every line that is not blank; a quote is a character like any other."""
    for number, line in lines:
        if line := line.removesuffix("\n").rstrip("\r"):  # two tabs alone are empty fields, not a blank line
            yield number, line.split("\t")


def csv_lines(path, lines):
    """(number of its first line, [strings]) for every row that is not blank. Fields are separated by commas;
    one that holds a comma, a newline or a quote stands in quotes, the quote itself doubled."""
    # strict: a stray quote is an error, not a guess
    table = csv.reader((line for _, line in lines), strict=True)
    while True:
        number = table.line_num + 1
        try:
            row = next(table, None)
        except csv.Error as error:
            got = "a quote that is never closed" if "end of data" in str(error) else first_line(error)
            raise UserError(f"{path}:{number}: csv: expected comma-separated fields, got {got}") from error
        if row is None:
            return
        if row:
            yield number, row


def table_rows(path, table, fields):
    """(line number, {name: string}) of rows of strings whose first one holds the names."""
    number, names = next(table, (1, []))
    names = [name.strip() for name in names]
    if twice := [name for name, n in Counter(names).items() if name and n > 1]:
        raise UserError(f"{path}:{number}: columns: expected different names, got {show(twice[0])} twice")
    if names:
        check_columns(f"{path}:{number}", names, fields)
    for number, values in table:
        if len(values) != len(names):
            raise UserError(f"{path}:{number}: columns: expected {len(names)}, got {len(values)}")
        yield number, dict(zip(names, values))


def check_columns(where, names, fields):
    """UserError where a field that must be there is none of a table's columns."""
    for name, (accepted, _, *default) in fields.items():
        if not default and not set(accepted) & set(names):
            got = show(names)[1:-1].replace('"', "")
            raise UserError(f"{where}: {name}: expected a column named {' or '.join(accepted)}, "
                            f"got columns {got}")


def pick_fields(where, row, fields, strings=False, check=lambda where, row: None):
    """The wanted fields of one row under their canonical names; `where` (file:line) opens every message.

    Raises UserError where a field is missing or of another type, EmptyText where a text that is needed has no
    character to read. What may be missing may be empty: an empty text stays "", other fields get their
    default.
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
    """The value as exactly `kind`, or None. The type is compared, not isinstance: to Python True is an int.

    strings  the value comes from a table, which knows strings alone: numbers are read, lists and objects as
    json
    """
    try:
        if kind is float and type(value) is int or strings and kind in (int, float):
            value = kind(value)
        if strings and kind in (list, dict):
            value = json.loads(value)
        if kind is str:
            value.encode()  # json can spell half a character ("\ud800"), which nothing could print later
    except (ValueError, OverflowError, TypeError, AttributeError, RecursionError):
        return None
    if type(value) is not kind or kind is str and not value.strip():
        return None  # an empty text says nothing
    return None if kind is float and not math.isfinite(value) else value  # a nan would spread to every weight


def find_file(folder, *stems):
    """The first of stem.jsonl, stem.jsonl.gz, stem.tsv, ... in a folder; NotThere where there is none.
    stems  names in the order in which they are looked for"""
    for name in (stem + end for stem in stems for end in ENDS):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    if not os.path.isdir(folder):
        got = "a file" if os.path.exists(folder) else "nothing"
        raise UserError(f"{folder}: expected a folder, got {got}")
    names = ", ".join(stems[0] + end for end in ENDS)
    raise NotThere(f"{folder}: expected one of {names}, got none of them")


def hub_source(spec, split):
    """The Source of a split of `hub:<id>[:config]`; NotThere where it has no such split. `datasets` is
    imported here: it takes a second nobody else owes."""
    _, _, rest = spec.partition(":")
    id, _, config = rest.partition(":")
    try:
        from datasets import load_dataset
        return Source(f"{spec}:{split}", load_dataset(id, config or None, split=split))
    except Exception as error:  # no network, no such data set, config or split: a type for each of them
        kind = NotThere if str(error).startswith("Unknown split") else UserError
        raise kind(f"{spec}: {split}: expected a data set of the hub, got {first_line(error)}") from error


def read_hub(spec, split, fields, check=lambda where, row: None, say=print):
    """`hub:<id>[:config]` -> rows like read_rows."""
    return list(hub_source(spec, split).rows(fields, check, say))


def show(value):
    """A value as json, printable and short enough for a one-line message."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # an integer of too many digits to be written, lists in lists in ...
        text = type(value).__name__
    short = visible(text[:61])  # cut first: a field may hold a book
    return short if len(short) <= 60 else short[:57] + "..."


def first_line(error):
    """An exception as one printable line: its type and the first line of its text."""
    return visible(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
