"""The log of a run, and what all scripts print: visible text, one-line errors, commands that a shell takes
back.

No torch here: eval.py reads four small files, and importing torch for that would take longer than the work
itself.
"""
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import time

from tqdm import tqdm

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder of train.py and eval.py


class UserError(Exception):
    """Bad input by the user. train.py prints it as one line and exits with status 2: no traceback, nothing
    written."""


class LostProcess(Exception):
    """Another process of this run has died (support/distributed.py). One line, and the end of all of them."""


def visible(text):
    """Text as one line that cannot steer a terminal: control characters (C1 too), direction marks and
    newlines become their escapes, spaces stay. For whatever comes from data, samples, flags, files or a
    config."""
    text = str(text)
    if text.isprintable():  # nearly always, and a page asks for a hundred thousand tokens
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fail(message, status=2, program="train.py"):
    """One line on stderr, then out. Status 2: the user can mend it; 1: the run broke; 130: Ctrl-C."""
    print(f"{program}: {visible(message)}", file=sys.stderr)
    sys.exit(status)


def tolerant_terminal():
    """stdout and stderr that print an escape where their encoding (ascii, cp1252) lacks a character, and
    never raise."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what replaces stdout inside another program may lack it
            stream.reconfigure(errors="backslashreplace")


def quoted(word):
    """One word of a command as a shell reads it. Where the terminal could not show it as it is, in the form
    $'...' with its bytes as escapes (bash, zsh)."""
    try:
        word.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        plain = word.isprintable()
    except UnicodeEncodeError:
        plain = False
    if plain:
        return shlex.quote(word)
    byte = lambda b: chr(b) if 32 <= b < 127 and chr(b) not in "\\'" else f"\\x{b:02x}"
    # not os.fsencode: where the locale is ASCII that refuses a name that came out of a file
    return "$'" + "".join(map(byte, word.encode("utf-8", "surrogateescape"))) + "'"


def as_value(path):
    """A folder as a value of a flag: a name that starts with a dash would be read as another flag."""
    path = str(path)
    return "./" + path if path.startswith("-") else path


def command(script, *words):
    """The line that runs one of the project's scripts from this shell: "python eval.py ..." where both are at
    hand under these names, else the paths of this interpreter and of the script; train.py on as many
    processes as now."""
    python = shutil.which("python")
    here = python and os.path.dirname(os.path.abspath(python)) == os.path.dirname(sys.executable)
    near = os.path.realpath(HOME) == os.path.realpath(os.getcwd())
    program, n = ["python" if here else sys.executable], os.environ.get("WORLD_SIZE", "1")
    if script == "train.py" and n != "1":
        program = ["torchrun", "--standalone", f"--nproc_per_node={n}"]
    return " ".join(map(quoted, [*program, script if near else os.path.join(HOME, script), *map(str, words)]))


def leave_quietly():
    """Ctrl-C while a script is importing or printing: one line and status 130, where Python would print a
    traceback. `os._exit`, because half-imported libraries do not always survive their own clean-up."""
    def leave(*_):
        if os.environ.get("RANK", "0") == "0":  # of several processes one says it
            os.write(2, f"{os.path.basename(sys.argv[0])}: stopped\n".encode())
        os._exit(130)
    signal.signal(signal.SIGINT, leave)


def out_of_memory(error):
    """Whether an exception says that memory ran out, of the machine or of a GPU: not the fault of what was
    read."""
    said = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in said or "out of memory" in said


def explain(error, log, step):
    """The one line and the status that train.py ends with where it does not end well; raises what nobody
    expected. step: updates of the policy that were done"""
    out_dir = log.out_dir  # None before the first write
    stopped = log.interrupted or log.stop and isinstance(error, LostProcess)  # another one could not wait
    if stopped or isinstance(error, KeyboardInterrupt):
        if out_dir and os.path.exists(os.path.join(out_dir, "ckpt.pt")):
            line = command("train.py", "--init_from", "resume", "--out_dir", as_value(out_dir))
            # the second line as a shell takes it
            print(f"train.py: stopped; go on with:\n{line}", file=sys.stderr)
            sys.exit(130)
        again = "start again with --overwrite" if out_dir else "start again"
        fail(f"stopped before the first checkpoint: {again} (a finished judge or warm start is kept)", 130)
    if isinstance(error, UserError):
        fail(error)
    if isinstance(error, LostProcess):
        fail(f"step {step + 1}: another process of this run has ended, so all do; go on with --init_from "
             f"resume, where there is a checkpoint", 1)
    if isinstance(error, FloatingPointError):
        fail(f"step {step + 1}: {error}; lower the learning rate; the last good checkpoint is "
             f"untouched", 1)
    if isinstance(error, OSError):  # a disk that fills up behind a log line, a folder that may not be written
        fail(f"{error.filename or out_dir or 'output'}: could not be written ({error.strerror or error})")
    if out_of_memory(error):
        fail(f"out of memory: smaller nets, batches or texts are needed ({type(error).__name__})", 1)
    raise error


class Log:
    """metrics.jsonl and the terminal: tqdm where there is one, a plain line every few seconds elsewhere."""

    def __init__(self):
        self.file, self.began, self.bar, self.said, self.phase = None, time.time(), None, 0.0, None
        self.pending = []
        self.out_dir = None  # the folder whose checkpoint, if it has one, is this run's
        self.patient = self.stop = self.interrupted = False
        self.several = False  # whether this is one of several processes

    def interrupt(self, *_):
        """Ctrl-C. In the policy's steps (`patient`) the first one ends the step in hand and saves; elsewhere,
        and the second time, it does not wait. Of several processes each has heard it already when torchrun
        passes it on: there the second time says nothing new."""
        if self.stop and self.several:
            return
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
        except OSError:  # a full disk: closed here, or Python 3.13 would complain again at its end
            with contextlib.suppress(OSError):
                self.file.close()
            raise

    def seconds(self):
        """Wall-clock seconds of the run, all legs together."""
        return round(time.time() - self.began, 2)

    def figures(self, phase, step, figures):
        """A line of figures: numbers as floats, what is missing as null."""
        row = {k: (v.item() if hasattr(v, "item") else v) for k, v in figures.items()}
        self.write({"step": step, "phase": phase, "seconds": self.seconds(), **row})
        return row

    def progress(self, phase, i, n, figures):
        """Where a phase stands."""
        now = time.time()
        if phase != self.phase and phase != "reward":  # a fit, within a round, has no bar
            self.phase, self.since, self.first, self.said = phase, now, i, now
            if self.bar:
                self.bar.close()
            self.bar = tqdm(total=n, initial=i - 1, desc=phase, leave=False) if sys.stdout.isatty() else None
        if self.bar and phase == self.phase:
            self.bar.update(i - self.bar.n)
        due = now - self.said > (0.5 if self.bar else 5) or i == n and phase == self.phase
        if not due or self.bar and phase != self.phase:
            return
        self.said = now
        row = self.figures(phase, i, figures) if phase in ("judge", "sft", "warmup") else figures
        text = " ".join(f"{k} {float(v):.4g}" for k, v in row.items() if v is not None)
        if self.bar:
            return self.bar.set_postfix_str(text)
        left = ""
        if phase == self.phase:
            left = f"  eta {(now - self.since) / max(i - self.first, 1) * (n - i):.0f} s"
        print(f"{phase:7} {i:5}/{n}  {text}{left}", flush=True)

    def say(self, text):
        """A line for people."""
        if self.bar:
            tqdm.write(visible(text))
        else:
            print(visible(text), flush=True)
