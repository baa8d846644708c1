"""Processes forked off the tests: that costs nothing beside starting Python and importing torch anew."""
import multiprocessing
import os
import sys

import pytest
import torch

fork = multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else None
forks = pytest.mark.skipif(fork is None, reason="needs a system that can fork")


def alone(out, err):
    """What a fork does first: it speaks into two files, and computes with one thread, since those of OpenMP
    do not live on in a fork."""
    for fd, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    torch.set_num_threads(1)
