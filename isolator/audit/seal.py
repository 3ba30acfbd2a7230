"""The signing key of the trail, its seals, and how both are checked.

A seal signs the hash of the record right before it, which stands for all records up to there. The signed message
is ASCII: ``isolator audit seal\\n``, then ``FROM TO HASH\\n`` where FROM and TO are the first and last ``seq``
that this seal covers and HASH is the ``hash`` of record TO. The signature is Ed25519, in hex.

The key is made at first start and readable by the audit user alone. A key that somebody else could read, or that
is missing or broken, is not used again: a new one takes over, a record says so, and ``public.pem`` holds both.

The package ``cryptography`` is imported by the functions that need it: others than the audit process have this module.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from isolator.linux.descriptors import owning
from isolator.linux.durable import replace_file
from isolator.linux.files import read_plain

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_NAME = "seal.key"
PUBLIC_NAME = "public.pem"
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----\n.*?-----END PUBLIC KEY-----\n", re.S)
_PRIVATE, _PUBLIC = bytes.fromhex("302e020100300506032b657004220420"), bytes.fromhex("302a300506032b6570032100")
"""Begin of an Ed25519 key in DER (RFC 8410), before its 32 bytes; reading any key would take a MiB of memory."""


def message(first: int, last: int, last_hash: str) -> bytes:
    """The bytes that a seal signs."""
    return f"isolator audit seal\n{first} {last} {last_hash}\n".encode()


def fingerprint(key: Ed25519PublicKey) -> str:
    """The first 16 hex digits of the SHA-256 of the raw public key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


@dataclass(frozen=True)
class Signer:
    """The private key; ``notes``, on how it came about, go into the trail."""

    key: Ed25519PrivateKey
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return fingerprint(self.key.public_key())

    def sign(self, first: int, last: int, last_hash: str) -> str:
        """The signature, in hex, of a seal over ``first`` … ``last``."""
        return self.key.sign(message(first, last, last_hash)).hex()


def load_signer(lib: Path, log: Path) -> Signer:
    """Read the key in ``lib``, or make one; put every public key ever used into ``log``. Raises OSError."""
    notes: list[str] = []
    known = _read(lib / PUBLIC_NAME) or b""
    try:
        key: Ed25519PrivateKey | None = _read_key(lib / KEY_NAME)
        if key is None and known:
            notes.append("the signing key was missing")
    except ValueError as error:
        key = None
        notes.append(f"the signing key {error}")
        os.rename(lib / KEY_NAME, lib / f"{KEY_NAME}.distrusted")
    if key is None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        key = Ed25519PrivateKey.generate()
        replace_file(lib / KEY_NAME, _pem("PRIVATE", _PRIVATE + key.private_bytes_raw()), mode=0o600)
        if notes:
            notes[-1] += f"; from here on the key {fingerprint(key.public_key())} signs"
    public = _pem("PUBLIC", _PUBLIC + key.public_key().public_bytes_raw())
    if public not in known:
        known += public
        replace_file(lib / PUBLIC_NAME, known, mode=0o600)
    shown = _read(log / PUBLIC_NAME)
    if shown != known:
        if shown is not None and shown not in known:
            notes.append(f"{PUBLIC_NAME} was not the writer's and has been replaced")
        replace_file(log / PUBLIC_NAME, known, mode=0o644)
    return Signer(key, tuple(notes))


def load_public(path: Path) -> dict[str, Ed25519PublicKey]:
    """The public keys in a file by fingerprint, oldest first; raises OSError, ValueError when there is none."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    keys = {}
    for pem in _PEM.findall(path.read_bytes()):
        der = _der(pem)
        if der.startswith(_PUBLIC) and len(der) == len(_PUBLIC) + 32:
            key = Ed25519PublicKey.from_public_bytes(der[-32:])
            keys[fingerprint(key)] = key
    if not keys:
        raise ValueError(f"{path} holds no Ed25519 public key")
    return keys


def signature_fits(key: Ed25519PublicKey, first: int, last: int, last_hash: str, signature: str) -> bool:
    """Whether ``signature`` (hex) is the key's over that range."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(bytes.fromhex(signature), message(first, last, last_hash))
    except (InvalidSignature, ValueError):
        return False
    return True


def _read(path: Path) -> bytes | None:
    """The content of a file; None where there is none, after something else in its place was set aside."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        set_aside(path)
        return None
    return read_plain(path, most=1 << 20)


def _read_key(path: Path) -> Ed25519PrivateKey | None:
    """The key, None when there is no file; raises ValueError with the reason when it must not be used."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if path.is_symlink():
            raise ValueError("was a symbolic link") from error
        raise
    with owning(fd):
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("was not a regular file")
        if status.st_uid != os.geteuid():
            raise ValueError(f"belonged to uid {status.st_uid}")
        if status.st_mode & 0o077:
            raise ValueError(f"was open to others (mode {stat.S_IMODE(status.st_mode):04o})")
        der = _der(os.read(fd, 65536))
    if not der:
        raise ValueError("could not be read as a key")
    if not der.startswith(_PRIVATE) or len(der) != len(_PRIVATE) + 32:
        raise ValueError("was not an Ed25519 key")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(der[-32:])


def _pem(kind: str, der: bytes) -> bytes:
    text = base64.b64encode(der).decode()
    return f"-----BEGIN {kind} KEY-----\n{text}\n-----END {kind} KEY-----\n".encode()


def _der(pem: bytes) -> bytes:
    """The bytes between the lines of a key; none if it is no PEM."""
    lines = pem.split()
    try:
        return base64.b64decode(b"".join(lines[3:-3]), validate=True) if pem.startswith(b"-----BEGIN ") else b""
    except ValueError:
        return b""


def set_aside(path: Path) -> str:
    """Rename what stands in the place of a file; returns its new name."""
    aside = path.with_name(f"{path.name}.aside-{time.time_ns()}")
    os.rename(path, aside)
    return aside.name
