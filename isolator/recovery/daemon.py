"""Clear what a killed daemon left.

What is left is found in three places, and each names it beyond doubt: the journal (this boot, full paths), the
daemon's own cgroup subtree (its name carries the instance), and the mounts below the state folder. Nothing is
recognised by a pid.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path

from isolator.base.structs import struct_class
from isolator.layers.cgroup.leaf import Leaf
from isolator.layers.cgroup.subtree import find_hierarchies
from isolator.linux import loop, mount
from isolator.linux.child import Child, ended
from isolator.linux.files import remove_tree
from isolator.paths import Paths
from isolator.recovery.journal import Entry, Journal

_KINDS = {"leaf": "cage", "service": "service", "spare": "spare"}
"""Names for people of the journal's entries that are control groups."""


@struct_class(frozen=True)
class Leftover:
    """A leftover: ``cage NAME.RUN``, ``service NAME``, ``spare NAME``, ``group PATH``, ``mount PATH``,
    ``run TOKEN``, ``uid lock UID``."""

    kind: str
    name: str
    detail: str = ""


def find(paths: Paths, entries: Mapping[str, Entry]) -> list[Leftover]:
    """Everything that an earlier daemon of this root left behind, by its journal's ``entries``; changes nothing."""
    found: list[Leftover] = []
    seen: set[str] = set()
    for entry in entries.values():
        if entry.kind == "subtree":
            continue
        if entry.kind == "mount":
            found.append(Leftover("mount", entry.folders[0]))
        else:
            leaf = Leaf(Path(entry.folders[0]))
            found.append(Leftover(_KINDS[entry.kind], entry.name, _count(leaf)))
        seen.update(entry.folders)
    for folder in subtree_folders(paths):
        for child in folder.iterdir() if folder.exists() else ():
            if child.is_dir() and str(child) not in seen:
                found.append(Leftover("group", str(child), _count(Leaf(child))))
    for place in mounts_below(paths.state):
        if place not in seen:
            found.append(Leftover("mount", place))
    return found


def clear(paths: Paths, journal: Journal) -> list[Leftover]:
    """Remove everything that ``find`` finds; returns what it was. Safe to repeat, also when interrupted."""
    found = find(paths, journal.open)
    groups = [Path(folder) for entry in journal.open.values() if entry.kind in _KINDS for folder in entry.folders]
    for folder in subtree_folders(paths):
        groups += [child for child in folder.iterdir() if child.is_dir()] if folder.exists() else []
    leaves = [Leaf(folder) for folder in dict.fromkeys(groups)]
    for leaf in leaves:
        leaf.kill()
    for leaf in leaves:
        leaf.wait_empty(10.0)
    for leaf in leaves:
        leaf.remove()
    for entry in list(journal.open.values()):
        if entry.kind == "subtree" or entry.kind in _KINDS:
            journal.forget(entry.name)
    for place in mounts_below(paths.state):
        with contextlib.suppress(OSError):
            loop.widen(place)
            mount.unmount(place, lazy=True)
    for entry in list(journal.open.values()):
        if entry.kind == "mount":
            journal.forget(entry.name)
    remove_tree(paths.run / "hostapi", ignore_errors=True)
    return found


async def clear_cage(journal: Journal, name: str, pid: int) -> None:
    """End one cage by its groups and its pid 1, a child of this process, when nothing else of it can be taken over."""
    entry, child = journal.open.get(name), Child(pid)
    leaves = [Leaf(Path(folder)) for folder in entry.folders] if entry is not None else []
    for leaf in leaves:
        leaf.kill()
    child.kill()
    await ended(child)
    for leaf in leaves:
        await asyncio.to_thread(leaf.wait_empty, 10.0)
        leaf.remove()
    if entry is not None:
        journal.forget(name)


def subtree_folders(paths: Paths) -> list[Path]:
    """Folders of this instance's cgroup subtree in every hierarchy, whether they exist or not."""
    found = find_hierarchies()
    name = paths.named("isolator")
    folders = []
    if found.unified is not None:
        base = found.unified.parent if found.unified.name == "supervisor" else found.unified
        folders.append(base / name)
    folders += [path / name for path in found.v1.values()]
    return list(dict.fromkeys(folders))


def mounts_below(folder: Path) -> list[str]:
    """The mount points below ``folder``, deepest first."""
    places = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted((p for p in places if p.startswith(f"{folder}/")), reverse=True)


def process_count(group: Path) -> int:
    """Number of processes in a group itself; 0 when the group does not exist."""
    return len(Leaf(group).processes())


def _count(leaf: Leaf) -> str:
    count = process_count(leaf.unified)
    return f"{count} process{'' if count == 1 else 'es'}" if count else ""


def remove_subtree(paths: Paths) -> None:
    """Remove the empty tops of this instance's groups."""
    for folder in subtree_folders(paths):
        with contextlib.suppress(OSError):
            folder.rmdir()
