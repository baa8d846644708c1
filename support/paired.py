"""Two methods on the same test inputs: the mean difference input by input, with a bootstrap interval.

Scores of one document are alike under any two methods (an easy document is easy for both), so the difference
by document varies far less than the scores do, and its mean is known far better than the difference of two
means with their spreads suggests. The interval resamples documents (Efron 1979; for scores of text Koehn
2004, "Statistical Significance Tests for Machine Translation Evaluation"). A document's scores are averaged
over seeds first, so the interval speaks of the seeds that were run, and not of other seeds.
"""

import numpy as np

from support.runs import is_finite, read_object


def interval(differences, share=0.95, draws=10_000):
    """Differences of N inputs -> (mean, low, high): the percentile bootstrap, from a fixed seed."""
    x, draw = np.asarray(differences, dtype=float), np.random.default_rng(0)
    means = [x[draw.integers(len(x), size=len(x))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return x.mean().item(), low.item(), high.item()


def by_input(runs, figure):
    """The figure of each test input, a mean over runs that differ by seed: an array of N; None where a run
    has none or another number of inputs."""
    scores = [(read_object(run["dir"] / "scores.json") or {}).get(figure) for run in runs]
    whole = [x for x in scores if isinstance(x, list) and x and all(map(is_finite, x))]
    if not scores or len(whole) < len(scores) or len({len(x) for x in whole}) > 1:
        return None
    return np.mean(whole, axis=0)


def against(runs, others, figure):
    """Mean and interval of the figure's difference by input, runs - others, as an entry of a table: {"mean",
    "low", "high", "n", "text"}, n inputs. "-" where there is nothing to pair."""
    ours, theirs = by_input(runs, figure), by_input(others, figure)
    if ours is None or theirs is None or len(ours) != len(theirs):
        return {"mean": None, "low": None, "high": None, "n": 0, "text": "-"}
    mean, low, high = interval(ours - theirs)
    text = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
    return {"mean": mean, "low": low, "high": high, "n": len(ours), "text": text}


def beside(groups, figure):
    """(name, entries): every group of runs against the one that imitates all tokens alike (objective mle), or
    against the first where that is not there once. None without two groups, or with nothing to pair."""
    plain = [i for i, runs in enumerate(groups) if runs[0]["config"].get("objective") == "mle"]
    base = plain[0] if len(plain) == 1 else 0
    found = [against(runs, groups[base], figure) for runs in groups]
    if len(groups) < 2 or not any(entry["n"] for i, entry in enumerate(found) if i != base):
        return None
    found[base] = {**found[base], "text": "-"}
    return f"{figure} - {'mle' if plain == [base] else 'the first row'}'s by input", found
