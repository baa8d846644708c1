"""What train.py, eval.py and bench.py print: visible text, one-line errors, commands that a shell takes back.

No torch here: eval.py reads four small files, and importing torch for that would take longer than the work
itself.
"""
import os
import shlex
import shutil
import signal
import sys

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder of train.py and eval.py


def visible(text):
    """Text as one line that cannot steer a terminal: control characters (C1 too), direction marks and
    newlines become their escapes, spaces stay. For whatever comes from data, samples, flags, files or a
    config."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


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
    return "$'" + "".join(map(byte, os.fsencode(word))) + "'"


def as_value(path):
    """A folder as a value of a flag: a name that starts with a dash would be read as another flag."""
    path = str(path)
    return "./" + path if path.startswith("-") else path


def command(script, *words):
    """The line that runs one of the project's scripts from this shell: "python eval.py ..." where both are at
    hand under these names, else the paths of this interpreter and of the script."""
    python = shutil.which("python")
    here = python and os.path.dirname(os.path.abspath(python)) == os.path.dirname(sys.executable)
    near = os.path.realpath(HOME) == os.path.realpath(os.getcwd())
    program = ["python" if here else sys.executable, script if near else os.path.join(HOME, script)]
    return " ".join(map(quoted, [*program, *map(str, words)]))


def leave_quietly():
    """Ctrl-C while a script is importing or printing: one line and status 130, where Python would print a
    traceback. `os._exit`, because half-imported libraries do not always survive their own clean-up."""
    def leave(*_):
        os.write(2, f"{os.path.basename(sys.argv[0])}: stopped\n".encode())
        os._exit(130)
    signal.signal(signal.SIGINT, leave)
