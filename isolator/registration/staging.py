"""Staging: a bounded copy of a stranger's folder, read but not yet agreed to.

The copy follows no link, opens nothing that is not a regular file or a folder, and is bounded in size, number and
depth; its digest is the SHA-256 over names, modes and contents. A binary that is registered by path stays where it is:
only its manifest is staged, beside the SHA-256 of its content.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from isolator.errors import UsageError
from isolator.linux.descriptors import FdSet
from isolator.linux.files import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, open_nofollow, openat2
from isolator.policy.request import MAX_BYTES as MAX_MANIFEST
from isolator.policy.request import synthesise_manifest
from isolator.registration.program import CageView, check_descriptor, check_program
from isolator.registration.reading import ManifestReader

MANIFEST = "plugin.json"
NAME = re.compile(r"^[a-z][a-z0-9-]{1,62}$")
MAX_FILES = 50_000
MAX_BYTES = 2 << 30
MAX_DEPTH = 64
PREFIX = ".staging-"
"""Beginning of the names of staging folders; the store removes them when a daemon starts."""
_CHUNK = 1 << 20
_TICK_NS = 100_000_000
_MAX_HASHED = 1024
_hashed: dict[tuple[int, ...], str] = {}


@dataclass(frozen=True)
class Source:
    """Origin of a plugin as an operator named it: a folder (``path``), or a binary with flags. Empty: not named."""

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
    kind: Literal["folder", "binary"] = "folder"
    binary_path: str = ""
    binary_sha256: str = ""
    files: int = 0
    size: int = 0
    """Bytes of what was copied."""


def stage(base: Path, source: Source, reader: ManifestReader) -> Staged:
    """Copy ``source`` into a new folder below ``base``; raises UsageError when it cannot be a plugin."""
    for path in (source.path, source.binary, source.files):
        _check_characters(path)
    stager = _Stager(base, reader)
    if source.path:
        return stager.stage_folder(Path(source.path))
    if source.name and source.binary:
        files = Path(source.files) if source.files else None
        return stager.stage_binary(source.name, Path(source.binary), list(source.hooks), files)
    raise UsageError("plugin add", "name a folder, or give --name, --binary and --hooks", "see --help")


def discard(staged: Staged) -> None:
    """Delete a staged copy."""
    shutil.rmtree(staged.folder, ignore_errors=True)


class _Stager:
    def __init__(self, base: Path, reader: ManifestReader) -> None:
        self._base, self._reader = base, reader

    def stage_folder(self, path: Path) -> Staged:
        """Copy a folder and read its manifest; nothing is registered yet."""
        with FdSet() as owned, self._new_staging() as (token, target):
            copy = _Copy(str(path))
            digest = copy.whole(owned.add(_open_folder(path)), target)
            manifest = _read_manifest(target, path)
            name = self._reader.read(manifest, str(path / MANIFEST)).core.name
            return Staged(token, name, digest, target, manifest, synthesised=False, files=copy.files, size=copy.size)

    def stage_binary(self, name: str, binary: Path, hooks: list[str], files: Path | None) -> Staged:
        """Stage a binary by path: pinned when it stays where it is, copied when it lies in ``files``.

        A ``plugin.json`` beside the binary whose name fits is read first, and flags only narrow its hooks.
        """
        if not NAME.match(name):
            raise UsageError(f"plugin name {name!r}", "not [a-z][a-z0-9-]{1,62}", "choose another --name")
        binary = _resolve(binary)
        beside = binary.parent / MANIFEST
        if files is None and beside.exists():
            staged = self.stage_folder(binary.parent)
            return self._narrowed(staged, name, binary, hooks)
        sha256 = hash_binary(binary)
        with FdSet() as owned, self._new_staging() as (token, target):
            digest, kind, program = "", "binary", f"./{binary.name}"
            copy = _Copy(str(files))
            if files is not None:
                digest = copy.whole(owned.add(_open_folder(files)), target)
                files = _resolve(files)
                if binary.is_relative_to(files):
                    kind, program = "folder", f"./{binary.relative_to(files)}"
            manifest = json.dumps(synthesise_manifest(name, sha256, program, hooks), indent=2).encode()
            self._reader.read(manifest, "plugin add")
            _write_new(target / MANIFEST, manifest, 0o644)
        digest = hashlib.sha256(b"\0".join([digest.encode(), sha256.encode(), manifest])).hexdigest()
        if kind == "folder":
            return Staged(token, name, digest, target, manifest, synthesised=True, files=copy.files, size=copy.size)
        return Staged(
            token, name, digest, target, manifest, True, "binary", str(binary), sha256, files=copy.files, size=copy.size
        )

    def _narrowed(self, staged: Staged, name: str, binary: Path, hooks: list[str]) -> Staged:
        try:
            body = self._reader.read(staged.manifest, str(binary.parent / MANIFEST)).manifest
            if staged.name != name:
                raise UsageError(
                    f"--name {name}", f"{binary.parent / MANIFEST} calls it {staged.name}",
                    f"use --name {staged.name} or move the binary away from that file",
                )  # fmt: skip
            wanted = (binary.parent / str(body.get("binary", ""))).resolve()
            if wanted != binary:
                raise UsageError(
                    f"--binary {binary}", f"{binary.parent / MANIFEST} names {wanted}", "register that one"
                )
            unknown = [hook for hook in hooks if hook not in body.get("hooks", [])]
            if unknown:
                raise UsageError(
                    f"--hooks {','.join(unknown)}", "the manifest beside the binary does not list them",
                    "flags only narrow a manifest; add them there",
                )  # fmt: skip
        except BaseException:
            discard(staged)
            raise
        if hooks and hooks != body["hooks"]:
            manifest = json.dumps({**body, "hooks": hooks}, indent=2).encode()
            (staged.folder / MANIFEST).write_bytes(manifest)
            digest = hashlib.sha256(staged.digest.encode() + manifest).hexdigest()
            return replace(staged, manifest=manifest, digest=digest)
        return staged

    @contextlib.contextmanager
    def _new_staging(self) -> Iterator[tuple[str, Path]]:
        """Token and folder of a new copy; the folder is deleted when the block fails."""
        token = secrets.token_hex(8)
        folder = self._base / f"{PREFIX}{token}"
        folder.mkdir(mode=0o755)
        folder.chmod(0o755)
        try:
            yield token, folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@dataclass
class _Copy:
    """One bounded copy of a stranger's folder."""

    shown: str
    """The folder's name in errors."""
    files: int = 0
    size: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    links: list[str] = field(default_factory=list)

    def whole(self, source: int, target: Path) -> str:
        """Copy everything below ``source``; returns the digest."""
        # Before the first byte: what is too large costs a walk, and no disk.
        self._survey(source, 0, "")
        self.files = self.size = 0
        self._folder(source, target, 0, "")
        with FdSet() as owned:
            root = owned.add(_open_folder(target))
            for path in self.links:
                self._check_link(root, target, path)
        return self.digest.hexdigest()

    def _survey(self, source: int, depth: int, prefix: str) -> None:
        self._check_depth(depth, prefix)
        with os.scandir(source) as entries:
            for entry in entries:
                self._count()
                if entry.is_dir(follow_symlinks=False) and entry.name != ".git":
                    with FdSet() as owned:
                        below = owned.add(openat2(source, entry.name, os.O_RDONLY | os.O_DIRECTORY))
                        self._survey(below, depth + 1, f"{prefix}{entry.name}/")
                elif entry.is_file(follow_symlinks=False):
                    self._count_size(entry.stat(follow_symlinks=False).st_size)

    def _check_depth(self, depth: int, prefix: str) -> None:
        if depth > MAX_DEPTH:
            raise UsageError(f"{self.shown}/{prefix}", f"deeper than {MAX_DEPTH} folders", "flatten it")

    def _count(self) -> None:
        self.files += 1
        if self.files > MAX_FILES:
            raise UsageError(self.shown, f"more than {MAX_FILES} files", "leave out what the plugin does not need")

    def _count_size(self, size: int) -> None:
        self.size += size
        if self.size > MAX_BYTES:
            raise UsageError(self.shown, f"more than {MAX_BYTES >> 20} MiB", "leave out what is not needed")

    def _folder(self, source: int, target: Path, depth: int, prefix: str) -> None:
        self._check_depth(depth, prefix)
        for name in sorted(os.listdir(source)):  # by descriptor
            self._count()
            path = f"{prefix}{name}"
            info = os.stat(name, dir_fd=source, follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                if name == ".git":
                    continue
                self._update("d", path)
                (target / name).mkdir()
                (target / name).chmod(0o755)
                with FdSet() as owned:
                    below = owned.add(openat2(source, name, os.O_RDONLY | os.O_DIRECTORY))
                    self._folder(below, target / name, depth + 1, f"{path}/")
            elif stat.S_ISLNK(info.st_mode):
                self._link(source, name, target, path, depth)
            elif stat.S_ISREG(info.st_mode):
                self._file(source, name, target / name, path)
            else:
                raise UsageError(f"{self.shown}/{path}", "not a regular file, a folder or a link", "remove it")

    def _update(self, *fields: str) -> None:
        # With lengths: a file name may hold any byte, and two different folders must never have the same digest.
        for text in (str(len(fields)), *fields):
            data = text.encode(errors="surrogateescape")
            self.digest.update(len(data).to_bytes(8, "big") + data)

    def _link(self, source: int, name: str, target: Path, path: str, depth: int) -> None:
        goal = os.readlink(name, dir_fd=source)
        steps = os.path.normpath(os.path.join(os.path.dirname(path), goal))
        if goal.startswith("/") or steps == ".." or steps.startswith("../"):
            raise self._leads_out(path, goal)
        self._update("l", path, goal)
        (target / name).symlink_to(goal)
        self.links.append(path)

    def _check_link(self, root: int, target: Path, path: str) -> None:
        """Follow a link of the finished copy: by way of another link, ``..`` is elsewhere than its text says."""
        try:
            os.close(openat2(root, path, os.O_PATH, resolve=RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # leads nowhere at all
                raise self._leads_out(path, os.readlink(target / path)) from None

    def _leads_out(self, path: str, goal: str) -> UsageError:
        # Harmless in the cage, but outside it other tools (a backup, a copy) would follow it out of the store.
        return UsageError(f"{self.shown}/{path}", f"a link out of the folder, to {goal}", "copy the file itself")

    def _file(self, source: int, name: str, target: Path, path: str) -> None:
        # O_NONBLOCK: what was a file a moment ago may be a FIFO now, and opening it would block for ever.
        with FdSet() as owned:
            fd = owned.add(openat2(source, name, os.O_RDONLY | os.O_NONBLOCK))
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise UsageError(f"{self.shown}/{path}", "changed while it was being read", "try again")
            executable = bool(info.st_mode & 0o111)
            content = hashlib.sha256()
            with target.open("xb") as out:
                while chunk := os.read(fd, _CHUNK):
                    self._count_size(len(chunk))
                    content.update(chunk)
                    out.write(chunk)
                os.fchmod(out.fileno(), 0o755 if executable else 0o644)
                out.flush()
                # Python compares it with what a .pyc notes of its source. Not part of the digest.
                os.utime(out.fileno(), ns=(info.st_mtime_ns, info.st_mtime_ns))
            self._update("x" if executable else "f", path, content.hexdigest())


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
            raise UsageError(
                str(folder), "others than root can change it, and so what would run",
                f"chown root, chmod go-w, or register the folder instead: isolator plugin add {path.parent}",
            )  # fmt: skip
    if not path.stat().st_mode & 0o111:
        raise UsageError(str(path), "not executable", f"chmod +x {path}")
    try:
        return open_nofollow(str(path), os.O_RDONLY)
    except OSError as error:
        raise UsageError(str(path), error.strerror or "", "name the file itself, not a link to it") from None


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
    digest = hashlib.sha256()
    offset = 0
    while chunk := os.pread(fd, _CHUNK, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()


def hash_binary(path: Path) -> str:
    """SHA-256 of a binary that stays where it is; raises UsageError when others could change it."""
    with FdSet() as owned:
        return hash_descriptor(owned.add(open_binary(path)))


def check_staged(staged: Staged, binary: str, shown: str, *, read: tuple[str, ...]) -> None:
    """Raise UsageError unless a cage can execute a staged plugin; ``binary`` as its manifest names it.

    ``read``: folders of the host that it sees, or may be granted.
    """
    view = CageView(staged.folder, read)
    if staged.kind == "binary":
        with FdSet() as owned:
            check_descriptor(owned.add(open_binary(Path(staged.binary_path))), view, shown=staged.binary_path)
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


def _resolve(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(str(path), getattr(error, "strerror", None) or "cannot be found", "check the path") from None


def _open_folder(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(str(path), error.strerror or "", "name a folder that has a plugin.json") from None


def _read_manifest(folder: Path, source: Path) -> bytes:
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise UsageError(
            f"{source / MANIFEST}", "not there (or not a regular file)",
            "write one (see 'isolator new'), or register with --name, --binary and --hooks",
        )  # fmt: skip
    with path.open("rb") as file:
        return file.read(MAX_MANIFEST + 1)  # one byte too many is refused by who parses it


def _write_new(path: Path, content: bytes, mode: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.write(fd, content)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)
