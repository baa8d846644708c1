"""support/law.py on hand-made run folders: medians with "never" among them, one line a method, and the
picture as `eval.py --compare DIRS --curve queries --against FLAG` draws it."""
import math
import re
import xml.etree.ElementTree as ET

import pytest
from test_eval import make_run, refuses, shows, staircases

from support import law
from support.runs import read_run

SVG = "{http://www.w3.org/2000/svg}"


def reaches(queries):
    """A staircase of 800 queries that first has 0.9 after so many, None: never."""
    return [(1, 0.5), *([(queries, 0.9)] if queries else []), (800, 0.9 if queries else 0.6)]


def law_of(tmp_path):
    """Two sizes, three seeds, with and without reading. By hand, medians: with 100 and 400, without never and
    300; evolution, which knows nothing of the reading, 200 and never; random never."""
    own = {(300, 400): (90, 100, 500), (8000, 400): (400, 300, None),
           (300, 0): (100, None, None), (8000, 0): (200, 300, 400)}
    evolution, folders = {300: (150, 200, 700), 8000: (None, 600, None)}, []
    for (names, warmup), queries in own.items():
        for seed, q in enumerate(queries):
            flags = {"world_names": names, "reward_warmup": warmup, "seed": seed}
            run = make_run(tmp_path / f"{names}-{warmup}-{seed}", flags, {"seed": seed})
            searched = {"evolution": reaches(evolution[names][seed]), "random": reaches(None)}
            folders.append(staircases(run, {"run": reaches(q), **searched}))
    return folders


def groups(folders, *names):
    """[(settings that differ, runs)] as eval.py groups them."""
    found = {}
    for run in map(read_run, folders):
        settings = {name: run["config"][name] for name in names}
        found.setdefault(str(settings), (settings, []))[1].append(run)
    return list(found.values())


def test_a_line_a_method_and_medians_by_hand(tmp_path):
    out = shows("--compare", *law_of(tmp_path), "--curve", "queries", "--against", "world_names")
    assert "against world_names: median over seeds (reached/n)" in out
    rows = [re.split(r"  +", x.strip()) for x in out[out.index("against world_names"):].splitlines()]
    assert rows[1:6] == [["method", "300", "8000"],
                         ["token guidance, reward_warmup=400", "100 (3/3)", "400 (2/3)"],
                         ["token guidance, reward_warmup=0", "never (1/3)", "300 (3/3)"],
                         ["evolution", "200 (3/3)", "never (1/3)"], ["random", "never (0/3)", "never (0/3)"]]


def test_searches_that_differ_between_groups_stay_apart(tmp_path):
    """Another noise is another question; groups that share no seed are never one line."""
    same = lambda name, noise, seed, q, names=300: staircases(
        make_run(tmp_path / name, {"world_names": names, "noise": noise, "seed": seed}),
        {"run": reaches(q), "ridge": reaches(q)})
    folders = [same("a", 0, 1, 100), same("b", 0, 2, 120), same("c", 25, 1, 300)]
    labels = [label for label, _ in law.methods(groups(folders, "world_names", "noise"), "world_names")]
    assert labels == ["token guidance, noise=0", "token guidance, noise=25", "ridge, noise=0",
                      "ridge, noise=25"]
    apart = [same("d", 0, 1, 100), same("e", 25, 1, 100, names=8000)]
    labels = [label for label, _ in law.methods(groups(apart, "world_names", "noise"), "world_names")]
    assert "ridge, noise=0" in labels and "ridge, noise=25" in labels


def test_of_two_seeds_one_that_never_got_there_makes_the_median_never():
    values = {(1, 1): 100, (1, 2): law.NEVER, (2, 1): 100, (2, 2): 300}
    assert law.medians(values) == {1: (law.NEVER, 1, 2), 2: (200, 2, 2)}


def dots(root, colour):
    """Heights of one method's dots, by their place on the axis."""
    found = {}
    for x in root.iter(f"{SVG}circle"):
        if x.get("fill") == colour:
            found.setdefault(x.get("cx"), []).append(float(x.get("cy")))
    return list(found.values())


def test_the_picture_has_logarithmic_queries_and_never_above_all(tmp_path):
    shows("--compare", *law_of(tmp_path), "--curve", "queries", "--against", "world_names",
          "--svg", tmp_path / "c.svg")
    root = ET.fromstring((tmp_path / "c.svg").read_text())
    lines = list(root.iter(f"{SVG}polyline"))
    assert len(lines) == 4 and len({x.get("stroke") for x in lines}) == 4
    said = [x.text for x in root.iter(f"{SVG}text")]
    assert {"world_names", "300", "8000", "never", "100", "200", "500", "evolution", "random"} <= set(said)
    at = {x.text: float(x.get("y")) - 4 for x in root.iter(f"{SVG}text") if x.get("text-anchor") == "end"}
    doubled = (at["100"] - at["500"]) * math.log(2) / math.log(5)
    assert at["100"] - at["200"] == pytest.approx(doubled, abs=0.2)
    assert at["never"] < at["500"]  # downwards in the file is upwards on the page
    with_reading = dots(root, lines[0].get("stroke"))
    assert sorted(map(len, with_reading)) == [3, 3]  # every seed is there
    assert min(with_reading[1]) == pytest.approx(at["never"], abs=0.1)
    middle = [float(point.split(",")[1]) for point in lines[0].get("points").split()]
    assert middle[0] == pytest.approx(at["100"], abs=0.1) and at["never"] < middle[1] < at["200"]


@pytest.mark.parametrize("values, logarithmic", [((300, 1000, 8000), True), ((1, 2, 6), False),
                                                 ((0, 10, 60), False)])
def test_a_flag_over_a_wide_range_stands_on_a_logarithmic_axis(values, logarithmic):
    root = ET.fromstring(law.picture([("ridge", {(x, 1): 100 + x for x in values})], "some_flag"))
    low, between, high = [float(p.split(",")[0]) for p in
                          next(root.iter(f"{SVG}polyline")).get("points").split()]
    of = math.log if logarithmic else float
    expected = (of(values[1]) - of(values[0])) / (of(values[2]) - of(values[0]))
    assert (between - low) / (high - low) == pytest.approx(expected, abs=0.01)


def test_a_picture_in_which_nobody_got_there():
    root = ET.fromstring(law.picture([("ridge", {(1, 1): law.NEVER, (2, 1): law.NEVER})], "world_cues"))
    assert "never" in [x.text for x in root.iter(f"{SVG}text")]


def test_what_cannot_be_drawn_is_one_line(tmp_path):
    folders = law_of(tmp_path)
    against = lambda *typed: refuses("--compare", *folders[:6], *typed, "--svg", tmp_path / "c.svg")
    assert "numbers that differ between the runs, got 300" in against(
        "--curve", "queries", "--against", "world_names", "--compare", *folders[:3])
    for flag in ("guidance", "world_name", "versions"):
        assert f"--against {flag}: expected a flag with numbers" in against(
            "--curve", "queries", "--against", flag)
    assert "--against goes with --curve queries" in against("--curve", "queries")
    assert "--against goes with --curve queries" in against("--against", "world_names")
    assert "--against goes with --compare" in refuses("--out_dir", folders[0], "--curve", "queries",
                                                      "--against", "world_names")
    bare = [make_run(tmp_path / str(n), {"world_names": n}) for n in (1, 2)]
    assert "none of these runs holds a searches.jsonl" in refuses(
        "--compare", *bare, "--curve", "queries", "--against", "world_names")
    assert not (tmp_path / "c.svg").exists()
