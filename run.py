"""A run's life outside the algorithm: flags, folder, log, checkpoint files. Nothing here knows tasks or losses.

train.py describes its flags in a dataclass whose fields come from `flag`, and hands the class to `parse_flags`;
everything below works on whatever fields it finds there. Errors of the user end in `fail`: one line, no traceback.
"""
import argparse
import dataclasses
import difflib
import hashlib
import io
import json
import math
import os
import sys
import time

import torch
from tqdm import tqdm

from data import UserError

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


def fail(message, status=2):
    """One line on stderr, then out. Status 2: the user can mend it; 1: the run broke; 130: Ctrl-C."""
    print(f"train.py: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


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


def choose_out_dir(c, typed):
    """Where this run lives. A folder given by hand that holds a run is refused; without one, the next free name."""
    held = lambda d: os.path.exists(os.path.join(d, "config.json"))
    for name, path in (("out_dir", c.out_dir), ("cache_dir", c.cache_dir)):
        if path is not None and os.path.exists(path) and not os.path.isdir(path):
            fail(f"--{name} {path}: expected a folder, got a file")
    if c.out_dir is None:
        base = os.path.join("out", c.task)
        c.out_dir, n = base, 1
        while c.init_from != "resume" and not c.overwrite and held(c.out_dir):
            n += 1
            c.out_dir = f"{base}-{n}"
        if n > 1:
            print(f"{base} holds a run: this one goes to {c.out_dir}")
    elif held(c.out_dir) and c.init_from != "resume" and not c.overwrite:
        fail(f"--out_dir {c.out_dir}: holds another run (go on with --init_from resume, or replace it with "
             f"--overwrite)")


def resume_flags(c, typed):
    """The flags of the run in out_dir; typed ones must agree, but for how long to go on and where to say it."""
    path = os.path.join(c.out_dir, "config.json")
    if not os.path.exists(os.path.join(c.out_dir, "ckpt.pt")):
        fail(f"--init_from resume: {c.out_dir} holds no checkpoint" + (" yet" if os.path.exists(path) else ""))
    try:
        with open(path) as f:
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
    with open(path) as f:
        for line in f:
            try:
                row = json.loads(line)
            except ValueError:  # half a line: the kill came in the middle of it
                continue
            phase = row.get("phase")
            if phase in ("judge", "sft", "warmup") or (row["step"], phase == "reward") < (step, True):
                keep.append(line)
    write_whole(path, "".join(keep).encode())


def write_whole(path, data):
    """Bytes to a file under a temporary name, then renamed: a full disk or a kill leaves the old file as it was."""
    try:
        with open(path + ".tmp", "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except OSError as error:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
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


def cached(cache_dir, name, what, build):
    """A state kept under the hash of everything that decides it: read, or built once."""
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    path = os.path.join(cache_dir, f"{name}-{key}.pt")
    if not os.path.exists(path):
        os.makedirs(cache_dir, exist_ok=True)
        write_torch(path, build())
    return read_torch(path, f"a kept {name} (delete it, and it is made again)", "cpu"), path


# ----------------------------------------------------------------------------------------------------------------- talk


class Log:
    """metrics.jsonl and the terminal: tqdm where there is one, a plain line every few seconds elsewhere."""

    def __init__(self):
        self.file, self.began, self.bar, self.said, self.phase = None, time.time(), None, 0.0, None
        self.stop, self.pending = False, []

    def open(self, out_dir, spent):
        """From here on figures also go to a file. `spent`: seconds of the earlier legs of a resumed run."""
        self.file, self.began = open(os.path.join(out_dir, "metrics.jsonl"), "a"), self.began - spent
        for row in self.pending:
            self.write(row)

    def write(self, row):
        """One json object a line, flushed, so that a killed run loses none."""
        if self.file is None:
            return self.pending.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def seconds(self):
        """Wall-clock seconds of the run, all legs together."""
        return round(time.time() - self.began, 2)

    def figures(self, phase, step, figures):
        """A line of figures: numbers as floats, what is missing as null."""
        row = {k: (v.item() if torch.is_tensor(v) else v) for k, v in figures.items()}
        self.write({"step": step, "phase": phase, "seconds": self.seconds(), **row})
        return row

    def progress(self, phase, i, n, figures):
        """Where a phase stands. Also where Ctrl-C is noticed outside the policy's steps."""
        if self.stop:
            raise KeyboardInterrupt
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
        tqdm.write(text) if self.bar else print(text, flush=True)


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
