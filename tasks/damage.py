"""Edits out of any text: real sentences in which one to three words were replaced by plausible other ones.

A row is the sentence before (the prompt), the sentence with wrong words (`rejected`) and as it was
(`edited`). A wrong word stands at the same place of another sentence, so that its place gives nothing away;
that it does not fit its neighbours does. Where the errors are is known, and of text there is plenty.
"""
import random
import re

import numpy as np

import data
from support.documents import documents_of
from support.log import UserError

MOST = {"train": 20_000, "test": 1_000}  # rows without --limit
WORDS = 5, 40                            # of a sentence
WORD = re.compile(r"[^\W\d_]{3,}")       # what is replaced, and by what: a word of letters


def damaged_edits(source, limit, split_seed, cache_dir, progress=None, say=print):
    """{"train" | "test": rows {"prompt", "rejected", "edited", "errors"}} of the documents of a file, a
    folder or hub:ID, at most `limit` each (0: MOST). A tenth of the documents, by --split_seed, is for the
    test set: its sentences are of texts that nobody was trained on."""
    documents, keys = documents_of([source], None, cache_dir, progress, say)
    parts = data.share_out([x.tobytes() for x in keys], ["test"], split_seed, source, lambda line: None)
    rows = {}
    for split, index in parts.items():
        rng = random.Random(f"{split_seed} {split}")
        index = np.array(index)
        rng.shuffle(index)
        rows[split] = damaged_rows(sentences(documents[index]), limit or MOST[split], rng)
        if not rows[split]:
            raise UserError(f"{source}: {split}: expected sentences of {WORDS[0]} to {WORDS[1]} words that "
                            f"follow one another, got none")
    say(f"{source}: " + ", ".join(f"{name} {len(part):,} damaged sentences" for name, part in rows.items()))
    return rows


def sentences(documents):
    """(sentence before, sentence) one by one, of sentences of WORDS."""
    fits = lambda text: WORDS[0] <= len(text.split()) <= WORDS[1]
    for row in documents:
        found = [" ".join(x.split()) for x in re.split(r"(?<=[.!?])\s+", row["text"])]
        yield from ((a, b) for a, b in zip(found, found[1:]) if fits(a) and fits(b))


def damaged_rows(pairs, most, rng):
    """The first `most` pairs that can be damaged, each by words of the sentence before it in this order."""
    rows, other = [], []
    for prompt, text in pairs:
        words = text.split()
        found = damage(words, other, rng)
        if found:
            wrong, places = found
            starts = [len(" ".join(wrong[:i])) + (i > 0) for i in places]
            errors = [[at, at + len(wrong[i]), "word"] for at, i in zip(starts, places)]
            rows.append({"prompt": prompt, "passages": "", "rejected": " ".join(wrong), "edited": text,
                         "errors": errors, "candidates": [], "scores": [], "form": "edits"})
        other = words
        if len(rows) == most:
            break
    return rows


def damage(words, other, rng):
    """One to three words of a sentence replaced by those at the same places of another one: the words and the
    places, ascending. None where no place has two different words."""
    places = [i for i, (a, b) in enumerate(zip(words, other))
              if WORD.fullmatch(a) and WORD.fullmatch(b) and b.lower() not in {x.lower() for x in words}]
    if not places:
        return None
    chosen = sorted(rng.sample(places, min(len(places), rng.randint(1, 3))))
    return [other[i] if i in chosen else word for i, word in enumerate(words)], chosen
