"""Several processes are one, and so is a batch in parts: support/distributed.py, --micro_batch.

Processes are real ones, forked (that costs nothing beside starting Python anew), which talk by gloo over the
loopback. One update of every objective and fit is compared with that of one process on the same batch, in
float64 (the reward's numbers are float32), by plain gradient steps, so that it is the gradients that are
compared.
"""
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stubs import World, flags, without_adam
from test_train import (ROOT, edits, go, here, load, metrics, prompt, refuses, shared, summarize,  # noqa
                        takes_step)

import model
import state
import train
from support import device, distributed
from support.distributed import from_first, joined, largest, own, parts, place, world
from support.log import Log, LostProcess
from warm_start import supervised

fork = multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else None
forks = pytest.mark.skipif(fork is None, reason="needs a system that can fork")


# ---------------------------------------------------------------------------------------------------- helpers


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def process(i, n, port, work):
    """What process i of n does: its answer, stdout and stderr go to files."""
    os.environ.update(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}-{i}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    torch.set_num_threads(1)
    torch.save(work(), f"answer-{i}")


def together(work, n=2):
    """[(exit status, stderr, what work() returned or None) of each of n processes]."""
    port = free_port()
    for old in (f"answer-{i}" for i in range(n) if Path(f"answer-{i}").exists()):
        os.remove(old)
    everyone = [fork.Process(target=process, args=(i, n, port, work)) for i in range(n)]
    for p in everyone:
        p.start()
    for p in everyone:
        p.join(60)
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
    "bandit": ("--task summarize --objective reinforce --guidance bandit --baseline rloo", {}),
    "prompts": ("--task prompt --batch_size 7 --ties 1 --candidates 9", POOLED),
    "prompts, bandit": ("--task prompt --guidance bandit --candidates 9", POOLED),
    "wmle": ("--task summarize --batch_size 5 --agg min", {}),
    "E9": ("--task summarize --batch_size 5 --wmle_norm rewards --replay 0 --agg max", {}),
    "mle": ("--task summarize --objective mle --batch_size 5", {}),
    "one row": ("--task summarize --batch_size 1 --candidates 2 --reward_batch 1", {}),
    "ppo": ("--task summarize --objective ppo --batch_size 7 --minibatches 2 --alpha 0.1", {}),
    "ppo, one row": ("--task summarize --objective ppo --batch_size 2 --minibatches 2", {}),
    "edits": ("--task edits --guidance edits --batch_size 5 --minibatches 1", PAIRS),
    "segment": ("--task edits --guidance segment --segment_entropy 1.09 --batch_size 5 --minibatches 1", PAIRS),
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
        r = state.Run(c, World(**{"width": 6} | kind), train.objective_of(c), torch.device("cpu"), torch.float32, Log())
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
    """A round of a case, with two updates of the policy -> (weights before, weights after, figures, all that must not differ at all)."""
    r = made(typed, micro, f"{folder}/{typed} {micro} {world()}")
    weights = lambda: torch.cat([x.detach().flatten().clone() for net in r.nets().values()
                                 for x in net.state_dict().values()])
    before, figures = weights(), [train.reward_phase(r)]
    for _ in range(2):
        figures.append(r.objective.step(r))
        r.step += 1
    drawn = [g.get_state() for g in r.generators.values()]
    drawn += [x for x in (r.candidates and r.candidates.tokens, r.task.queries) if x is not None]
    return before, weights(), [{k: v for k, v in x.items() if v is not None} for x in figures], drawn


def sft(micro, folder):
    """A supervised start of five references an update, in the form of `lesson`."""
    r = made("mle", micro, folder)
    data, before = torch.Generator().manual_seed(1), torch.cat([x.detach().flatten() for x in r.policy.parameters()])
    supervised(r, r.policy, 3, 0.05, 5, "sft", lambda n: r.task.batch(n, data))
    after = torch.cat([x.detach().flatten() for x in r.policy.parameters()])
    return before, after, [], [data.get_state()]


def every_lesson(micro, folder):
    found = {name: lesson(name, micro, folder) for name in CASES}
    return found | {"sft": sft(micro, folder)}


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    """{how: {case: lesson}} of one process, of one in parts of two sequences, and of each of two processes,
    with and without parts."""
    folder = tmp_path_factory.mktemp("lessons")
    before = os.getcwd()
    os.chdir(folder)

    def both():
        with joined():
            return every_lesson(0, folder), every_lesson(2, folder)
    try:
        found = {"one": every_lesson(0, folder), "parts": every_lesson(2, folder)}
        for i, (status, err, answer) in enumerate(together(both) if fork else ()):
            assert status == 0, err
            found |= {f"process {i}": answer[0], f"process {i}, parts": answer[1]}
    finally:
        os.chdir(before)
    return found


HOW = ["parts", *(f"process {i}{more}" for i in range(2) for more in ("", ", parts"))]


@pytest.mark.parametrize("case", [*CASES, "sft"])
@pytest.mark.parametrize("how", [pytest.param(x, marks=forks) if "process" in x else x for x in HOW])
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
