"""Tokens of the policy, and what they are paid: candidates to be judged, rollouts to learn from, a reward a token.

`collect` asks for the preferences that the reward is fitted to. `rollout` draws the samples that the policy
learns from, which nobody judges: `policy_batch` pays them with the learned reward as it is, for the losses that
take a weight a token; `dense_rewards` (E11-E14) pays PPO's, in token, segment or bandit form, which differ only
in the ends at which the reward is read. The exception is PPO under bandit guidance, which asks about its rollouts.

`Objective` is a way to learn from them. train.py has the table of all.
"""
import functools
from dataclasses import dataclass, replace
from typing import Callable

import torch

from data import lengths_to_mask, trim
from fused import policy_loss
from model import generate, read_candidates
from policy_ppo import (advantages, check_start, check_step, experience, fined, fit_normalizer, normalize, ppo_loss,
                        spread, step_rewards, value_loss, was_cut)
from reward import Candidates, segment_ends

SOURCES = ("samples", "references")


@dataclass(frozen=True)
class Objective:
    """How the policy uses the reward: a line of train.OBJECTIVES.

    source    where its tokens come from: "samples" of the policy, or the task's "references"
    step      run -> {figure: value}, one update of the policy; `by_loss` makes one of a loss function
    weigh     (rewards, mask, c) -> weights, all (B, K, T): what `by_loss` multiplies the log-probs with
    shown     (run, samples, rewards) -> (B, K, T): what samples.jsonl shows as the weight of each token; None:
              `weigh` of the shown sequences, and nothing where there is none
    rewarded  False for an objective that reads no reward: then none is fitted
    critic    True for one with a value net and the rewards' normaliser (E13)

    Raises ValueError where a part is missing, when the table is made: before anything is trained.
    """
    source: str
    step: Callable
    weigh: Callable = None
    shown: Callable = None
    rewarded: bool = True
    critic: bool = False

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"source: expected one of {', '.join(SOURCES)}, got {self.source!r}")
        for name, must in (("step", True), ("weigh", False), ("shown", False)):
            part = getattr(self, name)
            if not (callable(part) or part is None and not must):
                raise ValueError(f"{name}: expected a function, got {part!r}")


# ---------------------------------------------------------------------------------------------- samples of the policy


@torch.no_grad()
def sample(run, batch, k, generator):
    """k continuations of every input of the batch by the policy: tokens, mask (B, K, T)."""
    task, policy = run.task, run.policy.eval()
    with run.autocast():
        cache = policy.prefill(*batch.prefix()) if batch.context is not None else None
        tokens, length, _ = generate(policy, task.start, task.width, generator, k, cache, task.eot,
                                     run.c.top_k or None, n_ids=task.n_ids)
    tokens, length = tokens.view(len(batch.index), k, -1), length.view(len(batch.index), k)
    return tokens, lengths_to_mask(length, task.width)


def rollout(run):
    """--batch_size fresh samples to learn from: batch, tokens, mask (B, K, T), T the longest."""
    n, k = (1, run.c.batch_size) if run.task.pooled else (run.c.batch_size, 1)
    batch = run.task.batch(n, run.generators["data"])
    return batch, *trim(*sample(run, batch, k, run.generators["sample"]))


# ------------------------------------------------------------------------------------- candidates, and what is held out


def held_share(n, least):
    """How many of n to hold out: an eighth, on small data `least` of them, but never more than a quarter."""
    return max(n // 8, min(least, n // 4))


@functools.lru_cache(4)
def split_rows(n, seed):
    """Row numbers 0 .. n-1 as two tensors, those that the reward is fitted on and those held out for good, by
    --seed: the order of a file, by source or by length, is not to decide what a fit is stopped by. Drawn once a
    run, and not to be changed in place."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    cut = n - held_share(n, 32)
    return order[:cut], order[cut:]


def held_candidates(run):
    """How many of a round's candidates (pooled) or groups are held out: of groups at least 8, so that a first
    look at them says something; none where the training rows are too few to keep some for it."""
    n = run.c.candidates
    if run.task.pooled:
        return max(1, n // 8)
    return held_share(n, 8) if len(split_rows(len(run.task.rows["train"]), run.c.seed)[1]) else 0


def inputs(run, n_held):
    """The inputs of a round's candidates (of a pooled task the only one). The last `n_held` are held-out training
    rows: no candidate of theirs is ever fitted, so they show what the reward makes of documents that it does not
    know."""
    c, task, draw = run.c, run.task, run.generators["data"]
    if task.pooled:
        return task.batch(1, draw)
    fitted, kept = split_rows(len(task.rows["train"]), c.seed)
    some = lambda rows, n: rows[torch.randint(max(1, len(rows)), (n,), generator=draw)]
    return task.pick("train", torch.cat((some(fitted, c.candidates - n_held), some(kept, n_held))))


@torch.no_grad()
def collect(run, batch=None):
    """Candidates of the current policy with their preferences, for the reward to learn from. `batch`: their
    inputs, by default --candidates training inputs (of a pooled task the one input that there is)."""
    c, task, g = run.c, run.task, run.generators["candidates"]
    groups, k = (1, c.candidates) if task.pooled else (c.candidates, c.K)
    batch = task.batch(groups, run.generators["data"]) if batch is None else batch
    tokens, mask = sample(run, batch, k, g)
    tokens = explored(run, tokens, mask) if c.explore > 0 else tokens
    return Candidates(tokens, mask, task.prefer(batch, tokens, mask), batch.context, batch.context_mask)


def explored(run, tokens, mask):
    """tokens, mask (B, K, T) -> tokens, in --explore of the candidates half of them random: a new word shows its
    worth beside words that already work. Where an answer ends stays as it is: the mask says where that is."""
    task, g = run.task, run.generators["candidates"]
    words = task.n_ids if task.eot is None else task.eot  # end-of-text is the last id of every tokenizer
    other = torch.randint(words, tokens.shape, generator=g, device=tokens.device)
    chance = lambda shape: torch.rand(shape, generator=g, device=tokens.device)
    swap = (chance(tokens.shape[:2]) < run.c.explore)[..., None] & (chance(tokens.shape) < 0.5)  # (B, K, T)
    inside = mask if task.eot is None else mask & (tokens != task.eot)
    return torch.where(swap & inside, other, tokens)


def annotated(run, split):
    """The task's annotated answers as Candidates, with the ends that this run's guidance reads rewards at."""
    tokens, mask, preference, context, context_mask, labels = run.task.pairs(split)
    x = Candidates(tokens, mask, preference, context, context_mask, labels)
    parts = [answer_ends(run, x.map(lambda t: t[i])) for i in torch.arange(len(tokens)).split(256)]
    return replace(x, ends=torch.cat(parts))


# ---------------------------------------------------------------------------------------------- what tokens are paid


def z_scored(preference, floor=0.0):
    """Preferences (B, K) with zero mean and unit deviation over all of them: what bandit guidance pays.

    Deviations below `floor`, in the preference's own units, are not blown up to full strength, for the same reason
    as in `policy_reinforce.standardize`. The floor is --resolution: what differs by less is a tie for the fit too.
    """
    # divisor: the preferences' standard deviation, or the floor
    return (preference - preference.mean()) / preference.std().clamp(min=max(floor, 1e-6))


def policy_batch(run):
    """Tokens to learn from with their rewards, before `weigh`: (batch, tokens, mask, rewards), each (B, K, T).

    Without a learned reward that is 1 at every token of a reference, or the z-scored preference itself at every
    token of the latest candidates (bandit guidance).
    """
    c, task = run.c, run.task
    if run.objective.source == "references":
        batch = task.batch(c.batch_size, run.generators["data"])
        tokens, mask = trim(batch.reference[:, None], batch.reference_mask[:, None])  # (B, 1, T)
        if not run.learns_reward:
            return batch, tokens, mask, mask.float()
    elif not run.learns_reward:
        batch = run.candidates
        tokens, mask = trim(batch.tokens, batch.mask)
        return batch, tokens, mask, z_scored(batch.preference, c.resolution)[..., None] * mask
    else:
        batch, tokens, mask = rollout(run)
    with run.autocast():
        return batch, tokens, mask, run.reward.guide(tokens, batch.prefix())


def end_threshold(c):
    """Guidance as the entropy in nats at which a segment ends: at every token, where E11 says, or at the last."""
    return {"token": 0.0, "edits": 0.0, "segment": c.segment_entropy, "bandit": float("inf")}[c.guidance]


@torch.no_grad()
def answer_ends(run, x):
    """(B, K, T) bool: where rewards of these sequences are read: at every token, at the last, or E11."""
    threshold = end_threshold(run.c)
    entropy = torch.zeros_like(x.mask, dtype=torch.float32)
    if 0.0 < threshold < float("inf"):
        start = run.start_policy
        _, after = read_candidates(start, x.tokens, run.task.start, x.prefix())  # states that have read token t
        everywhere = torch.ones(after.shape[:-1].numel(), device=after.device)
        entropy = policy_loss(after.flatten(0, 2), start.head, x.tokens.flatten(), everywhere,
                              everywhere)[2].view_as(x.mask)
    return segment_ends(entropy, x.mask, threshold)


def renew_normalizer(run):
    """The place-aware normaliser (E13) of the rewards as they are now, from the latest fitted candidates."""
    if not run.objective.critic:
        return
    d, n = run.fitted.dim, len(run.fitted)
    some = run.fitted.data.map(lambda x: x.narrow(d, max(0, n - 512), min(n, 512)))  # enough for two straight lines
    with run.autocast():
        rewards = run.reward.guide(some.tokens, some.prefix())
    run.normalizer = fit_normalizer(rewards.flatten(0, 1), some.read_at().flatten(0, 1)).float()


def dense_rewards(run, batch, tokens, mask, preference=None):
    """(B, K, T) rewards of a rollout before the KL, and beside them the ends (B, K, T) bool that they were read at.

    Learned rewards are read at their ends, normalised by place and spread over segments (E13, E14). Without a
    learned reward it is the z-scored preference at the last token.  preference (B, K): where it is known already,
    else the task is asked.
    """
    ends = answer_ends(run, Candidates(tokens, mask, None, batch.context, batch.context_mask))
    if not run.learns_reward:
        preference = run.task.prefer(batch, tokens, mask) if preference is None else preference
        paid = z_scored(preference, run.c.resolution)  # (B, K)
        return torch.where(ends, paid[..., None], 0.0), ends
    with run.autocast():
        rewards = run.reward.guide(tokens, batch.prefix())
    return spread(normalize(rewards, ends, run.normalizer), ends, mask), ends


def fines(tokens, mask, ends, eot):
    """(B, K): what an answer that was cut gives back, one unit for every reward that it was paid (policy_ppo.py
    says why); 0 for those that have ended.  tokens, mask, ends (B, K, T)."""
    return torch.where(was_cut(tokens, mask, eot), ends.sum(-1), 0).float()


@torch.no_grad()
def predicted(run, model, tokens, mask, prefix):
    """Hidden states (N, T, D) that predict the tokens (N, T), and their log-probs, as constants."""
    with run.autocast():
        hidden = read_candidates(model, tokens[:, None], run.task.start, prefix)[0][:, 0]
        _, logp, _ = policy_loss(hidden.flatten(0, 1), model.head[:run.task.n_ids], tokens.flatten(),
                                 mask.flatten().float())
    return hidden, logp.view_as(mask)


def sequences(batch, tokens, mask):
    """(B, K, T) tokens and mask as N = B K sequences (N, T), and the prefix of each (None where there is none)."""
    prefix = batch.prefix()
    if prefix is not None:
        prefix = [x.repeat_interleave(tokens.shape[1], 0) for x in prefix]  # (B, P) -> (N, P)
    return tokens.flatten(0, 1), mask.flatten(0, 1), prefix


# -------------------------------------------------------------------------------------------------------- PPO's updates


@torch.no_grad()
def appraised(run, batch, tokens, mask, preference=None):
    """What policy, start and critic say of some sequences, and what those are paid: a dictionary of (N, T)
    tensors with N = B K, `fine` (N,), and the prefix of each."""
    dense, ends = dense_rewards(run, batch, tokens, mask, preference)
    fine = fines(tokens, mask, ends, run.task.eot)
    tokens, mask, prefix = sequences(batch, tokens, mask)
    hidden, old = predicted(run, run.policy.eval(), tokens, mask, prefix)
    values = run.value(hidden.float()).squeeze(-1)
    _, start = predicted(run, run.start_policy, tokens, mask, prefix)
    return dict(tokens=tokens, mask=mask, old=old, start=start, values=values, dense=dense.flatten(0, 1),
                fine=fine.flatten(0, 1)), prefix


@torch.no_grad()
def learn_from_rollout(run):
    """A rollout and what it teaches PPO: {tokens, mask, old log-probs, values, advantage, returns}, all (N, T), the
    prefix of the N sequences (None for a pooled task), and figures for the log."""
    c = run.c
    x, prefix = appraised(run, *rollout(run))
    advantage, returns, figures = experience(x["dense"], x["old"], x["start"], x["values"], x["mask"], c.kl, c.gamma,
                                             c.lam, x["fine"])
    figures["ended"] = (x["fine"] == 0).float().mean()
    lesson = {name: x[name] for name in ("tokens", "mask", "old", "values")}
    return lesson | {"advantage": advantage, "returns": returns}, prefix, figures


def ppo_advantages(run, samples, rewards):
    """(B, K, T): the advantages (E15) of shown sequences, in units of normalised reward: before they are whitened,
    which would compare them with a rollout that nobody sees."""
    x, _ = appraised(run, samples.batch, samples.tokens, samples.mask, samples.preference)
    paid = step_rewards(x["dense"], x["old"], x["start"], x["mask"], run.c.kl)
    paid = fined(paid, x["mask"], x["fine"])
    return advantages(paid, x["values"], x["mask"], run.c.gamma, run.c.lam)[0].view_as(samples.mask)


def ppo_step(run):
    """One rollout and its minibatches (E14-E16): answers by the policy, rewards at every token, clipped updates."""
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
    """One minibatch: the clipped surrogate for the policy, a clipped square for the critic. Without dropout, like
    the log-probs that the ratio is taken to (policy_ppo.py)."""
    c, task = run.c, run.task
    run.policy.eval()
    with run.autocast():
        hidden = read_candidates(run.policy, tokens[:, None], task.start, prefix)[0][:, 0]
        loss, stats = ppo_loss(hidden, run.policy.head[:task.n_ids], tokens, mask, old, advantage, c.ppo_clip,
                               c.alpha * settling(run))
    check_step(stats["ratio_max"].item())
    now = run.value(hidden.detach().float()).squeeze(-1)
    stats |= {"loss": loss.detach(), "value_loss": value_loss(now, values, returns, mask, c.value_clip)}
    norm = run.update(run.learner, run.policy_optimizer, loss + 0.5 * stats["value_loss"], c.lr * settling(run))
    return stats | {"grad_norm": norm, "value_loss": stats["value_loss"].detach()}


def settling(run):
    """Share of lr and alpha at this update: 1 for --hold updates, then down to 0 over as many again. A count of
    its own and not a share of --policy_steps, so that a run resumed for longer is the longer run."""
    return min(1.0, max(0.0, 2 - run.step / run.c.hold)) if run.c.hold else 1.0
