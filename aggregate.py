"""f: many token rewards become one score a sequence (E3, E4).

People compare whole sequences, so a token reward can only be judged through a summary of the tokens. Which
summary is the one modelling choice of the method: the mean says "every token counts a little", the soft
maximum "one good token is enough", the soft minimum "one bad token spoils it". Learning inverts it: whatever
f is sensitive to gets the credit.

What the paper does, and what can be switched off here to see why it matters:
- `avg`, `min` and `max` are multiplied by T_bar, the mean length of the K siblings (`scale=False`: the
  poster's form). Within a group it is one constant, so it never changes the order; it acts as the inverse
  temperature of the ranking.
- The log-sum-exp is not divided by the length, so `max` prefers long and `min` prefers short sequences even
  when every token is equally good. `length_neutral=True` takes the log-MEAN-exp instead: equal rewards, equal
  scores, any length.
"""
import torch


def mean_reward(rewards, mask, beta):
    """E3, first form: "every token counts a little"."""
    return total_reward(rewards, mask, beta) / mask.sum(-1).clamp(min=1)  # divisor: tokens of the candidate


def total_reward(rewards, mask, beta):
    """E3 without the mean."""
    return rewards.masked_fill(~mask, 0.0).sum(-1)


def soft_max(rewards, mask, beta):
    """E4: beta * log sum_t exp(r_t / beta), "one good token is enough".

    Pads leave BEFORE the sum, as -inf in the exponent. A row of nothing but -inf would have NaN gradients, so
    the pads of a candidate without tokens are zeros here, and its score becomes 0 in the caller.
    """
    some = mask.sum(-1) > 0  # (..., K), a third of the time of mask.any(-1) at 64 x 5 x 64 on a CPU
    out = torch.where(some, float("-inf"), 0.0)[..., None]  # (..., K, 1)
    return beta * torch.where(mask, rewards / beta, out.to(rewards.dtype)).logsumexp(-1)


def soft_min(rewards, mask, beta):
    """E4: the soft maximum at a negative temperature, "one bad token spoils it"."""
    return soft_max(rewards, mask, -beta)


# name -> f(rewards (..., K, T) float, mask, beta) -> (..., K). A new f is a function and a line; --agg reads
# the names.
CHOICES = {"avg": mean_reward, "sum": total_reward, "min": soft_min, "max": soft_max}
SIGN = {"min": -1, "max": 1}  # of the temperature, for those that have one


def aggregate(rewards, mask, how="avg", beta=2.0, scale=True, length_neutral=False):
    """Masked token rewards -> one score a candidate (E3, E4).

    rewards  (..., K, T) float, K candidates of the same input, T token positions
    mask     (..., K, T) bool, True on the tokens that count (built from lengths, end-of-text included)
    how      a name of CHOICES; "min" and "max" are soft, with temperature `beta` in units of reward
    scale    multiply by T_bar, the mean length of the candidates of a group ("sum" never is, as in the paper)
    returns  (..., K) scores, float32 for half inputs

    A candidate without tokens scores 0, gets zero gradient, and T_bar ignores it. Raises ValueError on an
    unknown `how`, a `beta` that is not positive, `length_neutral` with another f than "min" or "max", or
    shapes that do not fit. Example, mask all true, one group of two: rewards [[1, 3], [2, 2]] -> avg [4, 4],
    sum [4, 4].
    """
    if how not in CHOICES:
        raise ValueError(f"how: expected one of {', '.join(CHOICES)}, got {how!r}")
    if how in SIGN and not beta > 0:
        raise ValueError(f"beta: expected a positive temperature, got {beta!r}")
    if length_neutral and how not in SIGN:
        raise ValueError(f"length_neutral: only min and max depend on length by a log T, got how={how!r}")
    if rewards.shape != mask.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and mask {tuple(mask.shape)} differ")
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()  # fp32 under half precision
    length = mask.sum(-1).to(rewards.dtype)  # (..., K)
    score = CHOICES[how](rewards, mask, beta)
    if length_neutral:
        score = score - SIGN[how] * beta * length.clamp(min=1).log()
    empty = length == 0
    score = score.masked_fill(empty, 0.0)
    if not scale or how == "sum":
        return score
    siblings = (~empty).sum(-1, keepdim=True).clamp(min=1)
    t_bar = length.sum(-1, keepdim=True) / siblings  # (..., 1), divisor: siblings that have a token
    return t_bar * score
