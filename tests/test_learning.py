"""Small learning runs as gates: worlds so small that a right loop wins on every seed, and a broken one cannot."""
import json
import random
import signal

import pytest
import torch

import task_edits
import task_summarize
import train
from data import Batch
from model import generate

NET = "--threads 1 --n_layer 1 --n_embd 32 --n_head 2 --log_every 10 --device cpu --dtype float32".split()


def learn(folder, *flags, seed=1):
    """A whole run through the real loop: summary.json and the lines of metrics.jsonl."""
    out = folder / f"run{len(list(folder.glob('run*')))}"
    assert train.main([*NET, "--seed", str(seed), "--cache_dir", str(folder / "cache"), "--out_dir", str(out),
                       *" ".join(flags).split()]) == 0
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text()), lines


# ------------------------------------------------------------------------------------------------------- three letters

class Letters:
    """The least that a run asks of a tokenizer: twelve letters and end-of-text."""
    size, eot = 13, 12

    def pieces(self, ids, eot="<eot>"):
        return ["abcdefghijkl"[i] for i in ids]

    def decode(self, ids):
        return "".join(self.pieces(ids))

    def state(self):
        return {}


def worth(tokens):
    """How many of the letters are good ones, a to d: tokens (..., 3) -> (...) float from 0 to 3."""
    return (tokens < 4).sum(-1).float()


class ThreeLetters:
    """Task 1 without a judge: the preference is `worth`. A uniform policy has 1 of 3."""
    kind, pooled, has_references, has_pairs, eot = "prompt", True, False, False, None

    def __init__(self, cfg, device, progress, say):
        self.tokenizer, self.start, self.n_ids, self.width, self.context = Letters(), 12, 12, 3, 8

    def batch(self, n, generator):
        return Batch(torch.zeros(1, dtype=torch.long))

    def prefer(self, batch, tokens, mask):
        return worth(tokens)

    def drawn(self, policy, generator, n):
        return generate(policy, self.start, self.width, generator, rows=n, n_ids=self.n_ids)[0]

    def begin(self, policy):
        pass

    def evaluate(self, policy, generator):
        return {"worth": worth(self.drawn(policy, generator, 256)).mean().item()}

    finish = evaluate

    def samples(self, policy, generator):
        tokens = self.drawn(policy, generator, 2)[None]
        return self.batch(1, None), tokens, torch.ones_like(tokens, dtype=torch.bool), worth(tokens)

    def describe(self, batch, row):
        return "", ""

    def fingerprint(self):
        return []

    def state(self):
        return {}

    def load_state(self, state):
        pass


LETTERS = ("--task prompt --K 4 --candidates 32 --resolution 0 --reward_warmup 0 --reward_first 60 --reward_steps 10 "
           "--reward_every 15 --reward_lr 0.005 --policy_steps 45 --hold 0 --batch_size 32 --lr 0.01 --alpha 0.1 "
           "--explore 0 --eval_every 1000")


@pytest.fixture(autouse=True)
def worlds(monkeypatch):
    monkeypatch.setitem(train.TASKS, "prompt", ThreeLetters)


def letters(folder, *flags, seed=1):
    return learn(folder, LETTERS, *flags, seed=seed)[0]["worth"]
