"""DPO: a policy fitted to pairs of answers, and the token rewards that hide in it (Rafailov et al., 2023).

    score(y) = beta sum_t [ log pi(y_t) - log pi_start(y_t) ]
    L = - log sigmoid(score(y+) - score(y-))

That is E6 with a policy in the place of the reward net, so K ranked answers instead of two take E5, which the
DPO paper's appendix writes down too. The score is a sum over tokens: each summand is a reward of its token,
learned from nothing but the order of whole answers. `--guidance implicit` pays them inside the same PPO as
any other reward (RTO, Zhong et al., 2024; PRIME, Cui et al., 2025, fits the same ratio to right and wrong).

The loss is not linear in log-probs, yet it goes through the one fused op, as PPO's does: once the scores are
known, so is the loss's slope for each of them, and a second pass weighs every log-prob with it
(`fused.log_probs`).
"""
import copy

import torch
import torch.nn as nn

from fused import log_probs
from model import apart, evaluating, read_candidates
from plackett_luce import plackett_luce_loss


def dpo_loss(hidden, weight, tokens, mask, start_logp, groups, preference, beta=0.1):
    """DPO on ranked answers; for two of them the formula above.

    hidden      (N, T, D) states that PREDICT tokens (N, T); weight (V, D) output head; mask (N, T) bool
    start_logp  (N, T) log pi_start of the tokens, constants; beta: in units of score a nat
    groups      (n, K) rows of the N that are compared, preference (n, K), higher is better, ties left alone
    returns     loss (scalar), scores (N,), constants
    """
    logp = log_probs(hidden.flatten(0, 1), weight, tokens.flatten(), mask.flatten()).view_as(mask)
    return ratio_loss(logp, mask, start_logp, groups, preference, beta)


def ratio_loss(logp, mask, start_logp, groups, preference, beta=0.1):
    """The same of the log-probs (N, T) themselves."""
    ratio = torch.where(mask, logp - start_logp, 0.0)  # (N, T), nats
    scores = beta * ratio.sum(-1)  # (N,)
    return plackett_luce_loss(scores[groups], preference), scores.detach()


class ImplicitReward(nn.Module):
    """r_t = beta (log pi - log pi_start) of a policy `body` beside the policy that it started as.

    It stands in for `reward.TokenReward`: the same layout, `guide` and fit, but no bound and no head of its
    own. n_ids: ids from here on are never sampled, and the softmax runs over the others (None: all).
    """
    at_once = 0  # sequences a pass (0: all)

    def __init__(self, body, start, beta=0.1, n_ids=None):
        super().__init__()
        self.body, self.start, self.beta, self.n_ids = body, start, beta, n_ids
        self.reference = copy.deepcopy(body).requires_grad_(False).eval()

    @property
    def bodies(self):
        """The nets that a warm start is loaded into: both, and every log-ratio begins at 0."""
        return [self.body, self.reference]

    def train(self, mode=True):
        """As ever, but the reference never has dropout."""
        super().train(mode)
        self.reference.eval()
        return self

    def log_probs(self, net, tokens, mask, context=None):
        """log pi of tokens (B, K, T) under one of the two nets: (B, K, T) float32, 0 outside the mask.
        Processes share it out, as `TokenReward.logits`."""
        def read(context, tokens, mask):
            predict, _ = read_candidates(net, tokens, self.start, context)  # (b, K, T, D)
            return log_probs(predict.flatten(0, 2), net.head[:self.n_ids], tokens.flatten(),
                             mask.flatten()).view_as(tokens)
        return apart(read, context, tokens, mask, most=self.at_once)

    @torch.no_grad()
    def forward(self, tokens, context=None):
        """tokens (B, K, T) -> rewards (B, K, T), constants: what learns is `dpo_loss`, not this."""
        every = torch.ones_like(tokens, dtype=torch.bool)
        now, start = [self.log_probs(net, tokens, every, context) for net in (self.body, self.reference)]
        return self.beta * (now - start)

    def guide(self, tokens, context=None):
        """The same in eval mode, as TokenReward has it."""
        with evaluating(self):
            return self(tokens, context)


def implicit_loss(reward, batch, subsets):
    """`dpo_loss` as the fit calls it: an ImplicitReward, reward.Candidates (B, K', T), subsets (n, K) of
    their B K' -> scalar."""
    answers = batch.tokens, batch.mask, batch.prefix()
    with torch.no_grad():
        start = reward.log_probs(reward.reference, *answers)  # (B, K', T)
    logp = reward.log_probs(reward.body, *answers)
    logp, mask, start = [x.flatten(0, 1) for x in (logp, batch.mask, start)]  # (B K', T)
    return ratio_loss(logp, mask, start, subsets, batch.preference.flatten()[subsets], reward.beta)[0]
