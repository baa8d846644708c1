"""Credit against the truth: Spearman with ties, exact Shapley values, what a prompt's tokens are worth."""
import itertools
from types import SimpleNamespace

import pytest
import torch

from support.credit import average_ranks, shapley, spearman
from tasks.truth import PROMPTS, credit_truth, mixed_prompts, token_worth

F64 = dict(dtype=torch.float64)


def test_ranks_share_their_mean_where_numbers_are_equal():
    assert average_ranks(torch.tensor([5.0, 1.0, 5.0, 9.0, 5.0])).tolist() == [3, 1, 3, 5, 3]


def by_loop(x, y):
    """Pearson's correlation of ranks that are counted: below, plus half of those that are equal."""
    rank = lambda v: [sum(b < a for b in v) + (sum(b == a for b in v) + 1) / 2 for a in v]
    a, b = rank(x), rank(y)
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    cov = sum((p - ma) * (q - mb) for p, q in zip(a, b))
    return cov / (sum((p - ma) ** 2 for p in a) * sum((q - mb) ** 2 for q in b)) ** 0.5


def test_spearman_with_ties_by_loop():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        x, y = torch.randint(4, (2, 9), generator=g).tolist()
        assert spearman(torch.tensor(x), torch.tensor(y)) == pytest.approx(by_loop(x, y))


def test_spearman_without_ties_is_the_formula_of_squared_differences():
    x, y = [3.0, 1.0, 4.0, 1.5, 9.0], [2.0, 7.0, 1.0, 8.0, 2.5]
    d = [a - b for a, b in zip((3, 1, 4, 2, 5), (2, 4, 1, 5, 3))]
    expected = 1 - 6 * sum(v * v for v in d) / (5 * 24)
    assert spearman(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected)


def test_spearman_is_one_for_any_rising_function_and_none_for_a_constant():
    x = torch.tensor([0.1, -3.0, 2.0, 7.0])
    assert spearman(x, x ** 3) == pytest.approx(1.0) and spearman(x, -x) == pytest.approx(-1.0)
    assert spearman(x, torch.ones(4)) is None and spearman(torch.zeros(4), x) is None


def test_with_a_truth_of_two_values_it_is_auroc_in_other_words():
    """(2 auroc - 1) sqrt(3 p (1 - p)) for N numbers without ties, up to N^2 / (N^2 - 1)."""
    from tasks.edits import auroc
    g = torch.Generator().manual_seed(1)
    scores, positive = torch.randn(50, generator=g), torch.rand(50, generator=g) < 0.3
    p, n = positive.double().mean().item(), 50
    expected = (2 * auroc(scores, positive) - 1) * (3 * p * (1 - p) * n * n / (n * n - 1)) ** 0.5
    assert spearman(scores, positive) == pytest.approx(expected)


def test_shapley_values_are_mean_gains_over_all_orders():
    n, worth = 4, torch.randn(16, 2, generator=torch.Generator().manual_seed(2), **F64)
    mean = torch.zeros(n, 2, **F64)
    for order in itertools.permutations(range(n)):
        coalition = 0
        for i in order:
            mean[i] += (worth[coalition | 1 << i] - worth[coalition]) / 24
            coalition |= 1 << i
    got = shapley(worth, n)
    torch.testing.assert_close(got, mean)
    torch.testing.assert_close(got.sum(0), worth[-1] - worth[0])


def task(resolution=0.0, width=5):
    """A judge that counts: ids 0 to 3 are worth 10 each, once; the others 0, but 9, which takes away 5."""
    def ask(prompts, name):
        assert name == "dev"
        worth = sum(10.0 * (prompts == i).any(1).float() for i in range(4)) - 5.0 * (prompts == 9).sum(1)
        return worth, worth
    c = SimpleNamespace(resolution=resolution)
    return SimpleNamespace(width=width, n_ids=12, device="cpu", ask=ask, cfg=c)


CUES, PLAIN = torch.arange(4), torch.arange(4, 12)


def test_mixed_prompts_hold_one_to_four_cue_words():
    prompts = mixed_prompts(task(), CUES, PLAIN)
    assert prompts.shape == (PROMPTS, 5) and torch.equal(prompts, mixed_prompts(task(), CUES, PLAIN))
    cues = (prompts < 4).sum(1)
    assert cues.tolist() == [1, 2, 3, 4] * 4
    assert len({tuple((row < 4).nonzero().flatten().tolist()) for row in prompts}) > 4  # at random places


def test_worth_of_tokens_where_it_is_known():
    """Nothing else in the prompt is a cue or the bad word, and neither are the fillings."""
    t = task()
    t.n_ids = 1
    said = torch.tensor([[4, 1, 9, 2, 5], [1, 1, 6, 7, 8]])
    worth = token_worth(t, said)  # every filling is id 0, worth 10 for whoever is the only one of it
    full = t.ask(said, "dev")[0].double()
    empty = t.ask(torch.zeros(2, 5, dtype=torch.long), "dev")[0].double()
    torch.testing.assert_close(worth.sum(1), full - empty)
    assert worth[0, 1] == worth[0, 3] > worth[0, 0] == worth[0, 4] > worth[0, 2]
    assert worth[1, 0] == worth[1, 1] > worth[1, 2]  # the same word twice shares what it is worth


def test_credit_that_is_the_truth_correlates_with_it_and_its_opposite_against_it():
    t = task(resolution=2.0)
    good = lambda sign: lambda tokens, *_: sign * ((tokens < 4).float() - (tokens == 9).float())
    right, wrong = credit_truth(t, good(1), CUES, PLAIN), credit_truth(t, good(-1), CUES, PLAIN)
    assert right > 0.6 and wrong == pytest.approx(-right)
    assert abs(credit_truth(t, lambda x, *_: torch.arange(5.0).expand(x.shape), CUES, PLAIN)) < 0.5


def test_no_credit_no_figure():
    assert credit_truth(task(), lambda x, *_: torch.ones(x.shape), CUES, PLAIN) is None
    assert credit_truth(task(width=7), None, CUES, PLAIN) is None
    assert credit_truth(task(resolution=1e9), lambda x, *_: x.float(), CUES, PLAIN) is None
