"""What each token of a prompt is really worth: exact Shapley values of E10, to compare credit with.

A prompt of six words is a game of six players: a coalition is worth what the judge says of the prompt with
random words in the places of the others. Sixty-four coalitions are few enough to ask about all of them, so
nothing is estimated but the mean over the fillings. It is an examination: on dev, and no queries of the run.
"""
import torch

from support.credit import shapley, spearman

PROMPTS, FILLINGS, MOST = 16, 4, 6  # prompts; random words behind each coalition; tokens, or 2^T is too many


def mixed_prompts(task, cues, plain):
    """The same prompts in every run: one, two, three, ... different cue words at random places among other
    words. cues, plain: ids -> (PROMPTS, T)."""
    g, rows = torch.Generator().manual_seed(0), []
    for i in range(PROMPTS):
        k = 1 + i % max(1, min(task.width - 1, len(cues)))
        said = cues[torch.randperm(len(cues), generator=g)[:k]]
        others = plain[torch.randint(len(plain), (task.width,), generator=g)]
        row = torch.cat((said, others))[:task.width]
        rows.append(row[torch.randperm(task.width, generator=g)])
    return torch.stack(rows).to(task.device)


@torch.no_grad()
def token_worth(task, prompts):
    """Shapley values of the tokens of prompts (N, T), in E10's units on dev: (N, T)."""
    g, (n, t) = torch.Generator().manual_seed(1), prompts.shape
    fill = torch.randint(task.n_ids, (FILLINGS, n, t), generator=g).to(task.device)
    there = torch.arange(2 ** t)[:, None] >> torch.arange(t) & 1  # (2^T, T): who is in
    said = torch.where(there.bool().to(task.device)[:, None, None], prompts, fill)  # (2^T, F, N, T)
    parts = said.flatten(0, 2).split(512)
    worth = torch.cat([task.ask(part, "dev")[0] for part in parts]).view(2 ** t, FILLINGS, n)
    return shapley(worth.mean(1).double(), t).T


def credit_truth(task, guide, cues, plain):
    """Mean over the prompts of the rank correlation of r with what each of a prompt's tokens is worth, which
    is compared in whole multiples of --resolution, like the preferences that r is fitted to. None where
    prompts are too long to ask about every coalition, or no reward or worth differs."""
    if task.width > MOST:
        return None
    prompts = mixed_prompts(task, cues, plain)
    worth = token_worth(task, prompts).cpu()  # (N, T)
    worth = (worth / task.cfg.resolution).round() if task.cfg.resolution else worth
    found = [spearman(r, w) for r, w in zip(guide(prompts[None])[0].float().cpu(), worth)]
    known = [rho for rho in found if rho is not None]
    return sum(known) / len(known) if known else None  # divisor: prompts with an order
