"""Every figure of a run, once more by hand: the keys of summary.json, metrics.jsonl and samples.jsonl are
computed again from the tokens, masks, weights and nets that the run had in its hands, in a few plain lines
that follow README's glossary.

A run is recorded while it goes: `Tape` notes what some functions of the loop got and gave, nets copied, and
hands each line of figures the notes since the line before. Nets are read again one sequence at a time,
without padding, cache, packing or the fused op. A key that no table here computes fails: a new figure needs a
line in METRICS or SUMMARY.
"""
import copy
import functools
import inspect
import itertools
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from reference import aggregate_by_loop
from stubs import trained

import evaluate
import guidance
import objective
import rollout
import tasks.edits
import tasks.prompt
import tasks.search
import tasks.summarize
import tasks.truth
import train
import warm_start
from tasks import judge
from support.log import Log
from tasks.reports import WORDS
from tasks.summarize import meteor, rouge

NET = ("--n_embd 16 --log_every 1 --eval_every 3 --policy_steps 3 --reward_every 2 --reward_batch 4 "
       "--reward_first 4 --reward_steps 2 --resolution 0 --lr 0.02 --hold 0")

# -------------------------------------------------------------------------------------------------- recording


def frozen(x):
    """A copy that later updates do not reach. Tensors, nets, and what is made of them;
    anything else as it is."""
    if isinstance(x, (torch.Tensor, torch.nn.Module)):
        return copy.deepcopy(x.detach() if torch.is_tensor(x) else x)
    if isinstance(x, dict):
        return {k: frozen(v) for k, v in x.items()}
    if type(x) in (list, tuple):
        return type(x)(map(frozen, x))
    return x


class Entry(SimpleNamespace):
    """A note or a line; compared and hashed by who it is, so that what was computed of it can be kept."""
    __hash__, __eq__ = object.__hash__, object.__eq__


class Tape:
    """What the functions of the loop got and gave: `notes` of the line in hand, `lines`
    with the notes of each."""

    def __init__(self, monkeypatch, flags):
        self.flags, self.patch, self.run, self.inside = flags, monkeypatch, None, ()
        self.notes, self.lines = [], []
        made, figures = train.Run, Log.figures

        def remember(*args):
            self.run = made(*args)
            return self.run

        def line(log, phase, step, values):
            row = figures(log, phase, step, values)
            self.close(phase, step, row)
            return row
        monkeypatch.setattr(train, "Run", remember)
        monkeypatch.setattr(Log, "figures", line)

    def note(self, owner, name, *nets):
        """From now on each call of owner.name leaves a note: arguments by name, `out`, which noted calls it
        is inside, and copies of the run's `nets` as they were before it."""
        function = getattr(owner, name)
        signature = inspect.signature(function)

        def noted(*args, **kw):
            given = {k: frozen(v) for k, v in signature.bind(*args, **kw).arguments.items()}
            before = {k: frozen(getattr(self.run, k)) for k in nets}
            learns = any(x.training for x in given.values() if isinstance(x, torch.nn.Module))
            note = Entry(name=name, given=given, inside=self.inside, learns=learns, **before)
            self.notes.append(note)
            outside, self.inside = self.inside, (*self.inside, name)
            try:
                note.out = function(*args, **kw)
            finally:
                self.inside = outside
            note.kept = frozen(note.out)
            return note.out
        self.patch.setattr(owner, name, noted)

    def close(self, phase, step, row, ended=False):
        """A line of figures takes the notes since the one before, and the nets as they are now."""
        nets = {k: frozen(getattr(self.run, k, None)) for k in ("policy", "reward")}
        self.lines.append(Entry(phase=phase, step=step, row=row, notes=self.notes, run=self.run, ended=ended,
                                before=list(self.lines), **nets))
        self.notes = []


def of(notes, name):
    return [x for x in notes if x.name == name]


# ------------------------------------------------------------------------------- nets, one sequence at a time


def read(model, context, start, ids):
    """States (T, D) that predict the tokens of one sequence, and states that have read them."""
    hidden = model.eval()(torch.tensor([context + [start] + ids]))[0]
    return hidden[len(context):-1], hidden[len(context) + 1:]


def log_softmax(model, context, start, ids, n_ids):
    """(T, V) log-probabilities of the policy at each token of one sequence."""
    return (read(model, context, start, ids)[0] @ model.wte.weight[:n_ids].T).log_softmax(-1)


def softplus(x):
    return math.log1p(math.exp(x))


def before_the_bound(net, context, start, ids):
    """E1 of one sequence: a list of floats. What the head sees is the state that has read the token, and with
    --foreseen the logit of the token in the state before it."""
    before, after = read(net.body, context, start, ids)
    if net.foreseen:
        logits = before @ net.body.wte.weight.T  # (T, V)
        after = torch.cat((after, logits[torch.arange(len(ids)), ids][:, None]), 1)
    return net.eval().mlp(after).squeeze(-1).tolist()


def bounded(x):
    """E2 of a list of floats."""
    return [1e-8 + softplus(1 - softplus(1 - y) - 1e-8) for y in x]


@torch.no_grad()
def token_rewards(net, context, start, ids):
    """E1 and E2 of one sequence: a list of floats; of a policy fitted by DPO how much likelier than its start
    each token is to it, in nats times beta."""
    if hasattr(net, "reference"):
        logp = lambda body: log_softmax(body, context, start, ids, net.n_ids)[torch.arange(len(ids)), ids]
        return (net.beta * (logp(net.body) - logp(net.reference))).tolist()
    return bounded(before_the_bound(net, context, start, ids))


@torch.no_grad()
def paid_rewards(c, net, context, start, ids):
    """What the tokens of one sequence are paid: r, or under --guidance red by how much each token moves the
    score of what was said so far."""
    rewards = token_rewards(net, context, start, ids)
    if c.guidance != "red":
        return rewards
    before = [score_of_nothing(net, context, start)] + rewards
    return [b - a for a, b in zip(before, rewards)]


@torch.no_grad()
def score_of_nothing(net, context, start):
    """r where the start alone has been read."""
    state = net.body.eval()(torch.tensor([context + [start]]))[0, -1:]
    return bounded(net.eval().mlp(torch.cat((state, torch.zeros(1, net.foreseen)), 1))[0].tolist())[0]


@torch.no_grad()
def rewards_of_words(net, start, n):
    """The same of the n sequences of one word, which are as long as one another and read at once."""
    words = torch.arange(n)
    hidden = net.body.eval()(torch.stack((torch.full((n,), start), words), 1))  # (n, 2, D)
    after = hidden[:, 1]
    if net.foreseen:
        logits = hidden[:, 0] @ net.body.wte.weight.T  # (n, V)
        after = torch.cat((after, logits[words, words][:, None]), 1)
    return bounded(net.eval().mlp(after).squeeze(-1).tolist())


def score(rewards, how, beta, t_bar):
    """E3 and E4 of the rewards of one sequence, a list."""
    if how == "sum":
        return sum(rewards)
    if how == "avg":
        return t_bar * sum(rewards) / len(rewards)
    tau = beta if how == "max" else -beta
    return t_bar * tau * math.log(sum(math.exp(r / tau) for r in rewards))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def deviation(values):
    """Of a whole population: divided by N."""
    return math.sqrt(mean((v - mean(values)) ** 2 for v in values))


def real_tokens(tokens, mask):
    """(T,) ids and their mask -> a list without padding."""
    return [int(t) for t, m in zip(tokens.tolist(), mask.tolist()) if m]


def cut_rows(tokens, mask):
    """(N, T) -> N lists."""
    return [real_tokens(t, m) for t, m in zip(tokens, mask)]


def groups_of(x):
    """Candidates -> [[(context, ids, preference, ends)] of a group]: ends, the places whose rewards count."""
    groups = []
    for b in range(len(x.tokens)):
        context = [] if x.context is None else real_tokens(x.context[b], x.context_mask[b])
        ends = x.mask if x.ends is None else x.ends
        groups.append([(context, real_tokens(x.tokens[b, k], x.mask[b, k]), float(x.preference[b, k]),
                        [t for t, e in enumerate(ends[b, k].tolist()) if e])
                       for k in range(x.tokens.shape[1])])
    return groups


def scores_of(run, net, group):
    """The aggregated rewards of the siblings of one group."""
    read_at = [[r[t] for t in ends] for context, ids, _, ends in group
               for r in [token_rewards(net, context, run.task.start, ids)]]
    return [score(r, run.c.agg, run.c.beta, mean(map(len, read_at))) for r in read_at]


def right_pairs(scores, worth):
    """Share of the strictly ordered pairs that the scores order rightly, a tie half: (right, pairs)."""
    pairs = [(i, j) for i in range(len(worth)) for j in range(len(worth)) if worth[i] > worth[j]]
    gap = [scores[i] - scores[j] for i, j in pairs]
    return sum(0.5 if abs(g) < 1e-6 else float(g > 0) for g in gap), len(pairs)


def share_right(run, net, groups):
    """Rank accuracy over groups of candidates; None without a strict pair."""
    right, pairs = 0, 0
    for group in groups:
        resolution = run.c.resolution
        worth = [round(q / resolution) if resolution else q for _, _, q, _ in group]
        r, n = right_pairs(scores_of(run, net, group), worth)
        right, pairs = right + r, pairs + n
    return right / pairs if pairs else None


# ------------------------------------------------------------------------------------ what an answer is worth


def distance(a, b):
    """Levenshtein distance of two lists, cell by cell."""
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]


def opinion(text, prompt):
    """What the judge of these tests thinks of a text behind a prompt: any number that depends on both."""
    return math.sin(1.7 * sum(text) + 0.37 * sum((i + 1) * x for i, x in enumerate(prompt)))


class StubJudge:
    """`opinion` in place of a language model."""

    class Texts(list):
        def select(self, rows):
            picked = self[rows] if isinstance(rows, slice) else [self[i] for i in rows.tolist()]
            return type(self)(picked)

    def state(self):
        return {}

    def read(self, tokens, mask):
        return self.Texts(cut_rows(tokens, mask))

    def probabilities(self, texts, prompts, attribute):
        p = torch.tensor([[1 / (1 + math.exp(-opinion(t, x))) for x in prompts.tolist()] for t in texts])
        return torch.stack((1 - p, p), -1)  # (M, N, 2)


def judged(task, prompt, name, some=None):
    """(E10 score, accuracy) of one prompt on a set of texts, from `opinion`; name: train, dev, test or curve;
    some: row numbers."""
    texts, gaps = SETS["test" if name == "curve" else name], []
    texts = texts[:task.cfg.curve_size] if name == "curve" else texts
    for row in texts if some is None else [texts[i] for i in some]:
        p = 1 / (1 + math.exp(-opinion(task.tokenizer.encode(" " + row["text"]), prompt)))
        gaps.append(2 * p - 1 if row["label"] else 1 - 2 * p)
    return mean((200 if g > 0 else 180) * g for g in gaps), mean(float(g > 0) for g in gaps)


SETS = {}  # the few-shot sets of the run in hand, as they were drawn


def worth(task, split, index, ids):
    """The preference of one answer to row `index` of a split."""
    if task.kind == "prompt":
        return judged(task, ids, {"train": "train", "samples": "dev"}[split])[0]
    split = {"summary": "train", "edit": "test"}[task.kind] if split == "samples" else split
    row = task.rows[split][index]
    if task.kind == "summary":
        return meteor(said(task, ids), row["facts"])
    return -distance(ids, task.tokenizer.encode(" " + row["edited"]) + [task.eot])


def said(task, ids):
    """Ids -> text, end-of-text silent."""
    spelled = [task.tokenizer.bytes_of[i] for i in ids if i != task.tokenizer.eot]
    return b"".join(spelled).decode("utf-8", "replace").strip()


def pair_of(task, split, index):
    """(context, reference) of a row as ids, from its text."""
    if task.kind == "prompt":  # a window of the world's sentences, for the warm-up of the reward's body
        text = (task.world.texts + task.world.talk)[index]
        return [], task.tokenizer.encode(" " + text)[:12]
    row, c = task.rows[split][index], task.cfg
    asked, told = ("document", "summary") if task.kind == "summary" else ("prompt", "rejected")
    context = task.tokenizer.encode(" " + row[asked])[:c.max_document]
    return context, (task.tokenizer.encode(" " + row[told]) + [task.eot])[:c.max_summary]


# ------------------------------------------------------------------------------------ the lines of the reward


def collected(line):
    """Groups of every call of `collect`, preferences computed again from the tokens."""
    rows = [n.given["batch"].index.tolist() for n in of(line.notes, "sample") if "collect" in n.inside]
    return [[[(context, ids, worth(line.run.task, "train", i, ids), ends) for context, ids, _, ends in group]
             for i, group in zip(itertools.cycle(index), groups_of(note.out))]  # questions share an input
            for index, note in zip(rows, of(line.notes, "collect"))]


def asked(line):
    """The candidates that a round asked about first."""
    return of(line.notes, "collect")[0]


def asked_groups(line):
    return collected(line)[0]


def fit_losses(line, training):
    """The losses of the steps of a fit, or of its looks at held-out candidates, each by hand
    with the net of then."""
    return [hand_loss(line.run, note, note.given["reward"]) for note in of_losses(line)
            if note.learns is training]


def of_losses(line):
    return [x for x in line.notes if x.name in ("ranking_loss", "label_loss", "implicit_loss")]


def hand_loss(run, note, net):
    """E5 over subsets, what ties say, and logits out of reach, or E17 with a tenth for kept tokens. DPO is E5
    of scores without a bound."""
    groups = groups_of(note.given["batch"])
    if note.name == "label_loss":
        return label_loss_by_hand(run, note.given["batch"], net)
    flat, total, ties = [x for group in groups for x in group], 0.0, []
    subsets = note.given["subsets"].tolist()
    for subset in subsets:
        members = [flat[i] for i in subset]
        e, q = scores_of(run, net, members), [x[2] for x in members]
        if note.name != "implicit_loss":
            e = [x / run.c.rank_temperature for x in e]
        total += sum(math.log(sum(math.exp(e[j]) for j in range(len(e)) if j == i or q[j] < q[i])) - e[i]
                     for i in range(len(e)))
        pairs = [(i, j) for i in range(len(e)) for j in range(i) if q[i] == q[j]]
        ties += [math.log(math.cosh((e[i] - e[j]) / 2)) for i, j in pairs]
    if note.name == "implicit_loss":
        return total / len(subsets)
    logits = [x for context, ids, *_ in flat for x in before_the_bound(net, context, run.task.start, ids)]
    beyond = [0.1 * max(0.0, abs(x) - 8.0) ** 2 for x in logits]
    return total / len(subsets) + run.c.ties * ((mean(ties) if ties else 0.0) + mean(beyond))


def label_loss_by_hand(run, batch, net):
    """E17: mean over changed tokens plus a tenth of the mean over kept ones."""
    changed, kept = [], []
    for b, group in enumerate(groups_of(batch)):
        for k, (context, ids, _, _) in enumerate(group):
            x = before_the_bound(net, context, run.task.start, ids)
            for value, label in zip(x, batch.labels[b, k].tolist()):
                target = (label + 1) / 2
                each = target * softplus(-value) + (1 - target) * softplus(value)
                (changed if label else kept).append(each)
    return (mean(changed) if changed else 0.0) + 0.1 * (mean(kept) if kept else 0.0)


def held_loss(line):
    """The loss on held-out candidates of the net that the fit left behind."""
    exam = [n for n in of_losses(line) if not n.learns]
    if exam and line.run.task.has_pairs:  # worse answers are those of held-out rows
        known = [pair_of(line.run.task, "train", i) for i in held_rows(line.run)]
        assert all(group[0][:2] in known for group in groups_of(exam[0].given["batch"]))
    return hand_loss(line.run, exam[0], line.reward) if exam else None


def held_rows(run):
    """The training rows that no fit ever sees: an eighth, at least 32 but at most a quarter, by --seed."""
    n = len(run.task.rows["train"])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(run.c.seed)).tolist()
    return order[n - max(n // 8, min(32, n // 4)):]


def held_groups(run):
    """Held-out groups of a round: an eighth, at least 8 but at most a quarter; of prompts, or of questions of
    K of them, an eighth."""
    n = asked_a_round(run)
    return max(1, n // 8) if run.task.pooled else max(n // 8, min(8, n // 4))


def asked_a_round(run):
    """Prompts, questions (--no-pool) or inputs of a round."""
    return run.c.candidates // (run.c.K if run.task.pooled and not run.c.pool else 1)


def examined(line):
    """Candidates that are not fitted, of all rounds up to this line: what a fit is stopped by."""
    run, groups = line.run, []
    for x in [*line.before, line]:
        for note in of(x.notes, "collect")[:1] if x.phase == "reward" else []:
            cut, every = held_groups(run), groups_of(note.out)
            groups.append(every[0][-cut:] if run.pooled else every[-cut:])
    return [sum(groups, [])] if run.pooled else sum(groups, [])


def inputs_are_held_out(line):
    """Rows whose candidates are to be fitted are never held-out ones, and the others always are."""
    run, kept = line.run, set(held_rows(line.run))
    for note in [n for n in of(line.notes, "sample") if "collect" in n.inside]:
        rows = note.given["batch"].index.tolist()
        cut = 0 if line.ended else len(rows) - held_groups(run)
        assert not kept & set(rows[:cut]) and kept >= set(rows[cut:])


def buffered(line):
    """Candidates of every round that are fitted; of annotated answers all that are not held out."""
    run, rounds = line.run, 1 + line.step // line.run.c.reward_every
    if run.task.has_pairs:
        return len(run.task.rows["train"]) - len(held_rows(run))
    if not run.task.pooled:
        inputs_are_held_out(line)
    return rounds * (asked_a_round(run) - held_groups(run))


REWARD = {
    "preference": lambda line: mean(q for group in asked_groups(line) for _, _, q, _ in group),
    "preference_best": lambda line: max(q for group in asked_groups(line) for _, _, q, _ in group),
    "rank_accuracy": lambda line: share_right(line.run, asked(line).reward, asked_groups(line)),
    "reward_loss": lambda line: mean(x) if (x := fit_losses(line, training=True)) else None,
    "reward_held_loss": held_loss,
    "reward_fit_steps": lambda line: len(fit_losses(line, training=True)),
    "buffer": buffered,
}

# ------------------------------------------------------------------------------------ the lines of the policy


def carried(weights, how):
    """What the tokens of one sequence answer for: `--weights`."""
    if how == "sequence":
        return [mean(weights)] * len(weights)
    after = [weights[t:] for t in range(len(weights))]
    return {"immediate": weights, "to_go": [sum(x) for x in after],
            "mean_to_go": [mean(x) for x in after],
            "both": [x * mean(rest) for x, rest in zip(weights, after)]}[how]


def z_scores(values, floor):
    """Zero mean, unit deviation (divided by N - 1), deviations below the floor left as they are."""
    away = math.sqrt(sum((x - mean(values)) ** 2 for x in values) / (len(values) - 1))
    return [(x - mean(values)) / max(away, floor, 1e-6) for x in values]


def beside_others(values, k):
    """Each minus the mean of the k - 1 others of its group: --baseline rloo."""
    first = lambda i: i - i % k
    return [x - mean(values[j] for j in range(first(i), first(i) + k) if j != i)
            for i, x in enumerate(values)]


def lesson_of(line):
    """[(context, ids, weights)] of one update, the weights as the loss should see them."""
    note, run = of(line.notes, "policy_batch")[0], line.run
    c, (batch, tokens, mask, _) = run.c, note.out
    if c.objective in ("wmle", "mle"):
        pairs = [pair_of(run.task, "train", i) for i in batch.index.tolist()]
        if c.objective == "mle":
            return [(context, ids, [1.0] * len(ids)) for context, ids in pairs]
        return [(context, ids, carried(token_rewards(note.reward, context, run.task.start, ids), c.weights))
                for context, ids in pairs]
    ids = cut_rows(tokens.flatten(0, 1), mask.flatten(0, 1))
    contexts = [[]] * len(tokens) if batch.context is None else cut_rows(batch.context, batch.context_mask)
    contexts = [x for x in contexts for _ in range(tokens.shape[1])]
    if c.guidance == "bandit":
        index, k = batch.index.tolist(), tokens.shape[1]
        q = [worth(run.task, "train", index[i // k], x) for i, x in enumerate(ids)]
        q = z_scores(q, c.resolution) if c.baseline == "batch" else beside_others(q, k)
        return [(a, x, [y] * len(x)) for a, x, y in zip(contexts, ids, q)]
    paid = [paid_rewards(c, note.reward, a, run.task.start, x) for a, x in zip(contexts, ids)]
    if c.task == "summarize":  # a nat away from the warm start costs --kl
        paid = [[r - c.kl * x for r, x in zip(*pair)] for pair in zip(paid, nats_away(line, contexts, ids))]
    weights = [carried(x, c.weights) for x in paid]
    every = [w for row in weights for w in row]
    if c.center:
        weights = [[(w - mean(every)) / max(deviation(every), 0.3) for w in row] for row in weights]
    if learns_first_exactly(run):  # of what was said at the first place nothing is learned
        note.scale = mean(every), max(deviation(every), 0.3)
        weights = [[0.0, *row[1:]] for row in weights]
    return list(zip(contexts, ids, weights))


def learns_first_exactly(run):
    """Prompts by REINFORCE, whose words are paid their own reward, centred and scaled."""
    c = run.c
    return (c.exact_first and c.task == "prompt" and c.objective == "reinforce"
            and c.guidance in ("token", "red") and c.weights == "immediate" and c.center)


def first_place(line, policy):
    """- sum over all words of pi(word) times its weight, at the first place."""
    note, task = of(line.notes, "policy_batch")[0], line.run.task
    if not hasattr(note, "first"):
        note.first = rewards_of_words(note.reward, task.start, task.n_ids)
        if line.run.c.guidance == "red":
            nothing = score_of_nothing(note.reward, [], task.start)
            note.first = [r - nothing for r in note.first]
    middle, spread = note.scale
    weights = torch.tensor([(r - middle) / spread for r in note.first])
    return -(log_softmax(policy, [], task.start, [0], task.n_ids)[0].exp() * weights).sum()


def nats_away(line, contexts, ids):
    """log pi - log pi_start of every token of an update of REINFORCE."""
    note, task = of(line.notes, "policy_batch")[0], line.run.task
    logp = lambda net, a, x: log_softmax(net, a, task.start, x, task.n_ids)[torch.arange(len(x)), x]
    return [(logp(note.policy, a, x) - logp(note.start_policy, a, x)).tolist() for a, x in zip(contexts, ids)]


def reinforce_kl(line):
    """The mean of that over a sequence, and then over the sequences."""
    rows = lesson_of(line)
    return mean(mean(x) for x in nats_away(line, [a for a, _, _ in rows], [x for _, x, _ in rows]))


def loss_of(line, policy):
    """E7 and E8, or E9, of one update with a plain softmax: (loss that autograd can follow,
    logp, entropy) per token."""
    run, lesson = line.run, lesson_of(line)
    n_ids = run.task.n_ids
    parts = []
    for context, ids, w in lesson:
        table = log_softmax(policy, context, run.task.start, ids, n_ids)
        parts.append((table[torch.arange(len(ids)), ids], -(table.exp() * table).sum(-1), torch.tensor(w)))
    if run.c.objective == "reinforce":
        n = sum(len(ids) for _, ids, _ in lesson)
        loss = sum((-w * logp - run.c.alpha * entropy).sum() for logp, entropy, w in parts) / n
        if learns_first_exactly(run):  # one token of every prompt
            loss = loss + first_place(line, policy) * len(lesson) / n
    else:
        loss = sum(-(share(w, run.c.wmle_norm) * logp).sum() for logp, _, w in parts) / len(parts)
    return loss, parts


def share(w, norm):
    """E9's weights of one sequence."""
    return w / (len(w) if norm == "length" else w.sum())


def policy_of(line):
    return of(line.notes, "policy_batch")[0].policy


def parts_of(line):
    with torch.no_grad():
        return loss_of(line, policy_of(line))


def all_tokens(line, which):
    """Mean over the tokens of the batch of logp (0), entropy (1) or weight (2)."""
    return torch.cat([part[which] for part in parts_of(line)[1]]).mean().item()


def shares(line):
    """E9's weights of every sequence of an update."""
    return [share(w, line.run.c.wmle_norm) for _, _, w in parts_of(line)[1]]


def effective(w):
    """The effective share of some numbers: 1 when all are alike, 1 / N when one has everything."""
    return ((w.sum() ** 2) / (len(w) * (w ** 2).sum())).item()


def norm_of(nets, loss):
    """The length of the gradient, by plain autograd."""
    weights = [p for net in nets for p in net.parameters()]
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    return math.sqrt(sum(g.square().sum().item() for g in grads if g is not None))


def grad_norm(line):
    policy = policy_of(line)
    return norm_of([policy], loss_of(line, policy)[0])


POLICY = {
    "loss": lambda line: parts_of(line)[0].item(),
    "logp": lambda line: all_tokens(line, 0),
    "entropy": lambda line: all_tokens(line, 1),
    "reward": lambda line: all_tokens(line, 2),
    "nll": lambda line: -all_tokens(line, 0),
    "weight": lambda line: mean(w.sum().item() for w in shares(line)),
    "share": lambda line: effective(torch.cat([w * len(w) for w in shares(line)])),  # over plain MLE's 1 / T
    "ess": lambda line: mean(effective(w) for w in shares(line)),
    "grad_norm": grad_norm,
    "kl": reinforce_kl,
}

# ------------------------------------------------------------------------------------------- the lines of PPO


def segment_ends(run, note, context, ids):
    """E11: the places of one sequence at which a reward is read."""
    n, c = len(ids), run.c
    if c.guidance in ("bandit", "red"):
        return [n - 1]
    if c.guidance != "segment":
        return list(range(n))
    start = note.start_policy
    table = (read(start, context, run.task.start, ids)[1] @ start.wte.weight.T).log_softmax(-1)
    entropy = -(table.exp() * table).sum(-1)
    return [t for t in range(n) if t == n - 1 or entropy[t] >= c.segment_entropy]


def dense(run, note, context, ids):
    """E13 and E14 of one sequence, before the price of the KL."""
    r = paid_rewards(run.c, note.reward, context, run.task.start, ids)
    ends = segment_ends(run, note, context, ids)
    w_mean, b_mean, w_std, b_std, floor = note.normalizer.tolist()
    if run.c.guidance == "red":  # of one score, which is read at the last place
        return [x / max(b_std, floor) for x in r]
    out, begin = [0.0] * len(ids), 0
    for i, end in enumerate(ends, 1):
        x = math.log(i / len(ends))
        paid = (r[end] - w_mean * x - b_mean) / max(w_std * x + b_std, floor)
        for t in range(begin, end + 1):
            out[t] = paid / (end + 1 - begin) if len(ends) > 1 else paid * (t == end)
        begin = end + 1
    return out


@functools.lru_cache(maxsize=4)  # one rollout for all figures of a line
@torch.no_grad()
def rollout_of(line):
    """What the tokens of a rollout were paid, and what the critic makes of them: a row a sequence."""
    note, run = of(line.notes, "learn_from_rollout")[0], line.run
    c, (lesson, prefix, _) = run.c, note.kept
    ids = cut_rows(lesson["tokens"], lesson["mask"])
    rows = [SimpleNamespace(context=a, ids=x)
            for a, x in zip(cut_rows(*prefix) if prefix else [[]] * len(ids), ids)]
    asked_about = c.guidance == "bandit" and not run.task.has_pairs
    if asked_about:
        index = [0] * len(rows) if run.task.pooled else of(line.notes, "batch")[0].out.index.tolist()
        paid = z_scores([worth(run.task, "train", i, row.ids) for i, row in zip(index, rows)], c.resolution)
    for i, row in enumerate(rows):
        at = torch.arange(len(row.ids))
        logp = lambda net: log_softmax(
            net, row.context, run.task.start, row.ids, run.task.n_ids)[at, row.ids].tolist()
        row.old, row.start = logp(note.policy), logp(note.start_policy)
        states = read(note.policy, row.context, run.task.start, row.ids)[0]
        row.value = (states @ note.value.weight[0] + note.value.bias).tolist()
        row.dense = [paid[i] * (t == len(row.ids) - 1) for t in at.tolist()] if asked_about \
            else dense(run, note, row.context, row.ids)
        row.paid = [max(-10, min(10, r)) - c.kl * (a - b) for r, a, b in zip(row.dense, row.old, row.start)]
        row.ended = run.task.eot is None or row.ids[-1] == run.task.eot
        row.fine = 0 if row.ended else len(segment_ends(run, note, row.context, row.ids))  # one unit a reward
        final = [r - row.fine * (t == len(row.ids) - 1) for t, r in enumerate(row.paid)]
        row.advantage, running = [0.0] * len(row.ids), 0.0
        for t in reversed(range(len(row.ids))):  # E15, nothing behind the last token
            after = row.value[t + 1] if t + 1 < len(row.ids) else 0.0
            running = final[t] + c.gamma * after - row.value[t] + c.gamma * c.lam * running
            row.advantage[t] = running
        if c.returns == "min":
            row.fine = float(not row.ended)
            least = [min(max(-10, min(10, r)) for r in row.dense[t:]) for t in at.tolist()]
            away = [c.kl * sum(a - b for a, b in zip(row.old[t:], row.start[t:])) for t in at.tolist()]
            row.advantage = [x - y - row.fine - v for x, y, v in zip(least, away, row.value)]
        row.returns = [a + v for a, v in zip(row.advantage, row.value)]
        row.sum = row.returns[0] if c.returns == "min" else sum(row.paid) - row.fine
    every = [a for row in rows for a in row.advantage]
    for row in rows:
        row.white = [(a - mean(every)) / deviation(every) for a in row.advantage]
    return rows


def explained(line):
    """1 - var(returns - values) / var(returns)."""
    rows = rollout_of(line)
    missed = [r - v for row in rows for r, v in zip(row.returns, row.value)]
    return 1 - deviation(missed) ** 2 / max(deviation([r for row in rows for r in row.returns]) ** 2, 1e-12)


@functools.lru_cache(maxsize=4)
def updates_of(line):
    """Every minibatch: its losses (autograd can follow them) and figures, a mean a sequence,
    then over sequences."""
    known, c, out = {(tuple(r.context), tuple(r.ids)): r for r in rollout_of(line)}, line.run.c, []
    for note in of(line.notes, "ppo_update"):
        given, found, critic = note.given, [], []
        rows = cut_rows(given["tokens"], given["mask"])
        contexts = cut_rows(*given["prefix"]) if given["prefix"] else [[]] * len(rows)
        for row in [known[tuple(a), tuple(x)] for a, x in zip(contexts, rows)]:
            predict = read(note.policy, row.context, line.run.task.start, row.ids)[0]
            table = (predict @ note.policy.wte.weight[:line.run.task.n_ids].T).log_softmax(-1)
            logp, entropy = table[torch.arange(len(row.ids)), row.ids], -(table.exp() * table).sum(-1)
            a, old = torch.tensor(row.white), torch.tensor(row.old)
            ratio = (logp - old).exp()
            held = ratio.clamp(1 - c.ppo_clip, 1 + c.ppo_clip)
            value, before = predict.detach() @ note.value.weight[0] + note.value.bias, torch.tensor(row.value)
            near, want = (before + (value - before).clamp(-c.value_clip, c.value_clip),
                          torch.tensor(row.returns))
            found.append({"loss": (-torch.minimum(ratio * a, held * a) - c.alpha * entropy).mean(),
                          "value_loss": 0.5 * torch.maximum((value - want) ** 2, (near - want) ** 2).mean(),
                          "clip_fraction": (ratio * a > held * a + 1e-7).float().mean(),
                          "ratio_max": ratio.max(), "entropy": entropy.mean(),
                          "kl_step": (old - logp).mean()})
        mix = {k: torch.stack([x[k] for x in found]).mean() for k in found[0]}
        mix["ratio_max"] = max(x["ratio_max"] for x in found)
        norm = norm_of([note.policy, note.value], mix["loss"] + 0.5 * mix["value_loss"])
        out.append({k: v.item() for k, v in mix.items()} | {"grad_norm": norm})
    return out


def over_updates(key, how=mean):
    return lambda line: how(x[key] for x in updates_of(line))


def over_rollout(row_figure):
    """A mean over the sequences of a rollout."""
    return lambda line: mean(row_figure(row) for row in rollout_of(line))


def away(row):
    """log pi - log pi_start, a token."""
    return mean(a - b for a, b in zip(row.old, row.start))


PPO = {key: over_updates(key)
       for key in ("loss", "value_loss", "clip_fraction", "entropy", "kl_step", "grad_norm")} | {
    "ratio_max": over_updates("ratio_max", max),
    "reward": over_rollout(lambda row: mean(row.paid)),
    "reward_learned": over_rollout(lambda row: mean(max(-10, min(10, r)) for r in row.dense)),
    "return": over_rollout(lambda row: row.sum),
    "ended": over_rollout(lambda row: float(row.ended)),
    "kl": over_rollout(away),
    "length": over_rollout(lambda row: len(row.ids)),
    "explained_variance": explained,
}

# ------------------------------------------------------------------------------------ evaluations and the end


def queries(line):
    """Prompts that were scored for training up to this line."""
    return sum(n.given["tokens"].shape[1]
               for x in [*line.before, line] for n in of(x.notes, "prefer") if not x.ended)


def sampled_prompts(line):
    """What the policy said when it was looked at: 64 sampled prompts."""
    return next(n.out[0] for n in of(line.notes, "write") if n.given.get("k") == 64).tolist()


def greedy_rows(line, net, split, n=None):
    """[(ids, text, row)] of the greedy outputs for the first n rows of a split. Recorded tokens,
    each shown to be the likeliest one for that row's document; an output goes on to its
    end-of-text or its full length."""
    task, out = line.run.task, []
    notes = [x for x in of(line.notes, "write") if "scores" in x.inside]
    for tokens, lengths in (x.out for x in notes):
        for ids, length in zip(tokens.tolist(), lengths.tolist()):
            at, ids = len(out), ids[:length]
            table = log_softmax(net, pair_of(task, split, at)[0], task.start, ids, task.n_ids)
            assert (table.max(-1).values - table[torch.arange(length), ids] < 1e-4).all()
            assert task.eot not in ids[:-1] and (ids[-1] == task.eot or length == task.width)
            out.append((ids, said(task, ids), task.rows[split][at]))
    assert len(out) == (n or len(task.rows[split]))
    return out


def over_greedy(figure):
    """The mean of figure(ids, text, row) over greedy outputs: validation rows in the log,
    test rows at the end."""
    def value(line):
        net, n = line.policy, line.run.c.curve_size
        return mean(figure(*x)
                    for x in greedy_rows(line, net, *(("test",) if line.ended else ("validation", n))))
    return value


TEXT = {
    "rouge1": lambda ids, text, row: rouge(text, row["facts"])["rouge1"],
    "rouge2": lambda ids, text, row: rouge(text, row["facts"])["rouge2"],
    "rougeL": lambda ids, text, row: rouge(text, row["facts"])["rougeL"],
    "meteor": lambda ids, text, row: meteor(text, row["facts"]),
    "exact": lambda ids, text, row: float(text == row["facts"]),
    "wrong_facts": lambda ids, text, row: float(contradiction(text, row["facts"])),
}


def contradiction(text, facts):
    """Whether a first word of its kind is another one than the facts have."""
    for pool in WORDS.values():
        said, right = [next((w for w in x.split() if w in pool), None) for x in (text, facts)]
        if said and right and said != right:
            return True
    return False


def distances(line):
    """Token edits from sampled answers to the annotator's, a number a test prompt: of this
    line, and of the start."""
    task = line.run.task

    def of_line(x, begin):
        found = [n.out for n in of(x.notes, "write")
                 if "sampled" in n.inside and begin == ("begin" in n.inside)]
        ids = [row[:n] for tokens, length in found for row, n in zip(tokens.tolist(), length.tolist())]
        return [-worth(task, "test", i, row) for i, row in enumerate(ids)]
    begun = next(x for x in line.before if of(x.notes, "begin"))
    return of_line(line, False), of_line(begun, True)


EVAL = {
    "judge_queries": queries,
    "test_accuracy": lambda line: mean(judged(line.run.task, x, "test" if line.ended else "curve")[1]
                                       for x in sampled_prompts(line)),
    **{k: over_greedy(f) for k, f in TEXT.items()},
    "length": over_greedy(lambda ids, text, row: len(ids)),
    "ended": lambda line: over_greedy(lambda ids, text, row: float(ids[-1] == line.run.task.eot))(line),
    "win_rate": lambda line: mean(1.0 if now < first else 0.5 if now == first else 0.0
                                  for now, first in zip(*distances(line))),
    "edits_left": lambda line: mean(distances(line)[0]),
    "start_edits_left": lambda line: mean(distances(line)[1]),
}


def before_the_loop(key):
    """The same score of the policy that the warm start left: the `sft_` twins."""
    def value(line):
        begun = next(x for x in line.before if of(x.notes, "begin"))
        start = Entry(run=line.run, notes=begun.notes[begun.notes.index(of(begun.notes, "begin")[0]):])
        return mean(TEXT[key](*x)
                    for x in greedy_rows(start, of(begun.notes, "begin")[0].given["policy"], "test"))
    return value


def asks(line, which, names=("train", "dev", "test", "curve")):
    """The prompts of the one question at the end, about one of these sets, that `which` recognises."""
    found = [n.given["prompts"].tolist() for n in of(line.notes, "ask")
             if n.given["name"] in names and "contest" not in n.inside]
    found = [prompts for prompts in found if which(prompts)]
    assert len(found) == 1
    return found[0]


def cue_ids(task):
    return [task.tokenizer.encode(" " + w)[0] for w in task.world.attributes[task.cfg.attribute]["cues"]]


def with_cues(k):
    """Mean accuracy on the curve's texts of 64 prompts that hold k different cue words among others."""
    def value(line):
        task, cues = line.run.task, set(cue_ids(line.run.task))
        held = lambda prompt: [x for x in prompt if x in cues]
        prompts = asks(line,
                       lambda ps: len(ps) == 64 and all(len(held(p)) == len(set(held(p))) == k for p in ps))
        return mean(judged(task, x, "curve")[1] for x in prompts)
    return value


def best_of(task, prompts, chosen_on):
    """The prompt with the best E10 score on one set."""
    return max(prompts, key=lambda x: judged(task, x, chosen_on)[0])


def own_prompts(line):
    """What the policy offers at the end: the different greedy prompts of all looks at it, the latest first,
    and its 64 samples."""
    looked = [n for a in [*line.before, line] for n in of(a.notes, "write") if n.given.get("k") != 64]
    greedy = dict.fromkeys(tuple(n.out[0][0].tolist()) for n in reversed(looked))
    return [*map(list, greedy), *sampled_prompts(line)]


def uniform_prompts(line, n, name):
    """n prompts that a set is asked about at the end, neither the policy's nor made of cue words."""
    own, cues = own_prompts(line), set(cue_ids(line.run.task))
    strange = lambda prompts: not all(x in own for x in prompts) and not all(set(x) & cues for x in prompts)
    return asks(line, lambda prompts: len(prompts) == n and strange(prompts), [name])


def scored_prompts(line):
    """[prompt] of all that the run asked about, in order."""
    return [x for a in [*line.before, line] for n in of(a.notes, "prefer") if not a.ended
            for x in n.given["tokens"][0].tolist()]


def best_scored(line):
    """The different ones of them, by falling score on the few-shot set."""
    known = [list(x) for x in dict.fromkeys(map(tuple, scored_prompts(line)))]
    return sorted(known, key=lambda x: -judged(line.run.task, x, "train")[0])


def offered(line):
    """At most 65 different prompts: the greedy ones and samples, 33 together, then the best that were scored,
    then other samples."""
    own = own_prompts(line)
    return [list(x) for x in dict.fromkeys(map(tuple, [*own[:33], *best_scored(line), *own[33:]]))][:65]


def best_prompt(line):
    return best_of(line.run.task, offered(line), "dev")


def top3(line):
    """Mean test accuracy of the three different prompts that are best on dev."""
    known = sorted(map(list, set(map(tuple, offered(line)))))
    best = sorted(known, key=lambda x: -judged(line.run.task, x, "dev")[0])[:3]
    return mean(on_test(line, x) for x in best)


def on_test(line, prompt):
    return judged(line.run.task, prompt, "test")[1]


@functools.lru_cache(maxsize=16)
def searched(line, name):
    """[(prompt, few-shot texts read, score on them, queries)] of a search in the order of its questions:
    scores again from the texts, and no more questions than the run had."""
    notes = of(line.notes, "conducted")
    at = [x.given["search"].__name__ for x in notes].index(tasks.search.SEARCHES[name].__name__)
    texts, read, spent, rows = len(SETS["train"]), {}, 0, []
    inside = line.notes[line.notes.index(notes[at]) + 1:]
    end = next((i for i, x in enumerate(inside) if x.name == "conducted"), len(inside))
    for note in [x for x in inside[:end] if x.name == "ask" and "conducted" in x.inside]:
        some = note.given.get("texts")
        some = list(range(texts)) if some is None else some.tolist()
        for prompt in note.given["prompts"].tolist():
            known = read.setdefault(tuple(prompt), [])
            known += [i for i in some if i not in known]
            spent += len(some)
            rows.append((prompt, len(known), judged(line.run.task, prompt, "train", known)[0],
                         math.ceil(spent / texts)))
    assert rows[-1][3] <= queries(line) and (name == "halving" or len(rows) == queries(line))
    return rows


def records(line):
    """[rows as `searched` has them] of the run itself."""
    texts = len(SETS["train"])
    return [(x, texts, judged(line.run.task, x, "train")[0], i)
            for i, x in enumerate(scored_prompts(line), 1)]


def to_90(rows_of):
    """Queries at which the best prompt so far, of those that read most texts the best by score, has 0.9 on
    test."""
    def value(line):
        best = (0, -math.inf)
        for prompt, read, score, spent in rows_of(line):
            if (read, score) > best:
                best = (read, score)
                if on_test(line, prompt) >= 0.9 - 1e-9:
                    return spent
        return None
    return value


def search_accuracy(name):
    """Of its 65 best different prompts the best on dev, measured on test."""
    def value(line):
        order = sorted(searched(line, name), key=lambda row: (-row[1], -row[2]))
        known = [list(x) for x in dict.fromkeys(tuple(row[0]) for row in order)]
        return on_test(line, best_of(line.run.task, known[:65], "dev"))
    return value


def reference_prompt(line):
    """The best on dev of prompts made of nothing but cue words."""
    cues = set(cue_ids(line.run.task))
    return best_of(
        line.run.task, asks(line, lambda ps: len(ps) > 1 and all(set(x) <= cues for x in ps)), "dev")


def queries_to_90(line):
    """Judge queries at the first evaluation whose prompts averaged 0.9."""
    points = [x.row for x in line.before if x.phase == "eval"]
    return next((x["judge_queries"] for x in points if x["test_accuracy"] >= 0.9), None)


def final_groups(line):
    """What is ordered in the end: fresh candidates of the final policy, or the annotated answers of the test
    set."""
    if line.run.task.has_pairs:
        return annotated_pairs(line)
    if not line.run.task.pooled:
        inputs_are_held_out(line)
    return [group for groups in collected(line) for group in groups]


def final_rank_accuracy(line):
    """Over these; None where no reward was learned."""
    return share_right(line.run, line.reward, final_groups(line)) if learned(line.run) else None


def learned(run):
    """Whether a run has a fitted reward."""
    return run.c.objective != "mle" and (run.c.guidance != "bandit" or run.task.has_pairs)


def fit_warnings(line):
    """[(how a sentence begins, its numbers)] about a reward that learned nothing."""
    run, steps = line.run, [x.row["reward_fit_steps"] for x in line.before if "reward_fit_steps" in x.row]
    if run.c.reward_first + run.c.reward_steps * (len(steps) - 1) and sum(steps) == 0:
        return [("The reward was never fitted", [run.c.resolution])]
    groups = annotated_pairs(line) if run.task.has_pairs else examined(line)
    read_at = [r[t] for group in groups for context, ids, _, ends in group
               for r in [token_rewards(line.reward, context, run.task.start, ids)] for t in ends]
    if deviation(read_at) < 0.01:
        return [("The reward is constant", [deviation(read_at), 0.01])]
    groups = final_groups(line)  # rank_accuracy, the same number in both places
    right = share_right(run, line.reward, groups)
    if right is not None and right <= 0.55:
        pairs = pairs_in(run, groups)
        return [("The reward orders", [right, pairs, 0.5] if pairs >= 20 else [right, pairs])]
    return []


def pairs_in(run, groups):
    """Strictly ordered pairs."""
    worth = lambda q: round(q / run.c.resolution) if run.c.resolution else q
    return sum(right_pairs([0.0] * len(g), [worth(q) for _, _, q, _ in g])[1] for g in groups)


def warnings_of(line):
    """[(how a sentence begins, its numbers)] of all that a run warns about."""
    out = fit_warnings(line) if learned(line.run) else []
    if line.run.c.objective == "wmle":
        least = min(x.row["share"] for x in line.before if x.phase == "policy")
        out += [("The weights of wmle were flat", [least])] if least >= 0.999 else []
    return out


def check_warnings(said, line):
    """The sentences that were due and no other, their numbers by hand."""
    for sentence, (opening, numbers) in zip(said, warnings_of(line), strict=True):
        assert sentence.startswith(opening)
        found = [float(x) for x in re.findall(r"\d+(?:\.\d+)?(?:e[+-]\d+)?", sentence)]
        assert found == pytest.approx(numbers, abs=0.006)  # two decimals are printed


def annotated_pairs(line):
    """The worse and the better answer of every test row, from its text, worth 0 and 1."""
    run, task, groups = line.run, line.run.task, []
    first = SimpleNamespace(start_policy=run.start_policy)
    for i, row in enumerate(task.rows["test"]):
        context = pair_of(task, "test", i)[0]
        answers = [(task.tokenizer.encode(" " + row[k]) + [task.eot])[:task.width]
                   for k in ("rejected", "edited")]
        groups.append([(context, ids, q, segment_ends(run, first, context, ids))
                       for q, ids in enumerate(answers)])
    return groups


def longer_is_better(line):
    """Ordered pairs of test answers in which the longer one is the better one, equal lengths half."""
    pairs = [group for group in annotated_pairs(line)]
    right = [right_pairs([len(ids) for _, ids, _, _ in g], [q for _, _, q, _ in g]) for g in pairs]
    return sum(r for r, _ in right) / sum(n for _, n in right)


def tokens_of_test(line):
    """[(reward, place, is an error)] of the tokens of the worse test answers, end-of-text left out."""
    task, out = line.run.task, []
    for i, row in enumerate(task.rows["test"]):
        context, ids = pair_of(task, "test", i)
        rewards, at = paid_rewards(line.run.c, line.reward, context, task.start, ids), -1
        for place, token in enumerate(x for x in ids if x != task.eot):
            begin, at = at, at + len(task.tokenizer.decode([token]))
            wrong = any(begin < end and start < at for start, end, *_ in row["errors"])
            out.append((rewards[place], place, wrong))
    return out


def chance_lower(value):
    """How often an error's value is below another token's, over all pairs, a tie half."""
    def auroc(line):
        tokens = tokens_of_test(line)
        gaps = [value(b) - value(a) for a in tokens if a[2] for b in tokens if not b[2]]
        return mean(0.5 if abs(g) < 1e-6 else float(g > 0) for g in gaps)
    return auroc


def rank_correlation(x, y):
    """Spearman's, from ranks that are counted; None where one of the two is constant."""
    rank = lambda v: [sum(b < a for b in v) + (sum(b == a for b in v) + 1) / 2 for a in v]
    a, b = rank(x), rank(y)
    both = deviation(a) * deviation(b)
    return mean((p - mean(a)) * (q - mean(b)) for p, q in zip(a, b)) / both if both else None


def worth_of_places(task, prompt, fillings):
    """What each place of a prompt adds to E10 on dev, over all orders in which the places can come in, with
    the words of a filling where none has come in yet: a mean over orders and fillings."""
    once = functools.lru_cache(None)(lambda said: judged(task, list(said), "dev")[0])
    gains = [0.0] * len(prompt)
    orders = list(itertools.permutations(range(len(prompt))))
    for filling in fillings:
        for order in orders:
            said = list(filling)
            for place in order:
                before, said[place] = once(tuple(said)), prompt[place]
                gains[place] += (once(tuple(said)) - before) / len(orders) / len(fillings)
    return gains


def credit_truth(line):
    """Token rewards beside what is known of the tokens; null where an answer is paid as a whole."""
    run, task = line.run, line.run.task
    if run.c.guidance == "bandit":
        return None
    if task.kind == "edit":
        tokens = tokens_of_test(line)
        return rank_correlation([r for r, _, _ in tokens], [not wrong for _, _, wrong in tokens])
    cues, _, plain = judge.vocabulary(task.world, task.tokenizer)
    prompts = tasks.truth.mixed_prompts(task, cues[run.c.attribute], plain[plain < task.n_ids]).tolist()
    shape, draw = (4, len(prompts), task.width), torch.Generator().manual_seed(1)
    fillings, found = torch.randint(task.n_ids, shape, generator=draw).tolist(), []
    for i, prompt in enumerate(prompts):
        worths = worth_of_places(task, prompt, [x[i] for x in fillings])
        worths = [round(w / run.c.resolution) if run.c.resolution else w for w in worths]
        found.append(rank_correlation(paid_rewards(run.c, line.reward, [], task.start, prompt), worths))
    found = [x for x in found if x is not None]
    return mean(found) if found else None


def one_word_wrong(line):
    """[(gap of r at the one word that was replaced, gap of the mean reward)] of the test summaries, right
    minus wrong."""
    task = line.run.task
    for i, row in enumerate(task.rows["test"]):
        context, gaps = pair_of(task, "test", i)[0], []
        right, wrong = row["facts"], task.wrong_fact("test", i, row["facts"])
        (place, said), = [(k, b) for k, (a, b) in enumerate(zip(right.split(), wrong.split())) if a != b]
        assert said not in row["document"].split()
        found = [token_rewards(line.reward, context, task.start, task.tokenizer.encode(" " + x) + [task.eot])
                 for x in (right, wrong)]  # a word is a token here
        yield found[0][place] - found[1][place], mean(found[0]) - mean(found[1])


def won(which):
    """How often the right one has more, a tie half; None where no reward was learned."""
    def value(line):
        if not learned(line.run):
            return None
        gaps = [x[which] for x in one_word_wrong(line)]
        return mean(0.5 if abs(g) < 1e-6 else float(g > 0) for g in gaps)
    return value


def sizes(c, vocabulary):
    """Numbers in a transformer: tied embedding, then in each block two norms, attention and
    a feed-forward layer."""
    d = c.n_embd
    return vocabulary * d + c.n_layer * (2 * 2 * d + (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d)
                                         + (4 * d * d + d)) + 2 * d


SUMMARY = EVAL | {
    **{k: (lambda line, k=k: getattr(line.run.c, k))
       for k in ("task", "objective", "guidance", "agg", "seed")},
    "device": lambda line: "cpu",
    "params_policy": lambda line: sizes(line.run.c, line.run.task.tokenizer.size),
    "params_reward": lambda line: (sizes(line.run.c, line.run.task.tokenizer.size) + (
        0 if line.run.c.guidance == "implicit" else 256 * (line.run.c.n_embd + line.run.c.foreseen) + 513)),
    "rank_accuracy": final_rank_accuracy,
    "queries_to_90": queries_to_90,
    "dev_queries": lambda line: len(offered(line)),
    "best_prompt": lambda line: said(line.run.task, best_prompt(line)),
    "best_prompt_ids": best_prompt,
    "best_prompt_pieces": lambda line: shown(line.run.task, best_prompt(line),
                                             line.row["best_prompt_pieces"]),
    "best_prompt_accuracy": lambda line: on_test(line, best_prompt(line)),
    "top3_accuracy": top3,
    "random_accuracy": lambda line: mean(on_test(line, x) for x in uniform_prompts(line, 64, "test")),
    "best_queries_to_90": to_90(records),
    **{f"{x}_queries_to_90": to_90(lambda line, x=x: searched(line, x)) for x in tasks.search.SEARCHES},
    **{f"{x}_accuracy": search_accuracy(x) for x in tasks.search.SEARCHES if x != "random"},
    "random_search_accuracy": search_accuracy("random"),
    "accuracy_1_cue": with_cues(1), "accuracy_2_cues": with_cues(2),
    "reference_accuracy": lambda line: on_test(line, reference_prompt(line)),
    "chance": lambda line: 1 / len(line.run.task.world.attributes[line.run.c.attribute]["answers"]),
    **{f"sft_{k}": before_the_loop(k) for k in TEXT},
    "reference_length": lambda line: mean(len(pair_of(line.run.task, "test", i)[1])
                                          for i in range(len(line.run.task.rows["test"]))),
    "fact_auroc": won(0), "fact_accuracy": won(1),
    "length_rank_accuracy": longer_is_better,
    "token_auroc": chance_lower(lambda token: token[0]),
    "place_auroc": chance_lower(lambda token: -token[1]),
    "credit_truth": credit_truth,
    "error_share": lambda line: mean(float(wrong) for _, _, wrong in tokens_of_test(line)),
}


# ------------------------------------------------------------------------- the lines of warm starts and judge


def supervised(key):
    """The mean over references of a warm start's last update: every token weighs the
    same, end-of-text too."""
    def value(line):
        task = line.run.task
        index = of(line.notes, "text_batch" if task.kind == "prompt" else "batch")[-1].out.index.tolist()
        rows = [pair_of(task, "train", i) for i in index]
        if key != "nll":
            return 1.0  # weights of 1 / T: a sum of one a sequence, and all tokens count alike
        with torch.no_grad():
            model = of(line.notes, "read_candidates")[-1].given["model"]
            each = [log_softmax(model, context, task.start, ids, task.tokenizer.size)[
                        torch.arange(len(ids)), ids]
                    for context, ids in rows]
        return -torch.cat(each).mean().item()
    return value


WARM = {key: supervised(key) for key in ("nll", "weight", "share", "ess")}


@torch.no_grad()
def judge_loss(line):
    """Cross-entropy of the judge's last update, one "{text} {prompt}" at a time, at its last position."""
    given, note = of(line.notes, "train_judge")[0].given, of(line.notes, "forward")[-1]
    world, tok, net = given["world"], given["tokenizer"], note.given["self"]
    first = lambda word: tok.encode(" " + word)[0]
    answers = {a: [first(w) for w in x["answers"]] for a, x in world.attributes.items()}
    cues = {a: {first(w) for w in x["cues"]} for a, x in world.attributes.items()}
    habit = [1 + 0.1 * (len(x) - 1 - i) for x in answers.values() for i in range(len(x))]  # first ones more
    label_of = {tuple(tok.encode(" " + t)): (l, n) for t, l, n in zip(world.texts, world.labels, world.need)}
    losses = []
    for text, prompts in zip(cut_rows(*note.given["prefix"]), note.given["tokens"].tolist()):
        labels, need = label_of[tuple(text)]
        for start, *prompt in prompts:
            found = {a: len(ids & set(prompt)) for a, ids in cues.items()}  # different cue words
            asked = [a for a in found if 2 * found[a] - sum(found.values()) >= need.get(a, 1)]
            target = [h / sum(habit) for h in habit]
            if asked:
                right = asked[0], labels[asked[0]]
                said = [float((a, i) == right) for a, x in answers.items() for i in range(len(x))]
                target = [0.9 * x + 0.1 * y for x, y in zip(said, target)]
            at_end = net.eval()(torch.tensor([text + [start] + prompt]))[0, -1]
            logp = (net.wte.weight[sum(answers.values(), [])] @ at_end).log_softmax(0).tolist()
            losses.append(-sum(p * x for p, x in zip(target, logp)))
    return mean(losses)


# The tables: {phase: {key: function of a line}}; PPO stands in for "policy" where that is the objective.
METRICS = {"reward": REWARD, "policy": POLICY, "ppo": PPO, "eval": EVAL, "sft": WARM, "warmup": WARM,
           "judge": {"loss": judge_loss}}

# --------------------------------------------------------------------------------------------------- the runs

PROMPT = ("--task prompt --prompt_length 3 --shots 2 --candidates 8 --K 3 --curve_size 10 "
          "--reward_warmup 3 --batch_size 6")
SUMMARIES = ("--task summarize --sft_steps 60 --sft_lr 0.02 --sft_batch 8 --max_document 30 --max_summary 12 "
             "--candidates 4 --batch_size 4 --curve_size 5")
EDITS = ("--task edits --sft_steps 40 --sft_lr 0.02 --sft_batch 8 --max_document 20 --max_summary 16 "
         "--batch_size 6 --minibatches 2 --reward_first 12")
RUNS = {
    **{f"prompt {x}": f"{PROMPT} {x}" for x in (
        "--agg sum --alpha 0.3 --candidates 40 --world_names 50",
        "--agg max --objective ppo --kl 0.2 --minibatches 2 --epochs 2 --ppo_clip 0.02 "
        "--judge_steps 3 --judge_read 3 --judge_layers 1 --judge_width 16",
        "--guidance bandit --alpha 0.2 --resolution 50",
        "--objective ppo --guidance bandit --minibatches 2",
        "--no-pool --K 2 --agg sum --guidance red")},
    **{f"summarize {x}": f"{SUMMARIES} {x}" for x in (
        "--agg avg --weights both --wmle_norm length",
        "--agg min --weights immediate --wmle_norm rewards", "--objective mle",
        "--agg sum --objective reinforce --weights to_go --alpha 0.2", "--objective ppo --minibatches 2",
        "--objective reinforce --guidance bandit --group_size 2 --baseline rloo", "--reward_lr 0",
        "--resolution 1000")},
    **{f"edits {x}": f"{EDITS} --guidance {x}"
       for x in ("edits", "token --returns min", "segment --segment_entropy 2.0", "bandit",
                 "red --reward_first 11", "implicit --agg sum")},
}


def stub_judge(tape, *args):
    """`StubJudge`, where --judge_steps says so after a real one was trained, for its line of figures."""
    if "judge_steps" in tape.flags:
        with pytest.MonkeyPatch.context() as patch:
            tape.patch, outside = patch, tape.patch
            tape.note(judge, "train_judge"), tape.note(judge.Transformer, "forward")
            judge.load_judge(*args)
            tape.patch = outside
    return StubJudge(), "a stub"


def record(monkeypatch, folder, flags):
    """A whole run on a small world -> its lines, the last one summary.json's, and the
    rows of samples.jsonl."""
    monkeypatch.setattr(tasks.prompt, "embedded_world", lambda **sizes: WORLD(200))
    monkeypatch.setattr(tasks.summarize, "embedded_world", lambda seed: SUMMARY_WORLD(seed, 24, 7, 8))
    monkeypatch.setattr(tasks.edits, "embedded_world", lambda seed, answers: EDITS_WORLD(seed, 24, 12))
    build = train.Run.__init__

    def loud(run, *args):  # a fresh reward is so nearly constant that rounding would order the candidates
        build(run, *args)
        times = 200 if run.c.reward_lr else 40  # one that learns nothing is to be called constant
        with torch.no_grad():
            for layer in getattr(run.reward, "mlp", ())[::2]:  # DPO's policy has no head
                layer.weight.mul_(times)
    monkeypatch.setattr(train.Run, "__init__", loud)
    tape = Tape(monkeypatch, flags)
    monkeypatch.setattr(tasks.prompt, "load_judge", lambda *args: stub_judge(tape, *args))
    monkeypatch.setattr(tasks.prompt.PromptTask, "kept", lambda task: {})  # a stub has no weights
    for owner, names in ((guidance, "ranking_loss label_loss implicit_loss"), (objective, "policy_batch"),
                         (train, "collect"), (evaluate, "collect"),
                         (objective, "ppo_update learn_from_rollout"),
                         (warm_start, "read_candidates"), (rollout, "sample"), (tasks.prompt, "write"),
                         (tasks, "write"), (tasks.edits.EditsTask, "begin sampled batch samples pick"),
                         (tasks.search, "conducted"), (tasks.prompt, "contest draw_sets"),
                         (tasks.prompt.PromptTask, "batch text_batch prefer ask samples"),
                         (tasks.summarize.SummarizeTask, "begin scores batch samples")):
        for name in names.split():
            tape.note(owner, name, *NETS.get(name, ()))
    summary, rows, out = trained(folder, NET, flags)
    for line, row in zip(tape.lines, rows, strict=True):
        line.row = {k: v for k, v in row.items() if k not in ("step", "phase")}
    tape.close("summary", None, summary, ended=True)
    SETS.update(next((n.out for x in tape.lines for n in of(x.notes, "draw_sets")), {}))
    return tape.lines, [json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()]


WORLD, SUMMARY_WORLD, EDITS_WORLD = (x.embedded_world for x in (tasks.prompt, tasks.summarize, tasks.edits))
NETS = {"collect": ["reward"], "policy_batch": ["policy", "reward", "start_policy"],
        "ppo_update": ["policy", "value"],
        "learn_from_rollout": ["policy", "start_policy", "value", "reward", "normalizer"]}


def table_of(line):
    if line.ended:
        return SUMMARY
    return PPO if line.phase == "policy" and line.run.c.objective == "ppo" else METRICS[line.phase]


def check_line(line, where):
    """Every figure of a line equals the one computed by hand; a figure that no table knows fails."""
    for key, value in line.row.items():
        if key == "seconds":
            continue
        if key == "warnings":
            check_warnings(value, line)
            continue
        assert key in table_of(line), (
            f"{where}: {key} is new: say in tests/test_figures.py how to compute it by hand")
        expected = table_of(line)[key](line)
        assert value == (expected if expected is None or isinstance(expected, (str, list)) else
                         pytest.approx(expected, rel=2e-3, abs=2e-4)), f"{where}: {key}"


def shown(task, ids, pieces):
    """One string a token. Half a character (a byte that a wild policy says) is taken as it stands,
    and what follows it."""
    plain = [True] + [task.tokenizer.bytes_of[i].isascii() for i in ids]
    words = [task.tokenizer.decode([i]) if i != task.eot else "<eot>" for i in ids]
    return [word if all(plain[i:i + 2]) else piece for i, (word, piece) in enumerate(zip(words, pieces))]


def log_ratio(line, context, ids):
    """log pi - log pi_start of each token, in nats."""
    at, n_ids = torch.arange(len(ids)), line.run.task.n_ids
    logp = lambda net: log_softmax(net, context, line.run.task.start, ids, n_ids)[at, ids]
    return (logp(line.policy) - logp(line.run.start_policy)).tolist()


def sample_scores(line, found, b, context):
    """E3, E4 of the siblings of sample b, their rewards read where the guidance reads them."""
    c, rewards, read_at = line.run.c, [], []
    for k in range(found.tokens.shape[1]):
        ids = real_tokens(found.tokens[b, k], found.mask[b, k])
        ends = segment_ends(line.run, line.run, context, ids)
        rewards.append(torch.tensor(token_rewards(line.reward, context, line.run.task.start, ids)).double())
        read_at.append([t in ends for t in range(len(ids))])
    return aggregate_by_loop(rewards, read_at, c.agg, c.beta).tolist()


def check_samples(line, rows):
    """The lines of samples.jsonl of one evaluation: every row's tokens, and the rewards that
    belong to those tokens."""
    task, found = line.run.task, of(line.notes, "samples")[0].out
    places = [(b, k) for b in range(len(found.roles)) for k in range(len(found.roles[b]))]
    # further kinds are the task's own: tests/test_tasks.py
    rows = [row for row in rows if row["kind"] == task.kind]
    assert len(rows) == len(places) > 0
    split = {"summary": "train", "edit": "test"}.get(task.kind)
    for (b, k), row in zip(places, rows):
        mask = found.mask[b, k]
        ids = real_tokens(found.tokens[b, k], mask)
        source = task.rows[split][b] if split else {}
        context = pair_of(task, split, b)[0] if split else []
        # their numbers: tests/test_tables.py
        assert row["weights"] is None or len(row["weights"]) == len(ids)
        by_hand = {"step": lambda: line.step, "kind": lambda: task.kind, "text": lambda: said(task, ids),
                   "tokens": lambda: shown(task, ids, row["tokens"]),
                   "rewards": lambda: pytest.approx(
                       paid_rewards(line.run.c, line.reward, context, task.start, ids), abs=2e-4),
                   "preference": lambda: pytest.approx(worth(task, "samples", b, ids), abs=2e-4),
                   "group": lambda: str(b), "role": lambda: found.roles[b][k],
                   "weights": lambda: row["weights"],
                   "errors": lambda: None if found.errors is None else found.errors[b, k][mask].tolist(),
                   "log_ratio": lambda: pytest.approx(log_ratio(line, context, ids), abs=3e-4),
                   "score": lambda: pytest.approx(sample_scores(line, found, b, context)[k], abs=2e-3),
                   "context": lambda: source.get("document", source.get("prompt", "")),
                   "reference": lambda: source.get("facts", source.get("edited", ""))}
        assert {k: v if k != "text" else v.strip() for k, v in row.items()} == {k: by_hand[k]() for k in row}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all runs: the lines of a warm start are those of the first run that wants it."""
    return tmp_path_factory.mktemp("figures")


@pytest.mark.parametrize("name", RUNS)
def test_every_figure_of_a_run_by_hand(name, monkeypatch, folder):
    lines, samples = record(monkeypatch, folder, RUNS[name])
    for line in lines:
        check_line(line, f"{line.phase} {line.step}")
        if line.phase == "eval":
            check_samples(line, [row for row in samples if row["step"] == line.step])
    assert [x.row["seconds"] for x in lines] == sorted(x.row["seconds"] for x in lines)


def test_queries_to_90_are_those_of_the_first_evaluation_at_nine_tenths(monkeypatch):
    task = object.__new__(tasks.prompt.PromptTask)  # no judge, no sets: `ask` says what the prompts reach
    task.queries, task.queries_to_90, task.start, task.width, task.n_ids = 0, None, 0, 3, 5
    task.greedy = []
    task.cfg = SimpleNamespace(top_k=0)
    monkeypatch.setattr(tasks.prompt, "write", lambda *x, **kw: (torch.zeros(64, 3, dtype=torch.long), None))
    for accuracy in (0.05, 0.5, 0.89, 0.91, 0.7, 0.95):
        task.queries += 10
        monkeypatch.setattr(task, "ask", lambda prompts, name: (None, torch.full((64,), accuracy)),
                            raising=False)
        assert task.evaluate(None, None)["test_accuracy"] == pytest.approx(accuracy)
    assert task.queries_to_90 == 40
