"""What a run writes about itself: a point of the curve and samples at every evaluation, summary.json at the
end.

Looking changes nothing: evaluations draw from generators of their own, and what they ask of the task is not
part of the training budget. The figures are printed and compared by eval.py; report.py shows the samples as
coloured tokens.

`finish` also says what went wrong without an error: a reward that was never fitted, that is constant or that
orders held-out pairs by chance, and weights of wmle that are all alike.
"""
import json
import math
import os

import torch

from aggregate import aggregate
from guidance import guidance_of
from objective import first_place, near_start, weighed
from reward import ordered_pairs, rank_accuracy
from rollout import alike, annotated, answer_ends, beside_start, collect, guide_of, held_candidates, inputs
from support.distributed import from_first, place
from support.files import write_whole

# When a run says that nothing was learned: its reward has a standard deviation below CONSTANT (a new one
# about 0.002, the range is 1.313), or orders at most CHANCE of the held-out pairs rightly, of FEW at least,
# or its weights of wmle have an effective share of FLAT or more.
CONSTANT, CHANCE, FEW, FLAT = 0.01, 0.55, 20, 0.999


def evaluate(run):
    """A point of the curve and the fixed samples with their token rewards. Own generators: looking changes
    nothing."""
    draw = lambda i: torch.Generator(run.device).manual_seed(run.c.seed + i)
    figures = run.task.evaluate(run.policy.eval(), draw(0))
    rows = sample_rows(run, run.task.samples(run.policy, draw(1)))
    rows += [{"step": run.step, **row} for row in run.task.probe(guide_of(run), run.policy)]
    path = os.path.join(run.c.out_dir, "samples.jsonl") if place() == 0 else os.devnull
    with open(path, "a", encoding="utf-8") as f:
        f.write("".join(json.dumps(row) + "\n" for row in rows))
    run.log.figures("eval", run.step, figures)
    return figures


# ---------------------------------------------------------------------------------------------- samples.jsonl


@torch.no_grad()
def sample_rows(run, samples):
    """A row a sequence for samples.jsonl: tokens with their rewards, weights and log-ratios, the sequence's
    preference and score. Rows of equal `step` and `group` answer the same input."""
    task, rows, prefix = run.task, [], samples.batch.prefix()
    rewards = run.reward.guide(samples.tokens, prefix)
    scores = shown_scores(run, samples, rewards)
    if guidance_of(run.c).read is not None:  # tokens are paid what is read off r, not r itself
        rewards = guide_of(run)(samples.tokens, prefix, samples.mask)
    columns = {"rewards": rewards, "weights": shown_weights(run, samples, rewards, scores),
               "log_ratio": log_ratios(run, samples), "errors": samples.errors}  # (B, K, T) each, or None
    for b, roles in enumerate(samples.roles):
        context, reference = task.describe(samples.batch, b)
        for k, role in enumerate(roles):
            mask = samples.mask[b, k]
            ids = samples.tokens[b, k][mask].tolist()
            numbers = {name: None if x is None else plain(x[b, k][mask]) for name, x in columns.items()}
            rows.append({"step": run.step, "kind": task.kind, "group": str(b), "role": role,
                         "context": context, "reference": reference, "tokens": task.tokenizer.pieces(ids),
                         **numbers, "preference": plain(samples.preference[b, k]),
                         "score": plain(scores[b, k]), "text": task.tokenizer.decode(ids)})
    return rows


def plain(x):
    """A tensor as json takes it: four digits of a number, null where it is none."""
    if x.dim():
        return [plain(y) for y in x]
    if x.dtype == torch.bool:
        return x.item()
    return round(x.item(), 4) if math.isfinite(x.item()) else None


def shown_weights(run, samples, rewards, scores):
    """(B, K, T): what the objective gives each token of the shown sequences, None for one that reads no
    reward.  rewards (B, K, T), scores (B, K): those that are shown

    reinforce  after the price of leaving the start and shaping, with --center standardised over the shown
               sequences, 0 at a first place that is learned without samples (--exact_first); under bandit
               guidance the preference, z-scored over them
    wmle       w of E9 after shaping
    ppo        the advantage before whitening
    """
    if not run.objective.rewarded:
        return None
    if not run.learns_reward:
        rewards = alike(run, samples.preference, samples.mask)
    elif guidance_of(run.c).whole:
        rewards = alike(run, scores, samples.mask)
    elif run.stays_near:
        rewards, _ = near_start(run, samples.batch, samples.tokens, samples.mask, rewards)
    weights, _ = first_place(run, rewards, samples.mask, weighed(run, rewards, samples.mask))
    return run.objective.shown(run, samples, weights) if run.objective.shown else weights


def log_ratios(run, samples):
    """(B, K, T): log pi - log pi_start of each token, in nats."""
    now, start = beside_start(run, samples.batch, samples.tokens, samples.mask)
    return (now - start).view_as(samples.mask)


def shown_scores(run, samples, rewards):
    """(B, K): f of r (B, K, T), read where the fit of this run's guidance reads it."""
    ends = answer_ends(run, samples.tokens, samples.mask, samples.batch.prefix())
    return aggregate(rewards, ends, run.c.agg, run.c.beta)


# ------------------------------------------------------------------------------------------------- accuracies


@torch.no_grad()
def held_out_pairs(run):
    """(right, pairs) of summary.json's rank_accuracy: fresh candidates of the final policy, none of which was
    ever fitted, of training rows whose candidates never were either (but where the rows were too few to keep
    some). Eight times as many as a round has, but no more rounds than make 256. By the true preference,
    whatever --noise."""
    c, queries = run.c, run.task.state()
    streams = {k: v.get_state() for k, v in run.generators.items()}
    n = c.candidates if held_candidates(run) else 0
    found = [rank_accuracy(run.reward, collect(run, inputs(run, n), exact=True), c.agg, c.beta,
                           c.resolution) for _ in range(max(1, min(8, 256 // c.candidates)))]
    run.task.load_state(queries)  # an examination, not part of the training budget
    for k, v in streams.items():
        run.generators[k].set_state(v)
    return tuple(map(sum, zip(*found)))


def share(right, pairs):
    """right / pairs, None where there are no pairs."""
    return right / pairs if pairs else None


def credit_figures(run):
    """Figures of the learned reward alone, as the task judges it. Where a whole answer is paid one number
    there is no credit of tokens to compare with the truth: null."""
    figures = run.task.judge_reward(guide_of(run))
    none = {"credit_truth": None} if "credit_truth" in figures else {}
    return figures | none if guidance_of(run.c).whole else figures


def examined(run):
    """What the learned reward is worth in the end: (right, pairs) of its rank accuracy, further figures, and
    the Candidates that were held out of its fits. (0, 0), nulls and None where no reward was learned.

    The accuracy is that of fresh candidates (`held_out_pairs`), in summary.json and in a warning alike: those
    held out have chosen the weights that were kept. Whether r is constant is a question to the latter, which
    are of all rounds: a settled policy says the same words again and again, and they may all be good.
    """
    c, task = run.c, run.task
    if not run.learns_reward:
        return (0, 0), dict.fromkeys(task.reward_figures), None
    if not task.has_pairs:
        return held_out_pairs(run), credit_figures(run), run.held_out.data
    x = annotated(run, "test")
    ordered = rank_accuracy(run.reward, x, c.agg, c.beta, c.resolution)
    by_length = ordered_pairs(x.mask.sum(-1).float(), x.preference)  # what "longer is better" would reach
    figures = {"length_rank_accuracy": share(*by_length)} | credit_figures(run)
    return ordered, figures, x


# --------------------------------------------------------------------------------------------------- warnings


def logged(run):
    """{phase: its rows} of all that this run has logged, all legs of a resumed run together."""
    def phases():
        found = {"reward": [], "policy": []}
        with open(os.path.join(run.c.out_dir, "metrics.jsonl"), encoding="utf-8") as f:
            for row in map(json.loads, f):
                found.setdefault(row["phase"], []).append(row)
        return found
    return from_first(phases)


def warnings(run, ordered, x):
    """What reward and weights did not learn, a sentence each.  ordered, x: see `examined`."""
    log = logged(run)
    of_reward = reward_warnings(run, ordered, x, log["reward"]) if run.learns_reward else []
    return of_reward + policy_warnings(run, log["policy"])


def reward_spread(run, x):
    """Standard deviation of r over the tokens of some Candidates that it is read at."""
    parts = [x.map(lambda t: t[i]) for i in torch.arange(len(x.tokens)).split(256)]
    rewards = [run.reward.guide(part.tokens, part.prefix())[part.read_at()] for part in parts]
    return torch.cat(rewards).std(correction=0).item()


def reward_warnings(run, ordered, x, rows):
    """What a learned reward did not learn, as at most one sentence in a list.

    ordered  (right, pairs) behind rank_accuracy;  x: held-out Candidates, or None where there are none
    rows     what was logged of its fits
    """
    c, task = run.c, run.task
    body = "--sft_steps" if task.has_references else "--reward_warmup"  # what its body knows beforehand
    fits = [row["reward_fit_steps"] for row in rows if "reward_fit_steps" in row]
    asked = c.reward_first + c.reward_steps * (len(fits) - 1)  # steps, unless every candidate ties
    if asked and not any(fits):
        more = "answers whose scores differ" if task.has_pairs else "more --candidates"
        return [f"The reward was never fitted: no two candidates of an input differed by --resolution "
                f"{c.resolution:g}. Try a smaller --resolution, or {more}."]
    seen = x is not None and x.read_at().any()
    if seen and (spread := reward_spread(run, x)) < CONSTANT:
        return [f"The reward is constant: over held-out tokens it has a standard deviation of {spread:.4f} "
                f"(below {CONSTANT:g}), so it guides nothing. Try more steps (--reward_first) or a larger "
                f"--reward_lr."]
    right, pairs = ordered
    if not pairs or right / pairs > CHANCE:
        return []
    more = "more preferences (more rows)" if task.has_pairs else "more preferences (--candidates)"
    said = f"The reward orders {right / pairs:.2f} of {pairs:.0f} held-out pairs rightly (rank_accuracy)"
    if pairs < FEW:
        return [f"{said}: too few to say whether it has learned anything. Try {more}."]
    return [f"{said}, and 0.5 is chance. Try {more}, more steps (--reward_first), or a body that knows more "
            f"words before ({body})."]


def policy_warnings(run, rows):
    """A weighted MLE whose weights are all alike is plain MLE, whatever it is called: `share` of its log
    lines, `rows`, is 1."""
    flat = [row["share"] for row in rows if "share" in row and run.objective.rewarded]
    if not flat or min(flat) < FLAT:
        return []
    return [f"The weights of {run.c.objective} were flat from beginning to end (effective share of the "
            f"tokens {min(flat):.4f}), so this run is plain MLE. Try more steps of the reward "
            f"(--reward_first), or other --weights."]


# ---------------------------------------------------------------------------------------------------- the end


def finish(run):
    """summary.json, written last: its presence says that the run ended well."""
    c, task = run.c, run.task
    final = task.finish(run.policy.eval(), torch.Generator(run.device).manual_seed(c.seed + 2))
    if task.searched:
        lines = "".join(json.dumps(row) + "\n" for row in task.searched)
        write_whole(os.path.join(c.out_dir, "searches.jsonl"), lines.encode())
    ordered, figures, held_out = examined(run)
    count = lambda net: sum(p.numel() for p in net.parameters() if p.requires_grad)
    summary = {"task": c.task, "objective": c.objective, "guidance": c.guidance, "agg": c.agg, "seed": c.seed,
               "seconds": run.log.seconds(), "device": str(run.device), "params_policy": count(run.policy),
               "params_reward": count(run.reward), "rank_accuracy": share(*ordered), **final, **figures,
               "warnings": warnings(run, ordered, held_out)}
    if scores := task.by_input():
        write_whole(os.path.join(c.out_dir, "scores.json"), (json.dumps(scores) + "\n").encode())
    write_whole(os.path.join(c.out_dir, "summary.json"), (json.dumps(summary, indent=1) + "\n").encode())
    return summary
