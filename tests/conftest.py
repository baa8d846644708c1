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

# Most runs of the tests use the embedded world, which nobody changes: it is written once a process.
tasks.prompt.embedded_world = functools.lru_cache(tasks.prompt.embedded_world)


@pytest.fixture(autouse=True)
def as_it_was():
    """Ctrl-C and the number of threads, which a run sets, are left as they were."""
    handler, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    yield
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(threads)
