"""The ranking loss: make the order of K scores agree with the order of K preferences (E5, E6).

Plackett-Luce draws a ranking by picking the best with probability softmax(scores), removing it, picking
again, and so on. The loss is the negative log-probability of the ranking that was observed. With K = 2 it is
the logistic loss on a pair.

The usual code sorts by preference, then takes a cumulative log-sum-exp. Here candidate i simply competes with
itself and with everyone strictly worse, a masked K x K table: the same number without ties, and with ties it
says nothing about their order, where sorting code invents one. Most random prompts are equally useless and a
metric often repeats a value, so an invented order would be most of the signal. Nothing is added inside the
logarithm: for scores 40 apart in the right order the loss is 0 and so is its gradient.
"""
import torch


def plackett_luce_loss(scores, preference, valid=None):
    """Negative log-likelihood of the preferred order, ties left unordered (E5; for K = 2 E6).

    scores      (B, K) float, what the model says (any scale; only differences matter)
    preference  (B, K) float, higher is better; only its order is used
    valid       (B, K) bool, False marks a missing candidate in a group of unequal K (default: all there)
    returns     scalar: sum over the candidates of a group, mean over the groups with two or more valid
                candidates

        sum_i [ logsumexp over {i} and {j: preference_j < preference_i} of scores  -  scores_i ]

    A group whose candidates all tie has loss 0 and gradient 0; equal scores without ties give log K!.
    Raises ValueError when the shapes differ.
    """
    shapes = {x.shape for x in (scores, preference, valid) if x is not None}
    if len(shapes) > 1 or scores.dim() != 2:
        raise ValueError(f"expected three (B, K) tensors, got scores {tuple(scores.shape)}, preference "
                         f"{tuple(preference.shape)}, valid {None if valid is None else tuple(valid.shape)}")
    b, k = scores.shape
    scores = scores if scores.dtype == torch.float64 else scores.float()  # fp32 under half precision
    rivals = preference[:, None, :] < preference[:, :, None]  # (B, K, K): [b, i, j]: j is worse than i
    groups = max(1, b)  # divisor: groups in which there is something to rank
    if valid is not None:
        scores = scores.masked_fill(~valid, 0.0)  # what stands in a missing slot, inf or nan too, stays out
        rivals = rivals & valid[:, None, :] & valid[:, :, None]
        groups = (valid.sum(-1) >= 2).sum().clamp(min=1)
    rivals = rivals | torch.eye(k, dtype=torch.bool, device=scores.device)  # and itself
    # Differences first, so that the candidate itself is an exact 0 and a gap of 1e4 keeps its small digits.
    gap = scores[:, None, :] - scores[:, :, None]  # (B, K, K): score_j - score_i
    return torch.where(rivals, gap, float("-inf")).logsumexp(-1).sum() / groups
