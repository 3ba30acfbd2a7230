"""Faults of a plugin's folder that its first event would find: files built for another Python, machine or C library,
libraries that no cage has, modules that are compiled at every start.

Nothing here is a reason to refuse a plugin: a folder may ship what it never loads. So each is a sentence for the
operator, and what packages ship on purpose (files for several machines side by side) is none.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator

from isolator.base.structs import field, struct_class
from isolator.linux.descriptors import owning
from isolator.reader.libraries import Elf, NotUnderstoodError, library_folders, missing_libraries

MOST_FINDINGS = 12
_MOST_FILES = 50_000
_MOST_DEPTH = 64
_MOST_NAMED = 3
_EXTENSION = re.compile(r"\.cpython-(\d{2,4})[a-z]*-(\w+?)-[^/]*\.so$")
_PYTHON = re.compile(r"(?:^|/)bin/python[0-9.]*$")
_FEW = 20
"""Modules that are compiled in no time."""


@struct_class()
class Host:
    """This host as a cage sees it, which files are held against."""

    machine: str = field(default_factory=platform.machine)
    python: str = field(default_factory=lambda: f"{sys.version_info.major}{sys.version_info.minor}")
    c_library: tuple[int, int] = (0, 0)
    libraries: set[str] = field(default_factory=set)

    @classmethod
    def here(cls) -> Host:
        """This host; needs to open files."""
        host = cls()
        words = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        if words and (found := re.fullmatch(r"(\d+)\.(\d+)", words[-1])):
            host.c_library = (int(found[1]), int(found[2]))
        for folder in library_folders():
            host.libraries.update(entry.name for entry in os.scandir(folder))
        return host


@struct_class()
class _Found:
    """Compiled files and modules of a folder."""

    compiled: dict[str, Elf] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    extensions: list[tuple[str, str]] = field(default_factory=list)
    """Paths and their versions of Python."""
    names: set[str] = field(default_factory=set)
    """Names of compiled files, and of links, which may lead to them."""
    own_python: bool = False
    uncompiled: int = 0


def inspect(folder: int, host: Host) -> list[str]:
    """The faults of an open folder, each a sentence."""
    found = _Found()
    for path, parent, entry in _entries(folder, "", 0, [0]):
        if entry.is_symlink():
            found.names.add(entry.name)
        elif entry.is_file(follow_symlinks=False):
            _look_at(found, path, parent, entry.name)
    return list(_sentences(found, host))[:MOST_FINDINGS]


def _entries(folder: int, prefix: str, depth: int, count: list[int]) -> Iterator[tuple[str, int, os.DirEntry[str]]]:
    """Everything but folders: its path, its open folder and its entry there."""
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        count[0] += 1
        if count[0] > _MOST_FILES:
            return
        path = f"{prefix}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            if depth < _MOST_DEPTH:
                with owning(os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)) as below:
                    yield from _entries(below, f"{path}/", depth + 1, count)
        else:
            yield path, folder, entry


def _look_at(found: _Found, path: str, parent: int, name: str) -> None:
    if name.endswith(".py"):
        found.uncompiled += not _has_bytecode(parent, name)
        return
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        elf = Elf.read(fd)
    except NotUnderstoodError:
        found.broken.append(path)
        return
    finally:
        os.close(fd)
    if elf is None:
        return
    found.compiled[path] = elf
    found.names.add(name)
    found.own_python |= _PYTHON.search(path) is not None
    if extension := _EXTENSION.search(path):
        found.extensions.append((path, extension[1]))


def _has_bytecode(parent: int, name: str) -> bool:
    """Whether this Python would take the module's ``.pyc``: noted by time and size of the source, or not to check."""
    try:
        fd = os.open(importlib.util.cache_from_source(name), os.O_RDONLY | os.O_NOFOLLOW, dir_fd=parent)
    except OSError:
        return False
    with owning(fd):
        head = os.read(fd, 16)
    if head[:4] != importlib.util.MAGIC_NUMBER:
        return False
    if flags := int.from_bytes(head[4:8], "little"):
        return flags & 1 == 1
    info = os.stat(name, dir_fd=parent)
    noted = (int.from_bytes(head[8:12], "little"), int.from_bytes(head[12:16], "little"))
    return noted == (int(info.st_mtime) & 0xFFFFFFFF, info.st_size & 0xFFFFFFFF)


def _sentences(found: _Found, host: Host) -> Iterator[str]:
    yield from _about("is damaged: it begins like a compiled file and cannot be read", found.broken)
    other = [(path, version) for path, version in found.extensions if version != host.python]
    if other and not found.own_python:
        usable = {_module(path) for path, version in found.extensions if version == host.python}
        for version in dict.fromkeys(version for _, version in other):
            paths = [path for path, built in other if built == version and _module(path) not in usable]
            yield from _about(
                f"is built for Python {_dotted(version)}, and this host's is {_dotted(host.python)}: install the "
                "packages again with that one (pip --python-version, or on this host)", paths,
            )  # fmt: skip
    fitting = {path: elf for path, elf in found.compiled.items() if elf.machine == host.machine}
    foreign = [path for path in found.compiled if path not in fitting and not _is_beside(path, fitting)]
    for machine in dict.fromkeys(found.compiled[path].machine for path in foreign):
        paths = [path for path in foreign if found.compiled[path].machine == machine]
        yield from _about(f"is built for {machine}, and this host is {host.machine}", paths)
    lacking: dict[str, list[str]] = {}
    newer: dict[tuple[int, int], list[str]] = {}
    for path, elf in fitting.items():
        if "musl" in path and any("musl" in name for name in elf.needed):
            continue  # for another C library, beside the one for this
        for name in missing_libraries(elf, found.names, host.libraries):
            lacking.setdefault(name, []).append(path)
        if elf.c_library > host.c_library > (0, 0):
            newer.setdefault(elf.c_library, []).append(path)
    for name, paths in lacking.items():
        what = f"needs {name}, which is neither shipped nor below /usr: ship or install it"
        yield from _about(what, paths)
    for wanted, paths in newer.items():
        here = ".".join(map(str, host.c_library))
        yield from _about(
            f"needs a C library of version {wanted[0]}.{wanted[1]}, and this host's is {here}: build it on an older "
            "system, or static", paths,
        )  # fmt: skip
    if found.uncompiled >= _FEW:
        yield (
            f"{found.uncompiled} Python modules have no bytecode for this host's Python and are compiled at every "
            "start: python3 -m compileall DIR before it is added"
        )


def _about(what: str, paths: list[str]) -> Iterator[str]:
    if paths:
        more = f" (and {len(paths) - _MOST_NAMED} more)" if len(paths) > _MOST_NAMED else ""
        yield f"{', '.join(paths[:_MOST_NAMED])}{more} {what}"


def _is_beside(path: str, fitting: dict[str, Elf]) -> bool:
    """Whether a file for this machine is in the same folder or in one beside it: a package loads the one that fits."""
    folder = os.path.dirname(path)
    package = os.path.dirname(folder)
    places = {os.path.dirname(one) for one in fitting}
    return folder in places or (package != "" and package in {os.path.dirname(place) for place in places})


def _module(path: str) -> str:
    return path[: path.rindex(".cpython-")]


def _dotted(version: str) -> str:
    return f"{version[0]}.{version[1:]}"
