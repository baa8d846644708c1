"""train.py from the outside: tiny runs of every task and objective, resume to the bit,
Ctrl-C, and every bad input.

Most runs are calls of `train.main` in this process (starting Python costs as much as six tiny runs); what
needs a process of its own (a kill, a real size limit on files) is forked off this one, and the command as
typed gets a new one. Judges and warm starts are built once: all runs share one --cache_dir outside the folder
in which a test works.
"""
import dataclasses
import errno
import gzip
import importlib
import itertools
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from processes import alone, fork, forks
from reference import real
from stubs import small_worlds

import evaluate
import policy_reinforce
import policy_wmle
import reward
import train
from support import files, log
from support.flags import groups_of, parse_flags, unread
from support.folder import commit
from tasks.search import SEARCHES

look = importlib.import_module("eval")  # not "import eval": that would hide the built-in

# --resolution 0: five judge steps teach nothing, and a test of the whole path wants fitted rewards.
SMALL = ("--threads 1 --n_layer 1 --n_embd 16 --n_head 2 --curve_size 8 --batch_size 4 "
         "--reward_batch 4 --reward_first 3 --reward_steps 2 --reward_every 2 --policy_steps 4 "
         "--log_every 1 --eval_every 1 --lr 0.001 --resolution 0 --reward_warmup 0").split()
JUDGE = ("--judge_steps 5 --judge_read 2 --judge_width 16 --judge_layers 1 --judge_context 24 "
         "--prompt_length 3 --shots 2 --candidates 8 --vocab_size 400").split()
SHORT = ("--task summarize --sft_steps 80 --sft_lr 0.02 --sft_batch 4 --max_document 40 --max_summary 10 "
         "--candidates 4 --vocab_size 400").split()
EDITS = ("--task edits --sft_steps 5 --sft_batch 4 --max_document 12 --max_summary 10 "
         "--vocab_size 400 --minibatches 2 --reward_every 2").split()
LEFT = ("config.json", "tokenizer.json", "task.pt", "metrics.jsonl", "samples.jsonl", "ckpt.pt",
        "summary.json")
KEYS = "task objective guidance agg seed seconds device params_policy params_reward rank_accuracy".split()
TASK_KEYS = {"prompt": "judge_queries test_accuracy best_prompt best_prompt_ids best_prompt_pieces "
                       "best_prompt_accuracy random_accuracy accuracy_1_cue accuracy_2_cues "
                       "best_queries_to_90 random_search_accuracy evolution_accuracy hill_queries_to_90 "
                       "reference_accuracy chance".split(),
             "summarize": "rouge1 rouge2 rougeL meteor sft_rouge1 sft_rouge2 sft_rougeL sft_meteor length "
                          "reference_length ended".split(),
             "edits": "win_rate edits_left token_auroc place_auroc error_share".split()}
ATTRIBUTES = {"sentiment": {"cues": ["mood", "verdict"], "answers": ["terrible", "great"]},
              "topic": {"cues": ["topic", "subject"], "answers": ["film", "food"]}}


# ---------------------------------------------------------------------------------------------------- helpers


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_world(folder, n=200, attributes=ATTRIBUTES):
    rng = random.Random(0)
    signs = {"sentiment": ("awful dull", "superb witty"), "topic": ("actor screen", "bread soup")}
    rows = []
    for i in range(n):
        labels = {a: rng.randrange(2) for a in signs}
        words = [rng.choice(signs[a][c].split()) for a, c in labels.items()]
        # no text twice
        rows.append({"text": f"the {words[1]} {i} was {words[0]} , they said", "labels": labels})
    write_jsonl(folder / "texts.jsonl", rows)
    (folder / "attributes.json").write_text(json.dumps(attributes))
    return folder


def write_shots(folder, **change):
    """A few-shot folder; change train="..." puts other text into that file."""
    for name in ("train", "dev", "test"):
        rows = [{"text": f"the {w} was {s} , they said", "label": c}
                for w in ("actor", "bread") for c, s in enumerate(("awful", "superb"))]
        write_jsonl(folder / f"{name}.jsonl", rows)
        if name in change:
            (folder / f"{name}.jsonl").write_text(change[name])
    return folder


def write_pairs(folder, n=24, words=6, **change):
    rng = random.Random(0)
    for name in ("train", "validation", "test"):
        rows = [{"document": " ".join(rng.choice(("cat", "dog", "sat", "ran", "home")) for _ in range(words)),
                 "summary": rng.choice(("the cat sat", "a dog ran home"))} for _ in range(n)]
        write_jsonl(folder / f"{name}.jsonl", rows)
        if name in change:
            (folder / f"{name}.jsonl").write_text(change[name])
    return folder


def write_edits(folder, n=16):
    """Answers of three words, one of which an annotator replaced."""
    rng = random.Random(0)
    for name in ("train", "test"):
        rows = []
        for _ in range(n):
            good = rng.choice(("two cats sat", "a dog ran"))
            bad = good.replace(good.split()[1], "tree")
            start = good.index(good.split()[1])
            rows.append({"prompt": f"say {good}", "rejected": bad, "edited": good,
                         "errors": [[start, start + 4, "wrong"]]})
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder for what all tests share: the cache, one small world, one small set of pairs."""
    folder = tmp_path_factory.mktemp("shared")
    write_world(folder / "world")
    write_pairs(folder / "pairs")
    write_edits(folder / "edits")
    return folder


@pytest.fixture
def prompt(shared):
    return [*SMALL, *JUDGE, "--world", str(shared / "world"), "--cache_dir", str(shared / "cache")]


@pytest.fixture
def begun(shared, prompt):
    """A function: the folder "a" with a run of `prompt` of so many steps, which is trained once for all tests
    and copied."""
    def begin(steps=4):
        kept = shared / f"of {steps} steps"
        if not kept.exists():
            go(*prompt, "--policy_steps", steps, "--out_dir", kept)
        shutil.copytree(kept, "a")
    return begin


@pytest.fixture
def summarize(shared):
    return [*SMALL, *SHORT, "--data", str(shared / "pairs"), "--cache_dir", str(shared / "cache")]


@pytest.fixture
def edits(shared):
    return [*SMALL, *EDITS, "--data", str(shared / "edits"), "--cache_dir", str(shared / "cache")]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def go(*args):
    assert train.main([str(a) for a in args]) == 0


def stops(capsys, *args):
    """A run that ends with an error -> (exit status, the one line it printed on stderr; behind "go on with:"
    a command stands on a line of its own)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([str(a) for a in args])
    err = capsys.readouterr().err
    lines = 2 if err.splitlines()[0].endswith("go on with:") else 1
    assert err.startswith("train.py: ") and err.count("\n") == lines and err.endswith("\n"), err
    return stop.value.code, err


def listing(folder="."):
    """Every file below with its content's size and time: equal before and after means nothing
    was written or lost."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) if p.is_file() else None
            for p in Path(folder).rglob("*")}


def refuses(capsys, *args):
    """Exit status 2, one line, nothing written -> the line."""
    before = listing()
    status, line = stops(capsys, *args)
    assert status == 2, line
    assert listing() == before
    return line


def call(*args, **kw):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, args)],
                          capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600, **kw)


def forked(*args, limit=None):
    """train.py in a process forked off this one, with at most `limit` bytes a file; it says what goes wrong
    in stderr.txt."""
    def work():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        alone("stdout.txt", "stderr.txt")
        sys.exit(train.main([str(a) for a in args]))
    process = fork.Process(target=work)
    process.start()
    return process


def rows(folder, name):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def metrics(folder, last=False):
    """The lines of the alternate loop without their times. last: where a (phase, step) stands
    twice, its last line."""
    lines = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder, "metrics.jsonl")]
    lines = [row for row in lines if row["phase"] in ("reward", "policy", "eval")]
    return {(row["phase"], row["step"]): row for row in lines} if last else lines


def load(folder):
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b, last=False):
    """Networks, optimizers, generators, buffers, counters and logged figures, to the bit."""
    x, y = load(a), load(b)
    assert x.keys() == y.keys()
    for part in x.keys() - {"seconds", "config"}:
        assert same(x[part], y[part]), part
    assert metrics(a, last) == metrics(b, last)
    if not last:
        assert (Path(a) / "samples.jsonl").read_text() == (Path(b) / "samples.jsonl").read_text()


def check_run(folder, task):
    """The files and keys every run leaves, and eval.py reading them."""
    folder = Path(folder)
    assert all((folder / name).is_file() for name in LEFT) and not list(folder.glob("*.tmp"))
    summary = json.loads((folder / "summary.json").read_text())
    assert [k for k in KEYS + TASK_KEYS[task] if k not in summary] == []
    config = json.loads((folder / "config.json").read_text())
    assert config["task"] == task and "torch" in config["versions"] and config["device_reason"]
    assert config["commit"] == commit() and config["critic"] == (config["objective"] == "ppo")
    assert config["bounded"] == train.GUIDANCES[config["guidance"]].bounded
    assert "policy_steps" in config["changed"] and "gamma" not in config["changed"]  # what the page marks
    for row in rows(folder, "metrics.jsonl"):
        assert row["phase"] in ("judge", "sft", "warmup", "reward", "policy", "eval")
        assert isinstance(row["step"], int) and row["seconds"] >= 0
    samples = rows(folder, "samples.jsonl")
    assert samples
    for row in samples:
        if row["kind"] in ("vocabulary", "credit"):
            continue
        assert isinstance(row["preference"], float) and isinstance(row["score"], float) and row["role"]
        for name in ("rewards", "log_ratio", "weights", "errors"):
            assert (row[name] is None and name in ("weights", "errors")
                    or len(row[name]) == len(row["tokens"])), name
        assert (row["weights"] is None) == (summary["objective"] == "mle")
    if task == "prompt":
        searched = rows(folder, "searches.jsonl")
        assert {x["search"] for x in searched} == {"run", *SEARCHES}
        assert max(x["queries"] for x in searched) == summary["judge_queries"]
    load(folder)
    picture, page = (folder.parent / f"{folder.name}.{end}" for end in ("svg", "html"))
    look.show(folder, picture, page)
    assert picture.read_text().startswith("<svg") and '"rewards":[' in page.read_text(encoding="utf-8")
    return summary


# ---------------------------------------------------------------------------- every task, objective, guidance


@pytest.mark.parametrize("flags", [
    *(f"--agg {f}" for f in ("avg", "sum", "min", "max")),
    *(f"--weights {w}" for w in policy_reinforce.WEIGHTS),
    "--guidance bandit", "--replay 0", "--no-center", "--bound sigmoid", "--top_k 5", "--reward_warmup 3",
    "--dtype bfloat16", "--attribute topic", "--dropout 0.1"])
def test_prompt_runs(flags, prompt, capsys):
    go(*prompt, *flags.split(), "--eval_every", 4, "--out_dir", "a")
    summary = check_run("a", "prompt")
    assert summary["chance"] == 0.5 and 0 <= summary["test_accuracy"] <= 1
    if flags != "--replay 0":  # two rounds of eight candidates; without replay every step of a fit asks again
        assert summary["judge_queries"] == 16
    assert (summary["rank_accuracy"] is None) == ("bandit" in flags)
    assert "a: prompt, reinforce" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [
    *(f"--wmle_norm {n} --weights {w}" for n in policy_wmle.NORMS for w in policy_reinforce.WEIGHTS),
    *(f"--agg {f}" for f in ("sum", "min", "max")), "--objective mle", "--objective reinforce",
    "--objective reinforce --guidance bandit", "--replay 0", "--tokenizer byte", "--explore 0.1"])
def test_summarize_runs(flags, summarize):
    go(*summarize, *flags.split(), "--eval_every", 4, "--out_dir", "a")
    summary = check_run("a", "summarize")
    assert 0 <= summary["ended"] <= 1 and 1 <= summary["length"] <= 10
    assert (summary["rank_accuracy"] is None) == ("mle" == summary["objective"] or "bandit" in flags)


def test_embedded_defaults_and_eval_as_typed(shared, monkeypatch, capsys):
    """The README's commands with few steps, the first of each script as a process: no data, no out_dir; a
    second run goes beside the first."""
    few = [*SMALL, "--cache_dir", str(shared / "cache")]
    judge = ("--judge_steps 5 --judge_read 2 --judge_width 16 --judge_layers 1 --judge_context 24 "
             "--candidates 8").split()
    done = call(*few, *judge)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert shlex.split(done.stdout.splitlines()[-1])[1:] == [str(ROOT / "eval.py"), "--out_dir", "out/prompt"]
    with monkeypatch.context() as m:
        small_worlds(m)
        go(*few, *judge, "--seed", "2")
    assert json.loads(Path("out/prompt-2/summary.json").read_text())["seed"] == 2
    go(*few, "--task", "summarize", "--sft_steps", "2", "--candidates", "4")
    check_run("out/summarize", "summarize")
    shown = subprocess.run([sys.executable, str(ROOT / "eval.py"), "--compare", "out/prompt", "out/prompt-2",
                            "out/summarize"], capture_output=True, text=True)
    assert (shown.returncode == 0 and shown.stderr == "" and "(n=" not in shown.stdout
            and " 2 " in shown.stdout)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    look.main()  # the newest run
    shown = capsys.readouterr().out
    assert "out/summarize" in shown and "ended well" in shown


# ----------------------------------------------------------------------------------------- seeds and resuming


def test_a_seed_fixes_a_run_and_another_changes_it(prompt, summarize):
    for flags in (prompt, summarize):
        texts, losses = [], []
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            go(*flags, "--seed", seed, "--out_dir", name, "--overwrite")
            texts.append(Path(name, "samples.jsonl").read_text())
            lines = map(json.loads, Path(name, "metrics.jsonl").read_text().splitlines())
            losses.append([x["loss"] for x in lines if x["phase"] == "policy"])
        # tiny nets may well say the same things
        assert texts[0] == texts[1] and losses[0] == losses[1] != losses[2]


def test_the_reward_learns_in_half_precision(summarize):
    """Autocast keeps its copies of the weights for as long as a region lasts: one region a
    fit would freeze them."""
    held = {}
    for dtype in ("float32", "bfloat16"):
        go(*summarize, "--dtype", dtype, "--reward_first", 40, "--policy_steps", 1, "--out_dir", dtype)
        lines = map(json.loads, Path(dtype, "metrics.jsonl").read_text().splitlines())
        held[dtype] = next(x["reward_loss"] for x in lines if x["phase"] == "reward")
    assert held["bfloat16"] == pytest.approx(held["float32"], rel=0.05)


@pytest.mark.parametrize("guidance", ["edits", "token", "segment", "bandit"])
def test_half_and_resume_is_the_whole_for_edits_too(guidance, edits):
    tiny = [*edits, "--guidance", guidance, "--eval_every", 3]
    go(*tiny, "--policy_steps", 6, "--out_dir", "whole")
    go(*tiny, "--policy_steps", 3, "--out_dir", "parts")
    go("--init_from", "resume", "--out_dir", "parts", "--policy_steps", 6)
    assert_same_run("whole", "parts")
    summary = json.loads(Path("whole", "summary.json").read_text())
    assert set(KEYS + TASK_KEYS["edits"]) <= set(summary) and 0 <= summary["win_rate"] <= 1
    line = [json.loads(x) for x in Path("whole", "metrics.jsonl").read_text().splitlines()][-2]
    assert {"kl", "clip_fraction", "explained_variance", "entropy", "length", "reward"} <= set(line), line


@pytest.mark.parametrize("threshold, kind", [(0, "token"), (1e9, "bandit")])
def test_segments_at_both_ends_are_token_and_bandit_to_the_bit(threshold, kind, edits):
    go(*edits, "--guidance", kind, "--out_dir", "a")
    go(*edits, "--guidance", "segment", "--segment_entropy", threshold, "--out_dir", "b")
    assert same(*[load(d)["nets"] for d in "ab"])


@pytest.mark.parametrize("guidance", ["token", "bandit"])
@pytest.mark.parametrize("task", ["prompt", "summarize"])
def test_ppo_runs_on_the_other_tasks_and_goes_on_to_the_bit(task, guidance, prompt, summarize):
    tiny = [*(prompt if task == "prompt" else summarize), "--objective", "ppo", "--guidance", guidance,
            "--minibatches", 2, "--eval_every", 2]
    go(*tiny, "--policy_steps", 4, "--out_dir", "whole")
    go(*tiny, "--policy_steps", 2, "--out_dir", "parts")
    go("--init_from", "resume", "--out_dir", "parts", "--policy_steps", 4)
    assert_same_run("whole", "parts")


def test_rankings_of_several_answers_teach_the_reward(edits):
    rows = [{"prompt": f"say {i}", "candidates": ["a b", "a c", "a d"], "scores": [1, 0.5, 1]}
            for i in range(12)]
    for name in ("train", "test"):
        write_jsonl(Path("ranks") / f"{name}.jsonl", rows)
    go(*edits, "--data", "ranks", "--guidance", "token", "--K", 3, "--out_dir", "run")
    assert json.loads(Path("run/summary.json").read_text())["rank_accuracy"] is not None


@pytest.mark.parametrize("task, flags, half, whole", [
    ("prompt", "--explore 0.1 --noise 5 --no-pool --K 2", 4, 8),
    ("prompt", "--guidance bandit --noise 5", 4, 8), ("prompt", "--replay 0", 4, 6),
    ("prompt", "--reward_every 4 --dropout 0.1", 5, 10),  # these break in the middle of a round
    ("summarize", "", 4, 8), ("summarize", "--reward_every 3", 4, 7),
    ("summarize", "--objective reinforce", 3, 6), ("summarize", "--objective reinforce --dropout 0.1", 3, 6)])
def test_half_and_resume_is_the_whole_to_the_bit(task, flags, half, whole, prompt, summarize):
    tiny = [*(prompt if task == "prompt" else summarize), *flags.split(), "--eval_every", half]
    go(*tiny, "--policy_steps", whole, "--out_dir", "whole")
    go(*tiny, "--policy_steps", half, "--out_dir", "parts")
    assert load("parts")["step"] == half
    # the other flags come from the run
    go("--init_from", "resume", "--out_dir", "parts", "--policy_steps", whole)
    assert_same_run("whole", "parts")
    ends = [json.loads(Path(d, "summary.json").read_text()) for d in ("whole", "parts")]
    assert all(ends[0][k] == ends[1][k] for k in ends[0] if k != "seconds")


def wait_for_a_checkpoint(folder, ended):
    """Until the run in `folder` has saved for the first time; ended(): whether its process is no more."""
    end = time.time() + 600  # a busy machine may take a minute for the imports alone
    while not Path(folder, "ckpt.pt").exists():
        assert not ended() and time.time() < end
        time.sleep(0.02)


def test_ctrl_c_saves_and_names_the_command_that_goes_on(prompt):
    """As typed: the handler of a new process, its exit status and what it prints."""
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *prompt, "--policy_steps", "100000",
                                "--out_dir", "run here"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               stdin=subprocess.DEVNULL, text=True)
    wait_for_a_checkpoint("run here", lambda: process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130 and err.count("\n") == 2, err
    command = shlex.split(err.splitlines()[1])
    assert command[1:] == [str(ROOT / "train.py"), "--init_from", "resume", "--out_dir", "run here"]
    end = load("run here")["step"] + 3
    go(*command[2:], "--policy_steps", end)
    go(*prompt, "--policy_steps", end, "--out_dir", "straight")
    assert_same_run("straight", "run here")


@forks
def test_a_killed_run_goes_on_from_its_last_round(prompt):
    process = forked(*prompt, "--policy_steps", 100000, "--out_dir", "run here")
    wait_for_a_checkpoint("run here", lambda: not process.is_alive())
    time.sleep(0.1)
    process.kill()
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    end = load("run here")["step"] + 4
    go("--init_from", "resume", "--out_dir", "run here", "--policy_steps", end)
    go(*prompt, "--policy_steps", end, "--out_dir", "straight")
    assert_same_run("straight", "run here", last=True)  # the lost round's lines stand twice
    check_run("run here", "prompt")


def takes_step(patch, step):
    """From now on an update of reinforce is `step`."""
    patch.setitem(train.OBJECTIVES, "reinforce",
                  dataclasses.replace(train.OBJECTIVES["reinforce"], step=step))


def test_ctrl_c_before_the_first_checkpoint(prompt, capsys, monkeypatch):
    interrupt = lambda: signal.raise_signal(signal.SIGINT)
    twice = lambda run: (interrupt(), interrupt())  # the second does not wait
    with monkeypatch.context() as m:
        takes_step(m, twice)
        status, line = stops(capsys, *prompt, "--out_dir", "a")
    assert status == 130 and "before the first checkpoint" in line and "--overwrite" in line
    go(*prompt, "--out_dir", "a", "--overwrite")


# ------------------------------------------------------------------------------------------------------ flags


def test_spellings_of_a_flag():
    parse = lambda *typed: parse_flags(train.Flags, typed, train.__doc__)[0]
    a, b = parse("--seed", "7", "--lr", "1"), parse("--seed=7", "--lr=1.0")
    assert a == b and a.seed == 7 and type(a.lr) is float
    assert parse("--no-center").center is False and parse("--center").center is True
    assert parse("--task", "summarize").objective == "wmle"
    assert parse().objective == "reinforce"


def test_help_lists_every_flag_with_its_default_and_writes_nothing(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["-h"])
    said = capsys.readouterr()
    assert end.value.code == 0 and said.err == "" and listing() == {}
    check_help(said.out, parse_flags(train.Flags, [], train.__doc__)[0])


def check_help(text, c):
    """-h: under its group, a line a flag with what it is without being typed, its type or
    choices and a sentence."""
    assert max(map(len, text.splitlines())) <= 100
    entries = {x.split()[0].replace("[no-]", ""): x.split() for x in text.splitlines()
               if x.startswith("  --")}
    shown = {None: "-", True: "yes", False: "no"}
    for name, f in train.Flags.__dataclass_fields__.items():
        value = getattr(c, name)
        _, default, kind, *help = entries.pop(f"--{name}")
        assert default == (shown[value] if value is None or value is True or value is False
                           else str(value)), name
        assert kind.rstrip(";") == ("|".join(f.metadata["choices"]) if f.metadata["choices"]
                                    else f.metadata["kind"].__name__), name
        assert help, name
    assert not entries
    heads = [x for x in text.splitlines() if x in set(groups_of(train.Flags).values())]
    assert heads == ["run", "data", "model", "reward", "policy", "judge", "log"]


@pytest.mark.parametrize("typed", [
    "--task summarize", "--task edits", "--task summarize --preset paper", "--lr 0.5"])
def test_help_shows_the_defaults_of_the_task_and_preset_beside_it(typed, capsys):
    with pytest.raises(SystemExit) as end:
        train.main([*typed.split(), "-h"])
    assert end.value.code == 0
    check_help(capsys.readouterr().out, parse_flags(train.Flags, typed.split(), train.__doc__)[0])


@pytest.mark.parametrize("flags, says", [
    ("--sed 1", "--sed (did you mean --seed?)"), ("--policy-steps 5", "did you mean --policy_steps?"),
    ("--see=1", "did you mean --seed?"), ("stray", "stray"), ("--seed", "expected one argument"),
    ("--task promt", "did you mean prompt?"), ("--agg mean", "avg, sum, min, max"),
    ("--objective mles", "did you mean mle?"), ("--guidance tokn", "did you mean token?"),
    ("--init_from resum", "did you mean resume?"), ("--device gpu", "auto, cpu, cuda"),
    ("--weights imediate", "did you mean immediate?"), ("--wmle_norm lenght", "did you mean length?"),
    ("--K 1", "--K: expected at least 2, got 1"), ("--seed -1", "--seed"),
    ("--seed 99999999999999999999", "--seed"), ("--seed 1.5", "expected int, got '1.5'"),
    ("--lr fast", "expected float, got 'fast'"), ("--lr nan", "finite"),
    ("--lr inf", "finite"), ("--lr -0.1", "--lr: expected 0.0 to 1e+30, got -0.1"), ("--lr 1e38", "--lr"),
    ("--beta 0", "--beta"), ("--dropout 1", "0.0 to 0.9"),
    ("--explore 2", "--explore"), ("--reward_every 0", "--reward_every"), ("--policy_steps 0", "at least 1"),
    ("--n_embd 30", "--n_embd"), ("--n_embd 36 --n_head 4", "multiple of 2 x n_head = 8, got 36"),
    ("--judge_width 20", "--judge_width"),
    ("--K 9 --candidates 8", "at most --candidates 8"), ("--vocab_size 3", "--vocab_size"),
    ("--seed=", "--seed"),
    ("--objective wmle", "did you mean reinforce?"), ("--objective mle", "task prompt has none"),
    ("--task summarize --guidance bandit", "needs --objective reinforce"), ("--center=maybe", "--center"),
    ("--task edits --objective reinforce --guidance segment", "needs --objective ppo"),
    ("--guidance edits", "expected one of token, bandit, red, abc, implicit for task prompt"),
    ("--segment_entropy -1", "--segment_entropy"),
    ("--guidance bandit --ties 1", "--ties 1: --guidance bandit of task prompt fits no ranking"),
    ("--guidance implicit --ties 0.5", "--ties 0.5: --guidance implicit"),
    ("--task edits --guidance edits --ties 2", "--ties 2: --guidance edits"),
    ("--task edits --ties 2 --sft_steps 1 --reward_first 1 --policy_steps 1 --n_embd 16",
     "--ties 2: --guidance edits"),  # which its rows decide
    ("--task summarize --objective mle --ties 1", "--objective mle weighs all tokens alike"),
    ("--objective ppo --minibatches 9", "at most --batch_size"),
    ("--attribute mood", "expected one of sentiment, topic"),
    ("--tokenizer bite", "expected byte, bpe, gpt2 or a folder"),
    ("--init_from resume --out_dir nothing", "nothing holds no checkpoint"),
    ("--init_from resume", "holds no checkpoint"),
    ("--world nowhere", "nowhere/attributes.json"),
    ("--data nowhere", "nowhere: expected a folder, a file or hub:"),
    ("--shots 500", "--shots 500: the world holds only"),
    ("--out_dir afile", "expected a folder, got a file"),
    ("--cache_dir afile", "expected a folder, got a file")])
def test_a_wrong_flag_is_one_line_and_writes_nothing(flags, says, prompt, capsys):
    Path("afile").write_text("not a folder")
    flags = flags.split()
    assert says in refuses(capsys, *([] if "--task" in flags else prompt), *flags)


@pytest.mark.parametrize("typed", [
    "--guidance token --ties 1", "--guidance red --ties 1", "--guidance bandit --ties 0",  # asks for nothing
    "--task edits --guidance bandit --ties 1", "--task edits --guidance segment --ties 1"])
def test_ties_are_taken_where_a_ranking_is_fitted(typed):
    train.check_together(*parse_flags(train.Flags, typed.split(), ""))
    c, typed = parse_flags(train.Flags, ["--guidance", "bandit"], "")
    assert c.ties  # the task's own default is nobody's wish, and not refused
    train.check_together(c, typed)


def test_what_goes_with_an_objective_hangs_on_its_row_and_not_on_its_name(monkeypatch, capsys):
    for mine, row in (("mine", "ppo"), ("other", "reinforce")):
        monkeypatch.setitem(train.OBJECTIVES, mine, train.OBJECTIVES[row])
    check = lambda typed: train.check_together(*parse_flags(train.Flags, typed.split(), ""))
    for typed in ("--task edits --objective mine --guidance segment",
                  "--task edits --objective mine --guidance token --returns min",
                  "--objective other --guidance bandit --baseline rloo"):
        check(typed)
    with pytest.raises(SystemExit):
        check("--objective mine --guidance bandit --baseline rloo")
    assert "--baseline rloo compares whole answers" in capsys.readouterr().err


@pytest.mark.parametrize("typed, missed", [
    ("--gamma 0.9", "--gamma 0.9 changes nothing here: read by ppo alone"),
    ("--objective ppo --gamma 0.9 --prompt_length 3 --alpha 0.2", ""),
    ("--task summarize --alpha 0.2", "--alpha 0.2 changes nothing here: read by reinforce, ppo alone"),
    ("--task summarize --objective mle --alpha 0 --no-center --segment_entropy 0", ""),  # off, as they are
    ("--task edits --dpo_beta 1 --guidance implicit --minibatches 2", ""),
    ("--task edits --guidance token --segment_entropy 0.1 --judge_width 8",
     "--segment_entropy 0.1 changes nothing here: read by segment alone, "
     "--judge_width 8 changes nothing here: read by prompt alone")])
def test_a_flag_that_nobody_reads_is_said_to_change_nothing(typed, missed):
    c, typed = parse_flags(train.Flags, typed.split(), "")
    readers = (*train.TASKS[c.task].reads, c.objective, c.guidance)
    assert ", ".join(unread(c, typed, readers)) == missed


def test_flags_are_read_by_what_there_is_and_a_run_says_what_it_does_not_read(prompt, capsys):
    known = {*train.TASKS, *train.OBJECTIVES, *train.GUIDANCES}
    owners = {x for f in dataclasses.fields(train.Flags) for x in f.metadata["of"].split(", ") if x}
    assert owners <= known and all(train.TASKS[x].reads == (x,) for x in train.TASKS)
    said = "--gamma 0.9 changes nothing here"
    go(*prompt, "--gamma", "0.9", "--out_dir", "a")
    assert said in capsys.readouterr().out
    go("--init_from", "resume", "--out_dir", "a", "--policy_steps", "6")
    assert said not in capsys.readouterr().out


def test_a_wrong_flag_as_typed():
    done = call("--polcy_steps", "3")
    assert (done.returncode, done.stdout) == (2, "") and listing() == {}
    assert done.stderr == ("train.py: unknown flag --polcy_steps (did you mean --policy_steps?); "
                           "-h lists all\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(prompt, capsys):
    assert "no GPU" in refuses(capsys, *prompt, "--device", "cuda")


# ------------------------------------------------------------------------------------------------------- data


GOOD = '{"text": "the actor was awful", "label": 0}\n{"text": "the bread was superb", "label": 1}\n'


@pytest.mark.parametrize("name, text, says", [
    ("train", "", "train.jsonl: expected at least one row"),
    ("dev", "\n\n", "dev.jsonl: expected at least one row"),
    ("train", GOOD + '{"text": "the', "train.jsonl:3: "), ("train", GOOD + "[1]\n", "train.jsonl:3: "),
    ("dev", GOOD + '{"text": "no label"}\n', "dev.jsonl:3: label: expected int, got nothing"),
    ("test", GOOD + '{"label": 1}\n', "test.jsonl:3: text: expected str, got nothing"),
    ("test", '{"text": " ", "label": 1}\n',
     "test.jsonl: expected at least one row, got 1 with an empty text"),
    ("train", GOOD + '{"text": "x", "label": "1"}\n', "train.jsonl:3: label: expected int"),
    ("train", GOOD + '{"text": "x", "label": 2}\n',
     "train.jsonl:3: label: expected a class with an answer word (0 to 1: terrible, great), got 2"),
    ("train", GOOD + '\n\n{"text": "x", "label": -1}\n',
     "train.jsonl:5: label: expected a class with an answer word"),
    ("train", '{"text": " ", "label": 1}\n' + GOOD + '{"text": "x", "label": 7}\n',
     "train.jsonl:4: label: expected a"),
    ("test", GOOD + '{"text": "x", "label": %s}\n' % 10**400, "got 1000000000"),
    ("test", GOOD + '{"text": "x", "label": true}\n', "test.jsonl:3: label: expected int, got true"),
    ("dev", GOOD.splitlines()[0], "shots: dev: expected every class of sentiment, got no row of class 1")])
def test_a_broken_few_shot_file(name, text, says, prompt, capsys):
    write_shots(Path("shots"), **{name: text})
    assert says in refuses(capsys, *prompt, "--data", "shots", "--out_dir", "a")


def test_few_shot_files_that_are_fine(prompt):
    write_shots(Path("set/16-13"))
    Path("set/16-13/test.jsonl").unlink()
    up = Path("set/test.tsv")  # one folder up
    up.write_text("sentence\tlabel\nthe actor was awful\t0\nthe bread was superb\t1\n")
    go(*prompt, "--data", "set/16-13", "--out_dir", "a")
    check_run("a", "prompt")


@pytest.mark.parametrize("spoil, says", [
    (lambda w: (w / "attributes.json").unlink(), "attributes.json: expected a readable file"),
    (lambda w: (w / "attributes.json").write_text("{"), "attributes.json: json: expected {attribute:"),
    (lambda w: (w / "attributes.json").write_text('{"sentiment": {"cues": ["mood"], "answers": []}}'),
     "attributes.json: json"),
    (lambda w: (w / "texts.jsonl").unlink(), "expected one of texts.jsonl"),
    (lambda w: (w / "texts.jsonl").write_text(""), "texts.jsonl: expected at least one row"),
    (lambda w: (w / "texts.jsonl").write_text('{"text": "x", "labels": {"sentiment": 2}}\n'),
     "texts.jsonl:1: labels"),
    (lambda w: (w / "texts.jsonl").write_text('{"text": "x", "labels": [1]}\n'),
     "texts.jsonl:1: labels: expected dict"),
    (lambda w: (w / "texts.jsonl").write_text('{"text": "x", "labels": {"topic": 1}}\n'),
     "expected at least 5 texts, got 1"),
    (lambda w: (w / "texts.jsonl").write_text('{"text": "x", "labels": {"topic": true}}\n'),
     "texts.jsonl:1: labels: expected topic from 0 to 1 (one answer word a class), got true"),
    (lambda w: (w / "texts.jsonl").write_text(
        "".join('{"text": "x y", "labels": {"sentiment": %d}}\n' % (i % 2) for i in range(120))),
     "expected texts besides the few-shot and test texts, got none"),
    *[(lambda w, need=need: (w / "texts.jsonl").write_text('\n{"text": "x", "labels": {}, "need": %s}\n'
                                                           % need),
       "texts.jsonl:2: need: expected " + says) for need, says in (
        ('{"topic": "2"}', 'topic from 1 to 2 (it has 2 cue words), got "2"'),
        ('{"topic": 1.0}', "topic from 1 to 2"),
        ('{"topic": 0}', "topic from 1 to 2"), ('{"topic": true}', "topic from 1 to 2"),
        ('{"topic": -1}', "topic from 1 to 2"),
        ('{"topic": %d}' % 10**400, "topic from 1 to 2"), ('{"topic": [1]}', "topic from 1 to 2"),
        ('{"mood": 1}', 'one of sentiment, topic, got "mood"'))],
    *[(lambda w, words=words: (w / "attributes.json").write_text(
        json.dumps(ATTRIBUTES | {"topic": words})), says)
      for words, says in (
        ({"cues": ["topic", "subject"], "answers": ["film", "film"]},
         'attribute topic: answers: expected a token of its own for each word, got "film" and "film"'),
        ({"cues": ["topic", "topic"], "answers": ["film", "food"]},
         'cues of all attributes: expected a token of its own for each word, got "topic" and "topic"'),
        ({"cues": ["topic", "mood"], "answers": ["film", "food"]}, 'got "mood" and "mood"'),
        ({"cues": ["topic", ""], "answers": ["film", "food"]}, "attributes.json: json: expected {attribute:"),
        ({"cues": ["topic", "\ud800"], "answers": ["film", "food"]},
         "attributes.json: json: expected {attribute:"))]])
def test_a_broken_world(spoil, says, prompt, capsys):
    spoil(write_world(Path("w"), 120))
    assert says in refuses(capsys, *prompt, "--world", "w", "--out_dir", "a")


@pytest.mark.parametrize("name, text, says", [
    ("train", "", "train.jsonl: expected at least one row"), ("validation", "{", "validation.jsonl:1: "),
    ("test", '{"document": "a b"}\n', "test.jsonl:1: summary: expected str, got nothing"),
    ("train", '{"document": "a b", "summary": " "}\n',
     "train.jsonl: expected at least one row, got 1 with an empty summary"),
    ("train", '{"document": "a b", "summary": 7}\n', "train.jsonl:1: summary: expected str, got 7")])
def test_a_broken_pair_file(name, text, says, summarize, capsys):
    write_pairs(Path("p"), **{name: text})
    assert says in refuses(capsys, *summarize, "--data", "p", "--out_dir", "a")


def test_rows_with_an_empty_text_are_left_out_and_said_once_a_file(prompt, summarize, edits, capsys):
    write_pairs(Path("p"), n=6)
    write_shots(Path("s"))
    write_edits(Path("e"), n=6)
    for name, row in (("p/train", {"document": "", "summary": "x"}),
                      ("p/test", {"document": "x", "summary": " "}),
                      ("s/dev", {"text": " ", "label": 0}),
                      ("e/test", {"prompt": "x", "rejected": "y", "edited": ""})):
        with open(f"{name}.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
    for flags, folder in ((summarize, "p"), (prompt, "s"), (edits, "e")):
        go(*flags, "--data", folder, "--policy_steps", 1, "--out_dir", "run-" + folder)
    said = [line for line in capsys.readouterr().out.splitlines() if "empty" in line]
    assert said == ["p/train.jsonl: 1 of 7 rows had an empty document and were left out",
                    "p/test.jsonl: 1 of 7 rows had an empty summary and were left out",
                    "s/dev.jsonl: 1 of 5 rows had an empty text and were left out",
                    "e/test.jsonl: 1 of 7 rows had an empty edited answer and were left out"]


def test_a_missing_split_and_a_missing_column(summarize, capsys):
    write_pairs(Path("p"))
    line = refuses(capsys, *summarize, "--data", "p", "--document_column", "body")
    assert "document: expected str, got nothing" in line
    Path("p/train.jsonl").unlink()
    assert "expected one of train.jsonl" in refuses(capsys, *summarize, "--data", "p")
    assert "hub:" in refuses(capsys, *summarize, "--data", "hub:no/such-set")


def test_long_texts_are_cut_counted_and_said_once(prompt, summarize, capsys):
    write_pairs(Path("p"), words=90)
    go(*summarize, "--data", "p", "--out_dir", "a")
    lines = [line for line in capsys.readouterr().out.splitlines() if "documents are longer" in line]
    assert lines == [f"{split}: 24 of 24 documents are longer than 40 tokens and were cut at their end"
                     for split in ("train", "validation", "test")]
    write_shots(Path("s"), train=GOOD + json.dumps({"text": "superb " * 60, "label": 1}) + "\n")
    go(*prompt, "--data", "s", "--out_dir", "b")
    lines = [line for line in capsys.readouterr().out.splitlines() if "longer" in line]
    assert lines == ["1 texts were longer than --judge_context 24 tokens and were cut at their end"]


def test_long_passages_and_answers_of_edits_are_cut_counted_and_said(edits, capsys):
    row = {"prompt": "who sat", "passages": "the cat " * 40, "rejected": "a dog " * 12,
           "edited": "a cat " * 12, "errors": [[2, 5, "wrong"], [60, 65, "behind the cut"]]}
    folder = Path("long")
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 9)
    go(*edits, "--data", "long", "--out_dir", "a")
    said = capsys.readouterr().out
    assert "train: 9 of 9 prompts with passages are longer than 12 tokens and were cut at their end" in said
    assert "train: 18 of 18 answers are longer than 10 tokens" in said
    assert json.loads(Path("a", "summary.json").read_text())["error_share"] > 0


def test_rankings_need_guidance_that_takes_them(edits, capsys):
    folder = Path("ranks")
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"prompt": "who sat", "candidates": ["a dog", "a cat", "cats"], "scores": [0, 2, i % 2]}
                for i in range(9)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert "did you mean token?" in refuses(capsys, *edits, "--data", "ranks", "--guidance", "edits")
    go(*edits, "--data", "ranks", "--out_dir", "a")
    assert json.loads(Path("a", "summary.json").read_text())["length_rank_accuracy"] is not None
    assert json.loads(Path("a", "config.json").read_text())["guidance"] == "token"


def test_minimal_edits_are_refused_where_one_split_holds_rankings(edits, capsys):
    folder = write_edits(Path("mixed"))
    write_jsonl(folder / "test.jsonl", [{"prompt": "a", "candidates": ["b", "c", "d"], "scores": [1, 2, 3]}])
    assert "mixed: test: --guidance edits" in refuses(
        capsys, *edits, "--data", "mixed", "--guidance", "edits")


def test_flags_that_play_no_part_refuse_nothing(prompt):
    go(*prompt, "--batch_size", "2", "--out_dir", "a")  # minibatches are PPO's
    # nobody compares K of them
    go(*prompt, "--guidance", "bandit", "--candidates", "2", "--K", "5", "--out_dir", "b")


# --------------------------------------------------------------------------------------- folders, checkpoints


def test_an_out_dir_that_holds_another_run(begun, prompt, capsys):
    begun()
    assert "--out_dir a: holds another run" in refuses(capsys, *prompt, "--seed", "2", "--out_dir", "a")
    go(*prompt, "--seed", "2", "--out_dir", "a", "--overwrite")
    go(*prompt, "--seed", "2", "--out_dir", "b")
    assert_same_run("a", "b")  # nothing of the first run is left


@pytest.mark.parametrize("flags, says", [
    ("--lr 0.5", "was made with 0.001"), ("--seed 3", "--seed 3"), ("--n_embd 32", "--n_embd 32"),
    ("--agg min", "--agg min"), ("--task summarize", "--task summarize"),
    ("--guidance bandit", "--guidance bandit"), ("--no-center", "--center")])
def test_resume_with_other_settings(flags, says, begun, capsys):
    begun()
    assert says in refuses(capsys, "--init_from", "resume", "--out_dir", "a", *flags.split())


def test_resume_from_broken_files(begun, prompt, capsys):
    begun()
    again = ["--init_from", "resume", "--out_dir", "a"]
    good, config = Path("a/ckpt.pt").read_bytes(), Path("a/config.json").read_text()
    for bad in (b"", b"not a checkpoint", good[:len(good) // 2], good[:-20]):
        Path("a/ckpt.pt").write_bytes(bad)
        assert "a/ckpt.pt: expected a checkpoint, got a file that cannot be read" in refuses(capsys, *again)
    for other in ({"step": 1}, [1, 2]):  # a file of torch, but not of ours
        torch.save(other, "a/ckpt.pt")
        assert "a/ckpt.pt" in refuses(capsys, *again)
    go(*prompt, "--n_embd", "32", "--policy_steps", "1", "--out_dir", "b")
    Path("a/ckpt.pt").write_bytes(Path("b/ckpt.pt").read_bytes())
    assert "a checkpoint of other settings" in refuses(capsys, *again)
    Path("a/ckpt.pt").write_bytes(good)
    for bad in ("", "{", "[]", "{}"):
        Path("a/config.json").write_text(bad)
        assert "config.json: expected the flags of a run" in refuses(capsys, *again)
    Path("a/config.json").unlink()
    assert "config.json" in refuses(capsys, *again)
    Path("a/config.json").write_text(config)
    go(*again, "--policy_steps", "6")


def test_a_broken_cache_file_is_named(shared, prompt, summarize, capsys):
    for flags, kind in ((prompt, "judge"), ([*prompt, "--reward_warmup", 2], "warmup"), (summarize, "sft")):
        go(*flags, "--cache_dir", f"of-{kind}", "--out_dir", kind)
        file = next(Path(f"of-{kind}").glob(f"{kind}-*.pt"))
        file.write_bytes(file.read_bytes()[:100])
        line = refuses(capsys, *flags, "--cache_dir", f"of-{kind}", "--out_dir", "new")
        assert str(file) in line and "delete it" in line


class FullDisk:
    """open() for a disk that has room for ten bytes in files whose name ends like this pattern."""

    def __init__(self, end):
        self.end = end

    def __call__(self, path, mode="r", **kw):
        file = open(path, mode, **kw)
        return FullDisk.File(file) if fnmatch(path, "*" + self.end) and "r" not in mode else file

    class File:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()


@pytest.mark.parametrize("end", ["ckpt.pt.*.tmp", "metrics.jsonl", "samples.jsonl", "summary.json.*.tmp"])
def test_a_full_disk_leaves_the_old_checkpoint(end, begun, shared, capsys, monkeypatch):
    begun(4)
    whole = load("a")["nets"]
    shutil.rmtree("a")
    begun(2)
    Path("a/summary.json").unlink()
    before = Path("a/ckpt.pt").read_bytes()
    with monkeypatch.context() as m:
        for module in (evaluate, files, log):
            m.setattr(module, "open", FullDisk(end), raising=False)
        status, line = stops(capsys, "--init_from", "resume", "--out_dir", "a", "--policy_steps", "4")
    assert status == 2 and "No space left on device" in line
    assert not list(Path("a").glob("*.tmp")) and not Path("a/summary.json").exists()
    assert end == "summary.json.*.tmp" or Path("a/ckpt.pt").read_bytes() == before
    go("--init_from", "resume", "--out_dir", "a", "--policy_steps", "4")
    assert same(load("a")["nets"], whole)


@forks
def test_a_limit_on_file_sizes(begun):
    """The same with the operating system saying no: first to the checkpoint, then to a log line."""
    begun(2)
    before, log = Path("a/ckpt.pt").read_bytes(), Path("a/metrics.jsonl").read_text()
    small = max(Path("a", name).stat().st_size
                for name in ("config.json", "tokenizer.json", "metrics.jsonl", "samples.jsonl"))
    for padding in (0, 2 * len(before)):
        if padding:  # a line that a resumed run keeps makes the log larger than a checkpoint
            note = json.dumps({"phase": "judge", "step": 0, "seconds": 0, "note": " " * padding})
            Path("a/metrics.jsonl").write_text(log + note + "\n")
        limit = small + 20_000 if not padding else Path("a/metrics.jsonl").stat().st_size + 10
        assert padding or limit < len(before)
        process = forked("--init_from", "resume", "--out_dir", "a", "--policy_steps", "4", limit=limit)
        process.join(600)
        err = Path("stderr.txt").read_text()
        assert process.exitcode == 2 and err.count("\n") == 1 and "File too large" in err, err
        assert Path("a/ckpt.pt").read_bytes() == before


def test_a_cache_that_cannot_be_written(prompt, summarize, capsys, monkeypatch):
    for flags in (prompt, summarize):
        monkeypatch.setattr(files, "open", FullDisk(".pt.*.tmp"), raising=False)
        status, line = stops(capsys, *flags, "--cache_dir", "cache", "--out_dir", "a")
        assert status == 2 and "No space left on device" in line and not Path("a").exists()
        assert not list(Path("cache").glob("*.pt"))


# ------------------------------------------------------------------------------------------ losses that break


def nan_loss(*args, **kw):
    return torch.tensor(float("nan"), requires_grad=True), {}


@pytest.mark.parametrize("task, module, name, says", [
    ("prompt", policy_reinforce, "reinforce_loss", "step 3: policy loss is nan"),
    ("summarize", policy_wmle, "weighted_mle_loss", "step 3: policy loss is nan"),
    ("prompt", reward, "plackett_luce_loss", "step 3: reward loss is nan")])
def test_a_loss_that_is_not_finite_stops_the_run(
        task, module, name, says, begun, summarize, capsys, monkeypatch):
    begun(2) if task == "prompt" else go(*summarize, "--policy_steps", "2", "--out_dir", "a")
    before = Path("a/ckpt.pt").read_bytes()
    monkeypatch.setattr(module, name, nan_loss if module is not reward else lambda *a: nan_loss()[0])
    status, line = stops(capsys, "--init_from", "resume", "--out_dir", "a", "--policy_steps", "4")
    assert status == 1 and says in line
    assert Path("a/ckpt.pt").read_bytes() == before and not Path("a/summary.json").exists()


def test_learning_rates_that_are_far_too_high(prompt, summarize, capsys):
    """Where it happens is named, and no broken judge or warm start is kept."""
    for flags, rate, phase in ((prompt, "--lr", "policy"), (prompt, "--judge_lr", "judge"),
                               (summarize, "--sft_lr", "sft")):
        status, line = stops(capsys, *flags, rate, "1e30", "--cache_dir", "cache", "--out_dir", phase,
                             "--policy_steps", "200")
        assert status == 1 and phase in line and "lower the learning rate" in line
        assert phase == "policy" or not Path(phase).exists()
    assert len(list(Path("cache").glob("*.pt"))) == 1  # the judge of the first run


# -------------------------------------------------------------------------------------------------- real text


def part_of_world(folder, n):
    """Every n-th text of a world on disk, as a world in the working directory: all of it is read
    in tests/test_data.py."""
    source, target = Path(folder), Path("world")
    target.mkdir()
    (target / "attributes.json").write_bytes((source / "attributes.json").read_bytes())
    with gzip.open(source / "texts.jsonl.gz", "rt", encoding="utf-8") as f:
        (target / "texts.jsonl").write_text("".join(itertools.islice(f, 0, None, n)), encoding="utf-8")
    return str(target)


def test_real_reviews(prompt):
    world = part_of_world(real("worlds", "sst2_agnews"), 64)
    go(*prompt, "--world", world, "--data", real("fewshot", "16-shot", "sst-2", "16-13"),
       "--vocab_size", "1000", "--policy_steps", "2", "--out_dir", "a")
    assert check_run("a", "prompt")["chance"] == 0.5


def test_real_titles(summarize):
    """The first 150 rows of each split, as compressed as they are: tests/test_data.py reads whole files."""
    Path("titles").mkdir()
    for source in sorted(Path(real("summarization", "acl_titles")).glob("*.jsonl.gz")):
        with gzip.open(source, "rb") as f, gzip.open(Path("titles", source.name), "wb") as part:
            part.writelines(itertools.islice(f, 150))
    go(*summarize, "--data", "titles", "--limit", "100", "--policy_steps", "2", "--out_dir", "a")
    check_run("a", "summarize")


@pytest.mark.parametrize("folder, guidance", [
    ("edits/qa_feedback", "edits"), ("rankings/qa_feedback", "token"), ("preferences/summeval", "segment")])
def test_real_edits_rankings_and_pairs(folder, guidance, edits):
    go(*edits, "--data", real(*folder.split("/")), "--guidance", guidance, "--limit", "40",
       "--policy_steps", "2", "--out_dir", "a")
    summary = json.loads(Path("a", "summary.json").read_text())
    assert (0 <= summary["rank_accuracy"] <= 1
            and ("token_auroc" in summary) == (folder == "edits/qa_feedback"))


def test_a_reward_kept_by_one_objective_serves_another(edits):
    go(*edits, "--objective", "reinforce", "--out_dir", "a", "--reward_lr", "0.0007")
    # its normaliser is not in the cache
    go(*edits, "--objective", "ppo", "--out_dir", "b", "--reward_lr", "0.0007")
    assert same(*[load(d)["nets"]["reward"] for d in "ab"])
