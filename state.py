"""What a run is made of, and how all of it is kept: nets, optimizers, buffers, random numbers, the step it has reached.

Everything that the loop changes is an attribute of `Run`, and `state` packs every one of them, so that a resumed run goes
on to the bit. Networks are built in two steps, because the reward starts from a body that a warm start may replace:
`Run(...)` makes policy and body, `build` the reward on top of it and the optimizers.
"""
import copy
import dataclasses
import json
import os
import sys

import torch

from model import Config, Transformer, descend
from reward import Buffer, Candidates, TokenReward, rank
from support.files import write_torch, write_whole
from support.flags import fill_defaults
from support.folder import FILES, LOCK, cut_back, leftover
from support.log import fail


class Run:
    """Everything that a checkpoint holds, and what is needed to rebuild the rest."""

    def __init__(self, c, task, device, dtype, log):
        self.c, self.task, self.device, self.dtype, self.log = c, task, device, dtype, log
        torch.manual_seed(c.seed)
        self.generators = {name: torch.Generator(device).manual_seed(c.seed * 1000 + i) for i, name in
                           enumerate(("sample", "candidates"))}
        self.generators |= {name: torch.Generator().manual_seed(c.seed * 1000 + 100 + i) for i, name in
                            enumerate(("data", "fit"))}
        size = Config(task.tokenizer.size, task.context, c.n_layer, c.n_head, c.n_embd, c.dropout)
        self.policy, self.body = Transformer(size).to(device), Transformer(size).to(device)
        self.value = torch.nn.utils.skip_init(torch.nn.Linear, c.n_embd, 1).to(device)  # draws no random numbers
        torch.nn.init.zeros_(self.value.weight), torch.nn.init.zeros_(self.value.bias)
        self.learner = torch.nn.ModuleList([self.policy, self.value]) if c.objective == "ppo" else self.policy
        self.step, self.latest, self.hashes = 0, None, None
        self.first, self.line = None, None  # the starting policy, and E13's normaliser: both only where they are used
        self.train = Buffer(c.replay or c.candidates, task.pooled)
        self.held = Buffer(max(c.replay // 8, 16), task.pooled)
        self.random = torch.get_rng_state(), torch.cuda.get_rng_state_all()

    def build(self):
        """Reward net and optimizers, after the warm starts: the reward starts from its body, head almost constant."""
        c = self.c
        set_random_state(*self.random)  # a warm start out of the cache drew nothing, and its run is to be the same
        self.reward = TokenReward(self.body, self.task.start, c.bound).to(self.device)
        if c.objective == "ppo":
            self.first = copy.deepcopy(self.policy).requires_grad_(False).eval()
        groups = [{"params": self.policy.parameters()}]
        if c.objective == "ppo":
            groups.append({"params": self.value.parameters(), "times": 10.0})  # a line on top of states that hardly move
        self.policy_opt = torch.optim.Adam(groups, lr=c.lr, fused=True)  # one call instead of ten a tensor
        self.reward_opt = torch.optim.Adam(self.reward.parameters(), lr=c.reward_lr, fused=True)
        self.rank = torch.compile(rank, dynamic=True) if c.compile else rank
        if c.compile:
            self.policy.compile(dynamic=True), self.body.compile(dynamic=True)

    def data(self):
        """{part: hash} of the task's data, hashed once: a checkpoint remembers it, and a resumed run
        compares."""
        if self.hashes is None:
            self.hashes = self.task.fingerprint()
        return self.hashes

    def state(self):
        """A dictionary that torch.load(weights_only=True) reads."""
        pack = lambda x: None if x is None else {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return {"step": self.step, "latest": pack(self.latest),
                "buffers": [pack(self.train.data), pack(self.held.data)], "task": self.task.state(),
                "nets": [x.state_dict() for x in (self.learner, self.reward, self.policy_opt, self.reward_opt)],
                "first": None if self.first is None else self.first.state_dict(), "line": self.line,
                "random": {k: g.get_state() for k, g in self.generators.items()} | {
                    "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
                "seconds": self.log.seconds(), "config": dataclasses.asdict(self.c), "data": self.data()}

    def load(self, s):
        """The inverse of `state`."""
        unpack = lambda x: None if x is None else Candidates(**x)
        self.step, self.latest = s["step"], unpack(s["latest"])
        self.train.data, self.held.data = [unpack(x) for x in s["buffers"]]
        self.task.load_state(s["task"])
        for x, y in zip((self.learner, self.reward, self.policy_opt, self.reward_opt), s["nets"]):
            x.load_state_dict(y)
        self.line = s["line"]
        if self.first is not None:
            self.first.load_state_dict(s["first"])
        for k, g in self.generators.items():
            g.set_state(s["random"][k].cpu())  # random states live in host memory, also those of a GPU
        set_random_state(s["random"]["torch"], s["random"]["cuda"])

    def save(self):
        """ckpt.pt, whole or not at all."""
        write_torch(os.path.join(self.c.out_dir, "ckpt.pt"), self.state())

    def open(self, saved, decided):
        """The first writes of a run: its folder emptied of an older run, or brought back to its checkpoint.
        decided  {"threads_used", "device_reason", ...}: what config.json says beside the flags"""
        c, path = self.c, lambda name: os.path.join(self.c.out_dir, name)
        if saved:
            self.go_on(saved)
            for name in ("metrics.jsonl", "samples.jsonl"):
                cut_back(path(name), self.step)
        old = ("summary.json",) if saved else set(FILES) - {"config.json"}  # without that the folder would be no run
        for name in os.listdir(c.out_dir):
            if name in old or leftover(name) and name != LOCK:
                os.remove(path(name))
        config = dataclasses.asdict(c) | {"versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
                                          "init_from": "scratch"} | decided
        usual = dataclasses.asdict(fill_defaults(type(c)(task=c.task)))
        config["changed"] = [name for name, value in usual.items() if getattr(c, name) != value]  # for the eye
        write_whole(path("config.json"), (json.dumps(config, indent=1) + "\n").encode())
        write_whole(path("tokenizer.json"), json.dumps(self.task.tokenizer.state()).encode())
        self.log.open(c.out_dir, saved["seconds"] if saved else 0.0)

    def go_on(self, saved):
        """Take over a checkpoint, or say in one line why not, before anything is written."""
        c = self.c
        try:
            step, data, now = saved["step"], saved["data"], self.data()
            changed = [name for name in now if data.get(name) != now[name]]
            if not changed:
                self.load(saved)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
            fail(f"{c.out_dir}/ckpt.pt: a checkpoint of other settings than those in config.json beside it, or of "
                 f"another kind of device than this {self.device.type}; start a new run")
        if changed:
            fail(f"{c.data or getattr(c, 'world', None) or 'embedded data'}: {', '.join(changed)}: not what the run in "
                 f"{c.out_dir} began with; restore it, or start a new run")
        if c.policy_steps < step:
            fail(f"--policy_steps {c.policy_steps}: the run in {c.out_dir} has done {step} steps already")

    def autocast(self):
        """Half precision for matrix products where --dtype says so; statistics stay float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def update(self, model, optimizer, loss, lr, phase="policy"):
        """One step at this learning rate, times a group's own factor: the gradient norm before clipping."""
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("times", 1.0)
        return descend(model, optimizer, loss, self.c.clip, phase)


def set_random_state(here, on_gpu):
    """torch's own generators, of the CPU and of every GPU (an empty list without one), as they were. Their states
    live in host memory, wherever a checkpoint was read to."""
    torch.set_rng_state(here.cpu())
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([x.cpu() for x in on_gpu])
