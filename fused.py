"""One op for both objectives: log-probabilities and entropies of a large vocabulary, in a small memory.

REINFORCE with maximum entropy (E7, E8) and reward-weighted MLE (E9) are the same sum over tokens,

    L = - sum_n ( a_n log pi(y_n) + b_n H_n ),        a, b constants.

In plain form, and a test holds `policy_loss`, `reinforce_loss` and `weighted_mle_loss` to these lines:

    log_pi  = (hidden @ weight.T).log_softmax(-1)          # (N, V), of which several live at a time
    logp    = log_pi.gather(1, targets[:, None])[:, 0]     # (N,) log pi(y_n)
    entropy = -(log_pi.exp() * log_pi).sum(-1)             # (N,) H_n
    a = mask * r / mask.sum()                              # E7, divisor: tokens of the batch
    b = mask * alpha / mask.sum()                          # E8, the same divisor
    a, b = mask * w / sequences, 0 * b                     # E9 for both: w is r / its sum over the sequence
    loss = -(a * logp + b * entropy).sum()

Since a and b are known before the forward pass, so is the gradient with respect to the logits:

    dL/dz = p * (a + b (log p + H)) - a * onehot(y).

So the forward pass goes over the rows in chunks, forms that gradient in place of the logits, multiplies it
into the two gradients that are wanted, and forgets it. A chunk of logits lives at a time instead of several
tensors of N x V (beside it a second buffer as large, on a CPU an eighth of it), and nothing is recomputed:
three matrix products in all, which is the floor. Backward only hands the gradients over.

What happens between the products, the body of a chunk, exists three times: "eager" in place, the reference
and the fastest on a CPU; "compiled", the same formula left to torch.compile; "triton", one kernel that reads
a row of logits, keeps running sums and writes the gradient over it. `BODY` says which one runs; bench.py
times them side by side.
"""
import functools

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # part of torch's GPU builds; nothing here needs it on a CPU
    triton = None

BODY = "eager"  # "compiled" and "triton" are for GPUs; none has timed them yet, so neither is the default
CHUNK = 6_400_000  # logits of a product on a CPU, 128 rows of 50,000: twice as many take a third more memory
SLICE = 800_000    # logits that the eager body works on at a time there


def policy_loss(hidden, weight, targets, logp_weight, entropy_weight=None, chunk=None):
    """L = - sum_n ( logp_weight[n] * log pi(targets[n]) + entropy_weight[n] * H[n] )   (E7, E8, E9 in one).

    hidden          (N, D) states that predict the targets
    weight          (V, D) the output head, so that logits = hidden @ weight.T; frozen weights cost no
                    gradient
    targets         (N,) int64
    logp_weight     (N,) float, a constant: no gradient flows into it
    entropy_weight  (N,) float or None, a constant too
    chunk           rows at a time (default on a CPU as many as make CHUNK logits, 2048 on a GPU)
    returns         loss (scalar), logp (N,) and entropy (N,) in natural units, both detached; entropy is None
                    without entropy_weight. Rows whose weights are all zero are skipped: their logp and
                    entropy read 0.

    Softmax, entropy and the loss are float32 under half precision, and so is the sum of dW over chunks. The
    gradient is formed once, so a second backward raises RuntimeError; ValueError where the shapes do not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        got = f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{got}: expected (N, D) and (V, D)")
    n = hidden.shape[0]
    for name, x in (("targets", targets), ("logp_weight", logp_weight), ("entropy_weight", entropy_weight)):
        if x is not None and x.shape != (n,):
            raise ValueError(f"{name} {tuple(x.shape)}: expected ({n},)")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # out= products are not autocast, so it is done here
        hidden = hidden.to(torch.get_autocast_dtype(device))
    weight = weight.to(hidden.dtype)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    a = logp_weight.detach().to(wide)
    b = None if entropy_weight is None else entropy_weight.detach().to(wide)
    chunk = chunk or (max(64, CHUNK // weight.shape[0]) if device == "cpu" else 2048)
    wants_grad = torch.is_grad_enabled()
    loss, logp, entropy = _PolicyLoss.apply(hidden, weight, targets, a, b, chunk, wants_grad)
    return loss, logp, entropy if b is not None else None


def log_probs(hidden, weight, targets, keep):
    """log pi(targets) with its gradient, for losses that are not linear in it: hidden (N, D), weight (V, D),
    targets (N,), keep (N,) bool -> (N,), 0 and without a gradient outside of `keep`.

    What the log-probs weigh in a loss is known once the loss is, so the gradient is `policy_loss`'s with
    these weights: the logits are formed twice, N x V at once never.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # backward comes behind the region
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return _LogProbs.apply(hidden, weight.to(hidden.dtype), targets, keep)


class _LogProbs(torch.autograd.Function):
    """A pass of `policy_loss` each way."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, keep):
        ctx.save_for_backward(hidden, weight, targets)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return policy_loss(hidden, weight, targets, keep.to(wide))[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        hidden, weight, targets = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        with torch.enable_grad():
            hidden, weight = [x.detach().requires_grad_(w) for x, w in zip((hidden, weight), wanted)]
            loss, _, _ = policy_loss(hidden, weight, targets, -slope)
            loss.backward()
        return hidden.grad, weight.grad, None, None


class _PolicyLoss(torch.autograd.Function):
    """The sum and, while the logits are at hand, its gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, a, b, chunk, wants_grad):
        n, wide = hidden.shape[0], a.dtype
        d_hidden = torch.zeros_like(hidden) if wants_grad and ctx.needs_input_grad[0] else None
        logp, entropy = a.new_zeros(n), a.new_zeros(n)
        keep = (a != 0) if b is None else (a != 0) | (b != 0)
        rows = keep.nonzero().squeeze(1)  # masked rows never reach the matrix product
        exact, d_weight = wide == hidden.dtype, None
        if wants_grad and ctx.needs_input_grad[1]:  # the first exact product writes: no zeros first
            d_weight = (torch.empty_like if exact and len(rows) else torch.zeros_like)(weight, dtype=wide)
        chunk = max(1, min(chunk, len(rows)))
        logits = hidden.new_empty(chunk, weight.shape[0])
        some = chunk  # a GPU has no cache to stay in
        if hidden.device.type == "cpu":
            some = min(chunk, max(8, SLICE // weight.shape[0]))
        spare = a.new_empty(some if BODY == "eager" else 0, weight.shape[0])
        body = _chunk if BODY == "eager" else _triton_chunk if BODY == "triton" else _compiled_chunk()
        for i in range(0, len(rows), chunk):
            idx = rows[i:i + chunk]  # (C,)
            x, y, m = hidden[idx], targets[idx], len(idx)
            z = torch.mm(x, weight.t(), out=logits[:m])  # (C, V)
            grad, logp[idx], entropy[idx] = body(z, spare, y, a[idx], None if b is None else b[idx])
            if d_hidden is not None:
                d_hidden[idx] = grad @ weight
            if d_weight is not None and exact:
                d_weight.addmm_(grad.t(), x, beta=1.0 if i else 0.0)
            elif d_weight is not None:  # half precision: each chunk's product rounds once, their sum does not
                d_weight.add_(grad.t() @ x)
        ctx.grads = (d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(logp, entropy)
        loss = -(a * logp).sum() if b is None else -(a * logp + b * entropy).sum()
        return loss, logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            why = "backward works once, call it again"
            raise RuntimeError(f"policy_loss forms its gradient in the forward pass: {why}")
        d_hidden, d_weight = ctx.grads
        ctx.grads = None
        if grad_loss.device.type == "cpu" and grad_loss.item() == 1:  # a CPU has nothing to wait for
            return d_hidden, d_weight, None, None, None, None, None
        for grad in (d_hidden, d_weight):
            if grad is not None:
                grad.mul_(grad_loss.to(grad.dtype))  # in place: nobody else holds it
        return d_hidden, d_weight, None, None, None, None, None


def _chunk(z, spare, y, a, b):
    """Logits z (C, V) -> gradient (C, V), logp (C,), entropy (C,). Overwrites z: page faults cost more than
    arithmetic on a CPU, and in place is also the smallest on a GPU. A few rows at a time, so that `spare` (S,
    V) can be small; the matrix products around it want more rows than that."""
    parts = [_slice(z[i:i + len(spare)], spare, y[i:i + len(spare)], a[i:i + len(spare)],
                    None if b is None else b[i:i + len(spare)]) for i in range(0, len(z), len(spare))]
    grads, logps, entropies = zip(*parts)
    return z if z.dtype == spare.dtype else torch.cat(grads), torch.cat(logps), torch.cat(entropies)


def _slice(z, spare, y, a, b):
    """`_chunk` of a few rows: logits (S, V), in place where their type allows it."""
    spare = spare[:len(z)]
    log_p = torch.log_softmax(z, -1, dtype=spare.dtype, out=spare) if z.dtype == spare.dtype \
        else spare.copy_(z).log_softmax(-1)
    logp = log_p.gather(1, y[:, None]).squeeze(1)
    p = torch.exp(log_p, out=z) if z.dtype == log_p.dtype else log_p.exp()
    entropy = torch.zeros_like(logp)
    if b is None:
        grad = p.mul_(a[:, None])
    else:
        p_log_p = log_p.mul_(p)
        entropy = -p_log_p.sum(-1)
        grad = p.mul_((a + b * entropy)[:, None]).addcmul_(p_log_p, b[:, None])
    grad.scatter_add_(1, y[:, None], -a[:, None])
    return grad.to(z.dtype), logp, entropy


@functools.cache
def _compiled_chunk():
    """The formula of the header, out of place: torch.compile fuses it. Compiled when first called, never
    before."""
    def body(z, spare, y, a, b):
        log_p = z.to(a.dtype).log_softmax(-1)
        p, logp = log_p.exp(), log_p.gather(1, y[:, None]).squeeze(1)
        entropy = -(p * log_p).sum(-1) if b is not None else torch.zeros_like(logp)
        slope = a[:, None] if b is None else a[:, None] + b[:, None] * (log_p + entropy[:, None])
        hit = torch.arange(z.shape[1], device=z.device) == y[:, None]
        return (p * slope - a[:, None] * hit).to(z.dtype), logp, entropy
    return torch.compile(body)


def _triton_chunk(z, spare, y, a, b, block=4096):
    """One program a row: z (C, V) -> its gradient in place, logp (C,), entropy (C,), float32 inside."""
    logp, entropy = torch.zeros_like(a), torch.zeros_like(a)
    block = min(block, triton.next_power_of_2(z.shape[1]))
    other = a if b is None else b  # never read where there is no b
    _row_kernel[(len(z),)](z, y, a, other, logp, entropy, z.shape[1], z.stride(0), b is not None, block)
    return z, logp, entropy if b is not None else torch.zeros_like(logp)


if triton:
    @triton.jit
    def _row_kernel(z_ptr, y_ptr, a_ptr, b_ptr, logp_ptr, entropy_ptr, V, stride, HAS_B: tl.constexpr,
                    BLOCK: tl.constexpr):
        """Pass 1: running maximum m, s = sum exp(z - m), t = sum exp(z - m) z. Pass 2: the gradient over the
        logits."""
        row = tl.program_id(0)
        a = tl.load(a_ptr + row)
        b = tl.load(b_ptr + row) if HAS_B else 0.0
        z_ptr += row.to(tl.int64) * stride
        y = tl.load(y_ptr + row)
        column = tl.arange(0, BLOCK)
        if (a == 0) & (b == 0):  # a masked row ends here, before any of its logits is read
            for start in range(0, V, BLOCK):
                tl.store(z_ptr + start + column, tl.zeros((BLOCK,), tl.float32), mask=start + column < V)
            return
        # Before pass 2, where another warp may have written its gradient there.
        z_y = tl.load(z_ptr + y).to(tl.float32)
        m, s, t = -float("inf"), 0.0, 0.0
        for start in range(0, V, BLOCK):
            inside = start + column < V
            z = tl.load(z_ptr + start + column, mask=inside, other=-float("inf")).to(tl.float32)
            top = tl.maximum(m, tl.max(z, 0))
            e, shrink = tl.exp(z - top), tl.exp(m - top)
            s = s * shrink + tl.sum(e, 0)
            t = t * shrink + tl.sum(e * tl.where(inside, z, 0.0), 0)
            m = top
        log_s = m + tl.log(s)
        entropy = log_s - t / s  # H = log sum exp z - sum p z
        tl.store(logp_ptr + row, z_y - log_s)
        tl.store(entropy_ptr + row, entropy)
        for start in range(0, V, BLOCK):
            inside = start + column < V
            log_p = tl.load(z_ptr + start + column, mask=inside, other=0.0).to(tl.float32) - log_s
            grad = tl.exp(log_p) * (a + b * (log_p + entropy)) - tl.where(start + column == y, a, 0.0)
            tl.store(z_ptr + start + column, grad, mask=inside)
