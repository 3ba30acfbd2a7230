"""The request of an author: the manifest's ``sandbox`` and the few other fields that decide about security.

The supervisor relies on this much of ``plugin.json`` and no more. ``isolator/reader/`` parses the text, in a process
without privilege; here are the types, and ``check`` for the answer. Everything here is a *request*, which by itself
grants nothing.
``None`` always means "the manifest is silent", which is not the same as an empty list (``egress: []`` is no network).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

from isolator.base.patterns import pattern
from isolator.base.structs import field
from isolator.policy import names
from isolator.policy.destinations import parse_host
from isolator.policy.frozen import Frozen
from isolator.policy.keys import COUNT, LIMITS, SWITCHES
from isolator.policy.parse.strict import printable, prose

T = TypeVar("T")

MANIFEST_NAME = "plugin.json"
MAX_BYTES, MAX_DEPTH = 256 * 1024, 16
MAX_ARGUMENTS, MAX_ARGUMENT = 64, 4096
MODES = ("oneshot", "stream", "exec", "http", "mcp")
"""Values of ``transport.mode``, the default first."""
MIN_PORT, MAX_PORT = 1024, 65000
"""Ports that a sidecar may listen on for the host."""
API_MAJORS = (1,)
"""Majors of the plugin protocol that this version can speak."""

VERSION = pattern(
    r"(?:0|[1-9]\d{0,8})(?:\.(?:0|[1-9]\d{0,8})){2}"
    r"(?:-(?:0|[1-9]\d*|\d*[A-Za-z-][0-9A-Za-z-]*)(?:\.(?:0|[1-9]\d*|\d*[A-Za-z-][0-9A-Za-z-]*))*)?"
    r"(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?",
    re.ASCII,
)
UNWRITTEN = "0.0.0+sha256.000000000000"
"""The version of no plugin in particular; counts as synthesised."""
_SYNTHESISED = pattern(r"0\.0\.0\+sha256\.[0-9a-f]{12}")
API = pattern(r"[1-9][0-9]{0,3}(?:\.[0-9]{1,4})?")


class EgressRequest(Frozen):
    """One destination the plugin wants to connect to, and why; the reason is shown to the operator."""

    host: str
    ports: tuple[int, ...]
    reason: str = ""


class ListenRequest(Frozen):
    """A port on the cage's loopback that the author would like to be reachable from the host."""

    port: int
    reason: str = ""


class NetworkRequest(Frozen):
    """``egress`` None: silent, so public addresses; empty: no network; a list: that and nothing else."""

    egress: tuple[EgressRequest, ...] | None = None
    listen: tuple[ListenRequest, ...] | None = None


class SandboxRequest(Frozen):
    """The manifest's ``sandbox``; ``network`` None means that the manifest does not speak of the network."""

    network: NetworkRequest | None = None
    read: tuple[str, ...] | None = None
    """Absolute host paths of ``filesystem.read``."""
    syscalls: Literal["default", "strict"] | None = None


class ManifestCore(Frozen):
    """The part of a manifest that the supervisor relies on."""

    name: str
    version: str
    api_version: str
    binary: str
    """Relative to the manifest's folder, without ``..``; that no link leads out is checked when it is opened."""
    hooks: tuple[str, ...]
    args: tuple[str, ...] = ()
    description: str = ""
    permissions: tuple[str, ...] = ()
    sandbox: SandboxRequest = SandboxRequest()
    limits: dict[str, int | float] = field(default_factory=dict)
    """Numbers that the manifest asks for, in ``sandbox`` or elsewhere, by the names of ``keys.py``."""
    switches: dict[str, bool] = field(default_factory=dict)
    """Yes-or-no keys, likewise."""
    mode: str = MODES[0]
    """``transport.mode``: how requests reach the sidecar."""
    port: int | None = None
    """``transport.port``: where on its own loopback it listens, in place of its socket."""
    transport: dict[str, Any] = field(default_factory=dict)
    delivery: dict[str, Any] = field(default_factory=dict)
    activation: dict[str, Any] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)
    config_schema: dict[str, Any] | None = None
    extra: tuple[str, ...] = ()
    """Unknown top-level keys: a newer author, an older host. Worth a warning, no more."""

    @property
    def synthesised(self) -> bool:
        """Registered with flags alone: nobody wrote a request, so the operator's policy alone decides."""
        return bool(_SYNTHESISED.fullmatch(self.version))


def synthesise_manifest(name: str, binary_sha256: str, binary_name: str, hooks: Iterable[str]) -> dict[str, Any]:
    """The manifest of a plugin that was registered with flags and brought none; its reader refuses a wrong flag.

    The version is made of the binary's digest, so that another binary is another version.
    """
    return {
        "name": name,
        "version": f"0.0.0+sha256.{binary_sha256[:12]}",
        "api_version": "1",
        "binary": f"./{binary_name}",
        "hooks": list(hooks),
    }


def check(core: ManifestCore) -> None:
    """Raise ValueError unless every field is one that the parser makes; in time that grows with its size alone.

    For a core that comes out of a process which has had a stranger's bytes in its hands.
    """
    if not names.PLUGIN_NAME.fullmatch(core.name):
        raise ValueError("no name of a plugin")
    if len(core.version) > 256 or not VERSION.fullmatch(core.version) or not API.fullmatch(core.api_version):
        raise ValueError("no version")
    first, *rest = printable(core.binary, 520).split("/")
    if first != "." or not rest or {"", ".", ".."} & set(rest):
        raise ValueError("no path below the manifest's folder")
    if len(core.args) > MAX_ARGUMENTS or any("\0" in text or len(text) > MAX_ARGUMENT for text in core.args):
        raise ValueError("no arguments")
    sandbox = core.sandbox
    network = sandbox.network or NetworkRequest()
    egress, listen = network.egress or (), network.listen or ()
    if core.mode not in MODES:
        raise ValueError("no mode")
    if core.port is not None and not MIN_PORT <= core.port <= MAX_PORT:
        raise ValueError("no port of its own")
    if max(map(len, (core.hooks, core.permissions, sandbox.read or (), egress, listen))) > 64:
        raise ValueError("too many entries")
    _check_each(core.hooks, names.parse_hook)
    _check_each(core.permissions, names.parse_permission)
    _check_each(sandbox.read or (), names.parse_read_path)
    _check_each((core.description, *(one.reason for one in egress), *(one.reason for one in listen)), prose)
    _check_each([entry.host for entry in egress], lambda host: str(parse_host(printable(host, 300))))
    _check_each([entry.port for entry in listen], names.parse_port)
    for entry in egress:
        _check_each(entry.ports, names.parse_port)
        if not entry.ports or names.sorted_ports(entry.ports) != entry.ports:
            raise ValueError("no set of ports")
    limits = {limit.name: limit for limit in LIMITS if limit.manifest}
    for name, number in core.limits.items():
        limit = limits.get(name)
        if limit is None or limit.check(number if limit.unit is COUNT else limit.show(number)) != number:
            raise ValueError("no limit that a manifest can have")
    if not core.switches.keys() <= {switch.name for switch in SWITCHES if switch.manifest}:
        raise ValueError("no switch that a manifest can have")


def _check_each(values: Iterable[T], canonical: Callable[[T], T]) -> None:
    for value in values:
        if canonical(value) != value:
            raise ValueError("not in the form in which the parser leaves it")
