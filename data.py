"""Text in: everything between a file on disk and the tensors the other files work on.

A tokenizer turns text into ids (always a tiktoken encoding, always with end-of-text as the last id). A reader turns a
jsonl, tsv or hub data set into rows with known names and types, and whatever is wrong with a file ends in one line that
names the file, the line and the field. `pad` turns lists of ids into a rectangle and, from their lengths, its mask.

    tok = load_tokenizer("bpe", texts, size=4096)
    rows = read_rows("train.tsv", {"text": (("text", "sentence"), str), "label": (("label",), int)})
    tokens, mask = pad([tok.encode(row["text"]) for row in rows])                       # (N, T) int64, (N, T) bool
"""

import codecs
import gzip
import heapq
import json
import math
import os
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass

import regex  # a requirement of tiktoken; unlike `re` it knows the letter class \p{L}, which the pattern needs
import tiktoken
import torch

from support.log import UserError, visible

# Text is first cut into pieces, and tokens never reach over a cut: a word with the space before it, a number, a run of
# punctuation, white space. This is GPT-2's rule, kept for every tokenizer here so that " word" means the same to all.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTES = [bytes([b]) for b in range(256)]  # with all of them in a vocabulary any text can be encoded, none is "unknown"
EOT = "<|endoftext|>"
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # the same two files under both their names


class EmptyText(Exception):
    """A row whose text is there and empty, its field as the message. The readers leave such rows out and count them."""


@dataclass
class Batch:
    """Inputs of B groups: which ones (index (B,)), and where the task has them context and reference (B, P), (B, T)."""
    index: torch.Tensor
    context: torch.Tensor = None
    context_mask: torch.Tensor = None
    reference: torch.Tensor = None
    reference_mask: torch.Tensor = None

    def at(self, index, device):
        """The rows `index` on a device; the new batch's index says which rows of this one they are."""
        rows = (self.context, self.context_mask, self.reference, self.reference_mask)
        return Batch(index, *[x[index].to(device) for x in rows])

    def prefix(self):
        """The context as models read it, (tokens, mask) trimmed to the longest, or None."""
        return trim(self.context, self.context_mask)


class Tokenizer:
    """A tiktoken.Encoding made of `ranks` (token bytes in merge order), reduced to the ids in `kept`.

    kept[i] is the id that compact id i has in the full vocabulary, so `weight[tok.kept]` picks the matching rows out of
    pretrained embeddings. End-of-text comes last in both numberings: it is `size - 1` whatever was dropped.
    """

    def __init__(self, name, ranks, pattern=PATTERN, kept=None):
        self.name, self.ranks, self.pattern = name, list(ranks), pattern
        full = len(self.ranks) + 1
        order = {r: i for i, r in enumerate(self.ranks)}
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=order, special_tokens={EOT: full - 1})
        self.kept = list(range(full)) if kept is None else list(kept)
        self.size, self.eot = len(self.kept), len(self.kept) - 1
        self.bytes_of = [self.ranks[old] for old in self.kept[:-1]] + [b""]  # a table: decoding can never miss an id
        # Full id -> its compact ids: itself where kept, else its bytes one by one, so that no text is ever lost.
        new = {r: i for i, r in enumerate(self.bytes_of[:-1])}
        self.spelled = [[new[r]] if r in new else [new[bytes([b])] for b in r] for r in self.ranks]

    def encode(self, text):
        """Text -> ids. Never end-of-text, even where the text contains that marker: only the program ends a text."""
        ids = self.encoding.encode_ordinary(text)
        return ids if self.size > len(self.ranks) else [new for old in ids for new in self.spelled[old]]

    def pieces(self, ids, eot="<eot>"):
        """One string an id, to be shown side by side. A character of several tokens sits on the last of them, the
        earlier ones get "", because half a character cannot be printed; bytes that are no UTF-8 become U+FFFD."""
        decoder, out = codecs.getincrementaldecoder("utf-8")("replace"), []
        for i in ids:
            if i == self.eot and out:  # a character left open ends here: what follows is another text
                out[-1] += decoder.decode(b"", final=True)
            out.append(eot if i == self.eot else decoder.decode(self.bytes_of[i]))
        return out[:-1] + [out[-1] + decoder.decode(b"", final=True)] if out else []

    def decode(self, ids):
        """Ids -> text; end-of-text is silent. Any id in [0, size) will do: a fresh policy samples them all."""
        return "".join(self.pieces(ids, eot=""))

    def compact(self, texts):
        """The same tokenizer without the ids that `texts` never use: the softmax over V is most of a small model.
        Built from training text alone it still encodes every other text, just spelled out where a token is gone."""
        used = {self.kept[i] for text in texts for i in self.encode(text)}
        used.update(old for old in self.kept[:-1] if len(self.ranks[old]) == 1)
        return Tokenizer(self.name, self.ranks, self.pattern, sorted(used) + [self.kept[-1]])

    def state(self):
        """Everything, as plain values: for tokenizer.json, and for a checkpoint read with weights_only=True.
        latin-1 maps the 256 bytes to 256 characters one to one, and unlike base64 it stays readable."""
        ranks = [r.decode("latin-1") for r in self.ranks]
        return {"name": self.name, "pattern": self.pattern, "ranks": ranks, "kept": list(self.kept)}

    @classmethod
    def from_state(cls, state):
        """The inverse of `state`: the tokenizer of a finished run, out of its tokenizer.json."""
        ranks = [r.encode("latin-1") for r in state["ranks"]]
        return cls(state["name"], ranks, state["pattern"], state["kept"])


def byte_tokenizer():
    """256 bytes and end-of-text: id = byte, nothing to learn or to load. The right choice for tests."""
    return Tokenizer("byte", BYTES)


def word_tokenizer(words):
    """One id for each known word, with and without the space before it; other text falls back on shorter pieces.
    It works because tiktoken looks a whole piece up before it merges anything. Words with punctuation inside
    ("sci-fi") are cut by the pattern as any text is, and their parts become the ids."""
    known = (part for word in words for form in (" " + word, word) for part in regex.findall(PATTERN, form))
    return Tokenizer("word", list(dict.fromkeys(BYTES + [part.encode() for part in known])))


def train_bpe(texts, size=4096, min_count=2):
    """Byte-pair encoding learned from texts: join the most frequent adjacent pair, `size` - 257 times.

    Ties go to the pair whose joined bytes sort first, so the result depends on the counts alone, not on the order of
    the texts. A pair is identified by its joined bytes ("a"+"bc" is "ab"+"c"), because that is how tiktoken looks ranks
    up: what is counted here is then exactly what tiktoken will produce. Ends early when no pair occurs min_count times.
    20,000 abstracts (3 million words) to 4,096 ids: 4 to 7 seconds on one core, a third of it spent on counting words.
    """
    if size < 257:
        raise UserError(f"tokenizer size: expected at least 257 (256 bytes and end-of-text), got {size}")
    words = count_words(texts)
    parts = [[bytes([b]) for b in word] for word, _ in words]  # each distinct word once
    counts, where = Counter(), defaultdict(set)  # joined pair -> occurrences, and the words it was ever seen in
    for w, (_, n) in enumerate(words):
        tally(parts[w], n, counts, w, where)
    ranks = {b: i for i, b in enumerate(BYTES)}
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < size - 1:
        n, pair = heapq.heappop(heap)
        if counts[pair] != -n:
            continue  # counts move while entries wait; every change pushed a fresh entry, so a stale one can go
        if -n < max(min_count, 1):
            break
        ranks[pair] = len(ranks)
        changed = set()
        for w in list(where[pair]):  # only the words that hold the pair are touched: this is what makes it fast
            changed.update(tally(parts[w], -words[w][1], counts, w, where))
            parts[w] = join(parts[w], ranks)
            changed.update(tally(parts[w], words[w][1], counts, w, where))
        for other in changed:
            heapq.heappush(heap, (-counts[other], other))
    return Tokenizer("bpe", list(ranks))


def count_words(texts, most=30_000, longest=64):
    """The `most` frequent pieces with their counts. The rare rest could hardly change a merge but would take most of
    the time; for the same reason a piece counts with its first `longest` bytes (a ruler of dashes, a web address)."""
    counts = Counter()
    for text in texts:
        counts.update(regex.findall(PATTERN, text))
    counts = [(word.encode("utf-8", "replace")[:longest], n) for word, n in counts.items()]
    return sorted(counts, key=lambda wn: (-wn[1], wn[0]))[:most]


def tally(parts, n, counts, w, where):
    """Add n for every adjacent pair of word w; returns the pairs. Taken back by n < 0: `where` may then name too many
    words, which costs a look and changes nothing."""
    pairs = [a + b for a, b in zip(parts, parts[1:])]
    for pair in pairs:
        counts[pair] += n
        where[pair].add(w)
    return pairs


def join(parts, ranks):
    """tiktoken's own rule: join the adjacent pair of the lowest rank, the leftmost first, until no pair has one."""
    while len(parts) > 1:
        found = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        if min(found) == math.inf:
            break
        i = found.index(min(found))
        parts = parts[:i] + [parts[i] + parts[i + 1]] + parts[i + 2 :]
    return parts


def gpt2_tokenizer(folder=None):
    """GPT-2's 50,257 ids, from a folder that holds its two files, else from tiktoken's cache or the network."""
    if folder is not None:
        return gpt2_from_folder(folder)
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # offline this is whatever the network layer throws, with a page of text
        raise UserError(
            "tokenizer gpt2: neither cached nor reachable: name a folder that holds encoder.json and vocab.bpe as the "
            f"tokenizer, or point TIKTOKEN_CACHE_DIR at tiktoken's cache ({type(error).__name__})"
        ) from error
    return Tokenizer("gpt2", [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)])


def gpt2_from_folder(folder):
    """Read by hand: tiktoken's loader caches local files by path and would serve an edited file stale."""
    pairs = [[os.path.join(folder, name) for name in names] for names in GPT2_FILES]
    files = next((pair for pair in pairs if all(map(os.path.isfile, pair))), None)
    if files is None:
        raise UserError(f"{folder}: expected encoder.json and vocab.bpe (or vocab.json and merges.txt), got neither")
    # The files write a byte as a character: printable ones as themselves and first, the others as U+0100 onwards.
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    alphabet = {chr(b): b for b in printable}
    alphabet.update((chr(256 + i), b) for i, b in enumerate(b for b in range(256) if b not in printable))
    try:
        ids, merges = json.loads(open_text(files[0])), open_text(files[1]).split("\n")[1:]  # line 1 is a version mark
        order = [*alphabet, *("".join(line.split()) for line in merges if line)]
        # The id of a token must be the rank of its merge, or pretrained embeddings would belong to other tokens.
        if ids != {token: i for i, token in enumerate([*order, EOT])}:
            raise ValueError("ids that do not follow the order of the merges")
        return Tokenizer("gpt2", [bytes(alphabet[c] for c in token) for token in order])
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder}: expected the two files of GPT-2's vocabulary, got {first_line(error)}") from error


def load_tokenizer(name, texts, size=4096, compact=False):
    """byte | bpe (learned from texts) | gpt2 | a folder with GPT-2's two files."""
    texts = list(texts)  # they may be read twice
    known = {"byte": byte_tokenizer, "bpe": lambda: train_bpe(texts, size), "gpt2": gpt2_tokenizer}
    if name not in known and not os.path.isdir(name):
        raise UserError(f"tokenizer: expected byte, bpe, gpt2 or a folder, got {show(name)}")
    tok = known[name]() if name in known else gpt2_tokenizer(name)
    return tok.compact(texts) if compact else tok


def world_or_text_tokenizer(cfg, words, texts):
    """Words where a world knows its own and no other tokenizer is asked for, else --tokenizer's, a learned BPE at least."""
    if cfg.tokenizer is None and words:
        return word_tokenizer(words).compact([" " + " ".join(words)])
    return load_tokenizer(cfg.tokenizer or "bpe", texts, cfg.vocab_size, compact=cfg.tokenizer != "byte")


def encode_pairs(contexts, references, names, widths, tokenizer, split, say):
    """Two lists of texts -> Batch: context (N, P), reference (N, T) with end-of-text last; cuts are counted and said.

    names, widths  of contexts and references: what to call them, and the most tokens of each; T is the second width
    """
    context = cut([tokenizer.encode(" " + text) for text in contexts], widths[0], "end", split, names[0], say)
    reference = [tokenizer.encode(" " + text) + [tokenizer.eot] for text in references]
    reference = cut(reference, widths[1], "end", split, names[1], say)
    return Batch(torch.arange(len(context)), *pad(context), *pad(reference, widths[1]))


def cut(rows, most, side, split, what, say):
    """Lists of ids, none longer than `most`: what is over goes from their "start" or "end" and is counted and said."""
    if long := sum(len(row) > most for row in rows):
        say(f"{split}: {long} of {len(rows)} {what} are longer than {most} tokens and were cut at their {side}")
    return [row[-most:] if side == "start" else row[:most] for row in rows]


# Which texts a net may read: none that a few-shot or test text would give away.
def overlapping(texts, private, least=4):
    """[bool] a text: is it equal to one of the `private` texts, a part of one, or does it hold one of them?

    Lower-cased and with spaces collapsed; a part is a run of whole words. Whoever reads a text that holds a test
    text has read the test text, so that direction counts too, but only for private texts of `least` words: a
    review of one word ("terrific") is in many others, and nobody has read it there.
    """
    words = lambda text: tuple(text.lower().split())
    texts, private = [words(text) for text in texts], {words(text) for text in private}
    within = set().union(*parts_of(private, set(texts)))
    holds = parts_of(texts, {text for text in private if len(text) >= least})
    return [text in within or bool(held) for text, held in zip(texts, holds)]


def parts_of(wholes, parts, head=4):
    """For each whole the set of `parts` that it holds; all are tuples of words.

    Parts are looked up under their first `head` words and then under their length, so that the time grows with the
    words of the wholes and not with the product: 50,000 texts against 8,000 take a second.
    """
    index = {}
    for part in parts:
        index.setdefault(part[:head], {}).setdefault(len(part), set()).add(part)
    heads = sorted({len(start) for start in index})
    found = []
    for whole in wholes:
        starts = ((i, index.get(whole[i:i + h])) for i in range(len(whole)) for h in heads)
        ends = ((whole[i:i + n], same) for i, lengths in starts if lengths for n, same in lengths.items())
        found.append({piece for piece, same in ends if piece in same})
    return found


# Readers: `fields` says what a task needs: canonical name -> (accepted names, type) or (accepted names, type, default).
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


def lengths_to_mask(lengths, T):
    """(...,) lengths -> (..., T) bool. A mask comes from lengths and never from ids: the padding id is a real token
    too, and an end-of-text that a policy chose must count."""
    lengths = torch.as_tensor(lengths)
    return torch.arange(T, device=lengths.device) < lengths[..., None]


def trim(tokens, mask):
    """(..., P) tokens and mask without the columns that are padding in every row; None stays None."""
    if tokens is None:
        return None
    width = max(1, int(mask.sum(-1).max()))
    return tokens[..., :width], mask[..., :width]


def pad(rows, length=None):
    """Lists of ids -> tokens (N, T) int64, padded right with 0, and mask (N, T) bool; rows longer than T are cut."""
    T = max(map(len, rows), default=0) if length is None else length
    tokens = [list(row[:T]) + [0] * (T - len(row)) for row in rows]
    lengths = torch.tensor([min(len(row), T) for row in rows], dtype=torch.int64)
    return torch.tensor(tokens, dtype=torch.int64).reshape(len(rows), T), lengths_to_mask(lengths, T)
