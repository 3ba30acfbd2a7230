"""``isolator sign``: a publisher's signature in a package, as an envelope of DSSE, and the keys for it.

The signature covers name, version and digest of the plugin (``isolator/policy/trust.py``); the digest is that of the
content, which a host works out for itself. Signing again with the same key changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from host.authoring.pack import written_whole
from isolator.cli.output import AS_JSON, print_result
from isolator.errors import IsolatorError, NotFoundError, UsageError, translated
from isolator.ipc.folder_stream import FolderDigest, FolderWriter
from isolator.policy.request import MANIFEST_NAME, MAX_BYTES
from isolator.policy.trust import PAYLOAD_TYPE, statement
from isolator.reader import package

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@click.command(
    epilog="\b\nExamples:\n  isolator sign --new-key acme.key\n"
    "  isolator sign deploy-bell-1.0.0.isolator --key acme.key\n  isolator sign --public --key acme.key\n\n"
    "Hosts that trust the key have its public half in [trust] of their host.toml.",
)
@click.argument("file", metavar="[FILE]", required=False)
@click.option("--key", metavar="KEY", help="The private key: a PEM file of Ed25519.")
@click.option("--new-key", metavar="KEY", help="Make a key, in a new file.")
@click.option("--public", is_flag=True, help="Print the public half of --key.")
@AS_JSON
def sign(file: str | None, key: str | None, new_key: str | None, public: bool, as_json: bool) -> None:
    """Sign a package, in its place; or make a key.

    Needs neither a daemon nor root, and the library of isolator[signing]. Sign what you have packed yourself.
    """
    if new_key is not None and not (file or key or public):
        made = _new_key(Path(new_key))
        done: dict[str, Any] = {"key": new_key, "public": made}
        text = f"wrote {new_key}; its public half, the key in [trust.publishers.YOU] of a host.toml:\n{made}"
    elif key is not None and public and not (file or new_key):
        text = public_half(read_key(Path(key)))
        done = {"public": text}
    elif key is not None and file is not None and not (public or new_key):
        done = sign_package(Path(file), read_key(Path(key)))
        text = f"signed {done['name']} {done['version']} with {done['public']}"
    else:
        raise UsageError("sign", "takes FILE --key KEY, or --new-key KEY, or --public --key KEY", "see --help")
    print_result(done, text, as_json=as_json)


def sign_package(path: Path, key: Ed25519PrivateKey) -> dict[str, Any]:
    """Put a signature into a package; returns what was signed. Raises IsolatorError for a file that is no package."""
    why = "the library securesystemslib is not installed"
    with translated(ImportError, IsolatorError, "sign", why, "pip install 'isolator[signing]'"):
        from securesystemslib.dsse import Envelope
        from securesystemslib.signer import CryptoSigner
    data = read_given(path, "make it with 'isolator pack'")
    content = _read(path, data)
    name, version = _named(path, content.manifest)
    payload = statement(name, version, content.digest.hexdigest())
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(CryptoSigner(key))
    found = envelope.to_dict()
    half = public_half(key)
    found["signatures"][0]["keyid"] = half
    others = [one for one in content.others if one.get("keyid") != half]
    found["signatures"] = [*others, *found["signatures"]][-package.MOST_SIGNATURES :]
    with translated(OSError, IsolatorError, str(path)), written_whole(path) as out:
        out.write(with_signatures(data, json.dumps(found, separators=(",", ":")).encode()))
    return {"file": str(path), "name": name, "version": version, "digest": content.digest.hexdigest(), "public": half}


def with_signatures(data: bytes, envelope: bytes) -> bytes:
    """A package with this envelope in place of its own, if it has one."""
    end = len(data) - len(package.trailer(bytes(32)))
    start = _signatures_at(data, end)
    header = package.header(package.SIGNATURES, len(envelope))
    content = data[:start] + header + envelope + package.padding(len(envelope))
    return content + package.trailer(hashlib.sha256(content).digest())


def _signatures_at(data: bytes, end: int) -> int:
    """Offset at which the member ``SIGNATURES`` of a good package begins; its end when it has none."""
    known = package.header(package.SIGNATURES, 0)[:100]
    at = 0
    while at < end:
        if data[at : at + 100] == known:
            return at
        size = int(data[at + 124 : at + 135], 8)
        at += package.BLOCK + size + len(package.padding(size))
    return end


def read_given(path: Path, absent: str = "", *, most: int = -1) -> bytes:
    """The bytes of a file that a person names, not more than ``most``; raises NotFoundError or IsolatorError."""
    try:
        with path.open("rb") as file:
            return file.read(most)
    except FileNotFoundError:
        raise NotFoundError(str(path), "no such file", absent) from None
    except OSError as error:
        raise IsolatorError(str(path), error.strerror or "cannot be read") from None


def read_key(path: Path) -> Ed25519PrivateKey:
    """A private key; raises NotFoundError or UsageError."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = read_given(path, f"make one: isolator sign --new-key {path}")
    why = "is no private key in PEM, or has a passphrase"
    with translated((ValueError, TypeError), UsageError, str(path), why, "name another --key"):
        key = load_pem_private_key(data, None)
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(str(path), "is no key of Ed25519", "make one: isolator sign --new-key FILE")
    return key


def public_half(key: Ed25519PrivateKey) -> str:
    """The public half of a key, as ``host.toml`` has it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def _new_key(path: Path) -> str:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    for folder in path.resolve().parents:
        if (folder / MANIFEST_NAME).exists():
            why = f"is in the folder of a plugin ({folder}), which would be packed with it"
            raise UsageError(str(path), why, "name a place outside")
    key = Ed25519PrivateKey.generate()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UsageError(str(path), "is there already", "name a new file") from None
    except OSError as error:
        raise IsolatorError(str(path), error.strerror or "cannot be written") from None
    with os.fdopen(fd, "wb") as out:
        out.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return public_half(key)


class _Content(FolderWriter):
    """The signed part of a package's content, and the signatures that it has."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.digest, self.manifest = FolderDigest(), b""
        self.others: list[dict[str, str]] = []
        self._inside: list[str] = []

    def enter(self, name: bytes) -> None:
        self._inside.append(os.fsdecode(name))
        self.digest.folder("/".join(self._inside))

    def leave(self) -> None:
        self._inside.pop()

    def file(self, name: bytes, source: Iterable[bytes], *, executable: bool, mtime_ns: int) -> None:
        content, kept = hashlib.sha256(), b""
        path = "/".join([*self._inside, os.fsdecode(name)])
        for chunk in source:
            content.update(chunk)
            if path == MANIFEST_NAME and len(kept) <= MAX_BYTES:
                kept += chunk
        self.manifest = kept or self.manifest
        self.digest.file(path, content.hexdigest(), executable=executable)

    def signature(self, signature: bytes) -> None:
        pass

    def end(self) -> None:
        pass


def _read(path: Path, data: bytes) -> _Content:
    content, place = _Content(), 0

    def read(most: int) -> bytes:
        nonlocal place
        chunk = data[place : place + most]
        place += len(chunk)
        return chunk

    try:
        package.read_package(read, content)
    except UsageError as error:
        shown = f"{path}/{error.what}" if error.what else str(path)
        raise UsageError(shown, error.why, error.remedy) from None
    end = len(data) - len(package.trailer(bytes(32)))
    start = _signatures_at(data, end)
    if start < end:
        size = int(data[start + 124 : start + 135], 8)
        content.others = json.loads(data[start + package.BLOCK : start + package.BLOCK + size])["signatures"]
    return content


def _named(path: Path, manifest: bytes) -> tuple[str, str]:
    from isolator.reader.manifest import parse_manifest_core

    core = parse_manifest_core(manifest, name=f"{path}/{MANIFEST_NAME}")
    return core.name, core.version
