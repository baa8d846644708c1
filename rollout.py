"""Tokens of the policy and what they are paid: candidates to be judged, rollouts, a reward at every token.

`collect` asks for the preferences that the reward is fitted to. `rollout` draws the samples that the policy
learns from, which nobody judges. What they are paid: for the losses that take a weight a token the learned
reward as it is (objective.py, `policy_batch`), for PPO `dense_rewards` (E11-E14), in token, segment or bandit
form, which differ only in the ends at which the reward is read. The exception is bandit guidance without a
learned score, which asks about its rollouts. Whoever asks does so through `asked`, the one place that knows
--noise.
"""
import functools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from aggregate import aggregate
from data import every_word, lengths_to_mask, trim
from fused import policy_loss
from guidance import guidance_of
from model import apart, read_candidates, write
from policy_ppo import fit_normalizer, normalize, score_line, spread, was_cut
from policy_reinforce import compared, z_scored
from reward import Buffer, Candidates, ranks, segment_ends
from support.distributed import shared
from support.log import UserError
from support.noise import noisy

PROPOSED = 64  # words
SURE = 0.99  # probability of a prompt
ALIKE = 0.01  # learned scores whose standard deviation is below that differ by chance

# -------------------------------------------------------------------------------------- samples of the policy


@torch.no_grad()
def sample(run, batch, k, generator):
    """k continuations of every input of the batch by the policy: tokens, mask (B, K, T)."""
    task = run.task
    with run.autocast():
        tokens, length = write(run.policy.eval(), task.start, task.width, generator, k, batch.prefix(),
                               eot=task.eot, top_k=run.c.top_k or None, n_ids=task.n_ids)
    tokens, length = tokens.view(len(batch.index), k, -1), length.view(len(batch.index), k)
    return tokens, lengths_to_mask(length, task.width)


def rollout(run):
    """--batch_size fresh samples to learn from, --group_size of each input: batch, tokens, mask (B, K, T), T
    the longest."""
    k = run.c.batch_size if run.task.pooled else run.c.group_size
    n = run.c.batch_size // k
    batch = run.task.batch(n, run.generators["data"])
    return batch, *trim(*sample(run, batch, k, run.generators["sample"]))


# --------------------------------------------------------------------------- candidates, and what is held out


def held_share(n, least):
    """How many of n to hold out: an eighth, on small data `least` of them, but never more than a quarter."""
    return max(n // 8, min(least, n // 4))


@functools.lru_cache(4)
def split_rows(n, seed):
    """Row numbers 0 .. n-1 as two tensors, those that the reward is fitted on and those held out for good, by
    --seed: the order of a file, by source or by length, is not to decide what a fit is stopped by. Drawn once
    a run, and not to be changed in place."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    cut = n - held_share(n, 32)
    return order[:cut], order[cut:]


def held_candidates(run):
    """How many of a round's candidates (pooled) or groups are held out: of groups of inputs at least 8, so
    that a first look at them says something; none where the training rows are too few to keep some for it."""
    n = run.c.candidates
    if run.task.pooled:
        return max(1, (n if run.pooled else n // run.c.K) // 8)
    return held_share(n, 8) if len(split_rows(len(run.task.rows["train"]), run.c.seed)[1]) else 0


def inputs(run, n_held):
    """The inputs of a round's candidates (of a pooled task the only one). The last `n_held` are held-out
    training rows: no candidate of theirs is ever fitted, so they show what the reward makes of documents that
    it does not know."""
    c, task, draw = run.c, run.task, run.generators["data"]
    if task.pooled:
        return task.batch(1, draw)
    fitted, kept = split_rows(len(task.rows["train"]), c.seed)
    some = lambda rows, n: rows[torch.randint(max(1, len(rows)), (n,), generator=draw)]
    return task.pick("train", torch.cat((some(fitted, c.candidates - n_held), some(kept, n_held))))


@torch.no_grad()
def collect(run, batch, exact=False):
    """Candidates of the current policy with their preferences, for the reward to learn from. `batch`: their
    `inputs`. `exact`: without --noise, for an examination."""
    c, task, g = run.c, run.task, run.generators["candidates"]
    tokens, mask = sample(run, batch, c.candidates if task.pooled else c.K, g)
    tokens = explored(run, tokens, mask) if c.explore > 0 else tokens
    tokens, mask = task.plant(batch, tokens, mask, g) if c.planted > 0 else (tokens, mask)
    preference = asked(run, batch, tokens, mask, exact)
    x = Candidates(tokens, mask, preference, batch.context, batch.context_mask)
    x = side_by_side(x, c.K) if task.pooled and not run.pooled else x
    return x if guidance_of(c).read is None else replace(x, ends=ends_of(run, x))


def asked(run, batch, tokens, mask, exact=False):
    """What the run is told of tokens (B, K, T): the task's preference (B, K), under --noise a draw around it
    each time. The task hears the same (`Task.told`): nothing is learned or chosen from the truth."""
    preference = preferred(run.task, batch, tokens, mask)
    told = preference if exact else noisy(preference, run.c.noise, run.generators["noise"])
    run.task.told(tokens, told)
    return told


def side_by_side(x, k):
    """The one group of a pooled task, Candidates (1, N, ...), as the questions that it was asked in: k at a
    time, (N / k, k, ...). People who say which of two is better say nothing of a third."""
    return x.map(lambda t: t.view(-1, k, *t.shape[2:]))


def preferred(task, batch, tokens, mask):
    """The task's preference of tokens (B, K, T): (B, K) float. UserError for anything else that `prefer`
    says; what is no number would tie with everything, and the fit, or PPO, would stand still without a
    word."""
    preference, shape = task.prefer(batch, tokens, mask), tuple(tokens.shape[:2])
    if not torch.is_tensor(preference):
        got = type(preference).__name__
    elif preference.shape != shape or not preference.is_floating_point():
        got = f"{preference.dtype} of shape {tuple(preference.shape)}"
    elif not preference.isfinite().all():
        got = "some that are not finite"
    else:
        return preference
    raise UserError(f"task {type(task).__name__}: prefer: expected finite floats of shape (B, K) = {shape}, "
                    f"got {got}")


def fresh_candidates(run):
    """A buffer of new candidates for one step of the fit (--replay 0: none are used twice)."""
    new = Buffer(run.c.candidates, run.pooled)
    new.add(collect(run, inputs(run, 0)))
    return new


def explored(run, tokens, mask):
    """tokens, mask (B, K, T) -> tokens, in --explore of the candidates half of them random: a new word shows
    its worth beside words that already work, and a word that is gone shows what it was worth. Where an answer
    ends stays as it is: the mask says where that is. With --explore_from best what is varied are the best
    prompts so far, by words that the reward proposes; before one stands out it is `unlike`."""
    task, g = run.task, run.generators["candidates"]
    around_best = run.c.explore_from == "best" and run.learns_reward
    if around_best and not run.fitted.stands_out(run.c.resolution):
        return unlike(run, tokens.shape)
    words = task.n_ids if task.eot is None else task.eot  # end-of-text is the last id of every tokenizer
    other = torch.randint(words, tokens.shape, generator=g, device=tokens.device)
    chance = lambda shape: torch.rand(shape, generator=g, device=tokens.device)
    some = (chance(tokens.shape[:2]) < run.c.explore)[..., None]  # (B, K, 1)
    swap = some & (chance(tokens.shape) < 0.5)  # (B, K, T)
    if around_best:
        other = torch.where(chance(tokens.shape) < 0.5, proposed(run, tokens.shape), other)
        tokens = torch.where(some, best_so_far(run, tokens.shape[1])[None], tokens)
    inside = mask if task.eot is None else mask & (tokens != task.eot)
    return torch.where(swap & inside, other, tokens)


def tied_best(run):
    """Which of the scored prompts tie with the best one, (N,) bool."""
    worth = ranks(run.fitted.data.preference, run.c.resolution).flatten()
    return worth == worth.max()


def best_so_far(run, n):
    """n prompts to vary in the place of the policy's own, (n, T): drawn among those that tie with the best
    scored one, their words in random order. A policy that has not moved among thousands of equally likely
    words never says the word again that made the difference; around the prompt that has it, every other
    candidate does. Without the shuffle the good word would stand at the same place in all of them, and the
    reward know it there alone."""
    g = run.generators["candidates"]
    drawn = tied_best(run).float().multinomial(n, replacement=True, generator=g)
    best = run.fitted.data.tokens.flatten(0, 1)[drawn]  # (n, T)
    order = torch.rand(best.shape, generator=g, device=best.device).argsort(1)
    return best.gather(1, order)


def proposed(run, shape):
    """Words of this shape among the PROPOSED that the reward pays best at a first place, equally likely: one
    that nobody has scored yet may stand among them because it is used like one that was good. The reward is
    asked which experiments are worth making, not believed: what it likes goes beside words that work, and
    half of the new words are any."""
    top = first_rewards(run).topk(min(PROPOSED, run.task.n_ids)).indices
    return top[torch.randint(len(top), shape, generator=run.generators["candidates"], device=top.device)]


def unlike(run, shape):
    """Prompts (1, K, T) of words that nobody was asked about, each as unlike all others as can be, while no
    answer stands out and what a body has read is all that is known: hundreds of words that are used alike
    ask the same question hundreds of times. Once too few are left it begins anew."""
    n, n_ids = math.prod(shape), run.task.n_ids
    asked = [x.data.tokens.flatten() for x in (run.fitted, run.held_out) if x.data is not None]
    known = torch.cat(asked).unique() if asked else torch.empty(0, dtype=torch.long, device=run.device)
    known = known if n <= n_ids - len(known) else known[:0]
    words = farthest(first_states(run), min(n, n_ids), known)
    words = words.repeat(-(-n // len(words)))[:n]  # a vocabulary of less than one round
    order = torch.randperm(n, generator=run.generators["candidates"], device=words.device)
    return words[order].view(shape)


def farthest(states, n, known):
    """Farthest-first traversal (Gonzalez, 1985; of questions to ask: Sener and Savarese, 2018): n rows of
    states (V, D), one after the other the one that is farthest from the nearest of all rows before it and of
    the `known` (m,) -> (n,). Where none is known the mean of all is."""
    near = states.new_full((len(states),), float("inf"))  # (V,) distance of the nearest
    for some in (states[known] if len(known) else states.mean(0, keepdim=True)).split(256):
        near = torch.minimum(near, torch.cdist(states, some).amin(1))
    near[known] = -1.0
    chosen = []
    for _ in range(n):
        i = near.argmax()
        near = torch.minimum(near, (states - states[i]).norm(dim=1))
        near[i] = -1.0  # not again, even where all others are like it
        chosen.append(i)
    return torch.stack(chosen)


def annotated(run, split):
    """The task's annotated answers as Candidates, with the ends that this run's guidance reads rewards at."""
    tokens, mask, preference, context, context_mask, labels = run.task.pairs(split)
    x = Candidates(tokens, mask, preference, context, context_mask, labels)
    parts = [ends_of(run, x.map(lambda t: t[i])) for i in torch.arange(len(tokens)).split(256)]
    return replace(x, ends=torch.cat(parts))


@torch.no_grad()
def stuck(run):
    """Whether a policy says one prompt only, SURE of it, although the reward as it is now pays more for the
    best that were asked about. An early reward that was wrong can teach that within a hundred updates; once
    it is mended, samples that are all alike have nothing to be compared with, and the policy would stay."""
    if not run.task.pooled or not run.fitted.stands_out(run.c.resolution):
        return False
    c, task = run.c, run.task
    said, _ = write(run.policy.eval(), task.start, task.width, None, temperature=0, n_ids=task.n_ids)
    every = torch.ones_like(said, dtype=torch.bool)  # (1, T)
    if predicted(run, run.policy, said, every, None).sum().exp() < SURE:
        return False
    best = run.fitted.data.tokens.flatten(0, 1)[tied_best(run)]  # (n, T)
    if (best == said).all(1).any():  # none is better
        return False
    tokens = torch.cat((said, best))[None]  # (1, 1 + n, T)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with run.autocast():
        rewards = run.reward.guide(tokens)
    scores = aggregate(rewards, answer_ends(run, tokens, mask), c.agg, c.beta)[0]  # (1 + n,)
    return bool(scores[1:].mean() > scores[0] + ALIKE)


# --------------------------------------------------------------------------------------- what tokens are paid


@torch.no_grad()
def answer_ends(run, tokens, mask, prefix=None):
    """(B, K, T) bool: where the fit reads r of these sequences: at every token, at the last, or E11."""
    threshold = guidance_of(run.c).ends(run.c)
    entropy = torch.zeros_like(mask, dtype=torch.float32)
    if 0.0 < threshold < float("inf"):
        entropy = apart(functools.partial(entropies, run), prefix, tokens, most=run.c.micro_batch)
    return segment_ends(entropy, mask, threshold)


def ends_of(run, x):
    """`answer_ends` of Candidates."""
    return answer_ends(run, x.tokens, x.mask, x.prefix())


def entropies(run, prefix, tokens):
    """The starting policy's entropy after each token, in nats: tokens (B, K, T) -> (B, K, T)."""
    start = run.start_policy
    _, after = read_candidates(start, tokens, run.task.start, prefix)  # they have read token t
    everywhere = torch.ones(after.shape[:-1].numel(), device=after.device)
    return policy_loss(after.flatten(0, 2), start.head, tokens.flatten(), everywhere,
                       everywhere)[2].view_as(tokens)


def guide_of(run):
    """guide(tokens, prefix, mask) -> (B, K, T), as tasks take it: the reward of every token, read off or its
    own. Without a mask all tokens are real."""
    read = guidance_of(run.c).read
    if read is None:
        return lambda tokens, prefix=None, mask=None: run.reward.guide(tokens, prefix)

    def guide(tokens, prefix=None, mask=None):
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        return read(run.reward, tokens, mask, prefix)
    return guide


@torch.no_grad()
def at_first_place(run, what, read):
    """read(tokens (1, N, 1)) -> (1, N, 1, ...) of every word at a prompt's first place, (V, ...) float32:
    once a fit, as all prompts begin alike."""
    if what not in run.first_place:
        nothing = torch.empty(0, dtype=torch.long, device=run.device)
        with run.autocast():
            parts = [read(words)[0, :, 0].float() for words in every_word(nothing, run.task.n_ids)]
        run.first_place[what] = torch.cat(parts)
    return run.first_place[what]


def first_rewards(run):
    """r of every word at a prompt's first place, (V,)."""
    return at_first_place(run, "rewards", guide_of(run))


def first_states(run):
    """The states of unit length in which the reward's body has read a word and nothing else, (V, D)."""
    body = run.reward.eval().bodies[0]
    states = at_first_place(run, "states", lambda words: read_candidates(body, words, run.task.start)[1])
    return F.normalize(states, dim=1)


def alike(run, scores, mask):
    """Scores of whole answers (B, K) -> (B, K, T): every token is paid what its answer is worth beside others
    (--baseline). A deviation below --resolution, or of a learned score below ALIKE, is not blown up."""
    floor = ALIKE if run.learns_reward else run.c.resolution  # in units of score, or of preference
    return compared(scores, run.c.baseline, floor)[..., None] * mask


def answer_scores(rewards, ends):
    """The one reward an answer that is read at its last token: (B, K, T) twice -> (B, K)."""
    return torch.where(ends, rewards, 0.0).sum(-1)


def renew_normalizer(run):
    """The place-aware normaliser (E13) of the rewards as they are now, from the latest fitted candidates."""
    if not run.objective.critic:
        return
    d, n = run.fitted.dim, len(run.fitted)
    # 512 are enough for two straight lines
    some = run.fitted.data.map(lambda x: x.narrow(d, max(0, n - 512), min(n, 512)))
    with run.autocast():
        rewards = run.reward.guide(some.tokens, some.prefix())
    run.normalizer = fit_normalizer(rewards.flatten(0, 1), some.read_at().flatten(0, 1)).float()


def dense_rewards(run, batch, tokens, mask, preference=None):
    """(B, K, T) rewards of a rollout before the KL, and beside them the ends (B, K, T) bool that they were
    read at.

    Learned rewards are read at their ends, normalised by place and spread over segments (E13, E14). What is
    read off a score is read off the normalised one, so that an answer is paid what bandit guidance pays it,
    and a cut one gives back one unit. Normalised by place themselves, shares of attention would pay for short
    answers (win rate on the edits 0.10, seed 1: "we will ."). Without a learned reward it is the z-scored
    preference at the last token.  preference (B, K): where it is known
    already, else the task is asked.
    """
    ends = answer_ends(run, tokens, mask, batch.prefix())
    if not run.learns_reward:
        preference = asked(run, batch, tokens, mask) if preference is None else preference
        paid = z_scored(preference, run.c.resolution)  # (B, K)
        return torch.where(ends, paid[..., None], 0.0), ends
    read = guidance_of(run.c).read
    with run.autocast():
        if read is not None:
            return read(run.reward, tokens, mask, batch.prefix(), *score_line(run.normalizer)), ends
        rewards = run.reward.guide(tokens, batch.prefix())
    return spread(normalize(rewards, ends, run.normalizer), ends, mask), ends


def fines(tokens, mask, ends, eot):
    """(B, K): what an answer that was cut gives back, one unit for every reward that it was paid
    (policy_ppo.py says why); 0 for those that have ended.  tokens, mask, ends (B, K, T)."""
    return torch.where(was_cut(tokens, mask, eot), ends.sum(-1), 0).float()


@torch.no_grad()
def predicted(run, model, tokens, mask, prefix, value=None):
    """log pi of tokens (N, T) by a net, (N, T); with a critic two: and its values of the states that predict
    them. Constants."""
    def read(tokens, mask, *prefix):
        with run.autocast():
            hidden = read_candidates(model, tokens[:, None], run.task.start, prefix or None)[0][:, 0]
            _, logp, _ = policy_loss(hidden.flatten(0, 1), model.head[:run.task.n_ids], tokens.flatten(),
                                     mask.flatten().float())
        logp = logp.view_as(mask)  # (n, T)
        return logp if value is None else torch.stack((logp, value(hidden.float()).squeeze(-1)), 1)
    found = shared(read, tokens, mask, *(prefix or ()), most=run.c.micro_batch)
    return found if value is None else found.unbind(1)


def sequences(batch, tokens, mask):
    """(B, K, T) tokens and mask as N = B K sequences (N, T), and the prefix of each (None where there is
    none)."""
    prefix = batch.prefix()
    if prefix is not None:
        prefix = [x.repeat_interleave(tokens.shape[1], 0) for x in prefix]  # (B, P) -> (N, P)
    return tokens.flatten(0, 1), mask.flatten(0, 1), prefix


@torch.no_grad()
def beside_start(run, batch, tokens, mask):
    """log pi and log pi_start of tokens (B, K, T): two (N, T) with N = B K."""
    tokens, mask, prefix = sequences(batch, tokens, mask)
    nets = run.policy.eval(), run.start_policy
    return [predicted(run, net, tokens, mask, prefix) for net in nets]
