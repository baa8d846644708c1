"""How fast, how small, against what: every hot spot side by side in one run.

    python bench.py                          everything on the CPU, some minutes
    python bench.py --case head --json FILE  one case; FILE gets the last line
    python bench.py --case growth --svg assets/growth.svg
    python bench.py --device cuda --json FILE

A case is a function (size, device, dtype) -> ({variant: function}, flops): the plain form ("naive", what the
others are measured by), this project's, the released formula and other libraries. Each function does the work
once and returns the tensors that all variants must agree on, in float64 and in the type that is timed, before
anything is timed. `CASES` says at which sizes a case is timed and at which it is checked first. Other
libraries are imported when it is their turn ("absent" where they cannot be), and never needed.

How one measures is in support/measure.py. `floor` is either a variant ("products": the bare matrix products)
or flops divided by the speed of a large matrix product on this machine, measured in the same run.
"""
import argparse
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import tempfile
import time

import torch
import torch.nn.functional as F

import fused
from aggregate import aggregate
from fused import policy_loss
from model import Config, Transformer, generate, read_candidates
from plackett_luce import plackett_luce_loss
from policy_ppo import ppo_loss
from policy_reinforce import reinforce_loss
from policy_wmle import weighted_mle_loss
from support import measure
from support.log import tolerant_terminal
from support.measure import fresh

PEERS = ("trl", "verl", "liger", "cce", "torch_lce")
LIBRARIES = ("trl", "verl", "liger-kernel", "cut-cross-entropy", "rouge-score", "nltk")  # theirs, by package
TINY, TOY = dict(n_layer=2, n_head=4, n_embd=64), dict(n_layer=4, n_head=4, n_embd=256)
VOCABULARY = 50257  # of decode, judge and candidates: GPT-2's


def lazily_compiled(function):
    """torch.compile at the first call: the import alone costs more than most cases here."""
    made = []

    def call(*x):
        if not made:
            made.append(torch.compile(function, dynamic=False))
        return made[0](*x)
    return call


def network(config, device, dtype):
    """A transformer of these sizes, always with the same weights."""
    torch.manual_seed(0)
    return Transformer(Config(n_ctx=1024, **config)).to(device, dtype).eval()


# --------------------------------------------------------------------------------------------- the two heads


def peer_head(name):
    """A library's (hidden, weight, targets) -> (log-prob, entropy), both differentiable, or ImportError."""
    if name == "trl":
        utils = importlib.import_module("trl.trainer.utils")
        return lambda h, w, y: utils.selective_log_softmax_and_entropy(h @ w.t(), y)
    if name == "verl":  # one file of it needs nothing but torch; importing the package needs ray
        spec = importlib.util.find_spec("verl") or absent()
        home = spec.submodule_search_locations[0]
        path = os.path.join(home, "utils", "experimental", "torch_functional.py")
        found = importlib.util.spec_from_file_location("verl_head", path)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        return lambda h, w, y: module.FusedLinearForPPO()(h[None], w, y[None])
    if name == "liger":  # the portable path; on Hopper the package itself would take CuTe kernels
        op = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")

        def liger(h, w, y):
            nll, entropy = op._FusedLinearPPOFallbackFunction.apply(h, w, y, 1.0, -100, True)
            return -nll, entropy
        return liger
    absent()


def absent():
    """What to call in place of a library that is not there."""
    raise ImportError


def peer_nll(name):
    """A library's (hidden, weight, targets) -> log-prob without entropy, or ImportError."""
    if name == "cce":
        op = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        return lambda h, w, y: -op(h, w, y, reduction="none", impl="cce" if h.is_cuda else "torch_compile")
    if name == "torch_lce":
        op = getattr(F, "linear_cross_entropy", None) or absent()
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
        return lambda h, w, y: -op(h, w, y, reduction="none", options=options)
    head = peer_head(name)
    return lambda h, w, y: head(h, w, y)[0]


def head(size, device, dtype, with_entropy=True):
    """Log-prob and entropy of the policy loss, forward and backward: N rows, D wide, V words, a share
    masked."""
    n, d, v, masked = size
    torch.manual_seed(0)
    hidden = fresh(n, d, device=device, dtype=dtype).requires_grad_()
    weight = fresh(v, d, device=device, dtype=dtype, scale=0.9 / d ** 0.5).requires_grad_()
    y = torch.randint(v, (n,), device=device)
    wide = torch.promote_types(dtype, torch.float32)
    a, b = fresh(n, device=device, dtype=wide), torch.rand(n, device=device).to(wide)
    a[:int(n * masked)], b[:int(n * masked)] = 0, 0

    def total(logp, entropy):
        return -(a * logp).sum() - ((b * entropy).sum() if with_entropy else 0)

    def naive_loss(hidden, weight):
        log_p = (hidden @ weight.t()).to(wide).log_softmax(-1)
        return total(log_p.gather(1, y[:, None]).squeeze(1),
                     -(log_p.exp() * log_p).sum(-1) if with_entropy else None)

    def released_loss(hidden, weight):  # cross-entropy, and softmax + 1e-8 under a logarithm: its own formula
        z = (hidden @ weight.t()).to(wide)
        p = z.softmax(-1) + 1e-8
        logp = -F.cross_entropy(z, y, reduction="none")
        return total(logp, -(p * p.log()).sum(-1) if with_entropy else None)

    def through(loss):
        hidden.grad = weight.grad = None
        loss.backward()
        return loss.detach(), hidden.grad, weight.grad
    out = {"naive": lambda: through(naive_loss(hidden, weight)),
           "ours": lambda: through(policy_loss(hidden, weight, y, a, b if with_entropy else None)[0])}
    for body in ("compiled", "triton") if device == "cuda" else ():
        out["ours " + body] = functools.partial(_with_body, body, out["ours"])
    compiled = lazily_compiled(naive_loss)
    out |= {"compiled": lambda: through(compiled(hidden, weight)),
            "released": lambda: through(released_loss(hidden, weight))}
    for name in PEERS[:3] if with_entropy else PEERS:  # the last two know no entropy
        out[name] = functools.partial(_peer, name, with_entropy, total, through, hidden, weight, y)
    logits, d_weight = torch.empty(min(n, 256), v, device=device, dtype=dtype), torch.zeros_like(weight)

    def products():
        with torch.no_grad():
            for x in hidden[int(n * masked):].split(256):
                z = torch.mm(x, weight.t(), out=logits[:len(x)])
                z @ weight
                d_weight.addmm_(z.t(), x)
    out["products"] = products
    return out, 6 * n * (1 - masked) * d * v


def _with_body(body, run):
    """`run` with another body of the fused chunk."""
    if body == "triton" and fused.triton is None:
        absent()
    fused.BODY = body
    try:
        return run()
    finally:
        fused.BODY = "eager"


def _peer(name, with_entropy, total, through, hidden, weight, y):
    """One library's forward and backward; imported only when it is its turn."""
    if with_entropy:
        return through(total(*[x.squeeze(0) for x in peer_head(name)(hidden, weight, y)]))
    return through(total(peer_nll(name)(hidden, weight, y).squeeze(0), None))


# ------------------------------------------------------------------------------- sampling, judge, candidates


def decode(size, device, dtype):
    """Sampling: B rows, a prompt, new tokens. Greedy, so that all variants must agree; drawing costs what it
    costs."""
    b, prompt, new = size
    model = network(TOY | {"vocab_size": VOCABULARY}, device, dtype)
    tokens = torch.randint(VOCABULARY, (1, prompt), device=device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    greedy = dtype == torch.float64  # the gate compares tokens; timings draw them

    def choose(logits):
        return logits.argmax(-1) if greedy else torch.multinomial(logits.float().softmax(-1), 1).squeeze(1)

    @torch.no_grad()
    def naive():
        rows = torch.cat((tokens, torch.zeros_like(tokens[:, :1])), 1).expand(b, -1)
        for _ in range(new):
            rows = torch.cat((rows, choose(model(rows)[:, -1] @ model.head.t())[:, None]), 1)
        return (rows[:, prompt + 1:],)

    @torch.no_grad()
    def ours(graph=False):
        draw = torch.Generator(device).manual_seed(0)
        cache = model.prefill(tokens, mask)
        heat = 0.0 if greedy else 1.0
        return (generate(model, 0, new, draw, b, cache, temperature=heat, graph=graph)[0],)
    body = 24 * TOY["n_layer"] * TOY["n_embd"] ** 2
    graphed = {"ours graph": lambda: ours(True)} if device == "cuda" else {}
    flops = new * b * (body + 2 * TOY["n_embd"] * VOCABULARY) + prompt * body
    return {"naive": naive, "ours": ours, **graphed}, flops


def judge(size, device, dtype):
    """Label probabilities of n prompts (t tokens) behind m texts (s tokens). naive: the released code's way,
    every prompt with every text again, all positions to the whole vocabulary. ours: kept texts, last
    position, label rows."""
    from tasks.judge import Judge
    m, s, n, t = size
    model = network(TOY | {"vocab_size": VOCABULARY}, device, dtype)
    texts = torch.randint(VOCABULARY, (m, s), device=device)
    prompts = torch.randint(VOCABULARY, (n, t), device=device)
    labels = torch.tensor([11, 500, 700, VOCABULARY - 1], device=device)
    mine = Judge(model, 0, {"x": labels}, t)
    cache = mine.read(texts, torch.ones_like(texts, dtype=torch.bool))

    @torch.no_grad()
    def naive():
        out = []
        for prompt in torch.cat((torch.zeros_like(prompts[:, :1]), prompts), 1):
            logits = model(torch.cat((texts, prompt.expand(m, -1)), 1)) @ model.head.t()
            out.append(logits[:, -1, labels].softmax(-1))
        return (torch.stack(out, 1),)
    body = 24 * TOY["n_layer"] * TOY["n_embd"] ** 2
    ours = lambda: (mine.probabilities(cache, prompts, "x"),)
    return {"naive": naive, "ours": ours}, n * m * (t + 1) * body


def candidates(size, device, dtype):
    """A reward pass, forward and backward: k candidates of c tokens behind b prompts of p. naive: the prompt
    k times."""
    b, p, k, c = size
    model = network(TOY | {"vocab_size": VOCABULARY}, device, dtype).train()
    prompt = torch.randint(VOCABULARY, (b, p), device=device)
    tokens = torch.randint(VOCABULARY, (b, k, c), device=device)
    mask = torch.ones_like(prompt, dtype=torch.bool)

    def through(read):
        model.zero_grad(set_to_none=True)
        some = torch.linspace(-1, 1, read.shape[-1], device=device)
        (read * some).mean().backward()  # any scalar of every state
        return read.detach(), model.blocks[0].qkv.weight.grad, model.wte.weight.grad

    def naive():
        first = torch.zeros_like(tokens[..., :1])
        rows = torch.cat((prompt[:, None].expand(-1, k, -1), first, tokens), -1).flatten(0, 1)
        return through(model(rows)[:, p + 1:].view(b, k, c, -1))

    def ours():
        return through(read_candidates(model, tokens, 0, (prompt, mask))[1])
    body = 24 * TOY["n_layer"] * TOY["n_embd"] ** 2
    return {"naive": naive, "ours": ours}, 3 * b * (p + k * (c + 1)) * body


# --------------------------------------------------------------------------------------- ranking and metrics


def ranking(size, device, dtype):
    """Soft-max f and Plackett-Luce, forward and backward. naive: exact ListMLE by a sort; released: with its
    epsilon."""
    b, k, t = size
    dtype = torch.promote_types(dtype, torch.float32)  # statistics are float32 under half precision
    torch.manual_seed(0)
    rewards = torch.rand(b, k, t, device=device).to(dtype).requires_grad_()
    mask = torch.arange(t, device=device) < torch.randint(1, t + 1, (b, k, 1), device=device)
    preference = torch.rand(b, k, device=device)  # its order is all that counts

    def by_sorting(rewards, log_of_sums):
        scale = mask.sum(-1).to(dtype).mean(-1, keepdim=True)
        e = 2 * scale * torch.logsumexp(rewards.masked_fill(~mask, float("-inf")) / 2, -1)
        e = e.gather(1, preference.argsort(1, descending=True))
        return (log_of_sums(e) - e).sum(1).mean()

    def exact(e):
        return e.flip(1).logcumsumexp(1).flip(1)

    def with_epsilon(e):
        top = e.amax(1, keepdim=True)
        return ((e - top).exp().flip(1).cumsum(1).flip(1) + 1e-10).log() + top

    def mine(rewards):
        return plackett_luce_loss(aggregate(rewards, mask, "max", 2.0), preference)

    def through(loss):
        rewards.grad = None
        loss.backward()
        return loss.detach(), rewards.grad
    compiled = lazily_compiled(mine)
    return {"naive": lambda: through(by_sorting(rewards, exact)), "ours": lambda: through(mine(rewards)),
            "released": lambda: through(by_sorting(rewards, with_epsilon)),
            "compiled ours": lambda: through(compiled(rewards))}, 10 * b * k * t + b * k * k


def metrics(size, device, dtype, which="rougeL"):
    """Pairs of texts scored one by one; the peer is the naive variant. Pairs a second = 1000 x pairs / ms."""
    from tasks import summarize as task_summarize
    n, words = size
    rng = random.Random(0)
    share = list(itertools.accumulate(1 / (i + 2.7) for i in range(20000)))  # Zipf's law, as in prose
    vocabulary = [f"w{i}" for i in range(len(share))]
    text = lambda: " ".join(rng.choices(vocabulary, cum_weights=share, k=rng.randint(words // 2, words)))
    pairs = [(text(), text()) for _ in range(n)]

    def rouge_score():
        scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
        return (torch.tensor([scorer.score(r, p)["rougeL"].fmeasure for p, r in pairs], dtype=torch.float64),)

    def nltk():
        score = importlib.import_module("nltk.translate.meteor_score").single_meteor_score
        plain = type("Plain", (), {"stem": lambda self, w: w})()
        none = type("None_", (), {"synsets": lambda self, w: []})()
        return (torch.tensor([score(r.split(), p.split(), stemmer=plain, wordnet=none) for p, r in pairs],
                             dtype=torch.float64),)
    if which == "rougeL":
        rouge = lambda p, r: task_summarize.rouge(p, r, ["rougeL"])["rougeL"]
        ours = lambda: (torch.tensor([rouge(p, r) for p, r in pairs], dtype=torch.float64),)
        return {"naive": rouge_score, "ours": ours}, 0
    ours = lambda: (torch.tensor([task_summarize.meteor(p, r) for p, r in pairs], dtype=torch.float64),)
    return {"naive": nltk, "ours": ours}, 0


# -------------------------------------------------------------------------------------- whole training steps


def step(size, device, dtype, objective="reinforce"):
    """One update, Adam included: b prompts with k candidates of t tokens, a policy of this size. naive: the
    objective as the paper has it, on all logits at once, left to autograd."""
    b, prompt, k, t, config = size
    model = network(config, device, torch.float64 if dtype == torch.float64 else torch.float32).train()
    v, optimizer = config["vocab_size"], torch.optim.Adam(model.parameters(), lr=0.0, fused=True)
    tokens, text = torch.randint(v, (b, k, t), device=device), torch.randint(v, (b, prompt), device=device)
    mask, wide = torch.ones_like(text, dtype=torch.bool), torch.promote_types(dtype, torch.float32)
    rewards = fresh(b * k, t, device=device, dtype=wide)
    rewards = rewards.abs() if objective == "wmle" else rewards
    old = 0.1 * fresh(b * k, t, device=device, dtype=wide) - math.log(v)  # the ratios of PPO lie around 1
    body = {False: model, True: lazily_compiled(model)}

    def update(loss_of, compiled=False):
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype == torch.bfloat16):
            hidden = read_candidates(body[compiled], tokens, 0, (text, mask) if prompt else None)[0]
            loss = loss_of(hidden.flatten(0, 1), model.head, tokens.flatten(0, 1))  # (b*k, t, D)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach(), model.wte.weight.grad

    def naive(h, w, y):
        log_p = (h @ w.t()).to(wide).log_softmax(-1)
        logp = log_p.gather(2, y[..., None]).squeeze(2)
        if objective == "reinforce":
            return -(rewards * logp - 0.1 * (log_p.exp() * log_p).sum(-1)).mean()
        if objective == "wmle":
            return -(rewards * logp).mean()
        ratio = (logp - old).exp()
        return -torch.minimum(ratio * rewards, ratio.clamp(0.8, 1.2) * rewards).mean()

    def ours(h, w, y):
        every = torch.ones_like(y, dtype=torch.bool)
        if objective == "ppo":
            return ppo_loss(h, w, y, every, old, rewards)[0]
        if objective == "wmle":
            return weighted_mle_loss(h, w, y, every, rewards, "length")[0]
        return reinforce_loss(h, w, y, every, rewards, alpha=0.1)[0]
    parameters = sum(p.numel() for p in model.parameters())
    rows, d = b * k * t, config["n_embd"]
    flops = 6 * (parameters - v * d) * (rows + b * prompt) + 6 * rows * d * v
    return {"naive": lambda: update(naive), "ours": lambda: update(ours),
            "compiled ours": lambda: update(ours, True)}, flops


GPT2 = dict(vocab_size=50257, n_layer=12, n_head=12, n_embd=768)
PROMPT, SUMMARY = TINY | {"vocab_size": 1125}, dict(n_layer=2, n_head=4, n_embd=96, vocab_size=256)
STEPS = {"prompt": ("reinforce", (1, 0, 64, 5, PROMPT)), "summarize": ("wmle", (32, 40, 1, 16, SUMMARY)),
         "edits": ("ppo", (16, 10, 1, 20, SUMMARY))}  # about the defaults; edits: a minibatch of four
# For --case threads: the tasks' default steps, wider ones, and one like GPT-2's in a small batch.
THREAD_STEPS = [(f"step {task}", size) for task, (_, size) in STEPS.items()] + [
    ("step prompt", (16, 32, 1, 32, dict(n_layer=layers, n_head=4, n_embd=width, vocab_size=2048)))
    for layers, width in ((2, 128), (2, 256), (2, 512), (4, 768))]
RANKINGS = [(16, 5, 5), (64, 5, 64), (512, 16, 128)]
CASES = {  # case: (function, sizes on a CPU, sizes on a GPU, a small size for the float64 gate)
    "head": (head, [(2048, 256, 50257, 0.0), (2048, 256, 50257, 0.5), (320, 256, 50257, 0.0),
                    (80, 256, 50257, 0.0)],
             [(8192, 768, 50257, 0.0), (8192, 768, 50257, 0.5), (16384, 768, 50257, 0.0),
              (2048, 256, 50257, 0.0)],
             (96, 48, 3001, 0.25)),
    "wmle": (functools.partial(head, with_entropy=False), [(2048, 256, 50257, 0.0), (80, 256, 50257, 0.0)],
             [(8192, 768, 50257, 0.0), (16384, 768, 50257, 0.0)], (96, 48, 3001, 0.25)),
    "decode": (decode, [(32, 32, 32), (8, 1, 64), (32, 1, 5)], [(32, 32, 32), (128, 32, 128)], (3, 4, 5)),
    "judge": (judge, [(32, 32, 16, 5)], [(32, 32, 16, 5), (128, 64, 64, 5)],
              (43, 4, 3, 3)),  # 129 rows are asked of it, one more than it reads at once
    "candidates": (candidates, [(4, 64, 5, 32), (2, 256, 3, 64), (8, 5, 5, 5)],
                   [(4, 64, 5, 32), (16, 256, 4, 64)], (2, 5, 3, 4)),
    "ranking": (ranking, RANKINGS, RANKINGS, (4, 5, 6)),
    "rouge": (metrics, [(500, 60), (100, 300)], [], (50, 20)),
    "meteor": (functools.partial(metrics, which="meteor"), [(500, 60), (100, 300)], [], (50, 20)),
    **{f"step {task}": (functools.partial(step, objective=objective), [size],
                        [size] + [(1, 0, 64, 128, GPT2)] * (task == "prompt"),
                        (2, 3, 2, 3, TINY | {"vocab_size": 97}))
       for task, (objective, size) in STEPS.items()},
    "grow head": (head, [], [], (96, 48, 3001, 0.25)),  # the head alone, for the table of how cost grows
}
GROUPS = {"metrics": ("rouge", "meteor"), "step": tuple(f"step {task}" for task in STEPS)}
ITEMS = {"step": ("tokens", lambda b, prompt, k, t, _: b * (prompt + k * t)),  # of which a call does so many
         "decode": ("tokens", lambda b, _, new: b * new),
         "rouge": ("pairs", lambda n, _: n), "meteor": ("pairs", lambda n, _: n)}
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # bfloat16 operations a second by data sheet, for MFU
NOT_EXACT = {"released": 1e-3, "trl": 1e-5, "verl": 1e-5, "liger": 1e-5, "cce": 1e-2, "compiled ours": 1e-6,
             "ours triton": 1e-4}
# Who may miss by more than 1e-12: an epsilon (released), float32 inside (peers, Triton), refused float32
# (compiled).


# ----------------------------------------------------------------------------------------------- the command

AXES = {"rows": (512, 1024, 2048, 4096), "vocabulary": (4096, 8192, 16384, 32768), "K": (2, 4, 8, 16),
        "T": (16, 32, 64, 128), "head-rows": (512, 1024, 2048, 4096),
        "head-vocabulary": (4096, 8192, 16384, 32768)}  # of --case growth


def build(case, size, device, dtype):
    """The variants of a case, for the process that times one of them."""
    return CASES[case][0](size, device, dtype)


def gate(case, device, dtype=torch.float64):
    """{variant: its error, or why it is not timed}: at the case's small size, in float64 and, where the
    variant draws nothing, in the type that is timed."""
    kinds = [torch.float64] if case == "decode" else dict.fromkeys((torch.float64, dtype))
    return measure.agreement(lambda kind: build(case, CASES[case][3], device, kind)[0], kinds, NOT_EXACT)


def promises(device, dtype):
    """What has to hold whatever the naive form does: bounds, masked rows, wide gaps. AssertionError where it
    does not."""
    wide = torch.promote_types(dtype, torch.float32)
    hidden = fresh(64, 32, device=device, dtype=dtype, scale=3.0).requires_grad_()
    a, y = fresh(64, device=device, dtype=wide), torch.randint(500, (64,), device=device)
    a[5], a[7] = 0, 0
    weight = fresh(500, 32, device=device, dtype=dtype)
    loss, logp, entropy = policy_loss(hidden, weight, y, a, a.abs())
    loss.backward()
    assert (logp <= 1e-6).all(), "a log-probability above 0"
    assert ((-1e-5 <= entropy) & (entropy <= math.log(500) + 1e-4)).all(), "an entropy out of its bounds"
    assert (hidden.grad[[5, 7]] == 0).all(), "a row without weight has a gradient"
    assert policy_loss(hidden, weight, y, 0 * a)[0] == 0, "a batch without weights has a loss"
    scores = torch.tensor([[40.0, 0.0]], device=device, requires_grad=True)
    loss = plackett_luce_loss(scores, torch.tensor([[1.0, 0.0]], device=device))
    loss.backward()
    assert loss < 1e-15 and (scores.grad.abs() < 1e-15).all(), "a ranking right by 40 has a loss"


def asked(ground, case, size, variant, threads=None):
    """A row of one variant, timed in a process of its own; None where it failed."""
    threads = threads or ground.threads
    return measure.in_process(build, case, size, variant, ground.device, ground.kind, threads)


def timed(case, size, verdict, ground):
    """The rows of a case at one size, printed as a table. verdict: what `gate` said."""
    words = [f"{x['n_layer']} layers, {x['n_embd']}, {x['vocab_size']}" if isinstance(x, dict) else str(x)
             for x in size]
    names = [n for n, error in verdict.items() if not isinstance(error, str)]
    wide = case in ("head", "wmle")
    if wide and (size[0] < 1000 or size[3]):  # where the question is only ours against naive
        names = [n for n in names if n in ("naive", "ours")]
    names = ["naive"] * ("naive" in names) + [n for n in names if n != "naive"] + ["products"] * wide
    ask = lambda name: asked(ground, case, size, name)
    rows = measure.compare(f"{case} {' x '.join(words)}", ask, names, ground, PEERS)
    if rows:
        unit, count = ITEMS.get(case.split()[0], (None, None))
        on = torch.cuda.get_device_name() if ground.device == "cuda" else ""
        peak = next((x for name, x in PEAK.items() if name in on and unit == "tokens"), None)
        measure.show(rows, ground, unit, count(*size) if unit else None, peak)
    return rows


def growth_sizes(axis, x):
    """(case, size) of one point: a whole step, or the head alone at more rows x vocabulary than a step
    has."""
    if axis.startswith("head"):
        return "grow head", (x, 128, 16384, 0.0) if axis == "head-rows" else (1024, 128, x, 0.0)
    b, prompt, k, t, v = {"rows": (x // 32, 32, 1, 32, 8192), "vocabulary": (16, 32, 1, 32, x),
                          "K": (4, 64, x, 32, 8192), "T": (4, 64, 4, x, 8192)}[axis]
    return "step prompt", (b, prompt, k, t, dict(n_layer=2, n_head=4, n_embd=128, vocab_size=v))


def threads():
    """A step with one thread and with two, turn by turn, the faster of two runs each: where --threads 0 of
    train.py should take more than one (support.device.TWO_THREADS_PAY). Only an idle machine can say so: two
    threads wait for one another."""
    rows, ground = [], measure.Ground("cpu", torch.float32, 1)
    head = f"{'step':10}{'width':>7}{'tokens':>8}{'Gflop':>8}{'1 thread':>11}{'2 threads':>11}"
    print(f"\n{head}{'x faster':>10} (ms)")
    for case, size in THREAD_STEPS:
        b, prompt, k, t, config = size
        turns = [(n, asked(ground, case, size, "ours", n)) for n in (1, 2, 1, 2)]
        best = {n: min((r["ms"] for m, r in turns if m == n and r), default=math.nan) for n in (1, 2)}
        flops = next(r["flops"] for _, r in turns if r)
        print(f"{case[5:]:10}{config['n_embd']:7}{b * (prompt + k * t):8}{flops / 1e9:8.1f}{best[1]:11.1f}"
              f"{best[2]:11.1f}{best[1] / best[2]:10.2f}")
        rows += [{"case": f"threads {case[5:]} {config['n_embd']}", "variant": f"{n} thread{'s' * (n > 1)}",
                  "ms": round(best[n], 3), "mb": None, "vs_naive": round(best[1] / best[n], 3),
                  "mem_vs_naive": None, "vs_best_peer": None, "vs_floor": None} for n in (1, 2)]
    return rows


# ------------------------------------------------------------------------------------ corpora that do not fit


def write_articles(folder, articles, words=700, seed=0):
    """train, validation and test of made-up articles of about so many words with highlights, in `folder`:
    sentences of made-up words after Zipf's law out of a pool, so that a gigabyte takes a minute. What is
    there already stays."""
    rng = random.Random(seed)
    starts, ends = "b c d f g k l m n p r s t v st tr".split(), "a e i o u an er".split()
    syllables = [a + b for a in starts for b in ends]
    known = ["".join(rng.choices(syllables, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(60_000)]
    share = list(itertools.accumulate(1 / (i + 2.7) for i in range(len(known))))
    said = [rng.choices(known, cum_weights=share, k=17) for _ in range(min(50_000, 50 * articles))]
    pool = [" ".join(x[:8]).capitalize() + ", " + " ".join(x[8:]) + "." for x in said]
    for split, n in (("train", articles), ("validation", articles // 20 + 1), ("test", articles // 25 + 1)):
        path = os.path.join(folder, f"{split}.jsonl")
        if os.path.exists(path):
            continue
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            for _ in range(n):
                text = rng.choices(pool, k=max(1, round(words / 17 * rng.uniform(0.5, 1.5))))
                f.write(json.dumps({"article": " ".join(text), "highlights": " ".join(text[:3])}) + "\n")
        os.replace(path + ".tmp", path)


def corpus_start(answer, folder, cache, threads):
    """What a start of train.py reads, in a process of its own: sends processor seconds and the high-water
    mark of memory in MB, imports and libraries included."""
    import train
    from support.log import Log
    log = Log()
    c = train.parse_flags(train.Flags, ["--task", "summarize", "--data", folder, "--cache_dir", cache,
                                        "--threads", str(threads)], "")[0]
    task = train.TASKS["summarize"](c, torch.device("cpu"), log.progress, log.say)
    batch = task.batch(c.batch_size, torch.Generator().manual_seed(1))
    found = task.fingerprint()
    answer.send({"cpu": time.process_time(), "mb": measure.memory_peak("cpu"), "tokens": found["tokens"],
                 "shape": list(batch.context.shape)})


def corpus(c):
    """A first start and a later one on so many articles (CNN/DailyMail has 287,113): seconds and memory."""
    rows = []
    with tempfile.TemporaryDirectory(dir=c.folder) as cache:
        folder = os.path.join(c.folder or cache, f"articles-{c.articles}")
        os.makedirs(folder, exist_ok=True)
        write_articles(folder, c.articles)
        for start in ("first", "later"):
            answer, there = multiprocessing.Pipe(duplex=False)
            arguments = there, folder, os.path.join(cache, "cache"), c.threads
            process = multiprocessing.get_context("spawn").Process(target=corpus_start, args=arguments)
            began = time.time()
            process.start()
            there.close()
            row = answer.recv()
            process.join()
            seconds = time.time() - began
            print(f"{start} start on {c.articles:,} articles: {seconds:.1f} s ({row['cpu']:.1f} s of "
                  f"processor), {row['mb']:.0f} MB at most, a batch is {row['shape']}, "
                  f"ids {row['tokens'][:12]}")
            rows.append({"case": f"corpus {c.articles}", "variant": f"{start} start",
                         "ms": round(1e3 * seconds, 1), "cpu_ms": round(1e3 * row["cpu"], 1),
                         "mb": round(row["mb"], 1), "ids": row["tokens"]})
    return rows


def flags(names):
    """What was asked for; argparse's error for a GPU that is not there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = ["all", "corpus", "growth", "threads", *GROUPS, *names]
    parser.add_argument("--case", default="all", choices=cases, metavar="NAME",
                        help=f"default: all; one of {', '.join(cases)}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", help="file for the last line")
    parser.add_argument("--svg", help="file for the picture of --case growth")
    parser.add_argument("--articles", type=int, default=287_113, help="of --case corpus")
    parser.add_argument("--folder", help="of --case corpus: where its articles stay (default: nowhere)")
    c = parser.parse_args()
    if c.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is there")
    return c


def described(ground, load):
    """The machine, for the head of the output and of the JSON."""
    cpu = platform.processor() or platform.machine()
    return {"device": torch.cuda.get_device_name() if ground.device == "cuda" else cpu,
            "threads": ground.threads, "dtype": ground.kind, "torch": torch.__version__,
            "gemm_gflops": round(ground.rate / 1e9, 1), "load_before": round(load, 2),
            "peers": measure.versions(LIBRARIES)}


def main():
    """Gates, then timings, then one json line."""
    tolerant_terminal()
    named = [x for x in CASES if x[:4] != "grow"]
    c = flags(named)
    if c.case == "corpus":  # before torch computes anything: a child's memory must not begin with ours
        return print("\n" + json.dumps({"machine": {"threads": c.threads}, "rows": corpus(c)}))
    torch.set_num_threads(c.threads)
    dtype = getattr(torch, c.dtype or ("bfloat16" if c.device == "cuda" else "float32"))
    ground = measure.Ground(c.device, dtype, c.threads)
    if c.case == "all":
        ground.again = 75  # seconds for void rounds: all cases should fit into eight minutes
    load = os.getloadavg()[0]  # before anything of ours adds to it
    ground.rate = measure.gemm_rate(c.device, dtype)
    machine = described(ground, load)
    print(" ".join(f"{k} {v}" for k, v in machine.items()))
    promises(c.device, dtype)
    rows = []
    for case in named if c.case == "all" else GROUPS.get(c.case, [c.case]):
        if case in CASES:
            verdict = gate(case, c.device, dtype)
            said = lambda x: x if isinstance(x, str) else f"off by {x:.0e}" if x else "equal to the last bit"
            print(f"\n{case}: " + ", ".join(f"{n} {said(x)}" for n, x in verdict.items()))
            for size in CASES[case][2 if c.device == "cuda" else 1]:
                rows += timed(case, size, verdict, ground)
    if c.case in ("all", "growth"):
        points = [(axis, x, *growth_sizes(axis, x)) for axis, values in AXES.items() for x in values]
        grown = measure.growth(points, functools.partial(asked, ground), ground)
        rows += grown
        if c.svg:
            measure.svg(grown, AXES, c.svg)
    if c.case == "threads":
        rows += threads()
    machine["load_after"] = round(os.getloadavg()[0], 2)
    line = json.dumps({"machine": machine, "rows": rows})
    if c.json:
        with open(c.json, "w", encoding="utf-8") as f:
            f.write(line + "\n")
    print("\n" + line)


if __name__ == "__main__":
    main()
