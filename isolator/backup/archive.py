"""A backup on disk: ``manifest.json``, numbered files in ``data``, and ``keys.sealed``.

The seal of the keys authenticates the manifest, and the manifest has the SHA-256 of every file. So a backup is what it
was when it was made, or is refused. Names come from the manifest alone, and are checked as a stranger's would be.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path

from isolator.base import typed
from isolator.errors import IsolatorError, UsageError
from isolator.linux.files import read_plain

FORMAT = 1
MANIFEST, KEYS, DATA = "manifest.json", "keys.sealed", "data"
AREAS = ("etc", "plugins", "state", "host", "trail")
_MOST_MANIFEST, _MOST_KEYS = 256 << 20, 4 << 20
_BLOCK = 1 << 18
_ZEROS = bytes(_BLOCK)
_SCRYPT = {"n": 1 << 17, "r": 8, "p": 1}
_LEAST_PASSPHRASE = 12
_ANOTHER = "use another backup"


@dataclass(frozen=True)
class Entry:
    """A file, folder or link of a backup; a file's content is in ``data``, under the number of its entry."""

    area: str
    path: str
    """Below its area, without ``..`` and links on the way."""
    kind: str
    """``file``, ``folder`` or ``link``."""
    mode: int = 0
    size: int = 0
    sha256: str = ""
    goal: str = ""
    """Text of a link."""

    def __post_init__(self) -> None:
        """Raise ValueError for an entry that no backup has."""
        check_name(self.path)
        if self.area not in AREAS or self.kind not in ("file", "folder", "link") or self.size < 0:
            raise ValueError("an entry of no known kind")


@dataclass
class Manifest:
    """Content of a backup, but the keys."""

    id: str
    taken: str
    """UTC, as the trail spells it."""
    version: str
    """Isolator's."""
    machine: str
    live: bool
    """Whether a daemon ran meanwhile."""
    entries: list[Entry] = field(default_factory=list)
    format: int = FORMAT

    def encode(self) -> bytes:
        """The manifest as it is written and authenticated."""
        return json.dumps(asdict(self)).encode()


def copy_sparse(source: int, target: int, size: int | None = None) -> tuple[int, str]:
    """Copy a file, its first ``size`` bytes, without what is zero; returns (size, digest of what is not, with places).

    Raises OSError.
    """
    size = os.fstat(source).st_size if size is None else size
    os.ftruncate(target, size)
    digest, at = hashlib.sha256(str(size).encode()), 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA) // _BLOCK * _BLOCK
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        block = os.pread(source, min(_BLOCK, size - at), at)
        if not block:
            raise OSError(errno.EIO, "became shorter while it was copied")
        if block != _ZEROS[: len(block)]:
            digest.update(b"%d:" % at + block)
            _write_at(target, block, at)
        at += _BLOCK
    return size, digest.hexdigest()


def _write_at(target: int, block: bytes, at: int) -> None:
    view = memoryview(block)
    while view:
        written = os.pwrite(target, view, at)
        view, at = view[written:], at + written


def check_passphrase(passphrase: str) -> str:
    """The passphrase; raises UsageError when it is too short to protect a key."""
    if len(passphrase) < _LEAST_PASSPHRASE:
        raise UsageError("passphrase", f"it has fewer than {_LEAST_PASSPHRASE} characters", "choose a longer one")
    return passphrase


def seal(passphrase: str, keys: dict[str, bytes], manifest: bytes) -> bytes:
    """Seal the keys, by area and name, with the manifest as what is authenticated."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    salt, nonce = os.urandom(16), os.urandom(12)
    plain = json.dumps({name: base64.b64encode(key).decode() for name, key in keys.items()}).encode()
    sealed = AESGCM(_derive(passphrase, salt)).encrypt(nonce, plain, manifest)
    parts = {"salt": salt, "nonce": nonce, "sealed": sealed}
    return json.dumps({name: base64.b64encode(part).decode() for name, part in parts.items()}).encode()


def _unseal(passphrase: str, sealed: bytes, manifest: bytes) -> dict[str, bytes]:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    parts = {name: base64.b64decode(part, validate=True) for name, part in json.loads(sealed).items()}
    try:
        plain = AESGCM(_derive(passphrase, parts["salt"])).decrypt(parts["nonce"], parts["sealed"], manifest)
    except InvalidTag:
        why = "the passphrase is another one, or somebody changed the backup"
        raise IsolatorError("backup", why, f"type it again, or {_ANOTHER}") from None
    return {name: base64.b64decode(key, validate=True) for name, key in json.loads(plain).items()}


def _derive(passphrase: str, salt: bytes) -> bytes:
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return Scrypt(salt=salt, length=32, **_SCRYPT).derive(passphrase.encode())


def read(place: Path, passphrase: str) -> tuple[Manifest, dict[str, bytes]]:
    """Read the manifest and the keys of a backup; raises IsolatorError with one line for one that is not whole."""
    try:
        text = read_plain(place / MANIFEST, most=_MOST_MANIFEST)
        sealed = read_plain(place / KEYS, most=_MOST_KEYS)
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        why = "is no backup, or one that was never finished" if missing else error.strerror or "cannot be read"
        raise IsolatorError(str(place), why, "name the folder that 'isolator backup' made") from None
    try:
        form = json.loads(text)["format"]
        if isinstance(form, int) and form > FORMAT:
            raise IsolatorError(str(place), f"is of a newer version (format {form})", "install that version first")
        keys = _unseal(passphrase, sealed, text)
        manifest = typed.read(Manifest, json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"is damaged: {str(error)[:100] or type(error).__name__}"
        raise IsolatorError(str(place), why, _ANOTHER) from None
    return manifest, keys


def check_name(path: str) -> None:
    """Raise ValueError for a path that could lead anywhere but below its area."""
    if not isinstance(path, str) or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"the name {ascii(path)[:80]} leads out of the backup")


def open_plain(path: Path, *, owner: int | None = None) -> int:
    """Open a plain file for reading; follows no link, waits for nothing, and takes no second name of another's file.

    Raises OSError; and IsolatorError for what is no such file, or not ``owner``'s.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or (owner is not None and (status.st_uid, status.st_nlink) != (owner, 1)):
        os.close(fd)
        raise IsolatorError(str(path), "is not a plain file of its owner's own", "find out who put it there")
    return fd
