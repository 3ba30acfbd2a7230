"""Compiled files in a plugin's folder: what they are built for, which libraries they load, and which are missing.

A stranger's files: every number of theirs is a claim, and every table is read within bounds. ``Elf`` knows as much of
elf(5) as the dynamic linker reads before it loads anything.
"""

from __future__ import annotations

import glob
import os
import re
import struct
from collections.abc import Container, Iterator
from pathlib import Path

from isolator.base.structs import field, struct_class
from isolator.linux.elf import MACHINES

_CLASS64, _LITTLE = 2, 1
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_RPATH, _DT_RUNPATH = 1, 5, 10, 15, 29
_DT_VERNEED, _DT_VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF
_MOST_HEADERS, _MOST_ENTRIES, _MOST_NEEDED, _MOST_TEXT = 128, 4096, 256, 4 << 20
_C_LIBRARY = re.compile(rb"GLIBC_(\d{1,3})\.(\d{1,3})")


class NotUnderstoodError(Exception):
    """A file that begins like a program and is none that the dynamic linker would take."""


@struct_class()
class Elf:
    """One compiled file."""

    machine: str
    needed: list[str] = field(default_factory=list)
    """Names of the libraries that it loads."""
    searched: list[str] = field(default_factory=list)
    """Folders that it names itself, with ``$ORIGIN``."""
    c_library: tuple[int, int] = (0, 0)
    """The newest version of the C library that a symbol of it is bound to."""

    @classmethod
    def read(cls, fd: int) -> Elf | None:
        """Read an open file; None when it is no compiled file, NotUnderstoodError when it is a broken one."""
        head = os.pread(fd, 64, 0)
        if head[:4] != b"\x7fELF":
            return None
        try:
            order = "<" if head[5] == _LITTLE else ">"
            (number,) = struct.unpack_from(f"{order}H", head, 18)
            elf = cls(MACHINES.get(number, f"machine {number}"))
            if head[4] == _CLASS64:
                _Dynamic(fd, head, order).fill(elf)
            return elf
        except (struct.error, IndexError, OverflowError, OSError):
            raise NotUnderstoodError from None


class _Dynamic:
    """The dynamic section of a 64-bit file."""

    def __init__(self, fd: int, head: bytes, order: str) -> None:
        self._fd, self._order = fd, order
        (table,) = self._unpack("Q", head, 32)
        size, count = self._unpack("HH", head, 54)
        self._loads: list[tuple[int, int, int]] = []
        self._entries: list[tuple[int, int]] = []
        for index in range(min(count, _MOST_HEADERS)):
            header = os.pread(fd, 56, table + index * size)
            kind, _, offset, address, _, length = self._unpack("IIQQQQ", header, 0)
            if kind == _PT_LOAD:
                self._loads.append((address, offset, length))
            elif kind == _PT_DYNAMIC:
                data = os.pread(fd, min(length, 16 * _MOST_ENTRIES), offset)
                for at in range(0, len(data) - 15, 16):
                    tag, value = self._unpack("QQ", data, at)
                    self._entries.append((tag, value))

    def _unpack(self, layout: str, data: bytes, at: int) -> tuple[int, ...]:
        found: tuple[int, ...] = struct.unpack_from(self._order + layout, data, at)
        return found

    def _place(self, address: int) -> int:
        """The place in the file of an address; raises OverflowError when nothing is loaded there."""
        for start, offset, length in self._loads:
            if start <= address < start + length:
                return offset + address - start
        raise OverflowError

    def fill(self, elf: Elf) -> None:
        """Add to ``elf`` what its dynamic section says; a static program has none."""
        values = dict(self._entries)
        if _DT_STRTAB not in values:
            return
        text = os.pread(self._fd, min(values.get(_DT_STRSZ, 0), _MOST_TEXT), self._place(values[_DT_STRTAB]))
        elf.needed = [_text(text, value) for kind, value in self._entries if kind == _DT_NEEDED][:_MOST_NEEDED]
        # As ld.so: the older key counts where the newer one is missing.
        path = _text(text, values.get(_DT_RUNPATH, values.get(_DT_RPATH, len(text))))
        elf.searched = [folder for folder in path.split(":") if folder][:_MOST_NEEDED]
        if _DT_VERNEED in values:
            elf.c_library = self._c_library(text, values[_DT_VERNEED], values.get(_DT_VERNEEDNUM, 0))

    def _c_library(self, text: bytes, address: int, count: int) -> tuple[int, int]:
        newest, at = (0, 0), self._place(address)
        for _ in range(min(count, _MOST_NEEDED)):
            _, entries, _, first, following = self._unpack("HHIII", os.pread(self._fd, 16, at), 0)
            entry = at + first
            for _ in range(min(entries, _MOST_NEEDED)):
                _, _, _, name, further = self._unpack("IHHII", os.pread(self._fd, 16, entry), 0)
                if found := _C_LIBRARY.fullmatch(text[name : name + 32].partition(b"\0")[0]):
                    newest = max(newest, (int(found[1]), int(found[2])))
                if not further:
                    break
                entry += further
            if not following:
                break
            at += following
        return newest


def _text(table: bytes, at: int) -> str:
    return os.fsdecode(table[at : at + 4096].partition(b"\0")[0])


def library_folders() -> list[str]:
    """The folders that the dynamic linker searches in a cage: those of /usr, which every cage has."""
    folders = ["/lib", "/usr/lib", "/lib64", "/usr/lib64"]
    for file in sorted(glob.glob("/etc/ld.so.conf.d/*.conf")):
        lines = Path(file).read_text(errors="replace").splitlines()
        folders += [line.strip() for line in lines if line.startswith("/")]
    real = dict.fromkeys(os.path.realpath(folder) for folder in folders)
    return [folder for folder in real if folder.startswith("/usr/") and os.path.isdir(folder)]


def missing_libraries(elf: Elf, shipped: Container[str], host: Container[str]) -> Iterator[str]:
    """Names of libraries that a file needs and that are neither ``shipped`` in the plugin nor on the ``host``.

    A shipped one counts wherever it is: packages load their own by path before the linker asks. One that the file looks
    for in a folder of the host counts if that folder is below /usr.
    """
    for name in elf.needed:
        base = os.path.basename(name)
        if base in shipped or base in host:
            continue
        named = [path for path in elf.searched if path.startswith("/usr/") and os.path.exists(f"{path}/{base}")]
        if not named:
            yield name
