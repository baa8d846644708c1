"""How fast, how small, against what: every hot spot side by side in one run.

    python bench.py                          everything on the CPU, some minutes
    python bench.py --case head --json FILE  one case; FILE gets the last line
    python bench.py --case growth --svg assets/growth.svg
    python bench.py --device cuda --json FILE

The rules, without which such numbers are worth little. Before any timing each variant has to agree with the naive one
in float64 and in the type that is timed. Each variant is timed in a process of its own, which also makes its memory
high-water its own. The naive variant runs first and last: where the two differ by more than 5 %, the machine was busy,
the round is void and runs once more (all cases together have 75 seconds for that). What counts are the ratios of one
run; milliseconds are printed beside them. Other libraries take part where they can be imported ("absent" otherwise);
nothing here needs them.

The cases themselves are in bench_cases.py. `floor` is either a variant ("products": the bare matrix products) or flops
divided by the speed of a large matrix product on this machine, measured in the same run.
"""
import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from importlib import metadata

import torch

from bench_cases import CASES, GROUPS, ITEMS, NOT_EXACT, PEAK, PEERS, THREAD_STEPS, fresh
from fused import policy_loss
from plackett_luce import plackett_luce_loss
from support.log import tolerant_terminal


# ------------------------------------------------------------------------------------------------------------ measuring


def gate(case, device, dtype=torch.float64):
    """{variant: its largest error, or why it must not be timed, as text}: at a small size against naive, in float64 and
    then, where the variant draws nothing, in the type that is timed; an error is a share of the largest number of its
    tensor, under half precision of the norm. What stays is the error in the type that is timed."""
    function, _, _, small = CASES[case]
    verdict = {}
    for kind in dict.fromkeys((torch.float64, dtype)):
        if kind != torch.float64 and case == "decode":
            continue
        want = None
        for name, run in function(small, device, kind)[0].items():
            if name == "products" or isinstance(verdict.get(name), str):
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
            if want is None and name != "naive":
                verdict[name] = "nothing to agree with"
                continue
            want = want or got
            norm = (lambda x: x.norm()) if kind in (torch.bfloat16, torch.float16) else (lambda x: x.abs().max())
            error = max((norm(g.double() - w.double()) / norm(w.double()).clamp(min=1e-30)).item()
                        for g, w in zip(got, want))
            allowed = max(NOT_EXACT.get(name, 0), {torch.float64: 1e-12, torch.float32: 5e-6}.get(kind, 1e-2))
            verdict[name] = error if error <= allowed else f"FAIL: off by {error:.1e} in {str(kind)[6:]}"
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
        while len(times) < 2 or (sum(times) < 600 and len(times) < 60):
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
    """Until a GPU has done what it was told."""
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
    """The high-water mark since `memory_now`, in MB."""
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


def versions():
    """{library: version} of those that can take part: a ratio to a peer is one to a version of it."""
    found = {}
    for name in ("trl", "verl", "liger-kernel", "cut-cross-entropy", "rouge-score", "nltk"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


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
    names = [n for n, error in c.verdicts[case].items() if not isinstance(error, str)]
    if case in ("head", "wmle") and (size[0] < 1000 or size[3]):  # where the question is only ours against naive
        names = [n for n in names if n in ("naive", "ours")]
    names = ["naive"] * ("naive" in names) + [n for n in names if n != "naive"]
    floor = ["products"] if case in ("head", "wmle") else []
    began = time.time()
    drift, found = one_round(case, size, names + floor, c)
    took = time.time() - began
    if drift > 0.05 and took < c.again:  # void: once more, and the calmer of the two counts
        drift, found = min((drift, found), one_round(case, size, names + floor, c), key=lambda x: x[0])
        c.again -= took
    if drift > 0.05:
        print(f"{case} {label}: the two naive runs differ by {100 * drift:.0f} %: a busy machine, rough ratios")
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


def growth_sizes(axis, x):
    """(case, size) of one point: a whole step, or the head alone at more rows x vocabulary than a step here has."""
    if axis.startswith("head"):
        return "grow head", (x, 128, 16384, 0.0) if axis == "head-rows" else (1024, 128, x, 0.0)
    b, prompt, k, t, v = {"rows": (x // 32, 32, 1, 32, 8192), "vocabulary": (16, 32, 1, 32, x), "K": (4, 64, x, 32, 8192),
                          "T": (4, 64, 4, x, 8192)}[axis]
    return "step prompt", (b, prompt, k, t, dict(n_layer=2, n_head=4, n_embd=128, vocab_size=v))


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


def threads(c):
    """A step with one thread and with two, turn by turn, the faster of two runs each: where --threads 0 of
    train.py should take more than one (run.TWO_THREADS_PAY). Only an idle machine can say so: two threads
    wait for one another."""
    rows = []
    print(f"\n{'step':10}{'width':>7}{'tokens':>8}{'Gflop':>8}{'1 thread':>11}{'2 threads':>11}{'x faster':>10} (ms)")
    for case, size in THREAD_STEPS:
        b, prompt, k, t, config = size
        turns = [(n, in_process(case, size, "ours", "cpu", "float32", n)) for n in (1, 2, 1, 2)]
        best = {n: min((r["ms"] for m, r in turns if m == n and r), default=math.nan) for n in (1, 2)}
        flops = next(r["flops"] for _, r in turns if r)
        print(f"{case[5:]:10}{config['n_embd']:7}{b * (prompt + k * t):8}{flops / 1e9:8.1f}{best[1]:11.1f}"
              f"{best[2]:11.1f}{best[1] / best[2]:10.2f}")
        rows += [{"case": f"threads {case[5:]} {config['n_embd']}", "variant": f"{n} thread{'s' * (n > 1)}",
                  "ms": round(best[n], 3), "mb": None, "vs_naive": round(best[1] / best[n], 3), "mem_vs_naive": None,
                  "vs_best_peer": None, "vs_floor": None} for n in (1, 2)]
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
    with open(path, "w", encoding="utf-8") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(AXES) * w + 20}" height="{2 * h + 10}" '
                f'font-family="sans-serif" font-size="11">{key}{"".join(parts)}</svg>\n')


def main():
    """Gates, then timings, then one json line."""
    tolerant_terminal()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = [x for x in CASES if x[:4] != "grow"]
    parser.add_argument("--case", default="all", choices=["all", "growth", "threads", *GROUPS, *named])
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
               "gemm_gflops": round(rate / 1e9, 1), "load_before": round(load, 2), "peers": versions()}
    print(" ".join(f"{k} {v}" for k, v in machine.items()))
    cases = named if c.case == "all" else GROUPS.get(c.case, [c.case])
    promises(c.device, c.dtype)
    c.again = 75 if c.case == "all" else math.inf  # seconds for void rounds: all cases should fit into eight minutes
    rows, c.verdicts = [], {}
    for case in cases:
        if case in ("growth", "threads"):
            continue
        c.verdicts[case] = gate(case, c.device, c.dtype)
        said = lambda x: x if isinstance(x, str) else f"off by {x:.0e}" if x else "equal to the last bit"
        print(f"\n{case}: " + ", ".join(f"{n} {said(x)}" for n, x in c.verdicts[case].items()))
        for size in CASES[case][2 if c.device == "cuda" else 1]:
            rows += (new := compare(case, size, c, rate))
            if new:
                show(new, size, rate, c.device)
    if c.case in ("all", "growth"):
        rows += (grown := growth(c, rate))
        if c.svg:
            svg(grown, c.svg)
    if c.case == "threads":
        rows += threads(c)
    machine["load_after"] = round(os.getloadavg()[0], 2)
    line = json.dumps({"machine": machine, "rows": rows})
    if c.json:
        with open(c.json, "w", encoding="utf-8") as f:
            f.write(line + "\n")
    print("\n" + line)


if __name__ == "__main__":
    main()
