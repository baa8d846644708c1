"""PPO with token, segment or bandit rewards in one path (E13-E16; Yin et al., 2025).

Action spaces differ only in where a reward is read: `ends` marks the last token of every segment
(reward.segment_ends). All tokens are ends: token guidance. Only the last one: bandit. From there on nothing
asks which it was:

    r at the ends -> normalised by place (E13) -> spread evenly over the segment (E14)
    -> minus the KL to the start (E14) -> advantages (E15) -> clipped losses (E16)

The clipped objective is not linear in log-probs, yet it goes through the one fused op: its derivative with
respect to log pi is known once log pi is, so a first pass without gradients finds the log-probs and the
weight of the second pass is that derivative. Not verified in the papers and chosen plain: the normaliser is
fitted by least squares, weighted by how often a place occurs (the released code takes Huber regression; five
seeds of token PPO on the edits win 0.873 +- 0.034 with the one, 0.866 +- 0.030 with the other, 0.871 +- 0.034
with no slope in place at all), and E13's spread has a floor, because its straight line in log p can fall
below zero for long answers of many short segments.

An answer that was cut at --max_summary has not ended, and the sum of its token rewards has grown all the way:
it gives back, at its last token, one unit for every reward that it was paid (a unit is one deviation of r,
E13). The critic's value behind the cut in its place (bootstrap) says that going on for ever is the best of
all. Win rates on the edits, guidance edits, seed 1 (and 2), at learning rates of 1e-4 | 3e-4 | 1e-3:
    counted as ended   0.924 | 0.229 (0.822) | 0.808 (0.825)
    bootstrap                | 0.009         | 0.006 (0.079), nearly all answers cut
    10 units                 | 0.314         | 0.058
    this rule          0.920 | 0.780 (0.825) | 0.926 (0.827)
Two seeds, so only the bootstrap is shown to be worse; guidance token (3e-4, seed 1) ends all answers and
loses nothing. A sequence whose length is fixed by design has always ended.

What ran away in spite of it: at 3e-4 two seeds of five (guidance edits, lambda 0.95; 0.780 and 0.825) had an
eighth to a quarter of their answers say good words again until they were cut, for some prompts and with
certainty (entropy 0.04). Every token of the loop is paid at once and the bill comes a dozen tokens later, of
which lambda lets 0.95^12, half, through to the token that went on instead of ending; once the loop is certain
nothing else is sampled. With lambda 1 the bill arrives whole: 0.933, 0.933, 0.940, 0.936 and 0.928 (seeds 1
to 5), which is the default of task edits. Entropy (--alpha 0.03, seed 2 alone: 0.918) mended it too.
`min_returns` takes the other way: nothing is summed, so there is nothing to collect. It hangs on the one
lowest r instead, which preferences alone leave arbitrary for a word that all answers share: at 3e-4 seed 3
learned two words that avoid it (0.157, docs/results.md).

Updates are taken without dropout: the old log-probs are, and with other masks the ratio is 1.5 where nothing
was learned. --dropout acts on the warm start and on the fit of the reward.
"""
import torch
import torch.nn.functional as F

from fused import policy_loss

KL_LIMIT = 50.0  # nats a token from the start: beyond, training is lost
RATIO_LIMIT = 1e4  # new over old probability

# ----------------------------------------------------------------------------------- dense rewards (E13, E14)


def places(ends):
    """p = (index of the token's segment, from 1) / (number of segments): ends (..., T) bool -> (..., T) in
    (0, 1]."""
    index = ends.cumsum(-1) - ends.long() + 1
    return index / ends.sum(-1, keepdim=True).clamp(min=1)  # divisor: segments of the sequence


def fit_normalizer(rewards, ends):
    """(w_mean, b_mean, w_std, b_std, floor) of E13 from rewards (N, T) read at ends (N, T), as a float64
    tensor (5,).

    Per place (three decimals) the mean and the standard deviation, each a straight line in log p, weighted by
    counts. One place only (bandit) gives flat lines. floor: a tenth of the overall standard deviation.
    """
    r, p = rewards[ends].double(), places(ends)[ends].double()
    at, group, count = p.mul(1000).round().clamp(min=1).unique(return_inverse=True, return_counts=True)
    mean = torch.zeros_like(at).index_add_(0, group, r) / count
    spread = (torch.zeros_like(at).index_add_(0, group, (r - mean[group]) ** 2) / count).sqrt()
    x = torch.stack((at.div(1000).log(), torch.ones_like(at)), 1) * count.sqrt()[:, None]
    solve = lambda y: torch.linalg.pinv(x) @ (y * count.sqrt())
    return torch.cat((solve(mean), solve(spread), (0.1 * r.std(correction=0)).clamp(min=1e-6)[None]))


def normalize(rewards, ends, line):
    """E13: (r - mean(p)) / std(p) with std(p) not below its floor.  rewards, ends (..., T) -> (..., T)."""
    w_mean, b_mean, w_std, b_std, floor = line.to(rewards)
    log_p = places(ends).to(rewards.dtype).log()
    return (rewards - w_mean * log_p - b_mean) / torch.maximum(w_std * log_p + b_std, floor)


def score_line(line):
    """E13 at the last place, where log p is 0: (level, unit) of a score that is read there."""
    _, b_mean, _, b_std, floor = line.tolist()
    return b_mean, max(b_std, floor)


def spread(rewards, ends, mask):
    """E14: each segment's reward, read at its end, in equal parts on its tokens.  (..., T) -> (..., T), 0
    outside.

    The sum over a segment is its reward. The undiscounted return is a sum over segments, so it grows with
    their number. A sequence that is one single segment gets its reward at its end: that is bandit feedback as
    everybody means it.
    """
    index = ends.cumsum(-1) - ends.long()  # segment of a token, from 0
    add = lambda x: torch.zeros_like(rewards).scatter_add_(-1, index, x)
    value = add(torch.where(ends, rewards, 0.0))
    length = add(mask.to(rewards.dtype)).clamp(min=1)  # divisor: tokens of the segment
    split = torch.where(mask, (value / length).gather(-1, index), 0.0)
    return torch.where(ends.sum(-1, keepdim=True) == 1, torch.where(ends, rewards, 0.0), split)


def was_cut(tokens, mask, eot):
    """(...) bool: sequences whose last token is not end-of-text. tokens, mask (..., T).

    eot None: every sequence has its full length by design (a prompt), and none was cut.
    """
    if eot is None:
        return torch.zeros_like(mask[..., 0])
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)  # (..., 1)
    return mask.any(-1) & (tokens.gather(-1, last).squeeze(-1) != eot)


def step_rewards(dense, logp, start_logp, mask, kl=0.01, limit=10.0):
    """E14: clip(r, +-limit) - kl (log pi - log pi_start), token by token.  All (B, T)."""
    return torch.where(mask, dense.clamp(-limit, limit) - kl * (logp - start_logp), 0.0)


def fined(rewards, mask, fine):
    """rewards, mask (B, T), what each sequence pays at its last token for having been cut (B,) -> (B, T)."""
    last = mask & ~F.pad(mask[:, 1:], (0, 1))
    return rewards - torch.where(last, fine[:, None], 0.0)


# ------------------------------------------------------------------------------------------- advantages (E15)


def advantages(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimates and returns: rewards, values, mask (B, T) -> (B, T), (B, T), zero
    outside.

    V is taken as 0 behind the last token, so nothing is borrowed from beyond the end. lam = gamma = 1 gives
    the Monte-Carlo return minus the value.
    """
    values = torch.where(mask, values, 0.0)
    after = torch.cat((values[:, 1:], torch.zeros_like(values[:, :1])), 1)
    delta = torch.where(mask, rewards + gamma * after - values, 0.0)
    out, running = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + gamma * lam * running  # 0 through the padding behind every sequence
        out[:, t] = running
    return out, torch.where(mask, out + values, 0.0)


def min_returns(dense, logp, start_logp, mask, kl=0.01, fine=None, limit=10.0):
    """The value of a token as the least of the rewards from it on (PURE, Cheng et al., 2025), all (B, T):

        R_t = min_{t' >= t} clip(r_t', +-limit)  -  kl sum_{t' >= t} (log pi - log pi_start)  -  fine

    The exact minimum to go, where the paper sums softmin-weighted rewards, which tends to it with their
    temperature. The price of the KL remains a sum, as it is one over the whole answer. An answer is paid one
    reward, however long it is, so one that was cut gives back one unit: `fine` (B,), of which the sign is
    used.
    """
    least = torch.where(mask, dense.clamp(-limit, limit), float("inf")).flip(-1).cummin(-1).values.flip(-1)
    price = step_rewards(torch.zeros_like(dense), logp, start_logp, mask, kl)
    later = price.flip(-1).cumsum(-1).flip(-1)
    bill = 0.0 if fine is None else fine.sign()[:, None]
    return torch.where(mask, least + later - bill, 0.0)


def by_sum(dense, logp, start_logp, values, mask, kl, gamma, lam, fine):
    """E14 and E15: every token is paid, and answers for the sum of what follows."""
    paid = step_rewards(dense, logp, start_logp, mask, kl)
    paid = paid if fine is None else fined(paid, mask, fine)
    return *advantages(paid, values, mask, gamma, lam), paid.sum(1)


def by_least(dense, logp, start_logp, values, mask, kl, gamma, lam, fine):
    """`min_returns` minus the value; gamma and lambda have no use here."""
    returns = min_returns(dense, logp, start_logp, mask, kl, fine)
    return torch.where(mask, returns - values, 0.0), returns, returns[:, 0]


RETURNS = {"sum": by_sum, "min": by_least}  # name -> what a token answers for; --returns reads the names


def credited(dense, logp, start_logp, values, mask, kl=0.01, gamma=1.0, lam=0.95, fine=None, how="sum"):
    """Advantages before whitening and returns, (B, T) each, and what each answer is paid in all (B,), by a
    name of RETURNS. ValueError on an unknown one."""
    if how not in RETURNS:
        raise ValueError(f"how: expected one of {', '.join(RETURNS)}, got {how!r}")
    return RETURNS[how](dense, logp, start_logp, values, mask, kl, gamma, lam, fine)


def whiten(x, mask):
    """Zero mean, unit variance over the valid tokens of the whole rollout; (B, T) -> (B, T), zero outside."""
    tokens = mask.sum().clamp(min=1)  # divisor
    mean = torch.where(mask, x, 0.0).sum() / tokens
    std = (torch.where(mask, x - mean, 0.0).square().sum() / tokens).sqrt()
    return torch.where(mask, (x - mean) / (std + 1e-8), 0.0)


def experience(dense, logp, start_logp, values, mask, kl=0.01, gamma=1.0, lam=0.95, fine=None, how="sum"):
    """What a rollout teaches, E14 and E15 in one: all (B, T), but `fine` (B,) of `fined`, None where all have
    ended; how: of RETURNS -> whitened advantage, returns, and figures for the log (`reward` is without
    fines)."""
    advantage, returns, paid = credited(dense, logp, start_logp, values, mask, kl, gamma, lam, fine, how)
    share = token_weights(mask)
    reward = (share * step_rewards(dense, logp, start_logp, mask, kl)).sum()
    away = (share * (logp - start_logp)).sum()
    return whiten(advantage, mask), returns, {
        "reward": reward, "reward_learned": reward + kl * away, "return": paid.mean(), "kl": away,
        "length": mask.sum(1).float().mean(), "explained_variance": explained_variance(values, returns, mask)}


# ----------------------------------------------------------------------------------------------- losses (E16)


def token_weights(mask, dtype=torch.float32):
    """What makes a sum a mean over each sequence, then over sequences: 1 / (tokens of the sequence x
    sequences).

    Long answers count no more than short ones.  mask (B, T) -> (B, T) of that type, zero outside; sums to 1.
    """
    lengths = mask.sum(1, keepdim=True)
    sequences = (lengths > 0).sum().clamp(min=1)  # divisor: sequences that have a token
    return mask.to(dtype) / (lengths.clamp(min=1) * sequences)


def ppo_loss(hidden, weight, tokens, mask, old_logp, advantage, clip=0.2, alpha=0.0, rows=slice(None)):
    """The clipped surrogate of E16, - min(ratio A, clip(ratio, 1 +- clip) A), minus alpha times the entropy.

    hidden     (B, T, D) states that predict tokens; weight (V, D); tokens (B, T); mask (B, T) bool
    old_logp   (B, T) log-probs of the policy that sampled; advantage (B, T); both constants
    rows       which of the batch's B sequences `hidden` has (default: all). Loss and figures are then the
               share of these rows: shares of all rows add up to the whole, but for the largest ratio
    returns    loss (scalar, its value is the surrogate's), stats {"clip_fraction", "ratio_max", "entropy",
               "kl_step"}
    """
    share = token_weights(mask, torch.promote_types(advantage.dtype, torch.float32))
    share, tokens, mask, old_logp, advantage = [x[rows] for x in (share, tokens, mask, old_logp, advantage)]
    flat = lambda x: x.flatten()
    with torch.no_grad():
        _, logp, entropy = policy_loss(hidden.detach().flatten(0, 1), weight.detach(), flat(tokens),
                                       flat(mask.to(share.dtype)), flat(mask.to(share.dtype)))
    logp, entropy = logp.view_as(mask), entropy.view_as(mask)
    ratio = torch.where(mask, (logp - old_logp).exp(), 1.0)
    plain, clipped = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    # d min(...) / d log pi: ratio A, or 0 where the clip holds it
    slope = torch.where(plain <= clipped, plain, 0.0)
    loss, _, _ = policy_loss(hidden.flatten(0, 1), weight, flat(tokens), flat(share * slope),
                             flat(alpha * share) if alpha else None)
    surrogate = -(share * torch.minimum(plain, clipped)).sum() - alpha * (share * entropy).sum()
    stats = {"clip_fraction": (share * (plain > clipped)).sum(), "ratio_max": ratio.max(),
             "entropy": (share * entropy).sum(), "kl_step": (share * (old_logp - logp)).sum()}
    return loss + (surrogate - loss).detach(), stats


def value_loss(values, old_values, returns, mask, clip=0.25, rows=slice(None)):
    """E16: 0.5 max((V - R)^2, (V_old + clip(V - V_old) - R)^2), mean a sequence, then over sequences.

    values  (B, T), or those of some `rows` of the batch, whose share it then is; all others (B, T)
    """
    share = token_weights(mask)[rows]
    old_values, returns, mask = [x[rows] for x in (old_values, returns, mask)]
    held = old_values + (values - old_values).clamp(-clip, clip)
    worst = torch.maximum((values - returns) ** 2, (held - returns) ** 2)
    return 0.5 * (share * torch.where(mask, worst, 0.0)).sum()


def explained_variance(values, returns, mask):
    """1 - var(returns - values) / var(returns) over the valid tokens: 1 a perfect critic, 0 a constant
    one."""
    v, r = values[mask], returns[mask]
    return 1 - (r - v).var(correction=0) / r.var(correction=0).clamp(min=1e-12)


def check_start(kl):
    """FloatingPointError with what to change where a rollout's policy has run away from its start."""
    if not kl < KL_LIMIT:
        raise FloatingPointError(f"KL to the starting policy is {kl:.1f} nats a token: raise --kl")


def check_step(ratio):
    """The same for the updates of one rollout."""
    if not ratio < RATIO_LIMIT:
        raise FloatingPointError(f"a probability grew {ratio:.0f}-fold within one rollout: lower --epochs")
