"""Task 2: write the summary of a document, with ROUGE and METEOR to score it.

A policy learns from pairs of document and reference, writes K candidates of its own, and a preference over
them (METEOR) teaches the reward net which tokens of a summary deserve to be learned. References are noisy, in
real corpora and in the embedded world (reports.py) alike: part of what they say is nowhere in the document.
The point of the task is to see token rewards tell that part from the rest.

A preference can show a wrong word only where candidates differ in it. Those of the policy do: it imitates the
wrong words of its references, and samples them at about their share. That the reward finds them takes
candidates enough (--candidates) and a head that sees how far its body had foreseen a word (--foreseen): the
warm start has learned to copy the right one. Without it r knew a wrong word no better than a coin after 600
steps on 3,584 groups of candidates, a third of them with words of another document; with it, after 100 steps
on 224 groups of the policy's own, in 98 of 100 summaries.

Simplified: ROUGE without stemming and without rougeLsum; METEOR counts exact matches only (no stems, no
synonyms); a made-up world of some 180 words in place of CNN/DailyMail and XSum, which `read_pairs` reads
where they are at hand.
"""

import itertools
import random
import re

import numpy as np
import torch

import data
from support.distributed import shared, world
from support.files import digest
from tasks import Samples, Task, marked
from tasks.reports import contradicts, embedded_world, others, world_words

# Everything but a-z and 0-9 becomes a space: words as the original ROUGE script sees them, "don't" is two and
# "é" none.
SPACES = bytes(c if chr(c) in "abcdefghijklmnopqrstuvwxyz0123456789" else 32 for c in range(256))


# ----------------------------------------------------------------------------------------------------- scores

def f1(matches, n_prediction, n_reference):
    """Harmonic mean of precision and recall, in rouge-score's order of operations: equal to the last bit."""
    precision, recall = matches / max(n_prediction, 1), matches / max(n_reference, 1)
    return 2 * precision * recall / (precision + recall) if matches else 0.0


def overlap(prediction, reference):
    """How many items the two share, as often as in both. A plain dict beats Counter on short texts."""
    left = {}
    for item in reference:
        left[item] = left.get(item, 0) + 1
    matches = 0
    for item in prediction:
        if left.get(item):  # this occurrence is used up, a third "the" finds nothing in a reference with two
            left[item] -= 1
            matches += 1
    return matches


def lcs_length(prediction, reference):
    """Length of the longest common subsequence: the usual table, row by row, a row being the bits of one
    integer (Hyyro 2004, "Bit-parallel LCS-length computation revisited").

    Bit j is 0 where the row grows by one from column j to j + 1, so the length is the number of zeros. The
    carry of the addition takes each match to the next place where the row grew: n additions instead of n * m
    table entries.
    """
    places, bit = {}, 1
    for word in reference:
        places[word] = places.get(word, 0) | bit
        bit <<= 1
    row = full = bit - 1
    for word in prediction:
        if word in places:  # one that the reference lacks leaves the row as it is
            matched = row & places[word]
            row = (row + matched) | (row - matched)
    return len(reference) - (row & full).bit_count()  # carries past the last column are no part of the table


ROUGE = {  # words of prediction and reference -> F1
    "rouge1": lambda p, r: f1(overlap(p, r), len(p), len(r)),
    "rouge2": lambda p, r: f1(overlap(zip(p, p[1:]), zip(r, r[1:])), len(p) - 1, len(r) - 1),
    "rougeL": lambda p, r: f1(lcs_length(p, r), len(p), len(r)),
}


def rouge_words(text):
    """Lower-case words, as bytes: there a table and a split take a third of a regular expression's time."""
    return text.lower().encode("ascii", "replace").translate(SPACES).split()


def rouge(prediction, reference, which=tuple(ROUGE)):
    """F1 of ROUGE-1, ROUGE-2, ROUGE-L, equal to rouge-score 0.1.2 with use_stemmer=False; 0.0 where one of
    the texts has no word."""
    p, r = rouge_words(prediction), rouge_words(reference)
    return {name: ROUGE[name](p, r) for name in which}


def meteor(prediction, reference, alpha=0.9, beta=3.0, gamma=0.5):
    """METEOR with exact matches only, equal to nltk's meteor_score with stemmer and synonyms switched off.

    nltk takes lists of words; here both texts are lower-cased and split at white space, so punctuation counts
    as (part of) a word. 0.0 when nothing matches, which includes one or both texts being empty.

    Words are matched from the end of the prediction, each with the last free equal word of the reference.
    That is not always the alignment with the fewest chunks, which METEOR's authors ask for, but nltk's, and
    numbers should compare.
    """
    p, r = prediction.lower().split(), reference.lower().split()
    places = {}
    for j, word in enumerate(r):
        places.setdefault(word, []).append(j)
    matches, chunks, adjacent = 0, 0, None
    for word in reversed(p):
        if free := places.get(word):
            j = free.pop()
            matches += 1
            chunks += j != adjacent  # not right before the match that follows it: a new chunk
            adjacent = j - 1
        else:
            adjacent = None
    if not matches:
        return 0.0
    precision, recall = matches / len(p), matches / len(r)
    mean = precision * recall / (alpha * precision + (1 - alpha) * recall)  # alpha .9: recall-heavy
    return (1 - gamma * (chunks / matches) ** beta) * mean


# -------------------------------------------------------------------------------------------------- real text

SPLITS = "train", "validation", "test"


def read_pairs(spec, limit=None, document_column=None, summary_column=None, say=print, split_seed=1,
               cache_dir="out/cache", progress=None):
    """{"train" | "validation" | "test": rows}, a row being {"document", "summary"}, at most `limit` each;
    read once into the cache, and from there when a row is asked for.

    `spec` is a folder with these files, one file, or "hub:<id>[:config]"; what is missing of validation and
    test is cut off the training rows, equal documents together. Columns named as in XSum (document, summary)
    or CNN/DailyMail (article, highlights) are found by themselves; a name given by hand is the only one that
    counts, since a corpus may well have a "summary" column that is not the one wanted.
    """
    fields = {"document": ((document_column,) if document_column else ("document", "article"), str),
              "summary": ((summary_column,) if summary_column else ("summary", "highlights"), str)}
    return data.corpus_rows(spec, SPLITS, fields, limit, split_seed, cache_dir, progress, say)


# ------------------------------------------------------------------------------------------------------- task


class SummarizeTask(Task):
    """Documents with references, METEOR as the preference, ROUGE and METEOR to look at."""
    kind, has_references, reads = "summary", True, ("summarize",)
    inputs = {"document": (("document", "article"), str)}
    figures = ("rouge1", "rouge2", "rougeL", "meteor", "sft_rouge1", "sft_rouge2", "sft_rougeL", "sft_meteor",
               "exact", "wrong_facts", "rank_accuracy", "fact_auroc", "fact_accuracy", "length", "ended")
    reward_figures = ("fact_auroc", "fact_accuracy")
    curve = "meteor"
    defaults = {"objective": "wmle", "n_embd": 96, "K": 3, "resolution": 0.01, "reward_first": 800,
                "reward_steps": 150, "reward_every": 100, "reward_lr": 5e-4, "reward_batch": 16,
                "policy_steps": 300, "batch_size": 32, "lr": 5e-4, "alpha": 0.01, "weights": "both",
                "sft_steps": 1200, "eval_every": 100, "foreseen": True, "candidates": 2048,
                "patience": 20}
    # T5's own dropout, and what its library samples from. Rates and numbers of steps stay ours: of the
    # paper's schedule, a fit every half of 5 epochs and as long as the first, the proportions are kept.
    paper = Task.paper | {"objective": "wmle", "agg": "avg", "K": 3, "top_k": 50, "candidates": 32,
                          "reward_batch": 32, "batch_size": 32, "dropout": 0.1, "policy_steps": 300,
                          "reward_every": 30, "reward_first": 100, "reward_steps": 100, "patience": 7}

    def __init__(self, cfg, device, progress, say):
        self.cfg, self.device = cfg, device
        self.real, more = bool(cfg.data), [" " + cfg.ask] if cfg.ask else []
        if self.real:
            self.rows = read_pairs(cfg.data, cfg.limit or None, cfg.document_column, cfg.summary_column, say,
                                   cfg.split_seed, cfg.cache_dir, progress)
            self.tokenizer, self.tensors = data.corpus_pairs(cfg, self.rows, more, progress, say)
        else:
            self.rows = embedded_world(0)
            texts = [" " + row[k] for row in self.rows["train"] for k in ("document", "summary")] + more
            self.tokenizer = data.world_or_text_tokenizer(cfg, world_words(), texts)
            self.tensors = {name: self._encode(rows) for name, rows in self.rows.items()}
        self.start = self.eot = self.tokenizer.eot
        self._take_ask()
        train = self.tensors["train"]
        data.decide_widths(cfg, train.contexts.lengths, train.references.lengths,
                           ("documents", "summaries"), say)
        self.n_ids, self.width = self.tokenizer.size, cfg.max_summary
        for name, x in self.tensors.items():
            x.cut((cfg.max_document, self.width), ("documents", "references"), name, say, self.asked)
        longest = max(x.widths[0] for x in self.tensors.values())
        self.context = longest + self.width + 1  # a start token; candidates share their positions
        say(f"{cfg.data or 'embedded world'}: " + ", ".join(f"{k} {len(v)}" for k, v in self.rows.items())
            + f"; {self.tokenizer.size} tokens ({self.tokenizer.name}), documents up to {longest}")

    def _encode(self, rows):
        """Rows of one split -> data.Pairs of documents and of references with end-of-text last."""
        texts = [row["document"] for row in rows], [row["summary"] for row in rows]
        return data.Pairs(data.Ids.of(data.encode(texts[0], self.tokenizer)),
                          data.Ids.of(data.encode(texts[1], self.tokenizer, end=True)))

    def fingerprint(self):
        """{part: hash} of all data: of rows on disk the hash that their file was written with."""
        rows = {name: x.digest() if self.real else digest(x) for name, x in self.rows.items()}
        ids = {name: x.digest() for name, x in self.tensors.items()}
        return rows | {"tokens": digest((self.tokenizer.state(), ids, self.width))}

    def _take_ask(self):
        """--ask between document and summary, as a pretrained decoder has read it: its last token opens the
        summary in the place of end-of-text (`start`), the others end the document (`asked`)."""
        ids = self.tokenizer.encode(" " + self.cfg.ask) if getattr(self.cfg, "ask", None) else []
        self.asked = ids[:-1]
        if ids:
            self.start = ids[-1]

    def _ask_behind(self, documents, most, name, say):
        """Ids of documents, with what asks for a summary behind each, `most` tokens together."""
        room = max(1, most - len(self.asked))
        return [[*row, *self.asked] for row in data.cut(documents, room, "end", name, "documents", say)]

    def encode_inputs(self, rows, most, name, say):
        """As ever, with what asks for a summary behind each."""
        return self._ask_behind(super().encode_inputs(rows, 2 ** 31, name, say), most, name, say)

    @classmethod
    def reopen(cls, c, kept, tokenizer, device):
        """The task without its data; its inputs may bear the column name that the run's documents had."""
        task = super().reopen(c, kept, tokenizer, device)
        task._take_ask()
        names, kind = cls.inputs["document"]
        task.inputs = {"document": ((*names, c.document_column) if c.document_column else names, kind)}
        return task

    def target(self, row):
        """What the annotator compares with: in the embedded world the facts (a person who knows what
        happened), on real data the reference, as in the paper.

        METEOR is recall-heavy: against a noisy reference an unsupported clause whose function words match
        pays off, so such a preference cannot unlearn the noise that it shares.
        """
        return row.get("facts", row["summary"])

    def prefer(self, batch, tokens, mask):
        """The preference of (B, K, T) summaries: METEOR, one float a candidate. Processes share it out."""
        def read(index, tokens, mask):
            k = tokens.shape[1]
            targets = [self.target(self.rows["train"][i]) for i in index.tolist() for _ in range(k)]
            scores = [meteor(text, target) for text, target in zip(self.texts(tokens, mask), targets)]
            return torch.tensor(scores, device=tokens.device).view(tokens.shape[:2])
        return shared(read, batch.index, tokens, mask)

    def plant(self, batch, tokens, mask, generator):
        """In --planted of the inputs the last two of K candidates (B, K, T) give way to the reference and the
        same with one wrong word: what a preference says of these two can only be about that word."""
        tokens, mask = tokens.clone(), mask.clone()
        chosen = torch.rand(len(tokens), generator=generator, device=tokens.device) < self.cfg.planted
        for b in chosen.nonzero().flatten().tolist():
            i = int(batch.index[b])
            right = self.fitting(self.rows["train"][i]["summary"])
            texts = right, self.wrong_fact("train", i, right)
            ids, m = data.pad([self.tokenizer.encode(" " + x) + [self.eot] for x in texts], self.width)
            tokens[b, -2:], mask[b, -2:] = ids.to(tokens.device), m.to(tokens.device)  # (2, T)
        return tokens, mask

    def decoded(self, policy, split, n=None, at_once=64):
        """Greedy summaries of the first n rows of a split, one by one and in order, so that a test set of any
        size fits: (row number, text, tokens, whether it ended by itself). `at_once` in every process."""
        for index in torch.arange(n or len(self.rows[split])).split(at_once * world()):
            tokens, mask = self.write(policy, self.pick(split, index), None, temperature=0)  # (B, 1, T)
            ended = (mask & (tokens == self.eot)).any(-1).flatten()  # inside the mask the last one
            yield from zip(index.tolist(), self.texts(tokens, mask), mask.sum(-1).flatten().tolist(),
                           ended.tolist())

    @torch.no_grad()
    def scores(self, policy, split, n=None):
        """Means over a split, greedy decoding: ROUGE and METEOR against the target, exact matches, length,
        ended."""
        figures = {}  # {name: a number a row}: all that is kept of a row
        for i, text, length, ended in self.decoded(policy, split, n):
            found = self.compared(text, self.target(self.rows[split][i]))
            for name, x in (found | {"length": length, "ended": ended}).items():
                figures.setdefault(name, []).append(x)
        self.each = {"meteor": figures["meteor"]}
        return {name: sum(x) / len(x) for name, x in figures.items()}  # divisor: the rows

    def compared(self, text, target):
        """The scores of one output. Which words tell a fact is known in the embedded world only."""
        found = rouge(text, target) | {"meteor": meteor(text, target), "exact": float(text == target)}
        return found if self.real else found | {"wrong_facts": float(contradicts(text, target))}

    def begin(self, policy):
        """The warm-started policy's scores, before the alternate loop: the `sft_` twins of summary.json."""
        scores = self.scores(policy, "test")
        self.sft = {f"sft_{k}": v for k, v in scores.items() if k not in ("length", "ended")}

    def evaluate(self, policy, generator):
        """A point of the curve, on validation documents: the test set is for the end."""
        return self.scores(policy, "validation", min(self.cfg.curve_size, len(self.rows["validation"])))

    @torch.no_grad()
    def samples(self, policy, generator, n=3):
        """For n fixed training documents the right summary, the same with one wrong word, the policy's greedy
        one and the reference as it stands, noise and all (on real data it is the right one: it stands once).

        Errors: in the embedded world every word that the marked fact lacks; on real data the wrong word.
        """
        batch = self.pick("train", torch.arange(min(n, len(self.rows["train"]))))
        greedy, mask = self.write(policy, batch, generator, temperature=0)  # (n, 1, T)
        tokens, masks, errors, roles = [], [], [], []
        for b, i in enumerate(batch.index.tolist()):
            right = self.fitting(self.target(self.rows["train"][i]))
            texts = [right, self.wrong_fact("train", i, right)]
            contrast = "right" if texts[0] == texts[1] else "wrong fact"  # no word of it can be replaced
            roles.append(["right", contrast, "sampled"] + ["reference"] * (not self.real))
            texts += [] if self.real else [self.rows["train"][i]["summary"]]
            ids, m = data.pad([self.tokenizer.encode(" " + x) + [self.eot] for x in texts], self.width)
            tokens.append(torch.cat((ids[:2].to(self.device), greedy[b], ids[2:].to(self.device))))
            masks.append(torch.cat((m[:2].to(self.device), mask[b], m[2:].to(self.device))))
            ids = [x[m].tolist() for x, m in zip(tokens[-1], masks[-1])]
            wrong = [self.wrong_words(x, k, right) for k, x in enumerate(ids)]
            errors.append(data.pad(wrong, self.width)[0].bool())
        tokens, mask = torch.stack(tokens), torch.stack(masks)  # (n, K, T)
        errors = torch.stack(errors).to(self.device)
        return Samples(batch, tokens, mask, self.prefer(batch, tokens, mask), roles, errors)

    def fitting(self, text):
        """A text as far as it fits into a summary, end-of-text included."""
        ids = self.tokenizer.encode(" " + text)
        return text if len(ids) < self.width else self.tokenizer.decode(ids[:self.width - 1]).strip()

    def wrong_fact(self, split, i, text):
        """The right summary of row i with one content word replaced, the same one every time: in the embedded
        world by another word of its kind, on real data by one of another row's summary; neither is in the
        document. A text without such a word stays as it is."""
        rng, row = random.Random(f"wrong fact {i}"), self.rows[split][i]
        words, known = text.split(), set((row["document"] + " " + text).lower().split())
        content = [k for k, word in enumerate(words) if self.others(split, i, word, known)]
        if not content:
            return text
        k = rng.choice(content)
        words[k] = rng.choice(self.others(split, i, words[k], known))
        return " ".join(words)

    def others(self, split, i, word, known):
        """What a content word of row i's summary can be replaced by; [] where it is none."""
        if not self.real:
            return others(word, known)
        content = re.compile(r"\w{4,}")  # of titles the short words are mostly function words
        other = self.rows[split][(i + 1) % len(self.rows[split])]["summary"].split()
        if not content.fullmatch(word):
            return []
        return [w for w in other if content.fullmatch(w) and w.lower() not in known]

    def wrong_words(self, ids, k, right):
        """[bool] a token: what is known to be wrong in the k-th sequence of a sample, as `samples` says."""
        pieces = self.tokenizer.pieces(ids, eot="")
        words = list(re.finditer(r"\S+", "".join(pieces)))
        if not self.real:
            return marked(pieces, [x.span() for x in words if x.group() not in right.split()])
        pairs = zip(words, right.split()) if k == 1 else ()
        return marked(pieces, [x.span() for x, want in pairs if x.group() != want])

    def describe(self, batch, row):
        """Document and target of one input, as text."""
        row = self.rows["train"][int(batch.index[row])]
        return row["document"], self.target(row)

    def finish(self, policy, generator):
        """The figures of summary.json: greedy decoding on the test set, beside the warm start's."""
        lengths = np.minimum(self.tensors["test"].references.lengths, self.width)
        words = torch.from_numpy(lengths).float().mean().item()
        return self.scores(policy, "test") | self.sft | {"reference_length": words}

    def by_input(self):
        """METEOR of every test document, greedy: what `finish` has averaged."""
        return self.each

    @torch.no_grad()
    def judge_reward(self, guide):
        """What the reward makes of one wrong word, over the test rows whose summary has a word to replace:
        `fact_auroc`, how often r of the wrong word is below r of the right one in its place, and
        `fact_accuracy`, how often the mean reward of all tokens prefers the right summary; ties half. None
        where no summary has such a word."""
        pairs, gaps = self.wrong_pairs(), []
        while some := list(itertools.islice(pairs, 64)):
            gaps.append(self.gaps(guide, some))
        if not gaps:
            return dict.fromkeys(self.reward_figures)
        gaps = torch.cat(gaps)  # (N, 2)
        beaten = ((gaps > 0).double() + 0.5 * (gaps == 0)).mean(0)
        return dict(zip(self.reward_figures, beaten.tolist()))

    def wrong_pairs(self):
        """(row number, right, wrong) of the test rows whose summary has a word to replace, one by one."""
        for i, row in enumerate(self.rows["test"]):
            right = self.fitting(self.target(row))
            wrong = self.wrong_fact("test", i, right)
            if right != wrong == self.fitting(wrong):  # one that is longer may not fit
                yield i, right, wrong

    def gaps(self, guide, pairs):
        """(N, 2): by how much r of the right word is above r of the wrong one, and the mean reward of the
        right summary above that of the wrong one.  pairs: N test rows with both texts; r of a word is the
        mean over its tokens"""
        sides = [x for _, right, wrong in pairs for x in ((right, wrong), (wrong, right))]
        ids = [self.tokenizer.encode(" " + text) + [self.eot] for text, _ in sides]
        word = data.pad([self.wrong_words(x, 1, other) for x, (_, other) in zip(ids, sides)], self.width)[0]
        tokens, mask, word = [x.view(len(pairs), 2, -1).to(self.device)  # (N, 2, T)
                              for x in (*data.pad(ids, self.width), word.bool())]
        prefix = self.pick("test", torch.tensor([i for i, _, _ in pairs])).prefix()
        rewards = guide(tokens, prefix, mask)
        # divisor: tokens of the word, of the summary
        means = [torch.where(which, rewards, 0.0).sum(-1) / which.sum(-1) for which in (word, mask)]
        return torch.stack([mean[:, 0] - mean[:, 1] for mean in means], -1)

    def state(self):
        """Beyond networks and random numbers: the warm start's scores."""
        return {"sft": self.sft}

    def load_state(self, state):
        """The inverse of `state`."""
        self.sft = state["sft"]
