"""Packages, and the process that reads one: ``python3 -I -m isolator.reader.package``.

Standard input is the package; standard output gets its content (``isolator/ipc/folder_stream.py``), or why it is none.
With ``manifest`` behind it: the bytes of its ``plugin.json`` alone, and nothing of a file that has none.

A package is a tar archive (POSIX ustar) of which each folder of files has exactly one: the members in the order of
their paths, each after its folder; folders and regular files, no owner, no time, mode 0755 or 0644; then, if it is
signed, the member ``SIGNATURES``, an envelope of DSSE; then the member ``SUM``, which has the SHA-256 of every byte
before its own header; then two empty blocks, and nothing behind them. It is not compressed. A header is read by making
it anew from the few fields that may differ: any other byte is a fault.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator

from isolator.errors import UsageError, printable
from isolator.ipc.folder_stream import CHUNK, MAX_BYTES, MAX_DEPTH, MAX_FILES, FolderWriter
from isolator.policy.request import MANIFEST_NAME
from isolator.policy.request import MAX_BYTES as LARGEST_MANIFEST
from isolator.policy.trust import PAYLOAD_TYPE, SIGNATURE_BYTES

BLOCK = 512
SIGNATURES, SUM = b"isolator.sig", b"isolator.sum"
"""Names of the last members."""
MOST_SIGNATURES, _LARGEST_ENVELOPE = 8, 16 << 10
_LONGEST_NAME, _LONGEST_PREFIX = 100, 155
_FOLDER, _FILE = b"5", b"0"
_AGAIN = "name the plugin's folder, or pack that again with 'isolator pack'"
_KINDS = {
    b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a FIFO", b"L": "a GNU extension",
    b"K": "a GNU extension", b"S": "a sparse file", b"x": "a PAX extension", b"g": "a PAX extension",
}  # fmt: skip
_CPU_BYTES = 256 << 20
"""Bytes that a package's share of processor time (that of one manifest) is enough for, by far."""


def header(path: bytes, size: int, *, folder: bool = False, executable: bool = False) -> bytes:
    """The header of a member; ``path`` without a slash at its end. Raises ValueError for one that is too long."""
    name = path + b"/" if folder else path
    prefix = b""
    if len(name) > _LONGEST_NAME:
        place = name.find(b"/", len(name) - _LONGEST_NAME - 1)
        if not 0 < place <= _LONGEST_PREFIX or place == len(name) - 1:
            raise ValueError("its path is too long")
        prefix, name = name[:place], name[place + 1 :]
    mode = b"0000755" if folder or executable else b"0000644"
    block = bytearray(BLOCK)
    for start, text in (
        (0, name), (100, mode), (108, b"0000000"), (116, b"0000000"), (124, b"%011o" % size), (136, b"0" * 11),
        (148, b" " * 8), (156, _FOLDER if folder else _FILE), (257, b"ustar"), (263, b"00"), (345, prefix),
    ):  # fmt: skip
        block[start : start + len(text)] = text
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padding(size: int) -> bytes:
    """The bytes that fill the last block of a member."""
    return bytes(-size % BLOCK)


def trailer(digest: bytes) -> bytes:
    """The end of a package whose bytes so far have this SHA-256."""
    text = sum_text(digest)
    return header(SUM, len(text)) + text + padding(len(text)) + bytes(2 * BLOCK)


def sum_text(digest: bytes) -> bytes:
    """The content of the member ``SUM``."""
    return b"isolator package 1\nsha256 %s\n" % digest.hex().encode()


def order(path: bytes) -> list[bytes]:
    """The key by which members are sorted: a folder comes right before what is in it."""
    return path.split(b"/")


def read_package(read: Callable[[int], bytes], writer: FolderWriter) -> None:
    """Write the content of a package; ``read`` returns at most so many bytes, none at the end. Raises UsageError."""
    _Package(read, writer).whole()


def manifest_in(fd: int) -> bytes:
    """The manifest in a package, for who lists it: nothing else is looked at. Raises UsageError for one without."""
    for _ in range(MAX_FILES):
        block = os.read(fd, BLOCK)
        if len(block) < BLOCK or not any(block):
            break
        path, size, folder, _ = _fields(block)
        if path == MANIFEST_NAME.encode() and not folder:
            return os.read(fd, min(size, LARGEST_MANIFEST + 1))
        os.lseek(fd, 0 if folder else size + len(padding(size)), os.SEEK_CUR)
    raise _fault(MANIFEST_NAME, "is not in it")


def signatures_in(envelope: bytes) -> list[bytes]:
    """The signatures in an envelope, at least one; raises UsageError for what is none."""
    try:
        found = json.loads(envelope)
        if found["payloadType"] != PAYLOAD_TYPE or not isinstance(found["payload"], str):
            raise ValueError
        signatures = [base64.b64decode(one["sig"], validate=True) for one in found["signatures"]]
        if not 0 < len(signatures) <= MOST_SIGNATURES or any(len(one) != SIGNATURE_BYTES for one in signatures):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(_shown(SIGNATURES), "holds no signatures of a package", "sign it again") from None
    return signatures


class _Package:
    def __init__(self, read: Callable[[int], bytes], writer: FolderWriter) -> None:
        self._read, self._writer = read, writer
        self._digest = hashlib.sha256()
        self._inside: list[bytes] = []
        """The folders that are entered."""
        self._last: list[bytes] = []
        self._count = self._size = 0
        self._signatures: list[bytes] = []

    def whole(self) -> None:
        while True:
            block = self._take(BLOCK)
            if not any(block):
                raise _fault("", "ends without the digest of its content")
            path, size, folder, executable = _fields(block)
            try:
                known = header(path, 0 if folder else size, folder=folder, executable=executable)
            except ValueError:
                known = b""
            if known != block:
                raise _fault(_shown(path), "its header is not as a package has it")
            if path == SUM and not folder:
                break
            self._digest.update(block)
            if path == SIGNATURES and not folder:
                self._envelope(size)
                continue
            if self._signatures:
                raise _fault(_shown(path), "stands behind the signatures")
            self._member(path, size, folder=folder, executable=executable)
        text = sum_text(self._digest.digest())
        if size != len(text) or self._take(size) != text:
            raise _fault("", "is damaged: it is not what its digest says")
        if any(self._take(len(padding(size)))) or any(self._take(2 * BLOCK)) or self._read(1):
            raise _fault("", "has something behind its end")
        self._leave(0)
        for signature in self._signatures:
            self._writer.signature(signature)
        self._writer.end()

    def _envelope(self, size: int) -> None:
        if self._signatures or size > _LARGEST_ENVELOPE:
            raise _fault(_shown(SIGNATURES), "is there twice, or too large")
        self._signatures = signatures_in(b"".join(self._content(size)))

    def _member(self, path: bytes, size: int, *, folder: bool, executable: bool) -> None:
        self._count, self._size = self._count + 1, self._size + size
        parts = order(path)
        if {b"", b".", b".."} & set(parts):
            raise _fault(_shown(path), "its path leads out of the package")
        if parts <= self._last:
            raise _fault(_shown(path), "is there twice, or not in its place")
        if self._count > MAX_FILES or self._size > MAX_BYTES or len(parts) > MAX_DEPTH:
            raise _fault("", f"has more than {MAX_FILES} files, {MAX_BYTES >> 20} MiB or {MAX_DEPTH} folders in a row")
        self._last = parts
        shared = 0
        while shared < len(self._inside) and parts[shared : shared + 1] == self._inside[shared : shared + 1]:
            shared += 1
        self._leave(shared)
        if shared != len(parts) - 1:
            raise _fault(_shown(path), "is in a folder that the package does not have")
        if folder:
            self._writer.enter(parts[-1])
            self._inside.append(parts[-1])
        else:
            self._writer.file(parts[-1], self._content(size), executable=executable, mtime_ns=0)

    def _leave(self, depth: int) -> None:
        while len(self._inside) > depth:
            self._inside.pop()
            self._writer.leave()

    def _content(self, size: int) -> Iterator[bytes]:
        left = size
        while left:
            chunk = self._take(min(left, CHUNK))
            self._digest.update(chunk)
            left -= len(chunk)
            yield chunk
        rest = self._take(len(padding(size)))
        if any(rest):
            raise _fault("", "is damaged: there is something between its members")
        self._digest.update(rest)

    def _take(self, size: int) -> bytes:
        data = self._read(size) if size else b""
        while len(data) < size:
            chunk = self._read(size - len(data))
            if not chunk:
                raise _fault("", "ends too early")
            data += chunk
        return data


def _fields(block: bytes) -> tuple[bytes, int, bool, bool]:
    """Path, size, whether it is a folder, and executable: the fields of a header that may differ."""
    if block[257:263] != b"ustar\0":
        raise _fault("", "is no package")
    kind = block[156:157]
    name, prefix = (block[start:end].partition(b"\0")[0] for start, end in ((0, 100), (345, 500)))
    path = prefix + b"/" + name if prefix else name
    if kind not in (_FOLDER, _FILE):
        raise _fault(_shown(path), f"is {_KINDS.get(kind, 'neither a file nor a folder')}, which a package cannot have")
    try:
        size = int(block[124:135], 8)
    except ValueError:
        raise _fault(_shown(path), "its header is not as a package has it") from None
    return path.removesuffix(b"/"), max(size, 0), kind == _FOLDER, block[100:107] == b"0000755"


def _fault(path: str, why: str) -> UsageError:
    return UsageError(path, why, _AGAIN)


def _shown(path: bytes) -> str:
    return path.decode(errors="backslashreplace")


def main() -> None:
    """Read the package on standard input."""
    from isolator.reader.hardening import harden

    writer = FolderWriter(1)
    size = os.fstat(0).st_size
    # What is loaded on first use is there by now.
    printable("\n")
    hashlib.sha256()
    with contextlib.suppress(UsageError):
        signatures_in(b"{}")
    harden(1 + size // _CPU_BYTES)
    if sys.argv[1:] == ["manifest"]:
        with contextlib.suppress(UsageError, OSError):
            os.write(1, manifest_in(0))
        return
    try:
        read_package(lambda most: os.read(0, most), writer)
    except UsageError as error:
        writer.error(os.fsencode(error.what), error.why, error.remedy)


if __name__ == "__main__":
    main()
