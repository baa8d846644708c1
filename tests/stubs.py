"""A world of two words and a net that is a table, so that every number of the loop can be computed on paper.

Ids: A, B and END,
which also opens every sequence. `Table` stands in for the Transformer: its state after token
x behind a context is table[x] + the sum of sway over the context, and its head is the identity,
so a state IS a
row of logits. `World` stands in for a task. `stub_run` makes a real state.Run of both: all that is stubbed is
the net and the task.
"""
import copy
import functools
import json
import math
from types import SimpleNamespace

import torch

import state
import tasks.edits
import tasks.prompt
import tasks.summarize
import train
from data import Batch, pad
from model import Cache
from reward import fit
from rollout import collect, inputs, rollout
from support.flags import parse_flags
from support.log import Log
from tasks import Samples, Task, reports, requests, worlds

A, B, END = 0, 1, 2
# Rows: logits after A, after B, after END (the start). Answers are short, and nearly all end by themselves.
POLICY = ((0.0, 0.5, 0.6), (-0.5, 0.1, 1.2), (1.0, 0.5, -1.5))
START = ((0.3, 0.2, 0.4), (0.1, -0.4, 1.0), (0.4, 0.9, -1.0))  # where PPO's policy began
SWAY = ((0.2, -0.2, 0.0), (-0.3, 0.1, 0.1), (0.0, 0.0, 0.0))   # what a context's token adds
REWARD = (-1.5, 2.0, 0.4)  # the reward net's logit of A, B and END
ROWS = [[A], [B], [A, B], [B, B, A]] * 2                        # contexts, and beside them the references
REFERENCES = [[A, B, END], [B, END], [B, B, A, END], [A, END]] * 2


class Table(torch.nn.Module):
    """The part of model.Transformer that the loop uses. In place of dropout states shrink by that share in
    training: what is done in the wrong mode is then wrong by a known factor and not by luck."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = torch.nn.Parameter(torch.zeros(config.vocab_size, config.n_embd))
        self.register_buffer("sway", torch.tensor(SWAY))
        self.register_buffer("head", torch.eye(config.vocab_size))

    def _state(self, tokens, away):
        x = self.table[tokens] + away
        return x * (1 - self.config.dropout) if self.training else x

    def _away(self, prefix):
        tokens, mask = prefix
        return (self.sway[tokens] * mask[..., None]).sum(1)  # (B, D)

    def forward(self, tokens, prefix=None, last=False):
        away = 0.0 if prefix is None else self._away(prefix).view(len(tokens), *[1] * (tokens.dim() - 1), -1)
        return self._state(tokens, away)

    def prefill(self, tokens, mask):
        return Cache([self._away((tokens, mask))[:, None, None]], [], mask, mask.sum(1))

    def decode(self, tokens, cache, column):
        return self._state(tokens[:, -1], cache.keys[0][:, 0, 0])

    def _check_width(self, width):
        assert width <= self.config.n_ctx


class World(Task):
    """A task: B is worth 1, A costs 1/2, and no two candidates are liked equally: each is worth 1/1000 more
    than the one that was asked about before it."""
    kind = "stub"

    def __init__(self, pooled=False, has_pairs=False, width=16, rows=8, answers=40, kinds=3):
        self.pooled, self.has_pairs, self.width = pooled, has_pairs, width
        # as in the real tasks: a prompt has none, and no warm start of its policy
        self.has_references = not pooled
        self.answers, self.kinds = answers, kinds
        self.eot, self.n_ids = (None, 2) if pooled else (END, 3)
        self.start, self.context, self.queries = END, 32, 0
        decode = lambda ids: "".join("ab."[i] for i in ids)
        self.tokenizer = SimpleNamespace(size=3, eot=END, ranks=[b"a", b"b"], name="stub", decode=decode,
                                         pieces=lambda ids: list(decode(ids)), state=lambda: {"stub": True})
        self.rows = {"train": list(range(rows))}
        self.inputs = Batch(torch.arange(rows), *pad(ROWS[:rows], 3), *pad(REFERENCES[:rows], width))

    def batch(self, n, generator):
        if self.pooled:
            return Batch(torch.zeros(1, dtype=torch.long))
        return self.pick("train", torch.randint(len(self.inputs.index), (n,), generator=generator))

    def pick(self, split, index):
        return self.inputs.at(index, "cpu")

    def text_batch(self, n, generator):
        i = torch.randint(len(self.inputs.index), (n,), generator=generator)
        return Batch(i, reference=self.inputs.reference[i], reference_mask=self.inputs.reference_mask[i])

    def prefer(self, batch, tokens, mask):
        first, self.queries = self.queries, self.queries + mask.shape[:2].numel()
        return self.worth(tokens, mask) + 0.001 * torch.arange(first, self.queries).view(mask.shape[:2])

    def worth(self, tokens, mask):
        return torch.where(mask, torch.tensor((-0.5, 1.0, 0.0))[tokens], 0.0).sum(-1)

    def pairs(self, split):
        """Row n: up to `kinds` words A and END against the same with B for the last A; that A is labelled -1,
        that B +1. Preferences tell rows apart."""
        same = [[A] * (n % self.kinds) for n in range(self.answers)]
        rows = [(x + [A, END], x + [B, END]) for x in same]
        tokens, mask = pad([x for row in rows for x in row], 4)
        labels = [[-1 if (k, t) == (0, len(x) - 2) else int((k, t) == (1, len(x) - 2)) for t in range(4)]
                  for row in rows for k, x in enumerate(row)]
        at = torch.arange(len(rows))
        preference = torch.stack((at, at + 0.5), 1).float()
        x = self.pick(split, at % len(self.rows["train"]))
        shape = lambda x: x.view(len(rows), 2, -1)
        return shape(tokens), shape(mask), preference, x.context, x.context_mask, shape(torch.tensor(labels))

    def evaluate(self, policy, generator):
        return {"draw": torch.rand((), generator=generator).item(), "training": policy.training}

    def samples(self, policy, generator):
        x = self.pick("train", torch.arange(2))
        tokens, mask = x.reference[:, None], x.reference_mask[:, None]
        return Samples(x, tokens, mask, self.worth(tokens, mask), [["reference"]] * 2)

    def describe(self, batch, row):
        return f"context {row}", f"reference {row}"

    def finish(self, policy, generator):
        return {"figure": 7.0, "training": policy.training}

    def judge_reward(self, guide):
        return {"reward_of_b": guide(torch.tensor([[[B]]]))[0, 0, 0].item()}

    def fingerprint(self):
        return {"rows": "stub"}

    def state(self):
        return {"queries": self.queries}

    def load_state(self, s):
        self.queries = s["queries"]


def small_worlds(patch):
    """A part of the rows of the embedded worlds, for runs in which nothing is learned: with few steps most
    of their time goes into rows."""
    rows = functools.partial
    patch.setattr(tasks.prompt, "embedded_world", rows(worlds.embedded_world, 1500))
    patch.setattr(tasks.summarize, "embedded_world",
                  rows(reports.embedded_world, n_train=600, n_validation=30, n_test=30))
    patch.setattr(tasks.edits, "embedded_world", rows(requests.embedded_world, n_train=400, n_test=40))


def trained(folder, *typed):
    """A whole run of train.py, one small block and one thread, in `folder`/run* -> summary.json, the lines of
    metrics.jsonl and the run's own folder. Warm starts are kept in `folder`/cache."""
    out = folder / f"run{len(list(folder.glob('run*')))}"
    base = "--threads 1 --device cpu --dtype float32 --n_layer 1 --n_head 2".split()
    assert train.main([*base, *" ".join(typed).split(), "--cache_dir", str(folder / "cache"),
                       "--out_dir", str(out)]) == 0
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text()), lines, out


def flags(*typed):
    """Flags as train.py parses them, with the sizes of the stub."""
    c, _ = parse_flags(train.Flags, [str(x) for x in typed], train.__doc__)
    c.n_embd, c.n_layer, c.n_head = 3, 1, 1  # below what the command line takes
    return c


def stub_run(monkeypatch, tmp_path, typed="", pooled=False, pairs=False, step=0, plain=False, **world):
    """A Run on the stub world, its tables filled in.
    plain: SGD in place of Adam, so that an update is lr x gradient."""
    monkeypatch.setattr(state, "Transformer", Table)
    task = "prompt" if pooled else "edits" if pairs else "summarize"
    base = ["--task", task, "--out_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--sft_steps",
            0, "--reward_warmup", 0, "--resolution", 0, "--clip", 1e9, "--hold", 0, "--no-foreseen"]
    c = flags(*base, *typed.split())
    c.guidance = c.guidance or "edits"  # what the task of such pairs decides
    task = World(pooled, pairs, **({"width": 4} if pooled else {}) | world)
    r = state.Run(c, task, train.objective_of(c), torch.device("cpu"), torch.float32, Log())
    fill(r.start_policy, START)
    fill(r.policy, POLICY)
    if hasattr(r.reward, "mlp"):
        fill_reward(r.reward)
    else:  # a policy beside its start
        for net in r.reward.bodies:
            fill(net, START)
    if r.value is not None:
        r.value.weight.data = torch.tensor([[0.3, -0.2, 0.5]])
        r.value.bias.data = torch.tensor([0.1])
    r.step, r.latest = step, None

    def noted(run, *args):
        run.latest = collect(run, *args)
        return run.latest
    monkeypatch.setattr(train, "collect", noted)  # so that tests see what a round has asked about
    if plain:
        r.policy_optimizer = without_adam(r.policy_optimizer)
        r.reward_optimizer = without_adam(r.reward_optimizer)
    return r


def fit_reward(r, steps, loss=None):
    """Some steps of the fit on what the buffers of a run hold, as train.py calls it; `loss` in
    place of the ranking."""
    settings = r.fit_settings(steps)
    if loss is not None:
        settings.loss = loss
    return fit(r.reward, r.reward_optimizer, (r.fitted, r.held_out), settings)


def without_adam(optimizer):
    """SGD of the same groups and rate."""
    groups = [{k: v for k, v in g.items() if k in ("params", "times")} for g in optimizer.param_groups]
    return torch.optim.SGD(groups, lr=optimizer.param_groups[0]["lr"])


def fill(net, rows):
    with torch.no_grad():
        net.table.copy_(torch.tensor(rows))


def fill_reward(reward, logits=REWARD):
    """A reward whose logit is a look-up of the token: one-hot states, the first three units copy them."""
    with torch.no_grad():
        fill(reward.body, torch.eye(3).tolist())
        reward.body.sway.zero_()
        first, last = reward.mlp[0], reward.mlp[2]
        first.weight.zero_(), first.weight[:3, :3].copy_(torch.eye(3))  # --foreseen: a column more
        last.weight.zero_(), last.weight[0, :3].copy_(torch.tensor(logits))
        first.bias.zero_(), last.bias.zero_()


def peek(r, look):
    """What `look(run)` returns, with every generator, counter and mode put back: the same happens again."""
    kept, task = [g.get_state() for g in r.generators.values()], copy.deepcopy(r.task.state())
    mode = r.policy.training
    found = look(r)
    for g, s in zip(r.generators.values(), kept):
        g.set_state(s)
    r.task.load_state(task)
    r.policy.train(mode)
    return found


def asked_about(r):
    """The candidates of one round, with what the run was told of them."""
    return collect(r, inputs(r, 0))


def rolled(r):
    """A rollout: batch, tokens, mask (B, K, T)."""
    return rollout(r)[:3]


# ------------------------------------------------------------------------------- the same on paper, in floats


def bound(x):
    """E2's softplus form."""
    soft = lambda x: math.log1p(math.exp(x))
    return 1e-8 + soft(1 - soft(1 - x) - 1e-8)


def sequences(tokens, mask, context=None, context_mask=None):
    """Tensors (N, T) -> [(context ids, token ids)]: what follows needs no tensor."""
    cut = lambda x, m: [row[keep].tolist() for row, keep in zip(x, m)]
    contexts = [[]] * len(tokens) if context is None else cut(context, context_mask)
    return list(zip(contexts, cut(tokens, mask)))


def rows_of(x, tokens=None, mask=None):
    """Sequences of Candidates, or of a batch with its tokens and mask (B, K, T): K side by side."""
    tokens, mask = (x.tokens, x.mask) if tokens is None else (tokens, mask)
    again = lambda t: None if t is None else t.repeat_interleave(tokens.shape[1], 0)
    return sequences(tokens.flatten(0, 1), mask.flatten(0, 1), again(x.context), again(x.context_mask))


def table_of(net):
    """The table of a Table, as lists."""
    return net.table.detach().tolist()


def logits(table, context, token, n_ids=3):
    """The state that has just read `token`."""
    return [table[token][j] + sum(SWAY[c][j] for c in context) for j in range(n_ids)]


def log_softmax(z):
    total = math.log(sum(math.exp(x) for x in z))
    return [x - total for x in z]


def entropy(z):
    return -sum(math.exp(x) * x for x in log_softmax(z))


def log_probs(table, context, ids, n_ids=3):
    """log pi of each token: the state before it predicts it, and END opens the sequence."""
    return [log_softmax(logits(table, context, before, n_ids))[y] for before, y in zip([END] + ids, ids)]


def value_of(weight, bias, table, context, ids):
    """V at each token, read off the state that predicts it."""
    read = lambda state: sum(w * x for w, x in zip(weight, state)) + bias
    return [read(logits(table, context, before)) for before in [END] + ids[:-1]]


def loss_and_gradient(table, rows, a, b, n_ids=3):
    """- sum_n (a_n log pi(y_n) + b_n H_n) and its gradient for the table; a, b: a list a sequence."""
    loss, grad = 0.0, [[0.0] * 3 for _ in range(3)]
    for (context, ids), some_a, some_b in zip(rows, a, b):
        for before, y, an, bn in zip([END] + ids, ids, some_a, some_b):
            z = logits(table, context, before, n_ids)
            log_p, h = log_softmax(z), entropy(z)
            loss -= an * log_p[y] + bn * h
            for j in range(n_ids):
                p = math.exp(log_p[j])
                grad[before][j] += an * (p - (j == y)) + bn * p * (log_p[j] + h)
    return loss, grad


def norm_of(*grads):
    """Euclidean norm of nested lists of numbers."""
    flat = lambda x: [x] if isinstance(x, float) else [z for y in x for z in flat(y)]
    return math.sqrt(sum(x * x for x in flat(list(grads))))


def clipped(norm, most):
    """What a gradient of this norm is multiplied with."""
    return min(1.0, most / norm)


def down(table, grad, lr):
    """One plain gradient step."""
    return [[w - lr * g for w, g in zip(*rows)] for rows in zip(table, grad)]


def mean(x):
    x = list(x)
    return sum(x) / len(x)


def deviation(x):
    m = mean(x)
    return math.sqrt(mean((y - m) ** 2 for y in x))


def z_scores(x):
    """What bandit guidance pays: deviations from the mean in units of the (unbiased) standard deviation."""
    std = deviation(x) * math.sqrt(len(x) / (len(x) - 1))
    return [(y - mean(x)) / std for y in x]


def rank_loss(scores, preference):
    """E5 of one group without ties: pick the best of all, then the best of the rest, ..."""
    order = sorted(range(len(scores)), key=lambda i: -preference[i])
    left = lambda i: sum(math.exp(scores[j]) for j in order[i:])
    return sum(math.log(left(i)) - scores[order[i]] for i in range(len(order)))


def accuracy_by_hand(groups, preference, table, score=mean):
    """Share of pairs that the mean reward (or another `score`) orders as the preference does, ties half."""
    right, pairs = 0.0, 0
    for members, liked in zip(groups, preference):
        scores = [score(bound(table[y]) for y in ids) for ids in members]
        for i, a in enumerate(liked):
            for j, b in enumerate(liked):
                if a > b:
                    gap = scores[i] - scores[j]
                    right, pairs = right + (0.5 if abs(gap) < 1e-6 else float(gap > 0)), pairs + 1
    return right / pairs
