"""Locks between processes: a file that one process holds at a time and that the system lets go when its
process dies.

A file that merely exists says nothing: its maker may have been killed. So it is the system's lock on the open
file that counts (flock, on Windows a locked byte), and a `.lock` left over by a killed process does not block
anybody.
"""
import contextlib
import os
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


def take(path):
    """An exclusive lock on the file `path`, which is made where it is missing: the open file, or None where
    another process holds it. OSError where the file cannot be made."""
    while True:
        file = open(path, "a")
        if not held_now(file):
            file.close()
            return None
        if still_there(file, path):
            return file
        file.close()  # its last holder removed it between our open and our lock: ours has no name


def held_now(file):
    """Lock an open file without waiting: whether it is ours now."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks: better to run unguarded than not at all
        return True
    return True


def still_there(file, path):
    """Whether the path still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def release(file, path):
    """Remove the file, then let go: in this order nobody can hold a lock on a file that is about to
    disappear."""
    with contextlib.suppress(OSError):  # Windows does not remove what is open: there the empty file stays
        os.remove(path)
    file.close()


@contextlib.contextmanager
def one_at_a_time(path, say_waiting, pause=0.1):
    """Hold the lock of `path` for a while; `say_waiting()` is called once where another process has it
    first."""
    file = take(path)
    if file is None:
        say_waiting()
    while file is None:
        time.sleep(pause)  # and not a blocking lock, which Ctrl-C could not interrupt
        file = take(path)
    try:
        yield
    finally:
        release(file, path)
