"""Several processes that are one: what they share out, and how they stay the same.

    torchrun --standalone --nproc_per_node=2 train.py ...

Whatever is smaller than hidden states (ids, masks, preferences, rewards, weights, random numbers, settings)
is the same in every process at all times, and so are the nets. Only passes through nets are shared out: each
process reads rows of its own, and then the numbers that came out are gathered (`shared`), or the gradients
are summed (`add_gradients`). So N processes do what one does, up to rounding, and whatever is decided by
these numbers is decided alike. A process alone communicates nothing.

The same cut serves one process in time: `most` rows a pass, so that a large batch fits into a small memory.
"""
import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from support.log import LostProcess, out_of_memory

# The others wait while the first one teaches a judge. Who loses a process hears of it at once all the same.
PATIENCE = datetime.timedelta(days=2)
asked_for = lambda name, default: int(os.environ.get(name, default))  # what torchrun has set


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def place():
    """Which of them this is; 0 is the first one, which alone writes files and lines."""
    return dist.get_rank() if world() > 1 else 0


@contextlib.contextmanager
def joined():
    """Takes part in what torchrun has started, until the end of the `with`. Alone, or where somebody has
    joined already, nothing happens. CPU tensors go by gloo, those of a GPU of its own by nccl."""
    if asked_for("WORLD_SIZE", 1) < 2 or world() > 1:
        yield
        return
    if asked_for("RANK", 0) > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    gpu = torch.cuda.is_available()
    if gpu and (local := asked_for("LOCAL_RANK", 0)) < torch.cuda.device_count():
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # not after an error: others may be gone, and it would wait for them


def leave(status):
    """The end of a script. Of several processes at once: the threads of a backend do not always survive the
    clean-up of an interpreter, and one that aborts there ends a run that is whole as a failure."""
    if asked_for("WORLD_SIZE", 1) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def voice():
    """Where the line goes that says how a run broke off: stderr for whoever asks first, nowhere for the
    others, which have lost that one or met the same."""
    if world() == 1:
        return sys.stderr
    try:
        first = dist.distributed_c10d._get_default_store().add("said", 1) == 1
    except RuntimeError:  # the store is gone, with the process that held it
        first = True
    return sys.__stderr__ if first else open(os.devnull, "w")


def reduced(x, op="SUM"):
    """A tensor's sum (or MAX) over all processes, in place: the same bits in each of them. LostProcess where
    one has died."""
    if world() > 1:
        with lost():
            dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x


@contextlib.contextmanager
def lost():
    """LostProcess in the place of what a backend raises when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise LostProcess(str(error)) from error


# ------------------------------------------------------------------------------------------ to decide alike


def from_first(make):
    """What make() returns in the first process, where alone it is called, in all of them; or what it raises
    there."""
    if world() == 1:
        return make()
    found = [None, None]
    if place() == 0:
        try:
            found[0] = make()
        except (Exception, SystemExit) as error:
            found[1] = error
    with lost():
        dist.broadcast_object_list(found, 0, device=torch.device("cpu"))
    if found[1] is not None:
        raise found[1]
    return found[0]


def largest(number):
    """The largest of the integers that the processes have."""
    return int(reduced(torch.tensor(int(number)), "MAX"))


# -------------------------------------------------------------------------------------------- to share out


def own(n):
    """This process's rows of n, a range: neighbours, as many as others have or one more. Empty where there
    are fewer rows than processes."""
    return range(n * place() // world(), n * (place() + 1) // world())


def parts(n, most=0):
    """Slices of this process's rows of n, at most `most` rows each (0: all in one). Who has none takes the
    first row for company: what comes of it has no weight (`own` is empty)."""
    mine = own(n) or range(min(n, 1))
    step = most or max(1, len(mine))
    return [slice(i, min(i + step, mine.stop)) for i in mine[::step]] or [slice(0, 0)]


def shared(read, *tensors, most=0):
    """read(tensors) over all their rows, each process its own: (n, ...) in every process, with its gradient.

    tensors  (n, ...) each, or None; read takes the same for some rows and returns a tensor of these rows
    most     rows a pass. Where a gradient is wanted, what more than one pass has read is read again when the
             gradient comes (torch's checkpoint), so that one pass's activations are held at a time
    """
    n = len(tensors[0])
    some = [[None if x is None else x[rows] for x in tensors] for rows in parts(n, most)]
    again = len(some) > 1 and torch.is_grad_enabled()
    found = [checkpoint(read, *x, use_reentrant=False) if again else read(*x) for x in some]
    found = found[0] if len(found) == 1 else torch.cat(found)
    return found if world() == 1 else Gathered.apply(found, n)


class Gathered(torch.autograd.Function):
    """Every process's own rows -> all n of them. Each one makes the same loss of all, so the gradient of its
    own rows is at hand: nothing is summed on the way back."""

    @staticmethod
    def forward(ctx, x, n):
        ctx.mine, ctx.rows = own(n), len(x)
        every = x.new_zeros(n, *x.shape[1:])
        every[ctx.mine.start:ctx.mine.stop] = x[:len(ctx.mine)]
        return reduced(every)

    @staticmethod
    def backward(ctx, slope):
        mine = slope.new_zeros(ctx.rows, *slope.shape[1:])
        mine[:len(ctx.mine)] = slope[ctx.mine.start:ctx.mine.stop]
        return mine, None


def add_gradients(parameters):
    """The gradients of all processes summed, in one flat tensor: after it they are the same in each."""
    if world() == 1:
        return
    learn = [p for p in parameters if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learn])
    for p, grad in zip(learn, reduced(flat).split([p.numel() for p in learn])):
        p.grad = grad.view_as(p).to(p.dtype)


def added(figures):
    """Shares of figures, a dictionary of 0-dim tensors a pass -> the figures: sums over passes and processes,
    of a name that ends in _max the largest."""
    if len(figures) == 1 and world() == 1:
        return figures[0]
    table = {k: torch.stack([x[k].detach().double() for x in figures]) for k in figures[0]}
    most = {k: x.amax() for k, x in table.items() if k.endswith("_max")}
    sums = {k: x.sum() for k, x in table.items() if k not in most}
    whole = [dict(zip(x, reduced(torch.stack(list(x.values())), op))) for x, op in
             ((sums, "SUM"), (most, "MAX")) if x]
    return {k: next(x[k] for x in whole if k in x) for k in table}
