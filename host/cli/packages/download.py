"""A package from an address: fetched in a cage that reaches that name alone, within a size and a time.

What comes is a file of a stranger's, like any other: a process without rights reads it when it is staged.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import click

from host.cli.packages.caged import GRACE, TooMuchError, caged
from host.cli.packages.fetch import MOST_BYTES, PYTHON, limits_file, reason
from isolator.errors import IsolatorError, UsageError
from isolator.policy.host import HostConfig
from isolator.standalone.options import RunOptions

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

        try:
            parts = urlsplit(text)
            if not text.isascii() or not text.isprintable() or " " in text:
                raise ValueError("has characters that an address cannot have")
            if not parts.hostname or "*" in parts.hostname or parts.username is not None or parts.fragment:
                raise ValueError("is not https://HOST/PATH")
            return cls(text, format_egress(parse_egress(f"{parts.hostname}:{parts.port or 443}")))
        except ValueError as error:
            raise UsageError(ascii(text)[1:-1][:200], str(error), "name the package's own address") from None


@dataclass(frozen=True)
class Downloaded:
    """A package that was fetched."""

    path: Path
    resolved: dict[str, object]
    """As ``plugin.stage`` has it recorded."""


@contextlib.contextmanager
def downloaded(root: str | None, text: str, sha256: str | None, *, quiet: bool) -> Iterator[Downloaded]:
    """The package of an address, until the block ends; raises IsolatorError."""
    from isolator.paths import Paths
    from isolator.policy.parse.trusted import load_host_config

    address = Address.of(text)
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UsageError("--sha256", "must be 64 hexadecimal digits", "see the output of 'isolator pack'")
    config = load_host_config(Paths.of(root).host_toml)
    folder = Path(tempfile.mkdtemp(prefix="isolator-package-", dir="/var/tmp"))
    try:
        folder.chmod(0o755)
        if not quiet:
            click.echo(f"fetching {address.url}", err=True)
        name = address.url.rpartition("/")[2]
        path = folder / (name if _NAME.fullmatch(name) and not name.startswith(".") else "package")
        with path.open("xb") as file:
            digest = fetch(root, address, config, file)
        if sha256 is not None and digest != sha256:
            raise IsolatorError(address.url, f"its SHA-256 is {digest}", "find out who has changed it")
        yield Downloaded(path, {"package": address.url[:500], "hashes": {path.name: f"sha256-{digest}"}})
    finally:
        shutil.rmtree(folder)


def fetch(root: str | None, address: Address, config: HostConfig, file: IO[bytes]) -> str:
    """Fetch into a file; returns the SHA-256. Raises IsolatorError."""
    packages, digest = config.packages, hashlib.sha256()
    script = Path(__file__).with_name("inside_download.py").read_text()
    command = (PYTHON, "-I", "-c", script, address.url, *filter(None, [packages.ca]))
    with contextlib.ExitStack() as stack:
        options = RunOptions(
            root=root, command=command, egress=(address.destination,), read=(packages.ca,) if packages.ca else (),
            policy=stack.enter_context(limits_file(config)),
        )  # fmt: skip
        running = stack.enter_context(caged(options, most=MOST_BYTES, seconds=packages.timeout))
        running.stdin.close()
        try:
            while chunk := running.stdout.read(1 << 16):
                digest.update(chunk)
                file.write(chunk)
        except TooMuchError as error:
            raise IsolatorError(address.url, error.why, "see [packages] of host.toml") from None
        except OSError as error:
            raise IsolatorError(address.url, error.strerror or "cannot be kept", "is the disk full?") from None
        code, lines = running.end(GRACE)
    if code != 0:
        raise IsolatorError(address.url, reason(code, lines), "check the address")
    return digest.hexdigest()
