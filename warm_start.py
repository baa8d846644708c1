"""Supervised starts: what policy and reward body know before the first preference. Kept, so that comparisons share them.

Where a task has references, the policy imitates them and the reward's body starts from the same weights (the paper
starts both from one pretrained model). Where it has none, the reward's body is a language model of the task's own text:
a reward from scratch would have to meet every word in a scored candidate first. Each start lies in the cache under a
hash of everything that decides it, code included.
"""
import torch

from data import trim
from model import load_state, read_candidates, save_state
from policy_wmle import weighted_mle_loss
from support.files import cached, decides


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
        run.update(model, optimizer, loss, now, f"{phase} update {step + 1}:")
        run.log.progress(phase, step + 1, steps, stats)
    return save_state(model)


def warm_key(run, kind):
    """What decides a warm start ("sft" or "warmup"): see support/cache.py. The nets begin as the seed has
    made them."""
    data = {"task": run.data(), "body": run.body.state_dict(), "policy": run.policy.state_dict()}
    return decides(kind, run.c, data, (__name__, type(run), type(run.task)), run.device, run.dtype)


def warm_starts(run):
    """The policy's supervised start, which the reward's body shares (the paper starts both from one pretrained model),
    or a language model as the reward's body where there is nothing to imitate. Cached: every comparison shares them."""
    c, task = run.c, run.task
    data = torch.Generator().manual_seed(c.seed)
    if c.sft_steps and task.has_references:
        saved, path = cached(c.cache_dir, "sft", warm_key(run, "sft"), lambda: supervised(
            run, run.policy, c.sft_steps, c.sft_lr, c.sft_batch, "sft", lambda n: task.batch(n, data)), run.log.say)
        load_state(run.policy, saved), load_state(run.body, saved)
        run.log.say(f"warm start: policy and reward body from {path}")
    elif c.reward_warmup and c.guidance == "token" and not task.has_references:
        saved, path = cached(c.cache_dir, "warmup", warm_key(run, "warmup"), lambda: supervised(
            run, run.body, c.reward_warmup, 3e-3, 64, "warmup", lambda n: task.text_batch(n, data)), run.log.say)
        load_state(run.body, saved)
        run.log.say(f"warm start: reward body from {path}")
