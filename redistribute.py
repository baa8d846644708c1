"""One score an answer, read off into token rewards without learning any: is credit learned, or read off?

A reward that was fitted to whole answers (read at the last token alone, guidance bandit) is a net that can be
asked for more than its score:

    RED  r_t = R(y_1..t) - R(y_1..t-1)  what reading token t changed (Li et al., 2024). R of the empty answer
                                        is read at the start token. The sum telescopes to R(y) - R()
    ABC  r_t = a_t R(y)                 a: the attention of the last token in the last block, mean over the
                                        heads (Chan et al., 2024). The sum is R(y)

Both pay the whole score once, so neither pays for length as such. Chosen plain where the papers leave room:
ABC's attention also falls on prompt and start token; its share of the answer's own tokens is scaled to sum to
1. Both papers may mix the result with the score at the end; here nothing is mixed.
"""
import functools

import torch
import torch.nn.functional as F

from model import apart, evaluating, read_candidates, with_start
from reward import bound
from support.distributed import shared


@torch.no_grad()
def prefix_scores(reward, tokens, context=None):
    """R of every prefix of an answer, the empty one first: tokens (B, K, T), context as in `TokenReward` ->
    (B, K, T+1), constants, in eval mode."""
    with evaluating(reward):
        nothing = apart(functools.partial(empty_score, reward), context, tokens[..., :1], most=reward.at_once)
        return torch.cat((nothing, reward.guide(tokens, context)), -1)


def empty_score(reward, context, tokens):
    """R of the empty answer, where the start token alone was read: tokens (B, K, 1), which only say how many
    there are, -> (B, K, 1)."""
    hidden, _ = read_candidates(reward.body, tokens, reward.start, context)  # (B, K, 1, D)
    nothing = F.pad(hidden[..., :1, :], (0, int(reward.foreseen)))  # the start token was not foreseen: a 0
    return bound(reward.mlp(nothing).squeeze(-1).float(), reward.how)


def differences(reward, tokens, mask, context=None, level=0.0, unit=1.0):
    """RED: tokens, mask (B, K, T) -> (B, K, T), 0 outside the mask. Scores are (R - level) / unit, a level
    that cancels here."""
    scores = prefix_scores(reward, tokens, context) / unit  # (B, K, T+1), divisor: the unit of a score
    return torch.where(mask, scores[..., 1:] - scores[..., :-1], 0.0)


def attention_shares(reward, tokens, mask, context=None, level=0.0, unit=1.0):
    """ABC: tokens, mask (B, K, T) -> (B, K, T), 0 outside the mask; scores as in `differences`."""
    last = mask & ~F.pad(mask[..., 1:], (0, 1))
    score = torch.where(last, reward.guide(tokens, context), 0.0).sum(-1, keepdim=True)  # (B, K, 1)
    return last_attention(reward.body, tokens, mask, reward.start, context) * (score - level) / unit


@torch.no_grad()
def last_attention(body, tokens, mask, start, context=None):
    """What the last token of each answer looks at in the last block, mean over the heads, as shares of the
    answer's own tokens: tokens, mask (B, K, T) -> (B, K, T), which sum to 1 over the mask."""
    rows, length, answer = as_rows(tokens, mask, start, context)  # (N, S), (N,), (N, T), N = B K
    look = lambda rows, length: body.last_attention(rows, length).mean(1).float()  # (n, H, S) -> (n, S)
    with evaluating(body):
        weights = shared(look, rows, length)
    own = torch.where(mask.flatten(0, 1), weights.gather(1, answer), 0.0)  # (N, T)
    # divisor: what falls on the answer itself
    return (own / own.sum(1, keepdim=True).clamp(min=1e-12)).view(mask.shape)


def as_rows(tokens, mask, start, context=None):
    """[context, start, answer] of each candidate without the padding between them: ids (N, S) with padding at
    the end, their length (N,), and where in them the answer's tokens stand (N, T).  N = B K."""
    b, k, t = tokens.shape
    own, real = with_start(tokens, start).flatten(0, 1), F.pad(mask, (1, 0), value=True).flatten(0, 1)
    before = torch.zeros(b * k, dtype=torch.long, device=tokens.device)  # (N,) tokens of the context
    if context is not None:
        said, seen = [x.repeat_interleave(k, 0) for x in context]  # (B, P) -> (N, P)
        own, real, before = torch.cat((said, own), 1), torch.cat((seen, real), 1), seen.sum(1)
    order = (~real).int().argsort(dim=1, stable=True)  # real tokens first, in their order
    place = before[:, None] + 1 + torch.arange(t, device=tokens.device)  # (N, T)
    return own.gather(1, order), real.sum(1), place.clamp(max=own.shape[1] - 1)
