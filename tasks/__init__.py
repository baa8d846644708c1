"""The tasks: text, preferences and scores. train.py asks a task for all three and knows none of them by name."""
from dataclasses import dataclass

import torch

from data import Batch


@dataclass
class Samples:
    """What train.py writes to samples.jsonl at an evaluation: K sequences for each of B inputs.

    batch        data.Batch of the B inputs
    tokens, mask (B, K, T) int64 and bool; preference (B, K) float, in the task's own units
    roles        B lists of K words: "sampled", "reference", "best", "right", "wrong fact", ...
    errors       (B, K, T) bool, True at tokens that are known to be wrong; None where nobody knows
    """
    batch: Batch
    tokens: torch.Tensor
    mask: torch.Tensor
    preference: torch.Tensor
    roles: list
    errors: torch.Tensor = None
