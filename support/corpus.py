"""Corpora on disk: rows of text and their token ids, written once into the cache and read by index from
there.

In memory stay the places where rows begin, 287,113 articles some 15 MB, and nothing else: a row is read from
its file, its ids from a memory-mapped one. Both are folders of the cache (support/files.py), whole or not
there, under a hash of what decides them: rows under the content of the files that they come from, ids under
the rows and the tokenizer.

    rows = keep_rows("out/cache", {"train": find_source("train.jsonl")}, {"text": (("text",), str)})[0]
    rows["train"][7]["text"]
"""
import hashlib
import json
import os
from array import array
from collections.abc import Sequence

import numpy as np

from support.files import kept_folder, source
from support.log import UserError
from support.tokenizer import Tokenizer

MANY = 5000     # rows from which a phase has a progress line
AT_ONCE = 512   # rows that are encoded together
SAMPLE = 50e6   # bytes of text at most that a tokenizer is learned from
CODE = "data", "support.rows", "support.corpus", "support.tokenizer"  # modules that decide what is kept


def code():
    """The modules that read and encode: part of every key, as in support/files.py."""
    return {name: source(name) for name in CODE}


# ------------------------------------------------------------------------------------------------------- rows


class Rows(Sequence):
    """Rows of a file of JSON lines as a list has them, each read when it is asked for.

    starts  (N + 1,) int64, where each row of the file begins; hashes (N, 16) uint8, of what they hold
    index   (n,) int64: the rows of the file that these are, in this order
    """

    def __init__(self, path, starts, hashes, index):
        self.path, self.starts, self.hashes, self.index = path, starts, hashes, index

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        if isinstance(i, (slice, np.ndarray)):
            return Rows(self.path, self.starts, self.hashes, self.index[i])
        with open(self.path, "rb") as f:  # a read, and no map: mapped pages would count as this process's own
            return self._read(f, self.index[i])

    def __iter__(self):
        with open(self.path, "rb") as f:
            for at in self.index:
                yield self._read(f, at)

    def _read(self, f, at):
        f.seek(self.starts[at])
        return json.loads(f.read(self.starts[at + 1] - self.starts[at]))

    def bytes(self):
        """Bytes that the rows take in their file: about those of their text."""
        return int((self.starts[self.index + 1] - self.starts[self.index]).sum())

    def digest(self):
        """A hash of what the rows hold, in their order: that of their own hashes."""
        return hashlib.sha256(self.hashes[self.index]).hexdigest()


def keep_rows(cache_dir, sources, fields, key=None, key_name=None, progress=None, say=print):
    """{name: support.rows.Source} -> {name: Rows}, and a key a row, (N, 32) uint8, where `key` makes one. All
    of it is read and checked once; what is wrong with a row is a UserError.

    key  row -> 32 bytes; key_name: what decides it, a plain value
    """
    what = {"content": {name: x.content(cache_dir) for name, x in sources.items()}, "fields": str(fields),
            "key": key_name, "code": code()}
    build = lambda folder: write_rows(folder, sources, fields, key, progress)
    folder = kept_folder(cache_dir, "rows", what, build, say)
    meta = read_meta(folder)
    for name, line in meta["said"]:
        say(f"{sources[name].name}{line}")
    starts, hashes, keys = [load(folder, name) for name in ("starts.npy", "hashes.npy", "keys.npy")]
    check_size(folder, "rows.jsonl", starts[-1])
    path = os.path.join(folder, "rows.jsonl")
    return {name: Rows(path, starts, hashes, np.arange(*x)) for name, x in meta["parts"].items()}, keys


def write_rows(folder, sources, fields, key, progress):
    """The folder that `keep_rows` reads: rows.jsonl, where its rows begin, their hashes and keys, meta.json
    with the rows of each source and with what was said about those that were left out."""
    starts, hashes, keys, said, parts = array("q", [0]), bytearray(), bytearray(), [], {}
    total = sum(x.size() for x in sources.values())
    with open(os.path.join(folder, "rows.jsonl"), "wb") as f:
        for name, rows in sources.items():
            first = len(starts) - 1
            # without the path: the same content may lie elsewhere the next time
            note = lambda line: said.append((name, line.removeprefix(rows.name)))
            for row in rows.rows(fields, say=note):
                line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                f.write(line)
                starts.append(starts[-1] + len(line))
                hashes += hashlib.sha256(line).digest()[:16]
                keys += key(row) if key else b""
                tell(progress, "read MB", len(starts), starts[-1], total)
            parts[name] = first, len(starts) - 1
    np.save(os.path.join(folder, "starts.npy"), np.frombuffer(starts, np.int64))
    np.save(os.path.join(folder, "hashes.npy"), np.frombuffer(hashes, np.uint8).reshape(-1, 16))
    np.save(os.path.join(folder, "keys.npy"), np.frombuffer(keys, np.uint8).reshape(-1, 32))
    write_meta(folder, {"parts": parts, "said": said})


def tell(progress, phase, rows, done, total):
    """A progress line every thousand rows of a large corpus, in MB; never the last one, as the end is said
    elsewhere."""
    if progress and rows >= MANY and rows % 1000 == 0:
        mb = max(2, int(total / 1e6))
        progress(phase, max(1, min(int(done / 1e6), mb - 1)), mb, {})


# -------------------------------------------------------------------------------------------------------- ids


def cut_lengths(lengths, most):
    """(N,) int64 lengths of at most so many; `most` may be any whole number that a flag takes."""
    return np.minimum(lengths.astype(np.int64), most)


class Ids:
    """N lists of ids in one flat array, cut to at most so many each; item i is an array, and a view.

    lengths  (N,) int32, tokens that each had before it was cut;  digest: a hash of all ids
    """

    def __init__(self, flat, lengths, most, digest):
        self.flat, self.lengths, self.digest = flat, lengths, digest
        self.starts = np.concatenate(([0], cut_lengths(lengths, most).cumsum()))

    @classmethod
    def of(cls, lists):
        """The same in memory, of lists that are there; none is cut."""
        lengths = np.array([len(x) for x in lists], np.int32)
        flat = np.concatenate([np.asarray(x, np.int32) for x in lists] or [np.zeros(0, np.int32)])
        return cls(flat, lengths, lengths.max(initial=0), hashlib.sha256(flat).hexdigest())

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return self.flat[self.starts[i]:self.starts[i + 1]]


class IdWriter:
    """Ids to a file of their own, list by list; `close` returns what `open_ids` needs."""

    def __init__(self, path, most, kind):
        self.path, self.most, self.kind = path, most, kind
        self.file, self.lengths, self.hash = open(path + ".ids", "wb"), array("i"), hashlib.sha256()

    def add(self, ids):
        """One more list."""
        data = np.asarray(ids[:self.most], self.kind).tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.lengths.append(len(ids))

    def close(self):
        """{"digest", "most", "kind"}, plain values."""
        self.file.close()
        np.save(self.path + ".npy", np.frombuffer(self.lengths, np.int32))
        return {"digest": self.hash.hexdigest(), "most": self.most, "kind": np.dtype(self.kind).name}


def open_ids(folder, name, about):
    """What an IdWriter has left -> Ids whose flat array is memory-mapped."""
    lengths, kind = load(folder, name + ".npy"), np.dtype(about["kind"])
    count = int(cut_lengths(lengths, about["most"]).sum())
    check_size(folder, name + ".ids", count * kind.itemsize)
    path = os.path.join(folder, name + ".ids")
    flat = np.memmap(path, kind, "r", shape=(count,)) if count else np.zeros(0, kind)
    return Ids(flat, lengths, about["most"], about["digest"])


def keep_ids(cache_dir, rows, parts, make_tokenizer, tokenizer_name, threads=0, progress=None, say=print):
    """{split: Rows} -> tokenizer, {split: {part: Ids}}, encoded once. "train" must be among the splits.

    parts  {name: (field, tokens kept at most, whether end-of-text stands last)}
    make_tokenizer  texts -> Tokenizer, from those of `sample_texts`; tokenizer_name: what decides it, plain
                    values
    threads  of the encoder, 0: all there are. They decide nothing but the time
    """
    what = {"rows": {split: x.digest() for split, x in rows.items()}, "parts": parts,
            "tokenizer": tokenizer_name, "code": code()}
    build = lambda folder: write_ids(folder, rows, parts, make_tokenizer, threads, progress)
    folder = kept_folder(cache_dir, "tokens", what, build, say)
    meta = read_meta(folder)
    ids = {split: {part: open_ids(folder, f"{split}.{part}", meta["ids"][f"{split}.{part}"])
                   for part in parts} for split in rows}
    return Tokenizer.from_state(meta["tokenizer"]), ids


def write_ids(folder, rows, parts, make_tokenizer, threads, progress):
    """The folder that `keep_ids` reads: ids and lengths of every part of every split, and meta.json."""
    tokenizer = make_tokenizer(sample_texts(rows["train"], [field for field, *_ in parts.values()]))
    kind = np.uint16 if tokenizer.size <= 2 ** 16 else np.int32
    total, done, seen, about = sum(x.bytes() for x in rows.values()), 0, 0, {}
    for split, part_rows in rows.items():
        writers = {part: IdWriter(os.path.join(folder, f"{split}.{part}"), most, kind)
                   for part, (_, most, _) in parts.items()}
        for first in range(0, len(part_rows), AT_ONCE):
            some = part_rows[first:first + AT_ONCE]
            batch = list(some)
            for part, (field, _, end) in parts.items():
                for ids in tokenizer.encode_batch([" " + row[field] for row in batch], threads):
                    writers[part].add(np.append(ids, tokenizer.eot) if end else ids)
            for _ in batch:
                seen += 1
                tell(progress, "ids MB", seen, done, total)
            done += some.bytes()
        about |= {f"{split}.{part}": x.close() for part, x in writers.items()}
    write_meta(folder, {"ids": about, "tokenizer": tokenizer.state()})


def sample_texts(rows, fields, most=SAMPLE):
    """What a tokenizer is learned from: all texts, of a large corpus every n-th row, spread over all of it,
    so that they have about `most` bytes at the utmost. A text begins with a space, as everywhere."""
    step = max(1, -int(-rows.bytes() // most))  # divisor: the bytes allowed, rounded up
    return [" " + row[field] for row in rows[::step] for field in fields]


# ----------------------------------------------------------------------------------------------- what is kept


def write_meta(folder, meta):
    """meta.json of a kept folder, written last."""
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as f:
        json.dump(meta, f)


def read_meta(folder):
    """meta.json of a kept folder, or UserError."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise damaged(folder) from error


def load(folder, name):
    """An array of a kept folder, or UserError."""
    try:
        return np.load(os.path.join(folder, name))
    except (OSError, ValueError, EOFError) as error:
        raise damaged(folder) from error


def check_size(folder, name, size):
    """UserError where a file of a kept folder is not as long as it was written."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path) or os.path.getsize(path) != size:
        raise damaged(folder)


def damaged(folder):
    """The one line for a kept folder that somebody else has changed."""
    return UserError(f"{folder}: expected a kept corpus, got damaged files (delete the folder, and it is "
                     f"made again)")
