"""The token reward r(s, a): a number for every token, learned from preferences between sequences (E1-E6).

A transformer body reads prefix and candidate; a small head turns the state that has just READ a_t into r_t
(no shift). The fit scores K candidates of the same input, aggregates each one's rewards with f and asks that
the order of the K scores be the order of the preferences (Plackett-Luce). Nobody ever labels a token.

Asking for preferences is the expensive part. The released code draws fresh candidates for every step and
throws the answers away; here scored candidates stay in a bounded buffer and serve many steps and many
K-subsets (`--replay 0` gives the strictly on-policy original). Three details make that work, each with its
reason where it stands: differences below a resolution are ties, subsets hold at least one strict pair, and
some candidates are never fitted, to see when to stop.

Where a reward is read is a mask of its own, `ends`: every token (token guidance), the last token of every
segment that the starting policy finds hard to go on from (segment), the last token of all (bandit): E11, E12.
Where an annotator's edits are at hand, tokens have labels after all (E17), and `label_loss` takes the place
of the ranking.
"""
import contextlib
import copy
import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from aggregate import aggregate
from data import trim
from model import apart, descend, evaluating, read_candidates
from plackett_luce import plackett_luce_loss
from support.distributed import from_first

HEAD_RATE = 3  # times the learning rate, while the head alone learns: few weights, from states that stay
# Of logits, see `out_of_reach`: r between 0.0003 and 1.313. At 4 words that nobody had scored were kept so
# near the others that one of them rose (SST-2 and AG News, a seed each).
LIMIT = 8.0
MEMBERS = 64  # of one pool, that a step compares
LATEST = 64  # of a pool: those that half of them come from, some rounds of the prompt task
LEAST_HELD = 8  # candidates of one pool that are held out, before a loss on them says when to stop


def soft_clamps(x, eps=1e-8):
    """E2 as the paper has it: two nested soft clamps, range (0, 1.313), NOT [0, 1]; 0.549 at 0."""
    return eps + F.softplus(1.0 - F.softplus(1.0 - x) - eps)


BOUNDS = {"softplus": soft_clamps, "sigmoid": torch.sigmoid}  # name -> b; --bound reads the names


def bound(x, how="softplus"):
    """b(x) of E2 by a name of BOUNDS: positive, so that E9 can normalise by a sum; monotone, so that the
    better token stays it. ValueError on an unknown name."""
    if how not in BOUNDS:
        raise ValueError(f"how: expected one of {', '.join(BOUNDS)}, got {how!r}")
    return BOUNDS[how](x)


class TokenReward(nn.Module):
    """r_phi(s_t, a_t) for every token of K candidates: body + Linear, ReLU, Linear + bound (E1, E2).

    foreseen  whether the head sees, beside the state that has read a_t, the logit that the body had for a_t
              before. Whether a word is one of the document is a comparison of words, which a small body would
              have to learn from preferences between sequences; one that writes (a warm start) has learned to
              copy, and its state before a_t says already which word should come
    """
    at_once = 0  # sequences a pass (0: all)

    def __init__(self, body, start, how="softplus", width=256, foreseen=False):
        super().__init__()
        self.body, self.start, self.how, self.foreseen = body, start, how, foreseen
        self.mlp = nn.Sequential(nn.Linear(body.config.n_embd + foreseen, width), nn.ReLU(),
                                 nn.Linear(width, 1))
        for layer in (self.mlp[0], self.mlp[2]):  # almost constant: tokens start at b(0), the loss at log K!
            nn.init.xavier_uniform_(layer.weight, gain=1e-2)
            nn.init.zeros_(layer.bias)

    @property
    def bodies(self):
        """The nets that a warm start is loaded into."""
        return [self.body]

    @contextlib.contextmanager
    def head_alone(self, optimizer):
        """Meanwhile the body stays what it is, and the head learns HEAD_RATE times as fast."""
        group = optimizer.param_groups[0]
        rate = group["lr"]
        group["lr"] = HEAD_RATE * rate
        self.body.requires_grad_(False)
        try:
            yield
        finally:
            self.body.requires_grad_(True)
            group["lr"] = rate

    def forward(self, tokens, context=None):
        """tokens (B, K, T), context None or (tokens (B, P), mask (B, P)) -> rewards (B, K, T), float32."""
        return bound(self.logits(tokens, context), self.how)

    def logits(self, tokens, context=None):
        """The same before the bound. Processes share it out; what is made of the rewards, the whole loss of
        a fit, each of them makes of all."""
        return apart(self._read, context, tokens, most=self.at_once)

    def _read(self, context, tokens):
        """The context is read once for its K candidates, in the layout of `model.read_candidates`, here as in
        the policy."""
        predict, read = read_candidates(self.body, tokens, self.start, context)  # (B, K, T, D)
        if self.foreseen:
            logit = (predict * self.body.head[tokens]).sum(-1, keepdim=True)  # (B, K, T, 1)
            read = torch.cat((read, logit), -1)  # (B, K, T, D + 1)
        return self.mlp(read).squeeze(-1).float()

    @torch.no_grad()
    def guide(self, tokens, context=None):
        """The same numbers as constants, in eval mode: a reward that guides must not be noisy with
        dropout."""
        with evaluating(self):
            return self(tokens, context)


@dataclass
class Candidates:
    """B groups of K scored sequences: tokens, mask (B, K, T), preference (B, K), context (B, P) and mask or
    None.

    labels (B, K, T): -1, 0, +1 of E17, or None; ends (B, K, T) bool: where rewards are read, None for every
    token.
    """
    tokens: torch.Tensor
    mask: torch.Tensor
    preference: torch.Tensor
    context: torch.Tensor = None
    context_mask: torch.Tensor = None
    labels: torch.Tensor = None
    ends: torch.Tensor = None

    def read_at(self):
        """The tokens whose rewards count, (B, K, T) bool."""
        return self.mask if self.ends is None else self.ends

    def prefix(self):
        """The context as `TokenReward` takes it."""
        return trim(self.context, self.context_mask)

    def map(self, function):
        """A new Candidates with `function` applied to every tensor that is there."""
        parts = [getattr(self, f.name) for f in fields(self)]
        return Candidates(*[None if x is None else function(x) for x in parts])


class Buffer:
    """The most recent scored candidates, oldest out first. Widths are the task's own and never change.

    pooled=True   all candidates answer the same input (the prompt task): one group that grows, along K
    pooled=False  every group has its own input (a document) or was a question by itself (--no-pool): a list
                  of groups that grows, along B
    """

    def __init__(self, size, pooled):
        self.size, self.dim, self.data = size, 1 if pooled else 0, None

    def __len__(self):
        """Members (pooled) or groups."""
        return 0 if self.data is None else self.data.preference.shape[self.dim]

    def add(self, new):
        """Append a Candidates along the growing dimension and keep the last `size`."""
        old = self.data
        if old is not None:
            both = lambda name: (getattr(old, name), getattr(new, name))
            new = Candidates(*[None if a is None else torch.cat((a, b), self.dim) for a, b in
                               (both(f.name) for f in fields(new))])
        extra = max(0, new.preference.shape[self.dim] - self.size)
        self.data = new.map(lambda x: x.narrow(self.dim, extra, x.shape[self.dim] - extra))

    @property
    def telling(self):
        """Whether a loss on it says something of others. Groups do; of a pool it takes some candidates: two
        or four of them, one of which is good, call a wrong reward right, and every later fit is taken
        back."""
        return len(self) >= (LEAST_HELD if self.dim == 1 else 1)

    def stands_out(self, resolution):
        """Whether a candidate is better than a quarter of all by more than a step of --resolution, or three
        are by one: a single step may be noise, and a reward fitted to noise asks about nothing else. Without
        a --resolution any difference does."""
        differs = self.differs(resolution)
        if resolution == 0 or not differs:
            return differs
        q = ranks(self.data.preference, resolution)
        above = q - q.flatten().quantile(0.25, interpolation="lower")
        return bool(above.max() >= 2) or int((above > 0).sum()) >= 3

    def differs(self, resolution):
        """Whether two candidates that may be compared have different preferences: else nothing is learned."""
        q = None if self.data is None else ranks(self.data.preference, resolution)
        return q is not None and bool((q.amax(1) > q.amin(1)).any())

    def draw(self, n, k, generator, resolution=0.0, ties=False):
        """(candidates, subsets): what a step scores, and up to n groups of k of it, each with a strict pair.

        pooled: `some_members` are drawn and compared in n random subsets (n, k) of them, as in the paper,
        whose 16 prompts make 64 subsets. A member that meets itself ties: nothing is learned from that.
        Otherwise: groups of K' candidates, each compared within itself: all of them where k is K', else
        random subsets of k; with `ties` some in which all tie as well (`some_groups`). None when there is no
        strict pair.
        """
        if self.data is None:
            return None
        d, q = self.data, ranks(self.data.preference, resolution).cpu()  # drawn where the generator lives
        if self.dim == 1:
            m, place = some_members(q[0], generator).unique(return_inverse=True)  # scored once, however often
            subsets = place[torch.randint(len(place), (4 * n, k), generator=generator)]
            q, batch = q[:, m], d.map(lambda x: x[:, m])
            useful = q[0][subsets].amax(1) > q[0][subsets].amin(1)
            subsets = subsets[useful][:n]
        else:
            g = some_groups(q, n, generator, ties)
            q, batch = q[g], d.map(lambda x: x[g])
            subsets = own_subsets(q, k, generator, ties)
        if not len(subsets):
            return None
        # the rest is padding, half of the work where answers are short
        longest = max(1, int(batch.mask.sum(-1).max()))
        batch = batch.map(lambda x: x[..., :longest] if x.dim() == 3 else x)
        return replace(batch, preference=q.to(d.preference.device)), subsets


def some_members(q, generator):
    """MEMBERS of a pool with ranks q (N,), one after the other as they were asked about -> row numbers, with
    repetition: half of them out of all, half out of the LATEST.

    Every LEVEL of preference comes equally often: most random prompts are equally useless, and a fair draw
    would compare them with one another all day. The latest are what the policy says now. Among all of 700
    members each of them would be drawn once in the twenty steps of a fit, and a policy that is paid for words
    that the reward has never seen beside others moves faster than that: to words that were not told to be
    useless yet, and from there to the next ones.
    """
    def fair(part):
        _, level, count = part.unique(return_inverse=True, return_counts=True)
        return (1.0 / count[level].float()).multinomial(MEMBERS // 2, replacement=True, generator=generator)
    before = max(0, len(q) - LATEST)
    return torch.cat((fair(q), before + fair(q[before:])))


def some_groups(q, n, generator, ties=False):
    """Which groups a step compares: ranks q (N, K) -> up to n numbers of those with a strict pair.

    ties  as many again of those in which all tie. In larger groups ties come along with strict pairs; of two
          candidates they are a whole answer, "equal", and most of what pairs say while few prompts are good
    """
    strict = q.amax(1) > q.amin(1)

    def some(which, n):
        rows = which.nonzero().squeeze(1)
        return rows[torch.randint(max(1, len(rows)), (min(n, len(rows)),), generator=generator)]
    g = some(strict, n)
    return torch.cat((g, some(~strict, len(g)))) if ties else g


def own_subsets(q, k, generator, ties=False):
    """Which k of its K candidates a group compares: ranks q (n, K) -> (up to n, k) places in q.flatten(),
    each subset with a strict pair, or with `ties` of a group that has none. Without a choice (k = K) that is
    row i for group i, and no random number is drawn."""
    places = torch.arange(q.numel()).view(q.shape)
    if k == q.shape[1]:
        return places
    # (4, n, k): many subsets may tie
    chosen = torch.rand(4, *q.shape, generator=generator).argsort(-1)[..., :k]
    subsets = places.expand(4, -1, -1).gather(-1, chosen).flatten(0, 1)  # (4 n, k)
    of = q.flatten()[subsets]
    useful = of.amax(1) > of.amin(1)  # (4 n,)
    if ties:
        useful |= (q.amax(1) == q.amin(1)).repeat(4)
    return subsets[useful][:len(q)]


def ranks(preference, resolution):
    """Preferences in whole multiples of `resolution` (0: as they are). Rounded and not compared by their
    distance, so that ties are transitive; two close ones on either side of a half stay apart."""
    return preference if resolution == 0 else (preference / resolution).round()


def segment_ends(entropy, mask, threshold):
    """E11: a segment ends where the next token is hard to foresee. All (..., T): float, bool -> bool.

    entropy  of the starting policy's next-token distribution AFTER token t, in nats
    The last token always ends one. Threshold 0 makes every token a segment, a huge one a single segment. The
    papers' code closes the last segment before end-of-text; here stopping is an action like any other and
    answers for itself.
    """
    last = mask & ~F.pad(mask[..., 1:], (0, 1))
    return mask & (last | (entropy.clamp(min=0) >= threshold))


def label_loss(reward, batch, subsets=None):
    """E17: binary cross-entropy of the reward's logits, targets 1 for tokens put in, 0 for tokens taken out,
    1/2 for kept ones. Mean over the changed tokens of the batch, plus a tenth of the mean over its kept ones:
    in one mean with ten times as many neutral tokens, the few changes that need a look at the prompt are not
    learned within a thousand steps. `subsets` has no use: where tokens have labels nothing is compared."""
    x, target = reward.logits(batch.tokens, batch.prefix()), (batch.labels + 1) / 2
    each = F.binary_cross_entropy_with_logits(x, target.to(x.dtype), reduction="none")
    changed = batch.mask & (batch.labels != 0)
    # divisor: tokens of that sort
    mean = lambda which: torch.where(which, each, 0.0).sum() / which.sum().clamp(min=1)
    return mean(changed) + 0.1 * mean(batch.mask & ~changed)


def rank(rewards, mask, preference, agg, beta, ties=0.0, temperature=1.0):
    """E3-E6: rewards, mask (n, K, T), preference (n, K) -> scalar. Fifty tiny kernels, few with --compile.

    ties         weight of `tie_loss` beside the ranking, which leaves tied candidates unordered
    temperature  of Plackett-Luce, in units of score. Rewards are bounded (E2): at 1 a word that is worth all
                 it can be, 1.3, has the better one of five candidates come first one time in two, and the
                 loss pays the words around it too, until they are all at the bound
    """
    scores = aggregate(rewards, mask, agg, beta) / temperature
    loss = plackett_luce_loss(scores, preference)
    return loss + ties * tie_loss(scores, preference) if ties else loss


def tie_loss(scores, preference):
    """What ties say: where the preference is the same, neither candidate has what the other lacks.

    scores, preference (n, K) -> scalar: the cross-entropy of a Bradley-Terry pair with half a win for each,
    less its minimum log 2, so that equal scores cost 0; mean over the tied pairs.

    The ranking alone cannot tell "mood" from what stands behind it: once a cue word is in the prefix, a
    reward that pays every later token explains the order of all prompts as well as one that pays the cue.
    Prompts that tie do tell: the cue at the first place is worth no more than at the last.
    """
    tied = (preference[:, :, None] == preference[:, None, :]).triu(1)  # (n, K, K)
    gap = scores[:, :, None] - scores[:, None, :]
    each = (F.softplus(gap) + F.softplus(-gap)) / 2 - math.log(2.0)
    return torch.where(tied, each, 0.0).sum() / tied.sum().clamp(min=1)  # divisor: tied pairs


@functools.cache
def compiled_rank():
    """`rank` through torch.compile: one for the whole process, or every fit would compile its own."""
    return torch.compile(rank, dynamic=True)


def ranking_loss(reward, batch, subsets, agg, beta, ties=0.0, temperature=1.0, rank=rank):
    """f and Plackett-Luce: Candidates (B, K', T), scored once, in subsets (n, K) of their B*K' -> scalar."""
    x = reward.logits(batch.tokens, batch.prefix()).flatten(0, 1)  # (B*K', T)
    rewards = bound(x, reward.how)
    mask, preference = batch.read_at().flatten(0, 1), batch.preference.flatten()
    loss = rank(rewards[subsets], mask[subsets], preference[subsets], agg, beta, ties, temperature)
    return loss + ties * out_of_reach(x, mask) if ties else loss


def out_of_reach(logits, mask):
    """A tenth of the squared distance of logits from [-LIMIT, LIMIT]: (N, T), mask -> scalar, mean over the
    tokens. Scores are all equal, as ties want them, where all rewards are at an end of their range; at a
    logit of -14 the gradient is a millionth, and a fit that went there on a wrong word's account stays."""
    beyond = F.relu(logits.abs() - LIMIT).square()
    return 0.1 * torch.where(mask, beyond, 0.0).sum() / mask.sum().clamp(min=1)  # divisor: tokens


def ordered_pairs(scores, preference):
    """How many strictly ordered pairs the scores order rightly (tied scores half), and how many there are."""
    strict = preference[:, None, :] < preference[:, :, None]  # (B, K, K): j is worse than i
    gap = scores[:, :, None] - scores[:, None, :]
    right = (gap > 0).float() + 0.5 * (gap == 0).float()
    return (right * strict).sum().item(), strict.sum().item()


@torch.no_grad()
def rank_accuracy(reward, batch, agg, beta, resolution=0.0):
    """(right, pairs) of a reward net on Candidates, in eval mode; right / pairs is 0.5 by chance."""
    right, pairs = 0, 0
    for rows in torch.arange(len(batch.tokens)).split(256):  # a whole test set at once would not fit
        part = batch.map(lambda x: x[rows])
        scores = aggregate(reward.guide(part.tokens, part.prefix()), part.read_at(), agg, beta)
        more_right, more_pairs = ordered_pairs(scores, ranks(part.preference, resolution))
        right, pairs = right + more_right, pairs + more_pairs
    return right, pairs


@dataclass
class FitSettings:
    """How a reward is fitted. The names are those of train.py's flags where there is one.

    steps        Adam steps at most
    loss         (reward, candidates, subsets) -> scalar: `ranking_loss` with its f, or `label_loss`
    generator    which groups a step compares
    groups, K    of a step: groups, and candidates in each; resolution: of preferences, see `ranks`
    ties         whether groups in which all tie are drawn too, which a loss with a weight of ties reads
    clip         gradient norm at most
    head_first   share of the steps in which the head alone learns, see `fit`
    check_every  steps between looks at the held-out loss, always on the same subsets, so that looks compare
    patience     looks without improvement before stopping; the learning rate falls by 0.8 after a quarter of
                 them
    fresh        () -> a new Buffer, which replaces the fitted one at every step (`--replay 0`), or None
    autocast     () -> the context of a step's forward pass: a region a step, because autocast keeps its
                 copies of the weights for as long as a region lasts
    progress     called with (steps taken or skipped, loss) after each
    """
    steps: int
    loss: Callable
    generator: torch.Generator
    K: int
    groups: int
    resolution: float = 0.0
    ties: bool = False
    clip: float = 5.0
    head_first: float = 0.0
    check_every: int = 10
    patience: int = 7
    fresh: Callable = None
    autocast: Callable = contextlib.nullcontext
    progress: Callable = lambda i, loss: None

    def draw(self, buffer):
        """(candidates, subsets) of a step, or None where nothing but ties was drawn."""
        return buffer.draw(self.groups, self.K, self.generator, self.resolution, self.ties)


def fit(reward, optimizer, buffers, settings):
    """Adam steps of a loss; the best weights on held-out candidates are the ones kept.

    buffers   (fitted, held_out): what is learned from, and what says when to stop (None, or not `telling`:
              nothing does)
    settings  a FitSettings
    returns   {"reward_loss", "reward_held_loss", "reward_fit_steps"}: the mean loss of the steps taken. A
              draw of nothing but ties is no step; where all were, the loss is None and the steps are 0

    With `head_first` the head learns alone for a while, then body and head (Kumar et al., 2022). A body that
    has read knows of a word that nobody has scored that it is used like one that was good; all its weights
    fitted to three good candidates no longer do, and a look at two held-out ones does not tell.
    """
    fitted, held_out = buffers
    exam = settings.draw(held_out) if held_out is not None and held_out.telling else None
    alone, losses, held_loss = round(settings.head_first * settings.steps), [], None
    if alone:
        with reward.head_alone(optimizer):
            held_loss = stage(reward, optimizer, (fitted, exam), range(alone), settings, losses)
    if alone < settings.steps:
        held_loss = stage(reward, optimizer, (fitted, exam), range(alone, settings.steps), settings, losses)
    return {"reward_loss": sum(losses) / len(losses) if losses else None,  # divisor: steps taken
            "reward_held_loss": held_loss, "reward_fit_steps": len(losses)}


def stage(reward, optimizer, data, steps, settings, losses):
    """The steps of a fit in which the same weights learn: their losses are added to `losses`.

    data     (fitted, exam): a Buffer, and what `FitSettings.draw` made of the held-out one, or None
    steps    a range
    returns  the held-out loss of the weights that are kept, or None
    """
    fitted, exam = data
    base_lr = optimizer.param_groups[0]["lr"]
    best = Best(reward, optimizer, exam, settings)
    for i, step in enumerate(steps):
        if i % settings.check_every == 0 and best.look():
            break
        batch = settings.draw(settings.fresh() if settings.fresh else fitted)
        if batch is None:  # nothing but ties yet
            continue
        reward.train()
        with settings.autocast():
            loss = settings.loss(reward, *batch)
        descend(reward, optimizer, loss, settings.clip, "reward", together=True)
        losses.append(loss.item())
        settings.progress(step + 1, losses[-1])
    optimizer.param_groups[0]["lr"] = base_lr
    return best.restore()


@torch.no_grad()
def held_loss(reward, exam, settings):
    """The loss on held-out subsets, in eval mode: of several processes the first one's number, so that all
    stop at the same step."""
    reward.eval()
    with settings.autocast():
        loss = settings.loss(reward, *exam).item()
    return from_first(lambda: loss)


class Best:
    """The weights with the lowest held-out loss so far. Without held-out candidates it never looks."""

    def __init__(self, reward, optimizer, exam, settings):
        self.reward, self.exam, self.settings = reward, exam, settings
        self.weights, self.loss, self.misses = None, float("inf"), 0
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.8, patience=max(2, settings.patience // 4),
            min_lr=optimizer.param_groups[0]["lr"] / 50)

    def look(self):
        """Remember the weights if they are better, lower the learning rate on a plateau -> whether patience
        is at its end."""
        if self.exam is None:
            return False
        now = held_loss(self.reward, self.exam, self.settings)
        self.plateau.step(now)
        if now < self.loss * (1 - 1e-4):
            self.loss, self.misses = now, 0
            self.weights = copy.deepcopy(self.reward.state_dict())
        else:
            self.misses += 1
        return self.misses >= self.settings.patience

    def restore(self):
        """The best weights back into the net, unless the last ones are better -> their held-out loss, or
        None."""
        if self.weights is None:
            return None
        last = held_loss(self.reward, self.exam, self.settings)
        if last > self.loss:
            self.reward.load_state_dict(self.weights)
        return min(self.loss, last)
