"""Setting 2, with supervised data: maximum likelihood on the references, every token weighted by its reward
(E9).

    w_t = m_t r_t / sum_t' m_t' r_t',      L = mean over sequences of  - sum_t w_t log pi(y_t | y_<t, x)

The reward says which tokens of a reference deserve to be imitated. Two choices hide in the formula, and they
decide whether it helps; both are arguments here and flags of train.py.

`norm`: E9 divides by the reward sum of the sequence. Then the weights of every reference sum to one, and a
reference that is bad throughout teaches exactly as much as a perfect one: only the order WITHIN a sequence
survives. Dividing by the number of tokens instead keeps the level, so good references count more than bad
ones.

what a token answers for (`weights` of train.py, `policy_reinforce.shape_rewards`): the immediate r_t is read
by a causal net that has not seen the rest. When a reference turns bad after an innocent word ("while ..."),
that word can keep a high reward as long as every order of candidates is explained by the words behind it; yet
it was the decision, and greedy decoding asks about decisions only. The mean of r from t to the end hands the
blame back to it. But a wrong word with right ones behind it has a high mean to go: where most references make
the same mistake, it would still be learned. So the default is their product: a token answers for itself and
for what it starts. In the embedded world (seed 1, 1,200 training references, r as a run left it) all weight
on right words over that on their usual wrong ones, and all weight on stopping over that on "while": immediate
22 and 0.7, mean to go 0.8 and 2.0, both 51 and 2.2; above 1 the right one wins. The function's own defaults
are the paper's.

With rewards of 1 and either norm this is the per-sequence mean of the negative log-likelihood (`--objective
mle`), not the token mean: the right baseline, or the comparison would measure the normalisation.
"""
import torch

from fused import policy_loss

# name -> divisor (..., 1) of a sequence, of its rewards (..., T), zero outside the mask, and length (..., 1)
NORMS = {"rewards": lambda rewards, length: rewards.sum(-1, keepdim=True),  # E9
         "length": lambda rewards, length: length}


def normalized(rewards, mask, norm="rewards"):
    """w of E9: rewards (..., T), constants, mask -> weights (..., T), zero outside. ValueError on an unknown
    norm."""
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    rewards = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    rewards = torch.where(mask, rewards, 0.0)
    total = NORMS[norm](rewards, mask.sum(-1, keepdim=True).to(rewards.dtype))  # (..., 1)
    # divisor: the sequence's own reward sum, or its length
    return rewards / torch.where(total > 0, total, 1.0)


def weighted_mle(hidden, weight, tokens, mask, weights, c, share, rows=slice(None)):
    """`weighted_mle_loss` by the flags. It has no entropy, so no share of one."""
    return weighted_mle_loss(hidden, weight, tokens, mask, weights, norm=c.wmle_norm, rows=rows)


def shown_mle(run, samples, weights):
    """What samples.jsonl shows: w of E9 for the shaped rewards (B, K, T) of the shown sequences."""
    return normalized(weights, samples.mask, run.c.wmle_norm)


def weighted_mle_loss(hidden, weight, tokens, mask, rewards, norm="rewards", rows=slice(None)):
    """E9, a mean over the sequences that have a token.

    hidden   (B, T, D) states that PREDICT tokens; weight (V, D) output head
    tokens   (B, T) int64 references, mask (B, T) bool, end-of-text included
    rewards  (B, T) float >= 0, constants; their scale cancels with norm="rewards"
    norm     "rewards": divide by the sequence's reward sum (E9); "length": by its number of tokens
    rows     which of the batch's B sequences `hidden` has (default: all). The loss and its figures are then
             the share of these rows: shares of all rows add up to the whole, whose divisors they have
    returns  loss (scalar), stats {"nll": mean over the tokens that carry a weight (policy_loss skips the
             others), "weight": mean weight a sequence, "ess", "share"}: 0-dim tensors;
             ess is the effective share of a sequence's tokens, (sum w)^2 / (T sum w^2): 1 when all weigh the
             same; share is that of all tokens of the batch, of w over plain MLE's 1 / T: 1 when the loss is
             plain MLE

    A sequence whose rewards are all 0 has no weights to normalise and contributes 0. ValueError on an unknown
    norm.
    """
    w = normalized(rewards, mask, norm)  # (B, T)
    length = mask.sum(-1, keepdim=True)  # (B, 1)
    sequences = (length > 0).sum().clamp(min=1)  # divisor: sequences that have a token
    every = torch.where(mask, w, 0.0) / sequences
    over = w * length  # (B, T) over plain MLE's weight, which is 1 / T
    loss, logp, _ = policy_loss(hidden.flatten(0, 1), weight, tokens[rows].flatten(), every[rows].flatten())
    weighted, squares = (every > 0).flatten(), length[:, 0] * w.square().sum(-1)
    alike = (mask.sum() * over.square().sum()).clamp(min=1e-12)
    ess = w.sum(-1).square() / squares.clamp(min=1e-12)  # (B,)
    stats = {"nll": -logp.sum() / weighted.sum().clamp(min=1), "weight": w[rows].sum() / sequences,
             "share": over[rows].sum() * over.sum() / alike, "ess": ess[rows].sum() / sequences}
    return loss, stats
