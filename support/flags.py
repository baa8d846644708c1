"""Flags from a dataclass: every knob with its kind, range, choices and one line of help.

train.py describes its flags in a dataclass whose fields come from `flag`, and hands the class to `parse_flags`; a default
may differ by task. What the user got wrong ends in `fail`: one line, no traceback.
"""
import argparse
import dataclasses
import difflib
import math

from support.log import fail


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
