"""A run's life outside the algorithm: whose folder it is, what is kept under which name, what the terminal
gets, Ctrl-C.

Several processes are real ones, forked, because that costs nothing beside starting Python anew; they meet at
barriers and events, so nothing here depends on who is faster.
"""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import fork, forks
from stubs import small_worlds
from test_eval import SAMPLE, make_run
from test_train import (LEFT, ROOT, assert_same_run, begun, call, check_run, edits, go, here, listing,  # noqa
                        load, prompt, refuses, rows, shared, stops, summarize, takes_step, write_edits,
                        write_jsonl, write_pairs, write_shots, write_world)

import bench
import support.files
import tasks.judge
import train
import warm_start
from support import corpus, device, folder, lock, log
from support.corpus import Ids
from support.files import cached, code_of, decides, digest, write_whole
from support.flags import groups_of, parse_flags, without
from support.folder import claim_out_dir
from tasks.edits import EditsTask
from tasks.prompt import PromptTask
from tasks.summarize import SummarizeTask

bash = pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="needs bash")
names = pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="needs names of files beyond ASCII")


def flags(*typed):
    return parse_flags(train.Flags, [str(x) for x in typed], train.__doc__)[0]


def together(work, n):
    """What `work(barrier, i)` returns in each of n processes."""
    barrier, answers = fork.Barrier(n), fork.SimpleQueue()
    all_of_them = [fork.Process(target=lambda i=i: answers.put(work(barrier, i))) for i in range(n)]
    for p in all_of_them:
        p.start()
    for p in all_of_them:
        p.join(60)
        assert p.exitcode == 0
    return [answers.get() for _ in range(n)]


# ---------------------------------------------------------------------------------------------------- folders


@forks
def test_runs_started_together_get_folders_of_their_own_and_failed_starts_leave_none():
    def start(barrier, i):
        c = flags()
        barrier.wait(30)
        with claim_out_dir(c):
            barrier.wait(30)  # all of them hold theirs now
        return c.out_dir
    assert sorted(together(start, 6)) == ["out/prompt"] + [f"out/prompt-{i}" for i in range(2, 7)]
    assert listing() in ({}, {"out": None})  # who made out/ may have left before the others did


@pytest.mark.parametrize("more", ["", "--overwrite", "--init_from resume"])
def test_a_folder_in_which_a_process_works_is_refused(more, begun, prompt, capsys):
    begun()
    typed = more.split() if "resume" in more else [*prompt, *more.split()]
    held = lock.take("a/.lock")
    says = "another process is working in it" if more else "holds another run"
    assert says in refuses(capsys, *typed, "--out_dir", "a")
    lock.release(held, "a/.lock")


@forks
def test_a_lock_left_by_a_killed_process_blocks_nobody(prompt):
    def die():
        kept = lock.take("a/.lock")  # noqa
        Path("a/ckpt.pt.0123456789ab.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    Path("a").mkdir()
    process = fork.Process(target=die)
    process.start(), process.join(60)
    assert {p.name for p in Path("a").iterdir()} == {".lock", "ckpt.pt.0123456789ab.tmp"}
    go(*prompt, "--out_dir", "a")
    assert {p.name for p in Path("a").iterdir()} == {*LEFT, "tokenizer.json", "searches.jsonl"}


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(monkeypatch):
    """Its holder removes the file between our open and our lock: locking the nameless rest would guard
    nothing."""
    gone = []

    def late(file):
        if not gone:
            gone.append(os.remove("x"))
        return real(file)
    real = lock.held_now
    monkeypatch.setattr(lock, "held_now", late)
    first = lock.take("x")
    assert gone and os.path.exists("x") and lock.take("x") is None
    lock.release(first, "x")
    assert not os.path.exists("x")


@pytest.mark.parametrize("name, text", [("thesis.txt", "all of it"), ("notes.tmp", "x"), ("ckpt.pt", "?"),
                                        ("config.json", '{"model_type": "gpt2"}'), ("config.json", "[")])
def test_a_folder_that_holds_files_but_no_run_is_never_touched(name, text, prompt, capsys):
    for folder in ("a", "out/prompt"):
        Path(folder).mkdir(parents=True)
        Path(folder, name).write_text(text)
    for more in ([], ["--overwrite"]):
        assert f"--out_dir a: holds files that are no run ({name})" in refuses(
            capsys, *prompt, "--out_dir", "a", *more)
    assert "--out_dir out/prompt: holds files" in refuses(capsys, *prompt, "--overwrite")
    with claim_out_dir(c := flags()):
        assert c.out_dir == "out/prompt-2"  # without --out_dir it is passed over


def test_a_folder_that_cannot_be_made_is_one_line(prompt, capsys):
    Path("link").symlink_to("nowhere")
    Path("afile").write_text("x")
    for folder in ("link", "afile/a"):
        assert f"{folder}" in refuses(capsys, *prompt, "--out_dir", folder)


def test_overwriting_leaves_what_is_not_the_run_s(begun, prompt):
    begun()
    Path("a/plot.svg").write_text("mine")
    go(*prompt, "--out_dir", "a", "--overwrite", "--policy_steps", 2)
    assert Path("a/plot.svg").read_text() == "mine" and load("a")["step"] == 2


# ------------------------------------------------------------------------------------------------------ cache


@forks
def test_one_state_wanted_by_many_at_once_is_built_once():
    said = fork.Semaphore(0)

    def want(barrier, i):
        def build():
            with open("built.txt", "a") as f:
                f.write("x")
            for _ in range(4):
                assert said.acquire(timeout=30)  # until all others have said that they wait
            return {"by": torch.tensor(i)}
        lines = []
        barrier.wait(30)
        state, path = cached("kept", "slow", {"a": 1}, build,
                             lambda line: (lines.append(line), said.release()))
        return int(state["by"]), lines
    found = together(want, 5)
    assert Path("built.txt").read_text() == "x" and len({by for by, _ in found}) == 1
    assert sorted(len(lines) for _, lines in found) == [0, 1, 1, 1, 1]
    assert all("another process is making it; waiting" in lines[0] for _, lines in found if lines)
    assert len(list(Path("kept").iterdir())) == 1  # no lock, no temporary file


@forks
def test_where_the_builder_dies_the_one_who_waits_builds_and_cleans_up():
    begun, waiting = fork.Event(), fork.Event()

    def die():
        begun.set(), waiting.wait(30)
        Path(path + ".0123.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    path = os.path.join("kept", f"x-{digest(1)[:16]}.pt")
    process = fork.Process(target=lambda: cached("kept", "x", 1, die))
    process.start()
    assert begun.wait(30)
    state, where = cached("kept", "x", 1, lambda: {"ok": 1}, lambda line: waiting.set())
    assert state == {"ok": 1} and where == path and [str(p) for p in Path("kept").iterdir()] == [path]
    process.join(30)


def test_a_build_that_fails_leaves_the_entry_free():
    with pytest.raises(ZeroDivisionError):
        cached("kept", "x", 1, lambda: 1 / 0)
    assert list(Path("kept").iterdir()) == [] and cached("kept", "x", 1, lambda: {"a": 2})[0] == {"a": 2}


def test_what_is_written_for_all_is_readable_for_all():
    old = os.umask(0o022)
    write_whole("x", b"1")
    os.umask(old)
    assert Path("x").stat().st_mode & 0o777 == 0o644


# ------------------------------------------------------------------------------------------------------- keys

# By hand: what must give another state, and what must not, or comparisons would not share theirs.
MATTER = {"judge": "prompt_length judge_steps judge_read judge_lr judge_layers judge_width judge_context",
          "sft": "seed n_layer n_embd n_head dropout clip sft_steps sft_lr sft_batch",
          "warmup": "seed n_layer n_embd n_head dropout clip reward_warmup prompt_length",
          "reward": "seed n_layer n_embd n_head dropout clip sft_steps sft_lr sft_batch guidance "
                    "segment_entropy agg beta bound K ties resolution reward_first reward_lr reward_batch "
                    "head_first patience compile"}
SHARED = {"judge": "seed objective guidance lr alpha agg K sft_steps n_embd reward_lr out_dir data shots",
          "sft": "objective guidance agg lr kl policy_steps reward_lr K wmle_norm judge_steps",
          "warmup": "objective agg lr policy_steps reward_lr K judge_steps",
          "reward": "objective lr alpha kl gamma lam epochs minibatches policy_steps weights center "
                    "hold ppo_clip"}


KEYS = {"judge": tasks.judge.JUDGE_KEY, **warm_start.KEYS}


def key(kind, c=None, data=0, code=(), device="cpu", dtype=torch.float32):
    return digest(decides(without(c or flags(), *KEYS[kind]), data, code, device, dtype))


@pytest.mark.parametrize("kind", KEYS)
def test_the_flags_of_every_group_are_in_a_key_but_those_of_the_groups_that_it_names(kind):
    (left_out, stay), same = KEYS[kind], []
    for name, group in groups_of(train.Flags).items():
        c = flags()
        setattr(c, name, "another value")
        same += [name] * (key(kind, c) == key(kind))
        assert (name in same) == (group in left_out and name not in stay), name
    assert set(left_out) < set(groups_of(train.Flags).values()) and set(stay) <= set(groups_of(train.Flags))
    assert not set(same) & set(MATTER[kind].split()) and set(same) >= set(SHARED[kind].split())
    tomorrow = flags()
    tomorrow.new_flag = 1  # of no group
    assert key(kind, tomorrow) != key(kind)


def test_the_machine_is_in_every_key(monkeypatch):
    first = key("judge")
    assert key("judge", device="cuda") != first != key("judge", dtype=torch.bfloat16)
    for place, name, other in ((torch, "__version__", "0.1"), (torch, "get_num_threads", lambda: 77),
                               (torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")):
        with monkeypatch.context() as m:
            m.setattr(place, name, other)
            assert key("judge") != first, name
    assert key("judge") == first != key("judge", data=1)


CODE = {"judge": ("tasks.judge",),
        "warmup": (warm_start.warm_starts, warm_start.supervised, train.Run, PromptTask),
        "sft": (warm_start.warm_starts, warm_start.supervised, train.Run, SummarizeTask),
        "reward": (warm_start.learn_from_pairs, warm_start.supervised, train.Run, EditsTask)}


@pytest.mark.parametrize("kind, used, unused", [
    ("judge", "tasks.judge model data",
     "policy_reinforce policy_ppo reward fused warm_start tasks.summarize train"),
    ("warmup", "model data fused policy_wmle tasks.prompt support.distributed",
     "policy_reinforce tasks.edits train"),
    ("sft", "model data fused policy_wmle tasks.summarize support.distributed",
     "policy_reinforce tasks.judge tasks.edits train"),
    ("reward", "fused model data reward aggregate plackett_luce policy_wmle policy_reinforce rollout state "
     "tasks.edits support.distributed", "support.log tasks.judge tasks.prompt train")])
def test_the_code_of_every_module_in_use_is_in_the_key_and_no_other(kind, used, unused, monkeypatch):
    first, source = key(kind, code=CODE[kind]), support.files.source
    for name in used.split() + unused.split():
        with monkeypatch.context() as m:
            m.setattr(support.files, "source",
                      lambda n: source(n) and source(n) + "\n# changed" * (n == name))
            assert (key(kind, code=CODE[kind]) != first) == (name in used.split()), name


def test_of_warm_start_py_the_functions_in_use_are_in_the_key():
    found = code_of(warm_start.learn_from_pairs)
    assert {"warm_start.learn_from_pairs", "warm_start.fitted_state",
            "reward", "rollout", "state"} <= set(found)
    assert not {"warm_start", "warm_start.warm_starts", "warm_start.warm_key"} & set(found)
    # or a new objective trains them again
    assert "rollout" not in code_of(warm_start.warm_starts, warm_start.supervised)


def test_all_data_are_in_a_fingerprint(shared, monkeypatch):
    """Rows and ids alike: a changed encoding, padding, end-of-text or sentence of the warm-up is another
    training."""
    def changes(task, spoil):
        before = task.fingerprint()
        spoil(task)
        return [name for name, x in task.fingerprint().items() if before[name] != x]
    make = lambda: EditsTask(flags("--task", "edits", "--data", shared / "edits", "--vocab_size", 400),
                             torch.device("cpu"), None, lambda line: None)
    assert make().fingerprint() == make().fingerprint()
    for part in ("context", "context_mask", "reference", "reference_mask"):
        def flip(task):
            tensor = getattr(task.tensors["train"], part)
            tensor[-1, -1] = ~tensor[-1, -1]
        assert changes(make(), flip) == ["tokens"], part
    for split in make().rows:
        assert changes(make(), lambda task: task.rows[split].pop()) == [split]
    # these are in memory; of summaries on disk see tests/test_corpus.py
    small_worlds(monkeypatch)
    make = lambda: SummarizeTask(flags("--task", "summarize"), torch.device("cpu"), None, lambda line: None)
    assert changes(make(), lambda task: task.rows["test"].pop()) == ["test"]
    for split, part in (("train", "contexts"), ("test", "references")):
        def renew(task):
            ids = getattr(task.tensors[split], part)
            setattr(task.tensors[split], part, Ids.of([ids[i][:-1] for i in range(len(ids))]))
        assert changes(make(), renew) == ["tokens"], part
    assert changes(make(), lambda task: setattr(task, "width", task.width - 1)) == ["tokens"]
    c = flags("--world", shared / "world", "--judge_steps", 1, "--judge_read", 1, "--judge_width", 8,
              "--judge_layers", 1, "--shots", 2, "--vocab_size", 400, "--cache_dir", shared / "cache")
    make = lambda: PromptTask(c, torch.device("cpu"), lambda *x: None, lambda line: None)
    assert changes(make(), lambda task: task.world.talk.append("what is the mood ?")) == ["world"]
    assert changes(make(), lambda task: task.rows["train"].pop()) == ["few-shot and test texts"]
    assert changes(make(), lambda task: task.windows()[0][3].add_(1)) == ["tokens"]


def test_a_judge_is_another_one_where_its_ids_are(shared, prompt, monkeypatch):
    """The encoding of a text is no flag: only its ids can tell."""
    kept = lambda: set(Path("cache").glob("judge-*.pt"))
    go(*prompt, "--cache_dir", "cache", "--out_dir", "a")
    go(*prompt, "--cache_dir", "cache", "--out_dir", "b", "--seed", 2, "--lr", 0.002, "--agg", "min")
    assert len(kept()) == 1
    clip = sys.modules["tasks.prompt"].clip
    monkeypatch.setattr("tasks.prompt.clip", lambda ids, width: ([x[::-1] for x in clip(ids, width)[0]], 0))
    go(*prompt, "--cache_dir", "cache", "--out_dir", "c")
    assert len(kept()) == 2


# ----------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("task, file, part", [
    ("prompt", "shots/train.jsonl", "few-shot"), ("summarize", "p/train.jsonl", "train"),
    ("summarize", "p/test.jsonl", "test"), ("edits", "e/train.jsonl", "train")])
def test_a_run_does_not_go_on_with_other_data(task, file, part, prompt, summarize, edits, capsys):
    write = {"shots": write_shots, "p": write_pairs, "e": write_edits}[folder := file.split("/")[0]]
    write(Path(folder))
    go(*{"prompt": prompt, "summarize": summarize, "edits": edits}[task], "--data", folder, "--out_dir", "a")
    good = Path(file).read_text()
    Path(file).write_text("".join(good.splitlines(keepends=True)[::-1]))  # the same rows in another order
    line = refuses(capsys, "--init_from", "resume", "--out_dir", "a", "--policy_steps", 6)
    assert f"{folder}: {part}" in line and "not what the run in a began with" in line
    Path(file).write_text(good)
    go("--init_from", "resume", "--out_dir", "a", "--policy_steps", 6)


def test_fewer_steps_than_done_are_refused_and_as_many_finish_the_run(prompt, capsys):
    go(*prompt, "--out_dir", "a")
    line = refuses(capsys, "--init_from", "resume", "--out_dir", "a", "--policy_steps", 3)
    assert "--policy_steps 3: the run in a has done 4 steps already" in line
    first = json.loads(Path("a/summary.json").read_text())
    Path("a/summary.json").unlink()
    go("--init_from", "resume", "--out_dir", "a", "--policy_steps", 4)
    again = json.loads(Path("a/summary.json").read_text())
    assert ({k: v for k, v in again.items() if k != "seconds"}
            == {k: v for k, v in first.items() if k != "seconds"})


def test_a_run_that_goes_on_has_no_older_curves_of_searches(prompt, monkeypatch):
    go(*prompt, "--out_dir", "a")
    first = Path("a/searches.jsonl").read_text()

    def stopped(run):
        raise log.UserError("stopped")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "finish", stopped)
        train.main("--init_from resume --out_dir a --policy_steps 4".split())
    assert not Path("a/searches.jsonl").exists() and not Path("a/summary.json").exists()
    go("--init_from", "resume", "--out_dir", "a", "--policy_steps", 4)
    assert Path("a/searches.jsonl").read_text() == first  # the same record, from the checkpoint


# ----------------------------------------------------------------------------------------- threads and memory


def test_small_nets_get_one_thread_and_large_ones_torch_s_choice(monkeypatch):
    monkeypatch.setattr(device, "MANY", 6)
    decide = lambda c: device.decide_threads(c.threads, train.TASKS[c.task].step_work(c))
    for task in train.TASKS:
        assert decide(flags("--task", task))[0] == 1
    large = flags("--task", "summarize", "--n_layer", 12, "--n_embd", 768)
    assert decide(large)[0] == 6
    assert decide(flags("--judge_layers", 12, "--judge_width", 1024))[0] == 6
    assert decide(flags("--threads", 1)) == (1, "asked for")
    # By hand: 6 operations a parameter and token, 12 width^2 parameters a block, 32 sequences of 256 + 24
    # tokens.
    assert SummarizeTask.step_work(large) == 6 * 12 * 12 * 768 ** 2 * 32 * 280


def test_the_threads_in_use_are_said_and_kept(prompt, capsys):
    go(*prompt, "--threads", 0, "--out_dir", "a")
    config = json.loads(Path("a/config.json").read_text())
    assert config["threads"] == 0 and config["threads_used"] == torch.get_num_threads() == 1
    assert f"threads 1 ({config['threads_reason']})" in capsys.readouterr().out


def test_bench_shows_what_two_threads_are_worth(capsys, monkeypatch):
    times = iter([8.0, 6.0, 9.0, 4.0] * len(bench.THREAD_STEPS))  # 1, 2, 1, 2 threads
    monkeypatch.setattr(bench, "asked", lambda *x: {"ms": next(times), "flops": 3e9})
    found = bench.threads()
    first = [(r["variant"], r["ms"], r["vs_naive"]) for r in found[:2]]
    assert first == [("1 thread", 8.0, 1.0), ("2 threads", 4.0, 2.0)]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(bench.THREAD_STEPS) == 2 + len(found) // 2


@pytest.mark.parametrize("typed, says", [
    ("--threads 100000", "--threads 100000: this machine has"),
    ("--n_embd 1000000", "--n_layer, --n_embd: nets of this size"),
    ("--n_layer 1000000000", "--n_layer, --n_embd"),
    ("--judge_width 8000000", "--judge_layers, --judge_width"),
    ("--task summarize --reward_warmup 5 --sft_steps 0", "--reward_warmup 5: task summarize has references"),
    ("--task edits --guidance token --reward_warmup 5", "(did you mean --sft_steps?)")])
def test_what_this_machine_or_task_cannot_do_is_refused(typed, says, prompt, capsys):
    assert says in refuses(capsys, *([] if "--task" in typed else prompt), *typed.split())


def test_memory_that_runs_out_is_one_line(prompt, capsys, monkeypatch):
    def no_room(run):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
    takes_step(monkeypatch, no_room)
    status, line = stops(capsys, *prompt, "--out_dir", "a")
    assert status == 1 and "out of memory" in line


# --------------------------------------------------------------------------------------------------- terminal

HOSTILE = "a  b\x1b[2J\x9b31m\u202eé\n\u2028c"  # colours by ESC and by C1, a direction mark, newlines
SAFE = "a  b\\x1b[2J\\x9b31m\\u202eé\\n\\u2028c"


def test_visible_keeps_spaces_and_letters_and_escapes_what_steers_a_terminal():
    assert log.visible(HOSTILE) == SAFE and log.visible("\udcff\t\x7f\x00") == "\\udcff\\t\\x7f\\x00"


def test_a_path_in_an_error_message_is_the_path_that_was_typed(prompt, capsys):
    assert "two  spaces   here: expected a folder, a file or hub:" in refuses(
        capsys, *prompt, "--data", "two  spaces   here")
    assert SAFE + ": expected" in refuses(capsys, *prompt, "--data", HOSTILE)
    assert repr("\x9b") in refuses(capsys, *prompt, "--lr", "\x9b")


def test_what_a_run_says_and_ends_with_cannot_steer_the_terminal(prompt, capsys, monkeypatch):
    monkeypatch.setattr(train, "finish", lambda run: run.log.say(HOSTILE) or {
        "best_prompt": HOSTILE, "accuracy": 0.5, "warnings": []})
    go(*prompt, "--out_dir", "a")
    out = capsys.readouterr().out
    assert f"best_prompt            {SAFE}\n" in out and out.count(SAFE) == 2
    assert all(c.isprintable() for c in out.replace("\n", ""))


def test_the_number_of_threads_is_no_setting_of_a_table(tmp_path):
    a = make_run(tmp_path / "a", {"threads_used": 1, "threads_reason": "asked for"})
    b = make_run(tmp_path / "b", {"threads_used": 2, "threads_reason": "torch's choice", "seed": 2})
    done = subprocess.run([sys.executable, ROOT / "eval.py", "--compare", a, b],
                          capture_output=True, text=True)
    assert "\n  none " in done.stdout and "threads_used=" not in done.stdout


@names
def test_eval_shows_hostile_configs_figures_and_logs_as_escapes(tmp_path):
    folder = make_run(tmp_path / HOSTILE.replace("\n", ""), {"guidance": HOSTILE, "task": HOSTILE},
                      {HOSTILE: 1.5},
                      [{"step": 1, "phase": "eval", HOSTILE: 0.5}], [{**SAMPLE, "kind": HOSTILE}], tail="{\n")
    other = make_run(tmp_path / "b", {"agg": HOSTILE, "task": HOSTILE})
    for typed in (["--out_dir", folder], ["--compare", folder, other, tmp_path / HOSTILE]):
        done = subprocess.run([sys.executable, ROOT / "eval.py", *typed], capture_output=True,
                              encoding="utf-8")
        assert done.returncode == 0, done.stderr
        assert all(c.isprintable() for c in done.stdout.replace("\n", "")) and "\\x9b31m" in done.stdout


@bash
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_quoted_words_are_read_back_by_a_shell(encoding, monkeypatch):
    words = ["plain", "a  b", "it's", '"', "$HOME `x` \\", "é", "✓", HOSTILE, "\udcff", "", "*", "~"]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    line = " ".join(map(log.quoted, words))
    line.encode(encoding)
    assert line.isprintable()
    back = subprocess.run(["/bin/bash", "-c", f"printf '%s\\0' {line}".encode()], capture_output=True).stdout
    assert back.split(b"\0")[:-1] == [w.encode("utf-8", "surrogateescape") for w in words]


POOR = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}


def paste(line, **env):
    """A printed line, run by bash as it stands."""
    return subprocess.run(["/bin/bash", "-c", line], capture_output=True, text=True,
                          env={**os.environ, **env})


@bash
@names
def test_a_run_and_its_last_line_on_a_terminal_that_knows_ascii_only(summarize, shared):
    """Names of files, texts and the folder are none of them ASCII; and the folder has two spaces and a
    quote."""
    folder, name = Path("dätä  'x'"), "rün  'of' mine"
    for split in ("train", "validation", "test"):
        write_jsonl(folder / f"{split}.jsonl",
                    [{"document": f"{w} ✓ \x1b[2J", "summary": f"{w} é"} for w in "abcdef"])
    done = call(*summarize, "--data", folder, "--out_dir", name, "--sft_steps", 2, env={**os.environ, **POOR})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.isascii() and "\x1b" not in done.stdout
    check_run(name, "summarize")
    last = done.stdout.splitlines()[-1]
    for env in (POOR, {}):
        shown = paste(last, **env)
        assert shown.returncode == 0 and "ended well" in shown.stdout, (last, shown.stderr)


@bash
@pytest.mark.parametrize("name", ["two  spaces, it's", "-dash", "new\nline"])
def test_the_commands_that_eval_prints_can_be_pasted_back(name):
    make_run(Path(name), samples=[SAMPLE])
    make_run(Path("x") / name, {"seed": 2}, summary=None)
    shown = subprocess.run([sys.executable, ROOT / "eval.py", "--compare", "./" + name, f"x/{name}"],
                           capture_output=True, text=True)
    again = paste(shown.stdout.splitlines()[-1])
    assert again.returncode == 0 and "ended well" in again.stdout, (shown, again)
    shown = subprocess.run([sys.executable, ROOT / "eval.py", "--compare", f"x/{name}"],
                           capture_output=True, text=True)
    one = subprocess.run([sys.executable, ROOT / "eval.py", "--out_dir", f"x/{name}"],
                         capture_output=True, text=True)
    command = shown.stdout.splitlines()[-1]
    assert command in [line.strip() for line in one.stdout.splitlines()] and "--init_from resume" in command


@bash
def test_the_advice_after_ctrl_c_can_be_pasted_back(prompt, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(train, "finish", lambda run: signal.raise_signal(signal.SIGINT))
        status, line = stops(capsys, *prompt, "--out_dir", "-it's  here")
    assert status == 130
    words = paste(f"printf '%s\\0' {line.splitlines()[1]}").stdout.split("\0")[:-1]
    assert words[1] == str(ROOT / "train.py")
    go(*words[2:])
    check_run("-it's  here", "prompt")


def test_lines_behind_the_checkpoint_are_written_again_and_not_twice(begun, prompt):
    begun(2)
    for name in ("metrics.jsonl", "samples.jsonl"):  # what a run killed at step 3 leaves
        with open(f"a/{name}", "a", encoding="utf-8") as f:
            f.write(json.dumps(rows("a", name)[-1] | {"step": 3}) + "\n")
    go("--init_from", "resume", "--out_dir", "a", "--policy_steps", 4)
    go(*prompt, "--policy_steps", 4, "--out_dir", "b")
    assert_same_run("a", "b")


def test_numbers_beyond_the_machine_s_are_one_line(prompt, capsys):
    assert "below 2**63" in refuses(capsys, *prompt, "--batch_size", 10 ** 30)
    assert "--threads 999999" in refuses(capsys, *prompt, "--threads", 999999)


@pytest.mark.parametrize("most", [3, 2 ** 31, 10 ** 18])
def test_ids_are_cut_to_any_width_that_a_flag_takes(most, tmp_path):
    writer = corpus.IdWriter(str(tmp_path / "a"), most, np.uint16)
    for ids in ([1, 2, 3, 4], [5]):
        writer.add(ids)
    kept = corpus.open_ids(str(tmp_path), "a", writer.close())
    assert [kept[i].tolist() for i in range(2)] == [[1, 2, 3, 4][:most], [5]]
    assert corpus.Ids(kept.flat, kept.lengths, most, "")[1].tolist() == [5]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_is_of_a_checkout_of_its_own_and_says_where_files_have_changed(tmp_path, monkeypatch):
    found = folder.commit.__wrapped__  # without what it remembers
    base = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    git = lambda *words: subprocess.run([*base, *words], capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr(folder, "HOME", str(tmp_path))
    assert found() is None  # no checkout
    git("init")
    assert found() is None  # nothing in it
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py"), git("commit", "-m", "one")
    short = git("rev-parse", "HEAD")[:7]
    (tmp_path / "b.py").write_text("2\n")  # what git does not know is not the code
    assert found() == short
    (tmp_path / "a.py").write_text("3\n")
    assert found() == f"{short} and changes"
    monkeypatch.setattr(folder, "HOME", str(tmp_path / "inside"))
    assert found() is None  # a folder around it


def test_a_run_does_not_go_on_with_another_judge(prompt, capsys, tmp_path):
    go(*prompt, "--cache_dir", "cache", "--out_dir", "a")
    file = next(Path("cache").glob("judge-*.pt"))
    judge = torch.load(file, weights_only=True)
    judge["weights"]["ln_f.bias"] += 0.01  # as another version of torch might have trained it
    torch.save(judge, file)
    assert "judge: not what the run in a began with" in refuses(
        capsys, "--init_from", "resume", "--out_dir", "a", "--policy_steps", 6)


def test_one_judge_serves_all_seeds_of_a_world_whose_texts_repeat(prompt):
    world = write_world(Path("repeats"), 200)
    texts = rows("repeats", "texts.jsonl")
    # some of the last ones are parts of earlier ones: which are drawn depends on the seed
    for i, row in enumerate(texts):
        row["text"] = texts[i - 100]["text"] if i > 180 else row["text"]
    write_jsonl(world / "texts.jsonl", texts)
    for seed in (1, 2, 3):
        go(*prompt, "--world", "repeats", "--seed", seed, "--cache_dir", "cache", "--out_dir", str(seed))
    assert len(list(Path("cache").glob("judge-*.pt"))) == 1


# ----------------------------------------------------------------------------------------------------- Ctrl-C


def ctrl_c(*_, **__):
    signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_while_saving_leaves_the_old_checkpoint(begun, capsys, monkeypatch):
    begun(2)
    before, step, save = Path("a/ckpt.pt").read_bytes(), train.OBJECTIVES["reinforce"].step, torch.save

    def swallow(*x):  # what torch makes of it where its writer is interrupted half-way
        try:
            ctrl_c()
        except KeyboardInterrupt:
            raise RuntimeError("PytorchStreamWriter failed writing file")
    for place, name, second in ((os, "fsync", ctrl_c), (torch, "save", swallow)):
        with monkeypatch.context() as m:
            takes_step(m, lambda run: (ctrl_c(), m.setattr(place, name, second), step(run))[2])
            m.setattr(log, "command", lambda *x: ctrl_c() or "third")  # and one more while the line is made
            status, line = stops(capsys, "--init_from", "resume", "--out_dir", "a", "--policy_steps", 6)
        assert status == 130 and line == "train.py: stopped; go on with:\nthird\n"
        assert Path("a/ckpt.pt").read_bytes() == before and not list(Path("a").glob("*.tmp*"))
        assert not Path("a/.lock").exists()
    assert torch.save is save
    go("--init_from", "resume", "--out_dir", "a", "--policy_steps", 3)


@pytest.mark.parametrize("name", ["evaluate", "reward_phase", "finish"])
def test_ctrl_c_twice_in_an_evaluation_or_a_fit(name, begun, capsys, monkeypatch):
    begun(2)
    monkeypatch.setattr(train, name, lambda run: (ctrl_c(), ctrl_c()))
    status, line = stops(capsys, "--init_from", "resume", "--out_dir", "a", "--policy_steps", 3)
    assert status == 130 and "--init_from resume --out_dir a" in line and load("a")["step"] >= 2


def test_ctrl_c_before_a_resumed_run_has_read_its_data(begun, prompt, capsys, monkeypatch):
    begun()
    monkeypatch.setattr(train, "decide_device", ctrl_c)
    status, line = stops(capsys, "--init_from", "resume", "--out_dir", "a")
    assert status == 130 and "--init_from resume --out_dir a" in line
    status, line = stops(capsys, *prompt, "--out_dir", "a", "--overwrite")
    assert status == 130 and line.startswith("train.py: stopped before the first checkpoint: start again (a")
    assert load("a")["step"] == 4  # the run that was to be replaced is as it was


def test_ctrl_c_while_another_process_makes_the_judge(prompt, capsys, monkeypatch):
    go(*prompt, "--cache_dir", "cache", "--out_dir", "a")
    path = next(Path("cache").glob("judge-*.pt"))
    path.unlink()
    held = lock.take(f"{path}.lock")
    monkeypatch.setattr(lock.time, "sleep", ctrl_c)
    status, line = stops(capsys, *prompt, "--cache_dir", "cache", "--out_dir", "b")
    assert status == 130 and "before the first checkpoint" in line and not Path("b").exists()
    lock.release(held, f"{path}.lock")


def test_ctrl_c_while_importing_is_one_line():
    code = """if True:
        import runpy, signal, sys
        class Interrupting:
            def find_spec(name, *_):
                if name == "torch":
                    signal.raise_signal(signal.SIGINT)
        sys.meta_path.insert(0, Interrupting)
        sys.argv = ["train.py"]
        runpy.run_path(ROOT + "/train.py", run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", f"ROOT = {str(ROOT)!r}\n{code}"],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (130, "train.py: stopped\n")
