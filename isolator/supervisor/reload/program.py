"""The program that a reload executes: the one that this process was started as, by its name, with the same arguments.

It is never named by a request. By its name: an update puts another version there.
"""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from isolator.errors import IsolatorError

ADOPT, CHECK = "--adopt", "--check-handover"
"""Options of ``isolator serve``, each with the descriptor of a state."""


@dataclass(frozen=True)
class Program:
    """A program and its arguments, the first of which is its name."""

    path: str
    argv: tuple[str, ...]
    code: tuple[str, ...] = ()
    """Further files that it executes: the script, where the program is an interpreter."""

    @classmethod
    def of_this_process(cls) -> Program:
        """The command line of this process; without what an earlier reload added to it."""
        script = sys.argv[0]
        if "/" in script and os.access(script, os.X_OK) and os.path.isfile(script):
            path = os.path.abspath(script)  # a link stays one
            argv = [path, *sys.argv[1:]]
        else:  # ``python -m``, or a file that is no program
            path, argv = sys.executable, [sys.executable, *sys.orig_argv[1:]]
        if ADOPT in argv:
            at = argv.index(ADOPT)
            del argv[at : at + 2]
        code = (word for word in argv[1:] if path == sys.executable and os.path.isfile(word))
        return cls(path, tuple(argv), tuple(map(os.path.abspath, code)))

    def check(self) -> list[tuple[Path, int, int, int]]:
        """Return what tells its files from any that were put in their place; by the name behind every link.

        Raises IsolatorError unless it is there and nobody but root could change it.
        """
        named = [Path(name) for name in (self.path, *self.code)]
        resolved = [one.resolve() for one in named]
        for path in dict.fromkeys([*named, *resolved]):
            for part in (path, *path.parents):
                try:
                    found = part.lstat()
                except OSError as error:
                    raise IsolatorError(self.path, f"{part}: {error.strerror}", "install it again") from None
                open_to_all = found.st_mode & 0o022 and not stat.S_ISLNK(found.st_mode)
                if found.st_uid != 0 or (open_to_all and not found.st_mode & stat.S_ISVTX):
                    why = f"{part} can be written by somebody other than root, and root would run it"
                    raise IsolatorError(self.path, why, "install it in a folder of root's: isolator install")
        states = ((path, path.stat()) for path in resolved)
        return [(path, found.st_dev, found.st_ino, found.st_ctime_ns) for path, found in states]

    def with_state(self, option: str, fd: int) -> list[str]:
        """The arguments with a state, as ``option`` has it."""
        return [*self.argv, option, str(fd)]
