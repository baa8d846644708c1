"""plackett_luce.py against the enumeration of all orders, the pair loss, and a double loop for ties."""
import math

import pytest
import torch
import torch.nn.functional as F
from reference import order_probability, orders, pl_loss_by_loop, preference_of

from plackett_luce import plackett_luce_loss

f64 = torch.float64


def with_gradient(scores, preference, valid=None):
    scores = scores.clone().requires_grad_()
    loss = plackett_luce_loss(scores, preference, valid)
    return loss, torch.autograd.grad(loss, scores)[0]


@pytest.mark.parametrize("k", [2, 3, 4])
def test_loss_is_minus_log_probability_of_the_order(k):
    scores = torch.randn(k, dtype=f64, generator=torch.Generator().manual_seed(k))
    for order in orders(k):
        loss = plackett_luce_loss(scores[None], preference_of(order)[None])
        torch.testing.assert_close(loss, -order_probability(scores, order).log())


@pytest.mark.parametrize("k", [2, 3, 4])
def test_probabilities_of_all_orders_sum_to_one(k):
    scores = torch.randn(1, k, dtype=f64, generator=torch.Generator().manual_seed(k))
    total = sum(plackett_luce_loss(scores, preference_of(order)[None]).neg().exp() for order in orders(k))
    assert total.item() == pytest.approx(1.0, abs=1e-12)


def test_two_candidates_are_the_logistic_pair_loss():
    scores, preference = torch.randn(50, 2), torch.rand(50, 2)
    better = torch.where(preference[:, 0] > preference[:, 1], 1.0, -1.0)
    expected = F.softplus(-better * (scores[:, 0] - scores[:, 1])).mean()
    torch.testing.assert_close(plackett_luce_loss(scores, preference), expected)


@pytest.mark.parametrize("k", [2, 3, 5, 16])
def test_equal_scores_give_log_k_factorial(k):
    loss = plackett_luce_loss(torch.full((3, k), 7.0), torch.randperm(k).float().expand(3, -1))
    assert loss.item() == pytest.approx(math.lgamma(k + 1), rel=1e-6)


def test_all_tied_is_zero_with_zero_gradient():
    loss, grad = with_gradient(torch.randn(2, 4), torch.full((2, 4), 0.3))
    assert loss == 0 and grad.eq(0).all()


@pytest.mark.parametrize("preference", [[1, 1, 0], [1, 0, 0], [2, 1, 1, 0], [1, 1, 0, 0], [0, 2, 0, 2, 1]])
def test_ties_stay_unordered(preference):
    preference = torch.tensor(preference, dtype=f64)
    scores = torch.randn(len(preference), dtype=f64, generator=torch.Generator().manual_seed(1))
    loss, grad = with_gradient(scores[None], preference[None])
    x = scores.clone().requires_grad_()
    expected = pl_loss_by_loop(x, preference)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad[0], torch.autograd.grad(expected, x)[0])


def test_a_tied_pair_by_hand():
    # two tied at 0 above one at 0: each of the two meets the worst alone, ln 2 twice; sorting code would say
    # ln 3!
    loss = plackett_luce_loss(torch.zeros(1, 3), torch.tensor([[1.0, 1, 0]]))
    assert loss.item() == pytest.approx(2 * math.log(2))


def test_candidates_may_come_in_any_order():
    torch.manual_seed(0)
    scores, preference = torch.randn(3, 5, dtype=f64), torch.randint(3, (3, 5)).float()
    shuffle = torch.randperm(5)
    loss, grad = with_gradient(scores, preference)
    shuffled, shuffled_grad = with_gradient(scores[:, shuffle], preference[:, shuffle])
    torch.testing.assert_close(loss, shuffled)
    torch.testing.assert_close(grad[:, shuffle], shuffled_grad)


def test_only_differences_of_scores_matter():
    torch.manual_seed(0)
    scores, preference = torch.randn(3, 5, dtype=f64), torch.rand(3, 5)
    loss, grad = with_gradient(scores, preference)
    torch.testing.assert_close(plackett_luce_loss(scores + 100, preference), loss)
    torch.testing.assert_close(grad.sum(1), torch.zeros(3, dtype=f64))


def test_only_the_order_of_preferences_matters():
    torch.manual_seed(0)
    scores, preference = torch.randn(3, 5), torch.randint(4, (3, 5)).float()
    loss = plackett_luce_loss(scores, preference)
    for monotone in (torch.exp, lambda x: 1e-3 * x - 5, lambda x: x ** 3):
        assert torch.equal(plackett_luce_loss(scores, monotone(preference)), loss)


def test_mean_over_groups_sum_over_candidates():
    torch.manual_seed(0)
    scores, preference = torch.randn(4, 3), torch.rand(4, 3)
    each = [plackett_luce_loss(scores[i:i + 1], preference[i:i + 1]) for i in range(4)]
    torch.testing.assert_close(plackett_luce_loss(scores, preference), sum(each) / 4)


def test_right_order_forty_apart_costs_nothing():
    # an epsilon inside the logarithm would make this 16.97
    loss, grad = with_gradient(torch.tensor([[40.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    assert loss.item() == 0 and grad.abs().max() < 1e-16


@pytest.mark.parametrize("preference, loss, grad", [
    ([2, 1, 0], 0.0, [0, 0, 0]),
    # wrong way round: the best is 2e4 behind the first, the middle 1e4; each pulls the first down by 1 and
    # itself up
    ([0, 1, 2], 3e4, [2, -1, -1]),
])
def test_gaps_of_ten_thousand(preference, loss, grad):
    got, got_grad = with_gradient(torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([preference]).float())
    assert got.item() == loss
    assert got_grad.tolist() == [grad]


def test_a_smaller_group_is_a_group_with_missing_slots():
    torch.manual_seed(0)
    scores, preference = torch.randn(1, 3), torch.rand(1, 3)
    valid = torch.tensor([[True, False, True, True, False]])
    wide_scores, wide_preference = torch.zeros(1, 5), torch.zeros(1, 5)
    wide_scores[valid], wide_preference[valid] = scores[0], preference[0]
    loss, grad = with_gradient(scores, preference)
    wide, wide_grad = with_gradient(wide_scores, wide_preference, valid)
    torch.testing.assert_close(wide, loss)
    torch.testing.assert_close(wide_grad[valid], grad[0])


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_whatever_stands_in_a_missing_slot_stays_out(garbage):
    valid = torch.tensor([[True, True, False], [True, True, True]])
    scores, preference = torch.tensor([[0.5, 1, 0], [1, 2, 3]]), torch.tensor([[1.0, 0, 0], [0, 1, 2]])
    loss, grad = with_gradient(scores, preference, valid)
    spoiled = [x.masked_fill(~valid, garbage) for x in (scores, preference)]
    bad, bad_grad = with_gradient(*spoiled, valid)
    torch.testing.assert_close(bad, loss)
    torch.testing.assert_close(bad_grad, grad)


def test_groups_with_nothing_to_rank_are_not_counted():
    scores, preference = torch.randn(3, 3), torch.rand(3, 3)
    valid = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])
    torch.testing.assert_close(plackett_luce_loss(scores, preference, valid),
                               plackett_luce_loss(scores[:1], preference[:1]))


def test_tied_groups_are_counted():
    scores, preference = torch.randn(2, 3), torch.tensor([[0.0, 1, 2], [1, 1, 1]])
    torch.testing.assert_close(plackett_luce_loss(scores, preference),
                               plackett_luce_loss(scores[:1], preference[:1]) / 2)


def test_no_valid_candidate_at_all_is_zero():
    loss, grad = with_gradient(torch.randn(2, 3), torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert loss == 0 and grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    torch.manual_seed(0)
    scores, preference = torch.randn(20, 5).to(dtype), torch.rand(20, 5)
    loss = plackett_luce_loss(scores, preference)
    assert loss.dtype == torch.float32 and torch.equal(loss, plackett_luce_loss(scores.float(), preference))


def test_gradcheck():
    torch.manual_seed(0)
    preference = torch.tensor([[0.0, 1, 1, 2], [3, 2, 1, 0]])
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]]).bool()
    scores = torch.randn(2, 4, dtype=f64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: plackett_luce_loss(x, preference, valid), scores)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4), (2, 3)), ((2, 3), (2, 3), (3,)), ((3,), (3,), (3,))])
def test_shapes_must_fit(shapes):
    scores, preference, valid = map(torch.ones, shapes)
    with pytest.raises(ValueError, match=r"\(B, K\)"):
        plackett_luce_loss(scores, preference, valid.bool())


def test_compiles_into_one_graph():
    torch.manual_seed(0)
    scores, preference, valid = torch.randn(3, 4), torch.rand(3, 4), torch.rand(3, 4) > 0.3
    f = torch.compile(plackett_luce_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(f(scores, preference, valid), plackett_luce_loss(scores, preference, valid))


def test_never_looks_at_a_value():
    # tensors on "meta" have no values: a host synchronisation or a data-dependent shape would raise
    scores = torch.empty(2, 3, device="meta")
    assert plackett_luce_loss(scores, scores, scores > 0).shape == ()
