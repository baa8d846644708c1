"""How the policy uses the reward: one update by a loss with a weight a token, or PPO's.

An `Objective` says where tokens come from and what a step is; train.py has the table of all. `by_loss` makes
a step of a loss function (policy_reinforce.py, policy_wmle.py): tokens, their rewards as constants, their
weights, one gradient. `ppo_step` is PPO's, a rollout and its minibatches; the formulas are in policy_ppo.py.
"""
import inspect
from dataclasses import dataclass
from typing import Callable

import torch

from data import trim
from guidance import guidance_of
from model import read_candidates
from policy_ppo import (check_start, check_step, credited, experience, ppo_loss, step_rewards, token_weights,
                        value_loss)
from policy_reinforce import standardize
from rollout import (alike, answer_ends, answer_scores, asked, beside_start, dense_rewards, fines,
                     first_rewards, guide_of, predicted, rollout, sequences)

SOURCES = ("samples", "references")


@dataclass(frozen=True)
class Objective:
    """How the policy uses the reward: a line of train.OBJECTIVES.

    source    where its tokens come from: "samples" of the policy, or the task's "references"
    step      run -> {figure: value}, one update of the policy; `by_loss` makes one of a loss function
    weigh     (rewards, mask, c) -> weights, all (B, K, T): what `by_loss` multiplies the log-probs with
    shown     (run, samples, rewards) -> (B, K, T): what samples.jsonl shows as the weight of each token;
              None: `weigh` of the shown sequences, and nothing where there is none
    near      True for one that pays --kl for leaving the starting policy, as `near_start` says
    first     (hidden (D,), head (V, D), rewards (V,)) -> its loss at a place where all sequences are in one
              state, without a sample (--exact_first); None: samples alone
    rewarded  False for an objective that reads no reward: then none is fitted
    critic    True for one with a value net and the rewards' normaliser (E13)

    Raises ValueError where a part is missing, when the table is made: before anything is trained.
    """
    source: str
    step: Callable
    weigh: Callable = None
    shown: Callable = None
    near: bool = False
    first: Callable = None
    rewarded: bool = True
    critic: bool = False

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"source: expected one of {', '.join(SOURCES)}, got {self.source!r}")
        for name, must in (("step", True), ("weigh", False), ("shown", False), ("first", False)):
            part = getattr(self, name)
            if not (callable(part) or part is None and not must):
                raise ValueError(f"{name}: expected a function, got {part!r}")
        try:
            inspect.signature(self.step).bind("run")
        except TypeError as wrong:  # most likely a loss as it is
            raise ValueError(f"step: expected a function of a run (by_loss makes one): {wrong}") from wrong


# ------------------------------------------------------------------------------------- one gradient a step


def policy_batch(run):
    """Tokens to learn from with their rewards, before `weigh`: (batch, tokens, mask, rewards), (B, K, T).

    Without a learned reward that is 1 at every token of a reference, or what the run is told of its very
    samples, beside one another (--baseline), at every token of each (bandit guidance). A learned score an
    answer pays its tokens likewise.
    """
    c, task = run.c, run.task
    if run.objective.source == "references":
        batch = task.batch(c.batch_size, run.generators["data"])
        tokens, mask = trim(batch.reference[:, None], batch.reference_mask[:, None])  # (B, 1, T)
        if not run.learns_reward:
            return batch, tokens, mask, mask.float()
    else:
        batch, tokens, mask = rollout(run)
        if not run.learns_reward:
            return batch, tokens, mask, alike(run, asked(run, batch, tokens, mask), mask)
    with run.autocast():
        rewards = guide_of(run)(tokens, batch.prefix(), mask)
    if guidance_of(c).whole:
        ends = answer_ends(run, tokens, mask, batch.prefix())
        rewards = alike(run, answer_scores(rewards, ends), mask)
    return batch, tokens, mask, rewards


def weighed(run, rewards, mask):
    """Rewards of tokens as the objective weighs them, (B, K, T); one number an answer stays as it is."""
    tokens_differ = run.learns_reward and not guidance_of(run.c).whole
    return run.objective.weigh(rewards, mask, run.c) if tokens_differ and run.objective.weigh else rewards


def first_place(run, rewards, mask, weights):
    """Weights (B, K, T) of sampled tokens and None, or, with --exact_first, no weight at the first place and
    that of every word there (V,), on the scale of the batch's rewards."""
    if not run.exact_first:
        return weights, None
    every = first_rewards(run)
    every = standardize(rewards, mask, others=every) if run.c.center else every
    weights = weights.clone()
    weights[..., 0] = 0.0
    return weights, every


@torch.no_grad()
def near_start(run, batch, tokens, mask, rewards):
    """E14 without PPO: tokens, mask, rewards (B, K, T) -> rewards minus --kl a nat away from the starting
    policy, and {"kl"}, the mean of log pi - log pi_start for the log."""
    now, start = beside_start(run, batch, tokens, mask)
    mask = mask.flatten(0, 1)  # (N, T), N = B K
    paid = step_rewards(rewards.flatten(0, 1), now, start, mask, run.c.kl)
    return paid.view_as(rewards), {"kl": (token_weights(mask) * (now - start)).sum()}


def by_loss(loss_of):
    """A step of an objective from its loss: run -> figures of one update, with the reward as a constant.

    loss_of  (hidden (n, T, D), head (V, D), tokens, mask, weights (N, T), c, share, rows) -> loss, {figure:
             0-dim tensor}; share: of --alpha, `warmth`; rows: which n of the N sequences `hidden` has. What
             it returns is the part of these rows, with the divisors of all N
    """
    def step(run):
        c, task = run.c, run.task
        batch, tokens, mask, rewards = policy_batch(run)
        rewards, away = near_start(run, batch, tokens, mask, rewards) if run.stays_near else (rewards, {})
        weights, first = first_place(run, rewards, mask, weighed(run, rewards, mask))
        prefix = batch.prefix()
        k = 1 if prefix is None else tokens.shape[1]  # read together, behind their prefix
        flat = [x.flatten(0, 1) for x in (tokens, mask, weights)]  # (N, T), N = B K

        def loss_of_some(groups):
            """The share of some groups of k."""
            rows, behind = slice(groups.start * k, groups.stop * k), prefix and [x[groups] for x in prefix]
            some = flat[0][rows].unflatten(0, (-1, k))  # (b, k, T)
            with run.autocast():
                predict, _ = read_candidates(run.policy, some, task.start, behind)  # (b, k, T, D)
                predict, head = predict.flatten(0, 1), run.policy.head[:task.n_ids]
                loss, stats = loss_of(predict, head, *flat, c, warmth(run), rows)
                if first is not None:  # divisor: valid tokens of the batch, one of each sequence is here
                    of_batch = len(predict) / flat[1].sum()
                    loss = loss + of_batch * run.objective.first(predict[0, 0], head, first)
            return loss, {"loss": loss, **stats}
        run.policy.train()
        return run.update(run.policy, run.policy_optimizer, loss_of_some, len(flat[0]) // k,
                          c.lr * settling(run), k=k) | away
    return step


def settling(run):
    """Share of --lr at this update: 1 for --hold updates, then down to 0 over as many again. A count of its
    own and not a share of --policy_steps, so that a run resumed for longer is the longer run."""
    return min(1.0, max(0.0, 2 - run.step / run.c.hold)) if run.c.hold else 1.0


def warmth(run):
    """Share of --alpha: it falls with the step, but to a half. Without its price a policy settles on whatever
    the reward is wrong about; at full price it never settles where one word in thousands is a good one."""
    return max(0.5, settling(run))


# ---------------------------------------------------------------------------------------------- PPO's updates


@torch.no_grad()
def appraised(run, batch, tokens, mask, preference=None):
    """What policy, start and critic say of some sequences, and what those are paid: a dictionary of (N, T)
    tensors with N = B K, `fine` (N,), and the prefix of each."""
    dense, ends = dense_rewards(run, batch, tokens, mask, preference)
    fine = fines(tokens, mask, ends, run.task.eot)
    tokens, mask, prefix = sequences(batch, tokens, mask)
    old, values = predicted(run, run.policy.eval(), tokens, mask, prefix, run.value)
    start = predicted(run, run.start_policy, tokens, mask, prefix)
    return dict(tokens=tokens, mask=mask, old=old, start=start, values=values, dense=dense.flatten(0, 1),
                fine=fine.flatten(0, 1)), prefix


@torch.no_grad()
def learn_from_rollout(run):
    """A rollout and what it teaches PPO: {tokens, mask, old log-probs, values, advantage, returns}, (N, T)
    each, the prefix of the N sequences (None for a pooled task), and figures for the log."""
    c = run.c
    x, prefix = appraised(run, *rollout(run))
    advantage, returns, figures = experience(x["dense"], x["old"], x["start"], x["values"], x["mask"], c.kl,
                                             c.gamma, c.lam, x["fine"], c.returns)
    figures["ended"] = (x["fine"] == 0).float().mean()
    lesson = {name: x[name] for name in ("tokens", "mask", "old", "values")}
    return lesson | {"advantage": advantage, "returns": returns}, prefix, figures


def ppo_advantages(run, samples, rewards):
    """(B, K, T): the advantages (E15) of shown sequences, in units of normalised reward: before they are
    whitened, which would compare them with a rollout that nobody sees."""
    x, _ = appraised(run, samples.batch, samples.tokens, samples.mask, samples.preference)
    c = run.c
    return credited(x["dense"], x["old"], x["start"], x["values"], x["mask"], c.kl, c.gamma, c.lam, x["fine"],
                    c.returns)[0].view_as(samples.mask)


def ppo_step(run):
    """One rollout and its minibatches (E14-E16): answers by the policy, rewards at every token, clipped
    updates."""
    c, updates = run.c, []
    lesson, prefix, figures = learn_from_rollout(run)
    check_start(figures["kl"].item())
    for _ in range(c.epochs):
        order = torch.randperm(len(lesson["tokens"]), generator=run.generators["data"])
        for part in order.tensor_split(c.minibatches):
            part = part.to(run.device)
            some = prefix and [x[part] for x in prefix]
            updates.append(ppo_update(run, some, **{name: x[part] for name, x in lesson.items()}))
    every = {name: torch.stack([x[name] for x in updates]) for name in updates[0]}
    return {name: x.mean() for name, x in every.items()} | figures | {"ratio_max": every["ratio_max"].max()}


def ppo_update(run, prefix, tokens, mask, old, advantage, values, returns):
    """One minibatch: the clipped surrogate for the policy, a clipped square for the critic. Without dropout,
    like the log-probs that the ratio is taken to (policy_ppo.py)."""
    c, task = run.c, run.task
    run.policy.eval()

    def loss_of(rows):
        """The share of some rows."""
        with run.autocast():
            hidden = read_candidates(run.policy, tokens[rows, None], task.start,
                                     prefix and [x[rows] for x in prefix])[0][:, 0]  # (n, T, D)
            loss, stats = ppo_loss(hidden, run.policy.head[:task.n_ids], tokens, mask, old, advantage,
                                   c.ppo_clip, c.alpha * warmth(run), rows)
        now = run.value(hidden.detach().float()).squeeze(-1)
        stats |= {"loss": loss, "value_loss": value_loss(now, values, returns, mask, c.value_clip, rows)}
        return loss + 0.5 * stats["value_loss"], stats
    return run.update(run.learner, run.policy_optimizer, loss_of, len(tokens), c.lr * settling(run),
                      check=lambda x: check_step(x["ratio_max"].item()))
