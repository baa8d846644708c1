"""Setting 1, no supervised data: REINFORCE with a reward at every token, plus maximum entropy (E7, E8).

    L = mean over valid tokens of [ - r_t log pi(a_t | s_t)  -  alpha H(pi(. | s_t)) ]

The paper feeds the immediate reward r(s_t, a_t), positive, without a baseline: every sampled token is pushed
up, good ones harder, and only the softmax and the entropy push back. That is what `reinforce_loss` computes
by default. `shape_rewards` holds the variants that a flag of train.py selects: the reward-to-go (a token
answers for what follows it), its mean, and centring and scaling over the batch, which turns "up, or up
harder" into "better or worse than the others of this batch". train.py centres and scales by default: with a
few hundred updates instead of 12,000 the common push is mostly variance.

After a warm start a learned reward also pays --kl less for every nat that a token is away from the start
(E14, as PPO does; `objective.near_start`). Such a reward has seen samples of the warm start and little else:
what it says of an empty summary, or of the same right word four times over, is as high as for the right one,
and a policy that nothing holds gets there within tens of updates, after having been right for a while. METEOR
of the embedded summaries on test, from 0.94 after the warm start: 0.05 with --kl 0 (seed 1), 0.999 with 0.3
(seeds 1 to 3). Bandit guidance asks the task itself and needs no such price; a prompt's policy starts from
nothing worth staying near; and rewards of annotated answers have seen better ones than the start's (a short
run on the edits, seed 1: win rate 0.81 without the price, 0.73 with it).
"""
import torch

from fused import policy_loss


def reinforce_loss(hidden, weight, tokens, mask, rewards, alpha=0.125, rows=slice(None)):
    """E7 + E8 as a mean over the valid tokens of the batch.

    hidden   (B, T, D) states that PREDICT tokens; weight (V, D) output head
    tokens   (B, T) int64, sampled from the policy; mask (B, T) bool, end-of-text included
    rewards  (B, T) float, constants; alpha >= 0 in units of reward per nat
    rows     which of the batch's B sequences `hidden` has (default: all). The loss and its figures are then
             the share of these rows: shares of all rows add up to the whole, whose divisors they have
    returns  loss (scalar), stats {"logp", "entropy", "reward"}, 0-dim tensors (no host sync): the mean reward
             of the valid tokens, the others of those that carry a weight (policy_loss skips the rest)

    log pi is that of the full softmax, also when sampling was top-k, as in the paper. No valid token: loss 0.
    """
    credit = torch.where(mask, rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32)), 0.0)
    valid = mask.to(credit.dtype)
    # divisor: every token weighs the same, in short and long sequences
    tokens_in_batch = valid.sum().clamp(min=1)
    of_rows = lambda x: x[rows].flatten()
    loss, logp, entropy = policy_loss(hidden.flatten(0, 1), weight, of_rows(tokens),
                                      of_rows(credit / tokens_in_batch),
                                      of_rows(alpha * valid / tokens_in_batch))
    carried = (mask & ((credit != 0) | (alpha != 0))).sum().clamp(min=1)
    stats = {"logp": logp.sum() / carried, "entropy": entropy.sum() / carried}
    return loss, stats | {"reward": credit[rows].sum() / tokens_in_batch}


def reinforce(hidden, weight, tokens, mask, weights, c, share, rows=slice(None)):
    """`reinforce_loss` by the flags.  share: of --alpha that is left at this update (--hold)."""
    return reinforce_loss(hidden, weight, tokens, mask, weights, alpha=c.alpha * share, rows=rows)


def first_words(hidden, weight, rewards):
    """E7 at the first place of a prompt, exactly: - sum over all words of pi(a | s_0) r(s_0, a).

    hidden   (D,) the state that predicts first words; weight (V, D) output head
    rewards  (V,) r(s_0, a) of every word, constants
    returns  scalar, float32 or better

    All prompts begin in the same state, so that what samples estimate there can be summed (an all-action
    gradient; Sutton et al., 2001; Ciosek and Whiteson, 2018). Of 8,000 equally likely words 64 samples hold
    the one good one once in a hundred updates, and in between the noise of the others has covered its trace.
    """
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))  # (V,)
    return -(logits.softmax(-1) * rewards.detach()).sum()


def shaped(rewards, mask, c):
    """`shape_rewards` by the flags: (B, K, T) -> (B, K, T)."""
    return shape_rewards(rewards, mask, c.weights)


def centred(rewards, mask, c):
    """The same, and with --center standardised over all tokens that are given."""
    weights = shaped(rewards, mask, c)
    return standardize(weights, mask) if c.center else weights


def to_go(rewards, mask, mean=False):
    """sum of the rewards from t to the end of the sequence, or their mean.  (B, T) -> (B, T), zero outside
    the mask."""
    rewards = torch.where(mask, rewards, 0.0)
    total = rewards.flip(-1).cumsum(-1).flip(-1)
    if mean:
        total = total / mask.flip(-1).cumsum(-1).flip(-1).clamp(min=1)  # divisor: tokens from t to the end
    return torch.where(mask, total, 0.0)


def immediate(rewards, mask):
    """r_t, the paper's choice."""
    return rewards


def mean_to_go(rewards, mask):
    """The mean of r_t ... r_T: a token answers for the quality of what it starts, whatever its length."""
    return to_go(rewards, mask, mean=True)


def both(rewards, mask):
    """r_t times that mean: a token answers for itself, and for what it starts. Of rewards that the price of
    leaving the start has made negative the smaller of the two: two minus signs are not to make a plus."""
    found = mean_to_go(rewards, mask)
    positive = (rewards > 0) & (found > 0)
    return torch.where(positive, rewards * found, torch.minimum(rewards, found))


def whole_sequence(rewards, mask):
    """The mean of r over all of the sequence at each of its tokens: no credit assignment, for comparison."""
    total = torch.where(mask, rewards, 0.0).sum(-1, keepdim=True)
    return (total / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(rewards)  # divisor: its tokens


# name -> f(rewards (B, T), mask) -> (B, T). What a token answers for is a function and a line; --weights
# reads the names.
WEIGHTS = {"immediate": immediate, "to_go": to_go, "mean_to_go": mean_to_go, "both": both,
           "sequence": whole_sequence}


def shape_rewards(rewards, mask, weights="immediate"):
    """Token rewards -> token weights: what a token answers for, by a name of WEIGHTS.  (B, T) -> (B, T), zero
    outside the mask. ValueError on an unknown name."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    return torch.where(mask, WEIGHTS[weights](rewards, mask), 0.0)


# ------------------------------------------------------------ one number an answer: what it is compared with


def away_from_group(scores):
    """Scores (B, K) minus the mean of their group, and K - 1, the others of a group, or 1."""
    return scores - scores.mean(1, keepdim=True), max(1, scores.shape[1] - 1)


def leave_one_out(scores, floor):
    """Minus the mean of the K - 1 others of its group (RLOO; Kool et al., 2019; Ahmadian et al., 2024). What
    an answer is compared with does not hang on the answer itself, which keeps the gradient unbiased. Nothing
    is divided: the result is in units of the score, and so is --alpha."""
    away, others = away_from_group(scores)
    return away * scores.shape[1] / others  # divisor: the K - 1 others


def in_group(scores, floor):
    """Minus the mean of its group, over the group's standard deviation (GRPO; Shao et al., 2024): an input
    whose answers are all nearly as good counts as much as any other. With one group, as in the prompt task,
    this is `z_scored`."""
    away, others = away_from_group(scores)
    std = (away.square().sum(1, keepdim=True) / others).sqrt()
    # divisor: the group's (unbiased) standard deviation, or the floor
    return away / std.clamp(min=max(floor, 1e-6))


def z_scored(preference, floor=0.0):
    """Preferences (B, K) with zero mean and unit deviation over all of them: what bandit guidance pays.

    Deviations below `floor`, in the preference's own units, are not blown up to full strength, for the same
    reason as in `standardize`. The floor is --resolution: what differs by less is a tie for the fit too.
    """
    # divisor: the preferences' standard deviation, or the floor
    return (preference - preference.mean()) / preference.std().clamp(min=max(floor, 1e-6))


BASELINES = {"batch": z_scored, "rloo": leave_one_out, "group": in_group}  # name -> f(scores, floor)


def compared(scores, how="batch", floor=0.0):
    """Scores of whole answers -> what each of an answer's tokens is paid (bandit guidance).

    scores   (B, K) float, K answers to each of B inputs
    how      a name of BASELINES: what an answer is compared with
    floor    standard deviations below it, in units of score, are not blown up to full strength
    returns  (B, K); 0 for the only answer of a group. ValueError on an unknown `how`
    """
    if how not in BASELINES:
        raise ValueError(f"how: expected one of {', '.join(BASELINES)}, got {how!r}")
    return BASELINES[how](scores, floor)


def standardize(x, mask, floor=0.3, others=None):
    """Zero mean and unit variance over the valid tokens of the batch; a constant batch becomes 0 and moves
    nothing.

    Differences below `floor` (a standard deviation, in units of reward) are not blown up to full strength:
    otherwise a policy that has nearly settled is pushed on by the last digits of r until nothing is left to
    explore, and the entropy term, which is in units of reward too, could never hold it.

    others: rewards of any shape that are brought to the same zero and scale and returned instead
    """
    n = mask.sum().clamp(min=1)  # divisor: valid tokens of the whole batch
    # minus the largest: a constant is now 0, without a lost digit
    largest = torch.where(mask, x, float("-inf")).amax()
    x = torch.where(mask, x - largest, 0.0)
    mean = x.sum() / n
    centred = torch.where(mask, x - mean, 0.0)
    std = (centred.square().sum() / n).sqrt()
    centred = centred if others is None else others - largest - mean
    return centred / std.clamp(min=floor)
