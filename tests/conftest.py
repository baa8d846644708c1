"""Tests import the scripts from the repository's root, and take one core unless
OMP_NUM_THREADS says otherwise."""
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # .ci/matrix also runs the suite with two
if not torch.cuda.is_available():
    # before triton is first imported: kernels then run without a GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
