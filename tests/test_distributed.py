"""Several processes are one, and so is a batch in parts: support/distributed.py, --micro_batch.

Processes are real ones, forked (that costs nothing beside starting Python anew), which talk by gloo over the
loopback. One update of every objective and fit is compared with that of one process on the same batch, in
float64 (the reward's numbers are float32), by plain gradient steps, so that it is the gradients that are
compared.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import alone, fork, forks
from stubs import World, flags, without_adam
from test_train import (LEFT, ROOT, assert_same_run, check_run, go, here, load, metrics, prompt,  # noqa: F401
                        shared, summarize, takes_step)

import model
import state
import train
from support import device, distributed
from support.distributed import from_first, joined, largest, own, parts, place, world
from support.files import write_whole
from support.log import Log
from warm_start import supervised



# ---------------------------------------------------------------------------------------------------- helpers


def process(i, n, port, work):
    """What process i of n does, as torchrun starts it: its answer, stdout and stderr go to files."""
    os.environ.update(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
                      TORCHELASTIC_RESTART_COUNT="0")  # torch 2.4 asks for it
    alone(f"out-{i}", f"err-{i}")
    torch.save(work(), f"answer-{i}")


def together(work, n=2):
    """[(exit status, stderr, what work() returned or None) of each of n processes]."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for old in (f"answer-{i}" for i in range(n) if Path(f"answer-{i}").exists()):
        os.remove(old)
    everyone = [fork.Process(target=process, args=(i, n, store.port, work)) for i in range(n)]
    for p in everyone:
        p.start()
    for p in everyone:
        p.join(300)  # a hang, not a busy machine
        if p.is_alive():
            p.kill()
    answer = lambda i: torch.load(f"answer-{i}") if Path(f"answer-{i}").exists() else None
    return [(p.exitcode, Path(f"err-{i}").read_text(), answer(i)) for i, p in enumerate(everyone)]


def command(*typed):
    """train.py as torchrun starts it."""
    return lambda: sys.exit(train.main([str(x) for x in typed]))


# ----------------------------------------------------------------------------------------- one update, equals


POOLED, PAIRS = {"pooled": True, "width": 4}, {"has_pairs": True, "answers": 9}
CASES = {  # name -> flags, the stub's world
    "reinforce": ("--task summarize --objective reinforce --batch_size 6 --group_size 3 --kl 0.1", {}),
    "one of each": ("--task summarize --objective reinforce --batch_size 5 --explore 0.5", {}),
    "bandit": ("--task summarize --objective reinforce --guidance bandit --baseline rloo --batch_size 6 "
               "--group_size 3", {}),
    "prompts": ("--task prompt --batch_size 7 --ties 1 --candidates 9", POOLED),
    "prompts, bandit": ("--task prompt --guidance bandit --batch_size 9", POOLED),
    "wmle": ("--task summarize --batch_size 5 --agg min", {}),
    "E9": ("--task summarize --batch_size 5 --wmle_norm rewards --replay 0 --agg max", {}),
    "mle": ("--task summarize --objective mle --batch_size 5", {}),
    "one row": ("--task summarize --batch_size 1 --candidates 2 --reward_batch 1", {}),
    "ppo": ("--task summarize --objective ppo --batch_size 7 --minibatches 2 --alpha 0.1", {}),
    "ppo, one row": ("--task summarize --objective ppo --batch_size 2 --minibatches 2", {}),
    "edits": ("--task edits --guidance edits --batch_size 5 --minibatches 1", PAIRS),
    "segment": ("--task edits --guidance segment --segment_entropy 1.09 --batch_size 5", PAIRS),
    "red": ("--task edits --guidance red --batch_size 5 --minibatches 1", PAIRS),
    "abc": ("--task edits --guidance abc --batch_size 5 --minibatches 1", PAIRS),
    "implicit": ("--task edits --guidance implicit --reward_lr 0.1 --batch_size 5 --minibatches 1", PAIRS),
}
SIZES = ("--K 3 --candidates 5 --reward_batch 4 --reward_first 2 --reward_lr 0.1 --lr 0.1 --resolution 0 "
         "--reward_warmup 0 --sft_steps 0 --threads 1 --device cpu --hold 0 --no-foreseen").split()


def made(typed, micro, name):
    """A Run in float64 on the stub's world, by plain gradient steps, on a transformer of one block."""
    typed, kind = CASES[typed]
    few = [] if "has_pairs" not in kind else ["--K", 2]
    c = flags(*SIZES, *typed.split(), *few, "--micro_batch", micro, "--cache_dir", name)
    c.n_embd, c.n_head, c.guidance = 8, 2, c.guidance or "edits"
    torch.set_default_dtype(torch.float64)
    try:
        r = state.Run(c, World(**{"width": 6} | kind), train.objective_of(c), torch.device("cpu"),
                      torch.float32, Log())
    finally:
        torch.set_default_dtype(torch.float32)
    if r.value is not None:
        r.value.float()  # as it takes its states
    r.log.progress = lambda *x: None
    r.policy_optimizer, r.reward_optimizer = map(without_adam, (r.policy_optimizer, r.reward_optimizer))
    with torch.no_grad():  # away from the start, or there is no KL and no ratio but 1
        for p in r.policy.parameters():
            p += 0.1 * torch.sin(torch.arange(p.numel(), dtype=p.dtype).view_as(p))
    return r


def lesson(typed, micro, folder):
    """A round of a case, with two updates of the policy -> (weights before, weights after, figures, all that
    must not differ at all)."""
    r = made(typed, micro, f"{folder}/{typed} {micro} {world()}")
    weights = lambda: torch.cat([x.detach().flatten().clone() for net in r.nets().values()
                                 for x in net.state_dict().values()])
    before, figures = weights(), [train.reward_phase(r)]
    for _ in range(2):
        figures.append(r.objective.step(r))
        r.step += 1
    drawn = [g.get_state() for g in r.generators.values()]
    drawn += [r.task.queries] if r.task.queries is not None else []
    return before, weights(), [{k: v for k, v in x.items() if v is not None} for x in figures], drawn


def sft(micro, folder):
    """A supervised start of five references an update, in the form of `lesson`."""
    r = made("mle", micro, folder)
    data, weights = torch.Generator().manual_seed(1), lambda: torch.cat(
        [x.detach().flatten() for x in r.policy.parameters()])
    before = weights()
    supervised(r, r.policy, 3, 0.05, 5, "sft", lambda n: r.task.batch(n, data))
    return before, weights(), [], [data.get_state()]


def lessons_of(names, micro, folder):
    return {x: sft(micro, folder) if x == "sft" else lesson(x, micro, folder) for x in names}


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    """{how: {case: lesson}}: of one process, in parts of two sequences, of each of two processes, and of each
    of two in parts."""
    folder = tmp_path_factory.mktemp("lessons")
    before = os.getcwd()
    os.chdir(folder)

    def both():
        with joined():
            return lessons_of(ALL, 0, folder), lessons_of(FEW, 2, folder)
    try:
        found = {"one": lessons_of(ALL, 0, folder), "parts": lessons_of(ALL, 2, folder)}
        for i, (status, err, answer) in enumerate(together(both) if fork else ()):
            assert status == 0, err
            found |= {f"process {i}": answer[0], f"process {i}, parts": answer[1]}
    finally:
        os.chdir(before)
    return found


ALL, FEW = [*CASES, "sft"], ("reinforce", "prompts", "ppo", "implicit", "sft")
TWO = [(f"process {i}{more}", case) for i in range(2) for more, of in (("", ALL), (", parts", FEW))
       for case in of]


@pytest.mark.parametrize("how, case", [*(("parts", x) for x in ALL),
                                       *(pytest.param(*x, marks=forks) for x in TWO)])
def test_one_update_in_parts_or_on_two_processes_is_that_of_the_whole_batch(how, case, lessons):
    """To 1e-6, and they draw the same numbers and the same samples."""
    before, one, figures, drawn = lessons["one"][case]
    _, other, their_figures, their_drawn = lessons[how][case]
    assert (one - before).abs().max() > 1e-3
    torch.testing.assert_close(other - before, one - before, rtol=0, atol=1e-6)
    for a, b in zip(drawn, their_drawn, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    for a, b in zip(figures, their_figures, strict=True):
        assert a.keys() == b.keys()
        assert {k: float(v) for k, v in b.items()} == pytest.approx({k: float(v) for k, v in a.items()},
                                                                    rel=1e-5, abs=1e-6)


# ------------------------------------------------------------------------------ what is shared out, and drawn


@pytest.mark.parametrize("n", [0, 1, 3, 8])
@pytest.mark.parametrize("of", [1, 2, 5])
def test_every_row_is_one_process_s(n, of, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: of)
    mine = []
    for i in range(of):
        monkeypatch.setattr(distributed, "place", lambda: i)
        mine.append(list(own(n)))
        for most in (0, 2):
            rows = [j for x in parts(n, most) for j in range(n)[x]]
            assert rows == (mine[-1] or list(range(n))[:1])  # nothing of one's own: the first row for company
            assert all(x.stop - x.start <= (most or n) for x in parts(n, most))
    assert sum(mine, []) == list(range(n)) and max(map(len, mine)) - min(map(len, mine)) <= 1


def test_what_is_read_in_parts_holds_one_part_at_a_time():
    """The same gradient; each part is read again when its gradient comes, after all have been read."""
    x, w, seen = torch.randn(5, 3), torch.randn(3, requires_grad=True), []

    def read(rows):
        seen.append(len(rows))
        return (rows * w).tanh()
    found = distributed.shared(read, x, most=2)
    found.square().sum().backward()
    assert seen[:3] == [2, 2, 1] and sorted(seen[3:]) == [1, 2, 2]
    grad, w.grad = w.grad, None
    (x * w).tanh().square().sum().backward()
    torch.testing.assert_close(grad, w.grad)


def test_no_pass_with_a_gradient_reads_more_than_micro_batch():
    """Two sequences, or the three behind one prefix, which are read together; without the flag all."""
    for case, most in (("reinforce", 3), ("one of each", 3), ("ppo", 3), ("prompts", 2), ("implicit", 2)):
        for micro in (0, 2):
            r, read = made(case, micro, f"a {case} {micro}"), {"policy": [], "reward": []}
            for name, net in (("policy", r.policy), ("reward", r.reward.body)):
                net.register_forward_pre_hook(lambda net, x, to=read[name]: to.append(
                    x[0].shape[:-1].numel()) if torch.is_grad_enabled() else None)
            train.reward_phase(r)
            r.objective.step(r)
            for sizes in read.values():
                assert sizes and (max(sizes) > most) == (micro == 0), (case, micro, sizes)


def test_figures_add_up_and_the_largest_stays_the_largest():
    some = [{"a": torch.tensor(1.0), "ratio_max": torch.tensor(x)} for x in (2.0, 5.0, 3.0)]
    assert distributed.added(some) == {"a": 3.0, "ratio_max": 5.0}


@forks
def test_processes_draw_the_numbers_of_one_whoever_writes_longer(here):
    """The first prefix ends at once, the other never does: both processes have drawn as often as one."""
    class Net(torch.nn.Module):
        head = torch.eye(3)
        prefill = lambda self, tokens, mask: model.Cache([tokens[:, None, :, None].float()], [], mask,
                                                         mask.sum(1))
        _check_width = lambda self, width: None

        def decode(self, tokens, cache, column):
            ends = cache.keys[0][:, 0, 0, 0]  # (N,) the first token of the prefix
            return torch.stack((1 - ends, 1 - ends, 200 * ends - 100), 1)
    prefix = torch.tensor([[1], [0]]), torch.ones(2, 1, dtype=torch.bool)

    def both():
        g = torch.Generator().manual_seed(3)
        return *model.write(Net(), 0, 9, g, 2, prefix, eot=2), g.get_state()

    def work():
        with joined():
            return both()
    one = both()
    assert one[1].tolist() == [1, 1, 9, 9]
    for status, err, two in together(work):
        assert status == 0, err
        assert all(map(torch.equal, one, two))


@forks
def test_processes_decide_alike(here):
    """The first one's answer, or its error, in all; the largest number; nets that differ are found out."""
    def work():
        with joined():
            i = place()
            found = [from_first(lambda: f"from {i}"), largest(10 + i), world()]
            write_whole(f"by {i}", b"")
            with pytest.raises(ZeroDivisionError):
                from_first(lambda: 1 // i)
            r = made("mle", 0, "a")
            r.check_alike()
            r.policy.ln_f.bias.data += 1e-6 * i
            with pytest.raises(state.UserError, match="drifted apart"):
                r.check_alike()
            return found
    for status, err, found in together(work):
        assert status == 0, err
        assert found == ["from 0", 11, 2]
    assert Path("by 0").exists() and not Path("by 1").exists()


def test_processes_share_the_cores_and_each_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(device, "LOCAL", 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert device.decide_threads(2, 0)[0] == 2 and device.decide_threads(0, 1)[0] == 1
    assert device.decide_threads(0, 1e12) == (2, "1e+03 Gflop a step: a share of the processors")
    with pytest.raises(state.UserError, match="--threads 3: this machine has 8 processors for 3 processes"):
        device.decide_threads(3, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(state.UserError, match="3 processes: expected at most 2"):
        device.decide_device(flags())


# ------------------------------------------------------------------------------------------------- whole runs


@forks
def test_two_processes_write_one_run_and_go_on_to_the_bit(summarize, capsys):
    """20 steps are 10 and 10 more, dropout and odd batches included; then one process goes on."""
    base = [*summarize, "--dropout", 0.1, "--batch_size", 3, "--reward_every", 4, "--eval_every", 10,
            "--out_dir"]

    def work():
        with joined():
            go(*base, "whole", "--policy_steps", 20)
            go(*base, "half", "--policy_steps", 10)
            go("--init_from", "resume", "--out_dir", "half", "--policy_steps", 20)
    for i, (status, err, _) in enumerate(together(work)):
        assert status == 0 and err == "", err
        assert ("warm start" in Path(f"out-{i}").read_text()) == (i == 0)
    assert_same_run("whole", "half")
    config = json.loads(Path("half/config.json").read_text())
    assert config["processes"] == 2 and set(os.listdir("half")) == {*LEFT, "scores.json"}
    capsys.readouterr()
    go("--init_from", "resume", "--out_dir", "half", "--policy_steps", 22, "--micro_batch", 2)
    assert "half: processes: 2 until step 20, 1 from here on; the same run but for rounding" in \
        capsys.readouterr().out
    assert json.loads(Path("half/config.json").read_text())["processes"] == 1
    assert len(metrics("half")) == len(metrics("whole")) + 4  # a fit, two updates, a look


@forks
def test_a_process_that_dies_ends_all_in_one_line(prompt, monkeypatch):
    step = train.OBJECTIVES["reinforce"].step
    die = lambda run: os.kill(os.getpid(), signal.SIGKILL) if run.step == 3 and place() == 1 else step(run)
    takes_step(monkeypatch, die)
    (status, err, _), (killed, silent, _) = together(command(*prompt, "--out_dir", "a"))
    assert (status, killed, silent) == (1, -signal.SIGKILL, "")
    assert err.startswith("train.py: step 4: another process of this run has ended") and err.count("\n") == 1
    assert load("a")["step"] == 2


@forks
def test_ctrl_c_in_one_process_stops_all_at_the_same_step_and_saves(prompt, monkeypatch):
    step = train.OBJECTIVES["reinforce"].step

    def interrupted(run):
        if run.step == 2 and place() == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # torchrun passes it on once more
        return step(run)
    takes_step(monkeypatch, interrupted)
    ends = together(command(*prompt, "--out_dir", "a"))
    assert [status for status, _, _ in ends] == [130, 130]
    said = "".join(err for _, err, _ in ends)
    assert said.startswith("train.py: stopped; go on with:\ntorchrun --standalone --nproc_per_node=2 ")
    assert said.count("\n") == 2 and load("a")["step"] == 3


@forks
@pytest.mark.parametrize("typed, status, says", [
    ("--batch_sise 3", 2, "unknown flag --batch_sise"), ("--data nowhere", 2, "nowhere"),
    ("--lr 1e30 --clip 1e30", 1, "lower the learning rate")])
def test_what_all_processes_meet_is_one_line(typed, status, says, prompt):
    ends = together(command(*prompt, *typed.split(), "--out_dir", "a"))
    said = "".join(err for _, err, _ in ends)
    assert [x for x, _, _ in ends] == [status, status]
    assert says in said and said.count("\n") == 1, said


@pytest.mark.skipif("TORCHRUN" not in os.environ,
                    reason="starts torchrun, which aborted once on a busy machine: TORCHRUN=1 runs it")
def test_torchrun_trains_a_prompt(prompt):
    """As it is typed, with what it prints: one run, by two processes."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", str(ROOT / "train.py"), *prompt, "--policy_steps", "2",
                           "--out_dir", "a"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nbest_prompt_accuracy") == 1
    assert json.loads(Path("a/config.json").read_text())["processes"] == 2
    check_run("a", "prompt")
