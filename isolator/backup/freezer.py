"""The state of one plugin, copied while nothing writes to it.

A cage that runs is frozen (cgroup.freeze), its file system is synced, and the image is copied as bytes. That nothing
else came between, a start, a resize or an unmount by the daemon, shows in the image itself and in the daemon's journal;
then it is copied again. A process of its own thaws the cage when this one ends, however it ends; but one that the
daemon has frozen stays so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from isolator.errors import IsolatorError
from isolator.layers.cgroup.leaf import keep_frozen
from isolator.linux.descriptors import owning
from isolator.linux.files import sync_filesystem
from isolator.paths import Paths
from isolator.recovery.journal import read_entries

T = TypeVar("T")

_GONE = (errno.ENOENT, errno.ESRCH, errno.ENODEV)
"""Errors of a group that is removed: before it is opened, and afterwards."""
_SECONDS = 10.0
_ATTEMPTS = 5
_TICK = 0.01
"""Seconds: the longest tick (CONFIG_HZ=100) of the clock by which file systems stamp writes; before Linux 6.13 all."""


def copy_state(paths: Paths, name: str, daemon: int | None, copy: Callable[[], T]) -> T:
    """Call ``copy`` while the state of a plugin rests; it may be called again. ``daemon``: pid of the one that runs.

    Raises IsolatorError when it does not come to rest.
    """
    image = paths.state / name / "image"
    if daemon is None:
        return copy()
    for _ in range(_ATTEMPTS):
        cages = _cages(paths, name)
        try:
            with _frozen(cages):
                _sync(Path(f"/proc/{daemon}/root{paths.state / name}"))
                before = _signs(image)
                time.sleep(_TICK)  # what is written from here on has another time
                made = copy()
                if before == _signs(image) and cages == _cages(paths, name):
                    return made
        except OSError as error:
            if error.errno not in _GONE:
                raise
        time.sleep(0.1)  # the daemon is about to start or stop it; nothing tells when that is done
    raise IsolatorError(f"state of {name}", "it changed each time that it was copied", "run the command again")


def _cages(paths: Paths, name: str) -> list[Path]:
    """The v2 groups of a plugin's cages, by the journal of the daemon that runs."""
    entries = read_entries(paths.journal.read_bytes())
    return sorted(
        Path(entry.folders[0])
        for entry in entries.values()
        if entry.kind == "leaf" and entry.name.startswith(f"{name}.")
    )


def _signs(image: Path) -> tuple[int, int, int, int] | None:
    """Whatever a write to the image changes."""
    with contextlib.suppress(FileNotFoundError):
        status = image.lstat()
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return None


def _sync(folder: Path) -> None:
    """Flush the file system that the daemon has mounted in a plugin's folder; none: nothing is to be flushed."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(FileNotFoundError), owning(os.open(folder / "mnt", flags)) as fd:
        if os.fstat(fd).st_dev != folder.stat().st_dev:
            sync_filesystem(fd)


@contextlib.contextmanager
def _frozen(groups: Sequence[Path]) -> Iterator[None]:
    """Freeze control groups; raises an OSError of ``_GONE`` when one of them is gone by then."""
    with contextlib.ExitStack() as stack:
        for group in groups:
            stack.enter_context(_one_frozen(group))
        yield


@contextlib.contextmanager
def _one_frozen(group: Path) -> Iterator[None]:
    switch = os.open(group / "cgroup.freeze", os.O_WRONLY | os.O_CLOEXEC)
    mine, its = socket.socketpair()
    with its:
        thawer = _start_thawer(group, switch, mine, its)
    try:
        mine.recv(1)  # from here on it survives this process
        os.write(switch, b"1")
        _wait_frozen(group)
        yield
    finally:
        mine.close()
        os.waitpid(thawer, 0)
        os.close(switch)


def _start_thawer(group: Path, switch: int, theirs: socket.socket, mine: socket.socket) -> int:
    """Start the process that thaws a group once nobody has ``theirs`` open any more; returns its pid."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.setsid()  # whatever ends the command's process group leaves it
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            theirs.close()
            mine.send(b"r")
            mine.recv(1)
            if not keep_frozen(group):
                os.write(switch, b"0")
            if keep_frozen(group):  # since that look
                os.write(switch, b"1")
        os._exit(0)
    return pid


def _wait_frozen(group: Path) -> None:
    deadline = time.monotonic() + _SECONDS
    with (group / "cgroup.events").open("rb", buffering=0) as events:
        changes = select.poll()
        changes.register(events, select.POLLPRI)
        while b"frozen 1" not in os.pread(events.fileno(), 4096, 0):
            left = deadline - time.monotonic()
            if left <= 0:
                why = f"its processes could not be frozen in {_SECONDS:g} s: the kernel waits for a disk, it seems"
                raise IsolatorError(f"cage {group.name}", why, "run the command again")
            changes.poll(left * 1000)
