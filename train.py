"""The alternate loop: learn token rewards from preferences, improve the policy with them, repeat (Yang et al., 2023).

    python train.py                                       a discrete prompt for a frozen judge, from preferences alone
    python train.py --task summarize                      summaries, from noisy references and preferences
    python train.py --task edits                          answers, from an annotator's minimal edits, by dense PPO
    python train.py --data DIR --world DIR                the same on real text; -h lists every flag

Read `main` first: it is the loop. `reward_phase` is the first half of a round (sample K candidates, ask for the
preference, fit the token reward), `policy_step` the second (REINFORCE or weighted MLE with that reward, frozen). A new
objective is one policy_*.py, one line in OBJECTIVES and its call in `policy_step`; a new task is one file in tasks/ and one
line in TASKS. Flags, folders, files and log are in support/.

What differs from the released code, and why, is written where it happens: a buffer of scored candidates (reward.py),
rewards centred over the batch (policy_reinforce.py), weights that hold the level of a reference (policy_wmle.py), a
reward that knows the words before the first preference (warm_start.py).
"""
import contextlib
import dataclasses
import json
import os
import signal
import sys

from support.log import Log, UserError, as_value, command, fail, leave_quietly, tolerant_terminal, visible

if __name__ == "__main__":
    leave_quietly()  # torch takes a second or two to import, a busy machine half a minute

import torch

from data import trim
from model import read_candidates
from policy_ppo import check_start, check_step, ppo_loss, value_loss
from policy_reinforce import WEIGHTS, reinforce_loss, shape_rewards, standardize
from policy_wmle import NORMS, weighted_mle_loss
from reward import BOUNDS, Buffer, Candidates, fit, label_loss, ordered_pairs, rank_accuracy, ranking_loss
from rollout import (answer_ends, collect, held_candidates, inputs, learn_from_rollout, near_start, renew_normalizer, rollout, split_rows,
                     z_scored)
from state import Run, set_random_state
from support.device import check_memory, decide_device, decide_threads
from support.files import cached, decides, read_torch, write_whole
from support.flags import flag, parse_flags
from support.folder import claim_out_dir, resume_flags
from tasks.edits import EditsTask
from tasks.prompt import PromptTask
from tasks.summarize import SummarizeTask
from warm_start import warm_starts

TASKS = {"prompt": PromptTask, "summarize": SummarizeTask, "edits": EditsTask}
# How each objective gets its tokens: "samples" of the policy, scored by the reward; or the task's "references".
OBJECTIVES = {"reinforce": "samples", "wmle": "references", "mle": "references", "ppo": "samples"}
# When a run says that nothing was learned: its reward has a standard deviation below CONSTANT (a new one about
# 0.002, the range is 1.313), or orders at most CHANCE of the held-out pairs rightly, of FEW at least, or its weights of
# wmle have an effective share of FLAT or more.
CONSTANT, CHANCE, FEW, FLAT = 0.01, 0.55, 20, 0.999

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
    threads: int = flag(0, "CPU threads (0: one, for nets so large that more are worth it torch's choice)", low=0)
    cache_dir: str = flag("out/cache", "judges and warm starts, each under the hash of what decides it")
    # data
    data: str = flag(
        None, "folder with the task's train, dev/validation and test files, or hub:<id>[:config]", kind=str)
    world: str = flag(None, "prompt: folder of a world on disk (default: the embedded one)", kind=str)
    attribute: str = flag("sentiment", "prompt: what the few-shot task asks for")
    tokenizer: str = flag(
        None, "byte | bpe | gpt2 | folder with GPT-2's two files (default: the world's words, or bpe)", kind=str)
    vocab_size: int = flag(8192, "ids of a learned bpe", low=257)
    document_column: str = flag(None, "summarize: column of a hub or jsonl data set", kind=str)
    summary_column: str = flag(None, "summarize: its reference column", kind=str)
    limit: int = flag(0, "summarize, edits: rows a split at most (0: all)", low=0)
    shots: int = flag(16, "prompt: few-shot examples a class, drawn from the world where --data is not given", low=1)
    curve_size: int = flag(100, "test examples behind the points of the learning curve", low=1)
    prompt_length: int = flag(5, "prompt: tokens", low=1, high=64)
    max_document: int = flag(256, "summarize: tokens of a document; longer ones are cut", low=1)
    max_summary: int = flag({"prompt": 1, "summarize": 24, "edits": 24},
                            "summarize: tokens of a summary, end-of-text included", low=2)
    # model
    n_layer: int = flag(2, "transformer blocks of policy and reward", low=1)
    n_embd: int = flag({"prompt": 64, "summarize": 96, "edits": 96}, "width", low=8)
    n_head: int = flag(4, "attention heads", low=1)
    dropout: float = flag(0.0, "share of activations dropped in training", low=0.0, high=0.9)
    # reward
    agg: str = flag({"prompt": "sum", "summarize": "avg", "edits": "avg"}, "f: token rewards -> sequence score (E3, E4)",
                    choices=("avg", "sum", "min", "max"))
    beta: float = flag(2.0, "temperature of the soft min and max, in units of reward", low=1e-6)
    bound: str = flag("softplus", "range of r: softplus (0, 1.313), sigmoid (0, 1) (E2)", choices=BOUNDS)
    K: int = flag({"prompt": 5, "summarize": 3, "edits": None},
                  "candidates that are ranked together (edits: None is all that a row has)", low=2, kind=int)
    candidates: int = flag({"prompt": 16, "summarize": 32, "edits": 32},
                           "a round: prompts to score, or documents with K summaries each", low=2)
    explore: float = flag({"prompt": 0.5, "summarize": 0.0, "edits": 0.0},
                          "share of candidates in which a token becomes a random one with probability 1/2",
                          low=0.0, high=1.0)
    top_k: int = flag(0, "sample among the k most likely tokens only (0: all)", low=0)
    replay: int = flag({"prompt": 4096, "summarize": 4096, "edits": 8192},
                       "scored candidates kept (0: fresh ones at every step, as in the paper; edits: all there are)", low=0)
    resolution: float = flag({"prompt": 25.0, "summarize": 0.01, "edits": 0.01},
                             "preferences are rounded to multiples of this, and equal ones tie", low=0.0)
    reward_first: int = flag({"prompt": 40, "summarize": 400, "edits": 2000}, "Adam steps of the first fit", low=0)
    reward_steps: int = flag({"prompt": 20, "summarize": 50, "edits": 0}, "Adam steps of every later fit", low=0)
    reward_every: int = flag({"prompt": 10, "summarize": 100, "edits": 100}, "policy steps between fits", low=1)
    reward_lr: float = flag({"prompt": 1e-3, "summarize": 5e-4, "edits": 1e-3}, "Adam learning rate", low=0.0, high=1e30)
    reward_batch: int = flag({"prompt": 64, "summarize": 16, "edits": 32}, "groups of K a step", low=1)
    reward_warmup: int = flag({"prompt": 400, "summarize": 0, "edits": 0},
                              "prompt: language-model steps of the reward's body on the world's text", low=0)
    patience: int = flag({"prompt": 7, "summarize": 7, "edits": 100},
                         "looks at held-out candidates without improvement before a fit stops", low=1)
    # policy
    policy_steps: int = flag({"prompt": 500, "summarize": 300, "edits": 100}, "updates of the policy", low=1)
    batch_size: int = flag({"prompt": 64, "summarize": 32, "edits": 64}, "sequences an update", low=1)
    lr: float = flag({"prompt": 8e-3, "summarize": 5e-4, "edits": 1e-4}, "Adam learning rate", low=0.0, high=1e30)
    alpha: float = flag({"prompt": 0.3, "summarize": 0.01, "edits": 0.0},
                        "reinforce, ppo: weight of the entropy (E7; the paper has 0.125)", low=0.0)
    hold: int = flag({"prompt": 250, "summarize": 0, "edits": 50},
                     "updates at full lr and alpha, which then fall to zero over as many again: look around, then decide "
                     "(0: constant)", low=0)
    weights: str = flag({"prompt": "immediate", "summarize": "mean_to_go", "edits": "immediate"},
                        "what a token answers for", choices=WEIGHTS)
    wmle_norm: str = flag("length", "wmle: divisor of the weights; rewards is E9", choices=NORMS)
    minibatches: int = flag(4, "ppo: updates an epoch; --batch_size is then a rollout", low=1)
    epochs: int = flag(1, "ppo: passes over a rollout", low=1)
    ppo_clip: float = flag(0.2, "ppo: the ratio stays within 1 +- this (E16)", low=0.0)
    value_clip: float = flag(0.25, "ppo: a value moves at most this far from the old one (E16)", low=0.0)
    kl: float = flag({"prompt": 0.01, "summarize": 0.3, "edits": 0.3},
                     "price of a nat away from the starting policy, in reward (E14): ppo; on summaries also "
                     "reinforce with the learned reward", low=0.0)
    gamma: float = flag(1.0, "ppo: discount (E15)", low=0.0, high=1.0)
    lam: float = flag(0.95, "ppo: lambda of the advantages (E15)", low=0.0, high=1.0)
    center: bool = flag(True, "reinforce: centre and scale the rewards over the batch (the paper does not)")
    clip: float = flag(5.0, "gradient norm at most", low=0.0)
    sft_steps: int = flag({"prompt": 0, "summarize": 1200, "edits": 600}, "supervised warm start: updates", low=0)
    sft_lr: float = flag({"prompt": 2e-3, "summarize": 2e-3, "edits": 3e-3}, "its learning rate", low=0.0, high=1e30)
    sft_batch: int = flag({"prompt": 16, "summarize": 16, "edits": 32}, "its pairs an update", low=1)
    # judge
    judge_steps: int = flag(1400, "prompt: updates of the judge's pre-training", low=1)
    judge_lr: float = flag(5e-3, "its learning rate", low=0.0, high=1e30)
    judge_layers: int = flag(2, "its blocks", low=1)
    judge_width: int = flag(64, "its width", low=8)
    judge_context: int = flag(64, "tokens of a text it reads", low=1)
    # log
    eval_every: int = flag({"prompt": 50, "summarize": 100, "edits": 50}, "policy steps between evaluations", low=1)
    log_every: int = flag(20, "policy steps between log lines", low=1)


def check_together(c, typed=()):
    """Flags that exclude one another. `typed`: those given by hand, which must not ask for what has no effect."""
    if c.reward_warmup and TASKS[c.task].has_references:
        fail(f"--reward_warmup {c.reward_warmup}: task {c.task} has references, and its reward starts from the "
             f"policy's warm start (did you mean --sft_steps?)")
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
    if c.objective != "ppo" and (c.guidance == "segment" or c.guidance == "bandit" and TASKS[c.task].has_pairs):
        fail(f"--guidance {c.guidance} of task {c.task} reads a learned reward at some tokens only: it needs --objective ppo")
    for name in ("weights", "wmle_norm", "guidance"):
        if c.objective == "mle" and name in typed:
            fail(f"--{name} {getattr(c, name)}: --objective mle weighs all tokens alike and reads no reward "
                 f"(did you mean wmle?)")
    if c.objective == "ppo" and c.guidance == "bandit" and c.batch_size < 2 and not TASKS[c.task].has_pairs:
        fail(f"--batch_size {c.batch_size}: expected at least 2, as --guidance bandit compares the sequences of a "
             f"rollout with one another")
    if c.objective == "ppo" and c.minibatches > c.batch_size:
        fail(f"--minibatches {c.minibatches}: expected at most --batch_size {c.batch_size}")
    if TASKS[c.task].pooled and c.guidance != "bandit" and c.K > c.candidates:
        fail(f"--K {c.K}: expected at most --candidates {c.candidates}")


# ------------------------------------------------------------------------------------------------------- the two halves


def reward_phase(run):
    """First half of a round: look at fresh candidates, then learn from them. Bandit guidance only looks."""
    c, task = run.c, run.task
    if task.has_pairs:
        return learn_from_edits(run) if run.step == 0 else {}
    fits = c.guidance != "bandit" and c.objective != "mle"
    held = held_candidates(run)
    run.latest = collect(run, inputs(run, held) if fits else None)
    figures = {"preference": run.latest.preference.mean(), "preference_best": run.latest.preference.max()}
    if not fits:
        return figures
    right, pairs = rank_accuracy(run.reward, run.latest, c.agg, c.beta, c.resolution)
    figures["rank_accuracy"] = right / pairs if pairs else None  # before the fit has seen them
    d, cut = run.train.dim, c.candidates - held  # the last ones are never fitted: they say when a fit should stop
    run.train.add(run.latest.map(lambda x: x.narrow(d, 0, cut)))
    run.held.add(run.latest.map(lambda x: x.narrow(d, cut, held)))

    def fresh():
        """New candidates for one step of the fit, where none are replayed."""
        new = Buffer(c.candidates, task.pooled)
        new.add(collect(run, inputs(run, 0)))
        return new
    figures |= fit_reward(run, c.reward_first if run.step == 0 else c.reward_steps, fresh if c.replay == 0 else None)
    renew_normalizer(run)
    return figures | {"buffer": len(run.train)}


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
    fitted, kept = split_rows(len(x.tokens), c.seed)
    run.train.size = run.held.size = len(x.tokens)  # nobody adds any later: all of them are kept
    run.train.add(x.map(lambda t: t[fitted])), run.held.add(x.map(lambda t: t[kept]))
    loss = (lambda reward, batch, _: label_loss(reward, batch)) if c.guidance == "edits" else None
    data = {"answers": x, "start": run.reward.state_dict(), "task": run.data()}
    code = learn_from_edits, warm_starts.__module__, type(run), type(run.task)
    key = decides("reward", c, data, code, run.device, run.dtype)

    def build():
        figures = fit_reward(run, c.reward_first, loss=loss)
        return {"figures": figures, "nets": [x.state_dict() for x in (run.reward, run.reward_opt)],
                "random": [run.generators["fit"].get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all()]}
    saved, path = cached(c.cache_dir, "reward", key, build, run.log.say)
    for x, state in zip((run.reward, run.reward_opt), saved["nets"]):
        x.load_state_dict(state)
    fit_state, here, on_gpu = saved["random"]
    run.generators["fit"].set_state(fit_state)
    set_random_state(here, on_gpu)
    renew_normalizer(run)
    run.log.say(f"reward: {path}")
    return saved["figures"] | {"buffer": len(run.train)}


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
        return run.latest, tokens, mask, z_scored(run.latest.preference, c.resolution)[..., None] * mask
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
    learned = c.guidance != "bandit" and c.objective != "mle"  # mle: weights of exactly 1, whatever --weights says
    near = {}
    if run.first is not None:
        rewards, near = near_start(run, batch, tokens, mask, rewards)
    weights = shape_rewards(rewards, mask, c.weights if learned else "immediate")
    with run.autocast():
        run.policy.train()
        predict, _ = read_candidates(run.policy, tokens, run.task.start, batch.prefix())  # (B, K, T, D)
        predict, tokens, mask, weights = [x.flatten(0, 1) for x in (predict, tokens, mask, weights)]
        head = run.policy.head[:run.task.n_ids]
        if c.objective == "reinforce":
            weights = standardize(weights, mask) if c.center and learned else weights
            loss, stats = reinforce_loss(predict, head, tokens, mask, weights, alpha=c.alpha * settling(run))
        else:
            loss, stats = weighted_mle_loss(predict, head, tokens, mask, weights, norm=c.wmle_norm)
    stats["grad_norm"] = run.update(run.policy, run.policy_opt, loss, c.lr * settling(run))
    return {"loss": loss.detach(), **stats, **near}


def ppo_step(run):
    """One rollout and its minibatches (E14-E16): answers by the policy, rewards at every token, clipped updates."""
    c, updates = run.c, []
    lesson, prefix, figures = learn_from_rollout(run)
    check_start(figures["kl"].item())
    for _ in range(c.epochs):
        for part in torch.randperm(len(lesson["tokens"]), generator=run.generators["data"]).tensor_split(c.minibatches):
            part = part.to(run.device)
            some = prefix and [x[part] for x in prefix]
            updates.append(ppo_update(run, some, **{name: x[part] for name, x in lesson.items()}))
    every = {name: torch.stack([x[name] for x in updates]) for name in updates[0]}
    return {name: x.mean() for name, x in every.items()} | figures | {"ratio_max": every["ratio_max"].max()}


def ppo_update(run, prefix, tokens, mask, old, advantage, values, returns):
    """One minibatch: the clipped surrogate for the policy, a clipped square for the critic. Without dropout, like the
    log-probs that the ratio is taken to (policy_ppo.py)."""
    c, task = run.c, run.task
    run.policy.eval()
    with run.autocast():
        hidden = read_candidates(run.policy, tokens[:, None], task.start, prefix)[0][:, 0]
        loss, stats = ppo_loss(hidden, run.policy.head[:task.n_ids], tokens, mask, old, advantage, c.ppo_clip,
                               c.alpha * settling(run))
    check_step(stats["ratio_max"].item())
    now = run.value(hidden.detach().float()).squeeze(-1)
    stats |= {"loss": loss.detach(), "value_loss": value_loss(now, values, returns, mask, c.value_clip)}
    norm = run.update(run.learner, run.policy_opt, loss + 0.5 * stats["value_loss"], c.lr * settling(run))
    return stats | {"grad_norm": norm, "value_loss": stats["value_loss"].detach()}


def settling(run):
    """Share of lr and alpha at this update: 1 for --hold updates, then down to 0 over as many again. A count of its own
    and not a share of --policy_steps, so that a run resumed for longer is the longer run."""
    return min(1.0, max(0.0, 2 - run.step / run.c.hold)) if run.c.hold else 1.0


# ----------------------------------------------------------------------------------------------------------- evaluation


def evaluate(run):
    """A point of the curve and the fixed samples with their token rewards. Own generators: looking changes nothing."""
    task, c = run.task, run.c
    figures = task.evaluate(run.policy.eval(), torch.Generator(run.device).manual_seed(c.seed))
    batch, tokens, mask, preference = task.samples(run.policy, torch.Generator(run.device).manual_seed(c.seed + 1))
    rewards = run.reward.guide(tokens, batch.prefix())
    with open(os.path.join(c.out_dir, "samples.jsonl"), "a", encoding="utf-8") as f:
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
    """rank_accuracy of summary.json: fresh candidates of the final policy, none of which was ever fitted, of training
    rows whose candidates never were either (but where the rows were too few to keep some)."""
    c, queries = run.c, run.task.state()
    g = {k: v.get_state() for k, v in run.generators.items()}
    n = c.candidates if held_candidates(run) else 0
    pairs = [rank_accuracy(run.reward, collect(run, inputs(run, n)), c.agg, c.beta, c.resolution)
             for _ in range(rounds)]
    run.task.load_state(queries)  # an examination, not part of the training budget
    for k, v in g.items():
        run.generators[k].set_state(v)
    right, n = map(sum, zip(*pairs))
    return right / n if n else None


def logged(run, phase):
    """The figures that this run has logged of a phase, all legs of a resumed run together."""
    with open(os.path.join(run.c.out_dir, "metrics.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return [row for row in rows if row["phase"] == phase]


def reward_spread(run, x):
    """Standard deviation of r over the tokens of some Candidates that it is read at."""
    parts = [x.map(lambda t: t[i]) for i in torch.arange(len(x.tokens)).split(256)]
    return torch.cat([run.reward.guide(p.tokens, p.prefix())[p.read_at()] for p in parts]).std(correction=0).item()


def reward_warnings(run, x):
    """What a learned reward did not learn, as at most one sentence in a list.  x: held-out Candidates, or None
    where there are none."""
    c, task = run.c, run.task
    body = "--sft_steps" if task.has_references else "--reward_warmup"  # what its body knows beforehand
    fits = [row["reward_fit_steps"] for row in logged(run, "reward") if "reward_fit_steps" in row]
    asked = c.reward_first + c.reward_steps * (len(fits) - 1)  # steps, unless every candidate ties
    if asked and not any(fits):
        more = "answers whose scores differ" if task.has_pairs else "more --candidates"
        return [f"The reward was never fitted: no two candidates of an input differed by --resolution "
                f"{c.resolution:g}. Try a smaller --resolution, or {more}."]
    if x is None or not x.read_at().any():
        return []
    if (spread := reward_spread(run, x)) < CONSTANT:
        return [f"The reward is constant: over held-out tokens it has a standard deviation of {spread:.4f} (below "
                f"{CONSTANT:g}), so it guides nothing. Try more steps (--reward_first) or a larger --reward_lr."]
    right, pairs = rank_accuracy(run.reward, x, c.agg, c.beta, c.resolution)
    if pairs < FEW or right / pairs > CHANCE:
        return []
    more = "more rows" if task.has_pairs else "--candidates"
    return [f"The reward orders {right / pairs:.2f} of {pairs:.0f} held-out pairs rightly, and 0.5 is chance. Try more "
            f"preferences ({more}), more steps (--reward_first), or a body that knows more words before ({body})."]


def policy_warnings(run):
    """A weighted MLE whose weights are all alike is plain MLE, whatever it is called."""
    flat = [row["share"] for row in logged(run, "policy")] if run.c.objective == "wmle" else []
    if not flat or min(flat) < FLAT:
        return []
    return [f"The weights of wmle were flat from beginning to end (effective share of the tokens {min(flat):.4f}), so "
            f"this run is plain MLE. Try more steps of the reward (--reward_first), or other --weights."]


def finish(run):
    """summary.json, written last: its presence says that the run ended well."""
    c, task = run.c, run.task
    final = task.finish(run.policy.eval(), torch.Generator(run.device).manual_seed(c.seed + 2))
    count = lambda m: sum(p.numel() for p in m.parameters())
    learned = (c.guidance != "bandit" or task.has_pairs) and c.objective != "mle"
    accuracy, said = None, []
    if learned and task.has_pairs:
        x = annotated(run, "test")
        share = lambda right, n: right / n if n else None
        accuracy = share(*rank_accuracy(run.reward, x, c.agg, c.beta, c.resolution))
        by_length = ordered_pairs(x.mask.sum(-1).float(), x.preference)  # what "longer is better" would reach
        final |= {"length_rank_accuracy": share(*by_length)} | task.judge_reward(run.reward.guide)
        said = reward_warnings(run, x)
    elif learned:
        accuracy = held_out_accuracy(run)
        said = reward_warnings(run, run.held.data if len(run.held) else None)  # candidates of all rounds
    summary = {"task": c.task, "objective": c.objective, "guidance": c.guidance, "agg": c.agg, "seed": c.seed,
               "seconds": run.log.seconds(), "device": str(run.device), "params_policy": count(run.policy),
               "params_reward": count(run.reward),
               "rank_accuracy": accuracy, **final, "warnings": said + policy_warnings(run)}
    write_whole(os.path.join(c.out_dir, "summary.json"), (json.dumps(summary, indent=1) + "\n").encode())
    return summary


# ----------------------------------------------------------------------------------------------------------------- main


def checked(c, typed):
    """(threads, reason) of flags that fit one another and this machine."""
    check_together(c, typed)
    check_memory(c)
    return decide_threads(c)


def prepare(argv, log, held):
    """Flags -> a Run that is ready to start or to go on. Nothing but the claim of its folder is written
    before all input is read and good. held: a contextlib.ExitStack, which lets go of the folder at the
    end."""
    c, typed = parse_flags(Flags, argv, __doc__)
    resumed = c.init_from == "resume"
    if not resumed:  # the flags of a resumed run are in its folder
        threads, why = checked(c, typed)
    held.enter_context(claim_out_dir(c))
    if resumed:
        c, log.out_dir = resume_flags(c, typed), c.out_dir
        threads, why = checked(c, typed)
    torch.set_num_threads(threads)
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
    run.open(saved, {"device_reason": reason, "threads_used": threads, "threads_reason": why})
    count = sum(p.numel() for p in run.policy.parameters())
    log.say(f"{c.out_dir}: {c.task}, {c.objective}, {c.guidance}, seed {c.seed}; {reason}; threads {threads} ({why}); "
            f"{count / 1e6:.2f} M parameters a net")
    return run


def loop(run):
    """The alternate loop: fit the reward on fresh preferences, improve the policy with it for a while, repeat."""
    c, log = run.c, run.log
    while run.step < c.policy_steps:
        log.patient = False  # a Ctrl-C in a fit goes back to the checkpoint before it, a later one saves first
        if run.step % c.reward_every == 0:
            log.figures("reward", run.step, reward_phase(run))
        log.patient = True
        if run.step == 0:
            evaluate(run)
        figures = policy_step(run)
        run.step += 1
        if run.step % c.log_every == 0 or run.step == c.policy_steps:
            log.figures("policy", run.step, figures)
        if run.step % c.eval_every == 0 or run.step == c.policy_steps:
            log.say(f"{run.step:6}  " + "  ".join(f"{k} {v:.4g}" for k, v in evaluate(run).items()))
        stop = log.stop  # read once: a Ctrl-C from here on ends the next step
        if stop or run.step % c.reward_every == 0 or run.step == c.policy_steps:
            run.save()
        if stop:
            raise KeyboardInterrupt
        log.progress("policy", run.step, c.policy_steps, {"loss": figures["loss"]})
    log.patient = False


def main(argv=None):
    """Returns the exit status."""
    tolerant_terminal()
    log, run, before = Log(), None, signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, log.interrupt)
    try:
        with contextlib.ExitStack() as held:
            run = prepare(sys.argv[1:] if argv is None else argv, log, held)
            loop(run)
            summary = finish(run)
        warnings = summary.pop("warnings")
        for k, v in summary.items():
            print(f"{k:22} {v:.4f}" if isinstance(v, float) else f"{k:22} {visible(v)}")
        for line in warnings:
            print(f"warning: {visible(line)}")
        print("\n" + command("eval.py", "--out_dir", as_value(run.c.out_dir)))
    except BaseException as error:  # all, since torch.save turns a KeyboardInterrupt into a RuntimeError
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop but the line that says so
        explain(error, log, run)
    finally:  # as a script nothing follows but the clean-up of libraries, which does not bear to be interrupted
        signal.signal(signal.SIGINT, signal.SIG_IGN if argv is None else before)
    return 0


def explain(error, log, run):
    """The one line and the status that a run ends with where it does not end well; raises what nobody
    expected."""
    out_dir = log.out_dir  # None before the first write
    if log.interrupted or isinstance(error, KeyboardInterrupt):
        if out_dir and os.path.exists(os.path.join(out_dir, "ckpt.pt")):
            line = command("train.py", "--init_from", "resume", "--out_dir", as_value(out_dir))
            print(f"train.py: stopped; go on with:\n{line}", file=sys.stderr)  # a line that a shell takes as it is
            sys.exit(130)
        fail(f"stopped before the first checkpoint: start again{' with --overwrite' if out_dir else ''} (a finished "
             f"judge or warm start is kept)", 130)
    if isinstance(error, UserError):
        fail(error)
    if isinstance(error, FloatingPointError):
        fail(f"step {run.step + 1 if run else 0}: {error}; lower the learning rate; the last good checkpoint is "
             f"untouched", 1)
    if isinstance(error, OSError):  # a disk that fills up behind a log line, a folder that may not be written
        fail(f"{error.filename or out_dir or 'output'}: could not be written ({error.strerror or error})")
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        fail(f"out of memory: smaller nets, batches or texts are needed ({type(error).__name__})", 1)
    raise error


if __name__ == "__main__":
    sys.exit(main())
