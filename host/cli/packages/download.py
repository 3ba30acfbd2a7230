"""A package from an address: fetched in a cage that reaches that name alone, within a size and a time.

What comes is a file of a stranger's, like any other: a process without rights reads it when it is staged.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import urlsplit

from host.cli.packages.caged import GRACE
from host.cli.packages.fetch import MOST_BYTES, fetching, folder_for, reason
from isolator.errors import IsolatorError, UsageError, translated
from isolator.policy.host import HostConfig

SCHEME = "https://"
_NAME = re.compile(r"[A-Za-z0-9._+-]{1,200}")


@dataclass(frozen=True)
class Address:
    """An address of a package."""

    url: str
    destination: str
    """HOST:PORT."""

    @classmethod
    def of(cls, text: str) -> Address:
        """Parse an address; raises UsageError."""
        from isolator.policy.names import format_egress, parse_egress

        with translated(ValueError, UsageError, ascii(text)[1:-1][:200], "", "name the package's own address"):
            parts = urlsplit(text)
            if not text.isascii() or not text.isprintable() or " " in text:
                raise ValueError("has characters that an address cannot have")
            if not parts.hostname or "*" in parts.hostname or parts.username is not None or parts.fragment:
                raise ValueError("is not https://HOST/PATH")
            return cls(text, format_egress(parse_egress(f"{parts.hostname}:{parts.port or 443}")))


@contextlib.contextmanager
def downloaded(root: str | None, text: str, sha256: str | None, *, quiet: bool) -> Iterator[dict[str, Any]]:
    """The request that stages the package of an address, whose file is there meanwhile; raises IsolatorError."""
    from isolator.paths import Paths
    from isolator.policy.parse.trusted import load_host_config

    address = Address.of(text)
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UsageError("--sha256", "must be 64 hexadecimal digits", "see the output of 'isolator pack'")
    config = load_host_config(Paths.of(root).host_toml)
    with folder_for(address.url, quiet=quiet) as folder:
        name = address.url.rpartition("/")[2]
        path = folder / (name if _NAME.fullmatch(name) and not name.startswith(".") else "package")
        with path.open("xb") as file:
            digest = _fetch(root, address, config, file)
        if sha256 is not None and digest != sha256:
            raise IsolatorError(address.url, f"its SHA-256 is {digest}", "find out who has changed it")
        resolved = {"package": address.url[:500], "hashes": {path.name: f"sha256-{digest}"}}
        yield {"path": str(path), "resolved": resolved}


def _fetch(root: str | None, address: Address, config: HostConfig, file: IO[bytes]) -> str:
    """Fetch into a file; returns the SHA-256. Raises IsolatorError."""
    digest, egress = hashlib.sha256(), (address.destination,)
    with fetching(root, address.url, ("inside_download.py", address.url), egress, config, MOST_BYTES) as running:
        with translated(OSError, IsolatorError, address.url, "", "is the disk full?"):
            while chunk := running.stdout.read(1 << 16):
                digest.update(chunk)
                file.write(chunk)
        code, lines = running.end(GRACE)
    if code != 0:
        raise IsolatorError(address.url, reason(code, lines), "check the address")
    return digest.hexdigest()
