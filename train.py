"""The alternate loop: learn token rewards from preferences, improve the policy with them, repeat.

    python train.py                      a discrete prompt for a frozen judge, from preferences alone
    python train.py --task summarize     summaries, from noisy references and preferences
    python train.py --task edits         answers, from an annotator's minimal edits, by dense PPO
    python train.py --data DIR           the same on real text; -h lists every flag

Read `loop` first, near the end (Yang et al., 2023). It alternates between `reward_phase` (sample K
candidates, ask for the preference, fit the token reward: reward.fit) and the step of an objective
(objective.py), which improves the policy with that reward, frozen. A new objective is one policy_*.py and one
line in OBJECTIVES; a new task is one file in tasks/ and one line in TASKS (docs/extend.md). What a run writes
about itself is in evaluate.py; flags, folders, files and log are in support/.

What differs from the released code, and why, is written where it happens: a buffer of scored candidates
(reward.py), rewards centred over the batch (policy_reinforce.py), weights that hold the level of a reference
(policy_wmle.py), a reward that knows the words before the first preference (warm_start.py).
"""
import contextlib
import dataclasses
import os
import signal
import sys

from support.log import Log, as_value, command, explain, fail, leave_quietly, tolerant_terminal, visible

if __name__ == "__main__":
    leave_quietly()  # torch takes a second or two to import, a busy machine half a minute

import torch

from aggregate import CHOICES
from evaluate import evaluate, finish
from guidance import GUIDANCES, check_guidance, guidance_of, pays_alone
from objective import Objective, by_loss, ppo_advantages, ppo_step, settling
from policy_ppo import RETURNS
from policy_reinforce import BASELINES, WEIGHTS, centred, first_words, reinforce, shaped
from policy_wmle import NORMS, shown_mle, weighted_mle
from reward import BOUNDS, fit, rank_accuracy
from rollout import collect, fresh_candidates, held_candidates, inputs, renew_normalizer, stuck
from state import Run, kept_random_state
from support.device import check_memory, decide_device, decide_threads
from support.distributed import joined, largest, leave, voice, world
from support.files import read_torch
from support.flags import flag, parse_flags, unread
from support.folder import claim_out_dir, resume_flags
from tasks import Task, check_made, check_task
from tasks.edits import EditsTask
from tasks.prompt import PromptTask
from tasks.summarize import SummarizeTask
from warm_start import learn_from_pairs, take_sizes, warm_starts
from weights import check_free, export


TASKS = {"prompt": PromptTask, "summarize": SummarizeTask, "edits": EditsTask}
OBJECTIVES = {
    "reinforce": Objective("samples", by_loss(reinforce), weigh=centred, near=True, first=first_words),
    "wmle": Objective("references", by_loss(weighted_mle), weigh=shaped, shown=shown_mle),
    "mle": Objective("references", by_loss(weighted_mle), rewarded=False),
    "ppo": Objective("samples", ppo_step, shown=ppo_advantages, critic=True),
}

# ------------------------------------------------------------------------------------------------------ flags


@dataclasses.dataclass
class Flags:
    """Every knob, its unit and its range, in the order of -h. What a task has in the place of a default
    stands in its `defaults`, the constants of the papers in its `paper`."""
    task: str = flag("prompt", "what to learn", choices=TASKS, group="run")
    objective: str = flag("reinforce", "how the policy uses the reward", choices=OBJECTIVES)
    preset: str = flag("none", "paper: its algorithm and constants (docs/differences.md)",
                       choices=("none", "paper"))
    seed: int = flag(1, "fixes data order, sampling and initial weights", low=0, high=2**32 - 1)
    out_dir: str = flag(None, "folder of the run (else out/TASK or the next free out/TASK-N)", kind=str)
    overwrite: bool = flag(False, "replace the run that out_dir holds")
    init_from: str = flag("scratch", "scratch; resume: go on where the run in out_dir stands; or where the "
                          "policy starts: a hub id (distilgpt2), or a folder that --export wrote")
    export: str = flag(None, "folder for the policy at the end, in the hub's form", kind=str)
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "autocast type (auto: bfloat16 on a GPU that has it)",
                      choices=("auto", "float32", "bfloat16"))
    compile: bool = flag(False, "torch.compile the policy's and the reward's forward pass")
    threads: int = flag(0, "CPU threads (0: by the size of the nets)", low=0)
    micro_batch: int = flag(0, "sequences a pass, whose gradients are added: the same update in less memory "
                            "(0: the whole batch)", low=0)
    cache_dir: str = flag("out/cache", "judges, warm starts, fitted rewards and encoded corpora, each under "
                          "the hash of what decides it")

    data: str = flag(None, "folder with train, dev or validation, and test files, one file of rows, or "
                     "hub:ID[:CONFIG]", kind=str, group="data")
    split_seed: int = flag(1, "decides what is cut off train for missing splits", low=0)
    world: str = flag(None, "folder of a world on disk, in place of the embedded one", kind=str, of="prompt")
    world_names: int = flag(2400, "made-up words of the embedded world", low=50, high=8000, of="prompt")
    world_cues: int = flag(4, "cue words that its hardest texts want", low=1, high=6, of="prompt")
    attribute: str = flag("sentiment", "what the few-shot task asks for", of="prompt")
    damage: str = flag(None, "text (a file, a folder or hub:ID) whose sentences get wrong words, in "
                       "place of --data", kind=str, of="edits")
    tokenizer: str = flag(None, "byte, bpe, gpt2 or a folder of GPT-2's files (else a world's words, bpe)",
                          kind=str)
    vocab_size: int = flag(8192, "ids of a learned bpe", low=257)
    document_column: str = flag(None, "column of the documents, in a file or on the hub", kind=str,
                                of="summarize")
    summary_column: str = flag(None, "its reference column", kind=str, of="summarize")
    ask: str = flag(None, "what stands between document and summary, such as TL;DR: for a "
                    "pretrained decoder (else end-of-text)", kind=str, of="summarize")
    limit: int = flag(0, "rows a split at most (0: all)", low=0, of="summarize, edits")
    answers: int = flag(2, "answers to a request of the embedded world, ranked where they are more "
                        "than a rejected and an edited one", low=2, high=16, of="edits")
    shots: int = flag(16, "few-shot examples a class, where no train and dev are given", low=1, of="prompt")
    whole_words: bool = flag(None, "only tokens that begin a word and encode back (else: with "
                             "--world, and with --data and the world's judge)", kind=bool, of="prompt")
    prompt_length: int = flag(5, "tokens", low=1, high=64, of="prompt")
    max_document: int = flag(None, "tokens of an input (else what 98 % of the training rows need; 256 in "
                             "embedded worlds)", low=1, kind=int)
    max_summary: int = flag(None, "tokens of an output with its end-of-text (else what 98 % of the training "
                            "rows need; 24 in embedded worlds)", low=2, kind=int)
    context_limit: int = flag(512, "tokens of input and output, where data decide them", low=4)

    n_layer: int = flag(2, "transformer blocks of policy and reward", low=1, group="model")
    n_embd: int = flag(64, "their width", low=8)
    n_head: int = flag(4, "attention heads", low=1)
    positions: str = flag("rotary", "learned: GPT-2's, with its GELU; these four are the folder's with "
                          "--init_from", choices=("rotary", "learned"))
    policy: str = flag("whole", "mlp: body and head stay as they are, a D-2048-D net between them learns",
                       choices=("whole", "mlp"))
    reward_init: str = flag(None, "the reward's body: scratch, a hub id or a folder (else what --init_from "
                            "names)", kind=str)
    dropout: float = flag(0.0, "share of activations dropped in training", low=0.0, high=0.9)
    clip: float = flag(5.0, "gradient norm at most, of every net", low=0.0)
    sft_steps: int = flag(0, "supervised warm start on the references: updates", low=0)
    sft_lr: float = flag(2e-3, "its learning rate", low=0.0, high=1e30)
    sft_batch: int = flag(16, "its pairs an update", low=1)

    guidance: str = flag("token", "the policy's reward: of tokens, learned from preferences; bandit: the "
                         "preference itself (edits: one learned score an answer); red, abc: read off one "
                         "learned score, as differences along prefixes or by attention; implicit: log-ratios "
                         "of a policy fitted by DPO; task edits only: of segments, or from the labels of "
                         "edits (without the flag edits for rejected + edited, token for other rows)",
                         choices=GUIDANCES, kind=str, group="reward")
    segment_entropy: float = flag(0.3, "nats of entropy at which one ends (E11)", low=0.0, of="segment")
    agg: str = flag("avg", "f: token rewards -> sequence score (E3, E4)", choices=CHOICES)
    beta: float = flag(2.0, "temperature of soft min and max, in units of reward", low=1e-6)
    dpo_beta: float = flag(0.1, "units of reward a nat", low=1e-6, of="implicit")
    bound: str = flag("softplus", "range of r (E2): (0, 1.313) or (0, 1)", choices=BOUNDS)
    foreseen: bool = flag(False, "r sees the logit too that its body had for the token before reading it")
    rank_temperature: float = flag(1.0, "of Plackett-Luce (E5), in units of score", low=1e-6)
    ties: float = flag(0.0, "weight of tied candidates having equal scores, and of r's logits beyond 8, "
                        "beside their ranking", low=0.0)
    K: int = flag(5, "candidates ranked together (edits: all that a row has)", low=2, kind=int)
    pool: bool = flag(True, "any K of all candidates so far are compared; --no-pool: only the K that "
                      "were asked about together, as people are asked", of="prompt")
    noise: float = flag(0.0, "answers as people give them: preference + this x Gumbel noise, drawn at every "
                        "asking (Plackett-Luce at this temperature, in units of preference)", low=0.0)
    candidates: int = flag(32, "a round, for a learned reward: prompts to score, or inputs with K "
                           "candidates each", low=2)
    explore: float = flag(0.0, "share of candidates in which half of the tokens are random",
                          low=0.0, high=1.0)
    explore_from: str = flag("policy", "what --explore varies, samples of the policy, or the best "
                             "prompts scored so far, by words that r likes (before one stands out: all "
                             "candidates are words that r's body tells apart)", choices=("policy", "best"),
                             of="prompt")
    ask_again: int = flag(0, "rounds of candidates more before the first fit, at most, while no "
                          "preference stands out by more than a step of --resolution", low=0)
    planted: float = flag(0.0, "share of inputs two of whose candidates are the reference, and "
                          "the same with one wrong word", low=0.0, high=1.0, of="summarize")
    top_k: int = flag(0, "sample among the k most likely tokens only (0: all)", low=0)
    replay: int = flag(4096, "prompts, questions (--no-pool) or inputs with their K candidates that are "
                       "kept (0: fresh ones at every step; edits: all)", low=0)
    resolution: float = flag(0.0, "preferences are rounded to multiples of it, and may tie", low=0.0)
    reward_first: int = flag(100, "Adam steps of the first fit", low=0)
    reward_steps: int = flag(20, "Adam steps of every later fit", low=0)
    reward_every: int = flag(20, "policy steps between fits, and between checkpoints", low=1)
    reward_lr: float = flag(1e-3, "Adam learning rate", low=0.0, high=1e30)
    head_first: float = flag(0.0, "share of a fit's steps in which its head learns alone, three times as "
                             "fast: a body that has read is not yet bent to a few preferences",
                             low=0.0, high=1.0)
    reward_batch: int = flag(32, "groups of K a step", low=1)
    reward_warmup: int = flag(0, "language-model steps of the reward's body", low=0, of="prompt")
    patience: int = flag(7, "looks at held-out candidates without gain before a fit stops", low=1)

    policy_steps: int = flag(200, "updates of the policy", low=1, group="policy")
    batch_size: int = flag(64, "sequences an update (bandit guidance asks the task about them)", low=1)
    lr: float = flag(2e-3, "Adam learning rate", low=0.0, high=1e30)
    adam_beta2: float = flag(0.999, "decay of its squared gradients", low=0.0, high=0.9999)
    alpha: float = flag(0.1, "weight of the entropy (E7)", low=0.0, of="reinforce, ppo")
    hold: int = flag(0, "updates at full lr and alpha; over as many more the step falls to 0, alpha to "
                     "a half (0: both stay)", low=0)
    weights: str = flag("immediate", "what a token answers for", choices=WEIGHTS, of="reinforce, wmle")
    wmle_norm: str = flag("length", "divisor of the weights; rewards is E9", choices=NORMS, of="wmle")
    center: bool = flag(True, "centre and scale rewards over the batch", of="reinforce")
    exact_first: bool = flag(False, "reinforce learns its first place, where all prompts are alike, "
                             "from every word's reward in place of samples", of="prompt")
    baseline: str = flag("batch", "under bandit guidance what an answer is compared with: the z-score over "
                         "the batch, the mean of the others of its group (RLOO), or mean and deviation of "
                         "its group (GRPO)", choices=BASELINES, of="reinforce")
    group_size: int = flag(1, "samples of an input in a rollout", low=1, of="summarize, edits")
    minibatches: int = flag(4, "updates an epoch; --batch_size is then a rollout", low=1, of="ppo")
    epochs: int = flag(1, "passes over a rollout", low=1, of="ppo")
    ppo_clip: float = flag(0.2, "the ratio stays within 1 +- this (E16)", low=0.0, of="ppo")
    value_clip: float = flag(0.25, "a value moves at most this far (E16)", low=0.0, of="ppo")
    kl: float = flag(0.3, "price of a nat away from the starting policy, in reward (E14); of reinforce only "
                     "on summaries, with the learned reward", low=0.0, of="ppo, reinforce")
    returns: str = flag("sum", "a token answers for the sum of what follows (E15), or for its minimum "
                        "(PURE)", choices=RETURNS, of="ppo")
    gamma: float = flag(1.0, "discount (E15)", low=0.0, high=1.0, of="ppo")
    lam: float = flag(0.95, "lambda of the advantages (E15)", low=0.0, high=1.0, of="ppo")

    judge: str = flag("world", "world, taught on the world's texts; or a hub id or folder of a "
                      "language model, which answers as it is", group="judge", of="prompt")
    judge_steps: int = flag(1200, "updates of the judge's pre-training", low=1, of="prompt")
    judge_read: int = flag(200, "before them: updates in which it names the classes of texts, unasked",
                           low=0, of="prompt")
    judge_lr: float = flag(5e-3, "its learning rate", low=0.0, high=1e30, of="prompt")
    judge_layers: int = flag(2, "its blocks", low=1, of="prompt")
    judge_width: int = flag(64, "its width", low=8, of="prompt")
    judge_context: int = flag(64, "tokens of a text it reads", low=1, of="prompt")

    eval_every: int = flag(50, "policy steps between evaluations", low=1, group="log")
    log_every: int = flag(20, "policy steps between log lines", low=1)
    curve_size: int = flag(100, "test examples behind the points of the learning curve", low=1)

    @staticmethod
    def own(given):
        """{flag: value} in the place of flags' own defaults, of the task and preset that were typed."""
        task = TASKS[given.get("task", "prompt")]
        check_task(task)
        of_guidance = GUIDANCES[given["guidance"]].flags if given.get("guidance") in GUIDANCES else {}
        return task.defaults | of_guidance | preset_of(task, given.get("preset", "none"))


def preset_of(task, name):
    """{flag: value} that a preset puts in the place of a task's defaults."""
    return task.paper if name == "paper" else {}


def preset_set(c):
    """What the preset of a run has set: {flag: value}, without those that were typed to be something else."""
    return {k: v for k, v in preset_of(TASKS[c.task], c.preset).items() if getattr(c, k) == v}


def check_together(c, typed=()):
    """Flags that exclude one another. `typed`: those given by hand, which must not ask for what has no
    effect."""
    if c.reward_warmup and TASKS[c.task].has_references:
        fail(f"--reward_warmup {c.reward_warmup}: task {c.task} has references, and its reward starts from "
             f"the policy's warm start (did you mean --sft_steps?)")
    if c.reward_warmup and TASKS[c.task].text_batch is Task.text_batch:
        fail(f"--reward_warmup {c.reward_warmup}: task {c.task} has no text besides its rows")
    if c.policy == "mlp" and c.export:
        fail("--export: --policy mlp is no model of the hub: its body is what --init_from names, unchanged")
    if c.judge != "world" and not TASKS[c.task].has_judge:
        fail(f"--judge {c.judge}: task {c.task} has no judge")
    if c.damage and not TASKS[c.task].has_pairs:
        fail(f"--damage {c.damage}: task {c.task} learns from no edits (did you mean --task edits?)")
    if "damage" in typed and "data" in typed:
        fail("--damage and --data: expected one of them")
    if c.answers > 2 and (c.data or not TASKS[c.task].has_pairs):
        fail(f"--answers {c.answers}: only the embedded world of task edits writes answers")
    if c.planted and TASKS[c.task].plant is Task.plant:
        fail(f"--planted {c.planted}: task {c.task} has no other candidates than the policy's (did you mean "
             f"--explore?)")
    if c.planted and c.guidance == "bandit":
        fail("--planted: under --guidance bandit no reward is fitted to candidates")
    if c.judge_width % 8:
        fail(f"--judge_width: expected a multiple of 8, got {c.judge_width}")
    if c.n_embd % (2 * c.n_head):
        fail(f"--n_embd: expected a multiple of 2 x n_head = {2 * c.n_head}, got {c.n_embd}")
    if OBJECTIVES[c.objective].source == "references" and not TASKS[c.task].has_references:
        fail(f"--objective {c.objective} learns from references, and task {c.task} has none (did you mean "
             f"reinforce?)")
    check_guidance(c, typed, TASKS[c.task], OBJECTIVES[c.objective])
    check_asking(c, typed)
    for name in ("weights", "wmle_norm", "guidance", "ties", "rank_temperature"):
        if not OBJECTIVES[c.objective].rewarded and name in typed:
            fail(f"--{name} {getattr(c, name)}: --objective {c.objective} weighs all tokens alike and reads "
                 f"no reward (did you mean wmle?)")
    critic = OBJECTIVES[c.objective].critic
    normalised = critic and TASKS[c.task].has_pairs  # by E13, not by the samples beside it
    if c.guidance == "bandit" and c.batch_size < 2 and not normalised:
        fail(f"--batch_size {c.batch_size}: expected at least 2, as --guidance bandit compares the sequences "
             f"of a rollout with one another")
    if critic and c.minibatches > c.batch_size:
        fail(f"--minibatches {c.minibatches}: expected at most --batch_size {c.batch_size}")
    if TASKS[c.task].pooled and not guidance_of(c).whole and c.K > c.candidates:
        fail(f"--K {c.K}: expected at most --candidates {c.candidates}")


def check_asking(c, typed):
    """Noise where nobody is asked; questions of K where nothing is compared, or that do not come out even;
    the best of prompts that are none, or that no fit has kept."""
    task = TASKS[c.task]
    learns = OBJECTIVES[c.objective].rewarded and not task.has_pairs and not guidance_of(c).whole
    if c.explore_from == "best" and "explore_from" in typed and not (task.pooled and learns and c.explore):
        fail(f"--explore_from best: expected task prompt, a learned reward and an --explore above 0, got "
             f"task {c.task}, --guidance {c.guidance}, --explore {c.explore:g}")
    if c.exact_first and "exact_first" in typed:
        check_exact(c, learns)
    if c.ask_again and "ask_again" in typed and not learns:
        fail(f"--ask_again {c.ask_again}: this run fits no reward to what it asks")
    if c.noise and task.has_pairs:
        fail(f"--noise {c.noise:g}: task {c.task} asks nobody, its answers were annotated before")
    if c.noise and not OBJECTIVES[c.objective].rewarded:
        fail(f"--noise {c.noise:g}: --objective {c.objective} reads no preference (did you mean wmle?)")
    if c.pool:
        return
    if not task.pooled:
        fail(f"--no-pool: task {c.task} compares the candidates of one input only, as it is")
    if guidance_of(c).whole:
        fail(f"--no-pool: --guidance {c.guidance} is paid scores and compares no candidates")
    if c.candidates % c.K or c.candidates < 2 * c.K:  # one question of a round is held out
        fail(f"--no-pool: expected --candidates to be a multiple of --K {c.K}, and twice that at least, got "
             f"{c.candidates}")


def check_exact(c, learns):
    """All words at the first place where samples do not begin alike, or are not paid word by word."""
    if not (OBJECTIVES[c.objective].first and TASKS[c.task].pooled):
        fail(f"--exact_first: expected task prompt and --objective reinforce, got {c.task}, {c.objective}")
    if not learns or not pays_alone(c):
        fail(f"--exact_first: expected a learned reward of each token by itself and --weights immediate, got "
             f"--guidance {c.guidance}, --weights {c.weights}")


# --------------------------------------------------------------------------------------------------- the loop


def reward_phase(run):
    """First half of a round: look at fresh candidates, then learn from them. Annotated pairs are learned from
    once, and nobody is asked; where no reward is learned (bandit guidance, mle) there is nothing to do."""
    c, task = run.c, run.task
    if not run.learns_reward:
        return {}
    if task.has_pairs:
        return learn_from_pairs(run) if run.step == 0 else {}
    n_held = held_candidates(run)
    new = collect(run, inputs(run, n_held))
    figures = {"preference": new.preference.mean(), "preference_best": new.preference.max()}
    right, pairs = rank_accuracy(run.reward, new, c.agg, c.beta, c.resolution)
    figures["rank_accuracy"] = right / pairs if pairs else None  # before the fit has seen them
    keep(run, new, n_held)
    for _ in range(c.ask_again if run.step == 0 else 0):  # a judge that likes nothing is not asked for ever
        if run.fitted.stands_out(c.resolution):
            break
        keep(run, collect(run, inputs(run, n_held)), n_held)
    steps = c.reward_first if run.step == 0 else c.reward_steps
    settings = run.fit_settings(steps, fresh=None if c.replay else lambda: fresh_candidates(run))
    figures |= fit(reward=run.reward, optimizer=run.reward_optimizer, buffers=(run.fitted, run.held_out),
                   settings=settings)
    renew_normalizer(run)
    run.first_place.clear()  # of the reward before
    if c.hold and settling(run) >= 0.5 and stuck(run):  # later there is no time to learn anew
        run.restart_policy()
        run.log.say(f"step {run.step}: the policy says one prompt only, which the reward no longer pays "
                    f"most; it starts anew")
    return figures | {"buffer": len(run.fitted)}


def keep(run, new, n_held):
    """Candidates into the buffers. The last `n_held` are never fitted: they say when to stop."""
    d = run.fitted.dim
    n_fitted = new.preference.shape[d] - n_held
    run.fitted.add(new.map(lambda x: x.narrow(d, 0, n_fitted)))
    run.held_out.add(new.map(lambda x: x.narrow(d, n_fitted, n_held)))


def loop(run):
    """The alternate loop: fit the reward on fresh preferences, improve the policy with it for a while,
    repeat."""
    c, log = run.c, run.log
    while run.step < c.policy_steps:
        run.split_dropout()
        # a Ctrl-C in a fit goes back to the checkpoint before it, a later one saves first
        log.patient = False
        if run.step % c.reward_every == 0:
            log.figures("reward", run.step, reward_phase(run))
        log.patient = True
        if run.step == 0:
            evaluate(run)
        figures = run.objective.step(run)
        run.step += 1
        last = run.step == c.policy_steps
        if run.step % c.log_every == 0 or last:
            log.figures("policy", run.step, figures)
        if run.step % c.eval_every == 0 or last:
            log.say(f"{run.step:6}  " + "  ".join(f"{k} {v:.4g}" for k, v in evaluate(run).items()))
        stop = largest(log.stop)  # read once, of all processes: a Ctrl-C from here on ends the next step
        if stop or run.step % c.reward_every == 0 or last:
            run.save()
        if stop:
            raise KeyboardInterrupt
        log.progress("policy", run.step, c.policy_steps, {"loss": figures["loss"]})
    log.patient = False


# ------------------------------------------------------------------------------------------------------- main


def objective_of(c):
    """The Objective of the flags. One line for a name without one: before anything is read, let alone
    trained."""
    found = OBJECTIVES.get(c.objective)
    if not isinstance(found, Objective):
        fail(f"--objective {c.objective}: expected an Objective in train.OBJECTIVES, got {found!r}")
    return found


def check_f(c):
    """One line for an f that does not make a score a candidate of token rewards: before anything is read."""
    rewards, mask = torch.ones(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.bool)  # (1, K, T)
    try:
        got = f"scores of shape {tuple(CHOICES[c.agg](rewards, mask, c.beta).shape)} for 2 candidates"
        right = got.startswith("scores of shape (1, 2) ")
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        got, right = f"{type(error).__name__}: {error}", False
    if not right:
        fail(f"--agg {c.agg}: expected a function of aggregate.CHOICES that makes scores (..., K) of rewards "
             f"(..., K, T), mask and beta, got {got}")


def checked(c, typed):
    """(threads, reason) of flags that fit one another and this machine."""
    objective_of(c)
    check_f(c)
    check_together(c, typed)
    check_memory(TASKS[c.task].nets(c))
    return decide_threads(c.threads, TASKS[c.task].step_work(c))


def prepare(argv, log, until_end):
    """Flags -> a Run that is ready to start or to go on. Nothing but the claim of its folder is written
    before all input is read and good. until_end: a contextlib.ExitStack, which lets go of the folder at the
    end."""
    c, typed = parse_flags(Flags, argv, __doc__)
    resumed = c.init_from == "resume"
    if not resumed:  # the flags of a resumed run are in its folder
        threads, why = checked(c, typed)
    until_end.enter_context(claim_out_dir(c))
    if resumed:
        c, log.out_dir = resume_flags(c, typed), c.out_dir
    if resumed or take_sizes(c, typed):  # the flags have changed
        threads, why = checked(c, typed)
    if c.export:
        check_free(c.export, c.overwrite)
    torch.set_num_threads(threads)
    device, dtype, reason = decide_device(c)
    task = TASKS[c.task](c, device, log.progress, log.say)
    check_made(task)
    check_guidance(c, typed, TASKS[c.task], OBJECTIVES[c.objective])  # again: rows may have decided it
    threads, why = decide_threads(c.threads, task.step_work(c))  # again: the data may have decided the widths
    torch.set_num_threads(threads)
    run, saved = Run(c, task, objective_of(c), device, dtype, log), None
    if resumed:
        saved = read_torch(os.path.join(c.out_dir, "ckpt.pt"), "a checkpoint", device)
    else:
        with kept_random_state():
            warm_starts(run)
            task.begin(run.policy.eval())
    if c.compile:
        run.compile()
    run.open(saved, {"device_reason": reason, "threads_used": threads, "threads_reason": why,
                     "preset_set": preset_set(c)})
    for line in unread(c, () if resumed else typed, (*task.reads, c.objective, c.guidance)):
        log.say(line)
    size = sum(p.numel() for p in run.policy.parameters())
    log.say(f"{c.out_dir}: {c.task}, {c.objective}, {c.guidance}, seed {c.seed}; {reason}; "
            f"threads {threads} ({why}); {size / 1e6:.2f} M parameters a net")
    return run


def main(argv=None):
    """Returns the exit status."""
    tolerant_terminal()
    log, run, before = Log(), None, signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, log.interrupt)
    try:
        with contextlib.ExitStack() as until_end:
            until_end.enter_context(joined())
            log.several = world() > 1
            run = prepare(sys.argv[1:] if argv is None else argv, log, until_end)
            loop(run)
            summary = finish(run)
            if run.c.export:
                export(run.policy, run.task.tokenizer, run.c.export)
        warnings = summary.pop("warnings")
        for k, v in summary.items():
            print(f"{k:22} {v:.4f}" if isinstance(v, float) else f"{k:22} {visible(v)}")
        for line in warnings:
            print(f"warning: {visible(line)}")
        print("\n" + command("eval.py", "--out_dir", as_value(run.c.out_dir)))
    except BaseException as error:  # all, since torch.save turns a KeyboardInterrupt into a RuntimeError
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop but the line that says so
        if not isinstance(error, SystemExit):  # it has said its line
            sys.stderr = voice()
        explain(error, log, run.step if run else 0)
    finally:  # as a script nothing follows but the clean-up of libraries, which must not be interrupted
        signal.signal(signal.SIGINT, signal.SIG_IGN if argv is None else before)
    return 0


if __name__ == "__main__":
    leave(main())
