"""Files that are whole or not there, and the cache: what is trained once and kept (judges, warm starts,
fitted rewards), each under the hash of everything that decides it.

One rule for every key: ALL flags, ALL data and the code of EVERY module that is used, minus what cannot
matter: groups of flags that the caller names (`support.flags.without`), and `NO_CODE`. A flag or an import
that somebody adds tomorrow changes the keys without a further line; what is forgotten costs a training too
many, never a result of somebody else's run.
"""
import ast
import contextlib
import dataclasses
import functools
import glob
import hashlib
import inspect
import io
import json
import os
import secrets
import shutil
import time

import torch

from support.distributed import from_first, place
from support.lock import one_at_a_time
from support.log import HOME, UserError, out_of_memory, visible

def read_json(path, expected, most=None):
    """The json object of a file. UserError's one line where it is missing, broken, or longer than `most`
    bytes: a stranger's file is not to be read for hours.

    expected  what the file is part of, for the line about one that cannot be read
    """
    try:
        if most is not None and os.path.getsize(path) > most:
            raise UserError(f"{path}: expected at most {most:,} bytes")
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror}); expected {expected}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected json, got something else") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a json object, got something else")
    return found


def write_whole(path, data):
    """Bytes to a file under a temporary name, then renamed: a full disk, a kill or Ctrl-C leaves the old file
    as it was. The name is nobody else's, so that two runs which write the same file do not write into one
    another's. Of the processes of one run the first one writes."""
    if place() > 0:
        return
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
        why = f"{path}: could not be written ({error.strerror}); what was there is unchanged"
        raise UserError(why) from error


def write_torch(path, thing):
    """torch.save through memory, so that every failure to write is an OSError with a reason."""
    if place() > 0:
        return
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    write_whole(path, buffer.getvalue())


def read_torch(path, what, device):
    """torch.load whose every failure is one line: a broken file raises half a dozen different types."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        if out_of_memory(error):
            raise
        kind = type(error).__name__
        raise UserError(f"{path}: expected {what}, got a file that cannot be read ({kind})") from error


# -------------------------------------------------------------------------------------------------- the cache

NO_CODE = ("train", "support")  # flags, folders, files; of train.py only the functions that are named
BUT = ("support.distributed",)  # which adds up gradients
PLAIN = (str, bytes, int, float)  # values whose repr is all that they are
LARGE = 2 ** 26  # bytes of a file from which its hash is remembered


def cached(cache_dir, name, what, build, say=print, together=False):
    """A state kept under the hash of `what` decides it: read, or built once -> (state, path).

    Two runs that want the same state at the same time: the second one says so, waits and reads what the first
    one made. Where the first one dies or fails, the second one builds.

    together  all processes of a run build, each its share; else the first one alone, and the others wait
    """
    path = os.path.join(cache_dir, f"{name}-{digest(what)[:16]}.pt")
    missing = lambda: from_first(lambda: not os.path.exists(path))
    if missing():
        os.makedirs(cache_dir, exist_ok=True)
        waiting = lambda: say(visible(f"{path}: another process is making it; waiting"))
        held = one_at_a_time(path + ".lock", waiting) if place() == 0 else contextlib.nullcontext()
        with held:
            if missing():
                from_first(lambda: remove_dead(path))
                state = build() if together or place() == 0 else None
                from_first(lambda: write_torch(path, state))
    return read_torch(path, f"a kept {name} (delete it, and it is made again)", "cpu"), path


def remove_dead(path):
    """The temporary files of writers of `path` that are gone: who calls this has the lock."""
    for dead in glob.glob(glob.escape(path) + ".*.tmp"):
        os.remove(dead)


def kept_folder(cache_dir, name, what, build, say=print):
    """Like `cached`, for what does not fit into memory: the path of a folder under the hash of `what`, which
    build(folder) has filled. It gets its name when it is whole, so a kill leaves nothing that looks like
    one. Of the processes of one run the first one fills it."""
    return from_first(lambda: _kept_folder(cache_dir, name, what, build, say))


def _kept_folder(cache_dir, name, what, build, say):
    path = os.path.join(cache_dir, f"{name}-{digest(what)[:16]}")
    if os.path.isdir(path):
        return path
    made, folder = [], os.path.abspath(cache_dir)
    while not os.path.isdir(folder):
        made.append(folder)
        folder = os.path.dirname(folder)
    os.makedirs(cache_dir, exist_ok=True)
    waiting = lambda: say(visible(f"{path}: another process is making it; waiting"))
    try:
        with one_at_a_time(path + ".lock", waiting):
            if not os.path.isdir(path):
                for dead in glob.glob(glob.escape(path) + ".*.tmp"):  # its writer is gone: we have the lock
                    shutil.rmtree(dead)
                fill(path, build)
    except BaseException:
        with contextlib.suppress(OSError):  # bad input leaves nothing behind, where nothing was before
            for folder in made:
                os.rmdir(folder)
        raise
    return path


def fill(path, build):
    """A folder by build(folder) under a temporary name, synced and then renamed. UserError for a full
    disk."""
    temporary = f"{path}.{secrets.token_hex(6)}.tmp"
    try:
        os.mkdir(temporary)
        build(temporary)
        for name in os.listdir(temporary):
            with open(os.path.join(temporary, name), "rb+") as f:
                os.fsync(f.fileno())
        os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{path}: could not be written ({error.strerror})") from error
        raise


def file_digest(path, memo, racy=2.0):
    """The sha256 of a file's content. Of a large one (1.2 GB take seconds) it is remembered in the folder
    `memo` under place, size and time of change, as git does, and the file is not read again while these are
    the same; not of a file that was changed a moment ago and might be changed again within one tick."""
    about = os.stat(path)
    signature = digest([os.path.abspath(path), about.st_size, about.st_mtime_ns, about.st_ino])[:16]
    note = os.path.join(memo, f"content-{signature}.txt")
    if about.st_size >= LARGE and os.path.isfile(note):
        with open(note, encoding="ascii") as f:
            return f.read()
    began = time.time()
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(2 ** 20):
            h.update(part)
    found = h.hexdigest()
    if about.st_size >= LARGE and began - about.st_mtime > racy:
        os.makedirs(memo, exist_ok=True)
        write_whole(note, found.encode())
    return found


def decides(flags, data, code, device, dtype):
    """Everything that decides a kept state, for `cached`: flags, data, code, machine.

    flags  {name: value}: all of them but those that cannot matter
    data   anything `digest` takes: the very tensors and rows in use
    code   names of modules, classes and functions that build it; what they use in turn is found (`code_of`)
    """
    return {"flags": flags, "data": digest(data), "code": digest(code_of(*code)),
            "machine": machine(device, dtype)}


def machine(device, dtype):
    """What sums are rounded by: version of torch, kind of device, type, threads, instruction set."""
    return {"torch": torch.__version__, "device": torch.device(device).type, "dtype": str(dtype),
            "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}


def digest(thing):
    """The sha256 of tensors, dataclasses, dictionaries, lists and plain values, nested as one likes, as hex
    digits. TypeError for anything else: the repr of an object may hold its address."""
    h = hashlib.sha256()

    def feed(x):
        if x is None or isinstance(x, PLAIN):  # asked first: a world is ten thousand texts
            h.update(f"{x!r};".encode("utf-8", "backslashreplace"))
        elif torch.is_tensor(x):
            h.update(f"tensor {x.dtype} {tuple(x.shape)};".encode())
            h.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif dataclasses.is_dataclass(x):
            feed({f.name: getattr(x, f.name) for f in dataclasses.fields(x)})
        elif isinstance(x, dict):
            h.update(f"dict {len(x)};".encode())
            for key in sorted(x, key=repr):
                feed(key)
                feed(x[key])
        elif isinstance(x, (list, tuple)):
            h.update(f"list {len(x)};".encode())
            for y in x:
                feed(y)
        else:
            raise TypeError(f"digest: a {type(x).__name__} has no value to hash")
    feed(thing)
    return h.hexdigest()


# --------------------------------------------------------------------------------------------------- the code


def source(name):
    """The text of a module of this project by its dotted name, or None: any other module."""
    path = os.path.join(HOME, *name.split("."))
    file = os.path.join(path, "__init__.py") if os.path.isdir(path) else path + ".py"
    if not os.path.isfile(file):
        return None
    with open(file, encoding="utf-8") as f:
        return f.read()


def modules_used(name, found):
    """Adds to `found` {name: source} this module of the project and all that it imports, and these import,
    and so on."""
    no_code = name.split(".")[0] in NO_CODE and name not in BUT
    text = None if name in found or no_code else source(name)
    if text is None:
        return
    found[name] = text
    for other in imports(text):
        modules_used(other, found)


@functools.lru_cache(1000)
def imports(text):
    """The names of the modules that a module's source imports, at its top or inside of functions."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [x.name for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module] + [f"{node.module}.{x.name}" for x in node.names]
    return names


def code_of(*starts):
    """{name: source} of what modules (by name), classes (with their module) and functions use. A function is
    followed function by function through its own module (train.py imports everything, and most of it is not
    used), and module by module from there."""
    found = {}

    def visit(thing):
        if isinstance(thing, str):
            return modules_used(thing, found)
        function = inspect.unwrap(thing) if inspect.isroutine(thing) else None
        if function is None:
            return modules_used(thing.__module__, found)
        own = function.__module__
        if (key := f"{own}.{function.__qualname__}") in found:
            return
        found[key] = inspect.getsource(function)
        for name in names_in(function.__code__):
            x = function.__globals__.get(name)
            if inspect.ismodule(x) or getattr(x, "__module__", own) != own:
                modules_used(x.__name__ if inspect.ismodule(x) else x.__module__, found)
            elif inspect.isfunction(x):
                visit(x)
            elif inspect.isclass(x):
                found[f"{own}.{name}"] = inspect.getsource(x)
            elif x is not None and not callable(x):  # a constant
                found[f"{own}.{name}"] = digest(x)
    for thing in starts:
        visit(thing)
    return found


def names_in(code):
    """Every global name that compiled code may look up, nested functions included."""
    inner = (x for x in code.co_consts if inspect.iscode(x))
    return {*code.co_names, *(name for x in inner for name in names_in(x))}
