"""Text in: from rows of text to the tensors that the other files work on.

Rows come from support/rows.py, ids from support/tokenizer.py; both can be had from here. `read_splits` and
`complete_splits` make train, validation and test of what somebody has, `decide_widths` looks how wide the
tensors must be, and `pad` turns lists of ids into a rectangle and, from their lengths, its mask.

    tok = load_tokenizer("bpe", texts, size=4096)
    rows = read_rows("train.tsv", {"text": (("text", "sentence"), str), "label": (("label",), int)})
    tokens, mask = pad([tok.encode(row["text"]) for row in rows])              # (N, T) int64, (N, T) bool
"""

import hashlib
import os
from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from support.corpus import Ids, keep_ids, keep_rows
from support.files import digest
from support.log import UserError
from support.rows import (EmptyText, NotThere, convert, find_file, find_source, first_line, hub_source,
                          open_text, pick_fields, read_hub, read_rows, show)
from support.tokenizer import (GPT2_FILES, OURS, Tokenizer, byte_tokenizer, gpt2_tokenizer, load_tokenizer,
                               train_bpe, word_tokenizer, world_or_text_tokenizer)


@dataclass
class Batch:
    """Inputs of B groups: which ones (index (B,)), and where the task has them context and reference (B, P),
    (B, T)."""
    index: torch.Tensor
    context: torch.Tensor = None
    context_mask: torch.Tensor = None
    reference: torch.Tensor = None
    reference_mask: torch.Tensor = None

    def at(self, index, device):
        """The rows `index` on a device; the new batch's index says which rows of this one they are."""
        rows = (self.context, self.context_mask, self.reference, self.reference_mask)
        return Batch(index, *[None if x is None else x[index].to(device) for x in rows])

    def prefix(self):
        """The context as models read it, (tokens, mask) trimmed to the longest, or None."""
        return trim(self.context, self.context_mask)


class Pairs:
    """Inputs and references of a split as ids, which may lie on disk: of N rows `at` makes tensors of those
    that are asked for, as `Batch.at` does of tensors in memory.

    contexts, references  support.corpus.Ids, the references with end-of-text last
    """

    def __init__(self, contexts, references):
        self.contexts, self.references = contexts, references

    def cut(self, widths, names, split, say, behind=()):
        """Fixes the tokens of an input and of a reference at most; those that are longer are counted and
        said.  behind: ids that follow every input, within its width"""
        self.room, self.behind = max(1, widths[0] - len(behind)), np.array(behind, np.int64)
        for ids, most, what in zip((self.contexts, self.references), (self.room, widths[1]), names):
            say_cut(int((ids.lengths > most).sum()), len(ids), most, "end", split, what, say)
        longest = min(int(self.contexts.lengths.max(initial=0)), self.room)
        self.widths = longest + len(behind), widths[1]  # P, T

    def at(self, index, device):
        """The rows `index` (B,) as a Batch on a device, (B, P) and (B, T)."""
        rows, (P, T) = index.tolist(), self.widths
        context = [np.concatenate((self.contexts[i][:self.room], self.behind)) for i in rows]
        reference = [self.references[i] for i in rows]
        return Batch(index, *[x.to(device) for x in (*pad(context, P), *pad(reference, T))])

    def digest(self):
        """A hash of all ids and of the widths."""
        return digest([self.contexts.digest, self.references.digest, *self.widths, self.behind.tolist()])


def encode(texts, tokenizer, end=False):
    """Texts -> ids, an array each: 4 bytes a token, where a list takes up to 36. `end` puts end-of-text
    last."""
    last = [tokenizer.eot] if end else []
    return [array("i", tokenizer.encode(" " + text) + last) for text in texts]


def cut(rows, most, side, split, what, say):
    """Lists of ids, none longer than `most`: what is over goes from their "start" or "end" and is counted and
    said."""
    say_cut(sum(len(row) > most for row in rows), len(rows), most, side, split, what, say)
    return [row[-most:] if side == "start" else row[:most] for row in rows]


def say_cut(long, n, most, side, split, what, say):
    """Says how many of n rows were cut, if any were."""
    if long:
        say(f"{split}: {long} of {n} {what} are longer than {most} tokens and were cut at their {side}")


# How wide the tensors are.
EMBEDDED_WIDTHS = 256, 24  # of inputs and answers of the embedded worlds: more than their longest texts have
PERCENT = 98               # of the training rows are not cut


def decide_widths(c, contexts, answers, names, say):
    """Sets c.max_document and c.max_summary where no number was given by hand, and says what they are and
    why.

    contexts, answers  tokens that the training inputs and the answers to them have, end-of-text included
    names              what to call them

    Wide enough for PERCENT of the training rows: an answer that is cut has no end-of-text, so a policy that
    imitates cut answers never learns to stop. Input and answer together have at most --context_limit tokens:
    answers get half of it at most, inputs what the answers leave. Only training rows decide: nothing of a
    test set is looked at.
    """
    if not c.data:
        c.max_document = c.max_document or EMBEDDED_WIDTHS[0]
        c.max_summary = c.max_summary or EMBEDDED_WIDTHS[1]
    if c.max_document and c.max_summary:
        return
    answer, why_answer = width(c.max_summary, answers, max(2, c.context_limit // 2), c.context_limit)
    room = c.context_limit - answer
    if room < 1 and not c.max_document:
        raise UserError(f"--context_limit {c.context_limit}: expected more than --max_summary {answer}, as "
                        f"it holds an input and its answer")
    context, why = width(c.max_document, contexts, room, c.context_limit)
    why = "" if why == why_answer else f" ({why})"
    say(f"widths: {names[0]} up to {context} tokens{why}, {names[1]} up to {answer} ({why_answer})")
    c.max_document, c.max_summary = context, answer


def width(by_hand, lengths, room, limit):
    """(tokens, reason): the number given by hand, or what PERCENT of the rows need and `room` allows."""
    if by_hand:
        return by_hand, "given by hand"
    need = percentile(lengths)
    why = f"{PERCENT}th percentile of train"
    return (need, why) if need <= room else (room, f"{why}: {need:,}, cut to --context_limit {limit}")


def percentile(lengths, percent=PERCENT):
    """The smallest width that holds at least this share of the rows."""
    ordered = np.sort(np.fromiter(lengths, np.int64))
    return int(ordered[(percent * len(ordered) + 99) // 100 - 1])  # divisor: whole percents, rounded up


# Which rows are for training, which for looking.
ALSO = {"validation": ("dev", "valid", "val"), "dev": ("validation", "valid", "val")}  # other names of a file


def read_splits(spec, splits, fields, new_check=lambda: lambda where, row: None, say=print):
    """{split: rows} of those of `splits` that are there; "train" must be.

    spec       a folder with a file a split, one file (all of it is "train"), or "hub:<id>[:config]"
    new_check  makes the `check` of read_rows, a new one for each split
    """
    return {name: list(source.rows(fields, new_check(), say))
            for name, source in find_splits(spec, splits).items()}


def find_splits(spec, splits):
    """{split: support.rows.Source}, as `read_splits` has it, before anything is read."""
    hub = spec.startswith("hub:")
    if not hub and not os.path.exists(spec):
        raise UserError(f"{spec}: expected a folder, a file or hub:<id>[:config], got nothing")
    if not hub and not os.path.isdir(spec):
        return {"train": find_source(spec)}
    found = {}
    for name in splits:
        try:
            found[name] = hub_source(spec, name) if hub else \
                find_source(find_file(spec, name, *ALSO.get(name, ())))
        except NotThere:
            if name == "train":
                raise
    return found


def complete_splits(found, splits, seed, key, source, say):
    """What `found` lacks of `splits` is cut off its "train": a tenth of the rows each, said once.

    key  row -> text. Rows of equal texts (but for case and spaces) stay together: nobody is examined on what
         was learned. What else is in the row does not matter
    """
    missing = [name for name in splits if name not in found]
    if not missing:
        return found
    rows = found["train"]
    parts = share_out([chance(key(row), seed) for row in rows], missing, seed, source, say)
    return {name: [rows[i] for i in parts[name]] if name in parts else found[name] for name in splits}


def share_out(keys, missing, seed, source, say):
    """{split: row numbers, in order} for train and the `missing` splits, by a key a row from `chance`."""
    counts, order = Counter(keys), sorted(set(keys))
    if len(order) <= len(missing):
        raise UserError(f"{source}: expected at least {len(missing) + 1} rows that differ, to be split into "
                        f"{', '.join(['train', *missing])}, got {len(order)}")
    home = {}
    for after, name in zip(reversed(range(len(missing))), missing):
        taken = 0
        while taken < len(keys) / 10 and len(order) > 1 + after:  # a text at least for each split to come
            text = order.pop()
            home[text] = name
            taken += counts[text]
    parts = {name: [] for name in ("train", *missing)}
    for i, text in enumerate(keys):
        parts[home.get(text, "train")].append(i)
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in parts.items())
    each = "each " if len(missing) > 1 else ""
    say(f"{source}: {' and '.join(missing)}: {each}10 % of train by --split_seed {seed} ({sizes})")
    return parts


def chance(text, seed):
    """32 bytes that stand for a text and put it into an order by chance: equal texts have equal ones."""
    return hashlib.sha256(f"{seed} {same_text(text)}".encode()).digest()


# Corpora: rows and ids that stay in the cache, and are read from there when they are asked for.
def corpus_rows(spec, splits, fields, limit, split_seed, cache_dir, progress=None, say=print):
    """{split: support.corpus.Rows} of all `splits`, at most `limit` each; what is missing is cut off train,
    rows of equal first fields together.  fields: as data.read_rows takes them"""
    sources, first = find_splits(spec, splits), next(iter(fields))
    missing = [name for name in splits if name not in sources]
    key = (lambda row: chance(row[first], split_seed)) if missing else None
    name = [first, split_seed] if missing else None
    rows, keys = keep_rows(cache_dir, sources, fields, key, name, progress, say)
    if missing:
        train = rows["train"]
        parts = share_out([x.tobytes() for x in keys[train.index]], missing, split_seed, spec, say)
        rows |= {name: train[np.array(part, np.int64)] for name, part in parts.items()}
    return {name: rows[name][:limit] for name in splits}


def corpus_pairs(c, rows, more=(), progress=None, say=print):
    """{split: Rows} of two fields, an input and its reference -> tokenizer and {split: Pairs}.

    more  texts that the tokenizer has to know besides
    c     the flags. More tokens of a text are not kept than its width can be: the one given by hand, or what
       --context_limit allows
    """
    first, second = list(rows["train"][0])[:2]
    most = c.max_document or c.context_limit, c.max_summary or max(2, c.context_limit // 2)
    parts = {"context": (first, most[0], False), "reference": (second, most[1], True)}
    name = c.tokenizer or "bpe"
    files = [open_text(path) for x in (OURS, *GPT2_FILES[0], *GPT2_FILES[1])
             if os.path.isfile(path := os.path.join(name, x))]  # the same name may hold other files tomorrow
    make = lambda texts: load_tokenizer(name, [*texts, *more], c.vocab_size, compact=name != "byte")
    decides = [name, c.vocab_size, files, list(more)]
    tokenizer, ids = keep_ids(c.cache_dir, rows, parts, make, decides, c.threads, progress, say)
    return tokenizer, {split: Pairs(x["context"], x["reference"]) for split, x in ids.items()}


def same_text(text):
    """A text without what does not make it another one: case and spaces."""
    return " ".join(text.lower().split())


def drawn(texts, seed):
    """The different texts in an order by chance: that of a hash of seed and text. So it is the same on every
    machine and in whatever order the rows come, and a row more moves few others."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest())


# Which texts a net may read: none that a few-shot or test text would give away.
def overlapping(texts, private, least=4):
    """[bool] a text: is it equal to one of the `private` texts, a part of one, or does it hold one of them?

    Lower-cased and with spaces collapsed; a part is a run of whole words. Whoever reads a text that holds a
    test text has read the test text, so that direction counts too, but only for private texts of `least`
    words: a review of one word ("terrific") is in many others, and nobody has read it there.
    """
    words = lambda text: tuple(text.lower().split())
    texts, private = [words(text) for text in texts], {words(text) for text in private}
    within = set().union(*parts_of(private, set(texts)))
    holds = parts_of(texts, {text for text in private if len(text) >= least})
    return [text in within or bool(held) for text, held in zip(texts, holds)]


def parts_of(wholes, parts, head=4):
    """For each whole the set of `parts` that it holds; all are tuples of words.

    Parts are looked up under their first `head` words and then under their length, so that the time grows
    with the words of the wholes and not with the product: 50,000 texts against 8,000 take a second.
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


def lengths_to_mask(lengths, T):
    """(...,) lengths -> (..., T) bool. A mask comes from lengths and never from ids: the padding id is a real
    token too, and an end-of-text that a policy chose must count."""
    lengths = torch.as_tensor(lengths)
    return torch.arange(T, device=lengths.device) < lengths[..., None]


def trim(tokens, mask):
    """(..., P) tokens and mask without the columns that are padding in every row; None stays None."""
    if tokens is None:
        return None
    width = max(1, int(mask.sum(-1).max()))
    return tokens[..., :width], mask[..., :width]


def every_word(before, n_ids, at_once=8192):
    """Every word behind the same others, in parts, since a large vocabulary does not fit at once: ids (T,) ->
    tokens (1, N, T + 1) one by one, N at most `at_once`."""
    for words in torch.arange(n_ids, device=before.device).split(at_once):
        yield torch.cat((before.expand(len(words), -1), words[:, None]), 1)[None]


def pad(rows, length=None):
    """Lists of ids -> tokens (N, T) int64, padded right with 0, and mask (N, T) bool; rows longer than T are
    cut."""
    T = max(map(len, rows), default=0) if length is None else length
    lengths = torch.tensor([min(len(row), T) for row in rows], dtype=torch.int64)
    tokens = np.zeros((len(rows), T), dtype=np.int64)  # in place: a list of all ids takes four times as much
    for place, row in zip(tokens, rows):
        place[:len(row)] = row[:T]
    return torch.from_numpy(tokens), lengths_to_mask(lengths, T)
