"""The alternate loop: learn token rewards from preferences, improve the policy with them, repeat (Yang et al., 2023).

    python train.py                                       a discrete prompt for a frozen judge, from preferences alone
    python train.py --task summarize                      summaries, from noisy references and preferences
    python train.py --task edits                          answers, from an annotator's minimal edits, by dense PPO
    python train.py --data DIR --world DIR                the same on real text; -h lists every flag

Read `main` first: it is the loop. `reward_phase` is the first half of a round (sample K candidates, ask for the
preference, fit the token reward), `policy_step` the second (REINFORCE or weighted MLE with that reward, frozen). A new
objective is one policy_*.py and one line in OBJECTIVES, a new task one task_*.py and one line in TASKS; the loop does
not know their names. Flags, folders, log and checkpoint files are in run.py.

What differs from the released code, and why, is written where it happens: a buffer of scored candidates (reward.py),
rewards centred over the batch (policy_reinforce.py), weights that hold the level of a reference (policy_wmle.py), and
the gate here.
"""
import copy
import dataclasses
import inspect
import json
import os
import shlex
import signal
import sys

import torch

from aggregate import aggregate
from data import UserError, code_hash, lengths_to_mask, trim
from fused import policy_loss
from model import Config, Transformer, generate, load_state, read_candidates, save_state
from plackett_luce import plackett_luce_loss
from policy_ppo import check_start, check_step, experience, fit_normalizer, normalize, ppo_loss, spread, value_loss
from policy_reinforce import WEIGHTS, reinforce_loss, shape_rewards, standardize
from policy_wmle import NORMS, weighted_mle_loss
from reward import (BOUNDS, Buffer, Candidates, TokenReward, fit, label_loss, ordered_pairs, rank,
                    rank_accuracy, ranking_loss, segment_ends)
from run import (Log, cached, choose_out_dir, cut_back, decide_device, fail, flag, parse_flags, read_torch,
                 resume_flags, write_torch, write_whole)
from task_edits import EditsTask
from task_prompt import PromptTask
from task_summarize import SummarizeTask

TASKS = {"prompt": PromptTask, "summarize": SummarizeTask, "edits": EditsTask}
# How each objective gets its tokens: "samples" of the policy, scored by the reward; or the task's "references".
OBJECTIVES = {"reinforce": "samples", "wmle": "references", "mle": "references", "ppo": "samples"}

# ---------------------------------------------------------------------------------------------------------------- flags


@dataclasses.dataclass
class Flags:
    """Every knob, its unit and its range. The order is that of -h; a comment line opens a group."""
    # run
    task: str = flag("prompt", "what to learn", choices=tuple(TASKS))
    objective: str = flag({"prompt": "reinforce", "summarize": "wmle", "edits": "ppo"}, "how the policy uses the reward",
                          choices=tuple(OBJECTIVES))
    guidance: str = flag({"prompt": "token", "summarize": "token", "edits": "edits"},
                         "where the policy's reward comes from: token rewards learned from preferences; bandit: the "
                         "z-scored preference itself (task edits: one learned score an answer); task edits only: rewards "
                         "of segments, or from the labels of edits", choices=("token", "segment", "bandit", "edits"))
    segment_entropy: float = flag(0.3, "segment: nats of next-token entropy at which one ends (E11)", low=0.0)
    seed: int = flag(1, "fixes data order, sampling and initial weights", low=0, high=2**32 - 1)
    out_dir: str = flag(None, "folder of the run (default out/TASK, or the next free out/TASK-N)", kind=str)
    overwrite: bool = flag(False, "replace the run that out_dir holds")
    init_from: str = flag("scratch", "scratch, or resume: go on exactly where the run in out_dir stands",
                          choices=("scratch", "resume"))
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "autocast type: bfloat16 on a GPU that has it, else float32",
                      choices=("auto", "float32", "bfloat16"))
    compile: bool = flag(False, "torch.compile the policy's and the reward's forward pass")
    threads: int = flag(0, "CPU threads (0: torch's choice)", low=0)
    cache_dir: str = flag("out/cache", "judges and warm starts, each under the hash of what decides it")
    # data
    data: str = flag(
        None, "folder with the task's train, dev/validation and test files, or hub:<id>[:config]", kind=str)
    world: str = flag(None, "prompt: folder of a world on disk (default: the embedded one)", kind=str)
    attribute: str = flag("sentiment", "prompt: what the few-shot task asks for")
    tokenizer: str = flag(
        None, "byte | bpe | gpt2 | folder with GPT-2's two files (default: the world's words, or bpe)", kind=str)
    vocab_size: int = flag({"prompt": 8192, "summarize": 8192, "edits": 8192}, "ids of a learned bpe", low=257)
    document_column: str = flag(None, "summarize: column of a hub or jsonl data set", kind=str)
    summary_column: str = flag(None, "summarize: its reference column", kind=str)
    limit: int = flag(0, "summarize, edits: rows a split at most (0: all)", low=0)
    shots: int = flag(16, "prompt: few-shot examples a class, drawn from the world where --data is not given", low=1)
    curve_size: int = flag({"prompt": 100, "summarize": 100, "edits": 100},
                           "test examples behind the points of the learning curve", low=1)
    prompt_length: int = flag(5, "prompt: tokens", low=1, high=64)
    max_document: int = flag(256, "summarize: tokens of a document; longer ones are cut", low=1)
    max_summary: int = flag({"prompt": 1, "summarize": 24, "edits": 24},
                            "summarize: tokens of a summary, end-of-text included", low=2)
    # model
    n_layer: int = flag({"prompt": 2, "summarize": 2, "edits": 2}, "transformer blocks of policy and reward", low=1)
    n_embd: int = flag({"prompt": 64, "summarize": 96, "edits": 96}, "width", low=8)
    n_head: int = flag(4, "attention heads", low=1)
    dropout: float = flag(0.0, "share of activations dropped in training", low=0.0, high=0.9)
    # reward
    agg: str = flag({"prompt": "sum", "summarize": "avg", "edits": "avg"}, "f: token rewards -> sequence score (E3, E4)",
                    choices=("avg", "sum", "min", "max"))
    beta: float = flag(2.0, "temperature of the soft min and max, in units of reward", low=1e-6)
    bound: str = flag("softplus", "range of r: softplus (0, 1.313), sigmoid (0, 1) (E2)", choices=BOUNDS)
    K: int = flag({"prompt": 5, "summarize": 3, "edits": 2}, "candidates that are ranked together", low=2)
    candidates: int = flag({"prompt": 16, "summarize": 32, "edits": 32},
                           "a round: prompts to score, or documents with K summaries each", low=2)
    explore: float = flag({"prompt": 0.5, "summarize": 0.0, "edits": 0.0},
                          "share of candidates in which every other token becomes a random one", low=0.0, high=1.0)
    top_k: int = flag(0, "sample among the k most likely tokens only (0: all)", low=0)
    replay: int = flag({"prompt": 4096, "summarize": 4096, "edits": 8192},
                       "scored candidates kept (0: fresh ones at every step, as in the paper)", low=0)
    resolution: float = flag({"prompt": 25.0, "summarize": 0.01, "edits": 0.01},
                             "preferences closer than this are ties", low=0.0)
    reward_first: int = flag({"prompt": 40, "summarize": 400, "edits": 1000}, "Adam steps of the first fit", low=0)
    reward_steps: int = flag({"prompt": 40, "summarize": 50, "edits": 0}, "Adam steps of every later fit", low=0)
    reward_every: int = flag({"prompt": 10, "summarize": 100, "edits": 100}, "policy steps between fits", low=1)
    reward_lr: float = flag({"prompt": 1e-3, "summarize": 5e-4, "edits": 1e-3}, "Adam learning rate", low=0.0, high=1e30)
    reward_batch: int = flag({"prompt": 64, "summarize": 32, "edits": 32}, "groups of K a step", low=1)
    reward_warmup: int = flag({"prompt": 400, "summarize": 0, "edits": 0},
                              "prompt: language-model steps of the reward's body on the world's text", low=0)
    patience: int = flag({"prompt": 7, "summarize": 7, "edits": 100},
                         "looks at held-out candidates without improvement before a fit stops", low=1)
    gate: bool = flag({"prompt": True, "summarize": False, "edits": False},
                      "move the policy in proportion to the reward's rank accuracy above chance")
    # policy
    policy_steps: int = flag({"prompt": 500, "summarize": 300, "edits": 100}, "updates of the policy", low=1)
    batch_size: int = flag({"prompt": 64, "summarize": 32, "edits": 64}, "sequences an update", low=1)
    lr: float = flag({"prompt": 8e-3, "summarize": 5e-4, "edits": 1e-4}, "Adam learning rate", low=0.0, high=1e30)
    alpha: float = flag({"prompt": 0.3, "summarize": 0.01, "edits": 0.0},
                        "reinforce, ppo: weight of the entropy (E7; the paper has 0.125)", low=0.0)
    hold: int = flag({"prompt": 250, "summarize": 0, "edits": 50},
                     "updates at full lr and alpha, which then fall to zero over as many again: look around, then decide "
                     "(0: constant, as in the paper)", low=0)
    weights: str = flag({"prompt": "immediate", "summarize": "mean_to_go", "edits": "immediate"},
                        "what a token answers for", choices=WEIGHTS)
    wmle_norm: str = flag("length", "wmle: divisor of the weights; rewards is E9", choices=NORMS)
    minibatches: int = flag(4, "ppo: updates an epoch; --batch_size is then a rollout", low=1)
    epochs: int = flag(1, "ppo: passes over a rollout", low=1)
    ppo_clip: float = flag(0.2, "ppo: the ratio stays within 1 +- this (E16)", low=0.0)
    value_clip: float = flag(0.25, "ppo: a value moves at most this far from the old one (E16)", low=0.0)
    kl: float = flag({"prompt": 0.01, "summarize": 0.3, "edits": 0.3},
                     "ppo: price of a nat away from the starting policy, in reward (E14)", low=0.0)
    gamma: float = flag(1.0, "ppo: discount (E15)", low=0.0, high=1.0)
    lam: float = flag(0.95, "ppo: lambda of the advantages (E15)", low=0.0, high=1.0)
    center: bool = flag(True, "reinforce: centre and scale the rewards over the batch (the paper does not)")
    clip: float = flag(5.0, "gradient norm at most", low=0.0)
    sft_steps: int = flag({"prompt": 0, "summarize": 1200, "edits": 600}, "supervised warm start: updates", low=0)
    sft_lr: float = flag({"prompt": 0.0, "summarize": 3e-3, "edits": 3e-3}, "its learning rate", low=0.0, high=1e30)
    sft_batch: int = flag({"prompt": 1, "summarize": 16, "edits": 32}, "its pairs an update", low=1)
    # judge
    judge_steps: int = flag(1400, "prompt: updates of the judge's pre-training", low=1)
    judge_lr: float = flag(5e-3, "its learning rate", low=0.0, high=1e30)
    judge_layers: int = flag(2, "its blocks", low=1)
    judge_width: int = flag(64, "its width", low=8)
    judge_context: int = flag(64, "tokens of a text it reads", low=1)
    # log
    eval_every: int = flag({"prompt": 50, "summarize": 100, "edits": 50}, "policy steps between evaluations", low=1)
    log_every: int = flag(20, "policy steps between log lines", low=1)


def check_together(c):
    """Flags that exclude one another."""
    if c.judge_width % 8:
        fail(f"--judge_width: expected a multiple of 8, got {c.judge_width}")
    if c.n_embd % (2 * c.n_head):
        fail(f"--n_embd: expected a multiple of 2 x n_head = {2 * c.n_head}, got {c.n_embd}")
    if OBJECTIVES[c.objective] == "references" and not TASKS[c.task].has_references:
        fail(f"--objective {c.objective} learns from references, and task {c.task} has none (did you mean reinforce?)")
    if OBJECTIVES[c.objective] == "references" and c.guidance == "bandit":
        fail("--guidance bandit scores samples of the policy: it needs --objective reinforce or ppo")
    if c.guidance in ("segment", "edits") and not TASKS[c.task].has_pairs:
        fail(f"--guidance {c.guidance}: expected token or bandit for task {c.task}, which has no annotated answers")
    if c.guidance == "segment" and c.objective != "ppo":
        fail("--guidance segment spreads rewards over segments: it needs --objective ppo")
    if c.minibatches > c.batch_size:
        fail(f"--minibatches {c.minibatches}: expected at most --batch_size {c.batch_size}")
    if TASKS[c.task].pooled and c.K > c.candidates:
        fail(f"--K {c.K}: expected at most --candidates {c.candidates}")


# ------------------------------------------------------------------------------------------------------------ the state


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
        self.step, self.gate, self.right, self.pairs, self.latest = 0, 1.0, 0.0, 0.0, None
        self.first, self.line = None, None  # the starting policy, and E13's normaliser: both only where they are used
        self.train = Buffer(c.replay or c.candidates, task.pooled)
        self.held = Buffer(max(c.replay // 8, 16), task.pooled)
        self.random = torch.get_rng_state()

    def build(self):
        """Reward net and optimizers, after the warm starts: the reward starts from its body, head almost constant."""
        c = self.c
        torch.set_rng_state(self.random)  # a warm start out of the cache drew nothing, and its run is to be the same
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

    def state(self):
        """A dictionary that torch.load(weights_only=True) reads."""
        pack = lambda x: None if x is None else {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return {"step": self.step, "gate": [self.gate, self.right, self.pairs], "latest": pack(self.latest),
                "buffers": [pack(self.train.data), pack(self.held.data)], "task": self.task.state(),
                "nets": [x.state_dict() for x in (self.learner, self.reward, self.policy_opt, self.reward_opt)],
                "first": None if self.first is None else self.first.state_dict(), "line": self.line,
                "random": {k: g.get_state() for k, g in self.generators.items()} | {
                    "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
                "seconds": self.log.seconds(), "config": dataclasses.asdict(self.c)}

    def load(self, s):
        """The inverse of `state`."""
        unpack = lambda x: None if x is None else Candidates(**x)
        self.step, (self.gate, self.right, self.pairs), self.latest = s["step"], s["gate"], unpack(s["latest"])
        self.train.data, self.held.data = [unpack(x) for x in s["buffers"]]
        self.task.load_state(s["task"])
        for x, y in zip((self.learner, self.reward, self.policy_opt, self.reward_opt), s["nets"]):
            x.load_state_dict(y)
        self.line = s["line"]
        if self.first is not None:
            self.first.load_state_dict(s["first"])
        for k, g in self.generators.items():
            g.set_state(s["random"][k].cpu())  # random states live in host memory, also those of a GPU
        torch.set_rng_state(s["random"]["torch"].cpu())
        torch.cuda.set_rng_state_all([x.cpu() for x in s["random"]["cuda"]])

    def save(self):
        """ckpt.pt, whole or not at all."""
        write_torch(os.path.join(self.c.out_dir, "ckpt.pt"), self.state())

    def autocast(self):
        """Half precision for matrix products where --dtype says so; statistics stay float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


# ------------------------------------------------------------------------------------------------------- the two halves


@torch.no_grad()
def sample(run, batch, k, generator):
    """k continuations of every input of the batch by the policy: tokens, mask (B, K, T)."""
    task, c = run.task, run.c
    with run.autocast():
        cache = run.policy.prefill(*batch.prefix()) if batch.context is not None else None
        tokens, length, _ = generate(run.policy.eval(), task.start, task.width, generator, k, cache, task.eot,
                                     c.top_k or None, n_ids=task.n_ids)
    tokens, length = tokens.view(len(batch.index), k, -1), length.view(len(batch.index), k)
    return tokens, lengths_to_mask(length, task.width)


def rollout(run):
    """--batch_size fresh samples to learn from: batch, tokens, mask (B, K, T), T the longest."""
    n, k = (1, run.c.batch_size) if run.task.pooled else (run.c.batch_size, 1)
    batch = run.task.batch(n, run.generators["data"])
    return batch, *trim(*sample(run, batch, k, run.generators["sample"]))


def z_scored(preference):
    """Preferences (B, K) with zero mean and unit deviation over all of them: what bandit guidance pays."""
    return (preference - preference.mean()) / preference.std().clamp(min=1e-6)


@torch.no_grad()
def collect(run):
    """Candidates of the current policy with their preferences: the only place that asks."""
    c, task, g = run.c, run.task, run.generators["candidates"]
    groups, k = (1, c.candidates) if task.pooled else (c.candidates, c.K)
    batch = task.batch(groups, run.generators["data"])
    tokens, mask = sample(run, batch, k, g)
    if c.explore > 0:  # a new word shows its worth beside words that already work: half of a candidate stays
        other = torch.randint(task.n_ids, tokens.shape, generator=g, device=tokens.device)
        chance = lambda shape: torch.rand(shape, generator=g, device=tokens.device)
        swap = (chance(tokens.shape[:2]) < c.explore)[..., None] & (chance(tokens.shape) < 0.5)  # (B, K, T)
        tokens = torch.where(swap & mask, other, tokens)
    return Candidates(tokens, mask, task.prefer(batch, tokens, mask), batch.context, batch.context_mask)


def reward_phase(run):
    """First half of a round: look at fresh candidates, set the gate, learn. Bandit guidance only looks.

    The gate: the share by which r ranks candidates it has not been fitted on better than chance, averaged over
    the last rounds. A policy that follows an untrained reward sharpens on noise, stops exploring, and the
    reward never sees better prompts. The paper's answer is a long first fit before any policy step; this one
    costs nothing and never ends.
    """
    c, task = run.c, run.task
    if task.has_pairs:
        return learn_from_edits(run) if run.step == 0 else {}
    run.latest = collect(run)
    figures = {"preference": run.latest.preference.mean(), "preference_best": run.latest.preference.max()}
    if c.guidance == "bandit" or c.objective == "mle":
        return figures
    right, pairs = rank_accuracy(run.reward, run.latest, c.agg, c.beta, c.resolution)
    run.right, run.pairs = 0.8 * run.right + right, 0.8 * run.pairs + pairs  # the last five rounds or so
    accuracy = run.right / run.pairs if run.pairs else 0.5
    run.gate = max(0.0, 2 * accuracy - 1) if c.gate else 1.0
    d, n = run.train.dim, run.latest.preference.shape[run.train.dim]
    cut = n - max(1, n // 8)  # one candidate in eight is never fitted: it says when a fit should stop
    run.train.add(run.latest.map(lambda x: x.narrow(d, 0, cut)))
    run.held.add(run.latest.map(lambda x: x.narrow(d, cut, n - cut)))

    def fresh():
        """New candidates for one step of the fit, where none are replayed."""
        new = Buffer(c.candidates, task.pooled)
        new.add(collect(run))
        return new
    figures |= fit_reward(run, c.reward_first if run.step == 0 else c.reward_steps, fresh if c.replay == 0 else None)
    renew_normalizer(run)
    return figures | {"rank_accuracy": accuracy, "gate": run.gate, "buffer": len(run.train)}


def fit_reward(run, steps, fresh=None, loss=None):
    """Some steps of the fit on what the buffers hold; `loss` of (reward, candidates, subsets), default the ranking."""
    c = run.c
    loss = loss or (lambda *x: ranking_loss(*x, c.agg, c.beta, run.rank))

    def half(*x):
        with run.autocast():  # a region a step: autocast keeps its copies of the weights for as long as a region lasts
            return loss(*x)
    return fit(run.reward, run.reward_opt, run.train, run.held, steps, K=c.K, groups=c.reward_batch,
               resolution=c.resolution, clip=c.clip, check_every=10, patience=c.patience,
               generator=run.generators["fit"], loss=half, fresh=fresh,
               progress=lambda i, loss: run.log.progress("reward", i, steps, {"loss": loss}))


def renew_normalizer(run):
    """PPO: the place-aware normaliser (E13) of the rewards as they are now, from the latest candidates."""
    if run.c.objective == "ppo":
        d, n = run.train.dim, len(run.train)
        some = run.train.data.map(lambda x: x.narrow(d, max(0, n - 512), min(n, 512)))  # enough for two straight lines
        with run.autocast():
            rewards = run.reward.guide(some.tokens, some.prefix())
        run.line = fit_normalizer(rewards.flatten(0, 1), some.read_at().flatten(0, 1)).float()


def annotated(run, split):
    """The task's annotated answers as Candidates, with the ends that this run's guidance reads rewards at."""
    tokens, mask, preference, context, context_mask, labels = run.task.pairs(split)
    x = Candidates(tokens, mask, preference, context, context_mask, labels)
    parts = [answer_ends(run, x.map(lambda t: t[i])) for i in torch.arange(len(tokens)).split(256)]
    return dataclasses.replace(x, ends=torch.cat(parts))


def learn_from_edits(run):
    """First half of the only round of a task whose answers were annotated beforehand. The fitted reward is kept like a
    warm start: runs that differ only in how the policy uses it share it."""
    c, x = run.c, annotated(run, "train")
    n = len(x.tokens)
    cut = n - max(1, n // 8)
    run.train.add(x.map(lambda t: t[:cut])), run.held.add(x.map(lambda t: t[cut:]))
    loss = (lambda reward, batch, _: label_loss(reward, batch)) if c.guidance == "edits" else None
    decides = ("guidance", "segment_entropy", "agg", "beta", "bound", "K", "resolution", "clip", "patience", "sft_steps",
               "sft_lr", "sft_batch", "reward_first", "reward_lr", "reward_batch", "dropout", "replay")
    key = warm_key(run) | {name: getattr(c, name) for name in decides}
    key["code"] = code_hash(learn_from_edits, *map(inspect.getmodule, (Transformer, TokenReward, aggregate,
                                                                       plackett_luce_loss, type(run.task))))

    def build():
        figures = fit_reward(run, c.reward_first, loss=loss)
        return {"figures": figures, "nets": [x.state_dict() for x in (run.reward, run.reward_opt)],
                "random": [run.generators["fit"].get_state(), torch.get_rng_state()]}
    saved, path = cached(c.cache_dir, "reward", key, build)
    for x, state in zip((run.reward, run.reward_opt), saved["nets"]):
        x.load_state_dict(state)
    run.generators["fit"].set_state(saved["random"][0]), torch.set_rng_state(saved["random"][1])
    renew_normalizer(run)
    run.log.say(f"reward: {path}")
    return saved["figures"] | {"buffer": len(run.train)}


@torch.no_grad()
def answer_ends(run, x):
    """(B, K, T) bool: where rewards of these sequences are read: at every token, at the last, or E11."""
    huge = {"token": 0.0, "edits": 0.0, "bandit": float("inf")}
    threshold = huge.get(run.c.guidance, run.c.segment_entropy)
    entropy = torch.zeros_like(x.mask, dtype=torch.float32)
    if run.c.guidance == "segment":
        _, after = read_candidates(run.first, x.tokens, run.task.start, x.prefix())  # states that have read token t
        everywhere = torch.ones(after.shape[:-1].numel(), device=after.device)
        entropy = policy_loss(after.flatten(0, 2), run.first.head, x.tokens.flatten(), everywhere,
                              everywhere)[2].view_as(x.mask)
    return segment_ends(entropy, x.mask, threshold)


def policy_batch(run):
    """Tokens to learn from with their weights before shaping: (batch, tokens, mask, rewards), each (B, K, T)."""
    c, task = run.c, run.task
    if OBJECTIVES[c.objective] == "references":
        batch = task.batch(c.batch_size, run.generators["data"])
        tokens, mask = trim(batch.reference[:, None], batch.reference_mask[:, None])  # (B, 1, T)
        if c.objective == "mle":
            return batch, tokens, mask, mask.float()
    elif c.guidance == "bandit":  # the preference itself, z-scored, at every token of the latest candidates
        tokens, mask = trim(run.latest.tokens, run.latest.mask)
        return run.latest, tokens, mask, z_scored(run.latest.preference)[..., None] * mask
    else:
        batch, tokens, mask = rollout(run)
    with run.autocast():
        return batch, tokens, mask, run.reward.guide(tokens, batch.prefix())


def policy_step(run):
    """Second half of a round, many times: one update of the policy with the reward as a constant."""
    c = run.c
    if c.objective == "ppo":
        return ppo_step(run)
    batch, tokens, mask, rewards = policy_batch(run)
    weights = shape_rewards(rewards, mask, c.weights if c.guidance == "token" else "immediate")
    with run.autocast():
        run.policy.train()
        predict, _ = read_candidates(run.policy, tokens, run.task.start, batch.prefix())  # (B, K, T, D)
        flat = [x.flatten(0, 1) for x in (predict, tokens, mask, weights)]
        if c.objective == "reinforce":
            flat[3] = standardize(flat[3], flat[2]) if c.center and c.guidance == "token" else flat[3]
            loss, stats = reinforce_loss(flat[0], run.policy.head[:run.task.n_ids], *flat[1:],
                                         alpha=c.alpha * settling(run))
        else:
            loss, stats = weighted_mle_loss(flat[0], run.policy.head[:run.task.n_ids], *flat[1:], norm=c.wmle_norm)
    stats["grad_norm"] = update(run, run.policy, run.policy_opt, loss, c.lr * run.gate * settling(run))
    return {"loss": loss.detach(), **stats}


def dense_rewards(run, batch, tokens, mask):
    """(B, K, T) rewards of a rollout before the KL: learned ones read at their ends, normalised by place, spread over
    segments (E13, E14); under bandit guidance of a task that can be asked, the z-scored preference at the last token."""
    x = Candidates(tokens, mask, None, batch.context, batch.context_mask)
    ends = answer_ends(run, x)
    if run.c.guidance == "bandit" and not run.task.has_pairs:
        return torch.where(ends, z_scored(run.task.prefer(batch, tokens, mask))[..., None], 0.0)
    with run.autocast():
        rewards = run.reward.guide(tokens, batch.prefix())
    return spread(normalize(rewards, ends, run.line), ends, mask)


@torch.no_grad()
def look(run, model, tokens, mask, prefix):
    """Hidden states (N, T, D) that predict the tokens (N, T), and their log-probs, as constants."""
    with run.autocast():
        hidden = read_candidates(model, tokens[:, None], run.task.start, prefix)[0][:, 0]
        _, logp, _ = policy_loss(hidden.flatten(0, 1), model.head[:run.task.n_ids], tokens.flatten(),
                                 mask.flatten().float())
    return hidden, logp.view_as(mask)


def ppo_step(run):
    """One rollout and its minibatches (E14-E16): answers by the policy, rewards at every token, clipped updates."""
    c, task = run.c, run.task
    batch, tokens, mask = rollout(run)
    dense = dense_rewards(run, batch, tokens, mask).flatten(0, 1)
    tokens, mask, prefix = tokens.flatten(0, 1), mask.flatten(0, 1), batch.prefix()  # (N, T); a pooled task has no prefix
    with torch.no_grad():
        hidden, old = look(run, run.policy.eval(), tokens, mask, prefix)
        values = run.value(hidden.float()).squeeze(-1)
        _, start = look(run, run.first, tokens, mask, prefix)
        advantage, returns, figures = experience(dense, old, start, values, mask, c.kl, c.gamma, c.lam)
    check_start(figures["kl"].item())
    alpha, sums, largest = c.alpha * settling(run), {}, torch.zeros((), device=tokens.device)
    for _ in range(c.epochs):
        for part in torch.randperm(len(tokens), generator=run.generators["data"]).tensor_split(c.minibatches):
            run.policy.train()
            part = part.to(tokens.device)
            with run.autocast():
                some = prefix and [x[part] for x in prefix]
                hidden = read_candidates(run.policy, tokens[part, None], task.start, some)[0][:, 0]
                loss, stats = ppo_loss(hidden, run.policy.head[:task.n_ids], tokens[part], mask[part], old[part],
                                       advantage[part], c.ppo_clip, alpha)
            stats["value_loss"] = value_loss(run.value(hidden.detach().float()).squeeze(-1), values[part], returns[part],
                                             mask[part], c.value_clip)
            check_step(stats["ratio_max"].item())
            stats["grad_norm"] = update(run, run.learner, run.policy_opt, loss + 0.5 * stats["value_loss"],
                                        c.lr * run.gate * settling(run))
            for name, x in ({"loss": loss} | stats).items():
                sums[name] = sums.get(name, 0.0) + x.detach() / (c.epochs * c.minibatches)
            largest = torch.maximum(largest, stats["ratio_max"])
    return sums | figures | {"ratio_max": largest}


def settling(run):
    """Share of lr and alpha at this update: 1 for --hold updates, then down to 0 over as many again. A count of its own
    and not a share of --policy_steps, so that a run resumed for longer is the longer run."""
    return min(1.0, max(0.0, 2 - run.step / run.c.hold)) if run.c.hold else 1.0


def update(run, model, optimizer, loss, lr, phase="policy"):
    """Backward, check, clip, step. A loss that is not finite stops the run before it reaches a weight."""
    if not torch.isfinite(loss):
        raise FloatingPointError(f"{phase} loss is {loss.item()}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.c.clip)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"{phase} gradient norm is {norm.item()}")
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("times", 1.0)
    optimizer.step()
    return norm


# ---------------------------------------------------------------------------------------------------------- warm starts


def supervised(run, model, steps, lr, batch_size, phase, batches):
    """Plain maximum likelihood: the warm start on references (mle's own loss, so that nothing changes at the seam), or
    a language model of the world's text for the reward's body. `batches(n)` gives a data.Batch with references."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    for step in range(steps):
        batch = batches(batch_size)
        with run.autocast():
            model.train()
            tokens, mask = trim(batch.reference, batch.reference_mask)
            predict, _ = read_candidates(model, tokens[:, None], run.task.start, batch.prefix())
            loss, stats = weighted_mle_loss(predict[:, 0], model.head, tokens, mask, mask.float(), norm="length")
        now = lr * min(1.0, (step + 1) / 50, 2 * (1 - step / steps))  # warm-up, flat, linear to zero over the last half
        update(run, model, optimizer, loss, now, f"{phase} update {step + 1}:")
        run.log.progress(phase, step + 1, steps, stats)
    return save_state(model)


def warm_key(run):
    """What decides a warm start whatever its length: part of the name of its cache file."""
    return {"task": run.task.fingerprint(), "seed": run.c.seed, "size": dataclasses.asdict(run.policy.config),
            "dtype": str(run.dtype),
            "code": code_hash(supervised, *map(inspect.getmodule, (Transformer, policy_loss, weighted_mle_loss)))}


def warm_starts(run):
    """The policy's supervised start, which the reward's body shares (the paper starts both from one pretrained model),
    or a language model as the reward's body where there is nothing to imitate. Cached: every comparison shares them."""
    c, task = run.c, run.task
    what = warm_key(run)
    data = torch.Generator().manual_seed(c.seed)
    if c.sft_steps and task.has_references:
        key = what | {"steps": c.sft_steps, "lr": c.sft_lr, "batch": c.sft_batch, "clip": c.clip}
        saved, path = cached(c.cache_dir, "sft", key, lambda: supervised(
            run, run.policy, c.sft_steps, c.sft_lr, c.sft_batch, "sft", lambda n: task.batch(n, data)))
        load_state(run.policy, saved), load_state(run.body, saved)
        run.log.say(f"warm start: policy and reward body from {path}")
    elif c.reward_warmup and c.guidance == "token":
        key = what | {"steps": c.reward_warmup, "clip": c.clip}
        saved, path = cached(c.cache_dir, "warmup", key, lambda: supervised(
            run, run.body, c.reward_warmup, 3e-3, 64, "warmup", lambda n: task.text_batch(n, data)))
        load_state(run.body, saved)
        run.log.say(f"warm start: reward body from {path}")


# ----------------------------------------------------------------------------------------------------------- evaluation


def evaluate(run):
    """A point of the curve and the fixed samples with their token rewards. Own generators: looking changes nothing."""
    task, c = run.task, run.c
    figures = task.evaluate(run.policy.eval(), torch.Generator(run.device).manual_seed(c.seed))
    batch, tokens, mask, preference = task.samples(run.policy, torch.Generator(run.device).manual_seed(c.seed + 1))
    rewards = run.reward.guide(tokens, batch.prefix())
    with open(os.path.join(c.out_dir, "samples.jsonl"), "a") as f:
        for b, k in ((b, k) for b in range(tokens.shape[0]) for k in range(tokens.shape[1])):
            ids = tokens[b, k][mask[b, k]].tolist()
            context, reference = task.describe(batch, b)
            f.write(json.dumps({"step": run.step, "kind": task.kind, "context": context,
                                "tokens": task.tokenizer.pieces(ids),
                                "rewards": [round(x, 4) for x in rewards[b, k][mask[b, k]].tolist()],
                                "preference": round(preference[b, k].item(), 4), "text": task.tokenizer.decode(ids),
                                "reference": reference}) + "\n")
    run.log.figures("eval", run.step, figures)
    return figures


@torch.no_grad()
def held_out_accuracy(run, rounds=8):
    """rank_accuracy of summary.json: fresh candidates of the final policy, none of which was ever fitted."""
    queries = run.task.state()
    g = {k: v.get_state() for k, v in run.generators.items()}
    pairs = [rank_accuracy(run.reward, collect(run), run.c.agg, run.c.beta, run.c.resolution) for _ in range(rounds)]
    run.task.load_state(queries)  # an examination, not part of the training budget
    for k, v in g.items():
        run.generators[k].set_state(v)
    right, n = map(sum, zip(*pairs))
    return right / n if n else None


def finish(run):
    """summary.json, written last: its presence says that the run ended well."""
    c, task = run.c, run.task
    final = task.finish(run.policy.eval(), torch.Generator(run.device).manual_seed(c.seed + 2))
    count = lambda m: sum(p.numel() for p in m.parameters())
    learned = (c.guidance != "bandit" or task.has_pairs) and c.objective != "mle"
    accuracy = None
    if learned and task.has_pairs:
        x = annotated(run, "test")
        share = lambda right, n: right / n if n else None
        accuracy = share(*rank_accuracy(run.reward, x, c.agg, c.beta, c.resolution))
        by_length = ordered_pairs(x.mask.sum(-1).float(), x.preference)  # what "longer is better" would reach
        final |= {"length_rank_accuracy": share(*by_length)} | task.judge_reward(run.reward.guide)
    elif learned:
        accuracy = held_out_accuracy(run)
    summary = {"task": c.task, "objective": c.objective, "guidance": c.guidance, "agg": c.agg, "seed": c.seed,
               "seconds": run.log.seconds(), "device": str(run.device), "params_policy": count(run.policy),
               "params_reward": count(run.reward),
               "rank_accuracy": accuracy, **final}
    write_whole(os.path.join(c.out_dir, "summary.json"), (json.dumps(summary, indent=1) + "\n").encode())
    return summary


# ----------------------------------------------------------------------------------------------------------------- main


def prepare(argv, log):
    """Flags -> a Run that is ready to start or to go on. Nothing is written before all input is read and good."""
    c, typed = parse_flags(Flags, argv, __doc__)
    choose_out_dir(c, typed)
    resumed = c.init_from == "resume"
    c = resume_flags(c, typed) if resumed else c
    check_together(c)
    if c.threads:
        torch.set_num_threads(c.threads)
    device, dtype, reason = decide_device(c)
    task = TASKS[c.task](c, device, log.progress, log.say)
    run = Run(c, task, device, dtype, log)
    saved = None
    if resumed:
        saved = read_torch(os.path.join(c.out_dir, "ckpt.pt"), "a checkpoint", device)
    else:
        warm_starts(run)
        task.begin(run.policy.eval())
    run.build()
    open_folder(run, saved, reason)
    count = sum(p.numel() for p in run.policy.parameters())
    log.say(f"{c.out_dir}: {c.task}, {c.objective}, {c.guidance}, seed {c.seed}; {reason}; "
            f"{count / 1e6:.2f} M parameters a net")
    return run


def open_folder(run, saved, reason):
    """The first writes of a run: its folder emptied of an older run, or brought back to its checkpoint."""
    c, task, log = run.c, run.task, run.log
    os.makedirs(c.out_dir, exist_ok=True)
    if saved:
        try:
            run.load(saved)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
            fail(f"{c.out_dir}/ckpt.pt: a checkpoint of other settings than those in config.json beside it; "
                 f"start a new run")
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_back(os.path.join(c.out_dir, name), run.step)
    else:
        for name in ("metrics.jsonl", "samples.jsonl", "ckpt.pt"):
            if os.path.exists(os.path.join(c.out_dir, name)):
                os.remove(os.path.join(c.out_dir, name))
    if os.path.exists(os.path.join(c.out_dir, "summary.json")):
        os.remove(os.path.join(c.out_dir, "summary.json"))
    config = dataclasses.asdict(c) | {"versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
                                      "device_reason": reason, "init_from": "scratch"}
    write_whole(os.path.join(c.out_dir, "config.json"), (json.dumps(config, indent=1) + "\n").encode())
    write_whole(os.path.join(c.out_dir, "tokenizer.json"), json.dumps(task.tokenizer.state()).encode())
    log.open(c.out_dir, saved["seconds"] if saved else 0.0)


def loop(run):
    """The alternate loop: fit the reward on fresh preferences, improve the policy with it for a while, repeat."""
    c, log = run.c, run.log
    while run.step < c.policy_steps:
        if run.step % c.reward_every == 0:
            log.figures("reward", run.step, reward_phase(run))
        if run.step == 0:
            evaluate(run)
        figures = policy_step(run)
        run.step += 1
        if run.step % c.log_every == 0 or run.step == c.policy_steps:
            log.figures("policy", run.step, figures)
        if run.step % c.eval_every == 0 or run.step == c.policy_steps:
            log.say(f"{run.step:6}  " + "  ".join(f"{k} {v:.4g}" for k, v in evaluate(run).items()))
        if log.stop or run.step % c.reward_every == 0 or run.step == c.policy_steps:
            run.save()
        log.progress("policy", run.step, c.policy_steps, {"loss": figures["loss"], "gate": run.gate})


def main(argv=None):
    """Returns the exit status."""
    log = Log()

    def stop(*_):  # the first Ctrl-C ends the step in hand and saves; a second one does not wait
        if log.stop:
            raise KeyboardInterrupt
        log.stop = True
    signal.signal(signal.SIGINT, stop)
    run = None
    try:
        run = prepare(sys.argv[1:] if argv is None else argv, log)
        loop(run)
        for k, v in finish(run).items():
            print(f"{k:22} {v:.4f}" if isinstance(v, float) else f"{k:22} {v}")
        print(f"\npython eval.py --out_dir {run.c.out_dir}")
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        there = run and os.path.exists(os.path.join(run.c.out_dir, "ckpt.pt"))
        fail(f"stopped; go on with: python train.py --init_from resume --out_dir {shlex.quote(run.c.out_dir)}"
             if there else f"stopped before the first checkpoint: start again{' with --overwrite' if run else ''} "
             "(a finished judge or warm start is kept)", 130)
    except FloatingPointError as error:
        fail(f"step {run.step + 1 if run else 0}: {error}; lower the learning rate; the last good checkpoint is "
             f"untouched", 1)
    except OSError as error:  # a disk that fills up behind a log line, a folder that may not be written
        what = error.filename or (run.c.out_dir if run else "output")
        fail(f"{what}: could not be written ({error.strerror or error})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
