"""bench.py: its gates hold, a variant that is wrong is not timed, and the memory ratios are what the README
says.

Times are never asserted: they are the machine's as much as the code's.
"""
import json
import sys

import pytest
import torch

import bench
from support import measure


@pytest.fixture
def without_compiler(monkeypatch):
    """torch.compile takes half a minute over all cases; what it returns is held elsewhere."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)


@pytest.fixture
def few_words(monkeypatch):
    """A gate holds at any vocabulary, and GPT-2's costs seconds where naive makes all logits."""
    monkeypatch.setattr(bench, "VOCABULARY", 1009)


@pytest.mark.parametrize("case", [c for c in bench.CASES if c not in ("rouge", "meteor")])
def test_ours_equals_naive_in_float64(case, without_compiler, few_words):
    verdict = bench.gate(case, "cpu")
    assert verdict["naive"] == 0 and verdict["ours"] <= 1e-12
    others = [x for x in verdict.values() if not isinstance(x, float)]
    assert all(x == "absent" or x.startswith("fails here") for x in others), verdict


@pytest.mark.parametrize("case, peer", [("rouge", "rouge_score"), ("meteor", "nltk")])
def test_metrics_equal_their_peers(case, peer):
    pytest.importorskip(peer)
    assert bench.gate(case, "cpu") == {"naive": 0.0, "ours": 0.0}


def test_a_wrong_variant_is_named_and_not_timed(monkeypatch, without_compiler):
    right, _ = bench.ranking((4, 5, 6), "cpu", torch.float64)

    def spoiled(size, device, dtype):
        return right | {"ours": lambda: [x * 1.001 for x in right["naive"]()], "gone": bench.absent}, 0
    monkeypatch.setitem(bench.CASES, "ranking", (spoiled, [], [], (4, 5, 6)))
    verdict = bench.gate("ranking", "cpu")
    assert verdict["ours"].startswith("FAIL") and verdict["gone"] == "absent" and verdict["naive"] == 0


def test_a_float64_gate_knows_an_epsilon_from_rounding(monkeypatch, without_compiler):
    monkeypatch.setattr(bench, "NOT_EXACT", {})
    assert bench.gate("head", "cpu")["released"].startswith("FAIL")


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("case", ["head", "wmle", "candidates", "ranking", "judge"])
def test_ours_equals_naive_to_rounding_in_the_types_that_are_timed(case, dtype, near, without_compiler,
                                                                   few_words):
    """Never to the last bit: naive multiplies other shapes, and then a library may add in another order."""
    assert bench.gate(case, "cpu", dtype)["ours"] <= near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_promises_are_kept(dtype):
    bench.promises("cpu", dtype)


def measured(case, size, variant):
    row = measure.in_process(bench.build, case, size, variant, "cpu", "float32", 1)
    if not row["mb"]:
        pytest.skip("this system does not tell a process's memory")
    return row["mb"]


@pytest.mark.parametrize("case, ratio", [("head", 6.8), ("wmle", 4.4)])
def test_memory_of_the_head_against_naive(case, ratio):
    size = (1024, 64, 32768, 0.0)
    found = measured(case, size, "naive") / measured(case, size, "ours")
    assert found > 0.8 * ratio, f"naive holds {found:.1f} times what the fused head does, not {ratio}"


def test_memory_is_flat_in_the_rows():
    few, many = [measured("head", (n, 64, 32768, 0.0), "ours") for n in (512, 2048)]
    logits = (2048 - 512) * 32768 * 4 / 2**20  # 192 MB, of the rows that were added
    assert many < few + logits / 4  # a process's high-water is told to some 20 MB


def test_the_last_line_is_one_json_object(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rouge_score")
    score, _, _, small = bench.CASES["rouge"]
    monkeypatch.setitem(bench.CASES, "rouge", (score, [(8, 20), (4, 40)], [], small))
    monkeypatch.setattr(bench, "promises", lambda *x: None)  # they have tests of their own
    monkeypatch.setattr(sys, "argv", ["bench.py", "--case", "rouge", "--threads", "1", "--json",
                                      str(tmp_path / "out.json")])
    bench.main()
    out = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert out == json.loads((tmp_path / "out.json").read_text())
    assert set(out["rows"][0]) == {"case", "variant", "ms", "mb", "vs_naive", "mem_vs_naive", "vs_best_peer",
                                   "vs_floor"}
    assert [r["variant"] for r in out["rows"]] == ["naive", "ours"] * 2 and out["rows"][0]["vs_naive"] == 1.0


def test_growth_is_drawn(tmp_path):
    rows = [{"case": f"growth {a} {x}", "variant": v, "ms": 2.0 * x, "mb": 1.0 * x, "vs_floor": 1.5}
            for a, values in bench.AXES.items() for x in values for v in ("naive", "ours")]
    measure.svg(rows, bench.AXES, tmp_path / "g.svg")
    text = (tmp_path / "g.svg").read_text()
    assert text.startswith("<svg") and "nan" not in text
    assert text.count("<polyline") == len(bench.AXES) * (3 + 2)


def test_a_void_round_runs_once_more_and_the_calmer_of_the_two_counts():
    naive = iter([1.0, 2.0, 4.0, 4.0])  # first and last of a round: apart by half, then equal

    def ask(name):
        ms = next(naive) if name == "naive" else 2.0
        return {"ms": ms, "median": ms, "mb": 8.0 if name == "naive" else 2.0, "flops": 6e9}
    ground = measure.Ground("cpu", torch.float32, 1, rate=6e12)
    rows = {r["variant"]: r for r in measure.compare("x", ask, ["naive", "ours", "trl"], ground, ("trl",))}
    assert next(naive, None) is None and rows["naive"]["ms"] == 4.0
    assert rows["ours"]["vs_naive"] == 2.0 and rows["ours"]["mem_vs_naive"] == 4.0
    assert rows["ours"]["vs_best_peer"] == 1.0
    assert rows["ours"]["vs_floor"] == 2.0  # 6e9 at 6e12 a second: 1 ms


def test_a_round_without_time_left_stays_void(capsys):
    naive = iter([1.0, 2.0])
    ask = lambda name: {"ms": next(naive), "median": 1.0, "mb": 1.0, "flops": 0}
    rows = measure.compare("x", ask, ["naive"], measure.Ground("cpu", torch.float32, 1, again=-1.0))
    assert rows[0]["ms"] == 1.0 and rows[0]["vs_floor"] is None
    assert "a busy machine" in capsys.readouterr().out


def test_growth_compares_ours_with_naive_and_with_the_floor(capsys):
    answers = {"naive": {"ms": 8.0, "mb": 6.0, "flops": 2e9}, "ours": {"ms": 2.0, "mb": 3.0, "flops": 2e9}}
    asked = []

    def ask(case, size, variant):
        asked.append((case, size[-1], variant))
        return answers[variant]
    ground = measure.Ground("cpu", torch.float32, 1, rate=2e12)
    points = [("head-vocabulary", 4096, *bench.growth_sizes("head-vocabulary", 4096)),
              ("head-rows", 512, *bench.growth_sizes("head-rows", 512))]
    rows = measure.growth(points, ask, ground)
    assert asked == [("grow head", 0.0, "naive"), ("grow head", 0.0, "ours")] * 2
    assert [r["case"] for r in rows[1::2]] == ["growth head-vocabulary 4096", "growth head-rows 512"]
    assert (rows[1]["vs_naive"], rows[1]["mem_vs_naive"], rows[1]["vs_floor"]) == (4.0, 2.0, 2.0)
    assert "| head-rows 512      | 8.0 | 2.0 | 1.0 | 6 | 3 |" in capsys.readouterr().out
