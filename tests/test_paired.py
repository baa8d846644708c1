"""support/paired.py: the bootstrap against all resamples that there are, and who is compared with whom."""
import itertools
import json
import re
from statistics import fmean

import pytest
from test_eval import make_run, shows

from support import paired
from support.runs import read_run


def every_resample(x, share):
    """Mean and the two quantiles of the mean over all N^N resamples, each equally likely."""
    means = sorted(fmean(pick) for pick in itertools.product(x, repeat=len(x)))
    at = lambda q: means[round(q * (len(means) - 1))]
    return fmean(x), at((1 - share) / 2), at((1 + share) / 2)


@pytest.mark.parametrize("x", [[0.0, 1.0, 3.0, -2.0, 0.5], [0.4, 0.1, 0.2, -0.9, 2.0, 0.3]])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_the_interval_is_that_of_all_resamples(x, share):
    """10,000 draws know a quantile of these few means to a twentieth of their spread, and better."""
    spread = (max(x) - min(x)) / 20
    assert paired.interval(x, share) == pytest.approx(every_resample(x, share), abs=spread)


def test_the_interval_is_the_same_every_time_and_shrinks_with_more_documents():
    x = [0.1 * (i % 7) - 0.2 for i in range(70)]
    assert paired.interval(x) == paired.interval(x)
    width = lambda found: found[2] - found[1]
    assert width(paired.interval(x * 9)) == pytest.approx(width(paired.interval(x)) / 3, rel=0.1)
    assert paired.interval([0.25] * 5) == (0.25, 0.25, 0.25)  # documents that agree leave nothing open


def runs_of(folder, objective, *scores):
    """A run a seed with these scores of its test documents (None: none kept)."""
    for seed, each in enumerate(scores, 1):
        run = make_run(folder / objective / str(seed), {"task": "summarize", "seed": seed, "curve": "meteor",
                                                        "objective": objective}, {"meteor": 0.5})
        if each is not None:
            (run / "scores.json").write_text(json.dumps({"meteor": each}))
    return [read_run(folder / objective / str(seed)) for seed in range(1, len(scores) + 1)]


def test_a_document_s_scores_are_averaged_over_seeds_before_they_are_paired(tmp_path):
    """Means of ours 0.5, 0.6, of theirs 0.3, 0.6: differences 0.2 and 0, mean 0.1."""
    ours = runs_of(tmp_path, "wmle", [0.4, 0.5], [0.6, 0.7])
    theirs = runs_of(tmp_path, "mle", [0.3, 0.6])
    assert paired.by_input(ours, "meteor").tolist() == pytest.approx([0.5, 0.6])
    found = paired.against(ours, theirs, "meteor")
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.1, 0.0, 0.2)) and found["n"] == 2
    assert found["text"] == "+0.1000 [+0.0000, +0.2000]"
    for less in ([0.3], None):  # another test set, an older run
        assert paired.against(ours, runs_of(tmp_path / str(less), "mle", less), "meteor")["text"] == "-"
    assert paired.by_input(ours, "rouge1") is None


def test_compare_sets_every_method_beside_plain_imitation(tmp_path):
    for objective, each in (("wmle", [0.5, 0.9]), ("mle", [0.4, 0.6]), ("ppo", [0.4, 0.5])):
        runs_of(tmp_path, objective, each)
    folders = sorted(tmp_path.glob("*/1"), reverse=True)  # mle is not the first
    out = shows("--compare", *folders, "--json", tmp_path / "rows.json")
    assert "meteor - mle's by input" in out
    lines = {name: next(x for x in out.split("\n") if f"objective={name} " in x)
             for name in ("wmle", "mle", "ppo")}
    assert "+0.2000 [+0.1000, +0.3000]" in lines["wmle"] and "-0.0500 [-0.1000, +0.0000]" in lines["ppo"]
    assert re.search(r"  -$", lines["mle"].rstrip())
    rows = {row["settings"]["objective"]: row["figures"]["meteor - mle's by input"]
            for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["wmle"]["mean"] == pytest.approx(0.2) and rows["wmle"]["n"] == 2
    alone = shows("--compare", folders[0])
    assert "by input" not in alone
    first = shows("--compare", tmp_path / "wmle" / "1", tmp_path / "ppo" / "1")  # no mle: against the first
    assert "meteor - the first row's by input" in first


def test_a_kept_table_has_the_interval_against_the_row_that_it_names(tmp_path):
    from support import results
    root = tmp_path / "results"
    for objective, each in (("wmle", [0.50001, 0.9]), ("mle", [0.4, 0.6])):
        runs_of(tmp_path, objective, each)
        results.collect("claim", objective, [tmp_path / objective / "1"], root)
    kept = json.loads((root / "claim/wmle/1/scores.json").read_text())
    assert kept == {"meteor": [0.5, 0.9]}  # four digits
    table = {"title": "t", "columns": [["meteor", "METEOR - mle's", "paired"]], "against": "mle",
             "rows": [["wmle", "wmle"], ["mle", "mle"]]}
    (root / "claim" / "table.json").write_text(json.dumps(table))
    rows = results.markdown(root / "claim").split("\n")[2:4]
    assert rows == ["| wmle | 1 | +0.2000 [+0.1000, +0.3000] |", "| mle | 1 | - |"]
    (root / "claim" / "table.json").write_text(json.dumps(table | {"against": "gone"}))
    with pytest.raises(results.ResultsError, match="against gone: expected one of the rows wmle, mle"):
        results.markdown(root / "claim")
    (root / "claim/wmle/1/scores.json").unlink()  # a run from before they were kept
    (root / "claim" / "table.json").write_text(json.dumps(table))
    assert "| wmle | 1 | - |" in results.markdown(root / "claim")
