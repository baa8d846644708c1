"""policy_ppo.py and the segments of reward.py: E11-E16 by hand on two sequences, and what the
kinds of guidance share."""
import math

import pytest
import torch
from reference import mask_of

from policy_ppo import (advantages, check_start, check_step, experience, explained_variance, fit_normalizer,
                        normalize, places, ppo_loss, spread, step_rewards, token_weights, value_loss,
                        was_cut, whiten)
from policy_reinforce import reinforce_loss
from reward import segment_ends

F64 = dict(dtype=torch.float64)
MASK = mask_of(4, 3, width=4)
ENTROPY = torch.tensor([[0.1, 2.0, 0.3, 0.2], [1.5, 0.0, 0.4, 9.0]], **F64)
ENDS = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]]).bool()  # at 1.0 nats; the last valid token always


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64)


# --------------------------------------------------------------------------------------------- segments (E11)

def test_segments_by_hand():
    assert torch.equal(segment_ends(ENTROPY, MASK, 1.0), ENDS)


def test_threshold_zero_is_token_and_a_huge_one_bandit():
    # rounding may leave an entropy below zero
    assert torch.equal(segment_ends(ENTROPY - 1e-9, MASK, 0.0), MASK)
    last = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]]).bool()
    assert torch.equal(segment_ends(ENTROPY, MASK, 1e9), last)
    assert torch.equal(segment_ends(ENTROPY, MASK, float("inf")), last)


def test_no_segment_ends_in_padding():
    assert not (segment_ends(torch.full((2, 4), 5.0), MASK, 0.0) & ~MASK).any()


# ----------------------------------------------------------------------------------- dense rewards (E13, E14)

def test_places_by_hand():
    torch.testing.assert_close(places(ENDS).double(), torch.tensor([[.5, .5, 1, 1], [.5, 1, 1, 1.5]], **F64))


def test_normalizer_by_hand():
    # two places, p = 1/2 and 1: means 2 and 5, deviations 1 and 3; two points determine the lines
    rewards, ends = torch.tensor([[1.0, 2.0], [3.0, 8.0]], **F64), torch.ones(2, 2).bool()
    line = fit_normalizer(rewards, ends)
    slope = lambda half, one: (one - half) / math.log(2)
    torch.testing.assert_close(line[:4], torch.tensor([slope(2, 5), 5, slope(1, 3), 3], **F64))
    torch.testing.assert_close(normalize(rewards, ends, line),
                               torch.tensor([[-1.0, -1.0], [1.0, 1.0]], **F64))


def test_normalizer_of_a_single_place_is_mean_and_deviation():
    rewards, ends = torch.tensor([[0.0, 1.0], [0.0, 5.0]], **F64), torch.tensor([[0, 1], [0, 1]]).bool()
    got = normalize(rewards, ends, fit_normalizer(rewards, ends))
    torch.testing.assert_close(got[:, 1], torch.tensor([-1.0, 1.0], **F64))


def test_spread_of_the_line_never_falls_below_its_floor():
    line = torch.tensor([0.0, 0.0, 5.0, 1.0, 0.2], **F64)  # 5 log p + 1 is negative at p = 1/2
    got = normalize(torch.ones(1, 2, **F64), torch.ones(1, 2).bool(), line)
    torch.testing.assert_close(got, torch.tensor([[5.0, 1.0]], **F64))


def test_even_split_by_hand_and_its_sum():
    rewards = torch.tensor([[9.0, 3.0, 9.0, 5.0], [2.0, 9.0, 8.0, 9.0]], **F64)
    got = spread(rewards, ENDS, MASK)
    torch.testing.assert_close(got, torch.tensor([[1.5, 1.5, 2.5, 2.5], [2.0, 4.0, 4.0, 0.0]], **F64))
    torch.testing.assert_close(got.sum(1), torch.where(ENDS, rewards, 0.0).sum(1))


def test_one_segment_is_paid_at_its_end():
    rewards, last = randn(2, 4), segment_ends(ENTROPY, MASK, 1e9)
    assert torch.equal(spread(rewards, last, MASK), torch.where(last, rewards, 0.0))


def test_every_token_a_segment_is_the_reward_itself():
    rewards = randn(2, 4)
    assert torch.equal(spread(rewards, MASK, MASK), torch.where(MASK, rewards, 0.0))


def test_step_rewards_by_hand():
    got = step_rewards(torch.tensor([[12.0, -20.0, 1.0]]), torch.tensor([[-1.0, -2.0, -3.0]]),
                       torch.tensor([[-2.0, -2.0, -1.0]]), mask_of(2, width=3), kl=0.5)
    torch.testing.assert_close(got, torch.tensor([[10 - 0.5, -10.0, 0.0]]))


# ------------------------------------------------------------------------------------------- advantages (E15)

def test_advantages_by_hand():
    # values 1, 2; rewards 1, 3; gamma .5, lambda .5:
    # delta_1 = 3 - 2 = 1, delta_0 = 1 + .5*2 - 1 = 1, A_0 = 1 + .25*1
    got, returns = advantages(torch.tensor([[1.0, 3.0, 7.0]]), torch.tensor([[1.0, 2.0, 9.0]]),
                              mask_of(2, width=3), 0.5, 0.5)
    torch.testing.assert_close(got, torch.tensor([[1.25, 1.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.25, 3.0, 0.0]]))


def test_lambda_one_is_the_monte_carlo_return_minus_the_value():
    rewards, values = torch.where(MASK, randn(2, 4), 0.0), randn(2, 4, seed=1)
    got, returns = advantages(rewards, values, MASK, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(got, torch.where(MASK, to_go - values, 0.0))
    torch.testing.assert_close(returns, torch.where(MASK, to_go, 0.0))


def test_whitened_over_the_rollout():
    got = whiten(randn(2, 4), MASK)
    assert (abs(got[MASK].mean()) < 1e-9 and abs(got[MASK].std(correction=0) - 1) < 1e-6
            and (got[~MASK] == 0).all())


def test_an_answer_was_cut_where_its_last_token_is_not_end_of_text():
    tokens, mask = torch.tensor([[1, 9, 9], [1, 2, 9], [9, 1, 2], [1, 2, 3]]), mask_of(2, 2, 3, 0, width=3)
    assert was_cut(tokens, mask, 9).tolist() == [False, True, True, False]
    assert was_cut(tokens, mask, None).tolist() == [False] * 4  # a full length by design


def test_a_cut_answer_pays_at_its_last_token():
    # gamma = lambda = 1, values 0: a return is the sum of the rewards from there on
    rewards, zero, mask = torch.ones(2, 3, **F64), torch.zeros(2, 3, **F64), mask_of(2, 3, width=3)
    _, free, figures = experience(rewards, zero, zero, zero, mask, 0.0, 1.0, 1.0)
    _, returns, paid = experience(rewards, zero, zero, zero, mask, 0.0, 1.0, 1.0,
                                  torch.tensor([7.0, 0.0], **F64))
    assert free.tolist() == [[2, 1, 0], [3, 2, 1]] and returns.tolist() == [[-5, -6, 0], [3, 2, 1]]
    # of two sequences
    assert figures["reward"] == paid["reward"] and figures["return"] - paid["return"] == 3.5


# ----------------------------------------------------------------------------------------------- losses (E16)

def problem(mask=MASK, d=5, v=11):
    n, t = mask.shape
    hidden, weight = randn(n, t, d).requires_grad_(), randn(v, d, seed=1).requires_grad_()
    tokens = torch.randint(v, (n, t), generator=torch.Generator().manual_seed(2))
    logp = (hidden @ weight.t()).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    return hidden, weight, tokens, logp


def by_hand(hidden, weight, tokens, mask, old, advantage, clip):
    """E16 written out, differentiated by autograd: mean over each sequence, then over sequences."""
    logp = (hidden @ weight.t()).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    ratio = (logp - old).exp()
    each = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -torch.stack([row[m].mean() for row, m in zip(each, mask)]).mean()


def test_loss_and_gradient_equal_the_formula():
    hidden, weight, tokens, logp = problem()
    old, advantage = (logp + 0.4 * randn(2, 4, seed=3)).detach(), randn(2, 4, seed=4)
    expected = by_hand(hidden, weight, tokens, MASK, old, advantage, 0.2)
    got, stats = ppo_loss(hidden, weight, tokens, MASK, old, advantage, 0.2)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, (hidden, weight)),
                               torch.autograd.grad(expected, (hidden, weight)))
    assert 0 < stats["clip_fraction"] < 1


def test_clipped_tokens_get_no_gradient_and_others_do():
    hidden, weight, tokens, logp = problem(mask_of(2, width=2))
    old = logp.detach() - torch.tensor([[1.0, 1.0]], **F64)  # ratio e for both
    loss, stats = ppo_loss(hidden, weight, tokens, mask_of(2, width=2), old,
                           torch.tensor([[1.0, -1.0]], **F64))
    grad, = torch.autograd.grad(loss, hidden)
    assert (grad[0, 0] == 0).all() and (grad[0, 1] != 0).any() and stats["clip_fraction"] == 0.5


def test_ratio_one_is_reinforce_with_the_advantage():
    mask = mask_of(4, 4, width=4)  # equal lengths, where the mean over sequences is the mean over tokens
    hidden, weight, tokens, logp = problem(mask)
    advantage = randn(2, 4, seed=4)
    got, _ = ppo_loss(hidden, weight, tokens, mask, logp.detach(), advantage, clip=1e9)
    expected, _ = reinforce_loss(hidden, weight, tokens, mask, advantage, alpha=0.0)
    torch.testing.assert_close(torch.autograd.grad(got, (hidden, weight)),
                               torch.autograd.grad(expected, (hidden, weight)))


def test_entropy_bonus_is_a_mean_of_the_same_kind():
    hidden, weight, tokens, logp = problem()
    plain, _ = ppo_loss(hidden, weight, tokens, MASK, logp.detach(), torch.zeros(2, 4, **F64))
    loss, stats = ppo_loss(hidden, weight, tokens, MASK, logp.detach(), torch.zeros(2, 4, **F64), alpha=0.5)
    log_p = (hidden @ weight.t()).log_softmax(-1)
    entropy = torch.stack([h[m].mean() for h, m in zip(-(log_p.exp() * log_p).sum(-1), MASK)]).mean()
    torch.testing.assert_close(loss - plain, -0.5 * entropy)
    torch.testing.assert_close(stats["entropy"], entropy.detach())


def test_value_loss_by_hand():
    # V 2 against R 1: 1; V_old 1.5, held to 1.75: 0.5625; the worse counts.
    # Second sequence: V 0, R 3, V_old 2, held to 1.75
    got = value_loss(torch.tensor([[2.0, 9.0], [0.0, 9.0]]), torch.tensor([[1.5, 0.0], [2.0, 0.0]]),
                     torch.tensor([[1.0, 0.0], [3.0, 0.0]]), mask_of(1, 1, width=2), clip=0.25)
    assert got.item() == pytest.approx(0.5 * (1.0 + 9.0) / 2)


def test_padding_changes_nothing():
    wide = lambda x, fill=7.0: torch.cat((x, torch.full_like(x[:, :2], fill)), 1)
    mask, ends = wide(MASK, False), wide(ENDS, False)
    rewards, values = randn(2, 4), randn(2, 4, seed=1)
    line = fit_normalizer(rewards, ENDS)
    torch.testing.assert_close(fit_normalizer(wide(rewards), ends), line)
    for short, long in ((advantages(torch.where(MASK, rewards, 0.0), values, MASK), advantages(
            torch.where(mask, wide(rewards), 0.0), wide(values), mask)),
                        ([spread(normalize(rewards, ENDS, line), ENDS, MASK)],
                         [spread(normalize(wide(rewards), ends, line), ends, mask)]),
                        ([whiten(rewards, MASK)], [whiten(wide(rewards), mask)]),
                        ([token_weights(MASK)], [token_weights(mask)])):
        for a, b in zip(short, long):
            torch.testing.assert_close(b[:, :4], a)
            assert (b[:, 4:] == 0).all()
    torch.testing.assert_close(value_loss(wide(values), wide(values), wide(rewards), mask),
                               value_loss(values, values, rewards, MASK))
    torch.testing.assert_close(explained_variance(wide(values), wide(rewards), mask),
                               explained_variance(values, rewards, MASK))
    hidden, weight, tokens, logp = problem()
    old, advantage = logp.detach() + 0.1, randn(2, 4, seed=4)
    torch.testing.assert_close(
        ppo_loss(wide(hidden), weight, wide(tokens, 1), mask, wide(old), wide(advantage))[0],
        ppo_loss(hidden, weight, tokens, MASK, old, advantage)[0])


def test_a_sequence_without_tokens_counts_for_nothing():
    assert torch.equal(token_weights(mask_of(2, 0, width=2)), torch.tensor([[0.5, 0.5], [0, 0]]))


def test_explained_variance_of_a_perfect_and_of_a_constant_critic():
    returns = randn(2, 4)
    assert explained_variance(returns, returns, MASK) == 1
    assert explained_variance(torch.zeros(2, 4, **F64), returns, MASK) == pytest.approx(0)


@pytest.mark.parametrize("check, x, says", [
    (check_start, 60.0, "--kl"), (check_start, float("nan"), "--kl"),
    (check_step, 1e5, "--epochs"), (check_step, float("nan"), "--epochs")])
def test_a_policy_that_runs_away_stops_with_what_to_change(check, x, says):
    with pytest.raises(FloatingPointError, match=says):
        check(x)
    check(2.0)
