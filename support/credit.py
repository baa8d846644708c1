"""What a credit is measured by: ranks with ties, Spearman's correlation, and exact Shapley values."""
import math

import torch


def average_ranks(x):
    """Ranks from 1, equal numbers share the mean of theirs: (N,) -> (N,) float64."""
    _, place, count = x.double().unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2.0)[place]


def spearman(x, y):
    """Spearman's rank correlation of two (N,), ties by average ranks: a float in [-1, 1], or None where one
    of them is constant and has no order."""
    a, b = [average_ranks(torch.as_tensor(v)) for v in (x, y)]
    a, b = a - a.mean(), b - b.mean()
    size = (a.square().sum() * b.square().sum()).sqrt().item()  # divisor: of the two spreads of ranks
    return (a * b).sum().item() / size if size > 0 else None


def shapley(worth, n):
    """Exact Shapley values of n players: worth (2^n, ...) of every coalition, bit i of the index says whether
    player i is in -> (n, ...). They sum to worth[all] - worth[none]; player i's is its mean gain,

        sum over S without i of  |S|! (n - |S| - 1)! / n!  (worth[S and i] - worth[S])
    """
    values = []
    for i in range(n):
        without = [s for s in range(2 ** n) if not s >> i & 1]
        share = lambda s: 1.0 / (n * math.comb(n - 1, s.bit_count()))  # divisor: orders with S before i
        gains = [share(s) * (worth[s | 1 << i] - worth[s]) for s in without]
        values.append(torch.stack(gains).sum(0))
    return torch.stack(values)
