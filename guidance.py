"""Where the policy's reward comes from: a table name -> how a reward is fitted, what of it tokens are paid.

Everything else of a run is the same for all of them, so that rows of a table differ in the credit alone.
Three things may differ:

    ends    where the fit reads r: at every token, at the last of each segment (E11), at the last of all
    fit     what it is fitted to: the order of answers (E5), labels of edits (E17), or by DPO, as a policy
    read    nothing: tokens are paid r where the fit reads it. Or a function of redistribute.py, which reads
            token rewards off the one score of an answer: then every token is paid, and nothing is learned of
            tokens

`check_guidance` says in one line which flags do not go with one.
"""
import functools
from dataclasses import dataclass, field
from typing import Callable

from policy_dpo import ImplicitReward, implicit_loss
from redistribute import attention_shares, differences
from reward import TokenReward, compiled_rank, label_loss, rank, ranking_loss
from support.log import fail

EVERYWHERE = lambda c: 0.0
AT_THE_LAST = lambda c: float("inf")


def ranked(c):
    """Plackett-Luce on f of the rewards, by the flags."""
    one = compiled_rank() if c.compile else rank
    settings = {"agg": c.agg, "beta": c.beta, "ties": c.ties, "temperature": c.rank_temperature}
    return functools.partial(ranking_loss, **settings, rank=one)


# What a reward can be fitted to: name -> flags -> loss (reward, candidates, subsets) -> scalar.
FITS = {"order": ranked, "labels": lambda c: label_loss, "policy": lambda c: implicit_loss}


@dataclass(frozen=True)
class Guidance:
    """How a reward is fitted, and what of it tokens are paid: a line of GUIDANCES.

    ends     c -> the entropy in nats at which a segment ends (E11): 0 every token, infinity the last alone
    fit      "order": Plackett-Luce on f of the rewards; "labels": E17; "policy": DPO (policy_dpo.py)
    read     (reward, tokens, mask, prefix) -> token rewards (B, K, T); None: r as it is
    causal   whether what a token is paid hangs on itself and what stands before it (asked where all are paid)
    whole    one number pays a whole answer; where the task can be asked it is the preference itself, and no
             reward is fitted
    pairs    only tasks with annotated answers have it
    like     the guidance whose fit this is, to the bit: both share what is kept
    flags    {flag: value} in the place of a task's defaults

    Raises ValueError on an unknown `fit`, when the table is made.
    """
    ends: Callable = EVERYWHERE
    fit: str = "order"
    read: Callable = None
    causal: bool = True
    whole: bool = False
    pairs: bool = False
    like: str = None
    flags: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.fit not in FITS:
            raise ValueError(f"fit: expected one of {', '.join(FITS)}, got {self.fit!r}")

    @property
    def bounded(self):
        """Whether a token is paid r itself (E2), and not what was read off it or a log-ratio."""
        return self.read is None and self.fit != "policy"

    @property
    def dense(self):
        """Whether every token has a reward of its own."""
        return self.read is not None or self.ends is EVERYWHERE


GUIDANCES = {
    "token": Guidance(),
    "bandit": Guidance(AT_THE_LAST, whole=True),
    "segment": Guidance(lambda c: c.segment_entropy, pairs=True),
    "edits": Guidance(fit="labels", pairs=True),
    "red": Guidance(AT_THE_LAST, read=differences, like="bandit"),
    "abc": Guidance(AT_THE_LAST, read=attention_shares, causal=False, like="bandit"),
    # its f is the sum, as DPO's score is; at the other rewards' rate it learns the pairs by heart
    "implicit": Guidance(fit="policy", flags={"agg": "sum", "reward_lr": 3e-4, "head_first": 0.0}),
}


def guidance_of(c):
    """The Guidance of a run's flags (or of its config.json, as attributes)."""
    return GUIDANCES[c.guidance]


def pays_alone(c):
    """Whether each token is paid for itself, whatever follows: then a place can be learned from the reward of
    every word (--exact_first)."""
    how = guidance_of(c)
    return how.dense and how.causal and c.weights == "immediate"


def new_reward(body, start, c, n_ids):
    """The net that is fitted, on a body: r of tokens (E1, E2), or a policy beside its start (DPO)."""
    if guidance_of(c).fit == "policy":
        return ImplicitReward(body, start, c.dpo_beta, n_ids)
    return TokenReward(body, start, c.bound, foreseen=c.foreseen)


def check_guidance(c, typed, task, objective):
    """Ends with one line where flags do not go with their guidance.

    typed            the flags given by hand, which must not ask for what has no effect
    task, objective  the Task and the Objective of the flags. A guidance of None stands for what rows of task
                     edits decide: token or edits
    """
    how, has_pairs = GUIDANCES.get(c.guidance, GUIDANCES["token"]), task.has_pairs
    samples = objective.source == "samples"
    if how.pairs and not has_pairs:
        others = ", ".join(name for name, x in GUIDANCES.items() if not x.pairs)
        fail(f"--guidance {c.guidance}: expected one of {others} for task {c.task}, which has no annotated "
             f"answers")
    if how.whole and not samples:
        fail(f"--guidance {c.guidance} scores samples of the policy: it needs --objective reinforce or ppo")
    if (how.read or how.fit == "policy") and not samples:
        fail(f"--guidance {c.guidance} pays some tokens less than nothing, and weights of references are "
             f"positive: it needs --objective reinforce or ppo")
    if not (how.dense or how.whole) and not objective.critic:
        fail(f"--guidance {c.guidance} of task {c.task} reads a learned reward at some tokens only: it needs "
             f"--objective ppo")
    if how.fit == "policy" and c.agg != "sum":
        fail(f"--agg {c.agg}: --guidance {c.guidance} is fitted to a sum of log-ratios (did you mean sum?)")
    if "dpo_beta" in typed and how.fit != "policy":
        fail(f"--dpo_beta {c.dpo_beta:g}: expected --guidance implicit, got {c.guidance}")
    ranks = how.fit == "order" and (has_pairs or not how.whole)  # a task that is asked: bandit fits nothing
    for name, what in (("ties", "ties could add to"), ("rank_temperature", "has a temperature")):
        if name in typed and getattr(c, name) and not ranks:
            fail(f"--{name} {getattr(c, name):g}: --guidance {c.guidance} of task {c.task} fits no ranking, "
                 f"which {what}")
    fits = objective.rewarded and (has_pairs or not how.whole)
    if "head_first" in typed and c.head_first and not (fits and how.fit != "policy"):
        fail(f"--head_first {c.head_first:g}: expected a fit of a body and a head, which --guidance "
             f"{c.guidance} of --objective {c.objective} has not")
    check_groups(c, task, objective, how.whole)
    if c.returns == "min":
        check_min(c, typed, how, objective)


def check_min(c, typed, how, objective):
    """The least of what follows: of rewards at every token, and without E15's two numbers."""
    if not objective.critic:
        fail(f"--returns min: expected --objective ppo, got {c.objective}")
    if not how.dense:
        fail(f"--returns min is the least of the rewards of tokens: --guidance {c.guidance} pays few of them")
    for name in ("gamma", "lam"):
        if name in typed:
            fail(f"--{name} {getattr(c, name):g}: --returns min sums nothing that it could discount")


def check_groups(c, task, objective, whole):
    """What samples of one input are compared with, and how many there are. A critic compares them itself."""
    samples = objective.source == "samples"
    if c.baseline != "batch" and not (whole and samples and not objective.critic):
        fail(f"--baseline {c.baseline} compares whole answers: it needs --objective reinforce and --guidance "
             f"bandit")
    if c.group_size > 1 and (task.pooled or not samples):
        why = "answers one input" if samples else "learns from references"
        fail(f"--group_size {c.group_size}: this run {why}")
    if c.batch_size % c.group_size:
        fail(f"--batch_size {c.batch_size}: expected a multiple of --group_size {c.group_size}")
    if c.baseline != "batch" and not task.pooled and c.group_size < 2:
        fail(f"--baseline {c.baseline}: expected a --group_size of at least 2, so that an answer has others "
             f"to be compared with")
