"""Documents of plain text out of files, folders and hub data sets, one row {"text"} each, kept in the cache.

A text file is cut at blank lines into documents of some 2,000 characters; of rows the text fields are a
document together.
"""
import hashlib
import os
from dataclasses import dataclass

import numpy as np

from support.corpus import keep_rows
from support.files import file_digest
from support.log import UserError
from support.rows import ENDS, Source, file_lines, hub_source

TEXTS = ".txt", ".md", ".txt.gz"
NAMES = "text", "document", "article", "content", "sentence"  # of a row's text, the first that is there
LONG = 2000  # characters from which a document of a text file ends at the next blank line


@dataclass
class TextFile:
    """A file of plain text as a support.rows.Source."""
    name: str

    def rows(self, fields, check=None, say=print):
        """{"text"} of a document after the other. Paragraphs stay together until there are LONG characters: a
        blank line ends a paragraph, not what it belongs to."""
        lines, size, n = [], 0, 0
        for _, line in file_lines(self.name):
            if line.strip() or size < LONG:
                lines.append(line)
                size += len(line)
                continue
            if text := "".join(lines).strip():
                n += 1
                yield {"text": text}
            lines, size = [], 0
        if text := "".join(lines).strip():
            n += 1
            yield {"text": text}
        if not n:
            raise UserError(f"{self.name}: expected text, got an empty file")

    def content(self, memo):
        """What it holds."""
        return ["text", file_digest(self.name, memo)]

    def size(self):
        """About how many bytes of text there are."""
        return os.path.getsize(self.name) * (3 if self.name.endswith(".gz") else 1)


@dataclass
class TextRows(Source):
    """Rows whose text fields, a line each, are one document."""

    def rows(self, fields, check=lambda where, row: None, say=print):
        for row in super().rows(fields, check, say):
            yield {"text": "\n".join(row.values())}


def source_of(path):
    """The source of one file, or UserError."""
    if path.endswith(TEXTS):
        return TextFile(path)
    if path.endswith(ENDS):
        return TextRows(path)
    raise UserError(f"{path}: expected a name that ends in {', '.join((*TEXTS, *ENDS[:-1]))} or {ENDS[-1]}")


def sources_of(names):
    """{name: source} of files, folders (all files of theirs that are text, by name) and hub data sets (their
    "train")."""
    found = {}
    for name in names:
        if name.startswith("hub:"):
            table = hub_source(name, "train")
            found[table.name] = TextRows(table.name, table.table)
        elif os.path.isdir(name):
            inside = [os.path.join(folder, x) for folder, _, files in os.walk(name) for x in files]
            texts = sorted(x for x in inside if x.endswith((*TEXTS, *ENDS)))
            if not texts:
                raise UserError(f"{name}: expected files of text ({', '.join((*TEXTS, *ENDS))}), got none")
            found |= {path: source_of(path) for path in texts}
        elif os.path.isfile(name):
            found[name] = source_of(name)
        else:
            raise UserError(f"{name}: expected a file, a folder or hub:<id>[:config], got nothing")
    return found


def documents_of(names, fields, cache_dir, progress=None, say=print):
    """All documents as support.corpus.Rows, and a key each, (N, 32) uint8: a hash of their text without case
    and spaces.  fields: names of the text of a row, None: the first of NAMES that it has"""
    # by number: the same content in another place is the same text
    sources = {str(i): x for i, x in enumerate(sources_of(names).values())}
    wanted = {x: ((x,), str) for x in fields} if fields else {"text": (NAMES, str)}
    key = lambda row: hashlib.sha256(" ".join(row["text"].lower().split()).encode()).digest()
    rows, keys = keep_rows(cache_dir, sources, wanted, key, "text", progress, say)
    every = next(iter(rows.values()))[:0]
    every.index = np.arange(len(keys))
    return every, keys
