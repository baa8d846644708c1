"""eval.py on hand-made run folders: what it prints is what the files hold, and no file can make it print nonsense.

Every test writes its own runs into a temporary folder and most call the script as a user does.
"""
import importlib
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
look = importlib.import_module("eval")      # not "import eval": that would hide the built-in

CONFIG = {"task": "prompt", "objective": "reinforce", "guidance": "token", "agg": "avg", "seed": 1, "device": "auto",
          "lr": 0.001, "out_dir": "x", "versions": {"torch": "2.13"}, "device_reason": "no GPU"}
SUMMARY = {"task": "prompt", "objective": "reinforce", "guidance": "token", "agg": "avg", "seed": 1, "device": "cpu",
           "test_accuracy": 0.9712, "best_prompt_accuracy": 0.9875, "random_accuracy": 0.5314,
           "reference_accuracy": 0.9938, "chance": 0.5, "judge_queries": 12800, "queries_to_90": 960,
           "rank_accuracy": 0.8765, "seconds": 61.5, "best_prompt": "feel \x1b[2J mood"}
SAMPLE = {"step": 20, "kind": "prompt", "context": "", "tokens": [" feel", " <b>\n", "<eot>"],
          "rewards": [0.25, 1.25, 0.53], "preference": 0.75, "text": " feel <b>\n", "reference": ""}


def evals(*points):
    return [{"step": s, "phase": "eval", "seconds": 1, "judge_queries": 64 * s, "test_accuracy": a} for s, a in points]


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
    return subprocess.run([sys.executable, str(ROOT / "eval.py"), *map(str, args)], cwd=cwd, env={**kept, **env},
                          capture_output=True, encoding="utf-8")


def shows(*args, **kw):
    done = call(*args, **kw)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def refuses(*args, **kw):
    """One line on stderr, exit status 2, no traceback -> the line."""
    done = call(*args, **kw)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    return done.stderr


# ------------------------------------------------------------------------------------------------------- one run

def test_prompt_figures_are_the_file_s_and_stand_beside_the_paper_s(tmp_path):
    out = shows("--out_dir", make_run(tmp_path / "a", samples=[SAMPLE]))
    assert "task=prompt objective=reinforce guidance=token agg=avg seed=1 device=cpu" in out and "ended well" in out
    for figure in ("0.9712", "0.9875", "0.5314", "0.9938", "12800", "960", "0.8765", "61.5"):
        assert re.search(rf" {figure} +here$", out, re.M), figure
    assert re.search(r"token guidance, avg +0.926 \(0.017\) +0.828 \(0.015\) +paper$", out, re.M)
    assert "RoBERTa-large judge numbers, not ours" in out
    assert not re.search(r"0\.926.*here", out)
    assert "feel \\x1b[2J mood" in out and "\x1b" not in out


def test_summarize_has_twins_and_delta(tmp_path):
    scores = {"rouge1": 0.7, "rouge2": 0.5, "rougeL": 0.65, "meteor": 0.91, "sft_rouge1": 0.6, "sft_rouge2": 0.55,
              "sft_rougeL": 0.6, "sft_meteor": 0.8, "task": "summarize"}
    out = shows("--out_dir", make_run(tmp_path / "a", {"task": "summarize"}, scores))
    assert re.search(r"delta +\+0.1000 +-0.0500 +\+0.0500 +\+0.1100 +here", out)
    assert re.search(r"before the loop \(sft_\) +0.6 +0.55 +0.6 +0.8 +here", out)
    assert "0.4309 (0.0006)" in out and "SST-2" not in out


def test_edits_show_their_two_figures_beside_their_own_papers(tmp_path):
    summary = {"task": "edits", "win_rate": 0.62, "token_auroc": 0.81}
    out = shows("--out_dir", make_run(tmp_path / "a", {"task": "edits"}, summary))
    assert re.search(r"win_rate +0.62 +here", out) and re.search(r"token_auroc +0.81 +here", out)
    assert re.search(r"win rate here, per cent +62 +here", out) and "Phi-3-mini, bandit" in out and "SST-2" not in out


def test_never_reached_is_said(tmp_path):
    out = shows("--out_dir", make_run(tmp_path / "a", summary={"queries_to_90": None}))
    assert re.search(r"queries_to_90 +never +here", out)


def test_newest_run_is_the_one_written_to_last(tmp_path):
    for name, log_time, config_time in (("old", 1000, 3000), ("new", 4000, 500)):
        run = make_run(tmp_path / "out" / name)
        os.utime(run / "metrics.jsonl", (log_time, log_time))
        os.utime(run / "config.json", (config_time, config_time))
    assert "run out/new:" in shows(cwd=tmp_path)


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
    assert out.count("note: ") == 2 and "metrics.jsonl: 1 unreadable line(s) ignored, the first is line 3" in out
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


# ------------------------------------------------------------------------------------------------------- the curve

def test_curve_counts_queries_and_a_repeated_step_is_overwritten():
    axis, score, points = look.eval_curve(evals((10, 0.5), (20, 0.6)) + evals((20, 0.7), (30, math.nan)))
    assert (axis, score) == ("judge_queries", "test_accuracy")
    assert points == [(10, 640, 0.5), (20, 1280, 0.7)]


def test_curve_without_queries_runs_over_steps_and_takes_any_score():
    lines = [{"step": 5, "phase": "eval", "seconds": 1, "odd_score": 3.5}, {"step": 9, "phase": "policy", "loss": 1}]
    assert look.eval_curve(lines) == ("step", "odd_score", [(5, 5, 3.5)])


def test_long_curve_fits_a_screen_and_keeps_its_end(capsys):
    look.show_curve("step", "meteor", [(i, i, i / 500) for i in range(1, 501)])
    out = capsys.readouterr().out.splitlines()
    assert len(out) <= 22 and out[-1].split()[:3] == ["500", "500", "1"]


def test_svg_is_xml_and_its_line_touches_the_corners(tmp_path):
    file = tmp_path / "c.svg"
    shows("--out_dir", make_run(tmp_path / "a"), "--svg", file)
    root = ET.parse(file).getroot()
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert texts == ["640", "1280", "0.6", "0.9", "test_accuracy over judge_queries"]
    line = next(e for e in root.iter() if e.tag.endswith("polyline"))
    assert line.get("points") == "48.0,192.0 456.0,24.0"


def test_svg_of_one_point(tmp_path):
    ET.fromstring(look.svg("step", "a<b", [(1, 1, 0.5)]))


# ------------------------------------------------------------------------------------------------------- the tokens

def test_pipe_gets_numbers_and_no_escape_codes(tmp_path):
    samples = [{**SAMPLE, "step": 10, "tokens": ["old", "", ""]}, SAMPLE]
    out = shows("--out_dir", make_run(tmp_path / "a", samples=samples))
    assert "   feel(0.25) <b>\\n(1.25)<eot>(0.53)" in out
    assert "preference 0.75" in out and "token rewards 0.25 to 1.25" in out
    assert "\x1b" not in out and "old(" not in out


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_terminal_gets_colours_unless_no_color(tmp_path, no_color):
    import pty
    run, (parent, child) = make_run(tmp_path / "a", samples=[SAMPLE]), pty.openpty()
    subprocess.run([sys.executable, ROOT / "eval.py", "--out_dir", run], stdout=child, check=True,
                   env={**os.environ, "NO_COLOR": no_color, "TERM": "xterm"})
    os.close(child)
    out = b""
    try:
        while chunk := os.read(parent, 65536):
            out += chunk
    except OSError:         # how Linux reports the end of a pseudo-terminal
        pass
    os.close(parent)
    assert (b"\x1b[30;48;2;244;109;67m feel\x1b[0m" in out) == (no_color == "")
    assert (b"feel(0.25)" in out) == (no_color == "1")


def test_colour_ends():
    low, mid, high = (look.colour(r, -2.0, 4.0) for r in (-2.0, 1.0, 4.0))
    assert low == (244, 109, 67) and mid == (255, 255, 191) and high == (102, 189, 99)
    assert low[0] > 2 * low[2] and high[1] > high[0]                    # red is red and green is green
    assert look.colour(1.0, 1.0, 1.0) == mid                            # one value only: neither good nor bad
    assert look.colour(math.nan, 0.0, 1.0) == (200, 200, 200)


def test_ansi_view_is_one_line_a_sample_whatever_the_token_holds():
    view = look.token_view([{**SAMPLE, "tokens": ["\n\r", "\x1b[2J", "\u202e\ud800"]}], "ansi")
    line = view.splitlines()[-1]
    assert line == "  " + "".join(look.paint(t, r, 0.25, 1.25, "ansi") for t, r in
                                  zip(("\\n\\r", "\\x1b[2J", "\\u202e\\ud800"), SAMPLE["rewards"]))
    assert "48;2;244;109;67m\\n" in line and "48;2;102;189;99m\\x1b" in line


def test_scale_runs_over_the_whole_set_and_bad_samples_are_dropped():
    second = {**SAMPLE, "tokens": ["x"], "rewards": [-3.0]}
    bad = [{**SAMPLE, "rewards": [1.0]}, {**SAMPLE, "rewards": None}, {**SAMPLE, "rewards": ["a", 1, 2]}]
    samples = look.last_samples([SAMPLE, *bad, second, SAMPLE])
    assert samples == [SAMPLE, second]
    assert "token rewards -3 to 1.25" in look.token_view(samples, "plain")


def test_html_escapes(tmp_path):
    file = tmp_path / "t.html"
    sample = {**SAMPLE, "context": "<script>alert(1)</script>\nb", "kind": "<i>", "reference": "a & b"}
    shows("--out_dir", make_run(tmp_path / "a", samples=[sample]), "--html", file)
    page = file.read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; b" in page and "a &amp; b" in page
    assert '<span title="0.25" style="background:#f46d43"> feel</span>' in page
    assert '<span title="1.25" style="background:#66bd63"> &lt;b&gt;\\n</span>' in page
    assert "<b>" not in page and "<i>" not in page


def test_a_run_that_learned_nothing_says_so_on_the_screen_and_on_the_page(tmp_path):
    run, file = make_run(tmp_path / "a", summary={"warnings": ["The reward is <constant>."]}, samples=[SAMPLE]), tmp_path / "t"
    assert "\n  warning: The reward is <constant>.\n" in shows("--out_dir", run, "--html", file)
    assert "  warning: The reward is &lt;constant&gt;.\n" in file.read_text(encoding="utf-8")
    for silent in ({"warnings": []}, {}, {"warnings": None}):
        assert "warning" not in shows("--out_dir", make_run(tmp_path / "b", summary=silent, samples=[SAMPLE]), "--html", file)
        assert "warning" not in file.read_text(encoding="utf-8")


def test_ascii_output_does_not_break(tmp_path):
    run = make_run(tmp_path / "a", samples=[{**SAMPLE, "tokens": ["é", " ✓", "."]}])
    assert "\\xe9(0.25) \\u2713(1.25)" in shows("--out_dir", run, PYTHONIOENCODING="ascii")


# ------------------------------------------------------------------------------------------------------- over runs

def grid(tmp_path):
    """Three runs with lr 0.001 and one with 0.01; out_dir, versions, device differ everywhere, must not matter."""
    runs = [(0.001, 0.9, 400), (0.001, 0.92, None), (0.001, 0.97, 600), (0.01, 0.5, None)]
    for i, (lr, accuracy, queries) in enumerate(runs):
        config = {"lr": lr, "seed": i, "out_dir": f"r{i}", "device": f"cuda:{i}", "versions": {"torch": i}}
        make_run(tmp_path / f"r{i}", config, {"seed": i, "test_accuracy": accuracy, "queries_to_90": queries})
    return [tmp_path / f"r{i}" for i in range(4)]


def test_compare_groups_means_and_spread_by_hand(tmp_path):
    """Mean (0.90 + 0.92 + 0.97) / 3 = 0.93; deviations -0.03, -0.01, 0.04: variance 0.0026 / 2, deviation 0.036056."""
    out = shows("--compare", *grid(tmp_path), "--json", tmp_path / "rows.json")
    lines = [line for line in out.splitlines() if line.startswith("  lr=")]
    assert len(lines) == 2 and "device" not in out
    assert re.match(r"  lr=0.001 +3 +0.93 \+- 0.03606 +0.9875 \+- 0 +12800 \+- 0 +600 \(2/3\) ", lines[0])
    assert re.match(r"  lr=0.01 +1 +0.5 \+- - +0.9875 \+- - +12800 \+- - +inf \(0/1\) ", lines[1])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["settings"] for row in rows] == [{"lr": 0.001}, {"lr": 0.01}] and rows[0]["seeds"] == [0, 1, 2]
    first, last = (row["figures"] for row in rows)
    assert first["test_accuracy"]["mean"] == pytest.approx(0.93)
    assert first["test_accuracy"]["std"] == pytest.approx(0.0360555)
    assert last["test_accuracy"]["std"] is None and last["queries_to_90"]["median"] is None


def test_compare_names_skipped_and_unfinished(tmp_path):
    a = make_run(tmp_path / "a", summary={"test_accuracy": 0.5})
    b = make_run(tmp_path / "b", {"seed": 2}, summary=None)
    (tmp_path / "empty").mkdir()
    out = shows("--compare", a, b, tmp_path / "empty", tmp_path / "missing", f"{a}/")
    assert f"unfinished, not averaged: {b} (step 20)" in out
    assert f"skipped, no readable config.json: {tmp_path}/empty {tmp_path}/missing" in out
    assert re.search(r"^  none +1 +0.5 \+- - ", out, re.M)                # b is not averaged, a is not counted twice


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


def test_compare_makes_one_table_a_task(tmp_path):
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", {"task": "edits", "K": 3}, {"task": "edits", "win_rate": 0.6, "token_auroc": 0.7})
    out = shows("--compare", a, b)
    assert "prompt: mean" in out and "edits: mean" in out and len(re.findall(r"^  none ", out, re.M)) == 2


def test_a_flag_that_older_runs_lack_is_a_setting(tmp_path):
    out = shows("--compare", make_run(tmp_path / "a"), make_run(tmp_path / "b", {"gate": True, "sizes": [1, 2]}))
    assert "gate=None sizes=None" in out and "gate=True sizes=[1, 2]" in out


# ------------------------------------------------------------------------------------------------------- bad input

def test_bad_input_is_one_line_and_exit_2(tmp_path):
    assert "no run under out/" in refuses(cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no readable config.json" in refuses("--out_dir", tmp_path / "empty")
    assert "no readable config.json" in refuses("--out_dir", tmp_path / "missing")
    assert "no readable config.json" in refuses("--compare", tmp_path / "empty")
    assert "did you mean --compare?" in refuses("--compair", "x")
    assert "unrecognized arguments: --out" in refuses("--out", "x")      # no abbreviations
    assert "--json goes with --compare" in refuses("--json", "x")
    assert "--json goes with" in refuses("--compare", "x", "--svg", "y")


def test_nothing_to_draw_and_nowhere_to_write(tmp_path):
    run = make_run(tmp_path / "a", metrics=[])
    assert "no evaluation to draw" in refuses("--out_dir", run, "--svg", tmp_path / "c.svg")
    assert "no samples to show" in refuses("--out_dir", run, "--html", tmp_path / "t.html")
    assert not (tmp_path / "c.svg").exists() and not (tmp_path / "t.html").exists()
    full = make_run(tmp_path / "b")
    assert "No such file" in refuses("--out_dir", full, "--svg", tmp_path / "no" / "c.svg")


def test_help_lists_every_flag_and_needs_no_torch():
    out = shows("-h")
    assert all(flag in out for flag in ("--out_dir", "--svg", "--html", "--compare", "--json"))
    assert not re.search(r"^(import|from) (torch|data)\b", (ROOT / "eval.py").read_text(), re.M)
