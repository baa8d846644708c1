"""What a run is made of, and how all of it is kept: nets, optimizers, buffers, random numbers, its step.

Everything that the loop changes is an attribute of `Run`, and `state` packs every one of them, so that a
resumed run goes on to the bit. A `Run` is whole from the start: all nets are made at once, as the seed makes
them, and a warm start only loads other weights into them (warm_start.py).

`load_nets` rebuilds the nets from a run's folder alone. Nothing of its data is needed: the checkpoint has
named nets and their sizes, tokenizer.json and config.json lie beside it, and task.pt holds what the task
keeps for later.
"""
import contextlib
import copy
import dataclasses
import functools
import json
import os
import sys
from types import SimpleNamespace

import torch

from data import Tokenizer
from guidance import FITS, GUIDANCES, guidance_of, new_reward, pays_alone
from model import Config, Transformer, step_down
from reward import Buffer, Candidates, FitSettings
from support.distributed import add_gradients, added, from_first, largest, own, parts, place, world
from support.files import digest, read_json, read_torch, write_torch, write_whole
from support.flags import defaults_of
from support.folder import FILES, LOCK, commit, cut_back, leftover
from support.hub import fetch
from support.log import UserError, fail, out_of_memory
from weights import read_config

NETS = ("policy", "reward", "start_policy", "value")  # the names in a checkpoint, attributes of Run
ADAPTER = 2048  # width of the net that learns under --policy mlp, as in the paper
CRITIC_RATE = 10.0  # times --lr: the critic is a straight line on top of states that hardly move


class Run:
    """Everything that a checkpoint holds, and what is needed to rebuild the rest.

    c, task, objective   flags, tasks.Task, objective.Objective; device, dtype, log: where and how it runs
    policy, reward       the two nets that learn; start_policy: the policy as it was before the loop, frozen
    value                the critic, states (..., D) -> (..., 1); None where the objective has no critic
    generators           random numbers, a stream for each purpose
    step                 updates of the policy so far
    fitted, held_out     Buffers: what the reward is fitted to, and what says when to stop
    first_place          {what: (V, ...)} the reward makes of every word at a prompt's first place, since its
                         latest fit (rollout.py)
    normalizer           (5,) of E13, renewed after a fit; None where the objective has no critic
    """

    def __init__(self, c, task, objective, device, dtype, log):
        self.c, self.task, self.objective = c, task, objective
        self.device, self.dtype, self.log = device, dtype, log
        self.step, self.normalizer, self.first_place = 0, None, {}
        self.fitted = Buffer(c.replay or c.candidates, self.pooled)
        self.held_out = Buffer(max(c.replay // 8, 16), self.pooled)
        self.generators = generators(c.seed, device)
        torch.manual_seed(c.seed)
        size = Config(task.tokenizer.size, task.context, c.n_layer, c.n_head, c.n_embd, c.dropout,
                      c.positions == "rotary")
        self.policy = new_policy(c, size).to(device)
        body = Transformer(reward_size(c, size)).to(device)
        self.reward = new_reward(body, task.start, c, task.n_ids).to(device)
        self.reward.at_once = c.micro_batch
        self.start_policy = copy.deepcopy(self.policy).requires_grad_(False).eval()
        self.value = new_critic(c.n_embd, device) if objective.critic else None
        self.policy_optimizer = self.new_policy_optimizer()
        self.reward_optimizer = torch.optim.Adam(self.reward.parameters(), lr=c.reward_lr, fused=True)

    def new_policy_optimizer(self):
        """Adam on policy and critic. "times": a group's own factor of the learning rate (`update`).

        On prompts gradients shrink thirtyfold once a policy has settled. With a long memory of their size
        (beta2 0.999) its steps are far too large when a new reward makes them grow: one fit undid a policy
        that had settled well. And they are far too small when gradients have shrunk.
        """
        groups = [{"params": [p for p in self.policy.parameters() if p.requires_grad]}]
        if self.value is not None:
            groups.append({"params": self.value.parameters(), "times": CRITIC_RATE})
        betas = 0.9, self.c.adam_beta2
        # fused: one call instead of ten a tensor
        return torch.optim.Adam(groups, lr=self.c.lr, betas=betas, fused=True)

    def restart_policy(self):
        """The policy as it was before the loop, with a new optimizer."""
        self.policy.load_state_dict(self.start_policy.state_dict())
        self.policy_optimizer = self.new_policy_optimizer()

    def compile(self):
        """torch.compile of the nets that learn: after the warm starts, which are kept without it."""
        self.policy.compile(dynamic=True)
        self.reward.body.compile(dynamic=True)

    @property
    def learner(self):
        """What a step of the policy moves: policy and critic, clipped as one."""
        return torch.nn.ModuleList(x for x in (self.policy, self.value) if x is not None)

    @property
    def learns_reward(self):
        """Whether the reward net is fitted to preferences and the policy reads it: not for an objective that
        weighs all tokens alike, nor under bandit guidance, but where a score an answer is itself learned from
        annotated pairs."""
        return self.objective.rewarded and (not guidance_of(self.c).whole or self.task.has_pairs)

    @property
    def pooled(self):
        """Whether the fit may compare any candidates with one another: all of a pooled task answer the same
        input. With --no-pool only those that were asked about together, K at a time."""
        return self.task.pooled and self.c.pool

    @property
    def stays_near(self):
        """Whether rewards pay --kl for leaving the start without PPO (policy_reinforce.py): a learned reward
        knows the samples of a warm start and little else. A prompt starts from a net that knows nothing, and
        annotated answers show a reward what is better than the start."""
        starts_well = self.task.has_references and not self.task.has_pairs
        return self.objective.near and self.learns_reward and self.c.kl > 0 and starts_well

    @property
    def exact_first(self):
        """Whether the first place of a prompt is learned from the rewards of all words (--exact_first), not
        of sampled ones: where all sequences begin alike, and a word is paid its own reward alone."""
        return (self.c.exact_first and pays_alone(self.c) and self.task.pooled and self.learns_reward
                and self.objective.first is not None)

    @functools.cached_property
    def data(self):
        """{part: hash} of the task's data: a checkpoint remembers it, and a resumed run compares."""
        return self.task.fingerprint()

    # ----------------------------------------------------------------------------------------------- learning

    def autocast(self):
        """Half precision for matrix products where --dtype says so; statistics stay float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def update(self, model, optimizer, loss_of, n, lr, phase="policy", k=1, check=lambda figures: None):
        """One step on a batch of n groups of k sequences, at this learning rate times a group's own factor.

        loss_of  groups (a slice of the n) -> loss, {figure: 0-dim tensor}: their share of the batch's. Called
                 for this process's groups, --micro_batch sequences at a time, whose gradients are added
        check    (figures of the batch), called before the step is taken
        returns  these figures, and "grad_norm" before clipping
        """
        most = max(1, self.c.micro_batch // k) if self.c.micro_batch else 0
        shares, weight = [], float(len(own(n)) > 0)
        optimizer.zero_grad(set_to_none=True)
        for groups in parts(n, most):
            loss, figures = loss_of(groups)
            (loss * weight).backward()
            shares.append({name: x.detach() * weight for name, x in {"total": loss, **figures}.items()})
        add_gradients(model.parameters())
        figures = added(shares)
        check(figures)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("times", 1.0)
        norm = step_down(model, optimizer, figures.pop("total"), self.c.clip, phase)
        return figures | {"grad_norm": norm}

    def fit_settings(self, steps, fresh=None):
        """reward.FitSettings by this run's flags.

        fresh   a function that returns new candidates for every step (--replay 0), None: they are replayed
        """
        c = self.c
        return FitSettings(
            steps=steps, loss=FITS[guidance_of(c).fit](c), generator=self.generators["fit"], K=c.K,
            groups=c.reward_batch, resolution=c.resolution, clip=c.clip, patience=c.patience, fresh=fresh,
            head_first=c.head_first, ties=c.ties > 0, autocast=self.autocast,
            progress=lambda i, loss: self.log.progress("reward", i, steps, {"loss": loss}))

    # -------------------------------------------------------------------------------------------- checkpoints

    def nets(self):
        """{name: net} of all that there are."""
        return {name: net for name in NETS if (net := getattr(self, name)) is not None}

    def sizes(self):
        """What `load_nets` makes the nets of, as plain values."""
        return {"policy": dataclasses.asdict(self.policy.config),
                "reward": dataclasses.asdict(self.reward.body.config),
                "bound": self.c.bound, "start": self.task.start, "foreseen": self.c.foreseen,
                "n_ids": self.task.n_ids}

    def state(self):
        """A dictionary that torch.load(weights_only=True) reads."""
        return {"step": self.step, "nets": {name: net.state_dict() for name, net in self.nets().items()},
                "sizes": self.sizes(),
                "optimizers": {"policy": self.policy_optimizer.state_dict(),
                               "reward": self.reward_optimizer.state_dict()},
                "buffers": {"fitted": pack(self.fitted.data), "held_out": pack(self.held_out.data)},
                "normalizer": self.normalizer, "task": self.task.state(),
                "random": {"streams": {k: g.get_state() for k, g in self.generators.items()},
                           "torch": random_state()},
                "seconds": self.log.seconds(), "config": dataclasses.asdict(self.c), "data": self.data,
                "processes": world()}

    def load(self, s):
        """The inverse of `state`."""
        for name, net in self.nets().items():
            net.load_state_dict(s["nets"][name])
        self.policy_optimizer.load_state_dict(s["optimizers"]["policy"])
        self.reward_optimizer.load_state_dict(s["optimizers"]["reward"])
        self.fitted.data = unpack(s["buffers"]["fitted"])
        self.held_out.data = unpack(s["buffers"]["held_out"])
        self.step, self.normalizer = s["step"], s["normalizer"]
        self.task.load_state(s["task"])
        for k, g in self.generators.items():
            g.set_state(s["random"]["streams"][k].cpu())  # they live in host memory, also those of a GPU
        set_random_state(*s["random"]["torch"])

    def save(self):
        """ckpt.pt, whole or not at all."""
        self.check_alike()
        write_torch(os.path.join(self.c.out_dir, "ckpt.pt"), self.state())

    def check_alike(self):
        """Several processes are one as long as nets and random numbers are the same in each: the end of a run
        in which they are not, rather than a result of nothing that anybody described."""
        if world() == 1:
            return
        sums = [x.detach().double().sum() for net in self.nets().values() for x in net.parameters()]
        mine = digest([self.step, torch.stack(sums), [g.get_state() for g in self.generators.values()]])
        if largest(from_first(lambda: mine) != mine):
            raise UserError(f"step {self.step}: the {world()} processes of this run have drifted apart; its "
                            f"last checkpoint is from before")

    def split_dropout(self):
        """Dropout draws from torch's own generator. Of several processes each has a stream of its own, made
        anew at every step of seed and step: wherever a run is resumed, it drops what the whole one does."""
        if world() > 1:
            torch.manual_seed((self.c.seed * 2 ** 20 + self.step) * world() + place())

    def open(self, saved, decided):
        """The first writes of a run: its folder emptied of an older run, or brought back to its checkpoint.
        decided  {"threads_used", "device_reason", ...}: what config.json says beside the flags"""
        c, path = self.c, functools.partial(os.path.join, self.c.out_dir)
        if saved:
            self.go_on(saved)
        self.check_alike()
        if place() > 0:  # the first process writes
            self.log.out_dir = c.out_dir
            return
        if saved:
            for name in ("metrics.jsonl", "samples.jsonl"):
                cut_back(path(name), self.step)
        # config.json stays until it is replaced: without it the folder would be no run
        late = ("summary.json", "scores.json", "searches.jsonl")  # what stands for the end of a run
        old = late if saved else set(FILES) - {"config.json"}
        for name in os.listdir(c.out_dir):
            if name in old or leftover(name) and name != LOCK:
                os.remove(path(name))
        versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
        config = dataclasses.asdict(c) | {"versions": versions, "processes": world()}
        config |= {"figures": list(self.task.figures), "curve": self.task.curve,  # these four for eval.py
                   "bounded": guidance_of(c).bounded, "critic": self.objective.critic, "commit": commit()}
        config |= decided
        usual = defaults_of(type(c), {"task": c.task})
        config["changed"] = [k for k, value in usual.items() if config[k] != value]  # the page marks them
        write_whole(path("config.json"), (json.dumps(config, indent=1) + "\n").encode())
        write_whole(path("tokenizer.json"), json.dumps(self.task.tokenizer.state()).encode())
        if not saved:  # of a run that goes on it is there, and the same
            write_torch(path("task.pt"), self.task.kept())
        self.log.open(c.out_dir, saved["seconds"] if saved else 0.0)

    def go_on(self, saved):
        """Take over a checkpoint, or say in one line why not, before anything is written."""
        c, now = self.c, self.data
        check_form(saved, f"{c.out_dir}/ckpt.pt")
        try:
            step = saved["step"]
            changed = [name for name in now if saved["data"].get(name) != now[name]]
            if not changed:
                self.load(saved)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if out_of_memory(error):
                raise  # the checkpoint is good, the machine is too small or too busy
            fail(f"{c.out_dir}/ckpt.pt: a checkpoint of other settings than those in config.json beside it, "
                 f"or of another kind of device than this {self.device.type}; start a new run")
        if changed:
            source = c.data or getattr(c, "world", None) or "embedded data"
            fail(f"{source}: {', '.join(changed)}: not what the run in {c.out_dir} began with; restore it, "
                 f"or start a new run")
        if c.policy_steps < step:
            fail(f"--policy_steps {c.policy_steps}: the run in {c.out_dir} has done {step} steps already")
        if (before := saved.get("processes", 1)) != world():
            self.log.say(f"{c.out_dir}: processes: {before} until step {step}, {world()} from here on; the "
                         f"same run but for rounding")


def generators(seed, device):
    """{purpose: stream of random numbers}. Samples are drawn where the nets are, rows, subsets and the noise
    of preferences on the host."""
    at_nets = {name: torch.Generator(device).manual_seed(seed * 1000 + i)
               for i, name in enumerate(("sample", "candidates"))}
    at_host = {name: torch.Generator().manual_seed(seed * 1000 + 100 + i)
               for i, name in enumerate(("data", "fit", "noise"))}
    return at_nets | at_host


def new_policy(c, size):
    """The policy; under --policy mlp with an adapter, which alone learns."""
    if c.policy == "whole":
        return Transformer(size)
    policy = Transformer(dataclasses.replace(size, adapter=ADAPTER)).requires_grad_(False)
    policy.adapter.requires_grad_(True)
    return policy


def reward_size(c, size):
    """model.Config of the reward's body: that of the policy, or of the folder that --reward_init names."""
    if c.reward_init in (None, "scratch"):
        return size
    _, own = read_config(fetch(c.reward_init, "reward_init"))
    return dataclasses.replace(own, vocab_size=size.vocab_size, n_ctx=size.n_ctx, dropout=size.dropout)


def new_critic(width, device):
    """A linear value net that says 0 of everything, and draws no random numbers."""
    value = torch.nn.utils.skip_init(torch.nn.Linear, width, 1).to(device)
    torch.nn.init.zeros_(value.weight)
    torch.nn.init.zeros_(value.bias)
    return value


def pack(x):
    """Candidates as a plain dictionary; None stays None."""
    return None if x is None else {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}


def unpack(x):
    """The inverse of `pack`."""
    return None if x is None else Candidates(**x)


# --------------------------------------------------------------------------------------------- random numbers


def random_state():
    """torch's own generators: the CPU's state, and a list of every GPU's (empty without one)."""
    return [torch.get_rng_state(), torch.cuda.get_rng_state_all()]


def set_random_state(here, on_gpu):
    """The inverse of `random_state`. Their states live in host memory, wherever a checkpoint was read to."""
    torch.set_rng_state(here.cpu())
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([x.cpu() for x in on_gpu])


@contextlib.contextmanager
def kept_random_state():
    """Whatever is drawn inside, torch's own generators go on as if nothing had been: what is read from the
    cache draws nothing, and its run is to be the same."""
    before = random_state()
    yield
    set_random_state(*before)


# --------------------------------------------------------------------------------------------- a run's folder


def check_form(saved, path):
    """UserError for a checkpoint whose nets have no names or no sizes: older forms, and files of other
    programs."""
    if not (isinstance(saved, dict) and all(isinstance(saved.get(k), dict) for k in ("nets", "sizes"))):
        raise UserError(f"{path}: expected a checkpoint of this version (nets with names and sizes), got "
                        f"another form; train the run again")


def read_part(folder, name, what, device):
    """A file of tensors of a run's folder, or UserError's one line."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise UserError(f"{path}: {what} is missing; expected the folder of a run that has saved once")
    return read_torch(path, what, device)


def load_nets(folder, device="cpu"):
    """The nets of a run from its folder alone, in eval mode and frozen, to be used and not trained further.

    returns  a namespace: config (dict), policy, reward, start_policy, tokenizer, kept (what the task keeps
             for later), step. UserError's one line for whatever is missing, broken, of another form or does
             not fit
    """
    config = read_json(os.path.join(folder, "config.json"), "a run's folder")
    path = os.path.join(folder, "ckpt.pt")
    saved = read_part(folder, "ckpt.pt", "a checkpoint", device)
    check_form(saved, path)
    tokenizer = read_tokenizer(folder)
    try:
        sizes, weights, step = saved["sizes"], saved["nets"], int(saved["step"])
        policy, start_policy = Transformer(Config(**sizes["policy"])), Transformer(Config(**sizes["policy"]))
        own = {"bound": sizes["bound"], "foreseen": bool(sizes.get("foreseen"))}  # older runs know it not
        reward = new_reward(Transformer(Config(**sizes["reward"])), int(sizes["start"]),
                            SimpleNamespace(**config | own), sizes.get("n_ids"))
        policy.load_state_dict(weights["policy"])
        reward.load_state_dict(weights["reward"])
        start_policy.load_state_dict(weights["start_policy"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{path}: nets and sizes do not fit one another ({type(error).__name__}): a damaged "
                        f"checkpoint") from error
    if tokenizer.size != policy.config.vocab_size:
        raise UserError(f"{folder}: tokenizer.json has {tokenizer.size} ids and the policy in ckpt.pt "
                        f"{policy.config.vocab_size}: files of different runs")
    kept = read_part(folder, "task.pt", "what the task keeps for later", device)
    for net in (policy, reward, start_policy):
        net.to(device).requires_grad_(False).eval()
    return SimpleNamespace(config=config, policy=policy, reward=reward, start_policy=start_policy,
                           tokenizer=tokenizer, kept=kept, step=step)


def read_tokenizer(folder):
    """The tokenizer of a run's folder, or UserError's one line."""
    state = read_json(os.path.join(folder, "tokenizer.json"), "a run's folder")
    try:
        return Tokenizer.from_state(state)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        path = os.path.join(folder, "tokenizer.json")
        raise UserError(f"{path}: expected a run's tokenizer, got something else") from error
