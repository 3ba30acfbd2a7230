"""Clear what a killed ``isolator run`` (or ``prove``) left: a command without a daemon has no other cleaner.

Every such command holds the lock of a journal of its own, ``run-TOKEN.journal``, from before it makes anything until
after it has removed everything, and its control groups carry the same token: ``isolator[-ID]-run-TOKEN``. A journal
whose lock is free was left by a command that is dead; groups whose journal is gone and in which nothing runs were,
too. The uid that a cage borrowed is a lock file of the same kind. Nothing is recognised by a pid, and what a living
command holds is never touched: its locks are not free.

The groups lie below whichever group the dead command was in, so they are looked for in every hierarchy.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from isolator.layers import user
from isolator.layers.cgroup.leaf import Leaf
from isolator.linux import loop, mount
from isolator.linux.descriptors import close_all
from isolator.linux.files import remove_tree
from isolator.linux.lock import lock_file
from isolator.paths import Paths
from isolator.recovery.daemon import Leftover, mounts_below, process_count
from isolator.recovery.journal import read_entries

_JOURNAL = re.compile(r"run-([0-9a-f]{10})\.journal")
_EMPTY_SECONDS = 10.0


@dataclass
class _Run:
    """Remains of one dead command: its journal (when it still exists) and its groups, inner ones last."""

    token: str
    journal: Path | None
    tops: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    """Folders in which ``prove`` kept the state of its cage, perhaps still mounted."""


def find(paths: Paths) -> list[Leftover]:
    """Everything that dead commands of this root left, and the uids that nobody holds; changes nothing."""
    found = []
    with _dead_runs(paths) as runs:
        for run in runs:
            groups = ", ".join(map(str, run.tops)) or "no control group"
            living = sum(process_count(leaf.unified) for leaf in _leaves(run))
            found.append(Leftover("run", run.token, f"{groups}{f', {living} processes' if living else ''}"))
            found += [Leftover("folder", str(folder)) for folder in run.folders if folder.exists()]
    with _free_uids() as locks:
        found += [Leftover("uid lock", lock.name) for lock in locks]
    return found


def clear(paths: Paths) -> list[Leftover]:
    """Remove everything that ``find`` finds; returns what it was. Safe to repeat, also when interrupted."""
    found = find(paths)
    with _dead_runs(paths) as runs:
        for run in runs:
            leaves = _leaves(run)
            for leaf in leaves:
                leaf.kill()
            if not all([leaf.wait_empty(_EMPTY_SECONDS) for leaf in leaves]):
                continue  # a process that cannot die now (uninterruptible): its journal stays for the next time
            for leaf in leaves:
                leaf.remove()
            for folder in run.folders:
                for place in mounts_below(folder):
                    loop.widen(place)
                    mount.unmount(place, lazy=True)
                remove_tree(folder, ignore_errors=True)
            # Last: as long as anything is left, something has to name it.
            if run.journal is not None:
                run.journal.unlink(missing_ok=True)
    # After the runs: a uid must not be lent again while a process of its last borrower lives.
    with _free_uids() as locks:
        for lock in locks:
            lock.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        os.rmdir(user.LOCKS)
    return found


@contextlib.contextmanager
def _dead_runs(paths: Paths) -> Iterator[list[_Run]]:
    """The dead commands; their journals are locked meanwhile, so that two clearings do not meet."""
    runs: dict[str, _Run] = {}
    held: list[int] = []
    living = set()
    try:
        for path in sorted(paths.run.glob("run-*.journal")):
            match = _JOURNAL.fullmatch(path.name)
            if match is None:
                continue
            fd = _lock(path)
            if fd is None:
                living.add(match[1])
                continue
            held.append(fd)
            run = runs[match[1]] = _Run(match[1], path)
            for entry in read_entries(os.pread(fd, os.fstat(fd).st_size, 0)).values():
                if entry.kind == "subtree":
                    run.tops += [Path(folder) for folder in entry.folders if Path(folder).is_dir()]
                elif entry.kind == "mount":
                    folder = Path(entry.folders[0]).parents[1]
                    if folder.parent == paths.lib and folder.name.startswith("prove-"):
                        run.folders.append(folder)
                elif entry.kind in ("leaf", "spare"):
                    tops = [Path(folder).parent for folder in entry.folders]
                    run.tops += [top for top in tops if top.is_dir() and top.name == _top(paths, match[1])]
        groups: defaultdict[str, list[Path]] = defaultdict(list)
        for top in _group_tops(paths):
            groups[top.name.rpartition("-")[2]].append(top)
        for token, found in groups.items():
            if token in runs:
                runs[token].tops += found
            # Not every hierarchy has a process of a living command: only a cage with a cap on disks is in blkio's.
            elif token not in living and not any(map(_populated, found)):
                runs[token] = _Run(token, None, found)
        for run in runs.values():
            run.tops = list(dict.fromkeys(run.tops))
        yield list(runs.values())
    finally:
        close_all(held)


@contextlib.contextmanager
def _free_uids() -> Iterator[list[Path]]:
    """The lock files of borrowed uids that nobody holds; locked meanwhile, so that nobody borrows one of them."""
    held: list[int] = []
    free: list[Path] = []
    names: list[str] = []
    try:
        with contextlib.suppress(FileNotFoundError):  # whoever gives the last uid back removes the folder
            names = os.listdir(user.LOCKS)
        for path in sorted(Path(user.LOCKS, name) for name in names if name.isdigit()):
            fd = _lock(path)
            if fd is not None:
                held.append(fd)
                free.append(path)
        yield free
    finally:
        close_all(held)


def _lock(path: Path) -> int | None:
    """Take the lock of a file that is there; None when somebody holds it, or when it is no regular file."""
    try:
        return lock_file(path, create=False)
    except OSError:
        return None


def _top(paths: Paths, token: str) -> str:
    return f"{paths.named('isolator')}-run-{token}"


def _group_tops(paths: Paths) -> list[Path]:
    """Find every ``isolator[-ID]-run-TOKEN`` group of this root, in every hierarchy, wherever its command ran."""
    name = re.compile(rf"{re.escape(_top(paths, ''))}[0-9a-f]{{10}}")
    found: list[Path] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] not in ("cgroup", "cgroup2"):
            continue
        for folder, inner, _ in os.walk(before.split()[4]):
            found += [Path(folder, one) for one in inner if name.fullmatch(one)]
            inner[:] = [one for one in inner if not name.fullmatch(one)]
    return list(dict.fromkeys(found))


def _populated(top: Path) -> bool:
    """Whether anything is in the group or below it (v1 groups, which cannot tell, have no process of their own)."""
    with contextlib.suppress(FileNotFoundError):
        return "populated 1" in (top / "cgroup.events").read_text()
    return any(process_count(Path(folder)) for folder, _, _ in os.walk(top))


def _leaves(run: _Run) -> list[Leaf]:
    """Groups of a command, inner ones first, so that they can be removed in this order."""
    return [Leaf(Path(folder)) for top in run.tops for folder, _, _ in os.walk(top, topdown=False)]
