"""``isolator pack``: a plugin's folder as one file, the same bytes from the same files on any host."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import click

from isolator.cli.output import AS_JSON, print_json
from isolator.errors import IsolatorError, NotFoundError, UsageError, translated
from isolator.ipc.folder_stream import MAX_BYTES, MAX_DEPTH, MAX_FILES, chunks
from isolator.reader import package

SUFFIX = ".isolator"
_LEFT_OUT = (b".git",)
_PRIVATE_KEY = b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEI"
"""Beginning of a private key of Ed25519 in PEM, as ``isolator sign`` makes and takes them (RFC 8410, section 7)."""


@dataclass(frozen=True)
class Packed:
    """A package that was written."""

    path: Path
    name: str
    version: str
    sha256: str
    files: int
    size: int


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when the block ends well; otherwise nothing is left of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("xb") as out:
            yield out
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@click.command(
    epilog="\b\nExamples:\n  isolator pack ./deploy-bell\n  isolator pack . -o ../deploy-bell.isolator\n"
    "  sudo isolator plugin add deploy-bell-1.0.0.isolator",
)
@click.argument("folder", metavar="DIR")
@click.option("--output", "-o", metavar="FILE", help="Write FILE (default: NAME-VERSION.isolator, here).")
@AS_JSON
def pack(folder: str, output: str | None, as_json: bool) -> None:
    """Pack a plugin's folder into one file, for 'isolator plugin add FILE'.

    The same files give the same bytes on every host: names, contents and who may execute them count; owners, times and
    .git do not. Needs no daemon and no root. Links, devices and sockets are refused.
    """
    packed = pack_folder(Path(folder), Path(output) if output is not None else None)
    if as_json:
        print_json({
            "file": str(packed.path), "name": packed.name, "version": packed.version, "sha256": packed.sha256,
            "files": packed.files, "size": packed.size,
        })  # fmt: skip
    else:
        click.echo(f"{packed.path}  {packed.files} files and folders, {packed.size} bytes\nsha256 {packed.sha256}")


def pack_folder(folder: Path, output: Path | None = None) -> Packed:
    """Pack a folder; ``output`` is written whole or not at all. Raises IsolatorError for what cannot be packed."""
    from host.plugins.manifest import parse

    if not folder.is_dir():
        raise NotFoundError(str(folder), "no such folder", "name a folder that has a plugin.json")
    try:
        manifest = parse((folder / "plugin.json").read_bytes(), name=str(folder / "plugin.json"))
    except FileNotFoundError:
        raise NotFoundError(str(folder / "plugin.json"), "not there", "write one (see 'isolator new')") from None
    if not (folder / manifest.core.binary).is_file():
        why = f"names {manifest.core.binary}, which is not there"
        raise UsageError(str(folder / "plugin.json"), why, "build it first")
    path = output or Path(f"{manifest.core.name}-{manifest.core.version}{SUFFIX}")
    if path.resolve().is_relative_to(folder.resolve()):
        # It would be packed itself by the next one, whose bytes would be others.
        raise UsageError(str(path), "is inside the folder that is packed", f"add -o {_outside(folder, path.name)}")
    try:
        with written_whole(path) as out:
            writer = _Writer(out, folder)
            writer.whole()
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else str(path)
        raise IsolatorError(name, error.strerror or "cannot be packed") from None
    return Packed(path, manifest.core.name, manifest.core.version, writer.sha256, writer.files, writer.written)


def _outside(folder: Path, name: str) -> Path:
    """A place beside the folder, as its user would write it."""
    return Path("..") / name if folder.resolve() == Path.cwd() else folder.parent / name


class _Writer:
    def __init__(self, out: BinaryIO, folder: Path) -> None:
        self._out, self._folder = out, folder
        self._digest = hashlib.sha256()
        self.sha256 = ""
        self.files = self.written = self._size = 0

    def whole(self) -> None:
        """Write the package."""
        for path in sorted(self._paths(os.fsencode(self._folder), b""), key=package.order):
            self._member(path)
        content = self._digest.copy()
        self._write(package.trailer(content.digest()))
        self.sha256 = self._digest.hexdigest()

    def _paths(self, folder: bytes, prefix: bytes) -> Iterator[bytes]:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = prefix + entry.name
                if entry.name in _LEFT_OUT and entry.is_dir(follow_symlinks=False):
                    continue
                if path in (package.SUM, package.SIGNATURES):
                    raise UsageError(self._shown(path), "is the name of a package's own", "give it another name")
                yield path
                if entry.is_dir(follow_symlinks=False):
                    yield from self._paths(entry.path, path + b"/")

    def _member(self, path: bytes) -> None:
        full = os.path.join(os.fsencode(self._folder), path)
        info = os.lstat(full)
        self.files += 1
        if self.files > MAX_FILES or len(package.order(path)) > MAX_DEPTH:
            why = f"more than {MAX_FILES} files, or deeper than {MAX_DEPTH} folders"
            raise UsageError(self._shown(path), why, "leave out what is not needed")
        if stat.S_ISDIR(info.st_mode):
            self._write(self._header(path, 0, folder=True))
        elif stat.S_ISREG(info.st_mode):
            self._file(path, full)
        elif stat.S_ISLNK(info.st_mode):
            remedy = "put the file itself there (npm: --no-bin-links)"
            raise UsageError(self._shown(path), "is a link, which a package cannot have", remedy)
        else:
            raise UsageError(self._shown(path), "is neither a file nor a folder", "remove it")

    def _file(self, path: bytes, full: bytes) -> None:
        fd = os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.closing(os.fdopen(fd, "rb")):
            info = os.fstat(fd)
            self._size += info.st_size
            if self._size > MAX_BYTES:
                raise UsageError(self._shown(path), f"makes it more than {MAX_BYTES >> 20} MiB", "leave something out")
            self._write(self._header(path, info.st_size, executable=bool(info.st_mode & 0o111)))
            left = info.st_size
            for chunk in chunks(fd):
                if left == info.st_size and chunk.startswith(_PRIVATE_KEY):
                    why = "is a private key, such as 'isolator sign' takes: whoever has the package would have it"
                    raise UsageError(self._shown(path), why, "keep it outside the folder")
                left -= len(chunk)
                self._write(chunk)
            if left:
                raise UsageError(self._shown(path), "changed while it was packed", "try again")
            self._write(package.padding(info.st_size))

    def _header(self, path: bytes, size: int, *, folder: bool = False, executable: bool = False) -> bytes:
        with translated(ValueError, UsageError, self._shown(path), "", "use shorter names, or fewer folders"):
            return package.header(path, size, folder=folder, executable=executable)

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self.written += len(data)
        self._out.write(data)

    def _shown(self, path: bytes) -> str:
        return str(self._folder / os.fsdecode(path))
