"""How one measures: each variant in a process of its own, its memory, void rounds, ratios, tables, growth.

The rules, without which such numbers are worth little. Before any timing each variant has to agree with the
naive one (`agreement`). Each is timed in a process of its own (`in_process`), which also makes its memory
high-water its own. The naive variant runs first and last: where the two differ by more than 5 %, the machine
was busy, the round is void and runs once more. What counts are the ratios of one run.

What is measured comes in as an argument: `build(case, size, device, dtype) -> ({variant: function}, flops)`,
a function of a module, because another process finds it by its name.
"""
import math
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from importlib import metadata

import torch


@dataclass
class Ground:
    """Where things are timed, and the floor's unit."""
    device: str
    dtype: torch.dtype
    threads: int
    rate: float = 0.0  # floating point operations a second of a large matrix product
    again: float = math.inf  # seconds that are left for void rounds

    @property
    def kind(self):
        """The name of the type that is timed, "float32"."""
        return str(self.dtype).split(".")[1]


def fresh(*shape, device, dtype=torch.float32, scale=1.0):
    """Random numbers, never zeros: a machine multiplies zeros faster."""
    return (scale * torch.randn(*shape, device=device)).to(dtype)


def agreement(variants, kinds, not_exact):
    """{variant: its largest error, or why it must not be timed, as text}.

    variants   kind (a torch.dtype) -> {name: function} at a small size; "naive" is what the others must equal
    kinds      types to look at, the one that is timed last: its error is the one that stays
    not_exact  {name: error allowed} of those that are no better in float64
    An error is a share of the largest number of its tensor, under half precision of the norm.
    """
    verdict = {}
    for kind in kinds:
        want = None
        for name, run in variants(kind).items():
            if name == "products" or isinstance(verdict.get(name), str):
                continue
            got, why = _attempt(name, run)
            if why:
                verdict[name] = why
            elif want is None and name != "naive":
                verdict[name] = "nothing to agree with"
            else:
                want = want or got
                verdict[name] = _judged(_error(got, want, kind), kind, not_exact.get(name, 0))
    return verdict


def _attempt(name, run):
    """(what a variant returns, None), or (None, why there is nothing): a peer that breaks on this machine is
    no reason to measure nothing."""
    try:
        return run(), None
    except ImportError:
        return None, "absent"
    except Exception as error:
        if name in ("naive", "ours"):
            raise
        return None, f"fails here: {type(error).__name__}"


def _error(got, want, kind):
    """The largest relative error over two lists of tensors."""
    half = kind in (torch.bfloat16, torch.float16)
    size = (lambda x: x.norm()) if half else (lambda x: x.abs().max())
    return max((size(g.double() - w.double()) / size(w.double()).clamp(min=1e-30)).item()
               for g, w in zip(got, want))


def _judged(error, kind, more):
    """The error, or FAIL where it is larger than rounding in this type and than `more`."""
    allowed = max(more, {torch.float64: 1e-12, torch.float32: 5e-6}.get(kind, 1e-2))
    return error if error <= allowed else f"FAIL: off by {error:.1e} in {str(kind)[6:]}"


# ------------------------------------------------------------------------------------------- time and memory


def worker(answer, build, case, size, variant, device, dtype, threads):
    """Times one variant in this process and sends {"ms", "median", "mb", "flops"}, or the error as text. ms
    is the minimum on a CPU, which others may disturb, and the median on a GPU, by its own clock and with warm
    caches."""
    try:
        torch.set_num_threads(threads)
        variants, flops = build(case, size, device, getattr(torch, dtype))
        run = variants[variant]
        start = memory_now(device)
        times = []
        run()  # warm-up
        wait(device)
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
        first = torch.cuda.Event(enable_timing=True)
        last = torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        wait(device)
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


def versions(names):
    """{library: version} of those that are installed: a ratio to a peer is one to a version of it."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def in_process(build, case, size, variant, device, dtype, threads):
    """A row from `worker` in a process of its own, or None with the reason on stderr. The process is forked
    from a server that has imported torch and computed nothing yet: fresh memory and threads, without two
    seconds of imports."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # where the server finds this file and the peers
    fresh_process = multiprocessing.get_context("forkserver")
    home = sys.modules[build.__module__].__file__  # of a script too, whose module is called __main__
    fresh_process.set_forkserver_preload([os.path.splitext(os.path.basename(home))[0]])
    answer, there = fresh_process.Pipe(duplex=False)
    arguments = (there, build, case, size, variant, device, dtype, threads)
    process = fresh_process.Process(target=worker, args=arguments)
    process.start()
    there.close()
    try:
        row = answer.recv()
    except EOFError:  # killed, by a lack of memory most likely
        row = "ended without an answer"
    process.join()
    if isinstance(row, str):
        print("   ", row.splitlines()[0][:150], file=sys.stderr)
        return None
    return row


# --------------------------------------------------------------------------------------- rounds and ratios


def one_round(ask, names):
    """Every variant by `ask(name)`, naive first and last: how far its two runs differ, and {variant: row}."""
    found = {name: ask(name) for name in names}
    if not found.get("naive"):
        return 0.0, found
    first, last = found["naive"]["ms"], ask("naive")["ms"]
    found["naive"]["ms"] = min(first, last)
    return abs(last / first - 1), found


def compare(label, ask, names, ground, peers=()):
    """All variants of one case at one size, `ask(name)` each -> rows with their ratios. `names` has naive
    first where it takes part; "products" is the floor where it does, else flops by the machine's rate."""
    began = time.time()
    drift, found = one_round(ask, names)
    took = time.time() - began
    if drift > 0.05 and took < ground.again:  # void: once more, and the calmer of the two counts
        drift, found = min((drift, found), one_round(ask, names), key=lambda x: x[0])
        ground.again -= took
    if drift > 0.05:
        print(f"{label}: the two naive runs differ by {100 * drift:.0f} %: a busy machine, rough ratios")
    found = {name: row for name, row in found.items() if row is not None}
    naive = found.get("naive", {"ms": None, "mb": None})
    best = min((row["ms"] for name, row in found.items() if name in peers), default=None)
    base = found["products"]["ms"] if "products" in found else None
    rows = []
    for name, row in found.items():
        least = base or (1e3 * row["flops"] / ground.rate if row["flops"] else None)
        rows.append({"case": label, "variant": name, "ms": round(row["ms"], 3), "mb": round(row["mb"], 1),
                     "median": row["median"], "vs_naive": ratio(naive["ms"], row["ms"]),
                     "mem_vs_naive": ratio(naive["mb"], row["mb"]), "vs_best_peer": ratio(best, row["ms"]),
                     "vs_floor": ratio(row["ms"], least)})
    return rows


def ratio(x, y):
    """x / y in three digits; None where one of them is missing or 0."""
    return round(x / y, 3) if x and y else None


def show(rows, ground, unit=None, items=None, peak=None):
    """A table: times faster than naive and than the best peer, times the floor, memory as a share of naive's;
    where it says something, items a second (`items` of this `unit` a call) and, where the data sheet's
    operations a second are known (`peak`), the share of them that is used (MFU)."""
    print(f"\n{rows[0]['case']}")
    head = f"  {'variant':14}{'ms':>11}{'median':>11}{'MB':>9}{'x naive':>9}{'mem /':>8}{'x peer':>8}"
    head += f"{'floor x':>9}" + (f"{unit + '/s':>12}" if unit else "") + (f"{'MFU':>7}" if peak else "")
    print(head)
    cell = lambda x, form: format(x, form) if x is not None else "-"
    for r in rows:
        line = f"  {r['variant']:14}{r['ms']:11.3f}{r.pop('median'):11.3f}{r['mb']:9.0f}"
        line += f"{cell(r['vs_naive'], '.2f'):>9}{cell(r['mem_vs_naive'], '.1f'):>8}"
        line += f"{cell(r['vs_best_peer'], '.2f'):>8}{cell(r['vs_floor'], '.2f'):>9}"
        line += f"{1e3 * items / r['ms']:12,.0f}" if unit else ""
        print(line + (f"{ground.rate / r['vs_floor'] / peak:7.1%}" if peak else ""))


# -------------------------------------------------------------------------------------------------- growth


def growth(points, ask, ground):
    """Time and memory of ours and naive at each of `points`, [(axis, value, case, size)], by `ask(case, size,
    variant)`, with the floor's line beside them: prints a table and returns its rows."""
    print(f"\n| {'grows':18} | naive ms | ours ms | floor ms | naive MB | ours MB |")
    print(f"|{'-' * 20}|---|---|---|---|---|")
    rows = []
    for axis, x, case, size in points:
        pair = {}
        for variant in ("naive", "ours"):
            r = ask(case, size, variant)
            if r:
                floor = 1e3 * r["flops"] / ground.rate
                pair[variant] = {"case": f"growth {axis} {x}", "variant": variant, "ms": round(r["ms"], 3),
                                 "mb": round(r["mb"], 1), "vs_naive": None, "mem_vs_naive": None,
                                 "vs_best_peer": None, "vs_floor": round(r["ms"] / floor, 3)}
        rows += pair.values()
        if len(pair) == 2:
            n, o = pair["naive"], pair["ours"]
            n["vs_naive"], o["vs_naive"] = 1.0, round(n["ms"] / o["ms"], 3)
            n["mem_vs_naive"], o["mem_vs_naive"] = 1.0, round(n["mb"] / max(o["mb"], 0.1), 3)
            floor = o["ms"] / o["vs_floor"]
            print(f"| {f'{axis} {x}':18} | {n['ms']:.1f} | {o['ms']:.1f} | {floor:.1f} | {n['mb']:.0f} "
                  f"| {o['mb']:.0f} |")
    return rows


def svg(rows, axes, path):
    """The rows of `growth` as small pictures: time above, memory below, both axes in powers of two."""
    w, h, colours = 250, 150, {"naive": "#c0392b", "ours": "#2471a3", "floor": "#7f8c8d"}
    parts = []
    for i, axis in enumerate(axes):
        for j, what in enumerate(("ms", "mb")):
            lines = _lines(rows, axis, what)
            every = [p for line in lines.values() for p in line]
            if not every:
                continue
            (x0, x1), (y0, y1) = [(min(v), max(v)) for v in zip(*every)]
            right = lambda x: 20 + i * w + (w - 50) * math.log(x / x0) / max(math.log(x1 / x0), 1e-9)
            down = lambda y: 20 + j * h + (h - 50) * (1 - math.log(y / y0) / max(math.log(y1 / y0), 1e-9))
            for name, line in lines.items():
                points = " ".join(f"{right(x):.1f},{down(y):.1f}" for x, y in line)
                parts.append(f'<polyline fill="none" stroke="{colours[name]}" stroke-width="2" '
                             f'points="{points}"/>')
            parts.append(f'<text x="{20 + i * w}" y="{h - 12 + j * h}">{what.replace("mb", "MB")} '
                         f'{y0:.0f} to {y1:.0f}, {axis} {x0} to {x1}</text>')
    for k, (name, colour) in enumerate(colours.items()):
        parts.insert(k, f'<text x="{20 + 80 * k}" y="12" fill="{colour}">{name}</text>')
    with open(path, "w", encoding="utf-8") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(axes) * w + 20}" '
                f'height="{2 * h + 10}" font-family="sans-serif" font-size="11">{"".join(parts)}</svg>\n')


def _lines(rows, axis, what):
    """{variant: [(x, ms or MB)]} of one picture, the floor as a variant beside ours."""
    lines = {}
    for r in rows:
        _, a, x = r["case"].split()
        if a != axis:
            continue
        lines.setdefault(r["variant"], []).append((int(x), max(r[what], 0.5)))
        if what == "ms" and r["variant"] == "ours":
            lines.setdefault("floor", []).append((int(x), r["ms"] / r["vs_floor"]))
    return lines
