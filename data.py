"""Text in: from rows of text to the tensors that the other files work on.

Rows come from support/rows.py, ids from support/tokenizer.py; both can be had from here. `pad` turns lists of ids into a
rectangle and, from their lengths, its mask.

    tok = load_tokenizer("bpe", texts, size=4096)
    rows = read_rows("train.tsv", {"text": (("text", "sentence"), str), "label": (("label",), int)})
    tokens, mask = pad([tok.encode(row["text"]) for row in rows])                       # (N, T) int64, (N, T) bool
"""

from dataclasses import dataclass

import torch

from support.log import UserError
from support.rows import (EmptyText, convert, find_file, first_line, open_text, pick_fields, read_hub, read_rows,
                          show)
from support.tokenizer import (Tokenizer, byte_tokenizer, gpt2_tokenizer, load_tokenizer,
                               train_bpe, word_tokenizer, world_or_text_tokenizer)


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
