"""How fast, how small, against what: every hot spot side by side in one run.

    python bench.py                          everything on the CPU, some minutes
    python bench.py --case head --json FILE  one case; FILE gets the last line
    python bench.py --case growth --svg assets/growth.svg
    python bench.py --device cuda --json FILE

The rules, without which such numbers are worth little. Before any timing each variant has to agree with the naive one
in float64 and in the type that is timed. Each variant is timed in a process of its own, which also makes its memory
high-water its own. The naive variant runs first and last: where the two differ by more than 5 %, the machine was busy,
the round is void and runs once more. What counts are the ratios of one run; milliseconds are printed beside them. Other
libraries take part where they can be imported ("absent" otherwise); nothing here needs them.

A case is a function (size, device, dtype) -> ({variant: function}, flops): each function does the work once and returns
the tensors that all variants must agree on. `floor` is either a variant ("products": the bare matrix products) or flops
divided by the speed of a large matrix product on this machine, measured in the same run.
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
import sys
import time

import torch
import torch.nn.functional as F

import fused
from aggregate import aggregate
from fused import policy_loss
from model import Config, Transformer, generate, read_candidates
from plackett_luce import plackett_luce_loss

PEERS = ("trl", "verl", "liger", "cce", "torch_lce")
TINY, TOY = dict(n_layer=2, n_head=4, n_embd=64), dict(n_layer=4, n_head=4, n_embd=256)


def fresh(*shape, device, dtype=torch.float32, scale=1.0):
    """Random numbers, never zeros: a machine multiplies zeros faster."""
    return (scale * torch.randn(*shape, device=device)).to(dtype)


def lazily_compiled(function):
    """torch.compile at the first call: the import alone costs more than most cases here."""
    made = []

    def call(*x):
        made or made.append(torch.compile(function, dynamic=False))
        return made[0](*x)
    return call


def network(config, device, dtype):
    torch.manual_seed(0)
    return Transformer(Config(n_ctx=1024, **config)).to(device, dtype).eval()


# ------------------------------------------------------------------------------------------------------- the two heads


def peer_head(name):
    """A library's (hidden, weight, targets) -> (log-prob, entropy), both differentiable, or ImportError."""
    if name == "trl":
        utils = importlib.import_module("trl.trainer.utils")
        return lambda h, w, y: utils.selective_log_softmax_and_entropy(h @ w.t(), y)
    if name == "verl":  # one file of it needs nothing but torch; importing the package needs ray
        spec = importlib.util.find_spec("verl") or absent()
        path = os.path.join(spec.submodule_search_locations[0], "utils", "experimental", "torch_functional.py")
        module = importlib.util.module_from_spec(s := importlib.util.spec_from_file_location("verl_head", path))
        s.loader.exec_module(module)
        return lambda h, w, y: module.FusedLinearForPPO()(h[None], w, y[None])
    if name == "liger":  # the portable path; on Hopper the package itself would take CuTe kernels, if installed
        op = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")

        def liger(h, w, y):
            nll, entropy = op._FusedLinearPPOFallbackFunction.apply(h, w, y, 1.0, -100, True)
            return -nll, entropy
        return liger
    absent()


def absent():
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
    """Log-prob and entropy of the policy loss, forward and backward: N rows, D wide, V words, a share masked."""
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
        return total(-F.cross_entropy(z, y, reduction="none"), -(p * p.log()).sum(-1) if with_entropy else None)

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


# ------------------------------------------------------------------------------------------ sampling, judge, candidates


def decode(size, device, dtype):
    """Sampling: B rows, a prompt, new tokens. Greedy, so that all variants must agree; drawing costs what it costs."""
    b, prompt, new = size
    model = network(TOY | {"vocab_size": 50257}, device, dtype)
    tokens = torch.randint(50257, (1, prompt), device=device)
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
        return (generate(model, 0, new, draw, b, model.prefill(tokens, mask), temperature=0.0 if greedy else 1.0,
                         graph=graph)[0],)
    body = 24 * TOY["n_layer"] * TOY["n_embd"] ** 2
    graphed = {"ours graph": lambda: ours(True)} if device == "cuda" else {}
    return {"naive": naive, "ours": ours, **graphed}, new * b * (body + 2 * TOY["n_embd"] * 50257) + prompt * body


def judge(size, device, dtype):
    """Label probabilities of n prompts (t tokens) behind m texts (s tokens). naive: the released code's way, every prompt
    with every text again, all positions to the whole vocabulary. ours: kept texts, last position, label rows."""
    from task_prompt import Judge
    m, s, n, t = size
    model = network(TOY | {"vocab_size": 50257}, device, dtype)
    texts, prompts = torch.randint(50257, (m, s), device=device), torch.randint(50257, (n, t), device=device)
    labels = torch.tensor([11, 500, 7000, 40000], device=device)
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
    return {"naive": naive, "ours": lambda: (mine.probabilities(cache, prompts, "x"),)}, n * m * (t + 1) * body


def candidates(size, device, dtype):
    """A reward pass, forward and backward: k candidates of c tokens behind b prompts of p. naive: the prompt k times."""
    b, p, k, c = size
    model = network(TOY | {"vocab_size": 50257}, device, dtype).train()
    prompt, tokens = torch.randint(50257, (b, p), device=device), torch.randint(50257, (b, k, c), device=device)
    mask = torch.ones_like(prompt, dtype=torch.bool)

    def through(read):
        model.zero_grad(set_to_none=True)
        (read * torch.linspace(-1, 1, read.shape[-1], device=device)).mean().backward()  # any scalar of every state
        return read.detach(), model.blocks[0].qkv.weight.grad, model.wte.weight.grad

    def naive():
        first = torch.zeros_like(tokens[..., :1])
        rows = torch.cat((prompt[:, None].expand(-1, k, -1), first, tokens), -1).flatten(0, 1)
        return through(model(rows)[:, p + 1:].view(b, k, c, -1))

    def ours():
        return through(read_candidates(model, tokens, 0, (prompt, mask))[1])
    return {"naive": naive, "ours": ours}, 3 * b * (p + k * (c + 1)) * 24 * TOY["n_layer"] * TOY["n_embd"] ** 2


# ------------------------------------------------------------------------------------------------- ranking and metrics


def ranking(size, device, dtype):
    """Soft-max f and Plackett-Luce, forward and backward. naive: exact ListMLE by a sort; released: with its epsilon."""
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
    import task_summarize
    n, words = size
    rng = random.Random(0)
    share = list(itertools.accumulate(1 / (i + 2.7) for i in range(20000)))  # Zipf's law: words as frequent as in prose
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


# ------------------------------------------------------------------------------------------------- whole training steps


def step(size, device, dtype):
    """One REINFORCE update, Adam included: b prompts with k candidates of t tokens, a policy of this size."""
    b, prompt, k, t, config = size
    model = network(config, device, torch.float64 if dtype == torch.float64 else torch.float32).train()
    v, optimizer = config["vocab_size"], torch.optim.Adam(model.parameters(), lr=0.0, fused=True)
    tokens, text = torch.randint(v, (b, k, t), device=device), torch.randint(v, (b, prompt), device=device)
    mask, weights = torch.ones_like(text, dtype=torch.bool), fresh(b * k * t, device=device, dtype=torch.float32) / t
    if dtype == torch.float64:
        weights = weights.double()
    body = {False: model, True: lazily_compiled(model)}

    def update(head_loss, compiled=False):
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype == torch.bfloat16):
            hidden = read_candidates(body[compiled], tokens, 0, (text, mask) if prompt else None)[0].flatten(0, 2)
            loss = head_loss(hidden, model.head, tokens.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach(), model.wte.weight.grad

    def naive(h, w, y):
        log_p = (h @ w.t()).to(weights.dtype).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return -(weights * log_p.gather(1, y[:, None]).squeeze(1) + 0.1 * entropy).sum()

    def ours(h, w, y):
        return policy_loss(h, w, y, weights, torch.full_like(weights, 0.1))[0]
    parameters = sum(p.numel() for p in model.parameters())
    rows, d = b * k * t, config["n_embd"]
    flops = 6 * (parameters - v * d) * (rows + b * prompt) + 6 * rows * d * v
    return {"naive": lambda: update(naive), "ours": lambda: update(ours),
            "compiled ours": lambda: update(ours, True)}, flops


GPT2 = dict(vocab_size=50257, n_layer=12, n_head=12, n_embd=768)
PROMPT, SUMMARY = TINY | {"vocab_size": 1125}, dict(n_layer=2, n_head=4, n_embd=96, vocab_size=256)
STEPS = [(1, 0, 64, 5, PROMPT), (32, 40, 1, 24, SUMMARY)]  # the two tasks' defaults
RANKINGS = [(16, 5, 5), (64, 5, 64), (512, 16, 128)]
CASES = {  # case: (function, sizes on a CPU, sizes on a GPU, a small size for the float64 gate)
    "head": (head, [(2048, 256, 50257, 0.0), (2048, 256, 50257, 0.5), (320, 256, 50257, 0.0), (80, 256, 50257, 0.0)],
             [(8192, 768, 50257, 0.0), (8192, 768, 50257, 0.5), (16384, 768, 50257, 0.0), (2048, 256, 50257, 0.0)],
             (96, 48, 3001, 0.25)),
    "wmle": (functools.partial(head, with_entropy=False), [(2048, 256, 50257, 0.0), (80, 256, 50257, 0.0)],
             [(8192, 768, 50257, 0.0), (16384, 768, 50257, 0.0)], (96, 48, 3001, 0.25)),
    "decode": (decode, [(32, 32, 32), (8, 1, 64), (32, 1, 5)], [(32, 32, 32), (128, 32, 128)], (3, 4, 5)),
    "judge": (judge, [(32, 32, 16, 5)], [(32, 32, 16, 5), (128, 64, 64, 5)], (3, 6, 4, 3)),
    "candidates": (candidates, [(4, 64, 5, 32), (2, 256, 3, 64), (8, 5, 5, 5)], [(4, 64, 5, 32), (16, 256, 4, 64)],
                   (2, 5, 3, 4)),
    "ranking": (ranking, RANKINGS, RANKINGS, (4, 5, 6)),
    "rouge": (metrics, [(500, 60)], [], (50, 20)),
    "meteor": (functools.partial(metrics, which="meteor"), [(500, 60)], [], (50, 20)),
    "step": (step, STEPS, [*STEPS, (1, 0, 64, 128, GPT2)], (2, 3, 2, 3, TINY | {"vocab_size": 97})),
}
GROUPS = {"metrics": ("rouge", "meteor")}
ITEMS = {"step": ("tokens", lambda b, prompt, k, t, _: b * (prompt + k * t)), "rouge": ("pairs", lambda n, _: n),
         "meteor": ("pairs", lambda n, _: n), "decode": ("tokens", lambda b, _, new: b * new)}  # what a second is worth
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # bfloat16 operations a second by the data sheet, for MFU
NOT_EXACT = {"released": 1e-3, "trl": 1e-5, "verl": 1e-5, "liger": 1e-5, "cce": 1e-2, "compiled ours": 1e-6,
             "ours triton": 1e-4}
# Who may miss by more than 1e-12: an epsilon (released), float32 inside (peers, Triton), refused float32 (compiled).


# ------------------------------------------------------------------------------------------------------------ measuring


def gate(case, device, dtype=torch.float64):
    """{variant: None, or why it must not be timed}: at a small size against naive, in float64 and then, where the variant
    draws nothing, in the type that is timed; by the largest error in its own scale, half precision by the norm."""
    function, _, _, small = CASES[case]
    verdict, want = {}, None
    for kind in dict.fromkeys((torch.float64, dtype)):
        if kind != torch.float64 and case == "decode":
            continue
        for name, run in function(small, device, kind)[0].items():
            if name == "products" or verdict.get(name):
                continue
            try:
                got = run()
            except ImportError:
                verdict[name] = "absent"
                continue
            except Exception as error:  # a peer that breaks on this machine is not a reason to measure nothing
                if name in ("naive", "ours"):
                    raise
                verdict[name] = f"fails here: {type(error).__name__}"
                continue
            want = want or got
            norm = (lambda x: x.norm()) if kind in (torch.bfloat16, torch.float16) else (lambda x: x.abs().max())
            error = max((norm(g.double() - w.double()) / norm(w.double()).clamp(min=1e-30)).item()
                        for g, w in zip(got, want))
            allowed = max(NOT_EXACT.get(name, 0), {torch.float64: 1e-12, torch.float32: 5e-6}.get(kind, 1e-2))
            verdict[name] = None if error <= allowed else f"FAIL: off by {error:.1e} in {str(kind)[6:]}"
    return verdict


def promises(device, dtype):
    """What has to hold whatever the naive form does: bounds, masked rows, wide gaps. AssertionError where it does not."""
    wide = torch.promote_types(dtype, torch.float32)
    hidden = fresh(64, 32, device=device, dtype=dtype, scale=3.0).requires_grad_()
    a, y = fresh(64, device=device, dtype=wide), torch.randint(500, (64,), device=device)
    a[5], a[7] = 0, 0
    weight = fresh(500, 32, device=device, dtype=dtype)
    loss, logp, entropy = policy_loss(hidden, weight, y, a, a.abs())
    loss.backward()
    assert (logp <= 1e-6).all() and (entropy >= -1e-5).all() and (entropy <= math.log(500) + 1e-4).all(), "bounds"
    assert (hidden.grad[[5, 7]] == 0).all(), "a row without weight has a gradient"
    assert policy_loss(hidden, weight, y, 0 * a)[0] == 0, "a batch without weights has a loss"
    scores = torch.tensor([[40.0, 0.0]], device=device, requires_grad=True)
    loss = plackett_luce_loss(scores, torch.tensor([[1.0, 0.0]], device=device))
    loss.backward()
    assert loss < 1e-15 and (scores.grad.abs() < 1e-15).all(), "a ranking right by 40 has a loss"


def worker(answer, case, size, variant, device, dtype, threads):
    """Times one variant in this process and sends {"ms", "median", "mb", "flops"}, or the error as text. ms is the minimum
    on a CPU, which others may disturb, and the median on a GPU, by its own clock and with warm caches."""
    try:
        torch.set_num_threads(threads)
        variants, flops = CASES[case][0](size, device, getattr(torch, dtype))
        run, start, times = variants[variant], memory_now(device), []
        run(), wait(device)  # warm-up
        while len(times) < 2 or (sum(times) < 700 and len(times) < 60):
            times.append(milliseconds(run, device))
        median = sorted(times)[len(times) // 2]
        answer.send({"ms": median if device == "cuda" else min(times), "median": median,
                     "mb": memory_peak(device) - start, "flops": flops})
    except Exception as error:  # a peer that breaks here is not a reason to measure nothing
        answer.send(f"{type(error).__name__}: {error}")


def milliseconds(run, device):
    """How long one call takes."""
    if device == "cuda":
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record(), run(), last.record(), wait(device)
        return first.elapsed_time(last)
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def memory_now(device):
    """MB in use, with the high-water mark brought down to it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:  # no such file, or not ours to write: the mark then also knows the past
        pass
    return status("VmRSS:")


def memory_peak(device):
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else status("VmHWM:")


def status(field):
    """A line of this process's status in MB; 0 where the system keeps none."""
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith(field)) / 1024
    except (OSError, StopIteration):
        return 0.0


def gemm_rate(device, dtype):
    """Floating point operations a second of one large matrix product: the floor's unit."""
    n = 8192 if device == "cuda" else 1536
    a, b = fresh(n, n, device=device, dtype=dtype), fresh(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / (1e-3 * min(milliseconds(lambda: a @ b, device) for _ in range(7)))


def in_process(*arguments):
    """A row from `worker` in a process of its own, or None with the reason on stderr. The process is forked from a server
    that has imported torch and computed nothing yet: fresh memory and threads, without two seconds of imports."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # where the server finds this file and the peers
    fresh_process = multiprocessing.get_context("forkserver")
    fresh_process.set_forkserver_preload(["bench"])
    answer, there = fresh_process.Pipe(duplex=False)
    process = fresh_process.Process(target=worker, args=(there, *arguments))
    process.start(), there.close()
    try:
        row = answer.recv()
    except EOFError:  # killed, by a lack of memory most likely
        row = "ended without an answer"
    process.join()
    if isinstance(row, str):
        print("   ", row.splitlines()[0][:150], file=sys.stderr)
        return None
    return row


def one_round(case, size, names, c):
    """Every variant in its own process, naive first and last: how far its two runs differ, and {variant: row}."""
    ask = lambda name: in_process(case, size, name, c.device, str(c.dtype).split(".")[1], c.threads)
    found = {name: ask(name) for name in names}
    if not found.get("naive"):
        return 0.0, found
    first, last = found["naive"]["ms"], ask("naive")["ms"]
    found["naive"]["ms"] = min(first, last)
    return abs(last / first - 1), found


def compare(case, size, c, rate):
    """All variants of one case at one size -> rows with their ratios."""
    label = " x ".join(str(x) if not isinstance(x, dict) else f"{x['n_layer']} layers, {x['n_embd']}, {x['vocab_size']}"
                       for x in size)
    names = [n for n, why in c.verdicts[case].items() if why is None]
    if case in ("head", "wmle") and (size[0] < 1000 or size[3]):  # where the question is only ours against naive
        names = ["naive", "ours"]
    names = ["naive"] * ("naive" in names) + [n for n in names if n != "naive"]
    floor = ["products"] if case in ("head", "wmle") else []
    drift, found = one_round(case, size, names + floor, c)
    if drift > 0.05:  # void: once more, and the calmer of the two counts
        drift, found = min((drift, found), one_round(case, size, names + floor, c), key=lambda x: x[0])
    if drift > 0.05:
        print(f"{case} {label}: the two naive runs differ by {100 * drift:.0f} %, twice: a busy machine, rough ratios")
    naive, peers = found.get("naive"), [found[n]["ms"] for n in names if n in PEERS and found[n]]
    base = found["products"]["ms"] if floor and found["products"] else None
    rows = []
    for name, row in found.items():
        if row is None:
            continue
        least = base or (1e3 * row["flops"] / rate if row["flops"] else None)
        ratio = lambda x, y: round(x / y, 3) if x and y else None
        rows.append({"case": f"{case} {label}", "variant": name, "ms": round(row["ms"], 3), "mb": round(row["mb"], 1),
                     "median": row["median"], "vs_naive": ratio(naive and naive["ms"], row["ms"]),
                     "mem_vs_naive": ratio(naive and naive["mb"], row["mb"]),
                     "vs_best_peer": ratio(min(peers, default=None), row["ms"]),
                     "vs_floor": ratio(row["ms"], least)})
    return rows


def show(rows, size, rate, device):
    """A table: times faster than naive and than the best peer, times the floor, memory as a share of naive's; where it
    says something, items a second and, on a GPU whose data sheet is known, the share of it that is used (MFU)."""
    unit, count = ITEMS.get(rows[0]["case"].split()[0], (None, None))
    peak = next((x for name, x in PEAK.items() if device == "cuda" and name in torch.cuda.get_device_name()), None)
    print(f"\n{rows[0]['case']}")
    print(f"  {'variant':14}{'ms':>11}{'median':>11}{'MB':>9}{'x naive':>9}{'mem /':>8}{'x peer':>8}{'floor x':>9}"
          + (f"{unit + '/s':>12}" if unit else "") + (f"{'MFU':>7}" if unit == "tokens" and peak else ""))
    cell = lambda x, form: format(x, form) if x is not None else "-"
    for r in rows:
        line = (f"  {r['variant']:14}{r['ms']:11.3f}{r.pop('median'):11.3f}{r['mb']:9.0f}{cell(r['vs_naive'], '.2f'):>9}"
                f"{cell(r['mem_vs_naive'], '.1f'):>8}{cell(r['vs_best_peer'], '.2f'):>8}{cell(r['vs_floor'], '.2f'):>9}")
        line += f"{1e3 * count(*size) / r['ms']:12,.0f}" if unit else ""
        print(line + (f"{rate / r['vs_floor'] / peak:7.1%}" if unit == "tokens" and peak else ""))


# --------------------------------------------------------------------------------------------------------------- growth

AXES = {"rows": (512, 1024, 2048, 4096), "vocabulary": (4096, 8192, 16384, 32768), "K": (2, 4, 8, 16),
        "T": (16, 32, 64, 128), "head-rows": (512, 1024, 2048, 4096), "head-vocabulary": (4096, 8192, 16384, 32768)}
CASES["grow head"] = (head, [], [], (96, 48, 3001, 0.25))


def growth_sizes(axis, x):
    """(case, size) of one point: a whole step, or the head alone at more rows x vocabulary than a step here has."""
    if axis.startswith("head"):
        return "grow head", (x, 128, 16384, 0.0) if axis == "head-rows" else (1024, 128, x, 0.0)
    b, prompt, k, t, v = {"rows": (x // 32, 32, 1, 32, 8192), "vocabulary": (16, 32, 1, 32, x), "K": (4, 64, x, 32, 8192),
                          "T": (4, 64, 4, x, 8192)}[axis]
    return "step", (b, prompt, k, t, dict(n_layer=2, n_head=4, n_embd=128, vocab_size=v))


def growth(c, rate):
    """Time and memory of ours and naive along each axis, with the floor's line beside them."""
    rows = []
    for axis, values in AXES.items():
        for x in values:
            case, size = growth_sizes(axis, x)
            for variant in ("naive", "ours"):
                r = in_process(case, size, variant, c.device, str(c.dtype).split(".")[1], c.threads)
                if r:
                    floor = 1e3 * r["flops"] / rate
                    rows.append({"case": f"growth {axis} {x}", "variant": variant, "ms": round(r["ms"], 3),
                                 "mb": round(r["mb"], 1), "vs_naive": None, "mem_vs_naive": None, "vs_best_peer": None,
                                 "vs_floor": round(r["ms"] / floor, 3)})
    table = {}
    for r in rows:
        table.setdefault(r["case"], {})[r["variant"]] = r
    print(f"\n| {'grows':18} | naive ms | ours ms | floor ms | naive MB | ours MB |\n|{'-' * 20}|---|---|---|---|---|")
    for name, pair in table.items():
        if len(pair) == 2:
            n, o = pair["naive"], pair["ours"]
            n["vs_naive"], o["vs_naive"] = 1.0, round(n["ms"] / o["ms"], 3)
            n["mem_vs_naive"], o["mem_vs_naive"] = 1.0, round(n["mb"] / max(o["mb"], 0.1), 3)
            print(f"| {name[7:]:18} | {n['ms']:.1f} | {o['ms']:.1f} | {o['ms'] / o['vs_floor']:.1f} | {n['mb']:.0f} "
                  f"| {o['mb']:.0f} |")
    return rows


def svg(rows, path):
    """The same as small pictures: time above, memory below, both axes in powers of two."""
    w, h, colours = 250, 150, {"naive": "#c0392b", "ours": "#2471a3", "floor": "#7f8c8d"}
    parts = []
    for i, axis in enumerate(AXES):
        for j, what in enumerate(("ms", "mb")):
            lines = {}
            for r in rows:
                _, a, x = r["case"].split()
                if a == axis:
                    lines.setdefault(r["variant"], []).append((int(x), max(r[what], 0.5)))
                    if what == "ms" and r["variant"] == "ours":
                        lines.setdefault("floor", []).append((int(x), r["ms"] / r["vs_floor"]))
            every = [p for line in lines.values() for p in line]
            if not every:
                continue
            (x0, x1), (y0, y1) = [(min(v), max(v)) for v in zip(*every)]
            place = lambda x, y: (f"{20 + i * w + (w - 50) * math.log(x / x0) / max(math.log(x1 / x0), 1e-9):.1f},"
                                  f"{20 + j * h + (h - 50) * (1 - math.log(y / y0) / max(math.log(y1 / y0), 1e-9)):.1f}")
            parts += [f'<polyline fill="none" stroke="{colours[n]}" stroke-width="2" '
                      f'points="{" ".join(place(*p) for p in line)}"/>' for n, line in lines.items()]
            parts.append(f'<text x="{20 + i * w}" y="{h - 12 + j * h}">{what.replace("mb", "MB")} {y0:.0f} to {y1:.0f}, '
                         f'{axis} {x0} to {x1}</text>')
    key = "".join(f'<text x="{20 + 80 * k}" y="12" fill="{c}">{n}</text>' for k, (n, c) in enumerate(colours.items()))
    with open(path, "w") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(AXES) * w + 20}" height="{2 * h + 10}" '
                f'font-family="sans-serif" font-size="11">{key}{"".join(parts)}</svg>\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = [x for x in CASES if x[:4] != "grow"]
    parser.add_argument("--case", default="all", choices=["all", "growth", *GROUPS, *named])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", help="file for the last line")
    parser.add_argument("--svg", help="file for the picture of --case growth")
    c = parser.parse_args()
    if c.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is there")
    torch.set_num_threads(c.threads)
    c.dtype = getattr(torch, c.dtype or ("bfloat16" if c.device == "cuda" else "float32"))
    load = os.getloadavg()[0]
    rate = gemm_rate(c.device, c.dtype)
    cpu = platform.processor() or platform.machine()
    machine = {"device": torch.cuda.get_device_name() if c.device == "cuda" else cpu, "threads": c.threads,
               "dtype": str(c.dtype).split(".")[1], "torch": torch.__version__,
               "gemm_gflops": round(rate / 1e9, 1), "load_before": round(load, 2)}
    print(" ".join(f"{k} {v}" for k, v in machine.items()))
    cases = named if c.case == "all" else GROUPS.get(c.case, [c.case])
    promises(c.device, c.dtype)
    rows, c.verdicts = [], {}
    for case in cases:
        if case == "growth":
            continue
        c.verdicts[case] = gate(case, c.device, c.dtype)
        print(f"\n{case}: " + ", ".join(f"{n} {why or 'exact'}" for n, why in c.verdicts[case].items()))
        for size in CASES[case][2 if c.device == "cuda" else 1]:
            rows += (new := compare(case, size, c, rate))
            if new:
                show(new, size, rate, c.device)
    if c.case in ("all", "growth"):
        rows += (grown := growth(c, rate))
        if c.svg:
            svg(grown, c.svg)
    machine["load_after"] = round(os.getloadavg()[0], 2)
    line = json.dumps({"machine": machine, "rows": rows})
    if c.json:
        with open(c.json, "w") as f:
            f.write(line + "\n")
    print("\n" + line)


if __name__ == "__main__":
    main()
