"""A run's life outside the algorithm: flags, folder, log, checkpoint files. Nothing here knows tasks or losses.

train.py describes its flags in a dataclass whose fields come from `flag`, and hands the class to `parse_flags`;
everything below works on whatever fields it finds there. Errors of the user end in `fail`: one line, no traceback.
"""
import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import math
import os
import secrets
import sys
import time

import torch
from tqdm import tqdm

from data import UserError
from support.lock import release, take
from support.log import fail, visible

# ---------------------------------------------------------------------------------------------------------------- flags


def flag(default, help, choices=None, low=None, high=None, kind=None):
    """One flag. `default` may differ by task ({"prompt": ..., "summarize": ...}); None means: decided at run time."""
    one = next(iter(default.values())) if isinstance(default, dict) else default
    meta = dict(default=default, help=help, choices=choices, low=low, high=high, kind=kind or type(one))
    return dataclasses.field(default=None, metadata=meta)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, name the nearest valid choice and leave with status 2."""

    def error(self, message):
        """What argparse calls when a flag cannot be read."""
        fail(message)


def nearest(word, choices):
    """" (did you mean ...?)", or nothing."""
    near = difflib.get_close_matches(word, choices, 1, 0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def parse_flags(Flags, argv, doc):
    """argv -> (Flags, what was typed by hand); `doc` heads -h. Unknown flags and values out of range end here."""
    parser = Parser(description=doc.splitlines()[0], allow_abbrev=False,
                    formatter_class=argparse.RawTextHelpFormatter)
    for f in dataclasses.fields(Flags):
        m = f.metadata
        default = m["default"]
        if isinstance(default, dict):
            default = " | ".join(f"{k} {v}" for k, v in default.items())
        values = "|".join(m["choices"]) if m["choices"] else m["kind"].__name__
        text = f"{m['help']} [{values}, default: {default}]".replace("%", "%%")
        if m["kind"] is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(f"--{f.name}", type=str, metavar="", help=text)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        fail(f"unknown flag {name}{nearest(name, ['--' + f.name for f in dataclasses.fields(Flags)])}; -h lists all")
    typed = {k: v for k, v in vars(found).items() if v is not None}
    flags = Flags(**{f.name: convert(f, typed[f.name]) for f in dataclasses.fields(Flags) if f.name in typed})
    return fill_defaults(flags), typed


def convert(f, text):
    """The text of a flag as its type, checked."""
    m = f.metadata
    if isinstance(text, bool):
        return text
    try:
        value = m["kind"](text)
    except ValueError:
        fail(f"--{f.name}: expected {m['kind'].__name__}, got {text!r}")
    if m["choices"] and value not in m["choices"]:
        fail(f"--{f.name}: expected one of {', '.join(m['choices'])}, got {text!r}{nearest(text, m['choices'])}")
    if m["kind"] is int and abs(value) >= 2 ** 63:
        fail(f"--{f.name}: expected a number below 2**63, got {text[:20]}...")
    if m["kind"] is float and not math.isfinite(value):
        fail(f"--{f.name}: expected a finite number, got {text}")
    if (m["low"] is not None and value < m["low"]) or (m["high"] is not None and value > m["high"]):
        span = f"at least {m['low']}" if m["high"] is None else f"{m['low']} to {m['high']}"
        fail(f"--{f.name}: expected {span}, got {text}")
    return value


def fill_defaults(flags):
    """Every flag that was not typed gets the default of its task, or of the first task where it does not name its own."""
    flags.task = flags.task or flags.__dataclass_fields__["task"].metadata["default"]
    for f in dataclasses.fields(flags):
        if getattr(flags, f.name) is None:
            default = f.metadata["default"]
            if isinstance(default, dict):
                default = default.get(flags.task, next(iter(default.values())))
            setattr(flags, f.name, default)
    return flags


# ---------------------------------------------------------------------------------------------------- folders and files


# What a run writes. A temporary file is one of these names, random digits and .tmp; LOCK says that a process
# is at work.
FILES = ("config.json", "tokenizer.json", "metrics.jsonl", "samples.jsonl", "ckpt.pt", "summary.json")
LOCK = ".lock"


def leftover(name):
    """Whether a file of this name is what a killed run leaves besides its results."""
    return name == LOCK or name.endswith(".tmp") and name.startswith(tuple(x + "." for x in FILES))


def contents(path):
    """The names in a folder that somebody may want to keep; [] where there is no folder."""
    return [x for x in os.listdir(path) if not leftover(x)] if os.path.isdir(path) else []


def is_run(path):
    """Whether a folder is one of our runs: only such a one may ever be overwritten."""
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"task", "objective", "seed"} <= config.keys()


@contextlib.contextmanager
def claim_out_dir(c):
    """c.out_dir, decided and locked, so that no second process writes to it: given by hand, or the next free
    out/TASK-N.

    Held until the end of the `with`, by the system until the end of the process. What was made here and is
    still empty at the end, because the input was no good, disappears again.
    """
    for name, path in (("out_dir", c.out_dir), ("cache_dir", c.cache_dir)):
        if path is not None and os.path.exists(path) and not os.path.isdir(path):
            fail(f"--{name} {path}: expected a folder, got a file")
    search = c.out_dir is None and c.init_from != "resume" and not c.overwrite
    base, n = c.out_dir or os.path.join("out", c.task), 1
    c.out_dir = base
    made, lock = claim(c, search)
    while lock is None:  # taken: by a process or by files
        n += 1
        c.out_dir = f"{base}-{n}"
        made, lock = claim(c, search)
    if n > 1:
        print(visible(f"{base} is taken: this run goes to {c.out_dir}"))
    try:
        yield
    finally:
        release(lock, os.path.join(c.out_dir, LOCK))
        for path in [c.out_dir, *made] if search else made:  # who made it may have lost the race for its lock
            with contextlib.suppress(OSError):  # not empty: it is a run now
                os.rmdir(path)


def why_taken(c):
    """Why this run may not have the folder c.out_dir, or None."""
    there = contents(c.out_dir)
    if c.init_from == "resume" or not there:
        return None
    if not is_run(c.out_dir):
        return f"holds files that are no run ({', '.join(sorted(there)[:3])}): choose another folder"
    if c.overwrite:
        return None
    return "holds another run (go on with --init_from resume, or replace it with --overwrite)"


def claim(c, search):
    """Make and lock the folder c.out_dir: ([folders made, the innermost first], lock). Where it is taken:
    ([], None) for `search`, which then looks at the next one, else the end, in one line."""
    made, lock, why, tries = [], None, why_taken(c), 0
    if c.init_from == "resume" and not os.path.isdir(c.out_dir):
        fail(f"--init_from resume: {c.out_dir} holds no checkpoint")
    while why is None and lock is None:
        made = make_folders(c.out_dir)
        try:
            lock = take(os.path.join(c.out_dir, LOCK))
        except FileNotFoundError:  # who made the folder before us has just failed and removed it, empty as it was
            tries += 1
            if tries == 100:  # or it is a link to nowhere
                raise
            continue
        working = "another process is working in it (wait until it ends, or choose another folder)"
        why = why_taken(c) if lock else working
    if lock and why:  # its last holder filled it between our look and our lock
        release(lock, os.path.join(c.out_dir, LOCK))
    if why and not search:
        fail(f"--out_dir {c.out_dir}: {why}")
    return (made, lock) if not why else ([], None)


def make_folders(path):
    """os.makedirs that says what it made: the innermost folder first. What another process makes meanwhile is
    its own."""
    made, missing, path = [], [], os.path.abspath(path)
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
            made.insert(0, path)
    return made


def resume_flags(c, typed):
    """The flags of the run in out_dir; typed ones must agree, but for how long to go on and where to say it."""
    path = os.path.join(c.out_dir, "config.json")
    if not os.path.exists(os.path.join(c.out_dir, "ckpt.pt")):
        fail(f"--init_from resume: {c.out_dir} holds no checkpoint" + (" yet" if os.path.exists(path) else ""))
    try:
        with open(path, encoding="utf-8") as f:
            saved = json.load(f)
        saved["task"]
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"--init_from resume: {path}: expected the flags of a run, got something else")
    free = {"policy_steps", "init_from", "out_dir", "overwrite", "threads", "cache_dir", "eval_every", "log_every"}
    for f in dataclasses.fields(c):
        if f.name in free and f.name in typed or f.name in ("out_dir", "init_from"):
            continue
        if f.name in typed and saved.get(f.name) != getattr(c, f.name):
            fail(f"--{f.name} {getattr(c, f.name)}: the checkpoint in {c.out_dir} was made with {saved.get(f.name)}; "
                 f"start a new run")
        setattr(c, f.name, saved.get(f.name, getattr(c, f.name)))
    return c


def cut_back(path, step):
    """Lines that a killed run wrote after its last checkpoint go: the resumed run writes them again."""
    if not os.path.exists(path):
        return
    keep = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                row = json.loads(line)
                phase, at = row.get("phase"), int(row["step"])
            except (ValueError, AttributeError, KeyError, TypeError):  # half a line: the kill came in the middle of it
                continue
            if phase in ("judge", "sft", "warmup") or (at, phase == "reward") < (step, True):
                keep.append(line)
    write_whole(path, "".join(keep).encode())


def write_whole(path, data):
    """Bytes to a file under a temporary name, then renamed: a full disk, a kill or Ctrl-C leaves the old file
    as it was. The name is nobody else's, so that two processes which write the same file do not write into
    one another's."""
    temporary = f"{path}.{secrets.token_hex(6)}.tmp"
    try:
        with open(temporary, "xb") as f:  # not mkstemp, whose files are for their owner's eyes only
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{path}: could not be written ({error.strerror}); what was there is unchanged") from error


def write_torch(path, thing):
    """torch.save through memory, so that every failure to write is an OSError with a reason."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    write_whole(path, buffer.getvalue())


def read_torch(path, what, device):
    """torch.load whose every failure is one line: a broken file raises half a dozen different types."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: expected {what}, got a file that cannot be read ({type(error).__name__})") from error


# ----------------------------------------------------------------------------------------------------------------- talk


class Log:
    """metrics.jsonl and the terminal: tqdm where there is one, a plain line every few seconds elsewhere."""

    def __init__(self):
        self.file, self.began, self.bar, self.said, self.phase = None, time.time(), None, 0.0, None
        self.pending, self.out_dir = [], None  # out_dir: the folder whose checkpoint, if it has one, is this run's
        self.patient = self.stop = self.interrupted = False

    def interrupt(self, *_):
        """Ctrl-C. In the policy's steps (`patient`) the first one ends the step in hand and saves; elsewhere,
        and the second time, it does not wait."""
        if self.stop or not self.patient:
            self.interrupted = True
            raise KeyboardInterrupt
        self.stop = True

    def open(self, out_dir, spent):
        """From here on figures also go to a file. `spent`: seconds of the earlier legs of a resumed run."""
        self.out_dir, self.began = out_dir, self.began - spent
        self.file = open(os.path.join(out_dir, "metrics.jsonl"), "a", encoding="utf-8")
        for row in self.pending:
            self.write(row)

    def write(self, row):
        """One json object a line, flushed, so that a killed run loses none."""
        if self.file is None:
            return self.pending.append(row)
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError:  # a full disk: closed here, or Python 3.13 would complain again of the same line at its end
            with contextlib.suppress(OSError):
                self.file.close()
            raise

    def seconds(self):
        """Wall-clock seconds of the run, all legs together."""
        return round(time.time() - self.began, 2)

    def figures(self, phase, step, figures):
        """A line of figures: numbers as floats, what is missing as null."""
        row = {k: (v.item() if torch.is_tensor(v) else v) for k, v in figures.items()}
        self.write({"step": step, "phase": phase, "seconds": self.seconds(), **row})
        return row

    def progress(self, phase, i, n, figures):
        """Where a phase stands."""
        now = time.time()
        if phase != self.phase and phase != "reward":  # a fit is a part of the policy's round: no bar of its own
            self.phase, self.since, self.first, self.said = phase, now, i, now
            self.bar and self.bar.close()
            self.bar = tqdm(total=n, initial=i - 1, desc=phase, leave=False) if sys.stdout.isatty() else None
        if self.bar and phase == self.phase:
            self.bar.update(i - self.bar.n)
        due = now - self.said > (0.5 if self.bar else 5) or i == n and phase == self.phase
        if not due or self.bar and phase != self.phase:
            return
        self.said = now
        row = self.figures(phase, i, figures) if phase in ("judge", "sft", "warmup") else figures
        text = " ".join(f"{k} {float(v):.4g}" for k, v in row.items() if v is not None)
        left = f"  eta {(now - self.since) / max(i - self.first, 1) * (n - i):.0f} s" if phase == self.phase else ""
        self.bar.set_postfix_str(text) if self.bar else print(f"{phase:7} {i:5}/{n}  {text}{left}", flush=True)

    def say(self, text):
        """A line for people."""
        tqdm.write(visible(text)) if self.bar else print(visible(text), flush=True)


# --------------------------------------------------------------------------------------------------------------- device


def decide_device(c):
    """Device and dtype with the reason for each, decided once."""
    gpu = torch.cuda.is_available()
    if c.device == "cuda" and not gpu:
        fail("--device cuda: this machine has no GPU that torch can use (did you mean cpu?)")
    device = torch.device("cuda" if gpu and c.device != "cpu" else "cpu")
    reason = "asked for" if c.device != "auto" else ("a GPU is there" if gpu else "no GPU is there")
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    dtype = {"auto": torch.bfloat16 if half else torch.float32, "float32": torch.float32,
             "bfloat16": torch.bfloat16}[c.dtype]
    said = f"{device.type} ({reason}), {str(dtype)[6:]} ({'asked for' if c.dtype != 'auto' else 'best here'})"
    return device, dtype, said


# A policy or judge step with more multiplications and additions than this gets torch's own number of threads.
# Threads wait for one another at the end of every matrix product, actively, so small products lose all of it
# on a machine that does something else beside them: on two cores with busy neighbours, steps of 3e8 to 4e10
# operations took 1.6 to 34 times as long as with one thread (`python bench.py --case threads`). Nor has a
# gain of 1.3 been shown on an idle one yet.
TWO_THREADS_PAY = 1e12


def decide_threads(c):
    """(threads, reason) of a run: --threads, or by the work of a step and never by a clock, so that the same
    command adds in the same order every time. UserError's one line for more threads than the machine has
    processors."""
    if c.threads > (os.cpu_count() or 1):
        fail(f"--threads {c.threads}: this machine has {os.cpu_count()} processors")
    if c.threads:
        return c.threads, "asked for"
    work = step_work(c)
    if work < TWO_THREADS_PAY:
        return 1, f"{work / 1e9:.2g} Gflop a step: too little to share"
    return torch.get_num_threads(), f"{work / 1e9:.2g} Gflop a step: torch's choice"


def step_work(c):
    """Floating-point operations of a training step's blocks, forward and backward: 6 x parameters x tokens;
    the larger of the policy's and of the judge's, whose batches hold 32 texts and 8 prompts behind each."""
    blocks = lambda layers, width: 12 * layers * width ** 2  # parameters but for embeddings
    length = c.prompt_length if c.task == "prompt" else c.max_document + c.max_summary
    policy = 6 * blocks(c.n_layer, c.n_embd) * c.batch_size * length
    judge = 6 * blocks(c.judge_layers, c.judge_width) * 32 * (c.judge_context + 8 * (c.prompt_length + 1))
    return max(policy, judge) if c.task == "prompt" else policy


def check_memory(c):
    """One line for nets that the machine cannot hold: weight, gradient and Adam's two averages are 16 bytes a
    parameter. Without activations and with the 257 smallest tokens: what is refused here could never have
    worked."""
    try:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows: torch finds out
        return
    need = lambda layers, width: 16 * (12 * layers * width ** 2 + 257 * width)
    for what, size in (("--n_layer, --n_embd", 2 * need(c.n_layer, c.n_embd)),  # policy and reward
                       ("--judge_layers, --judge_width", need(c.judge_layers, c.judge_width) * (c.task == "prompt"))):
        if size > have:
            fail(f"{what}: nets of this size take at least {size / 2**30:,.0f} GB, and this machine has "
                 f"{have / 2**30:,.0f}")
