"""The page of a run: what is in it, whatever the run's files hold, and what it does in a real browser.

The browser is headless Chromium (tests/browser.py), which really clicks, types and points. Where it is not
installed these tests are skipped; those of the page's text are not.
"""

import importlib
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from stubs import small_worlds, trained
from test_eval import evals, make_run, shows

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
report = importlib.import_module("report")
token_view = importlib.import_module("support.terminal").token_view

NASTY = "</script><script>document.title = 'gone'; fetch('http://localhost:9/x')</script><!--"


def row(step, group, role, tokens, rewards, preference, **more):
    return {
        "step": step,
        "kind": "prompt",
        "group": group,
        "role": role,
        "context": "",
        "reference": "",
        "tokens": tokens,
        "rewards": rewards,
        "weights": [x - 0.5 for x in rewards],
        "log_ratio": [0.1 * i - 0.2 for i in range(len(tokens))],
        "errors": None,
        "preference": preference,
        "score": sum(rewards) / max(1, len(rewards)),
        "text": "".join(tokens),
        **more,
    }


def prompt_rows(step, blue):
    """Group a: the best prompt and two with a word replaced, the second of which the reward prefers; b:
    ordered rightly."""
    words = [" mood", " verdict", " fan"]
    return [
        row(step, "a", "best", words, [blue, 1.2, 1.2], 3.0),
        row(step, "a", "place 1 random", [" kilabar", *words[1:]], [0.1, 1.2, 1.2], 1.0),
        row(step, "a", "place 3 random", [*words[:2], " @"], [1.31, 1.3, 1.31], 0.0),
        row(step, "b", "right", [" ok"], [0.9], 1.0),
        row(step, "b", "wrong", [" no"], [0.3], 0.0),
        {
            "step": step,
            "kind": "vocabulary",
            "prefix": words[:2],
            "top": [[" fan", blue]],
            "bottom": [[" @", 0.02]],
        },
        {"step": step, "kind": "credit", "cues": [0, 1], "cue": [blue, 1.3], "other": [0.0, 0.7]},
    ]


def runs_of_each_task(tmp_path):
    """A run a task, as train.py writes them; texts try to be markup."""
    prompt = [x for step, blue in ((0, 0.549), (10, 0.9), (20, 1.31)) for x in prompt_rows(step, blue)]
    text = f"a report {NASTY} \x1b[2J \u202e\u05d0 \U0001f642"
    summary = [
        dict(row(step, "doc 1", role, tokens, rewards, p), kind="summary", context=text, reference=NASTY)
        for step in (0, 20)
        for role, tokens, rewards, p in (
            ("right", [" the", " fox", NASTY, "\u202e\u05d0", "\n"], [0.5, 1.0, 1.1, 0.2, 0.6], 1.0),
            ("wrong fact", [" the", " hen", NASTY, "\U0001f642"], [0.5, 0.1, 1.1, 0.2], 0.5),
        )
    ]
    edit = [
        dict(row(step, "0", role, tokens, rewards, p), kind="edit", context="on friday", errors=errors)
        for step in (0, 20)
        for role, tokens, rewards, p, errors in (
            ("worse", [" six", " pans", "<eot>"], [0.2, 1.0, 0.6], -1.0, [True, False, False]),
            ("better", [" two", " pans", "<eot>"], [1.1, 1.0, 0.6], 0.0, [False, False, False]),
        )
    ]
    files = {}
    for task, rows in (("prompt", prompt), ("summarize", summary), ("edits", edit)):
        run = make_run(
            tmp_path / task,
            {"task": task, "bound": "softplus", "figures": ["seconds"]},
            {"task": task, "best_prompt": NASTY, "warnings": [f"Beware of {NASTY}."]},
            samples=rows,
        )
        files[task] = tmp_path / f"{task}.html"
        shows("--out_dir", run, "--html", files[task])
    return files


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return runs_of_each_task(tmp_path_factory.mktemp("pages"))


def data_of(page):
    """What a page holds, read as a browser reads it: up to the first end of a script."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', page, re.S)[1])


def page_of(*samples, lines=(), config=(), summary=None, **more):
    """The page of a run that is never written."""
    run = {
        "dir": Path("out/x"),
        "config": {"task": "prompt", **dict(config)},
        "summary": summary,
        "task": "prompt",
        "lines": list(lines),
        "samples": list(samples),
    }
    return report.page([("", [run])], **more)


# ------------------------------------------------------------------------------------------------------- the
# text of it


def test_text_from_data_is_inert_and_the_page_may_fetch_nothing(pages):
    for file in pages.values():
        page = file.read_text(encoding="utf-8")
        assert page.count("<script") == page.count("</script") == 2 and "<!--" not in page
        assert "document.title = 'gone'" in page  # the text is there, as text
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
        assert (
            policy.startswith("default-src 'none'")
            and "unsafe" not in policy
            and policy.count("sha256-") == 2
        )
        assert not re.search(r'(src|href)="(?!data:)', page) and "innerHTML" not in page
        assert "\x1b" not in page and "\u202e" not in page


def test_marks_of_the_template_in_the_data_stay_what_they_are():
    assert data_of(page_of(row(0, "a", "@SCRIPT@", ["@DATA@"], [1.0], 1)))["samples"][0]["steps"][0][
        "groups"
    ][0]["rows"][0]["tokens"] == ["@DATA@"]


@pytest.mark.parametrize(
    "samples, lines, summary",
    [
        ([], [], None),
        ([], [], {}),
        ([], evals((0, 0.5)), {"seconds": None, "warnings": 3}),
        ([row(0, "a", "x", ["t"], [math.nan], math.nan)], evals((0, math.nan)), None),
        (
            [row(0, "a", "x", [], [], None)],
            [{"step": "x"}, {"phase": 3, "step": 1}, {"phase": "eval", "step": 1, "x": 10**400}],
            {},
        ),
        (
            [
                {"step": 1, "tokens": ["a"], "rewards": [1.0]},
                {"tokens": ["a"], "rewards": [1.0]},
                {"step": 2},
            ],
            [],
            {"warnings": [3]},
        ),
        (
            [
                {"step": 0, "kind": "credit"},
                {"step": 0, "kind": "vocabulary", "top": 3, "bottom": [[1]]},
                row(0, "a", "x", ["t"], [1], 1),
            ],
            [],
            None,
        ),
        (
            [
                {
                    **row(0, "a", "x", ["t", "u"], [1, 2], 1),
                    "weights": [1.0],
                    "log_ratio": "no",
                    "errors": [True],
                    "kind": 3,
                    "role": None,
                }
            ],
            [],
            None,
        ),
    ],
)
def test_a_page_of_whatever_a_run_left(samples, lines, summary):
    """No samples, no lines, NaN, an empty sequence, rows of the wrong form: a page, and valid JSON in it."""
    found = data_of(page_of(*samples, lines=lines, summary=summary))
    assert found["states"][0][1] == bool(summary)


def test_rows_of_unequal_length_are_left_out_and_counted():
    found = data_of(
        page_of(
            row(0, "a", "x", ["t"], [1.0], 1), {**row(0, "a", "y", ["t", "u"], [1.0], 1), "rewards": [1.0]}
        )
    )
    assert len(found["samples"][0]["steps"][0]["groups"][0]["rows"]) == 1
    assert "1 of 2 rows whose tokens and rewards go together" in found["notes"][0]


def test_an_unfinished_run_says_so_and_a_finished_one_when():
    assert data_of(page_of(lines=evals((7, 0.5))))["states"] == [
        ["not finished (stopped, or still running): it stood at step 7", False]
    ]
    assert data_of(page_of(summary={"seconds": 61.4}))["states"] == [["ended well after 61 s", True]]


def test_scales_are_fixed_for_r_and_even_around_the_neutral_value_for_the_rest():
    rows = [
        row(
            0,
            "a",
            "x",
            ["t", "u"],
            [0.2, 1.2],
            1,
            weights=[-1.0, 3.0],
            log_ratio=[0.5, -0.25],
            errors=[True, False],
        )
    ]
    scales = lambda **config: data_of(page_of(*rows, config=config))["samples"][0]["scales"]
    assert scales()["rewards"]["range"] == pytest.approx([0, 0.548733, 1.313262])
    assert scales(bound="sigmoid")["rewards"]["range"] == [0, 0.5, 1]
    assert scales()["weights"]["range"] == [-3, 0, 3] and "white at 0" in scales()["weights"]["text"]
    assert scales()["log_ratio"]["range"] == [-0.5, 0, 0.5] and scales()["errors"]["range"] == [-1, 0, 0]
    positive = data_of(page_of(rows[0] | {"weights": [1.0, 3.0]}))["samples"][0]["scales"]["weights"]
    assert positive["range"] == [1, 2, 3] and "white at 2, the mean weight" in positive["text"]
    old = {k: v for k, v in rows[0].items() if k in ("step", "kind", "tokens", "rewards", "preference")}
    assert list(data_of(page_of(old))["samples"][0]["scales"]) == ["rewards"]  # older runs know only r


def test_a_run_that_learned_no_reward_says_so_beside_the_scale_and_on_the_terminal():
    """Plain MLE and bandit guidance log rounds without a fit: their r is that of a new net, and the page must
    not read as if it had been learned."""
    fit, none = {"step": 0, "phase": "reward", "reward_fit_steps": 0}, {"step": 0, "phase": "reward"}
    said = "This run learned no reward: "
    for lines, says in (([none], True), ([none, fit], False), ([], False)):
        page = data_of(page_of(row(0, "a", "x", ["t"], [0.5], 1), lines=lines))
        assert page["samples"][0]["scales"]["rewards"]["text"].startswith(said) == says
        run = {"config": {}, "lines": lines, "samples": [row(0, "a", "x", ["t"], [0.5], 1)]}
        assert (said in token_view(run, "plain")) == says


def test_a_reward_that_is_not_r_itself_has_no_fixed_range():
    """What config.json says of the guidance counts, whatever its name; older runs have only the name."""
    rows = [row(0, "a", "x", ["t", "u"], [-0.5, 0.5], 1)]
    shown = lambda **config: data_of(page_of(*rows, config=config))["samples"][0]["scales"]["rewards"]
    for config, fixed in (({"guidance": "red2", "bounded": False}, False), ({"guidance": "red"}, False),
                          ({"guidance": "red2", "bounded": True}, True), ({"guidance": "token"}, True)):
        assert (shown(**config)["range"] == [-0.5, 0, 0.5]) != fixed, config


def test_ppo_shows_advantages_and_says_so():
    rows = [row(0, "a", "x", ["t"], [0.5], 1)]
    scales = lambda name: data_of(page_of(*rows, config={"objective": name}))["samples"][0]["scales"]
    text = lambda name: scales(name)["weights"]["text"]
    assert text("ppo").startswith("The advantage of each token") and "advantage" not in text("reinforce")
    mine = data_of(page_of(*rows, config={"objective": "mine", "critic": True}))
    assert mine["samples"][0]["scales"]["weights"]["text"].startswith("The advantage of each token")
    lucky = data_of(page_of(rows[0] | {"weights": [0.5]}, config={"objective": "ppo"}))  # all above 0
    assert lucky["samples"][0]["scales"]["weights"]["range"] == [-0.5, 0, 0.5]


def test_a_large_run_fits_into_two_megabytes_keeps_both_ends_and_says_what_is_left_out():
    """80 evaluations, in two of them 8 groups of 2 texts of 5,000 tokens, and 10,000 log lines."""
    words, values = [f"w{i} " for i in range(5000)], [i / 5000 for i in range(5000)]
    long = [
        {**row(0, str(g), f"r{k}", words, values, k), "context": "x y " * 30000}
        for g in range(8)
        for k in range(2)
    ]
    short = [row(0, str(g), "r0", words[:200], values[:200], 1) for g in range(8)]
    samples = [{**x, "step": step} for step in range(80) for x in (long if step in (0, 79) else short)]
    lines = [{"step": i, "phase": "policy", "loss": i * 0.123456789} for i in range(10000)]
    page = page_of(*samples, lines=lines, summary={})
    found = data_of(page)
    assert len(page.encode()) <= 2_000_000
    steps = [view["step"] for view in found["samples"][0]["steps"]]
    assert steps[0] == 0 and steps[-1] == 79
    points = found["curves"][0]["figures"][0]["groups"][0]["mean"]
    assert points[0][0] == 0 and points[-1][0] == 9999
    for what in (
        f"{len(steps)} of 80 evaluations",
        "of 5000 tokens of a sequence",
        "of 10000 points of a curve",
    ):
        assert what in found["notes"][0]
    first = found["samples"][0]["steps"][0]["groups"][0]["rows"][0]
    assert len(first["tokens"]) < 5000 and first["mean"] == pytest.approx(
        0.4999
    )  # the mean is the whole row's


def test_many_runs_with_many_figures_fit_too():
    lines = [
        {"step": i, "phase": "policy", **{f"figure_{k}": i * 1.2345 + k for k in range(90)}}
        for i in range(40)
    ]
    runs = [
        {
            "dir": Path(f"out/{i}"),
            "config": {"task": "prompt", **{f"flag_{k}": "v" * 300 for k in range(200)}},
            "summary": {},
            "task": "prompt",
            "lines": lines,
            "samples": [row(0, "a", "x", ["t"] * 50, [1.0] * 50, 1)],
        }
        for i in range(36)
    ]
    page = report.page([(f"lr={i}", runs[i::12]) for i in range(12)])
    assert len(page.encode()) <= 2_000_000 and "Not everything is on this page" in data_of(page)["notes"][0]


def test_a_page_over_more_groups_than_can_be_drawn_fits_and_says_how_many_it_shows():
    lines = [{"step": i, "phase": f"phase_{p}", **{f"figure_{k}": i + k for k in range(12)}}
             for i in range(10) for p in range(15)]
    run = {"dir": Path("out/a"), "config": {"task": "prompt"}, "summary": {}, "task": "prompt",
           "lines": lines, "samples": []}
    page = report.page([(f"lr={i}", [run, run]) for i in range(60)])
    found = data_of(page)
    drawn = {len(figure["groups"]) for phase in found["curves"] for figure in phase["figures"]}
    assert len(page.encode()) <= 2_000_000 and drawn == {len(found["groups"])} and len(found["groups"]) < 60
    assert f"{len(found['groups'])} of 60 groups of runs" in found["notes"][0]
    assert "12 of 15 phases" in found["notes"][0]


def test_settings_that_differ_are_marked_and_paths_are_names():
    found = data_of(
        page_of(
            config={
                "lr": 0.0,
                "seed": 1,
                "changed": ["seed"],
                "out_dir": "/home/me/out/a",
                "cache_dir": "/home/c",
            },
            differing=["lr"],
        )
    )
    assert "Bold: not the task's default" in page_of()  # a reader is told what the mark means
    assert found["runs"][0]["settings"] == [
        ["task", "prompt", False],
        ["lr", "0.0", True],
        ["seed", "1", True],
        ["out_dir", "a", False],
    ]


def test_the_mean_of_seeds_is_drawn_over_the_steps_that_all_have(tmp_path):
    for i, points in enumerate(([(0, 0.1), (10, 0.2)], [(0, 0.3), (10, 0.6), (20, 0.9)])):
        make_run(tmp_path / f"r{i}", {"seed": i}, metrics=evals(*points), samples=prompt_rows(0, 1.0))
    make_run(tmp_path / "open", summary=None)
    file = tmp_path / "all.html"
    shows("--compare", tmp_path / "r0", tmp_path / "r1", tmp_path / "open", "--html", file)
    found = data_of(file.read_text(encoding="utf-8"))
    accuracy = next(f for f in found["curves"][0]["figures"] if f["name"] == "test_accuracy")["groups"][0]
    assert accuracy["mean"] == [[0, 0.2], [10, 0.4]] and accuracy["runs"][1] == [
        [0, 0.3],
        [10, 0.6],
        [20, 0.9],
    ]
    assert (
        found["title"] == "2 runs, 1 setting"
        and "Left out, not finished" in found["what"]
        and "open" in found["what"]
    )


# ------------------------------------------------------------------------------------------------------- in a
# browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    folder = tmp_path_factory.mktemp("chromium")
    found = Browser(folder)
    yield found
    found.close()
    shutil.rmtree(folder, ignore_errors=True)


FIRST = "#cards .t"
COLOUR = f"document.querySelector({FIRST!r}).style.backgroundColor"
ROLES = "[...document.querySelectorAll('#cards .card:first-child .meta b')].map(x => x.textContent)"
TITLES = "[...document.querySelectorAll('#cards .card strong')].map(x => x.textContent)"


@pytest.mark.parametrize("task", ["prompt", "summarize", "edits"])
def test_the_page_of_each_task_loads_without_complaint_runs_no_text_and_fetches_nothing(browser, pages, task):
    for width, dark, phone in ((1100, False, False), (360, True, True)):
        browser.open(pages[task], width, 800, dark, phone)
        assert browser.run("document.querySelectorAll('#cards .t').length") > 3
        assert browser.run("document.querySelectorAll('.chart').length") == 2
        assert browser.run("document.querySelector('.warning').textContent").startswith("Beware of </script>")
        assert browser.run("document.scripts.length") == 2 and browser.run("document.title") != "gone"
        assert NASTY in browser.run("document.body.innerText") if task == "summarize" else True
        assert browser.run("document.documentElement.scrollWidth") <= width  # nothing sticks out of a phone
        assert browser.complaints() == [] and browser.requests() == []


SHORT = {
    "prompt": "--judge_steps 5 --judge_read 2 --judge_width 16 --judge_layers 1 --prompt_length 3 --shots 2 "
              "--candidates 8 --reward_warmup 2",
    "summarize": "--sft_steps 3 --candidates 4",
    "edits": "--sft_steps 3",
}


@pytest.mark.parametrize("task", SHORT)
def test_the_page_of_a_run_by_train_py_loads_and_its_slider_moves(browser, tmp_path, task, monkeypatch):
    small_worlds(monkeypatch)
    _, _, run = trained(
        tmp_path, f"--task {task} --n_embd 16 --policy_steps 4 --eval_every 2 --log_every 1 --curve_size 8 "
        f"--reward_first 2 --reward_steps 1 --reward_every 2 --batch_size 8 {SHORT[task]}")
    shows("--out_dir", run, "--html", tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    assert browser.run("document.getElementById('at').textContent").startswith("step 4 ")
    browser.run("document.getElementById('step').focus()")
    browser.press("Home")
    assert browser.run("document.getElementById('at').textContent").startswith("step 0 ")
    assert browser.run("document.querySelectorAll('#cards .t').length") > 3
    r = browser.run(COLOUR)
    # log pi - log pi_start: 0 everywhere before the first update
    browser.click("#quantity label:nth-of-type(3)")
    assert browser.run("document.querySelector('#quantity input:checked').value") == "log_ratio"
    assert browser.run(COLOUR) == "rgb(255, 255, 255)" and r.startswith("rgb(")
    assert browser.complaints() == [] and browser.requests() == []


def test_a_page_that_broke_its_rules_would_be_noticed(browser, tmp_path):
    """The checks above can fail: a script that is not the page's own, a request, an exception."""
    file = tmp_path / "bad.html"
    file.write_text(
        page_of() + "<script>throw 1</script><img src='http://localhost:9/x.png'>", encoding="utf-8"
    )
    browser.open(file)
    assert any("Content Security Policy" in str(x) for x in browser.complaints())
    file.write_text("<script>throw Error('x')</script><img src='http://localhost:9/x.png'>", encoding="utf-8")
    browser.open(file)
    assert browser.complaints() and browser.requests() == ["http://localhost:9/x.png"]


def test_the_slider_moves_credit_and_the_toggle_changes_what_is_coloured(browser, pages):
    browser.open(pages["prompt"])
    assert browser.run("document.getElementById('at').textContent") == "step 20 (3/3)"
    last = browser.run(COLOUR)
    browser.run("document.getElementById('step').focus()")
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert browser.run("document.getElementById('at').textContent") == "step 0 (1/3)"
    assert browser.run(COLOUR) == "rgb(255, 255, 255)" != last  # r = 0.549, neutral
    assert (
        browser.run("document.querySelector('#extra td.c').textContent") == "0.549"
    )  # the tables move along
    browser.press("End")
    assert browser.run(COLOUR) == last
    browser.click("#quantity label:nth-of-type(2)")
    assert browser.run("document.querySelector('#quantity input:checked').value") == "weights"
    assert browser.run(COLOUR) != last and "white at 0" in browser.run(
        "document.getElementById('scale-text').textContent"
    )
    browser.press("ArrowRight")  # radio buttons, so arrows go through them
    assert browser.run("document.querySelector('#quantity input:checked').value") == "log_ratio"


def test_true_errors_are_a_quantity_where_they_are_known(browser, pages):
    browser.open(pages["edits"])
    browser.click("#quantity label:nth-of-type(4)")
    wrong = "[...document.querySelectorAll('.t.error')].map(x => x.textContent + x.style.backgroundColor)"
    assert browser.run(wrong) == [" sixrgb(214, 96, 77)"]
    browser.open(pages["prompt"])
    assert browser.run("document.querySelectorAll('#quantity input').length") == 3


def test_the_number_is_under_the_pointer_and_under_the_focus(browser, pages):
    browser.open(pages["edits"])
    browser.point(".differs .t")
    # textContent: what innerText makes of spaces depends on whether the note is drawn yet.
    said = " ".join(browser.run("document.getElementById('tip').textContent").split())
    assert "two (" in said and "r 1.1" in said and "weight 0.6" in said and "no true error" in said
    browser.run("document.querySelector('#cards .t').focus()")
    browser.press("ArrowRight")
    assert "pans" in browser.run("document.getElementById('tip').textContent")
    assert browser.run("document.activeElement.textContent") == " pans"


def test_a_candidate_stands_beside_its_better_sibling_with_the_difference_marked(browser, pages):
    browser.open(pages["prompt"])
    differs = (
        "[...document.querySelectorAll('#cards .card:first-child .differs')]"
        ".map(x => x.innerText.trim().split(/\\s+/).join('|'))"
    )
    assert browser.run("document.getElementById('beside').checked")  # most siblings share most tokens
    assert browser.run(ROLES) == ["best", "place 1 random", "best", "place 3 random"]
    assert browser.run(differs) == ["mood|kilabar", "fan|@"]
    browser.click("#beside")
    assert browser.run(ROLES) == ["best", "place 1 random", "place 3 random"] and browser.run(differs) == []


def test_alignment_pairs_what_is_common_and_leaves_gaps(browser, pages):
    """The script's own function: b is replaced by x, d is left out, two words are put in before the end."""
    browser.open(pages["prompt"])
    pairs = browser.run(
        "align([...'abcde'], [...'axcyze'])"
        ".map(([i, j]) => ('abcde'[i] || '-') + ('axcyze'[j] || '-')).join(' ')"
    )
    assert pairs == "aa bx cc dy -z ee"
    by_place = "align([...'abcde'], [...'{}']).every(([i, j]) => i === j)"
    assert browser.run(by_place.format("caxdy"))  # two in common by order, one by place
    assert not browser.run(by_place.format("xabcd"))  # four in common by order, none by place
    assert (
        browser.run(
            "align(['a'], []).join('|') + ';' + align([], ['a']).join('|') + ';' + align([], []).length"
        )
        == "0,;,0;0"
    )


def test_sorting_by_reward_and_by_disagreement(browser, pages):
    """Group a: 2 of 3 pairs ordered wrongly by the score, as the one that replaces place 3 has the highest;
    b: none."""
    browser.open(pages["prompt"])
    browser.click("#beside")
    sort = "document.getElementById('sort')"
    choose = f"(v => {{ {sort}.value = v; {sort}.dispatchEvent(new Event('change')); }})"
    browser.run(f"{choose}('mean')")
    assert browser.run(ROLES) == ["place 3 random", "best", "place 1 random"]
    browser.run(f"{choose}('preference')")
    assert browser.run(TITLES) == ["prompt a", "prompt b"] and browser.run(ROLES)[0] == "best"
    browser.run(f"{choose}('wrong')")
    assert browser.run(TITLES) == ["prompt a", "prompt b"]
    assert (
        browser.run("document.querySelector('.card .head .soft').textContent")
        == "2 of 3 pairs not ordered as the preference does"
    )
    assert "orders 2 of 4 pairs" in browser.run("document.getElementById('order').textContent")


def test_play_goes_through_the_evaluations(browser, pages):
    browser.open(pages["prompt"])
    browser.click("#play")
    assert browser.run("document.getElementById('at').textContent") == "step 0 (1/3)"
    assert browser.run("document.getElementById('play').textContent") == "Pause"
    browser.click("#play")
    assert browser.run("document.getElementById('play').textContent") == "Play"


def test_a_page_without_samples_and_one_of_one_evaluation(browser, tmp_path):
    file = tmp_path / "p.html"
    file.write_text(page_of(lines=evals((0, 0.5))), encoding="utf-8")
    browser.open(file)
    assert "No samples yet" in browser.run("document.body.innerText") and browser.complaints() == []
    file.write_text(
        page_of(row(3, "a", "x", ["t", "", "u"], [math.nan, 1.0, 0.2], math.nan)), encoding="utf-8"
    )
    browser.open(file)
    assert browser.run(COLOUR) == "rgb(200, 200, 200)" and browser.run(
        "document.getElementById('step').disabled"
    )
    assert browser.complaints() == []


def test_seeds_are_thin_lines_under_their_mean(browser, tmp_path):
    for i in range(3):
        make_run(
            tmp_path / f"r{i}",
            {"seed": i},
            metrics=evals((0, 0.1 * i), (10, 0.5)),
            samples=prompt_rows(0, 1.0),
        )
    file = tmp_path / "all.html"
    shows("--compare", *(tmp_path / f"r{i}" for i in range(3)), "--html", file)
    browser.open(file)
    widths = "[...document.querySelectorAll('.chart')][1].querySelectorAll('polyline')"
    assert browser.run(f"[...{widths}].map(x => x.getAttribute('stroke-width'))") == ["1", "1", "1", "2"]
    assert browser.complaints() == [] and browser.requests() == []
