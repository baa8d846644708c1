"""Where a run computes, and with how many threads: decided once, with the reason for each."""
import os

import torch

from support.log import UserError, fail


def decide_device(c):
    """Device and dtype with the reason for each, decided once. UserError for a GPU that is not there."""
    gpu = torch.cuda.is_available()
    if c.device == "cuda" and not gpu:
        raise UserError("--device cuda: this machine has no GPU that torch can use (did you mean cpu?)")
    device = torch.device("cuda" if gpu and c.device != "cpu" else "cpu")
    if device.type == "cuda" and LOCAL > torch.cuda.device_count():
        raise UserError(f"{LOCAL} processes: expected at most {torch.cuda.device_count()}, as many as this "
                        f"machine has GPUs (or --device cpu)")
    reason = "asked for" if c.device != "auto" else ("a GPU is there" if gpu else "no GPU is there")
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    dtype = {"auto": torch.bfloat16 if half else torch.float32, "float32": torch.float32,
             "bfloat16": torch.bfloat16}[c.dtype]
    said = f"{device.type} ({reason}), {str(dtype)[6:]} ({'asked for' if c.dtype != 'auto' else 'best here'})"
    return device, dtype, said


# A training step with more multiplications and additions than this gets torch's own number of threads.
# `python bench.py --case threads` on two idle cores: a step of 0.3 to 3 Gflop, the defaults among them, is
# 1.1 to 1.5 times as fast with two threads, one of 11 to 180 Gflop 1.8 to 2.1 times. But threads wait for one
# another at the end of every matrix product, actively, so small products lose all of it on a machine that
# does something else beside them: with busy neighbours two threads made steps 1.6 to 34 times slower than
# one. So the small nets keep to one, and their share of a busy machine. (Work is counted at the widths that
# are allowed, up to ten times those in use: the largest default, edits, counts 24 Gflop.)
TWO_THREADS_PAY = 3e10
MANY = torch.get_num_threads()  # torch's choice, read before any run sets another number
LOCAL = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this run on this machine, which share it


def decide_threads(asked, work):
    """(threads, reason) of a run: those asked for, or (0) by the work of a step in floating-point operations
    and never by a clock, so that the same command adds in the same order every time. UserError's one line for
    more threads than the machine has processors."""
    if asked * LOCAL > max(os.cpu_count() or 1, LOCAL):
        several = f" for {LOCAL} processes" if LOCAL > 1 else ""
        raise UserError(f"--threads {asked}: this machine has {os.cpu_count()} processors{several}")
    if asked:
        return asked, "asked for"
    if work < TWO_THREADS_PAY:
        return 1, f"{work / 1e9:.2g} Gflop a step: too little to share"
    if LOCAL > 1:
        share = max(1, (os.cpu_count() or 1) // LOCAL)
        return share, f"{work / 1e9:.2g} Gflop a step: a share of the processors"
    return MANY, f"{work / 1e9:.2g} Gflop a step: torch's choice"


def check_memory(nets):
    """One line for nets that the machine cannot hold: weight, gradient and Adam's two averages are 16 bytes a
    parameter. Without activations and with the 257 smallest tokens: what is refused here could never have
    worked.  nets: [(the flags that decide them, how many, layers, width)]"""
    try:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows: torch finds out
        return
    for what, count, layers, width in nets:
        size = 16 * count * (12 * layers * width ** 2 + 257 * width)
        if size > have:
            fail(f"{what}: nets of this size take at least {size / 2**30:,.0f} GB, and this machine has "
                 f"{have / 2**30:,.0f}")
