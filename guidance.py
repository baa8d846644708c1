"""Where the policy's reward comes from: a table name -> how a reward is fitted, what of it tokens are paid.

Everything else of a run is the same for all of them, so that rows of a table differ in the credit alone.
Three things may differ:

    ends    where the fit reads r: at every token, at the last of each segment (E11), at the last of all
    fit     what it is fitted to: the order of answers (E5), labels of edits (E17), or by DPO, as a policy
    read    nothing: tokens are paid r where the fit reads it. Or a function of redistribute.py, which reads
            token rewards off the one score of an answer: then every token is paid, and nothing is learned of
            tokens
"""
from dataclasses import dataclass, field
from typing import Callable

from policy_dpo import ImplicitReward
from redistribute import attention_shares, differences
from reward import TokenReward

EVERYWHERE = lambda c: 0.0
AT_THE_LAST = lambda c: float("inf")
FITS = ("order", "labels", "policy")


@dataclass(frozen=True)
class Guidance:
    """How a reward is fitted, and what of it tokens are paid: a line of GUIDANCES.

    ends     c -> the entropy in nats at which a segment ends (E11): 0 every token, infinity the last alone
    fit      "order": Plackett-Luce on f of the rewards; "labels": E17; "policy": DPO (policy_dpo.py)
    read     (reward, tokens, mask, prefix) -> token rewards (B, K, T); None: r as it is
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
    whole: bool = False
    pairs: bool = False
    like: str = None
    flags: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.fit not in FITS:
            raise ValueError(f"fit: expected one of {', '.join(FITS)}, got {self.fit!r}")

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
    "abc": Guidance(AT_THE_LAST, read=attention_shares, like="bandit"),
    # its f is the sum, as DPO's score is; at the other rewards' rate it learns the pairs by heart
    "implicit": Guidance(fit="policy", flags={"agg": "sum", "reward_lr": 3e-4, "head_first": 0.0}),
}


def guidance_of(c):
    """The Guidance of a run's flags (or of its config.json, as attributes)."""
    return GUIDANCES[c.guidance]


def new_reward(body, start, c, n_ids):
    """The net that is fitted, on a body: r of tokens (E1, E2), or a policy beside its start (DPO)."""
    if guidance_of(c).fit == "policy":
        return ImplicitReward(body, start, c.dpo_beta, n_ids)
    return TokenReward(body, start, c.bound, foreseen=c.foreseen)
