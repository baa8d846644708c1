"""A small decoder-only transformer, used three times: as the policy, as the body of the token reward, and as
the judge.

Pre-norm blocks, scaled dot-product attention, a head tied to the token embedding; rotary positions by
default, or GPT-2's learned ones, so that its weights fit. Everything the project asks of it is one pattern: a
prefix (a document, a text to classify) is read once, and K short sequences continue it. `forward` reads both
in one pass, the K candidates packed side by side behind their prefix; `prefill` reads a prefix alone, `Cache`
remembers it, `generate` samples from there.

Sequences are padded on the right and every mask is built from lengths. Right padding needs no mask inside a
sequence: a causal query never sees what comes later. Only the padding of a prefix has to be hidden, because
candidates follow it.
"""
import contextlib
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.distributed import add_gradients, largest, shared

ALL = slice(None)
# Steps of `generate` between two questions whether all rows have ended. On a CPU the answer is at hand and
# spares steps; on a GPU it waits until the queue of launches is empty.
ASK_EVERY = {"cpu": 1, "cuda": 16}


@dataclass
class Config:
    """Sizes of a transformer. `rotary=False` gives GPT-2's learned positions, at most `n_ctx` of them;
    `adapter` the width of an MLP before the head, 0 for none."""
    vocab_size: int = 257
    n_ctx: int = 256
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    dropout: float = 0.0
    rotary: bool = True
    adapter: int = 0


class Cache:
    """Keys and values of what was read, one (B, H, P, d) pair a layer; `mask` (B, P) bool; `length` (B,)
    tokens. The keys and values may be wider than the mask: `repeat` can leave columns for `decode` to write
    into."""

    def __init__(self, keys, values, mask, length):
        self.keys = keys
        self.values = values
        self.mask = mask
        self.length = length

    def write(self, layer, k, v, where):
        """A layer's new keys and values, k and v (B, H, T, d) -> all there are, (B, H, S, d) each.

        where  None: the first ones, kept as they are; a slice of columns, written in place; or a tensor (T,)
               of columns for a CUDA graph, which is recorded once for all of them and looks at the whole
               width
        """
        if where is None:
            self.keys.append(k)
            self.values.append(v)
            return k, v
        keys, values = self.keys[layer], self.values[layer]
        if torch.is_tensor(where):
            keys.index_copy_(2, where, k.to(keys.dtype))  # what was read outside autocast may be wider
            values.index_copy_(2, where, v.to(values.dtype))
            return keys.to(k.dtype), values.to(v.dtype)
        keys[:, :, where] = k  # the same in a third of the time
        values[:, :, where] = v
        return keys[:, :, :where.stop].to(k.dtype), values[:, :, :where.stop].to(v.dtype)

    def repeat(self, k, room=0):
        """Every row k times in a row, B prefixes -> B*k, for k continuations of each; with empty columns for
        `room` tokens, which `decode` writes in place instead of growing by a copy a step."""
        keys = [_again(x, k, room) for x in self.keys]
        values = [_again(x, k, room) for x in self.values]
        return Cache(keys, values, self.mask.repeat_interleave(k, 0), self.length.repeat_interleave(k, 0))

    def select(self, rows):
        """The prefixes `rows` (an index tensor), for instance a batch out of all documents."""
        keys = [x[rows] for x in self.keys]
        values = [x[rows] for x in self.values]
        return Cache(keys, values, self.mask[rows], self.length[rows])


def _again(x, k, room):
    """Keys or values (B, H, P, d) -> (B*k, H, P + room, d), zeros in the room."""
    b, h, p, d = x.shape
    wide = x.new_zeros(b, k, h, p + room, d)
    wide[..., :p, :] = x[:, None]
    return wide.flatten(0, 1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.ln_1 = nn.LayerNorm(c.n_embd)
        self.ln_2 = nn.LayerNorm(c.n_embd)
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.proj = nn.Linear(c.n_embd, c.n_embd)
        self.fc = nn.Linear(c.n_embd, 4 * c.n_embd)
        self.out = nn.Linear(4 * c.n_embd, c.n_embd)

    def ask(self, x, rotation):
        """x (B, T, D) -> queries, keys, values (B, H, T, d) each, the first two turned to their positions."""
        b, t, d = x.shape
        qkv = self.qkv(self.ln_1(x)).view(b, t, 3, self.c.n_head, d // self.c.n_head)
        # Not three slices: their gradients would each fill a whole qkv with zeros first.
        both, v = qkv.transpose(1, 3).split((2, 1), 2)  # (B, H, 2, T, d), (B, H, 1, T, d)
        q, k = _turn(both, rotation).unbind(2)
        return q, k, v.squeeze(2)

    def answer(self, x, y):
        """x (B, T, D), what attention found for it y (B, H, T, d) -> the block's output (B, T, D)."""
        x = x + self._drop(self.proj(y.transpose(1, 2).flatten(2)))
        form = "none" if self.c.rotary else "tanh"  # GPT-2's approximation, the slower one on a CPU
        return x + self._drop(self.out(F.gelu(self.fc(self.ln_2(x)), approximate=form)))

    def _drop(self, x):
        return F.dropout(x, self.c.dropout, self.training)


def attention(q, k, v, mask=None):
    """Queries (B, H, T, d) over keys and values (B, H, S, d) -> (B, H, T, d).

    mask  (B or 1, 1, T, S) bool: what a query may see. None is causal, S = T, or T = 1: a single query is the
          last one, which sees everything
    """
    if mask is not None or q.shape[2] == 1:
        return F.scaled_dot_product_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Transformer(nn.Module):
    """tokens -> hidden states. Logits are `hidden @ head.T`, left to the caller: nobody needs all at once."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.n_embd % (2 * c.n_head):
            raise ValueError(f"n_embd {c.n_embd} must be an even multiple of n_head {c.n_head}")
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = None if c.rotary else nn.Embedding(c.n_ctx, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd)
        self._init_weights()
        self.adapter = new_adapter(c.n_embd, c.adapter) if c.adapter else None

    def _init_weights(self):
        """Widths of 64 to 128 need other numbers than GPT-2's 0.02, which is right for 768: there the blocks
        drown the embedding in the residual stream and copying a word from a document takes several times as
        many steps to appear (one seed, four facts a document: about 2,400 updates, or 700). So: loud
        embeddings, matrices by fan-in, blocks small enough that 2 n_layer of them sum to one, and a final
        norm so quiet that the first softmax is almost uniform.
        """
        d = self.config.n_embd
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.8 / d ** 0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
        for block in self.blocks:
            for linear in (block.proj, block.out):
                nn.init.normal_(linear.weight, std=0.8 / (2 * self.config.n_layer * d) ** 0.5)
        nn.init.constant_(self.ln_f.weight, 0.2 / (0.5 * d ** 0.5))  # logits of standard deviation 0.2

    def train(self, mode=True):
        """As ever, but a walk over all modules only where something changes: it is asked often."""
        return self if self.training == mode else super().train(mode)

    @property
    def head(self):
        """(V, D) output head, tied to the token embedding."""
        return self.wte.weight

    def forward(self, tokens, prefix=None, last=False):
        """Hidden states of `tokens` behind a prefix, read in one pass.

        tokens  (B, T), or (B, K, T) for K candidates that share the prefix of row b and do not see one
                another
        prefix  None, or tokens (B, P) and their mask (B, P), from lengths
        last    the state of each last token is all that is wanted
        returns (B, T, D) or (B, K, T, D), with `last` a T of 1. Raises ValueError when prefix and tokens are
                longer than n_ctx.
        """
        if prefix is None and tokens.dim() == 3:  # nothing to share: K candidates are just more rows
            return self(tokens.flatten(0, 1), None, last).unflatten(0, tokens.shape[:2])
        t = tokens.shape[-1]
        own = torch.arange(t, device=tokens.device)
        if prefix is None:
            self._check_width(t)
            return self._run(self.wte(tokens), own[None], slice(-1, None) if last else ALL)
        context, mask = prefix
        p = context.shape[1]
        k = tokens.shape[1] if tokens.dim() == 3 else 1
        self._check_width(p + t)
        place = torch.arange(p, device=tokens.device).expand(len(mask), -1)
        behind = (mask.sum(1, True) + own).repeat(1, k)  # (B, K*T): restarts for each candidate
        place = torch.cat((place, behind), 1)  # (B, P + K*T)
        every = torch.cat((context, tokens.flatten(1)), 1)
        x = self.wte(every)  # (B, P + K*T, D); one look-up: its gradient is V x D, however short the text
        wanted = slice(p + t - 1, None, t) if last else slice(p, None)
        hidden = self._run(x, place, wanted, _packed_mask(mask, k, t))
        return hidden.view(*tokens.shape[:-1], -1, hidden.shape[-1])

    def prefill(self, tokens, mask):
        """Read B prefixes once: tokens (B, P), mask (B, P) from lengths -> Cache. ValueError beyond n_ctx."""
        self._check_width(tokens.shape[1])
        cache = Cache([], [], mask, mask.sum(1))
        place = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, P)
        self._run(self.wte(tokens), place, None, cache=cache)
        return cache

    def decode(self, tokens, cache, column):
        """T more tokens a row, tokens (B, T), behind prefix and earlier ones -> (B, D), the last one's state.

        Of the last layer only the last position is wanted and made: equal to a plain pass to rounding, since
        a product with fewer rows may add in another order, and a third faster for the judge.

        Written at `column` of a cache that `repeat` gave room, in place and hence without gradients; an older
        decode to the right of it is overwritten or not seen. An int, or a tensor of one number for a CUDA
        graph, which is recorded once for all columns and therefore looks at all of them, the empty ones
        masked.
        """
        t = tokens.shape[1]
        width = cache.mask.shape[1]
        graph = torch.is_tensor(column)
        self._check_width(t if graph else column + t)
        place = column + torch.arange(t, device=tokens.device)  # (T,)
        seen = cache.keys[0].shape[2] if graph else column + t
        at = torch.arange(seen, device=tokens.device)
        own = (at >= width) & (at <= place[:, None])  # (T, S): decoded tokens, up to this one
        mask = own | F.pad(cache.mask, (0, seen - width))[:, None, None, :]  # (B, 1, T, S)
        where = place if graph else slice(column, seen)
        position = cache.length[:, None] + place - width  # (B, T): behind the real tokens of the prefix
        return self._run(self.wte(tokens), position, slice(t - 1, t), mask, cache, where)[:, -1]

    @torch.no_grad()
    def last_attention(self, tokens, length):
        """What the last token of each row attends to in the last block: tokens (N, T), padding at the end,
        length (N,) -> softmax weights (N, H, T), 0 from `length` on. The layers' own products never hold
        them."""
        place = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        rotation = _rotation(place[None], self.config) if self.config.rotary else None
        x = self.wte(tokens) if self.wpe is None else self.wte(tokens) + self.wpe(place)
        for block in self.blocks[:-1]:
            q, k, v = block.ask(x, rotation)
            x = block.answer(x, attention(q, k, v))
        q, k, _ = self.blocks[-1].ask(x, rotation)  # (N, H, T, d)
        row = torch.arange(len(tokens), device=tokens.device)
        # divisor: the root of a head's width, as in scaled dot-product attention
        scores = torch.einsum("nhd,nhtd->nht", q[row, :, length - 1], k) / k.shape[-1] ** 0.5
        later = (place >= length[:, None])[:, None]  # (N, 1, T)
        return scores.float().masked_fill(later, float("-inf")).softmax(-1)

    def _check_width(self, width):
        if width > self.config.n_ctx:
            have = self.config.n_ctx
            raise ValueError(f"{width} positions asked of a transformer with a context of {have}")

    def _run(self, x, position, wanted, mask=None, cache=None, where=None):
        """The stack itself: embeddings x (B, T, D) -> states (B, T', D) behind the last norm.

        position  (B, T) or (1, T), the place of each token in its own sequence
        wanted    a slice of T: the positions whose state somebody wants; the others are spared three quarters
                  of the last block. None where only the cache is wanted: then None comes back
        mask      as in `attention`, (B, 1, T, S)
        cache     where each layer's keys and values are kept; `where` as in `Cache.write`
        """
        if self.wpe is not None:
            x = x + self.wpe(position)
        rotation = _rotation(position, self.config) if self.config.rotary else None
        for i, block in enumerate(self.blocks):
            q, k, v = block.ask(x, rotation)
            if cache is not None:
                k, v = cache.write(i, k, v, where)
            keep = wanted if i == len(self.blocks) - 1 else ALL
            if keep is None:
                return None
            y = attention(q[:, :, keep], k, v, None if mask is None else mask[:, :, keep])
            x = block.answer(x[:, keep], y)
        x = self.ln_f(x)
        return x if self.adapter is None else self.adapter(x)


def new_adapter(d, width):
    """D -> width -> D, so small that all words are equally likely at first: what is trained of a policy whose
    body and head stay as they are (Deng et al., 2022)."""
    mlp = nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, d))
    for layer in (mlp[0], mlp[2]):
        nn.init.xavier_uniform_(layer.weight, gain=1e-2)
        nn.init.zeros_(layer.bias)
    return mlp


def _rotation(position, config):
    """Rotary positions: pairs of channels turn by an angle that grows with the position, so q.k depends on
    distance. position (B, T) -> (B, 1, 1, T, d/2), for `_turn`: on a CPU one complex number a pair, whose
    product turns it in half of the time; torch.compile has no code for those, so there and on a GPU cos and
    sin."""
    half = config.n_embd // config.n_head // 2
    rate = 10000.0 ** (-torch.arange(half, device=position.device) / half)
    angle = position[:, None, None, :, None] * rate  # (B, 1, 1, T, d/2)
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if angle.is_cuda or torch.compiler.is_compiling() else torch.complex(cos, sin)


def _turn(x, rotation):
    """Queries and keys at once, x (B, H, 2, T, d), turned by `_rotation`; unchanged without one."""
    if rotation is None:
        return x
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))  # (B, H, 2, T, d/2, 2)
    if torch.is_tensor(rotation):
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rotation)
    else:
        cos, sin = rotation
        a, b = pairs.unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
    return turned.flatten(-2).to(x.dtype)


def _packed_mask(prefix, k, t):
    """(B, 1, S, S) bool for [prefix | K candidates of T], S = P + K*T; prefix (B, P) bool. A token sees what
    came before it, of the candidates its own alone, and a candidate no padding of the prefix."""
    whose = torch.arange(k * t, device=prefix.device) // t + 1
    whose = F.pad(whose, (prefix.shape[1], 0))  # (S,): 0 in the prefix, 1 to K in the candidates
    past = torch.ones(len(whose), len(whose), dtype=torch.bool, device=prefix.device).tril()
    own = past & ((whose == 0) | (whose == whose[:, None]))  # (S, S)
    real = F.pad(prefix, (0, k * t), value=True)[:, None, None, :]  # (B, 1, 1, S)
    # Padding itself sees the prefix, or its softmax would be over nothing.
    return own & (real | (whose[:, None] == 0))


@contextlib.contextmanager
def evaluating(net):
    """A net in eval mode, without dropout, and afterwards in the mode that it was in."""
    was_training = net.training
    net.eval()
    yield net
    net.train(was_training)


def with_start(tokens, start):
    """The one layout of what is read behind a prefix: (..., T) -> (..., T+1) ids, the start token first."""
    return F.pad(tokens, (1, 0), value=start)


def read_candidates(model, tokens, start, prefix=None):
    """The one layout of the project, in fit and in use: a candidate is [start, a_0 .. a_T-1] behind its
    prefix.

    tokens (B, K, T), prefix as in `forward` -> predict (B, K, T, D), states that PREDICT a_t; and
                                                read (B, K, T, D), states whose input IS a_t (E1)
    The policy takes the first, the token reward the second: one slot apart, the classic off-by-one of dense
    rewards.
    """
    hidden = model(with_start(tokens, start), prefix)  # (B, K, T+1, D)
    return hidden[..., :-1, :], hidden[..., 1:, :]


def apart(read, prefix, *tensors, most=0):
    """read(prefix, *tensors) of candidates, tensors (B, K, T) each -> numbers (B, K, T'), shared out among
    the processes: candidates behind one prefix together, without a prefix each alone.  most: sequences a
    pass"""
    b, k, _ = tensors[0].shape
    if prefix is None:
        rows = [x.flatten(0, 1)[:, None] for x in tensors]  # (B*K, 1, T)
        return shared(lambda *some: read(None, *some), *rows, most=most).view(b, k, -1)
    some = lambda context, mask, *x: read((context, mask), *x)
    return shared(some, *prefix, *tensors, most=max(1, most // k) if most else 0)


@torch.no_grad()
def write(model, start, max_new, generator, k=1, prefix=None, **how):
    """`generate` behind prefixes that the processes share out: k continuations of each of B, tokens (B, P)
    and mask (B, P); without a prefix k of nothing (B = 1).  how: further arguments of `generate`.

    returns tokens (B*k, max_new), length (B*k,): of N processes the samples that one would draw, to rounding
    """
    groups, each = (k, 1) if prefix is None else (len(prefix[0]), k)

    def some(place, *prefix):
        """The groups at `place` (b,) of all -> (b, each, max_new + 1): tokens, and their length behind
        them."""
        cache = model.prefill(*prefix) if prefix else None
        among = int(place[0]) * each, groups * each
        tokens, length, _ = generate(model, start, max_new, generator, each if prefix else len(place), cache,
                                     among=among, **how)
        return torch.cat((tokens, length[:, None]), 1).view(len(place), each, -1)
    found = shared(some, torch.arange(groups), *(prefix or ())).flatten(0, 1)
    return found[:, :-1], found[:, -1]


@torch.no_grad()
def generate(model, start, max_new, generator, rows=1, cache=None, eot=None, top_k=None, temperature=1.0,
             n_ids=None, graph=False, among=None):
    """Sample continuations, all rows in step, from prefixes that were read once.

    start        id fed first (the layout of `read_candidates`)
    rows         continuations a prefix; without a cache simply how many
    generator    torch.Generator of the model's device: its seed alone fixes the samples
    eot          id that ends a row (None: every row has max_new tokens, and `n_ids` should exclude this id)
    top_k        sample among the k most likely only (None: all); temperature 0 is greedy and draws nothing
    n_ids        ids from here on are never sampled (default: all rows of the head count)
    graph        record the decode step as a CUDA graph (a GPU only): one launch a token instead of a hundred,
                 at the price of some steps for the record, so for long continuations of small models
    among        (first, n): these rows are those from `first` on of n, and other processes write the others;
                 each draws for all n, as many times as the one that writes longest (None: there are no
                 others)
    returns      tokens (B*rows, max_new) with 0 after the end, length (B*rows,) with end-of-text counted,
                 ended (B*rows,)
    """
    if cache is None:
        device = model.head.device
        empty = torch.zeros(rows, 0, dtype=torch.long, device=device)
        cache = model.prefill(empty, empty.bool())
        rows = 1
    column = cache.mask.shape[1]
    model._check_width(column + max_new)
    cache = cache.repeat(rows, max_new)
    token = torch.full_like(cache.length, start)  # (N,)
    out = torch.zeros(len(token), max_new, dtype=torch.long, device=token.device)
    length, ended = torch.zeros_like(token), torch.zeros_like(token, dtype=torch.bool)
    head, every = model.head[:n_ids], ASK_EVERY.get(token.device.type, 1)
    step = lambda token, column: model.decode(token[:, None], cache, column) @ head.t()  # (N,) -> (N, V)
    step = _recorded(step, token, column) if graph else step
    for t in range(max_new):
        token = sample(step(token, column + t), generator, top_k, temperature, among)
        out[:, t] = token.masked_fill(ended, 0)
        length += ~ended
        if eot is not None:
            ended |= token == eot
            if (t + 1) % every == 0 and ended.all():
                break
    if among is not None and temperature != 0:
        for _ in range(largest(t) - t):  # others went on, and so do the random numbers
            uniform(len(out), generator, token.device, among)
    return out, length, ended


def _recorded(step, token, column):
    """A CUDA graph of step(token (N,), column): small models spend a decode step waiting for launches."""
    token, column = token.clone(), torch.tensor(column, device=token.device)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is lazily set up at a first call must not be part of the record
        step(token, column)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(token, column)

    def replay(new_token, new_column):
        token.copy_(new_token)
        column.fill_(new_column)
        graph.replay()
        return logits
    return replay


def uniform(n, generator, device, among=None):
    """A number from [0, 1) for each of n rows, (n, 1); those of rows `among` others as `generate` says."""
    first, every = (0, n) if among is None else among
    return torch.rand((every, 1), generator=generator, device=device)[first:first + n]


def sample(logits, generator, top_k=None, temperature=1.0, among=None):
    """One id a row from softmax(logits / temperature): logits (N, V) -> (N,).

    Inverse of the cumulative distribution: one uniform number and a binary search a row, where
    torch.multinomial costs more than the whole model on a CPU. The float32 sum blurs tokens below 1e-7, which
    sampling may do and log-probs not.  among: as in `generate`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    ids = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)
    z = logits.float()
    if temperature != 1:  # N x V each time: what need not be done is not
        z = z / temperature
    c = torch.softmax(z, -1).cumsum_(-1)  # (N, V)
    total = c[:, -1:]
    u = uniform(len(c), generator, c.device, among) * total
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))  # below, or the search runs off
    pick = torch.searchsorted(c, u, right=True)  # right: never a token of probability 0
    pick = pick.clamp(max=c.shape[-1] - 1)  # nan logits find no place: any id will do, the loss says nan
    return (pick if ids is None else ids.gather(1, pick)).squeeze(1)


def descend(model, optimizer, loss, clip, what, together=False):
    """One step down a loss: the gradient norm before clipping.  together: all processes take it, and each has
    a part of the gradient."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if together:
        add_gradients(model.parameters())
    return step_down(model, optimizer, loss, clip, what)


def step_down(model, optimizer, loss, clip, what):
    """The step of the gradient that is there: its norm before clipping. FloatingPointError where loss or norm
    are not finite, before either reaches a weight; looking waits for a GPU, so it comes when backward is
    queued already."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    if not torch.isfinite(loss + norm):
        raise FloatingPointError(f"{what} loss is {loss.item()}, its gradient norm {norm.item()}")
    optimizer.step()
    return norm


def save_state(model):
    """What `load_state` needs, of types that torch.load(weights_only=True) reads."""
    return {"config": asdict(model.config),
            "weights": {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}}


def load_state(model, saved):
    """Weights of `save_state` into a model of the same sizes. ValueError names what differs."""
    if type(model.config)(**saved["config"]) != model.config:  # a size that older files lack is its default
        raise ValueError(f"saved with {saved['config']}, the model has {asdict(model.config)}")
    model.load_state_dict(saved["weights"])
    return model
