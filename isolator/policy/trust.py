"""``[trust]`` of ``host.toml``: who may publish which plugins, and what the signature of a package says.

A signature covers name, version and digest of a plugin (``statement``), in the form of DSSE: the digest is that of what
the host itself has unpacked. So a host takes no text of a stranger's for it, only 64 bytes that fit or do not.
"""

from __future__ import annotations

import json
import re

from isolator.base.structs import field
from isolator.policy.frozen import Frozen

PAYLOAD_TYPE = "application/vnd.isolator.package+json"
CERTIFICATE_TYPE = "application/vnd.isolator.certificate+json"
CERTIFICATE = 1
"""Number of the set of checks that a certificate stands for."""
SIGNATURE_BYTES, KEY_BYTES = 64, 32
"""Of Ed25519."""
_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}\*?")


class Publisher(Frozen):
    """``[trust.publishers.NAME]``."""

    key: str
    """The public key: its 32 bytes as hexadecimal digits."""
    names: tuple[str, ...]
    """Names of plugins, ``acme-*`` for those that begin so; nobody else may publish them."""


class Trust(Frozen):
    """``[trust]``; empty: signatures are not looked at."""

    require: bool = False
    """Whether a plugin that nobody has signed is refused."""
    withdrawn: tuple[str, ...] = ()
    """``NAME VERSION``, or a digest: refused, whoever signed it."""
    publishers: dict[str, Publisher] = field(default_factory=dict)
    certifiers: dict[str, str] = field(default_factory=dict)
    """Keys, as a publisher's, by name: whose certificates count beside those that this host has made."""

    def may_publish(self, publisher: str, plugin: str) -> bool:
        """Whether a publisher may publish a plugin."""
        return any(_covers(pattern, plugin) for pattern in self.publishers[publisher].names)

    def owners(self, plugin: str) -> list[str]:
        """The publishers who may publish a plugin."""
        return [name for name in self.publishers if self.may_publish(name, plugin)]

    def is_withdrawn(self, plugin: str, version: str, digest: str) -> bool:
        """Whether a version is withdrawn."""
        return f"{plugin} {version}" in self.withdrawn or digest in self.withdrawn


def statement(name: str, version: str, digest: str) -> bytes:
    """The payload of a signature."""
    return json.dumps({"digest": digest, "name": name, "version": version}, separators=(",", ":")).encode()


def certified(name: str, version: str, digest: str) -> bytes:
    """The payload of a certificate's signature."""
    fields = {"certified": CERTIFICATE, "digest": digest, "name": name, "version": version}
    return json.dumps(fields, separators=(",", ":")).encode()


def signed_bytes(payload: bytes, kind: str = PAYLOAD_TYPE) -> bytes:
    """The bytes that are signed for a payload of this type: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)


def parse_pattern(text: str) -> str:
    """A name of ``names``; raises ValueError."""
    if not _NAME.fullmatch(text):
        raise ValueError('must be the name of a plugin, or the begin of names, like "acme-*"')
    return text


def parse_key(text: str) -> str:
    """A public key; raises ValueError."""
    if not re.fullmatch(rf"[0-9a-f]{{{2 * KEY_BYTES}}}", text):
        raise ValueError("must be the 64 hexadecimal digits that 'isolator sign --public' prints")
    return text


def parse_withdrawn(text: str) -> str:
    """A withdrawn version; raises ValueError."""
    if not re.fullmatch(r"[a-z][a-z0-9-]{1,62} \S+|[0-9a-f]{64}", text):
        raise ValueError('must be "NAME VERSION", or the SHA-256 of its content')
    return text


def is_older(version: str, other: str) -> bool:
    """Whether a semantic version comes before another (semver.org, 11)."""
    return _rank(version) < _rank(other)


def _rank(version: str) -> tuple[tuple[int, ...], bool, list[tuple[bool, int, str]]]:
    core, _, before = version.partition("+")[0].partition("-")
    parts = [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in before.split(".") if part]
    return tuple(map(int, core.split("."))), not before, parts


def _covers(pattern: str, plugin: str) -> bool:
    return plugin.startswith(pattern[:-1]) if pattern.endswith("*") else plugin == pattern
