"""Flags from a dataclass: every knob with its kind, range, choices and one line of help.

train.py describes its flags in a dataclass whose fields come from `flag`, and hands the class to
`parse_flags`. A flag has one default; what a task or a preset puts in its place comes from the class's own
`own`, so that nothing here knows either. What the user got wrong ends in `fail`: one line, no traceback.
"""
import argparse
import dataclasses
import difflib
import math
import sys
import textwrap

from support.log import fail

WIDTH = 100  # columns of -h


def flag(default, help, choices=None, low=None, high=None, kind=None, group=None, of=""):
    """One flag. None as its default means: decided at run time, and `kind` says what it would be.

    choices  anything that can be iterated, a table by name among them: who adds a row adds a choice
    group    opens a group of that name, to which the flags below belong too, until the next one is opened
    of       who alone reads it, "ppo, reinforce": values of other flags; -h says so, and `unread`. "": all do
    """
    meta = dict(default=default, help=help, choices=choices, low=low, high=high, kind=kind or type(default))
    return dataclasses.field(default=None, metadata=meta | {"group": group, "of": of})


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, name the nearest valid choice and leave with status 2."""

    def error(self, message):
        """What argparse calls when a flag cannot be read."""
        wrong = next((w.split("=")[0] for w in message.split() if w.startswith("--")), "")
        near = nearest(wrong, self._option_string_actions) if message.startswith("unrecognized") else ""
        fail(message + near, program=self.prog)


def number(kind, low):
    """A type for argparse: a number of at least `low`."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < 2 ** 63:
            raise argparse.ArgumentTypeError(f"expected {kind.__name__} of at least {low}, got {text}")
        return value
    return read


def nearest(word, choices):
    """" (did you mean ...?)", or nothing."""
    near = difflib.get_close_matches(word, list(choices), 1, 0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def groups_of(Flags):
    """{flag: the name of its group}, in order; nothing for a class that has no flags."""
    found, group = {}, None
    for f in dataclasses.fields(Flags) if dataclasses.is_dataclass(Flags) else ():
        group = f.metadata["group"] or group
        found[f.name] = group
    return found


def without(c, groups, but=()):
    """{flag: value} of all flags but those of some groups; `but`: names out of these groups that stay."""
    group = groups_of(type(c))
    return {k: v for k, v in vars(c).items() if group.get(k) not in groups or k in but}


def unread(c, typed, readers):
    """A line for each flag that was typed and that nobody of this run reads: a run called after it would be
    another than it says. What is typed to be off is not missed.

    c        the flags
    typed    names of those given by hand
    readers  what this run has where flags say `of`, such as its task and its objective
    """
    of = {f.name: f.metadata["of"] for f in dataclasses.fields(c)}
    missed = [name for name in typed if of[name] and not set(of[name].split(", ")) & set(readers)]
    return [f"--{name} {getattr(c, name)} changes nothing here: read by {of[name]} alone"
            for name in missed if getattr(c, name)]


def parse_flags(Flags, argv, doc):
    """argv -> (Flags, what was typed by hand); `doc` heads -h. Unknown flags, values out of range end here.

    Flags.own(given), where the class has it, is {flag: value}: the defaults that replace the flags' own,
    given the flags that were typed.
    """
    fields = {f.name: f for f in dataclasses.fields(Flags)}
    parser = Parser(prog="train.py", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    for f in fields.values():
        if f.metadata["kind"] is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(f"--{f.name}", type=str)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        fail(f"unknown flag {name}{nearest(name, ['--' + name for name in fields])}; -h lists all")
    typed = {k: v for k, v in vars(found).items() if k in fields and v is not None}
    given = {k: convert(fields[k], v) for k, v in typed.items()}
    defaults = defaults_of(Flags, given)
    if found.help:
        print(help_text(Flags, defaults | given, doc))
        sys.exit(0)
    return Flags(**defaults | given), typed


def defaults_of(Flags, given):
    """{flag: value}: every flag's own default, or what `Flags.own` has in its place, a value it takes."""
    fields = {f.name: f for f in dataclasses.fields(Flags)}
    own = Flags.own(given) if hasattr(Flags, "own") else {}
    for name, value in own.items():
        if name not in fields:
            fail(f"defaults: there is no flag --{name}{nearest(name, fields)}")
        text = value if isinstance(value, bool) else str(value)
        if value is not None and convert(fields[name], text) != value:
            fail(f"--{name}: expected {fields[name].metadata['kind'].__name__} as its default, got {value!r}")
    return {name: f.metadata["default"] for name, f in fields.items()} | own


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
        meant = nearest(text, m["choices"])
        fail(f"--{f.name}: expected one of {', '.join(m['choices'])}, got {text!r}{meant}")
    if m["kind"] is int and abs(value) >= 2 ** 63:
        fail(f"--{f.name}: expected a number below 2**63, got {text[:20]}...")
    if m["kind"] is float and not math.isfinite(value):
        fail(f"--{f.name}: expected a finite number, got {text}")
    if (m["low"] is not None and value < m["low"]) or (m["high"] is not None and value > m["high"]):
        span = f"at least {m['low']}" if m["high"] is None else f"{m['low']} to {m['high']}"
        fail(f"--{f.name}: expected {span}, got {text}")
    return value


# ------------------------------------------------------------------------------------------------------- -h


def help_text(Flags, defaults, doc):
    """-h: the flags in groups, each with its default (or what was typed), its values and what it does."""
    fields = dataclasses.fields(Flags)
    names = {f.name: f"--[no-]{f.name}" if f.metadata["kind"] is bool else f"--{f.name}" for f in fields}
    wide, middle = max(map(len, names.values())), max(len(show(defaults[f.name])) for f in fields)
    lines = ["usage: train.py [--flag value] ...", "", *textwrap.wrap(doc.splitlines()[0], WIDTH)]
    lines += ["", f"{'flag':{wide + 2}}  {'default':{middle}}  values; what it does"]
    for f in fields:
        if f.metadata["group"]:
            lines += ["", f.metadata["group"]]
        head = f"  {names[f.name]:{wide}}  {show(defaults[f.name]):{middle}}  "
        of = f.metadata["of"] and f"{f.metadata['of']}: "
        text = f"{values(f.metadata)}; {of}{f.metadata['help']}"
        lines += textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head),
                               break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def show(default):
    """A default as it would be typed; a dash where it is decided at run time."""
    if isinstance(default, bool):
        return "yes" if default else "no"
    return "-" if default is None else str(default)


def values(m):
    """What a flag takes: its choices, or its type and range."""
    if m["choices"]:
        return "|".join(m["choices"])
    kind = m["kind"].__name__
    if m["low"] is None:
        return kind
    bounded = m["high"] is not None and m["high"] < 1e9
    return f"{kind} {m['low']:g} to {m['high']:g}" if bounded else f"{kind} >= {m['low']:g}"
