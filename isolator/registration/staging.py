"""Staging: a bounded copy of a stranger's folder, read but not yet agreed to.

``collecting.py`` makes the copy from what the caller handed over; here nothing is opened by a name of the caller's but
a binary that is registered by path, which stays where it is. Only its manifest is staged then, beside the SHA-256 of
its content, once the caller has proved the right to read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from isolator.base.lean import sha256_of_much
from isolator.errors import UsageError, translated
from isolator.linux.descriptors import FdSet, owning
from isolator.linux.files import open_nofollow, openat2, remove_tree, write_all
from isolator.policy.request import MAX_BYTES as MAX_MANIFEST
from isolator.policy.request import synthesise_manifest
from isolator.registration.collecting import Collected, Offer, collect
from isolator.registration.program import CageView, check_descriptor, check_program
from isolator.registration.reading import ManifestReader
from isolator.registration.unpacking import unpack

MANIFEST = "plugin.json"
NAME = re.compile(r"[a-z][a-z0-9-]{1,62}\Z")
PREFIX = ".staging-"
"""Beginning of the names of staging folders; the store removes them when a daemon starts."""
Kind = Literal["folder", "binary", "package"]
_CHUNK = 1 << 20
_TICK_NS = 100_000_000
_MAX_HASHED = 1024
_hashed: dict[tuple[int, ...], str] = {}


@dataclass(frozen=True)
class Source:
    """Origin of a plugin as an operator named it: a folder or a package (``path``), or a binary with flags.

    Empty: not named.
    """

    path: str = ""
    name: str = ""
    binary: str = ""
    hooks: tuple[str, ...] = ()
    files: str = ""


@dataclass(frozen=True)
class Staged:
    """A plugin that was copied and read but not yet agreed to."""

    token: str
    name: str
    digest: str
    folder: Path
    manifest: bytes
    synthesised: bool
    kind: Kind = "folder"
    binary_path: str = ""
    binary_sha256: str = ""
    files: int = 0
    size: int = 0
    """Bytes of what was copied."""
    signatures: tuple[str, ...] = ()
    """Of a package, in hexadecimal digits; unchecked."""


def stage(base: Path, source: Source, reader: ManifestReader, offer: Offer) -> Staged:
    """Copy what ``offer`` holds into a new folder below ``base``; raises UsageError when it cannot be a plugin.

    ``source`` names it, and the paths in it are those of the caller: names, but for that of a pinned binary.
    """
    with contextlib.closing(offer):
        for path in (source.path, source.binary, source.files):
            _check_characters(path)
        stager = _Stager(base, reader, offer)
        if source.path:
            return stager.stage_folder(Path(source.path))
        if source.name and source.binary:
            files = Path(source.files) if source.files else None
            return stager.stage_binary(source.name, Path(source.binary), list(source.hooks), files)
    raise UsageError("plugin add", "name a folder, or give --name, --binary and --hooks", "see --help")


def stage_again(base: Path, folder: Path, name: str, source: Source) -> Staged:
    """Stage a binary that is registered by path as it is now, with the files that are in the store beside it."""
    binary = Path(source.binary)
    sha256 = hash_binary(binary)
    with _new_staging(base) as (token, target):
        import shutil

        shutil.copytree(folder, target, symlinks=True, dirs_exist_ok=True)
        manifest = _synthesised(name, sha256, f"./{binary.name}", source.hooks)
        _write_new(target / MANIFEST, manifest, 0o644)
        digest = _digest("" if not source.files else folder.name, sha256, manifest)
        return Staged(token, name, digest, target, manifest, True, "binary", str(binary), sha256)


def discard(staged: Staged) -> None:
    """Delete a staged copy."""
    remove_tree(staged.folder, ignore_errors=True)


class _Stager:
    def __init__(self, base: Path, reader: ManifestReader, offer: Offer) -> None:
        self._base, self._reader, self._offer = base, reader, offer

    def stage_folder(self, path: Path) -> Staged:
        """Copy a folder, or the content of a package, and read its manifest; nothing is registered yet."""
        with _new_staging(self._base) as (token, target):
            collected = collect(self._offer, target, str(path), packages=True)
            if not collected.packaged:
                return self._staged_folder(token, target, collected, path)
            content = unpack(target, str(path), self._reader.uid_range)
            staged = self._staged_folder(token, target, content, path)
            return replace(staged, kind="package", signatures=tuple(one.hex() for one in content.signatures))

    def stage_binary(self, name: str, binary: Path, hooks: list[str], files: Path | None) -> Staged:
        """Stage a binary by path: pinned when it stays where it is, copied when it lies in ``files``.

        A caller hands over its folder in its place if a ``plugin.json`` is there: that is read first, and flags only
        narrow its hooks.
        """
        if not NAME.match(name):
            raise UsageError(f"plugin name {name!r}", "not [a-z][a-z0-9-]{1,62}", "choose another --name")
        with _new_staging(self._base) as (token, target):
            collected = collect(self._offer, target, str(files or binary.parent))
            if files is None and collected.digest:
                staged = self._staged_folder(token, target, collected, binary.parent)
                return self._narrowed(staged, name, binary, hooks)
            inside = binary.relative_to(files) if files is not None and binary.is_relative_to(files) else None
            if inside is not None:
                sha256 = _hash_in(target, str(inside), shown=binary)
            else:
                sha256 = _hash_offered(binary, collected.single)
            manifest = _synthesised(name, sha256, f"./{inside or binary.name}", hooks)
            self._reader.read(manifest, "plugin add")
            _write_new(target / MANIFEST, manifest, 0o644)
        digest = _digest(collected.digest, sha256, manifest)
        kind: Kind = "binary" if inside is None else "folder"
        pinned = (str(binary), sha256) if inside is None else ("", "")
        return Staged(
            token, name, digest, target, manifest, True, kind, *pinned, files=collected.files, size=collected.size
        )

    def _staged_folder(self, token: str, target: Path, collected: Collected, path: Path) -> Staged:
        manifest = _read_manifest(target, path)
        name = self._reader.read(manifest, str(path / MANIFEST)).core.name
        return Staged(
            token, name, collected.digest, target, manifest, False, files=collected.files, size=collected.size
        )

    def _narrowed(self, staged: Staged, name: str, binary: Path, hooks: list[str]) -> Staged:
        body = self._reader.read(staged.manifest, str(binary.parent / MANIFEST)).manifest
        if staged.name != name:
            why = f"{binary.parent / MANIFEST} calls it {staged.name}"
            raise UsageError(f"--name {name}", why, f"use --name {staged.name} or move the binary away from that file")
        wanted = os.path.normpath(str(body.get("binary", "")))
        if wanted != binary.name:
            why = f"{binary.parent / MANIFEST} names {binary.parent / wanted}"
            raise UsageError(f"--binary {binary}", why, "register that one")
        unknown = [hook for hook in hooks if hook not in body.get("hooks", [])]
        if unknown:
            why = "the manifest beside the binary does not list them"
            raise UsageError(f"--hooks {','.join(unknown)}", why, "flags only narrow a manifest; add them there")
        if hooks and hooks != body["hooks"]:
            manifest = json.dumps({**body, "hooks": hooks}, indent=2).encode()
            (staged.folder / MANIFEST).write_bytes(manifest)
            digest = hashlib.sha256(staged.digest.encode() + manifest).hexdigest()
            return replace(staged, manifest=manifest, digest=digest)
        return staged


@contextlib.contextmanager
def _new_staging(base: Path) -> Iterator[tuple[str, Path]]:
    """Token and folder, root's alone, of a new copy; the folder is deleted when the block fails."""
    token = os.urandom(8).hex()
    folder = base / f"{PREFIX}{token}"
    folder.mkdir(mode=0o700)
    try:
        yield token, folder
    except BaseException:
        remove_tree(folder, ignore_errors=True)
        raise


def _synthesised(name: str, sha256: str, program: str, hooks: Sequence[str]) -> bytes:
    return json.dumps(synthesise_manifest(name, sha256, program, list(hooks)), indent=2).encode()


def _digest(files: str, sha256: str, manifest: bytes) -> str:
    return hashlib.sha256(b"\0".join([files.encode(), sha256.encode(), manifest])).hexdigest()


def _hash_in(folder: Path, path: str, *, shown: Path) -> str:
    """SHA-256 of a file in a copy; raises UsageError when there is none of that name."""
    with (
        translated(OSError, UsageError, str(shown), "", "check the path"),
        owning(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as root,
        owning(openat2(root, path, os.O_RDONLY)) as fd,
    ):
        return hash_descriptor(fd)


def _hash_offered(binary: Path, offered: tuple[int, int] | None) -> str:
    """SHA-256 of a binary that stays where it is, for a caller who has handed that very file over."""
    with FdSet() as owned:
        if offered is None:
            raise UsageError(str(binary), "was not handed over", "hand it over with the request, open for reading")
        with translated(OSError, UsageError, str(binary), "", "check the path"):
            fd = owned.add(open_binary(binary))
        info = os.fstat(fd)
        if (info.st_dev, info.st_ino) != offered:
            raise UsageError(str(binary), "is not the file that was handed over", "name the file itself, not a link")
        return hash_descriptor(fd)


def open_binary(path: Path) -> int:
    """Open a binary that stays where it is; it and every folder above must be root's and writable by nobody else."""
    for folder in [*reversed(path.parents), path]:
        info = folder.lstat()
        wanted = "regular file" if folder == path else "folder"
        if folder == path and not stat.S_ISREG(info.st_mode):
            raise UsageError(str(folder), f"not a {wanted}", "name the binary itself")
        sticky = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX and not info.st_uid
        if (
            info.st_uid != 0
            or (info.st_mode & 0o022 and not sticky)
            or (sticky and folder != path and info.st_mode & 2)
        ):
            remedy = f"chown root, chmod go-w, or register the folder instead: isolator plugin add {path.parent}"
            raise UsageError(str(folder), "others than root can change it, and so what would run", remedy)
    if not path.stat().st_mode & 0o111:
        raise UsageError(str(path), "not executable", f"chmod +x {path}")
    with translated(OSError, UsageError, str(path), "", "name the file itself, not a link to it"):
        return open_nofollow(str(path), os.O_RDONLY)


def hash_descriptor(fd: int) -> str:
    """SHA-256 of an open file; from memory when it has not changed since it was last hashed."""
    now, before = time.time_ns(), _identity(fd)
    if before in _hashed:
        return _hashed[before]
    digest = _hash(fd)
    # A change within the clock's tick before the first byte would not be seen.
    if _identity(fd) == before and now - before[-1] > _TICK_NS:
        while len(_hashed) >= _MAX_HASHED:
            _hashed.pop(next(iter(_hashed)), None)
        _hashed[before] = digest
    return digest


def _identity(fd: int) -> tuple[int, ...]:
    """Identity of a file's content: only root can set its ctime (by the clock), and these files are root's."""
    info = os.fstat(fd)
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _hash(fd: int) -> str:
    digest = sha256_of_much()
    offset = 0
    while chunk := os.pread(fd, _CHUNK, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()


def hash_binary(path: Path) -> str:
    """SHA-256 of a binary that stays where it is; raises UsageError when others could change it."""
    with owning(open_binary(path)) as fd:
        return hash_descriptor(fd)


def check_staged(staged: Staged, binary: str, shown: str, *, read: tuple[str, ...]) -> None:
    """Raise UsageError unless a cage can execute a staged plugin; ``binary`` as its manifest names it.

    ``read``: folders of the host that it sees, or may be granted.
    """
    view = CageView(staged.folder, read)
    if staged.kind == "binary":
        with owning(open_binary(Path(staged.binary_path))) as fd:
            check_descriptor(fd, view, shown=staged.binary_path)
    else:
        check_program(view, binary, shown=f"{shown}/{binary.removeprefix('./')}")


def _check_characters(path: str) -> None:
    """Raise UsageError for text that no file's path can be; nobody has checked it before."""
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise UsageError(ascii(path)[:80], "has characters that no path can have", "check the path")


def _read_manifest(folder: Path, source: Path) -> bytes:
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        remedy = "write one (see 'isolator new'), or register with --name, --binary and --hooks"
        raise UsageError(f"{source / MANIFEST}", "not there (or not a regular file)", remedy)
    with path.open("rb") as file:
        return file.read(MAX_MANIFEST + 1)  # one byte too many is refused by who parses it


def _write_new(path: Path, content: bytes, mode: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with owning(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)) as fd:
        write_all(fd, content)
        os.fchmod(fd, mode)
