"""Tests import the scripts from the repository's root, and take one core unless
OMP_NUM_THREADS says otherwise."""
import functools
import os
import signal
import sys

import pytest
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # .ci/matrix also runs the suite with two
if not torch.cuda.is_available():
    # before triton is first imported: kernels then run without a GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

import tasks.prompt
import tasks.summarize


def rows_once(build):
    """A world of rows, written once a process; whoever gets it may change his own copy."""
    kept = functools.lru_cache(build)
    return lambda *sizes: {split: [dict(row) for row in rows] for split, rows in kept(*sizes).items()}


# Most runs of the tests use the embedded worlds.
tasks.prompt.embedded_world = functools.lru_cache(tasks.prompt.embedded_world)  # which nobody changes
tasks.summarize.embedded_world = rows_once(tasks.summarize.embedded_world)


@pytest.fixture(autouse=True)
def as_it_was():
    """Ctrl-C and the number of threads, which a run sets, are left as they were."""
    handler, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    yield
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(threads)
