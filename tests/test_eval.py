"""eval.py on hand-made run folders: what it prints is what the files hold, and no file can make it print
nonsense.

Every test writes its own runs into a temporary folder and most call the script as a user does.
"""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
look = importlib.import_module("eval")  # not "import eval": that would hide the built-in
samples = importlib.import_module("support.samples")
terminal = importlib.import_module("support.terminal")
curves = importlib.import_module("support.curves")
runs = importlib.import_module("support.runs")

CONFIG = {
    "task": "prompt",
    "objective": "reinforce",
    "guidance": "token",
    "agg": "avg",
    "seed": 1,
    "device": "auto",
    "lr": 0.001,
    "out_dir": "x",
    "versions": {"torch": "2.13"},
    "device_reason": "no GPU",
}
SUMMARY = {
    "task": "prompt",
    "objective": "reinforce",
    "guidance": "token",
    "agg": "avg",
    "seed": 1,
    "device": "cpu",
    "test_accuracy": 0.9712,
    "best_prompt_accuracy": 0.9875,
    "random_accuracy": 0.5314,
    "reference_accuracy": 0.9938,
    "chance": 0.5,
    "judge_queries": 12800,
    "queries_to_90": 960,
    "rank_accuracy": 0.8765,
    "seconds": 61.5,
    "best_prompt": "feel \x1b[2J mood",
}
SAMPLE = {
    "step": 20,
    "kind": "prompt",
    "context": "",
    "tokens": [" feel", " <b>\n", "<eot>"],
    "rewards": [0.25, 1.25, 0.53],
    "preference": 0.75,
    "text": " feel <b>\n",
    "reference": "",
}


def evals(*points):
    return [
        {"step": s, "phase": "eval", "seconds": 1, "judge_queries": 64 * s, "test_accuracy": a}
        for s, a in points
    ]


def make_run(folder, config=(), summary=(), metrics=None, samples=(), tail=""):
    """A run folder; summary=None leaves it unfinished, `tail` ends both jsonl files with half a line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **dict(config)}))
    metrics = evals((10, 0.6), (20, 0.9)) if metrics is None else metrics
    for name, rows in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps({**SUMMARY, **dict(summary)}))
    return folder


def call(*args, cwd=ROOT, **env):
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "PYTHONIOENCODING")}
    return subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), *map(str, args)],
        cwd=cwd,
        env={**kept, **env},
        capture_output=True,
        encoding="utf-8",
    )


def shows(*args, **kw):
    done = call(*args, **kw)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def refuses(*args, **kw):
    """One line on stderr, exit status 2, no traceback -> the line."""
    done = call(*args, **kw)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    return done.stderr


# ------------------------------------------------------------------------------------------------------- one
# run


def test_figures_are_the_file_s(tmp_path):
    out = shows("--out_dir", make_run(tmp_path / "a", samples=[SAMPLE]))
    assert (
        "task=prompt objective=reinforce guidance=token agg=avg seed=1 device=cpu" in out
        and "ended well" in out
    )
    for figure in ("0.9712", "0.9875", "0.5314", "0.9938", "12800", "960", "0.8765", "61.5"):
        assert re.search(rf" {figure} +here$", out, re.M), figure
    assert "feel \\x1b[2J mood" in out and "\x1b" not in out


@pytest.mark.parametrize(
    "task, column, row",
    [
        ("prompt", "SST-2", r"token guidance, avg +0.926 \(0.017\) +0.828 \(0.015\) +paper$"),
        ("summarize", "rougeL", r"token guidance, avg +0.4309 \(0.0006\) .* paper$"),
        ("edits", "AlpacaEval 2 LC", r"Phi-3-mini, bandit +27.05 +31.3 +7.46 +paper$"),
    ],
)
def test_papers_rows_come_when_asked_and_stand_alone(tmp_path, task, column, row):
    """A figure of ours never stands in a table with a paper's column names."""
    run = make_run(tmp_path / "a", {"task": task}, {"task": task, "win_rate": 0.62})
    assert not re.search(" paper$", shows("--out_dir", run), re.M)
    for out in (shows("--out_dir", run, "--papers"), shows("--compare", run, "--papers")):
        assert re.search(row, out, re.M) and "Another experiment than ours" in out
        theirs = out[out.index(column) : out.rindex(" paper\n")]
        assert "here" not in theirs and "0.62" not in theirs


def test_papers_of_a_task_that_no_paper_has(tmp_path):
    assert "no paper's rows for task vowels" in shows(
        "--out_dir", make_run(tmp_path / "a", {"task": "vowels"}), "--papers"
    )


def test_summarize_has_twins_and_delta(tmp_path):
    scores = {
        "rouge1": 0.7,
        "rouge2": 0.5,
        "rougeL": 0.65,
        "meteor": 0.91,
        "sft_rouge1": 0.6,
        "sft_rouge2": 0.55,
        "sft_rougeL": 0.6,
        "sft_meteor": 0.8,
        "task": "summarize",
    }
    out = shows("--out_dir", make_run(tmp_path / "a", {"task": "summarize"}, scores))
    assert re.search(r"delta +\+0.1000 +-0.0500 +\+0.0500 +\+0.1100 +here", out)
    assert re.search(r"before the loop \(sft_\) +0.6 +0.55 +0.6 +0.8 +here", out)


def test_never_reached_is_said(tmp_path):
    out = shows("--out_dir", make_run(tmp_path / "a", summary={"queries_to_90": None}))
    assert re.search(r"queries_to_90 +never +here", out)


def stamp(folder, **times):
    """Sets when the files of a run were written."""
    for name, at in times.items():
        file = folder / {"config": "config.json", "log": "metrics.jsonl", "summary": "summary.json"}[name]
        os.utime(file, (at, at))


def test_newest_run_is_the_one_that_ended_last_and_is_named(tmp_path):
    stamp(make_run(tmp_path / "out" / "a"), config=100, log=200, summary=900)  # began first, ended last
    stamp(make_run(tmp_path / "out" / "b"), config=3000, log=5000, summary=800)  # its log was touched later
    assert "run out/a:" in shows(cwd=tmp_path)
    stamp(
        make_run(tmp_path / "out" / "c", summary=None), config=100, log=1000
    )  # still runs: its last line counts
    out = shows(cwd=tmp_path)
    assert "run out/c:" in out and "not finished" in out
    assert (
        runs.newest_run(tmp_path / "out", finished=True) == tmp_path / "out" / "a"
    )  # what sample.py asks for
    assert runs.newest_run(tmp_path / "none") is None


def test_a_folder_of_weights_is_no_run(tmp_path):
    (tmp_path / "out" / "weights").mkdir(parents=True)
    (tmp_path / "out" / "weights" / "config.json").write_text('{"model_type": "gpt2"}')
    assert runs.newest_run(tmp_path / "out") is None and runs.read_run(tmp_path / "out" / "weights") is None


def test_unfinished_run_says_where_it_stood_and_how_to_go_on(tmp_path):
    metrics = evals((10, 0.6)) + [{"step": 17, "phase": "reward", "loss": 1}]
    run = make_run(tmp_path / "a b", summary=None, metrics=metrics)
    out = shows("--out_dir", run)
    assert "not finished" in out and "step 17" in out and "no ckpt.pt" in out
    assert f"python train.py --init_from resume --out_dir '{run}'" in out
    (run / "ckpt.pt").write_bytes(b"x")
    assert "no ckpt.pt" not in shows("--out_dir", run)


def test_half_summary_is_an_unfinished_run(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "summary.json").write_text('{"test_accuracy": 0.')
    assert "not finished" in shows("--out_dir", run)


def test_broken_last_line_is_left_out_with_one_note_a_file(tmp_path):
    out = shows("--out_dir", make_run(tmp_path / "a", samples=[SAMPLE], tail='{"step": 30, "phase": "ev'))
    assert (
        out.count("note: ") == 2 and "metrics.jsonl: 1 unreadable line(s) ignored, the first is line 3" in out
    )
    assert "samples of step 20" in out


def test_half_a_character_and_nonsense_lines_do_no_harm(tmp_path):
    run = make_run(tmp_path / "a", samples=[SAMPLE])
    with open(run / "metrics.jsonl", "ab") as f:
        f.write(b'17\n[]\n\n{"step": "x", "phase": "eval"}\n{"step": 30, "text": "\xc3')
    assert "3 unreadable line(s)" in shows("--out_dir", run)


def test_run_without_logs(tmp_path):
    run = tmp_path / "a"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(CONFIG))
    out = shows("--out_dir", run)
    assert "step 0" in out and "evaluations: none yet" in out and "samples: none yet" in out


# ------------------------------------------------------------------------------------------------------- the
# curve


def default_curve(lines):
    figures = runs.figures_of(lines)
    phase, name = curves.choose(figures, None, look.MAIN)
    return name, *curves.curve(figures, phase, name)


def test_curve_counts_queries_and_a_repeated_step_is_overwritten():
    name, axis, points = default_curve(evals((10, 0.5), (20, 0.6)) + evals((20, 0.7), (30, math.nan)))
    assert (axis, name) == ("judge_queries", "test_accuracy")
    assert points == {10: (640, 0.5), 20: (1280, 0.7)}


def test_curve_without_queries_runs_over_steps_and_takes_any_score():
    lines = [
        {"step": 5, "phase": "eval", "seconds": 1, "odd_score": 3.5},
        {"step": 9, "phase": "policy", "loss": 1},
    ]
    assert default_curve(lines) == ("odd_score", "step", {5: (5, 3.5)})


def test_a_curve_is_found_by_name_and_an_unknown_name_names_the_nearest(tmp_path):
    lines = evals((10, 0.6), (20, 0.9)) + [
        {"step": 9, "phase": "policy", "loss": 1.5, "entropy": 2},
        {"step": 3, "phase": "sft", "loss": 7},
    ]
    run = make_run(tmp_path / "a", metrics=lines)
    assert "evaluations: loss over step" in (out := shows("--out_dir", run, "--curve", "loss"))
    assert re.search(r"^  9 +9 +1.5 ", out, re.M) and re.search(
        r"^  3 +3 +7 ", shows("--out_dir", run, "--curve", "sft/loss"), re.M
    )
    assert "did you mean entropy?" in refuses("--out_dir", run, "--curve", "entropie")
    assert "did you mean test_accuracy?" in refuses(
        "--compare", run, "--svg", tmp_path / "c.svg", "--curve", "test_acuracy"
    )
    assert "no such figure" in refuses("--out_dir", make_run(tmp_path / "b", metrics=[]), "--curve", "loss")
    assert not (tmp_path / "c.svg").exists()


def test_a_task_names_its_own_curve_and_figures(tmp_path):
    """A task that eval.py has never heard of says in config.json what counts; without that all its numbers
    do."""
    own = {"task": "vowels", "curve": "vowels", "figures": ["vowels", "seconds"]}
    metrics = [{"step": s, "phase": "eval", "length": 3.0, "vowels": v} for s, v in ((0, 1.5), (5, 2.5))]
    run = make_run(tmp_path / "a", own, {"task": "vowels", "vowels": 2.5}, metrics)
    assert "evaluations: vowels over step" in shows("--out_dir", run)
    table = shows("--compare", run)
    assert re.search(r"settings that differ +n +vowels +seconds$", table, re.M)
    assert "queries_to_90" not in table  # a note on a column that is not there
    bare = make_run(tmp_path / "b", {"task": "vowels"}, {"task": "vowels", "vowels": 2.5}, metrics)
    assert re.search(r"n +test_accuracy .* vowels$", shows("--compare", bare), re.M)


def test_long_curve_fits_a_screen_and_keeps_its_end(capsys):
    terminal.show_curve("step", "meteor", [(i, i, i / 500) for i in range(1, 501)])
    out = capsys.readouterr().out.splitlines()
    assert len(out) <= 22 and out[-1].split()[:3] == ["500", "500", "1"]


def test_svg_is_xml_and_its_line_touches_the_corners(tmp_path):
    file = tmp_path / "c.svg"
    shows("--out_dir", make_run(tmp_path / "a"), "--svg", file)
    root = ET.parse(file).getroot()
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert texts == ["0.6", "0.7", "0.8", "0.9", "800", "1000", "1200", "test_accuracy", "judge_queries"]
    line = next(e for e in root.iter() if e.tag.endswith("polyline"))
    assert line.get("points") == "64.0,308.0 620.0,34.0"


def test_svg_of_one_point_and_of_a_name_that_is_markup():
    root = ET.fromstring(curves.svg([("", [{1: (1, 0.5)}])], "step", "a<b\x1b"))
    assert "a<b\\x1b" in [e.text for e in root.iter()] and any(e.tag.endswith("circle") for e in root.iter())


def test_a_legend_of_many_settings_names_the_first_ones_and_stays_inside():
    settings = {f"flag_{i}": "value" for i in range(20)} | {"lr": 0.1, "guidance": "bandit"}
    label = look.label_of(settings)
    assert label.startswith("guidance=bandit lr=0.1 flag_0=value")
    drawn = curves.svg([(label, [{0: (0, 1)}]), ("short", [{0: (0, 2)}])], "step", "score")
    assert "guidance=bandit lr=0.1" in drawn and "flag_19" not in drawn and "... (n=1)" in drawn
    assert "short (n=1)" in drawn


def test_a_group_s_name_begins_with_what_is_unlike_most_runs():
    run = lambda **config: {"config": {"task": "t", "alpha": 1, "zeta": 1} | config}
    runs = [run(), run(bounded=True, critic=False, commit="abc"), run(zeta=2), run(alpha=3)]
    groups = look.group_runs(runs)
    assert [len(members) for _, members in groups] == [2, 1, 1]  # what follows from settings, or is none
    assert [look.label_of(settings) for settings, _ in groups] == [
        "alpha=1 zeta=1",
        "zeta=2 alpha=1",
        "alpha=3 zeta=1",
    ]


def test_svg_of_groups_has_a_band_of_spread_and_a_legend(tmp_path):
    """Three seeds of lr 0.001, 0.2, 0.3, 0.7 at the last step: mean 0.4, standard deviation sqrt(0.14 / 2) =
    0.26458."""
    for i, (lr, last) in enumerate(((0.001, 0.2), (0.001, 0.3), (0.001, 0.7), (0.01, 0.5))):
        make_run(tmp_path / f"r{i}", {"lr": lr, "seed": i}, metrics=evals((0, 0.1), (10, last)))
    file = tmp_path / "c.svg"
    shows("--compare", *(tmp_path / f"r{i}" for i in range(4)), "--svg", file, "--curve", "test_accuracy")
    root = ET.parse(file).getroot()
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert "lr=0.001 (n=3)" in texts and "lr=0.01 (n=1)" in texts
    assert "test_accuracy, mean and standard deviation of runs" in texts
    kinds = [e.tag.rpartition("}")[2] for e in root.iter()]
    grid = [i for i, e in enumerate(root.iter()) if e.get("stroke") == "#ddd"]
    assert grid and max(grid) < kinds.index("polyline")  # no grid line lies over a curve
    bands = [e.get("points").split() for e in root.iter() if e.tag.endswith("polygon")]
    assert len(bands) == 1 and len(bands[0]) == 4  # one run alone has no spread
    top, bottom = (float(p.split(",")[1]) for p in (bands[0][1], bands[0][2]))
    scale = (308 - 34) / (0.7 - 0.1)  # pixels a unit: 0.1 lies at 308, 0.7 at 34
    assert bottom - top == pytest.approx(2 * 0.264575 * scale, abs=0.2)


def test_counts_are_drawn_with_median_and_quartiles():
    """1, 2, 3, 40 (whole numbers): median 2.5, quartiles 1.75 and 12.25; as 40.0 they are no counts: mean
    11.5."""
    by_seed = [{0: (0, y)} for y in (1, 2, 3, 40)]
    assert curves.middle(by_seed) == [(0, 1.75, 2.5, 12.25)]
    by_seed[3] = {0: (0, 40.0)}
    assert curves.middle(by_seed)[0][2] == 11.5
    assert curves.middle([{0: (0, 1.5)}, {0: (0, 2.5), 5: (5, 9.0)}])[-1][0] == 0  # only steps that all have


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 7, [-2, 0, 2, 4, 6]), (640, 12800, [5000, 10000]), (5, 5, [5])],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert curves.ticks(low, high) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------- the
# tokens


def test_pipe_gets_numbers_and_no_escape_codes(tmp_path):
    samples = [{**SAMPLE, "step": 10, "tokens": ["old", "", ""]}, SAMPLE]
    out = shows("--out_dir", make_run(tmp_path / "a", samples=samples))
    assert "   feel(0.25) <b>\\n(1.25)<eot>(0.53)" in out
    assert "preference 0.75" in out and "fixed scale: 0 lowest, 0.5487 neutral, 1.313 highest" in out
    assert "\x1b" not in out and "old(" not in out


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_terminal_gets_colours_unless_no_color(tmp_path, no_color):
    import pty

    run, (parent, child) = make_run(tmp_path / "a", samples=[SAMPLE]), pty.openpty()
    subprocess.run(
        [sys.executable, ROOT / "eval.py", "--out_dir", run],
        stdout=child,
        check=True,
        env={**os.environ, "NO_COLOR": no_color, "TERM": "xterm"},
    )
    os.close(child)
    out = b""
    try:
        while chunk := os.read(parent, 65536):
            out += chunk
    except OSError:  # how Linux reports the end of a pseudo-terminal
        pass
    os.close(parent)
    assert (b"\x1b[30;48;2;214;96;77m lowest \x1b[0m\x1b[30;48;2;255;255;255m neutral \x1b[0m" in out) == (
        no_color == ""
    )
    assert (b"feel(0.25)" in out) == (no_color == "1")


def test_colours_are_red_white_and_blue_over_the_fixed_range_of_r():
    scale = samples.reward_scale({"bound": "softplus"}, [])["range"]
    assert scale == pytest.approx((0, 0.548733, 1.313262))  # b(0) and the upper end of E2's soft clamps
    low, white, high = (samples.colour(r, *scale) for r in scale)
    assert low == (214, 96, 77) and white == (255, 255, 255) and high == (67, 147, 195)
    assert samples.colour(1.308, *scale) == pytest.approx(
        samples.colour(1.312, *scale), abs=2
    )  # as good as the same
    assert samples.colour(9, *scale) == high and samples.colour(-9, *scale) == low
    assert samples.colour(math.nan, *scale) == samples.colour(None, *scale) == (200, 200, 200)
    assert samples.reward_scale({"bound": "sigmoid"}, [])["range"] == (0, 0.5, 1)
    assert samples.reward_scale({"bound": "odd"}, [{"rewards": [2, None, 4]}])["range"] == (2, 3, 4)


def test_black_letters_can_be_read_on_every_colour():
    """WCAG's contrast of black on each colour of the palette is 4.5 at least, also where dark pages dim it to
    0.9."""

    def luminance(rgb):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (0.9 * x / 255 for x in rgb)
        ]
        return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear))

    assert all((luminance(rgb) + 0.05) / 0.05 >= 4.5 for rgb in samples.PALETTE)


def view(*samples, mode="plain", **config):
    return terminal.token_view({"config": config, "samples": list(samples)}, mode)


def test_ansi_view_is_one_line_a_sample_whatever_the_token_holds():
    line = view({**SAMPLE, "tokens": ["\n\r", "\x1b[2J", "\u202e\ud800"]}, mode="ansi").splitlines()[-1]
    scale = samples.reward_scale({}, [])["range"]
    assert line == "  " + "".join(
        terminal.paint(t, r, scale, "ansi")
        for t, r in zip(("\\n\\r", "\\x1b[2J", "\\u202e\\ud800"), SAMPLE["rewards"])
    )
    assert "m\\n\\r\x1b[0m" in line and "m\\x1b[2J\x1b[0m" in line


def test_bad_samples_are_left_out_and_counted_and_a_nan_is_grey():
    broken = {**SAMPLE, "tokens": ["x", "y"], "rewards": [math.nan, 0.5]}
    bad = [{**SAMPLE, "rewards": [1.0]}, {**SAMPLE, "rewards": None}, {**SAMPLE, "rewards": ["a", 1, 2]}]
    out = view(
        SAMPLE, *bad, broken, SAMPLE, {"step": 20, "kind": "credit", "cues": [0], "cue": [1], "other": [0]}
    )
    assert out.count("preference") == 2 and "x(nan)y(0.50)" in out  # a repeated row is shown once
    assert "(3 rows left out: tokens and rewards differ in number)" in out


def test_siblings_share_their_context_line_and_have_roles():
    rows = [{**SAMPLE, "context": "ask", "role": role, "score": 1.5} for role in ("worse", "better")]
    out = view(*rows)
    assert out.count("context: ask") == 1 and "score 1.5  prompt, worse" in out


def test_a_run_that_learned_nothing_says_so(tmp_path):
    run = make_run(tmp_path / "a", summary={"warnings": ["The reward is <constant>."]}, samples=[SAMPLE])
    assert "\n  warning: The reward is <constant>.\n" in shows("--out_dir", run)
    for silent in ({"warnings": []}, {}, {"warnings": None}):
        assert "warning" not in shows("--out_dir", make_run(tmp_path / "b", summary=silent, samples=[SAMPLE]))


def test_ascii_output_does_not_break(tmp_path):
    run = make_run(tmp_path / "a", samples=[{**SAMPLE, "tokens": ["é", " ✓", "."]}])
    assert "\\xe9(0.25) \\u2713(1.25)" in shows("--out_dir", run, PYTHONIOENCODING="ascii")


# ------------------------------------------------------------------------------------------------------- over
# runs


def grid(tmp_path):
    """Three runs with lr 0.001 and one with 0.01; out_dir, versions, device differ everywhere, must not
    matter."""
    runs = [(0.001, 0.9, 400), (0.001, 0.92, None), (0.001, 0.97, 600), (0.01, 0.5, None)]
    for i, (lr, accuracy, queries) in enumerate(runs):
        config = {"lr": lr, "seed": i, "out_dir": f"r{i}", "device": f"cuda:{i}", "versions": {"torch": i}}
        make_run(tmp_path / f"r{i}", config, {"seed": i, "test_accuracy": accuracy, "queries_to_90": queries})
    return [tmp_path / f"r{i}" for i in range(4)]


def test_compare_groups_means_and_spread_by_hand(tmp_path):
    """Mean (0.90 + 0.92 + 0.97) / 3 = 0.93; deviations -0.03, -0.01, 0.04: variance 0.0026 / 2, deviation
    0.036056."""
    out = shows("--compare", *grid(tmp_path), "--json", tmp_path / "rows.json")
    lines = [line for line in out.splitlines() if line.startswith("  lr=")]
    assert len(lines) == 2 and "device" not in out
    assert re.match(r"  lr=0.001 +3 +0.93 \+- 0.03606 +0.9875 \+- 0 +12800 \+- 0 +600 \(2/3\) ", lines[0])
    assert re.match(r"  lr=0.01 +1 +0.5 \+- - +0.9875 \+- - +12800 \+- - +never \(0/1\) ", lines[1])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["settings"] for row in rows] == [{"lr": 0.001}, {"lr": 0.01}] and rows[0]["seeds"] == [
        0,
        1,
        2,
    ]
    first, last = (row["figures"] for row in rows)
    assert first["test_accuracy"]["mean"] == pytest.approx(0.93)
    assert first["test_accuracy"]["std"] == pytest.approx(0.0360555)
    assert last["test_accuracy"]["std"] is None and last["queries_to_90"]["median"] is None


def test_an_unfinished_run_stands_at_a_step_of_its_policy(tmp_path):
    """A warm start of 1,200 updates before the policy's 20 of 300: it stands at 20."""
    before = [{"step": 1200, "phase": phase, "loss": 1.0} for phase in ("judge", "sft", "warmup")]
    run = make_run(tmp_path / "a", summary=None, metrics=before + evals((0, 0.1), (20, 0.2)))
    file = tmp_path / "p.html"
    assert "it stood at step 20. To go on:" in shows("--out_dir", run, "--html", file)
    assert "it stood at step 20\"" in file.read_text(encoding="utf-8")
    assert f"unfinished, not averaged: {run} (step 20)" in shows("--compare", run)
    new = make_run(tmp_path / "b", summary=None, metrics=before)
    assert "it stood at step 0. To go on:" in shows("--out_dir", new)


def test_medians_are_announced_for_tables_that_have_them(tmp_path):
    assert "; queries_to_90: median (reached/n)\n" in shows("--compare", make_run(tmp_path / "a"))
    other = make_run(tmp_path / "b", {"task": "summarize"}, {"task": "summarize", "meteor": 0.5})
    assert "queries_to_90" not in shows("--compare", other)


def test_what_a_preset_has_set_is_named_once_a_flag(tmp_path):
    """--preset and each flag that it sets are settings; the list of them in config.json says them again."""
    plain = make_run(tmp_path / "a", {"preset": "none", "kl": 0.3, "preset_set": {}})
    paper = make_run(tmp_path / "b", {"preset": "paper", "kl": 0.0, "preset_set": {"kl": 0.0}})
    out = shows("--compare", plain, paper)
    assert "  preset=paper kl=0.0 " in out and "preset_set" not in out


def test_compare_names_skipped_and_unfinished(tmp_path):
    a = make_run(tmp_path / "a", summary={"test_accuracy": 0.5})
    b = make_run(tmp_path / "b", {"seed": 2}, summary=None)
    (tmp_path / "empty").mkdir()
    out = shows("--compare", a, b, tmp_path / "empty", tmp_path / "missing", f"{a}/")
    assert f"unfinished, not averaged: {b} (step 20)" in out
    assert f"skipped, no readable config.json: {tmp_path}/empty {tmp_path}/missing" in out
    assert re.search(r"^  none +1 +0.5 \+- - ", out, re.M)  # b is not averaged, a is not counted twice


def test_compare_shows_missing_figures_and_repeated_seeds(tmp_path):
    a = make_run(tmp_path / "a", summary={"rank_accuracy": None})
    b = make_run(tmp_path / "b")
    for run in (a, b):
        summary = json.loads((run / "summary.json").read_text())
        del summary["queries_to_90"], summary["seconds"]
        (run / "summary.json").write_text(json.dumps(summary))
    line = next(x for x in shows("--compare", a, b).splitlines() if x.startswith("  none"))
    figures = r"0.9712 \+- 0 +0.9875 \+- 0 +12800 \+- 0 +- +0.8765 \+- - \(n=1\) +-"
    assert re.fullmatch(r"  none +2 \(1 seeds\) +" + figures, line)


def test_select_top3_shows_the_mean_of_three_prompts_where_a_run_has_it(tmp_path, capsys):
    new = make_run(tmp_path / "new", summary={"top3_accuracy": 0.875})
    old = make_run(tmp_path / "old")
    plain, asked = shows("--compare", new), shows("--compare", new, "--select", "top3")
    assert "best_prompt_accuracy" in plain and "0.9875 +- -" in plain and "top3_accuracy" not in plain
    assert "top3_accuracy" in asked and "0.875 +- -" in asked and "best_prompt_accuracy" not in asked
    assert "best_prompt_accuracy" in shows("--compare", old, "--select", "top3")


def test_compare_makes_one_table_a_task(tmp_path):
    a = make_run(tmp_path / "a")
    b = make_run(
        tmp_path / "b", {"task": "edits", "K": 3}, {"task": "edits", "win_rate": 0.6, "token_auroc": 0.7}
    )
    out = shows("--compare", a, b)
    assert "prompt: mean" in out and "edits: mean" in out and len(re.findall(r"^  none ", out, re.M)) == 2


def test_a_flag_that_older_runs_lack_is_a_setting(tmp_path):
    out = shows(
        "--compare", make_run(tmp_path / "a"), make_run(tmp_path / "b", {"gate": True, "sizes": [1, 2]})
    )
    assert "gate=None sizes=None" in out and "gate=True sizes=[1, 2]" in out


# ------------------------------------------------------------------------------------------------------- bad
# input


def test_bad_input_is_one_line_and_exit_2(tmp_path):
    assert "no run under out/" in refuses(cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no readable config.json" in refuses("--out_dir", tmp_path / "empty")
    assert "no readable config.json" in refuses("--out_dir", tmp_path / "missing")
    assert "no readable config.json" in refuses("--compare", tmp_path / "empty")
    assert "did you mean --compare?" in refuses("--compair", "x")
    assert "unrecognized arguments: --out" in refuses("--out", "x")  # no abbreviations
    assert "--json goes with --compare" in refuses("--json", "x")
    assert "--compare does not go with --out_dir" in refuses("--compare", "x", "--out_dir", "y")
    assert "--tables does not go with --svg" in refuses("--tables", "--svg", "y")
    assert "--curve of --compare goes with --svg" in refuses("--compare", "x", "--curve", "y")
    assert "expected TABLE ROW DIR" in refuses("--collect", "a", "b")


def test_nothing_to_draw_and_nowhere_to_write(tmp_path):
    run = make_run(tmp_path / "a", metrics=[])
    assert "no evaluation to draw" in refuses("--out_dir", run, "--svg", tmp_path / "c.svg")
    assert "no evaluation to draw" in refuses("--compare", run, "--svg", tmp_path / "c.svg")
    open_run = make_run(tmp_path / "o", summary=None)
    assert "none of these runs has ended" in refuses("--compare", open_run, "--html", tmp_path / "c.svg")
    assert not (tmp_path / "c.svg").exists()
    full = make_run(tmp_path / "b")
    for flag in ("--svg", "--html"):
        assert "No such file" in refuses("--out_dir", full, flag, tmp_path / "no" / "c.svg")


def test_help_lists_every_flag_and_needs_no_torch():
    out = shows("-h")
    assert all(
        flag in out
        for flag in (
            "--out_dir",
            "--svg",
            "--html",
            "--compare",
            "--json",
            "--curve",
            "--against",
            "--papers",
            "--tables",
            "--collect",
        )
    )
    code = "import sys, importlib; importlib.import_module('eval'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# -------------------------------------------------------------------------------------------------------
# searches


def staircases(folder, known):
    """searches.jsonl of a run: {method: [(queries, accuracy)]}."""
    lines = [{"search": k, "queries": x, "accuracy": y} for k, points in known.items() for x, y in points]
    (folder / "searches.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def three_seeds(tmp_path):
    """Runs of three seeds. The run itself has 0.9 after 16, 64 and 128 queries, hill climbing on one seed."""
    folders = []
    for seed, (own, hill) in {1: (16, 96), 2: (128, None), 3: (64, None)}.items():
        points = [(1, 0.5), (4, 0.6 + seed / 100), (own, 0.95), (160, 0.95)]
        climbed = [(1, 0.4), (*([(hill, 0.9)] if hill else [(32, 0.7)])[0],), (160, 0.9 if hill else 0.7)]
        run = make_run(tmp_path / f"s{seed}", {"seed": seed}, {"seed": seed})
        folders.append(staircases(run, {"run": points, "hill": climbed}))
    return folders


def test_searches_are_a_table_of_medians(tmp_path):
    """By hand: 0.9 after 16, 64, 128 queries: 64, three of three; hill after 96, never, never: never. After
    10 (a 16th of 160) the run has 0.61, 0.62, 0.63; after 40 (a quarter) 0.95, 0.62, 0.63; after 80 0.95,
    0.62, 0.95; hill after 40 has 0.4, 0.7, 0.7."""
    out = shows("--compare", *three_seeds(tmp_path), "--curve", "searches")
    lines = [re.split(r"  +", x.strip()) for x in out.splitlines()]
    head = next(x for x in lines if x[0] == "method")
    assert head == ["method", "n", "queries to 0.9", "after 10", "after 20", "after 40", "after 80",
                    "after 160"]
    own, hill = (next(x for x in lines if x[0] == name) for name in ("token guidance", "hill"))
    assert own == ["token guidance", "3", "64 (3/3)", "0.62", "0.63", "0.63", "0.95", "0.95"]
    assert hill == ["hill", "3", "never (1/3)", "0.4", "0.4", "0.7", "0.7", "0.7"]


def test_searches_are_staircases_with_median_and_quartiles_in_a_colour_a_method(tmp_path):
    """By hand at 64 queries, where the third seed jumps: before 0.95, 0.62, 0.63, then 0.95, 0.62, 0.95."""
    folders = three_seeds(tmp_path)
    searches = importlib.import_module("support.searches")
    own, hill = searches.methods([({}, [runs.read_run(x) for x in folders])])
    assert own[0] == "token guidance" and hill[0] == "hill"
    line = curves.middle(searches.staircases(own[1]), quartiles=True)
    at_64 = [x[1:] for x in line if x[0] == 64]
    assert at_64 == [pytest.approx((0.625, 0.63, 0.79)), pytest.approx((0.785, 0.95, 0.95))]
    assert [x[0] for x in line] == sorted([1, 4, 16, 64, 128, 160] * 2)
    shows("--compare", *folders, "--curve", "searches", "--svg", tmp_path / "c.svg")
    picture = (tmp_path / "c.svg").read_text()
    root = ET.fromstring(picture)
    paths = [x for x in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert len(paths) == 2 and len({x.get("stroke") for x in paths}) == 2  # no thin line of a run
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polygon"))) == 2
    said = [x.text for x in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "hill (n=3)" in said and "token guidance (n=3)" in said and "judge queries" in said
    assert any("median and quartiles of runs" in x for x in said)


def test_searches_of_one_run_and_of_several_settings(tmp_path):
    one, two, three = three_seeds(tmp_path)
    assert "token guidance  1" in shows("--out_dir", one, "--curve", "searches")
    other = staircases(make_run(tmp_path / "b", {"guidance": "bandit"}), {"run": [(1, 0.5), (80, 0.6)]})
    out = shows("--compare", one, two, other, "--curve", "searches")
    assert "token guidance, guidance=token" in out and "hill, guidance=token" in out
    assert "bandit guidance, guidance=bandit" in out and "hill, guidance=bandit" not in out


def test_searches_where_there_are_none_are_one_line(tmp_path):
    run = make_run(tmp_path / "a")
    for typed in (("--compare", run), ("--out_dir", run)):
        assert "none of these runs holds a searches.jsonl" in refuses(*typed, "--curve", "searches")
    staircases(run, {"run": [(None, 0.5), (4, "much")]})
    assert "none of these runs" in refuses("--compare", run, "--curve", "searches", "--svg", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_queries_that_never_came_are_said_for_every_search(tmp_path):
    out = shows("--out_dir", make_run(tmp_path / "a", summary={"hill_queries_to_90": None}))
    assert re.search(r"hill_queries_to_90 +never +here", out)


# -------------------------------------------------------------------------------------------------------
# results/


def results_of(tmp_path):
    """Two seeds of one row; the second never reached 0.9."""
    results = importlib.import_module("support.results")
    for seed, (accuracy, queries) in {1: (0.9, 400), 2: (0.8, None)}.items():
        config = {
            "seed": seed,
            "out_dir": f"/home/me/out/{seed}",
            "tokenizer": "/home/me/gpt2", "cache_dir": "/home/me/cache",
            "data": "/home/me/data",
            "world": "hub:a/b",
        }
        metrics = evals(*((i, i / 500) for i in range(1, 401)))
        make_run(
            tmp_path / str(seed),
            config,
            {"seed": seed, "test_accuracy": accuracy, "queries_to_90": queries},
            metrics,
        )
    staircases(tmp_path / "1", {"run": [(1, 0.5), (400, 0.9)]})  # older runs have none
    root = tmp_path / "results"
    assert results.collect("claim", "token", [tmp_path / "1", tmp_path / "2"], root) == ["1", "2"]
    return results, root


def test_collect_keeps_what_a_table_needs_and_no_machine_s_paths(tmp_path):
    results, root = results_of(tmp_path)
    config = json.loads((root / "claim" / "token" / "1" / "config.json").read_text())
    assert "cache_dir" not in config and (config["out_dir"], config["data"], config["world"]) == (
        "1",
        "data",
        "hub:a/b",
    )
    assert "/home/me" not in "".join(f.read_text() for f in root.rglob("*.json*"))
    both = [root / "claim" / "token" / seed / "searches.jsonl" for seed in "12"]
    assert both[0].read_text() == (tmp_path / "1" / "searches.jsonl").read_text() and not both[1].exists()
    log = runs.read_lines(root / "claim" / "token" / "1" / "metrics.jsonl")
    assert len(log) <= 40 and log[-1]["step"] == 400  # thinned, its end kept
    assert json.loads((root / "claim" / "token" / "2" / "summary.json").read_text())["test_accuracy"] == 0.8
    results.collect("claim", "token", [tmp_path / "2"], root)  # a row is replaced, not mixed
    assert [d.name for d in (root / "claim" / "token").iterdir()] == ["2"]
    for bad, said in (
        ((tmp_path / "1", tmp_path / "1"), "seed 1 is there already"),
        ((tmp_path / "no",), "no finished run"),
    ):
        with pytest.raises(results.ResultsError, match=said):
            results.collect("claim", "token", bad, root)
    with pytest.raises(results.ResultsError, match="expected a name"):
        results.collect("../x", "token", [tmp_path / "1"], root)


def test_tables_are_made_by_hand_s_rules_and_a_page_that_differs_is_named(tmp_path):
    """Mean of 0.9 and 0.8: 0.85, deviation sqrt(2 * 0.05^2 / 1) = 0.0707. Never is infinite: median of 400
    and never."""
    results, root = results_of(tmp_path)
    columns = [
        ["test_accuracy", "test", "mean"],
        ["test_accuracy", "worst", "worst"],
        ["queries_to_90", "queries", "median"],
        ["queries_to_90", "slowest", "worst"],
        ["queries_to_90", "reached", "reached"],
        ["none", "none", "mean"],
    ]
    table = {
        "title": "claim 1",
        "command": "python train.py",
        "commit": "abc",
        "columns": columns,
        "rows": [["token", "ours"]],
    }
    (root / "claim" / "table.json").write_text(json.dumps(table))
    found = results.tables(root)
    assert found["claim"].split("\n") == [
        "| claim 1 | seeds | test | worst | queries | slowest | reached | none |",
        "| --- |" + " --- |" * 7,
        "| ours | 2 | 0.850 +- 0.071 | 0.800 | never | never | 1/2 | - |",
        "",
        "`python train.py`, commit abc",
    ]
    runs = sorted(root.glob("claim/token/*/config.json"))
    for file in runs:  # what a run says of itself counts
        file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": "def"}))
    assert results.tables(root)["claim"].endswith("`python train.py`, commit def")
    shutil.copytree(root / "claim" / "token", root / "claim" / "older")
    for file in root.glob("claim/older/*/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": None}))
    table["rows"].append(["older", "theirs"])
    (root / "claim" / "table.json").write_text(json.dumps(table))
    assert results.tables(root)["claim"].endswith("`python train.py`, commit def: ours; abc")
    table["rows"].pop()
    page = "text\n\n" + results.as_blocks(found) + "\n\nmore"
    assert results.differences(page, found) == []
    assert results.differences(page.replace("0.850", "0.950"), found)[0].startswith(
        "claim: results/ say '| ours | 2 | 0.850"
    )
    assert results.differences("", found) == ["claim: in results/, not on the page"]
    assert results.differences(page, {}) == ["claim: on the page, not in results/"]
    table["rows"].append(["gone", "gone"])
    (root / "claim" / "table.json").write_text(json.dumps(table))
    with pytest.raises(results.ResultsError, match="gone: no run of this row"):
        results.tables(root)


def test_the_tables_of_docs_results_md_are_those_of_the_runs_kept_in_results():
    results = importlib.import_module("support.results")
    page, found = ROOT / "docs" / "results.md", results.tables()
    assert sum(f.stat().st_size for f in results.ROOT.rglob("*") if f.is_file()) <= 3_000_000
    if not found:
        pytest.skip("results/ holds no table yet")
    assert results.differences(page.read_text(encoding="utf-8"), found) == []
    assert results.as_blocks(found) in shows("--tables")
