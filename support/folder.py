"""The folder of a run: claimed and locked before anything is written, never another run's, and taken back up
by a resume."""
import contextlib
import dataclasses
import functools
import json
import os
import subprocess

from support.distributed import from_first
from support.files import write_whole
from support.lock import release, take
from support.log import HOME, fail, visible

# What a run writes. A temporary file is one of these names, random digits and .tmp; LOCK says that a process
# is at work.
FILES = ("config.json", "tokenizer.json", "task.pt", "metrics.jsonl", "samples.jsonl", "ckpt.pt",
         "scores.json", "searches.jsonl", "summary.json")
LOCK = ".lock"


@functools.cache
def commit():
    """The commit of the code that runs, with " and changes" where its files are others by now; None outside a
    checkout of its own, and where there is no git."""
    git = lambda *words: subprocess.run(["git", "-C", HOME, *words], capture_output=True, text=True,
                                        timeout=20, check=True).stdout.strip()
    if not os.path.exists(os.path.join(HOME, ".git")):  # a folder around it is not this code
        return None
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=7", "HEAD") + (" and changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


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
    """c.out_dir for all processes of a run: the first one claims it."""
    with contextlib.ExitStack() as held:
        c.out_dir = from_first(lambda: held.enter_context(claimed(c)))
        yield


@contextlib.contextmanager
def claimed(c):
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
        yield c.out_dir
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
        except FileNotFoundError:  # who made the folder before us has just failed and removed it
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
    """The flags of the run in out_dir; typed ones must agree, but for how long to go on and where to say
    it."""
    path = os.path.join(c.out_dir, "config.json")
    if not os.path.exists(os.path.join(c.out_dir, "ckpt.pt")):
        yet = " yet" if os.path.exists(path) else ""
        fail(f"--init_from resume: {c.out_dir} holds no checkpoint{yet}")
    try:
        with open(path, encoding="utf-8") as f:
            saved = json.load(f)
        saved["task"]
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"--init_from resume: {path}: expected the flags of a run, got something else")
    free = {"policy_steps", "out_dir", "overwrite", "threads", "cache_dir", "eval_every", "log_every",
            "export", "micro_batch"}
    typed = {k for k in typed if k != "init_from"}  # resume is no setting: where the run began stays
    for f in dataclasses.fields(c):
        if f.name in free and f.name in typed or f.name == "out_dir":
            continue
        if f.name in typed and saved.get(f.name) != getattr(c, f.name):
            fail(f"--{f.name} {getattr(c, f.name)}: the checkpoint in {c.out_dir} was made with "
                 f"{saved.get(f.name)}; start a new run")
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
            except (ValueError, AttributeError, KeyError, TypeError):  # half a line: the kill came within it
                continue
            if phase in ("judge", "sft", "warmup") or (at, phase == "reward") < (step, True):
                keep.append(line)
    write_whole(path, "".join(keep).encode())
