"""Rows of the table: a program that does real work, as a script of bash that fails when the work was not done."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Program:
    """One program; its script starts with ``set -euo pipefail`` in an empty folder that it may change."""

    name: str
    work: str
    """The work in a few words, for the table."""
    script: str
    flags: str = ""
    """Flags of ``isolator run`` that it needs."""
    packages: str = ""
    """Debian packages."""
    project: bool = False
    """Works in a folder of the user's (``--write DIR --cwd DIR``) instead of ``/tmp``."""
    capped: bool = False
    """Shows that it finds the cage's cap: nothing to find outside, or under sandboxes without one."""
    fails: str = ""
    """Why it cannot work in a cage; then it has to fail there."""
    more: bool = False
    """Run with ``--all`` alone: its packages are large."""


@dataclass(frozen=True)
class Service:
    """A server on the pretend internet, and a client in a cage that reaches it through the broker."""

    name: str
    work: str
    port: int
    server: str
    """Script of bash, in a folder of its own on the internet's side: ``ca.pem`` and ``key.pem`` are there, for
    ``*.example.com``. It starts the server in the background."""
    client: str
    """Script of bash, in the cage; ``$HOST`` is the server's name, ``$CA`` its authority."""
    packages: str = ""
    flags: str = ""


@dataclass(frozen=True)
class Plugin:
    """A plugin on a client library, which receives one ``deploy.completed`` in a cage and does its work elsewhere."""

    name: str
    """Its folder in ``tests/compat/plugins``: manifest, ``policy.toml``, source, and ``build``, a script of sh."""
    library: str
    work: str
    tool: str
    """The program that its ``build`` needs."""
    detail: str
    """Part of its reply, which it has from the other side alone."""
    received: tuple[str, ...] = ()
    """Parts of the other side's log: method, path, headers and body of each request."""
    answer: str = ""
    """Body of an HTTP answer."""
    headers: dict[str, str] = field(default_factory=dict)
    fails_once: bool = False
    """The other side answers 503 to the first request."""
    server: Service | None = None
    """The other side is a real server; else it answers HTTP, or mail on its own port."""
    packages: str = ""
    """Debian packages for its ``build``."""
    more: bool = False


@dataclass(frozen=True)
class Result:
    """One row as it was seen."""

    group: str
    name: str
    work: str
    flags: str
    isolator: bool
    bubblewrap: bool | None = None
    """None: the question makes no sense there."""
    firejail: bool | None = None
    why: str = ""
