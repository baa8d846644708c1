"""Tokenizers: text to ids and back, always a tiktoken encoding, always with end-of-text as the last id.

    tok = load_tokenizer("bpe", texts, size=4096)
    tok.decode(tok.encode("any text"))
"""
import codecs
import heapq
import json
import math
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import regex  # a requirement of tiktoken; unlike `re` it knows the letter class \p{L} of the pattern
import tiktoken

from support.files import write_whole
from support.log import UserError
from support.rows import first_line, open_text, show

# Text is first cut into pieces, and tokens never reach over a cut: a word with the space before it, a number,
# a run of punctuation, white space. This is GPT-2's rule, kept for every tokenizer here so that " word" means
# the same to all.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# With all bytes in a vocabulary any text can be encoded, none is "unknown".
BYTES = [bytes([b]) for b in range(256)]
EOT = "<|endoftext|>"
# The same two files under both their names.
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


class Tokenizer:
    """A tiktoken.Encoding made of `ranks` (token bytes in merge order), reduced to the ids in `kept`.

    kept[i] is the id that compact id i has in the full vocabulary, so `weight[tok.kept]` picks the matching
    rows out of pretrained embeddings. End-of-text comes last in both numberings: it is `size - 1` whatever
    was dropped.
    """

    def __init__(self, name, ranks, pattern=PATTERN, kept=None):
        self.name, self.ranks, self.pattern = name, list(ranks), pattern
        full = len(self.ranks) + 1
        order = {r: i for i, r in enumerate(self.ranks)}
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=order,
                                          special_tokens={EOT: full - 1})
        self.kept = list(range(full)) if kept is None else list(kept)
        self.size, self.eot = len(self.kept), len(self.kept) - 1
        self.complete = self.kept == list(range(full))  # both numberings agree: nothing dropped or moved
        # A table: decoding can never miss an id.
        self.bytes_of = [self.ranks[old] for old in self.kept[:-1]] + [b""]
        # Full id -> its compact ids: itself where kept, else its bytes one by one, so that no text is ever
        # lost.
        new = {r: i for i, r in enumerate(self.bytes_of[:-1])}
        self.spelled = [[new[r]] if r in new else [new[bytes([b])] for b in r] for r in self.ranks]
        self.compact_id = np.array([new.get(r, -1) for r in self.ranks], np.int64)  # -1: spelled in bytes

    def encode(self, text):
        """Text -> ids. Never end-of-text, even where the text contains that marker: only the program ends a
        text."""
        ids = self.encoding.encode_ordinary(text)
        return ids if self.complete else [new for old in ids for new in self.spelled[old]]

    def encode_batch(self, texts, threads=0):
        """Texts -> ids as `encode` gives them, an int64 array each, by so many threads (0: all there are).
        tiktoken lets go of the interpreter while it works, and makes no Python number a token."""
        def ordinary(text):
            try:
                return self.encoding.encode_to_numpy(text, disallowed_special=())
            except UnicodeEncodeError:  # half a character, for which the other call has an answer
                return np.array(self.encoding.encode_ordinary(text), np.int64)
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            found = list(pool.map(ordinary, texts))
        return found if self.complete else [self._renumbered(ids) for ids in found]

    def _renumbered(self, ids):
        """Ids of the full vocabulary (T,) -> those of this one; what was dropped is spelled in bytes."""
        new = self.compact_id[ids]
        if (new >= 0).all():
            return new
        return np.array([x for old in ids.tolist() for x in self.spelled[old]], np.int64)

    def pieces(self, ids, eot="<eot>"):
        """One string an id, to be shown side by side. A character of several tokens sits on the last of them,
        the earlier ones get "", because half a character cannot be printed; bytes that are no UTF-8 become
        U+FFFD."""
        decoder, out = codecs.getincrementaldecoder("utf-8")("replace"), []
        for i in ids:
            if i == self.eot and out:  # a character left open ends here: what follows is another text
                out[-1] += decoder.decode(b"", final=True)
            out.append(eot if i == self.eot else decoder.decode(self.bytes_of[i]))
        return out[:-1] + [out[-1] + decoder.decode(b"", final=True)] if out else []

    def decode(self, ids):
        """Ids -> text; end-of-text is silent. Any id in [0, size) will do: a fresh policy samples them
        all."""
        return "".join(self.pieces(ids, eot=""))

    def compact(self, texts):
        """The same tokenizer without the ids that `texts` never use: the softmax over V is most of a small
        model. Built from training text alone it still encodes every other text, just spelled out where a
        token is gone."""
        used, texts = set(), list(dict.fromkeys(texts))  # a text that comes again uses nothing new
        for first in range(0, len(texts), 500):  # some at a time: ids take more room than text
            ids = np.concatenate(self.encode_batch(texts[first:first + 500]))
            used.update(self.kept[i] for i in np.unique(ids).tolist())
        used.update(old for old in self.kept[:-1] if len(self.ranks[old]) == 1)
        return Tokenizer(self.name, self.ranks, self.pattern, sorted(used) + [self.kept[-1]])

    def whole_words(self):
        """Ids that begin a word, a space and a letter or digit, and encode back to themselves. A text made of
        them alone encodes to the very ids that it was made of: the pattern cuts before each of them."""
        begins = lambda text: regex.match(r" [\p{L}\p{N}]", text)
        return [i for i in range(self.eot) if begins(text := self.decode([i])) and self.encode(text) == [i]]

    def with_first(self, ids):
        """The same tokenizer renumbered, `ids` its first ones in ascending order: what may be sampled is then
        a prefix of the vocabulary, `head[:n]`. End-of-text stays last."""
        first = set(ids)
        order = sorted(first) + [i for i in range(self.eot) if i not in first]
        return Tokenizer(self.name, self.ranks, self.pattern, [self.kept[i] for i in order] + [self.kept[-1]])

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
    """One id for each known word, with and without the space before it; other text falls back on shorter
    pieces. It works because tiktoken looks a whole piece up before it merges anything. Words with punctuation
    inside ("sci-fi") are cut by the pattern as any text is, and their parts become the ids."""
    known = (part for word in words for form in (" " + word, word) for part in regex.findall(PATTERN, form))
    return Tokenizer("word", list(dict.fromkeys(BYTES + [part.encode() for part in known])))


def train_bpe(texts, size=4096, min_count=2):
    """Byte-pair encoding learned from texts: join the most frequent adjacent pair, `size` - 257 times.

    Ties go to the pair whose joined bytes sort first, so the result depends on the counts alone, not on the
    order of the texts. A pair is identified by its joined bytes ("a"+"bc" is "ab"+"c"), because that is how
    tiktoken looks ranks up: what is counted here is then exactly what tiktoken will produce. Ends early when
    no pair occurs min_count times. 20,000 abstracts (3 million words) to 4,096 ids: 4 to 7 seconds on one
    core, a third of it spent on counting words.
    """
    if size < 257:
        raise UserError(f"tokenizer size: expected at least 257 (256 bytes and end-of-text), got {size}")
    words = count_words(texts)
    parts = [[bytes([b]) for b in word] for word, _ in words]  # each distinct word once
    counts, where = Counter(), defaultdict(set)  # joined pair -> occurrences, and the words it was seen in
    for w, (_, n) in enumerate(words):
        tally(parts[w], n, counts, w, where)
    ranks = {b: i for i, b in enumerate(BYTES)}
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < size - 1:
        n, pair = heapq.heappop(heap)
        if counts[pair] != -n:
            continue  # counts move while entries wait; every change pushed a fresh one, so a stale one can go
        if -n < max(min_count, 1):
            break
        ranks[pair] = len(ranks)
        changed = set()
        for w in list(where[pair]):  # only words that hold the pair are touched: this is what makes it fast
            changed.update(tally(parts[w], -words[w][1], counts, w, where))
            parts[w] = join(parts[w], ranks)
            changed.update(tally(parts[w], words[w][1], counts, w, where))
        for other in changed:
            heapq.heappush(heap, (-counts[other], other))
    return Tokenizer("bpe", list(ranks))


def count_words(texts, most=30_000, longest=64):
    """The `most` frequent pieces with their counts. The rare rest could hardly change a merge but would take
    most of the time; for the same reason a piece counts with its first `longest` bytes (a ruler of dashes, a
    web address)."""
    counts = Counter()
    for text in texts:
        counts.update(regex.findall(PATTERN, text))
    counts = [(word.encode("utf-8", "replace")[:longest], n) for word, n in counts.items()]
    return sorted(counts, key=lambda wn: (-wn[1], wn[0]))[:most]


def tally(parts, n, counts, w, where):
    """Add n for every adjacent pair of word w; returns the pairs. Taken back by n < 0: `where` may then name
    too many words, which costs a look and changes nothing."""
    pairs = [a + b for a, b in zip(parts, parts[1:])]
    for pair in pairs:
        counts[pair] += n
        where[pair].add(w)
    return pairs


def join(parts, ranks):
    """tiktoken's own rule: join the adjacent pair of the lowest rank, the leftmost first, until no pair has
    one."""
    while len(parts) > 1:
        found = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        if min(found) == math.inf:
            break
        i = found.index(min(found))
        parts = parts[:i] + [parts[i] + parts[i + 1]] + parts[i + 2 :]
    return parts


def gpt2_tokenizer(folder=None):
    """GPT-2's 50,257 ids, from a folder that holds its two files, else from tiktoken's cache or the
    network."""
    if folder is not None:
        return gpt2_from_folder(folder)
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # offline this is whatever the network layer throws, with a page of text
        raise UserError(
            "tokenizer gpt2: neither cached nor reachable: name a folder that holds encoder.json and "
            f"vocab.bpe as the tokenizer, or point TIKTOKEN_CACHE_DIR at tiktoken's cache "
            f"({type(error).__name__})"
        ) from error
    return Tokenizer("gpt2", [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)])


def gpt2_from_folder(folder):
    """Read by hand: tiktoken's loader caches local files by path and would serve an edited file stale."""
    pairs = [[os.path.join(folder, name) for name in names] for names in GPT2_FILES]
    files = next((pair for pair in pairs if all(map(os.path.isfile, pair))), None)
    if files is None:
        raise UserError(f"{folder}: expected encoder.json and vocab.bpe (or vocab.json and merges.txt), "
                        f"got neither")
    alphabet = byte_alphabet()
    try:
        ids = json.loads(open_text(files[0]))
        merges = open_text(files[1]).split("\n")[1:]  # line 1 is a version mark
        order = [*alphabet, *("".join(line.split()) for line in merges if line)]
        if ids.keys() >= {"<s>", "<mask>", *order}:  # RoBERTa: GPT-2's tokens under other numbers
            ids = {token: i for i, token in enumerate([*order, EOT])}
        # The id of a token must be the rank of its merge, or pretrained embeddings would belong to other
        # tokens.
        if ids != {token: i for i, token in enumerate([*order, EOT])}:
            raise ValueError("ids that do not follow the order of the merges")
        return Tokenizer("gpt2", [bytes(alphabet[c] for c in token) for token in order])
    except (ValueError, KeyError) as error:
        got = first_line(error)
        raise UserError(f"{folder}: expected the two files of GPT-2's vocabulary, got {got}") from error


def byte_alphabet():
    """{character: byte}: GPT-2's files write a byte as a character, printable ones as themselves and first,
    the others as U+0100 onwards."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    alphabet = {chr(b): b for b in printable}
    alphabet.update((chr(256 + i), b) for i, b in enumerate(b for b in range(256) if b not in printable))
    return alphabet


# Our own file in a folder of weights: there tokenizer.json is the one that transformers reads.
OURS = "tokens.json"


def has_tokenizer(folder):
    """Whether a folder holds a tokenizer that `folder_tokenizer` reads."""
    there = lambda names: all(os.path.isfile(os.path.join(folder, name)) for name in names)
    return there([OURS]) or any(map(there, GPT2_FILES))


def folder_tokenizer(folder):
    """The tokenizer of a folder: what `write_tokenizer` wrote, else GPT-2's two files."""
    path = os.path.join(folder, OURS)
    if not os.path.isfile(path):
        return gpt2_from_folder(folder)
    try:
        state = json.loads(open_text(path))
        if state["pattern"] != PATTERN:  # a pattern of strangers could keep us busy for ever
            raise ValueError("another pattern than GPT-2's")
        tok = Tokenizer.from_state(state)
        if not set(BYTES) <= set(tok.bytes_of):
            raise ValueError("a vocabulary without all bytes")
        return tok
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{path}: expected a tokenizer, got {first_line(error)}") from error


def write_tokenizer(tokenizer, folder):
    """tokens.json, which `folder_tokenizer` reads; where every token has its own id also what transformers
    reads, tokenizer.json and tokenizer_config.json. A compact tokenizer spells what it dropped byte by byte,
    for which their format has no words."""
    put = lambda name, thing: write_whole(os.path.join(folder, name), (json.dumps(thing) + "\n").encode())
    put(OURS, tokenizer.state())
    if tokenizer.complete and tokenizer.pattern == PATTERN:
        put("tokenizer.json", hub_form(tokenizer))
        put("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOT,
                                      "bos_token": EOT, "unk_token": EOT})


def hub_form(tokenizer):
    """The same tokenizer as the library tokenizers has it. A merge is a pair there and joined bytes here
    (`train_bpe`), so every pair of tokens that joins to a token is one, in the order of the ranks; a piece
    that is a token is taken whole, as tiktoken does (ignore_merges)."""
    shown = {b: c for c, b in byte_alphabet().items()}
    name = {r: "".join(shown[b] for b in r) for r in tokenizer.ranks}
    halves = ((r[:i], r[i:]) for r in tokenizer.ranks for i in range(1, len(r)))
    merges = [[name[a], name[b]] for a, b in halves if a in name and b in name]
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": tokenizer.eot, "content": EOT, "single_word": False, "lstrip": False, "rstrip": False,
           "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
             "vocab": {name[r]: i for i, r in enumerate(tokenizer.ranks)}, "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end],
            "normalizer": None, "pre_tokenizer": pieces, "post_processor": None, "decoder": pieces,
            "model": model}


def load_tokenizer(name, texts, size=4096, compact=False):
    """byte | bpe (learned from texts) | gpt2 | a folder with a tokenizer, ours or GPT-2's two files."""
    texts = list(texts)  # they may be read twice
    known = {"byte": byte_tokenizer, "bpe": lambda: train_bpe(texts, size), "gpt2": gpt2_tokenizer}
    if name not in known and not os.path.isdir(name):
        raise UserError(f"tokenizer: expected byte, bpe, gpt2 or a folder, got {show(name)}")
    tok = known[name]() if name in known else folder_tokenizer(name)
    return tok.compact(texts) if compact else tok


def world_or_text_tokenizer(cfg, words, texts):
    """Words where a world knows its own and no other tokenizer is asked for, else --tokenizer's, a learned
    BPE at least."""
    if cfg.tokenizer is None and words:
        return word_tokenizer(words).compact([" " + " ".join(words)])
    return load_tokenizer(cfg.tokenizer or "bpe", texts, cfg.vocab_size, compact=cfg.tokenizer != "byte")
