"""Black-box searches for a prompt: what a learned token reward has to beat at the same number of queries.

A query is one prompt on all few-shot texts, the cost that matters. A search is told its space and nothing
else; it yields prompts (N, T) and is sent their scores (N,), E10, higher is better:

    scores = yield prompts

`conducted` asks for it and counts: no search can spend more than its budget. `halving` asks about some of the
texts (`Part`), and pays for as much. All of them are short, and none has a network: what they lack is a model
that has read. `told` is ridge with the run's own first questions, which such a model has chosen.

The run has the same `Record` of what it scored. `finalists` chooses from either what goes to dev, so that run
and searches have the same choice, and `improvements` says when the best prompt so far was another one.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from support.noise import noisy

BATCH = 16  # prompts a question, as many as the run's own --candidates
CROSSOVER = 0.3  # evolution: share of children with two parents
# Weight of ridge's penalty, in prompts that hold a word. Embedded world of 1,125 words, five seeds twice: 0.9
# after 154, 137 and 194 queries in the median at 0.1, 1 and 10, final accuracy 1.000 at each.
RIDGE = 1.0
# Adam's rate of bdpl's logits. The same seeds, final accuracy and how many of ten had 0.9 on test, on the
# grid of bandit guidance (docs/results.md): 0.008 0.813, 3; 0.016 0.814, 2; 0.032 0.860, 2; 0.064 0.782, 0;
# 0.128 0.833, 3. So the grid went on, as logits of their own move less than those of a net: 0.256 0.940, 6;
# 0.512 1.000, 10, 0.9 after 415 queries in the median; 1.024 0.984, 9, 0.9 after 224.
BDPL_LR = 1.024
DEV = 65  # prompts at most that go to dev, of a run and of every search
ENOUGH = 0.9  # accuracy on test that counts as found


# --------------------------------------------------------------------------------------------- what was asked


@dataclass
class Space:
    """All that a search knows: prompts are `length` ids below `n_ids`; it has `queries` queries of `texts`
    texts each, and random numbers of its own.  first: prompts (N, T) that the run asked about before its
    reward was fitted, None where there are none; only `told` looks at them."""
    n_ids: int
    length: int
    queries: int
    texts: int
    generator: torch.Generator
    first: torch.Tensor = None

    def draw(self, n):
        """n uniform prompts (n, T)."""
        return self.below(self.n_ids, n, self.length)

    def below(self, high, *shape):
        """Uniform integers of this shape."""
        return torch.randint(high, shape, generator=self.generator, device=self.generator.device)

    def chance(self, p, *shape):
        """Booleans of this shape, True with probability p."""
        return torch.rand(shape, generator=self.generator, device=self.generator.device) < p

    def changed(self, prompts, places):
        """prompts (N, T) with other words at `places` (N,) places each, drawn without replacement."""
        other = self.below(max(1, self.n_ids - 1), *prompts.shape)
        other = (other + (other >= prompts)) % self.n_ids  # any word but the one that is there
        order = torch.rand(prompts.shape, generator=self.generator, device=prompts.device).argsort(1)
        return torch.where(order < places[:, None], other, prompts)


@dataclass
class Part:
    """A question: prompts (N, T) on `texts` (M',), row numbers of the few-shot set, None for all of them.
    `scores` (N,): their means over the `known` texts that they were asked about before."""
    prompts: torch.Tensor
    texts: torch.Tensor = None
    scores: torch.Tensor = None
    known: int = 0

    def mean(self, scores, m):
        """The first n prompts' scores (n,) on m texts -> their means over these and the known ones."""
        if not self.known:
            return scores
        # divisor: all texts that they were asked about, now and before
        return (self.scores[:len(scores)] * self.known + scores * m) / (self.known + m)


class Record:
    """Prompts in the order in which they were scored.

    tokens (N, T) int64, scores (N,) float, read (N,): how many texts a score is the mean of, queries (N,):
    how many were spent when it was known, all on the CPU
    """

    def __init__(self, length):
        self.tokens = torch.empty(0, length, dtype=torch.long)
        self.scores = torch.empty(0)
        self.read, self.queries = torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)

    def add(self, tokens, scores, read, queries):
        """n more, tokens (n, T), scores and queries (n,), each the mean over `read` texts."""
        new = {"tokens": tokens, "scores": scores.float(), "read": torch.full((len(tokens),), read),
               "queries": queries}
        for name, x in new.items():
            setattr(self, name, torch.cat((getattr(self, name), x.cpu())))

    def worth(self):
        """[(read, score)]: what a prompt is known to be worth. More texts outweigh a higher score on few."""
        return list(zip(self.read.tolist(), self.scores.tolist()))

    def improvements(self):
        """Rows at which the best prompt so far by training score became another one."""
        best, rows = (0, -math.inf), []
        for i, worth in enumerate(self.worth()):
            if worth > best:
                best = worth
                rows.append(i)
        return rows

    def best_first(self):
        """The different prompts as tuples, by falling training score, equal ones as they came."""
        worth = self.worth()
        order = sorted(range(len(worth)), key=lambda i: worth[i], reverse=True)
        return list(dict.fromkeys(tuple(self.tokens[i].tolist()) for i in order))

    def state(self):
        """Tensors for a checkpoint, half of their size in memory: ids and counts are below 2^31."""
        return {"tokens": self.tokens.int(), "scores": self.scores, "read": self.read.int(),
                "queries": self.queries.int()}

    def load_state(self, state):
        """The inverse of `state`."""
        for name, x in state.items():
            setattr(self, name, x.cpu().clone() if name == "scores" else x.cpu().long())


def conducted(search, ask, space):
    """A search until its budget is spent or it has no more questions -> its Record.

    ask(prompts (N, T), texts) -> (N,): mean scores over the few-shot texts `texts`, None for all of them
    """
    record, spent, steps = Record(space.length), 0, search(space)  # spent: in pairs (prompt, text)
    asked = answer(steps, None)
    while asked is not None:
        part = asked if isinstance(asked, Part) else Part(asked)
        m = space.texts if part.texts is None else len(part.texts)
        prompts = part.prompts[:(space.queries * space.texts - spent) // m]  # what is left buys no more
        if len(prompts):
            scores = part.mean(ask(prompts, part.texts), m)
            pairs = spent + m * torch.arange(1, len(prompts) + 1)
            record.add(prompts, scores, part.known + m, -(-pairs // space.texts))  # one that was begun counts
            spent += m * len(prompts)
        asked = answer(steps, scores) if len(prompts) == len(part.prompts) else None
    return record


def answer(steps, scores):
    """The next question of a search that is sent `scores` (None at its begin); None where it has no more."""
    try:
        return steps.send(scores)
    except StopIteration:
        return None


# ----------------------------------------------------------------------------------------------- the searches


def uniform(s):
    """Random search (Bergstra and Bengio, 2012): nothing is learned from the answers."""
    while True:
        yield s.draw(BATCH)


def hill(s):
    """Hill climbing with edits of one word, as in GrIPS (Prasad et al., 2022): each of BATCH neighbours has
    another word at one place, and the best of them is taken where it is no worse (a tie too: a useless word
    may drift). One neighbour at a time was slower: it takes every small step, before a large one is seen."""
    best = s.draw(1)  # (1, T)
    score = yield best
    while True:
        tried = s.changed(best.expand(BATCH, -1), torch.ones(BATCH, dtype=torch.long, device=best.device))
        scores = yield tried
        top = scores.argmax()[None]
        if scores[top] >= score:
            best, score = tried[top], scores[top]


def evolution(s):
    """A (16 + 16) evolution strategy; EvoPrompt (Guo et al., 2023) is one whose operators a language model
    writes. Parents are the better one of two of the best 16 so far; some children take each place from one of
    two parents, all get one or two new words."""
    pool = s.draw(BATCH)  # (16, T), then with the children (32, T)
    scores = yield pool
    while True:
        best = scores.argsort(descending=True, stable=True)[:BATCH]
        pool, scores = pool[best], scores[best]
        winners = lambda: torch.minimum(s.below(BATCH, BATCH), s.below(BATCH, BATCH))  # the pool is in order
        mother, father = pool[winners()], pool[winners()]
        mixed = s.chance(CROSSOVER, BATCH, 1) & s.chance(0.5, BATCH, s.length)
        children = s.changed(torch.where(mixed, father, mother), 1 + s.below(2, BATCH))
        new = yield children
        pool, scores = torch.cat((pool, children)), torch.cat((scores, new))


def bdpl(s):
    """BDPL (Diao et al., 2022): one categorical distribution a place, policy gradient with the mean score as
    baseline, no network. Here over the whole vocabulary, as logits and with Adam."""
    logits = torch.zeros(s.length, s.n_ids, device=s.generator.device)  # (T, V)
    optimizer = torch.optim.Adam([logits], lr=BDPL_LR)
    while True:
        p = logits.softmax(1)
        prompts = p.multinomial(BATCH, replacement=True, generator=s.generator).t()  # (N, T)
        scores = yield prompts
        said = F.one_hot(prompts, s.n_ids) - p  # (N, T, V): the gradient of log p(prompt)
        # divisor: one prompt less than were drawn, as the baseline is made of the same ones
        logits.grad = -torch.einsum("n,ntv->tv", scores.to(p) - scores.mean(), said) / (BATCH - 1)
        optimizer.step()


def ridge(s, first=None):
    """Ridge regression (Hoerl and Kennard, 1970) of the score on counts of tokens, and greedy choice: the T
    words of the highest weights, half of them random in all prompts of a question but the first, so that new
    words are tried beside good ones.  first: prompts (N, T) to begin with, in place of random ones"""
    prompts = s.draw(BATCH) if first is None else first
    scores = yield prompts
    weights = scores.new_zeros(s.n_ids)
    while True:
        weights = ridge_weights(prompts, scores, weights)
        top = weights.topk(min(s.length, s.n_ids)).indices
        greedy = top[torch.arange(s.length, device=top.device) % len(top)]  # (T,)
        swap = s.chance(0.5, BATCH, s.length)
        swap[0] = False
        tried = torch.where(swap, s.draw(BATCH), greedy)
        new = yield tried
        prompts, scores = torch.cat((prompts, tried)), torch.cat((scores, new))


def ridge_weights(prompts, scores, weights, steps=20):
    """(V,) least squares of centred scores (N,) on counts of tokens with RIDGE as penalty, by `steps` of
    conjugate gradients from `weights`: neither N x V nor V x V numbers exist."""
    def counted(w):
        """(X'X + RIDGE) w, X (N, V) the counts."""
        return back(w[prompts].sum(1)) + RIDGE * w

    def back(y):
        """X' y."""
        each = y.repeat_interleave(prompts.shape[1])
        return torch.zeros_like(weights).index_add(0, prompts.flatten(), each)
    left = back(scores - scores.mean()) - counted(weights)
    along, size = left, left @ left
    for _ in range(steps):
        if size < 1e-12:
            break
        image = counted(along)
        far = size / (along @ image)  # divisor: positive, as RIDGE is
        weights, left = weights + far * along, left - far * image
        along, size = left + (left @ left) / size * along, left @ left
    return weights


def told(s):
    """Ridge that begins with the run's own first questions. Which words to ask about first is a matter of
    having read (rollout.py `unlike`) and none of credit, so that this one says what is left to credit."""
    return ridge(s, s.first)


def halving(s):
    """Sequential halving (Karnin et al., 2013): many random prompts on a few texts, the better half of them
    on as many again, until all texts are read; the same texts for all prompts of a round."""
    order = torch.randperm(s.texts, generator=s.generator, device=s.generator.device)
    reads = [s.texts >> i for i in range(max(1, s.texts.bit_length() - 1))][::-1]  # 32 texts: 2, 4, 8, 16, 32
    # pairs a prompt of the first round: half of the prompts, a quarter, ... read the texts of later rounds
    price = sum((b - a) / 2 ** i for i, (a, b) in enumerate(zip([0] + reads, reads)))
    prompts, known = s.draw(max(1, int(s.queries * s.texts / price))), 0
    scores = torch.zeros(len(prompts), device=prompts.device)
    for read in reads:
        scores = yield Part(prompts, order[known:read], scores, known)
        keep = scores.argsort(descending=True, stable=True)[:max(1, len(scores) // 2)]
        prompts, scores, known = prompts[keep], scores[keep], read


SEARCHES = {"random": uniform, "hill": hill, "evolution": evolution, "bdpl": bdpl, "ridge": ridge,
            "told": told, "halving": halving}

# --------------------------------------------------------------------------------------- at the end of a run


def finalists(record, own=()):
    """What goes to dev, DEV different prompts at most, as tuples: of a run's `own` (tuples; greedy ones, then
    its last samples) the first half, then what was scored by falling training score, then the others."""
    half = (DEV + 1) // 2
    return list(dict.fromkeys([*own[:half], *record.best_first(), *own[half:]]))[:DEV]


def contest(task):
    """-> (figures of summary.json, rows of searches.jsonl): what the searches reach at the run's cost."""
    records = compete(task)
    rows = curves(task, {"run": task.scored, **records})
    figures = {"best_queries_to_90": queries_to_90(rows, "run")}
    for name, record in records.items():
        known = "random_search" if name == "random" else name  # random_accuracy: the mean of random prompts
        figures[f"{known}_accuracy"] = task.best_on_dev(finalists(record))[1]
        figures[f"{name}_queries_to_90"] = queries_to_90(rows, name)
    return figures, rows


def compete(task):
    """Every search at as many queries as the run has spent: {name: Record}. Random numbers of their own, the
    same for each, so that what else is drawn at the end of a run does not hang on them."""
    told = task.scored.tokens[:task.first_queries].to(task.device) if task.first_queries else None
    records = {}
    for name, search in SEARCHES.items():
        generator = torch.Generator(task.device).manual_seed(task.cfg.seed + 3)  # evaluate.py has the others
        people = torch.Generator().manual_seed(task.cfg.seed + 4)  # prompt.py has the next
        space = Space(task.n_ids, task.width, max(1, task.queries), len(task.sets["train"][1]), generator,
                      told)
        records[name] = conducted(search, lambda prompts, texts: answers(task, prompts, texts, people), space)
    return records


def answers(task, prompts, texts, generator):
    """Scores (N,) of prompts (N, T) on some few-shot texts, as the run is told them: under --noise by a new
    draw each time, also of a prompt that was asked about before.

    An answer about m of the M texts costs m / M of a query and has sqrt(M / m) times the noise, so that a
    query's worth of them averages to the noise of one answer about all: halving buys no certainty that others
    have to pay for.
    """
    scores, m = task.ask(prompts, "train", texts)[0], len(task.sets["train"][1])
    read = m if texts is None else len(texts)
    return noisy(scores, task.cfg.noise * (m / read) ** 0.5, generator)


def curves(task, records):
    """{name: Record} -> rows of searches.jsonl, {"search", "queries", "accuracy"}: the test accuracy of the
    best prompt so far by training score, at each improvement, and once more at the end of its record."""
    found = {name: record.improvements() for name, record in records.items()}
    prompts = torch.cat([records[name].tokens[rows] for name, rows in found.items()])
    accuracy = task.ask(prompts.to(task.device), "test")[1].tolist()  # one question: equal ones once
    accuracy = iter([round(x, 6) for x in accuracy])  # 540 of 600 in float32 is below 0.9
    rows = []
    for name, improved in found.items():
        queries = records[name].queries
        rows += [{"search": name, "queries": int(queries[i]), "accuracy": next(accuracy)} for i in improved]
        if improved:
            rows.append(rows[-1] | {"queries": int(queries[-1])})
    return rows


def queries_to_90(rows, name):
    """Queries until the best prompt so far of a search first had 0.9 on test, None if never."""
    return next((x["queries"] for x in rows if x["search"] == name and x["accuracy"] >= ENOUGH), None)
