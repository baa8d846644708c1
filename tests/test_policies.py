"""policy_reinforce.py and policy_wmle.py: exact expectations on three words, examples by
hand, named divisors."""
import itertools
import math

import pytest
import torch
from reference import mask_of

from policy_ppo import credited
from policy_reinforce import WEIGHTS, compared, first_words, reinforce_loss, shape_rewards, standardize
from policy_wmle import NORMS, weighted_mle_loss
from reward import bound

LN = math.log
f64 = torch.float64


class Tabular:
    """A policy over sequences of two out of three words: a free state for the first, one for
    each first word behind."""
    sequences = list(itertools.product(range(3), repeat=2))

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.first, self.second, self.weight = (torch.randn(*s, generator=g, dtype=f64, requires_grad=True)
                                                for s in ((4,), (3, 4), (3, 4)))
        # r(y1, y2)_t; the first must not see the second
        self.rewards = torch.rand(3, 3, 2, generator=g, dtype=f64)
        self.rewards[:, :, 0] = self.rewards[:, :1, 0]
        self.leaves = (self.first, self.second, self.weight)

    def tables(self):
        # p(y1), p(y2 | y1)
        return (self.weight @ self.first).softmax(0), (self.second @ self.weight.t()).softmax(1)

    def expected(self, rewards, alpha):
        """Gradient of the loss of one sequence, averaged over all sequences by their probability."""
        p1, p2 = (p.detach() for p in self.tables())
        total = 0.0
        for i, j in self.sequences:
            hidden = torch.stack((self.first, self.second[i]))[None]
            one = torch.tensor([[i, j]]), mask_of(2, width=2), rewards[i, j][None]
            total = total + p1[i] * p2[i, j] * reinforce_loss(hidden, self.weight, *one, alpha)[0]
        return torch.autograd.grad(total, self.leaves)


def test_reinforce_with_reward_to_go_is_the_gradient_of_the_expected_reward():
    policy = Tabular()
    to_go = shape_rewards(policy.rewards.flatten(0, 1), mask_of(*[2] * 9, width=2), "to_go").view(3, 3, 2)
    p1, p2 = policy.tables()
    objective = (p1[:, None] * p2 * policy.rewards.mean(2)).sum()  # E_y mean_t r_t, through every probability
    torch.testing.assert_close(policy.expected(to_go, 0.0), torch.autograd.grad(-objective, policy.leaves))


def test_reinforce_with_immediate_reward_improves_each_state_by_itself():
    # E7: a token answers for its own reward alone, so the chance of reaching a state is a constant
    policy = Tabular()
    p1, p2 = policy.tables()
    objective = ((p1 * policy.rewards[:, 0, 0]).sum()
                 + (p1.detach()[:, None] * p2 * policy.rewards[:, :, 1]).sum()) / 2
    torch.testing.assert_close(policy.expected(policy.rewards, 0.0),
                               torch.autograd.grad(-objective, policy.leaves))


def test_the_entropy_shown_is_that_of_the_tokens_that_were_read():
    """Without --alpha rows whose weight is 0 are skipped: their entropy is not known, and is not 0."""
    hidden, weight = torch.randn(1, 2, 4, dtype=f64), torch.randn(5, 4, dtype=f64)
    p = (hidden[0, 1] @ weight.t()).softmax(0)
    stats = reinforce_loss(hidden, weight, torch.tensor([[1, 2]]), mask_of(2, width=2),
                           torch.tensor([[0.0, 1.0]]), alpha=0.0)[1]
    torch.testing.assert_close(stats["entropy"], -(p * p.log()).sum())
    torch.testing.assert_close(stats["logp"], p[2].log())


def test_entropy_gradient_is_exact():
    policy = Tabular()
    p1, p2 = policy.tables()
    h1, h2 = -(p1 * p1.log()).sum(), -(p2 * p2.log()).sum(1)
    objective = 0.3 * (h1 + (p1.detach() * h2).sum()) / 2  # E8: a mean over the two tokens
    got = policy.expected(torch.zeros(3, 3, 2, dtype=f64), 0.3)
    torch.testing.assert_close(got, torch.autograd.grad(-objective, policy.leaves), rtol=1e-6, atol=1e-8)


def by_hand():
    """Two words, logits (h ln 3, 0): h = 1 gives p = 3/4, 1/4, h = 0 a half each. Three tokens
    in two sequences: p = 3/4 with r = 1, p = 1/2 with r = 2, p = 1/4 with r = 3; the rest is
    padding full of garbage."""
    nan = float("nan")
    hidden = torch.tensor([[1.0, 0, nan], [1, nan, nan]])[..., None]
    tokens, rewards = torch.tensor([[0, 1, 1], [1, 0, 0]]), torch.tensor([[1.0, 2, nan], [3, 1e9, nan]])
    return hidden, torch.tensor([[LN(3)], [0.0]]), tokens, mask_of(2, 1, width=3), rewards


def test_reinforce_by_hand():
    loss, stats = reinforce_loss(*by_hand(), alpha=0.5)
    h = LN(4) - 0.75 * LN(3)  # entropy of (3/4, 1/4), met twice
    assert loss.item() == pytest.approx((LN(4 / 3) + 2 * LN(2) + 3 * LN(4)) / 3 - 0.5 * (2 * h + LN(2)) / 3,
                                        rel=1e-6)
    assert stats["reward"].item() == pytest.approx(2.0)
    assert stats["logp"].item() == pytest.approx(-(LN(4 / 3) + LN(2) + LN(4)) / 3, rel=1e-6)
    assert stats["entropy"].item() == pytest.approx((2 * h + LN(2)) / 3, rel=1e-6)


def test_alpha_is_an_eighth_by_default():
    assert torch.equal(reinforce_loss(*by_hand())[0], reinforce_loss(*by_hand(), alpha=0.125)[0])


@pytest.mark.parametrize("norm, expected", [
    ("rewards", (LN(4 / 3) / 3 + 2 * LN(2) / 3 + LN(4)) / 2),   # weights 1/3, 2/3 and 1
    ("length", (LN(4 / 3) / 2 + 2 * LN(2) / 2 + 3 * LN(4)) / 2),  # weights 1/2, 2/2 and 3
])
def test_weighted_mle_by_hand(norm, expected):
    loss, stats = weighted_mle_loss(*by_hand(), norm=norm)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert stats["nll"].item() == pytest.approx((LN(4 / 3) + LN(2) + LN(4)) / 3, rel=1e-6)
    assert stats["weight"].item() == pytest.approx(1.0 if norm == "rewards" else (1.5 + 3) / 2)
    assert stats["ess"].item() == pytest.approx((9 / (2 * 5) + 1) / 2)  # (1 + 2)^2 / (2 (1 + 4)), and 1 alone


def problem(lengths=(4, 1, 3), width=4, v=6, d=5):
    g = torch.Generator().manual_seed(0)
    b = len(lengths)
    hidden = torch.randn(b, width, d, generator=g, dtype=f64).requires_grad_()
    weight = torch.randn(v, d, generator=g, dtype=f64).requires_grad_()
    tokens, rewards = torch.randint(v, (b, width), generator=g), torch.rand(b, width, generator=g, dtype=f64)
    return hidden, weight, tokens, mask_of(*lengths, width=width), rewards


def token_nll(hidden, weight, tokens):
    return -(hidden @ weight.t()).log_softmax(-1).gather(2, tokens[..., None]).squeeze(2)


def gradients(loss, hidden, weight):
    return torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("norm", NORMS)
def test_rewards_of_one_are_the_per_sequence_mean_loss(norm):
    hidden, weight, tokens, mask, rewards = problem()
    nll = token_nll(hidden, weight, tokens) * mask
    expected = (nll.sum(1) / mask.sum(1)).mean()
    loss, _ = weighted_mle_loss(hidden, weight, tokens, mask, torch.ones_like(rewards), norm)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, hidden, weight), gradients(expected, hidden, weight))


def test_scale_of_a_sequences_rewards_cancels_in_e9():
    hidden, weight, tokens, mask, rewards = problem()
    scaled = rewards * torch.tensor([[7.0], [0.01], [1]])
    torch.testing.assert_close(weighted_mle_loss(hidden, weight, tokens, mask, scaled)[0],
                               weighted_mle_loss(hidden, weight, tokens, mask, rewards)[0])


def test_divided_by_length_a_good_reference_counts_more():
    hidden, weight, tokens, mask, rewards = problem()
    row = lambda i: (hidden[i:i + 1], weight, tokens[i:i + 1], mask[i:i + 1], rewards[i:i + 1])
    each = torch.stack([weighted_mle_loss(*row(i), norm="length")[0] for i in range(3)])
    scale = torch.tensor([7.0, 0.01, 1], dtype=f64)
    loss, _ = weighted_mle_loss(hidden, weight, tokens, mask, rewards * scale[:, None], "length")
    torch.testing.assert_close(loss, (each * scale).mean())


LOSSES = {"reinforce": reinforce_loss, "wmle": weighted_mle_loss,
          "wmle-length": lambda *x: weighted_mle_loss(*x, norm="length")}


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name):
    hidden, weight, tokens, mask, rewards = problem()
    loss, stats = LOSSES[name](hidden, weight, tokens, mask, rewards)
    garbage = lambda x, value: torch.cat((x.masked_fill(~mask.view(3, 4, *[1] * (x.dim() - 2)), value),
                                          torch.full_like(x[:, :2], value)), 1)
    wide, wide_stats = LOSSES[name](garbage(hidden, float("nan")), weight, garbage(tokens, 5),
                                    mask_of(4, 1, 3, width=6), garbage(rewards, float("nan")))
    torch.testing.assert_close(wide, loss)
    torch.testing.assert_close(wide_stats, stats)
    torch.testing.assert_close(gradients(wide, hidden, weight), gradients(loss, hidden, weight))


@pytest.mark.parametrize("name", LOSSES)
def test_unequal_micro_batches_add_up_by_the_named_divisor(name):
    hidden, weight, tokens, mask, rewards = problem((4, 1, 3, 0, 2))
    # tokens; sequences with one
    divisor = (lambda m: m.sum()) if name == "reinforce" else (lambda m: m.any(1).sum())
    parts = [slice(0, 1), slice(1, 4), slice(4, 5)]
    total = sum(LOSSES[name](hidden[s], weight, tokens[s], mask[s], rewards[s])[0] * divisor(mask[s])
                for s in parts)
    total = total / divisor(mask)
    loss, _ = LOSSES[name](hidden, weight, tokens, mask, rewards)
    torch.testing.assert_close(total, loss)
    torch.testing.assert_close(gradients(total, hidden, weight), gradients(loss, hidden, weight),
                               rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_batch_without_tokens_is_zero(name):
    hidden, weight, tokens, mask, rewards = problem((0, 0))
    loss, stats = LOSSES[name](hidden, weight, tokens, mask, rewards)
    assert loss == 0 and all(x == 0 for x in stats.values())
    assert all(g.eq(0).all() for g in gradients(loss, hidden, weight))


@pytest.mark.parametrize("norm", NORMS)
def test_sequence_without_reward_is_counted_and_adds_nothing(norm):
    hidden, weight, tokens, mask, rewards = problem()
    rewards[1] = 0
    loss, _ = weighted_mle_loss(hidden, weight, tokens, mask, rewards, norm)
    others = [0, 2]
    rest, _ = weighted_mle_loss(hidden[others], weight, tokens[others], mask[others], rewards[others], norm)
    torch.testing.assert_close(loss, rest * 2 / 3)


@pytest.mark.parametrize("name", LOSSES)
def test_rewards_are_constants(name):
    hidden, weight, tokens, mask, rewards = problem()
    rewards.requires_grad_()
    LOSSES[name](hidden, weight, tokens, mask, rewards)[0].backward()
    assert rewards.grad is None


def test_stats_count_tokens_that_carry_no_reward():
    hidden, weight, tokens, mask, _ = problem()
    nll = token_nll(hidden, weight, tokens)[mask].mean().detach()
    rewards = torch.zeros(3, 4, dtype=f64)
    rewards[0, 0] = 1.0
    stats = reinforce_loss(hidden, weight, tokens, mask, rewards)[1]
    assert stats["logp"].item() == pytest.approx(-nll.item(), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_log_probability_is_a_mean_over_the_tokens_that_carry_a_weight(name):
    # rewards of 0 on most tokens, and no entropy term to keep their rows alive: those rows are
    # skipped, and not counted
    hidden, weight, tokens, mask, _ = problem()
    nll = token_nll(hidden, weight, tokens)[:, 0].mean().item()
    rewards = torch.zeros(3, 4, dtype=f64)
    rewards[:, 0] = 1.0
    if name == "reinforce":
        _, stats = reinforce_loss(hidden, weight, tokens, mask, rewards, alpha=0.0)
        assert stats["logp"].item() == pytest.approx(-nll, rel=1e-6)
    else:
        assert (LOSSES[name](hidden, weight, tokens, mask, rewards)[1]["nll"].item()
                == pytest.approx(nll, rel=1e-6))


@pytest.mark.parametrize("weights, expected", [
    ("immediate", [[1, 2, 6], [4, 0, 0]]),
    ("to_go", [[9, 8, 6], [4, 0, 0]]),
    ("mean_to_go", [[3, 4, 6], [4, 0, 0]]),  # 9/3, 8/2, 6/1
    ("both", [[3, 8, 36], [16, 0, 0]]),  # 1 x 3, 2 x 4, 6 x 6
    ("sequence", [[3, 3, 3], [4, 0, 0]]),
])
def test_shapes_of_credit_by_hand(weights, expected):
    """What lies outside of the mask may be anything."""
    rewards = torch.tensor([[1.0, 2, 6], [4, float("nan"), 1e9]])
    assert shape_rewards(rewards, mask_of(3, 1, width=3), weights).tolist() == expected


def test_two_minus_signs_make_no_plus():
    """Means from t on: -1/3, 0.5, -1. The smaller one where one is negative: -2, the product 2 x 0.5, -1."""
    found = shape_rewards(torch.tensor([[-2.0, 2, -1]]), mask_of(3, width=3), "both")
    assert found.tolist() == [[-2, 1, -1]]


@pytest.mark.parametrize("weights", [w for w in WEIGHTS if w not in ("to_go", "both")])
def test_constant_rewards_stay_constant_in_every_mean(weights):
    mask = mask_of(5, 2, 0, width=5)
    torch.testing.assert_close(shape_rewards(torch.full((3, 5), 0.7), mask, weights), 0.7 * mask)


def test_standardized_rewards_have_mean_zero_and_variance_one_over_valid_tokens():
    torch.manual_seed(0)
    x, mask = 3 + 5 * torch.randn(6, 8), mask_of(8, 3, 0, 5, 1, 8, width=8)
    y = standardize(x.masked_fill(~mask, float("nan")), mask)
    assert y[mask].mean().abs() < 1e-6 and y[mask].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert y[~mask].eq(0).all()


def test_others_are_brought_to_the_zero_and_scale_of_the_batch():
    torch.manual_seed(1)
    x, mask = 2 + 3 * torch.randn(4, 5, dtype=f64), mask_of(5, 2, 3, 4, width=5)
    torch.testing.assert_close(standardize(x, mask, others=x)[mask], standardize(x, mask)[mask])
    flat, others = torch.full((4, 5), 1.25, dtype=f64), torch.tensor([1.25, 2.25], dtype=f64)
    # all alike: the floor is what a difference of one is divided by
    assert standardize(flat, mask, floor=0.5, others=others).tolist() == pytest.approx([0.0, 2.0])


def test_the_first_place_of_all_words_is_the_mean_of_its_samples():
    """Every word said in turn, as likely as the policy says it: E7's gradient, for all of them at once."""
    torch.manual_seed(0)
    hidden, head = torch.randn(5, dtype=f64, requires_grad=True), torch.randn(7, 5, dtype=f64,
                                                                             requires_grad=True)
    rewards = torch.randn(7, dtype=f64)
    got = torch.autograd.grad(first_words(hidden, head, rewards), (hidden, head))
    likely, wanted = (head @ hidden).softmax(0).tolist(), [torch.zeros(5, dtype=f64), torch.zeros_like(head)]
    for word, p in enumerate(likely):
        one, paid = torch.tensor([[word]]), rewards[word].view(1, 1)
        loss, _ = reinforce_loss(hidden.view(1, 1, -1), head, one, one >= 0, paid, alpha=0)
        for total, part in zip(wanted, torch.autograd.grad(loss, (hidden, head))):
            total += p * part
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b)
    expected = -sum(p * r for p, r in zip(likely, rewards.tolist()))
    assert first_words(hidden, head, rewards).item() == pytest.approx(expected)
    half = first_words(hidden.detach().bfloat16(), head.detach().bfloat16(), rewards.float())
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected, abs=0.05)


def test_standardizing_forgets_shift_and_scale():
    torch.manual_seed(0)
    x, mask = torch.randn(4, 5, dtype=f64), mask_of(5, 2, 3, 4, width=5)
    torch.testing.assert_close(standardize(3 * x - 7, mask), standardize(x, mask))


@pytest.mark.parametrize("value", [0.0, 0.1, 0.549, 1e3])
@pytest.mark.parametrize("n", [1, 7, 640, 4001])
def test_constant_batch_standardizes_to_zero(value, n):
    # a sum of n equal floats is not n times the float: the rounding must not be blown up to unit variance
    y = standardize(torch.full((2, n), value), mask_of(n, n // 2, width=n))
    assert y.abs().max() < 1e-3


@pytest.mark.parametrize("call", [lambda: shape_rewards(torch.ones(1, 1), torch.ones(1, 1).bool(), "togo"),
                                  lambda: weighted_mle_loss(*problem(), norm="mean"),
                                  lambda: bound(torch.ones(1), "relu"),
                                  lambda: compared(torch.ones(1, 2), "mean"),
                                  lambda: credited(*[torch.ones(1, 1)] * 4, torch.ones(1, 1) > 0, how="max")])
def test_unknown_choices_are_named(call):
    with pytest.raises(ValueError, match="expected one of"):
        call()
