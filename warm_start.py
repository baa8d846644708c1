"""What nets know before the loop: supervised starts, and the reward of annotated answers. Kept, to be shared.

Where a task has references, the policy imitates them and the reward's body starts from the same weights (the
paper starts both from one pretrained model). Where it has none, the reward's body is a language model of the
task's own text: a reward from scratch would have to meet every word in a scored candidate first.

Where answers were annotated beforehand, nobody is asked during training: the reward is fitted once, before
the first update of the policy. Each net lies in the cache under a hash of everything that decides it, code
included.
"""
import functools

import torch

from data import trim
from guidance import guidance_of
from model import load_state, read_candidates, save_state
from policy_wmle import weighted_mle_loss
from reward import fit
from rollout import annotated, renew_normalizer, split_rows
from state import random_state, set_random_state
from support.distributed import world
from support.files import cached, decides
from support.flags import without
from support.hub import fetch
from support.log import UserError
from weights import from_pretrained, read_config


def supervised(run, model, steps, lr, batch_size, phase, batches):
    """Plain maximum likelihood: the warm start on references (mle's own loss, so that nothing changes at the
    seam), or a language model of the world's text for the reward's body. `batches(n)` gives a data.Batch with
    references."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    for step in range(steps):
        loss_of = functools.partial(imitation, run, model, batches(batch_size))
        # warm-up, flat, linear to zero over the last half
        now = lr * min(1.0, (step + 1) / 50, 2 * (1 - step / steps))
        model.train()
        figures = run.update(model, optimizer, loss_of, batch_size, now, f"{phase} update {step + 1}:")
        figures.pop("grad_norm")
        run.log.progress(phase, step + 1, steps, figures)
    return save_state(model)


def imitation(run, model, batch, rows):
    """The share of some rows of a batch: loss, figures."""
    tokens, mask = trim(batch.reference, batch.reference_mask)  # (B, T)
    behind = batch.prefix() and [x[rows] for x in batch.prefix()]
    with run.autocast():
        predict, _ = read_candidates(model, tokens[rows, None], run.task.start, behind)  # (b, 1, T, D)
        plain = mask.float()  # all tokens alike
        return weighted_mle_loss(predict[:, 0], model.head, tokens, mask, plain, norm="length", rows=rows)


# What of the flags cannot matter to a kept state: groups, and what of them matters nevertheless.
KEYS = {"sft": (("run", "data", "reward", "policy", "judge", "log"), ("task", "seed", "micro_batch")),
        "warmup": (("run", "data", "reward", "policy", "judge", "log"),
                   ("task", "seed", "micro_batch", "prompt_length", "reward_warmup")),
        "reward": (("run", "data", "policy", "judge", "log"), ("task", "seed", "micro_batch", "compile"))}


def warm_key(run, kind):
    """What decides a warm start ("sft" or "warmup"): see support/files.py. The nets begin as the seed has
    made them."""
    data = {"task": run.data, "body": run.reward.body.state_dict(), "policy": run.policy.state_dict(),
            "processes": world()}
    code = warm_starts, supervised, type(run), type(run.task)
    return decides(without(run.c, *KEYS[kind]), data, code, run.device, run.dtype)


def take_sizes(c, typed):
    """What folders of weights decide in the place of flags -> whether any was named.

    --init_from: sizes and positions of policy and reward. The first of --init_from, --judge and --reward_init
    that is named: the tokenizer. Those of the nets: how wide data may be, and that there is no warm-up of the
    reward's body. UserError where a flag typed by hand says something else.
    """
    named = {flag: source for flag in ("init_from", "judge", "reward_init")
             if (source := getattr(c, flag)) not in (None, "scratch", "world")}
    for flag, source in named.items():
        folder = fetch(source, flag)
        c.tokenizer = c.tokenizer or folder
        if flag == "judge":
            continue
        _, size = read_config(folder)
        if "context_limit" not in typed:
            c.context_limit = min(c.context_limit, max(4, size.n_ctx - 1))  # a start token stands in between
        if "reward_warmup" not in typed:
            c.reward_warmup = 0
        own = {"n_layer": size.n_layer, "n_embd": size.n_embd, "n_head": size.n_head,
               "positions": "rotary" if size.rotary else "learned"}
        for name, value in own.items() if flag == "init_from" else ():
            if name in typed and getattr(c, name) != value:
                raise UserError(f"--{name} {getattr(c, name)}: the weights of {source} have {value}")
            setattr(c, name, value)
    return bool(named)


def load_weights(run):
    """The weights that --init_from and --reward_init name, into policy, start and the reward's body; where
    the reward's are not named it begins as the policy does, as in the paper."""
    c, task = run.c, run.task
    of_reward = c.reward_init or c.init_from
    for flag, source, nets in (("init_from", c.init_from, (run.policy, run.start_policy)),
                               ("reward_init", of_reward, run.reward.bodies)):
        if source != "scratch":
            found = from_pretrained(source, task.tokenizer, task.context, c.dropout, flag)
            for net in nets:
                net.load_state_dict(net.state_dict() | found.state_dict())  # an adapter stays as it is
            run.log.say(f"{'policy' if flag == 'init_from' else 'reward body'}: weights of {source}")


def warm_starts(run):
    """The policy's supervised start, which the reward's body shares (the paper starts both from one
    pretrained model), or a language model as the reward's body where there is nothing to imitate. Cached:
    every comparison shares them."""
    c, task = run.c, run.task
    load_weights(run)
    data = torch.Generator().manual_seed(c.seed)
    if c.sft_steps and task.has_references:
        build = lambda: supervised(run, run.policy, c.sft_steps, c.sft_lr, c.sft_batch, "sft",
                                   lambda n: task.batch(n, data))
        saved, path = cached(c.cache_dir, "sft", warm_key(run, "sft"), build, run.log.say, together=True)
        for net in (run.policy, run.start_policy):
            load_state(net, saved)
        shared = c.reward_init is None and c.policy == "whole"  # else it begins elsewhere, or is another net
        for net in run.reward.bodies if shared else ():
            load_state(net, saved)
        run.log.say(f"warm start: policy{' and reward body' if shared else ''} from {path}")
    elif c.reward_warmup and run.learns_reward and not task.has_references:
        build = lambda: supervised(run, run.reward.body, c.reward_warmup, 3e-3, 64, "warmup",
                                   lambda n: task.text_batch(n, data))
        saved, path = cached(c.cache_dir, "warmup", warm_key(run, "warmup"), build, run.log.say,
                             together=True)
        for net in run.reward.bodies:
            load_state(net, saved)
        run.log.say(f"warm start: reward body from {path}")


def learn_from_pairs(run):
    """First half of the only round of a task whose answers were annotated beforehand. The fitted reward is
    kept like a warm start: runs that differ only in how the policy uses it share it."""
    c, x = run.c, annotated(run, "train")
    fitted, kept = split_rows(len(x.tokens), c.seed)
    run.fitted.size = run.held_out.size = len(x.tokens)  # nobody adds any later: all of them are kept
    run.fitted.add(x.map(lambda t: t[fitted]))
    run.held_out.add(x.map(lambda t: t[kept]))
    data = {"answers": x, "start": run.reward.state_dict(), "task": run.data, "processes": world()}
    code = learn_from_pairs, supervised, type(run), type(run.task)
    flags = without(c, *KEYS["reward"])
    flags["guidance"] = guidance_of(c).like or c.guidance  # what is read off one fit is read off the same one
    key = decides(flags, data, code, run.device, run.dtype)
    saved, path = cached(c.cache_dir, "reward", key, lambda: fitted_state(run), run.log.say, together=True)
    run.reward.load_state_dict(saved["net"])
    run.reward_optimizer.load_state_dict(saved["optimizer"])
    run.generators["fit"].set_state(saved["stream"])
    set_random_state(*saved["random"])
    run.split_dropout()
    renew_normalizer(run)
    run.log.say(f"reward: {path}")
    return saved["figures"] | {"buffer": len(run.fitted)}


def fitted_state(run):
    """Fit the reward to what the buffers hold: its figures, and all that the fit has changed."""
    settings = run.fit_settings(run.c.reward_first)
    figures = fit(reward=run.reward, optimizer=run.reward_optimizer, buffers=(run.fitted, run.held_out),
                  settings=settings)
    return {"figures": figures, "net": run.reward.state_dict(),
            "optimizer": run.reward_optimizer.state_dict(),
            "stream": run.generators["fit"].get_state(), "random": random_state()}
