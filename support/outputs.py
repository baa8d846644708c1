"""Where results go: a file that is written whole, a terminal, or lines of JSON for the next program."""
import json
import os
import sys

from support.files import write_whole
from support.log import UserError, visible


class Out:
    """Results and what is said to people.

    path    the file of --out, or None: the screen. It is written by `close`, or not at all
    render  a result -> its text for a terminal
    Where results stand on stdout as JSON, what is said stands on stderr: a pipe gets nothing but JSON.
    """

    def __init__(self, path, render):
        self.path, self.render, self.lines = path, render, []
        self.terminal = sys.stdout.isatty()
        if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(os.path.abspath(path)))):
            raise UserError(f"--out {path}: expected a file in a folder that is there")

    def say(self, line):
        """A line for people."""
        print(visible(line), file=sys.stdout if self.path or self.terminal else sys.stderr, flush=True)

    def put(self, results):
        """Some results, dictionaries of plain values."""
        for x in results:
            if self.path:
                self.lines.append(json.dumps(x) + "\n")
            else:
                print(self.render(x) if self.terminal else json.dumps(x), flush=True)

    def close(self):
        """The file, where there is one."""
        if self.path:
            write_whole(self.path, "".join(self.lines).encode())
            self.say(f"{self.path}: {len(self.lines)} lines")
