"""Tasks: text, preferences and scores. `Task` says what train.py asks of one."""
from dataclasses import dataclass

import torch

from data import Batch, cut, encode, lengths_to_mask
from model import write
from support.files import digest
from support.log import UserError


@dataclass
class Samples:
    """What train.py writes to samples.jsonl at an evaluation: K sequences for each of B inputs.

    batch        data.Batch of the B inputs
    tokens, mask (B, K, T) int64 and bool; preference (B, K) float, in the task's own units
    roles        B lists of K words: "sampled", "reference", "best", "right", "wrong fact", ...
    errors       (B, K, T) bool, True at tokens that are known to be wrong; None where nobody knows
    """
    batch: Batch
    tokens: torch.Tensor
    mask: torch.Tensor
    preference: torch.Tensor
    roles: list
    errors: torch.Tensor = None


class Task:
    """What train.py asks of a task. A new one is a subclass in a file of tasks/ and a line in train.TASKS.

    B inputs, K candidates of each, T token positions, P positions of an input. Everything is on `device`.

    A task must write three members:
    __init__(c, device, progress, say)  read all text, or raise UserError; end with `self.read(...)`, which
                                sets what is listed below. c: the flags; progress(phase, i, n, figures),
                                say(line): the log
    prefer(batch, tokens, mask)  the preference of (B, K, T) candidates: (B, K) float, higher is better. The
                                truth: --noise is added by who asks. A task with has_pairs is not asked: that
                                one writes `pairs`
    evaluate(policy, generator)  a point of the curve: {name: number}. Draws from `generator` alone

    It may write these, whose defaults work:
    batch(n, generator)         n inputs to learn from (pooled: the one there is) as a data.Batch
    pick(split, index)          the rows `index` (B,) of a split as a data.Batch
    told(tokens, preference)    what the run was told of candidates (B, K, T) that it has asked about, (B, K),
                                noise and all: nothing is done with it
    begin(policy)               what is measured once, before the loop: nothing
    finish(policy, generator)   the figures of summary.json: those of `evaluate`
    searched                    after finish: rows for searches.jsonl, what other methods reach at the same
                                cost: none
    state(), load_state(s)      what a checkpoint keeps beyond nets and random numbers, plain values or
                                tensors: {}
    fingerprint()               {part: hash} of all data: what is kept depends on it, and a resume compares
                                it
    plant(batch, tokens, mask, generator)  --planted: candidates (B, K, T) with others in the place of some of
                                them, tokens and mask: as they are
    text_batch(n, generator)    n texts as references (B, T), for --reward_warmup: None, there are none
    pairs(split)                has_pairs: tokens, mask (N, K, T), preference (N, K), context and its mask
                                (N, P), labels (N, K, T)
    judge_reward(guide)         figures of the reward alone: {}. guide(tokens, prefix, mask) -> (B, K, T)
    by_input()                  after `finish`: {figure: its value of each test input, in order}, so that runs
                                can be compared input by input: {}
    describe(batch, row)        input and reference of one row of a batch, as text
    samples(policy, generator)  what is looked at, a Samples: for three inputs a sampled sequence, and the
                                reference where there is one
    probe(guide, policy)        further rows for samples.jsonl, a list of dictionaries: []
    kept()                      tensors and plain values with which sample.py uses a run without its data:
                                the width
    reopen(c, kept, tokenizer, device)  a classmethod: the task of a finished run, without its data
    encode_inputs(rows, most, name, say)  rows of `inputs` as lists of ids, cut to `most` as training cuts
                                them: at the end
    input_width()               tokens of an input at most, in use: what the nets' positions leave
    step_work(c), nets(c)       classmethods: operations of a training step; sizes of the nets, for the
                                memory

    Class attributes:
    inputs              what an input of sample.py is: fields as data.read_rows takes them, the text first
    kind                what a sequence is, one word for the page: "prompt", "summary", ...
    pooled              whether all candidates answer the same input (prompts), so that any of them may be
                        compared
    has_references      whether inputs have a reference to imitate
    has_pairs           whether answers were annotated beforehand
    has_judge           whether a judge says how good a sequence is, which --judge may replace
    reads               names of tasks whose own flags it reads (`of` in train.Flags), for the line about
                        flags that change nothing
    defaults            {flag: value} where the task's default is not the flag's own
    paper               {flag: value} that --preset paper puts there
    reward_figures      names of what judge_reward returns that are null where no reward was learned
    figures             columns of eval.py --compare, and the first figures of a run
    curve               the score whose curve is drawn

    Instances have: tokenizer; start, the id that opens a sequence; eot, the id that ends one (None: all have
    the full width); n_ids, how many ids may be sampled; width, tokens of a sequence at most; context,
    positions of the nets; rows {split: list}, "train" among them; tensors {split: data.Batch}, empty for a
    pooled task.
    """
    kind, pooled, has_references, has_pairs, has_judge = "text", False, False, False, False
    reads, defaults, figures, reward_figures, curve, searched = (), {}, (), (), None, ()
    inputs = {"text": (("text",), str)}
    # Yang et al. (2023) and their released code, whatever the task; docs/differences.md has what is left.
    paper = {"guidance": "token", "bound": "softplus", "beta": 2.0, "clip": 5.0,
             "replay": 0, "explore": 0.0, "explore_from": "policy", "ask_again": 0,  # fresh candidates
             "head_first": 0.0,  # body and head learn together
             "resolution": 0.0, "ties": 0.0,  # preferences as they are; equal ones say nothing
             "rank_temperature": 1.0,  # E5
             "reward_warmup": 0,  # nothing is learned before the first preference
             "foreseen": False,  # E1
             "weights": "immediate", "wmle_norm": "rewards", "center": False,  # r as it is; E9
             "exact_first": False,  # E7 by samples
             "adam_beta2": 0.999,  # that of the library
             "alpha": 0.125, "hold": 0, "kl": 0.0}  # both constant; the start is free to leave

    def __init__(self, c, device, progress, say):
        raise NotImplementedError("a task writes its own __init__: all text is read there")

    def read(self, c, device, tokenizer, width, rows, tensors=None, ends=True):
        """What every task has in the end, in one call at the end of __init__.

        width    tokens of a sequence at most, end-of-text included
        ends     whether a sequence may end before; False: all have the full width
        tensors  {split: data.Batch} of the rows; None for a pooled task, whose one input is empty
        """
        self.cfg, self.device, self.tokenizer, self.width = c, device, tokenizer, width
        self.rows, self.tensors = rows, tensors or {}
        self.start = tokenizer.eot
        self.eot = tokenizer.eot if ends else None
        self.n_ids = tokenizer.size if ends else tokenizer.eot  # the last id: what never ends never says so
        longest = max((x.context.shape[1] for x in self.tensors.values() if x.context is not None), default=0)
        needed = longest + width + 1  # a start token; candidates share their positions
        self.context = max(64, needed) if self.pooled else needed

    def prefer(self, batch, tokens, mask):
        """The preference of (B, K, T) candidates: (B, K) float."""
        raise NotImplementedError

    def evaluate(self, policy, generator):
        """A point of the curve."""
        raise NotImplementedError

    def batch(self, n, generator):
        """n training inputs, drawn with replacement: one generator, so that the seed fixes the order. A
        pooled task has one input: every candidate answers the same question."""
        if self.pooled:
            return Batch(torch.zeros(1, dtype=torch.long))
        return self.pick("train", torch.randint(len(self.rows["train"]), (n,), generator=generator))

    def pick(self, split, index):
        """The rows `index` of a split as a data.Batch on the device."""
        return self.tensors[split].at(index, self.device)

    def told(self, tokens, preference):
        """Nothing to remember."""

    def begin(self, policy):
        """Nothing to measure before the loop."""

    def finish(self, policy, generator):
        """The figures of summary.json: a last point of the curve."""
        return self.evaluate(policy, generator)

    def state(self):
        """Nothing beyond networks and random numbers."""
        return {}

    def load_state(self, state):
        """The inverse of `state`."""

    def fingerprint(self):
        """{part: hash} of all data, as text and as ids: for the keys of what is kept, and for resuming."""
        own = () if self.start == self.tokenizer.eot else (self.start,)
        return {**{name: digest(rows) for name, rows in self.rows.items()},
                "tokens": digest((self.tokenizer.state(), self.tensors, self.width, *own))}

    def text_batch(self, n, generator):
        """No text beyond the rows."""

    def plant(self, batch, tokens, mask, generator):
        """Nobody else's candidates."""
        return tokens, mask

    def pairs(self, split):
        """Annotated answers, for has_pairs."""
        raise NotImplementedError

    def judge_reward(self, guide):
        """No truth about single tokens."""
        return {}

    def by_input(self):
        """No figure of single inputs."""
        return {}

    def texts(self, tokens, mask):
        """(..., T) tokens -> flat list of strings, end-of-text silent."""
        flat = zip(tokens.flatten(0, -2).tolist(), mask.sum(-1).flatten().tolist())
        return [self.tokenizer.decode(ids[:n]).strip() for ids, n in flat]

    def describe(self, batch, row):
        """Input and reference as text; "" for what there is none of."""
        said = lambda ids, mask: "" if ids is None else self.texts(ids[row][None], mask[row][None])[0]
        return said(batch.context, batch.context_mask), said(batch.reference, batch.reference_mask)

    @torch.no_grad()
    def samples(self, policy, generator, n=3):
        """A sampled sequence for each of the first n training inputs, and its reference if it has one."""
        count = 1 if self.pooled else min(n, len(self.rows["train"]))
        batch = self.batch(1, generator) if self.pooled else self.pick("train", torch.arange(count))
        tokens, mask = self.write(policy, batch, generator, n if self.pooled else 1)
        roles = [["sampled"] * tokens.shape[1] for _ in range(count)]
        if batch.reference is not None:
            tokens = torch.cat((tokens, batch.reference[:, None]), 1)  # (B, 2, T)
            mask = torch.cat((mask, batch.reference_mask[:, None]), 1)
            roles = [["sampled", "reference"]] * count
        return Samples(batch, tokens, mask, self.prefer(batch, tokens, mask), roles)

    @torch.no_grad()
    def write(self, policy, batch, generator, k=1, temperature=1.0):
        """k sequences of the policy an input of a batch: tokens, mask (B, k, T). Temperature 0 is greedy."""
        tokens, length = write(policy, self.start, self.width, generator, k, batch.prefix(), eot=self.eot,
                               n_ids=self.n_ids, temperature=temperature)
        shape = len(batch.index), k
        return tokens.view(*shape, -1), lengths_to_mask(length.view(shape), self.width)

    def probe(self, guide, policy):
        """No further rows."""
        return []

    def kept(self):
        """What sample.py cannot know from config.json: tokens of a sequence at most, whether one may end
        before, and positions of the nets."""
        return {"width": self.width, "ends": self.eot is not None, "context": self.context}

    @classmethod
    def reopen(cls, c, kept, tokenizer, device):
        """The task of a finished run from what `kept` returned, without data: enough to write and to score.

        c  the flags of its config.json as attributes
        """
        task = cls.__new__(cls)
        task.read(c, device, tokenizer, kept["width"], {}, ends=kept["ends"])
        task.context = kept["context"]
        return task

    def encode_inputs(self, rows, most, name, say):
        """Rows of `inputs` -> lists of ids; `name`: whose they are, in the line about those that were cut."""
        field = next(iter(self.inputs))
        ids = encode([row[field] for row in rows], self.tokenizer)
        return cut(ids, most, "end", name, f"{field}s", say)

    def input_width(self):
        """Tokens of an input at most: those of the longest that the nets were trained on."""
        return self.context - self.width - 1  # a start token stands between input and sequence

    @classmethod
    def step_work(cls, c):
        """Floating-point operations of a training step of the policy, forward and backward."""
        length = (c.max_document or 256) + (c.max_summary or 24)  # of embedded worlds, where none are given
        if c.data and not (c.max_document and c.max_summary):  # the data will decide, up to this
            length = max(length, c.context_limit)
        return net_work(c.n_layer, c.n_embd, c.batch_size * (c.prompt_length if cls.pooled else length))

    @classmethod
    def nets(cls, c):
        """[(flags that decide it, how many are trained, layers, width)], for a look at the memory."""
        return [("--n_layer, --n_embd", 2, c.n_layer, c.n_embd)]  # policy and reward


def net_work(layers, width, tokens):
    """6 x parameters x tokens: operations of a net's blocks, forward and backward, without embeddings."""
    return 6 * 12 * layers * width ** 2 * tokens


def check_task(task):
    """UserError for a class that lacks what a task must write, before anything is read or trained."""
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UserError(f"task {task!r}: expected a subclass of tasks.Task")
    must = ("__init__", "evaluate", "pairs" if task.has_pairs else "prefer")
    missing = [name for name in must if getattr(task, name) is getattr(Task, name)]
    if missing:
        raise UserError(f"task {task.__name__}: expected its own {', '.join(missing)}, got none "
                        f"(tasks/__init__.py says what each is)")


def check_made(task):
    """UserError for a task whose __init__ has not made what every task must have, before a net is made."""
    name = type(task).__name__
    if not hasattr(task, "tokenizer"):
        raise UserError(f"task {name}: expected its __init__ to end with self.read(...), got no tokenizer")
    if not (task.pooled or "train" in task.rows and "train" in task.tensors):
        raise UserError(f'task {name}: expected self.read(...) with rows and tensors of "train", or pooled')


def marked(pieces, spans):
    """Which tokens overlap one of some character spans (start, end, ...) of their text: pieces -> [bool]."""
    out, at = [], 0
    for piece in pieces:
        end = at + len(piece)
        out.append(any(start < end and at < stop for start, stop, *_ in spans))
        at = end
    return out
