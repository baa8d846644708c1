"""The slow and obvious forms that the tests compare with, and small random models to run them on."""
import itertools
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import Config, Transformer


def real(*parts):
    """Path of a real file; the test skips without the folder that DATA_DIR names."""
    if not os.environ.get("DATA_DIR"):
        pytest.skip("needs the real files: set DATA_DIR")
    return os.path.join(os.environ["DATA_DIR"], *parts)


def aggregate_by_loop(rewards, mask, how, beta=2.0, scale=True, length_neutral=False):
    """E3 and E4 of one group, read off the page: lists (K, T) in, list (K,) out."""
    rows = []
    for row, real in zip(rewards, mask):
        rows.append(torch.stack([r for r, m in zip(row, real) if m]) if any(real) else None)
    lengths = [len(row) for row in rows if row is not None]
    t_bar = sum(lengths) / len(lengths) if scale and how != "sum" else 1.0
    scores = []
    for row in rows:
        if row is None:
            scores.append(torch.zeros((), dtype=torch.float64))
            continue
        tau = beta if how == "max" else -beta
        soft = torch.exp(row / tau)
        f = {"avg": row.mean(), "sum": row.sum()}.get(
            how, tau * torch.log(soft.mean() if length_neutral else soft.sum()))
        scores.append(t_bar * f)
    return torch.stack(scores)


def order_probability(scores, order):
    """Plackett-Luce as a story: pick the best out of all, then the best out of what is left, ..."""
    probability, left = 1.0, list(order)
    for i in order:
        probability = probability * scores[i].exp() / torch.stack([scores[j].exp() for j in left]).sum()
        left.remove(i)
    return probability


def orders(k):
    return list(itertools.permutations(range(k)))


def preference_of(order):
    """The preferences whose order is `order`, best first."""
    preference = torch.zeros(len(order))
    for rank, i in enumerate(order):
        preference[i] = len(order) - rank
    return preference


def pl_loss_by_loop(scores, preference):
    """One group, ties unordered: each candidate against itself and the strictly worse."""
    total = 0.0
    for i in range(len(scores)):
        rivals = [scores[j] for j in range(len(scores)) if j == i or preference[j] < preference[i]]
        total = total + torch.stack(rivals).exp().sum().log() - scores[i]
    return total


def naive_policy_loss(hidden, weight, targets, logp_weight, entropy_weight=None):
    """The formula of fused.policy_loss with all N x V logits at once."""
    log_p = (hidden @ weight.t()).log_softmax(-1)
    logp = log_p.gather(1, targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = -(logp_weight * logp).sum()
    if entropy_weight is not None:
        loss = loss - (entropy_weight * entropy).sum()
    return loss, logp, entropy


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any operation inside returned in one tensor, backward included."""
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


def tiny(seed=0, **sizes):
    """A random transformer in eval mode, its weights large enough for attention to look somewhere in
    particular."""
    torch.manual_seed(seed)
    small = {"vocab_size": 11, "n_ctx": 48, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = Transformer(Config(**small | sizes))
    with torch.no_grad():
        for p in model.parameters():  # matrices about 0, the scales of the norms about 1
            if p.dim() > 1:
                p.normal_(0.0, 0.3)
            else:
                p.add_(0.1 * torch.randn_like(p))
        model.ln_f.weight.fill_(1.0)
    return model.eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mask_of(*lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]
