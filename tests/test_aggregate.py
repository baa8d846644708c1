"""aggregate.py: values by hand, the limits of the soft extremes, and everything padding must not do."""
import math

import pytest
import torch
from reference import aggregate_by_loop, mask_of

from aggregate import CHOICES, aggregate

LN = math.log
FORMS = [(how, scale, neutral) for how in CHOICES for scale in (True, False) for neutral in (True, False)
         if not neutral or how in ("min", "max")]


def ragged():
    """Rewards 2 ln k, so that exp(r / 2) = k: k = 1 2 3 1 1 and 1 2 4, the rest of the second row padding."""
    k = torch.tensor([[1.0, 2, 3, 1, 1], [1, 2, 4, 9, 9]], dtype=torch.float64)
    return 2 * k.log(), mask_of(5, 3, width=5)


@pytest.mark.parametrize("how, first, second", [
    ("avg", 2 * LN(6) / 5, 2 * LN(8) / 3),        # products 1*2*3*1*1 and 1*2*4
    ("max", 2 * LN(8), 2 * LN(7)),                # sums of k
    ("min", -2 * LN(23 / 6), -2 * LN(7 / 4)),     # sums of 1/k: 1 + 1/2 + 1/3 + 1 + 1 and 1 + 1/2 + 1/4
])
def test_ragged_batch_by_hand(how, first, second):
    expected = torch.tensor([first, second], dtype=torch.float64)
    torch.testing.assert_close(aggregate(*ragged(), how, scale=False), expected)
    torch.testing.assert_close(aggregate(*ragged(), how), 4 * expected)  # T_bar = (5 + 3) / 2


def test_sum_by_hand_and_never_scaled():
    expected = torch.tensor([2 * LN(6), 2 * LN(8)], dtype=torch.float64)
    for scale in (True, False):
        torch.testing.assert_close(aggregate(*ragged(), "sum", scale=scale), expected)


def test_length_neutral_by_hand():
    # the log of the mean instead of the sum: 8/5 and 7/3, (23/6)/5 and (7/4)/3
    for how, sign, a, b in (("max", 2, 8 / 5, 7 / 3), ("min", -2, 23 / 30, 7 / 12)):
        expected = torch.tensor([sign * LN(a), sign * LN(b)], dtype=torch.float64)
        torch.testing.assert_close(aggregate(*ragged(), how, scale=False, length_neutral=True), expected)


@pytest.mark.parametrize("how, scale, neutral", FORMS)
def test_equals_the_formula_and_its_gradient(how, scale, neutral):
    torch.manual_seed(0)
    mask = mask_of(4, 1, 0, 6, width=6)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    got = aggregate(x, mask, how, 0.7, scale, neutral)
    expected = aggregate_by_loop(y, mask.tolist(), how, 0.7, scale, neutral)
    torch.testing.assert_close(got, expected)
    up = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(got @ up, x), torch.autograd.grad(expected @ up, y))


@pytest.mark.parametrize("how", CHOICES)
def test_groups_do_not_meet(how):
    torch.manual_seed(0)
    rewards, mask = torch.randn(2, 3, 4), mask_of(4, 1, 2, 3, 3, 0, width=4).view(2, 3, 4)
    one_by_one = torch.stack([aggregate(r, m, how) for r, m in zip(rewards, mask)])
    torch.testing.assert_close(aggregate(rewards, mask, how), one_by_one)


@pytest.mark.parametrize("how", ["min", "max"])
def test_soft_extremes_become_hard_as_beta_falls(how):
    rewards, mask = ragged()
    hard = torch.stack([getattr(r[m], how)() for r, m in zip(rewards, mask)])
    off = lambda beta: (aggregate(rewards, mask, how, beta, scale=False) - hard).abs().max()
    far = [off(beta) for beta in (2.0, 0.5, 0.1, 0.01)]
    assert far[0] > far[1] > far[2] >= far[3] and far[3] < 0.02  # at most beta ln T away


@pytest.mark.parametrize("how", ["min", "max"])
def test_length_neutral_flat_rewards_score_the_same_at_any_length(how):
    rewards, mask = torch.full((3, 20), 0.6), mask_of(1, 5, 20, width=20)
    scores = aggregate(rewards, mask, how, scale=False, length_neutral=True)
    torch.testing.assert_close(scores, torch.full((3,), 0.6))


def test_official_soft_extremes_prefer_by_length():
    # 0.6 + 2 ln 5 = 3.82, 0.6 + 2 ln 20 = 6.59; with a minus -2.62, -5.39: the known bias, shown and kept
    flat, mask = torch.full((2, 20), 0.6), mask_of(5, 20, width=20)
    assert aggregate(flat, mask, "max", scale=False).tolist() == pytest.approx([3.819, 6.591], abs=1e-3)
    assert aggregate(flat, mask, "min", scale=False).tolist() == pytest.approx([-2.619, -5.391], abs=1e-3)


@pytest.mark.parametrize("how", CHOICES)
def test_empty_candidate_scores_zero_without_gradient(how):
    rewards = torch.ones(3, 4, requires_grad=True)
    scores = aggregate(rewards, mask_of(4, 0, 2, width=4), how)
    grad, = torch.autograd.grad(scores.sum(), rewards)
    assert scores[1] == 0 and grad[1].eq(0).all()
    assert grad.isfinite().all() and grad[0].ne(0).all()


@pytest.mark.parametrize("how", ["min", "max"])
def test_an_empty_candidate_makes_no_nan_on_the_way_back_either(how):
    """Not one that a later step would hide: anomaly detection stops at the first."""
    rewards = torch.rand(2, 3, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        aggregate(rewards, mask_of(3, 0, width=3), how).sum().backward()
    assert rewards.grad.isfinite().all()


@pytest.mark.parametrize("how", CHOICES)
def test_t_bar_ignores_empty_candidates(how):
    rewards = torch.tensor([[1.0, 2, 3], [3, 1, 9], [5, 5, 5]])
    with_empty = aggregate(rewards, mask_of(3, 2, 0, width=3), how)
    torch.testing.assert_close(with_empty[:2], aggregate(rewards[:2], mask_of(3, 2, width=3), how))


@pytest.mark.parametrize("how", CHOICES)
def test_group_of_empty_candidates_is_zero(how):
    rewards = torch.full((2, 3), float("nan"), requires_grad=True)
    scores = aggregate(rewards, mask_of(0, 0, width=3), how)
    grad, = torch.autograd.grad(scores.sum(), rewards)
    assert scores.eq(0).all() and grad.eq(0).all()


@pytest.mark.parametrize("how, scale, neutral", FORMS)
@pytest.mark.parametrize("garbage", [0.0, 1e4, -1e4, float("nan"), float("inf")])
def test_padding_changes_nothing(how, scale, neutral, garbage):
    rewards, mask = ragged()
    short = rewards.clone().requires_grad_()
    long = torch.cat((rewards, torch.zeros(2, 3)), 1).masked_fill(~mask_of(5, 3, width=8), garbage)
    long.requires_grad_()
    a = aggregate(short, mask, how, scale=scale, length_neutral=neutral)
    b = aggregate(long, mask_of(5, 3, width=8), how, scale=scale, length_neutral=neutral)
    torch.testing.assert_close(a, b)
    (grad_a,), (grad_b,) = torch.autograd.grad(a.sum(), short), torch.autograd.grad(b.sum(), long)
    torch.testing.assert_close(grad_a, grad_b[:, :5])
    assert grad_b[:, 5:].eq(0).all()


@pytest.mark.parametrize("how, score, grad", [("max", 1e4, [1.0, 0, 0]), ("min", -1e4, [0.0, 0, 1])])
def test_gaps_of_ten_thousand(how, score, grad):
    rewards = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    got = aggregate(rewards, mask_of(3, width=3), how, scale=False)
    assert got.item() == score
    assert torch.autograd.grad(got.sum(), rewards)[0].tolist() == [grad]


@pytest.mark.parametrize("how, scale, neutral", FORMS)
def test_gradcheck(how, scale, neutral):
    torch.manual_seed(0)
    mask = mask_of(3, 0, 2, width=3)
    f = lambda x: aggregate(x, mask, how, 0.5, scale, neutral)
    assert torch.autograd.gradcheck(f, torch.randn(3, 3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", CHOICES)
def test_half_precision_is_computed_in_float32(how, dtype):
    torch.manual_seed(0)
    half, mask = torch.randn(2, 300).to(dtype), mask_of(300, 200, width=300)
    got = aggregate(half, mask, how)
    assert got.dtype == torch.float32 and torch.equal(got, aggregate(half.float(), mask, how))


@pytest.mark.parametrize("how", ["avg", "min", "max"])
def test_constant_shift_adds_t_bar_times_it(how):
    rewards, mask = ragged()
    torch.testing.assert_close(aggregate(rewards + 0.3, mask, how), aggregate(rewards, mask, how) + 4 * 0.3)


def test_constant_shift_adds_length_times_it_to_a_sum():
    rewards, mask = ragged()
    shift = torch.tensor([5 * 0.3, 3 * 0.3], dtype=torch.float64)
    torch.testing.assert_close(aggregate(rewards + 0.3, mask, "sum"), aggregate(rewards, mask, "sum") + shift)


def test_avg_is_sum_at_equal_lengths():
    rewards = torch.randn(2, 3, 4)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    torch.testing.assert_close(aggregate(rewards, mask, "avg"), aggregate(rewards, mask, "sum"))


@pytest.mark.parametrize("arguments, word", [
    ({"how": "mean"}, "avg, sum, min, max"), ({"how": "max", "beta": 0.0}, "beta"),
    ({"how": "min", "beta": -1.0}, "beta"), ({"how": "min", "beta": float("nan")}, "beta"),
    ({"how": "avg", "length_neutral": True}, "length_neutral"),
    ({"how": "sum", "length_neutral": True}, "length_neutral"),
])
def test_wrong_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        aggregate(*ragged(), **arguments)


def test_shapes_must_fit():
    with pytest.raises(ValueError, match="differ"):
        aggregate(torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("how", CHOICES)
def test_compiles_into_one_graph(how):
    rewards, mask = ragged()
    f = torch.compile(lambda r, m: aggregate(r, m, how), fullgraph=True, backend="eager")
    torch.testing.assert_close(f(rewards, mask), aggregate(rewards, mask, how))


@pytest.mark.parametrize("how, scale, neutral", FORMS)
def test_never_looks_at_a_value(how, scale, neutral):
    # tensors on "meta" have no values: a host synchronisation or a data-dependent shape would raise
    rewards = torch.empty(2, 3, 4, device="meta")
    assert aggregate(rewards, rewards > 0, how, 2.0, scale, neutral).shape == (2, 3)
