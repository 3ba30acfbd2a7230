"""The request of an author: the manifest's ``sandbox`` and the few other fields that decide about security.

The supervisor reads this much of ``plugin.json`` and no more; the host reads the whole file
(``host/plugins/manifest.py``) and warns about unknown top-level keys. Everything here is a
*request*, which by itself grants nothing.
``None`` always means "the manifest is silent", which is not the same as an empty list (``egress: []`` is no network).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from isolator.policy import names
from isolator.policy.destinations import parse_host
from isolator.policy.keys import LIMITS, SWITCHES, Frozen
from isolator.policy.parse.strict import Path, Table, load_json_with_lines, printable, prose

MANIFEST_NAME = "plugin.json"
MAX_BYTES, MAX_DEPTH = 256 * 1024, 16
API_MAJORS = (1,)
"""Majors of the plugin protocol that this version can speak."""

_VERSION = re.compile(
    r"(?:0|[1-9]\d{0,8})(?:\.(?:0|[1-9]\d{0,8})){2}"
    r"(?:-(?:0|[1-9]\d*|\d*[A-Za-z-][0-9A-Za-z-]*)(?:\.(?:0|[1-9]\d*|\d*[A-Za-z-][0-9A-Za-z-]*))*)?"
    r"(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?",
    re.ASCII,
)
UNWRITTEN = "0.0.0+sha256.000000000000"
"""The version of no plugin in particular; counts as synthesised."""
_SYNTHESISED = re.compile(r"0\.0\.0\+sha256\.[0-9a-f]{12}")
_API = re.compile(r"[1-9][0-9]{0,3}(?:\.[0-9]{1,4})?")


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
    limits: dict[str, int | float] = Field(default_factory=dict)
    """Numbers that the manifest asks for, in ``sandbox`` or elsewhere, by the names of ``keys.py``."""
    switches: dict[str, bool] = Field(default_factory=dict)
    """Yes-or-no keys, likewise."""
    transport: dict[str, Any] = Field(default_factory=dict)
    delivery: dict[str, Any] = Field(default_factory=dict)
    activation: dict[str, Any] = Field(default_factory=dict)
    health: dict[str, Any] = Field(default_factory=dict)
    config_schema: dict[str, Any] | None = None
    extra: tuple[str, ...] = ()
    """Unknown top-level keys: a newer author, an older host. Worth a warning, no more."""

    @property
    def synthesised(self) -> bool:
        """Registered with flags alone: nobody wrote a request, so the operator's policy alone decides."""
        return bool(_SYNTHESISED.fullmatch(self.version))


def parse_manifest_core(text: bytes, *, name: str = MANIFEST_NAME) -> ManifestCore:
    """Parse ``plugin.json``; ``name`` is what errors call it. Raises UsageError with file, line, key and remedy."""
    data, lines = load_json_with_lines(text, max_bytes=MAX_BYTES, max_depth=MAX_DEPTH, name=name)
    return parse_manifest(data, lines=lines, name=name)


def parse_manifest(
    data: dict[str, Any], *, lines: dict[Path, int] | None = None, name: str = MANIFEST_NAME
) -> ManifestCore:
    """As ``parse_manifest_core`` for an object that is already parsed; without ``lines`` errors name keys only."""
    top = Table(data, name=name, lines=lines or {})
    top.take("$schema")
    plugin = top.text("name")
    if not names.PLUGIN_NAME.fullmatch(plugin):
        top.fail("name", "must be 2 to 63 lower-case letters, digits and dashes, starting with a letter")
    version = top.text("version")
    if not _VERSION.fullmatch(version):
        top.fail("version", "not a semantic version", 'write it like "1.2.0"')
    if isinstance(data.get("api_version"), (int, float)):
        top.fail("api_version", "must be text", f'write "{data["api_version"]}"')
    api = top.text("api_version")
    if not _API.fullmatch(api):
        top.fail("api_version", "not a protocol version", 'write it like "1"')
    if int(api.partition(".")[0]) not in API_MAJORS:
        spoken = ", ".join(map(str, API_MAJORS))
        top.fail("api_version", f"this host speaks {spoken}", "update the host, or use an older version of the plugin")
    if "hooks" not in data:
        top.text("hooks")
    delivery = top.table("delivery")
    requested = _Requested()
    core = ManifestCore(
        name=plugin,
        version=version,
        api_version=api,
        binary=_binary(top),
        hooks=top.strings("hooks", names.parse_hook) or (),
        args=_arguments(top),
        description=top.parsed("description", prose, ""),
        permissions=top.strings("permissions", names.parse_permission) or (),
        sandbox=_sandbox(top.table("sandbox"), requested),
        transport=dict(top.table("transport").data),
        delivery=dict(delivery.data),
        activation=dict(top.table("activation").data),
        health=dict(top.table("health").data),
        config_schema=dict(top.table("config_schema").data) if "config_schema" in top else None,
    )
    requested.take(delivery)
    return core.model_copy(update={"limits": requested.limits, "switches": requested.switches, "extra": top.unknown()})


def synthesise_manifest(name: str, binary_sha256: str, binary_name: str, hooks: Iterable[str]) -> dict[str, Any]:
    """The manifest of a plugin that was registered with flags and brought none.

    The version is made of the binary's digest, so that another binary is another version.
    Raises UsageError when a flag is wrong.
    """
    data = {
        "name": name,
        "version": f"0.0.0+sha256.{binary_sha256[:12]}",
        "api_version": "1",
        "binary": f"./{binary_name}",
        "hooks": list(hooks),
    }
    parse_manifest(data, name="plugin add")
    return data


def _binary(top: Table) -> str:
    binary = top.text("binary", limit=512)
    parts = [part for part in binary.split("/") if part not in ("", ".")]
    if binary.startswith("/"):
        top.fail("binary", "must be relative to the manifest", 'write it like "./notifier"')
    if ".." in parts:
        top.fail("binary", 'must not leave the manifest\'s folder with ".."')
    if not parts or binary.endswith("/"):
        top.fail("binary", "names no file", 'write it like "./notifier"')
    return "./" + "/".join(parts)


def _arguments(top: Table) -> tuple[str, ...]:
    def one(value: Any) -> str:
        if not isinstance(value, str) or "\0" in value or len(value) > 4096:
            raise ValueError("must be text of at most 4096 characters without NUL")
        return value

    value = top.take("args", [])
    if not isinstance(value, list) or len(value) > 64:
        top.fail("args", "must be a list of at most 64 texts")
    for index, item in enumerate(value):
        try:
            one(item)
        except ValueError as error:
            top.fail(("args", index), str(error))
    return tuple(value)


class _Requested:
    """The declared keys (``keys.py``) that a manifest sets, collected table by table."""

    def __init__(self) -> None:
        self.limits: dict[str, float] = {}
        self.switches: dict[str, bool] = {}

    def take(self, table: Table) -> None:
        """Read those of one table."""
        self.limits |= table.declared(LIMITS, lambda key: key.manifest)
        self.switches |= table.declared(SWITCHES, lambda key: key.manifest)


def _sandbox(top: Table, requested: _Requested) -> SandboxRequest:
    network = _network(top.table("network"), requested) if "network" in top else None
    syscalls: Any
    if isinstance(top.data.get("syscalls"), dict):
        inner = top.table("syscalls")
        syscalls = inner.choice("profile", ("default", "strict"), None)
        inner.finish()
    else:
        syscalls = top.choice("syscalls", ("default", "strict"), None)
    filesystem, resources = top.table("filesystem"), top.table("resources")
    requested.take(filesystem)
    request = SandboxRequest(network=network, read=_read(filesystem), syscalls=syscalls)
    requested.take(resources)
    for table in (filesystem, resources, top):
        table.finish()
    return request


def _network(top: Table, requested: _Requested) -> NetworkRequest:
    egress: tuple[EgressRequest, ...] | None = None
    if top.data.get("egress") == "public":
        top.take("egress")
    else:
        entries = top.tables("egress")
        if entries is not None:
            egress = tuple(_egress(top, entry, index) for index, entry in enumerate(entries))
    listen: list[ListenRequest] = []
    wanted = top.tables("listen", limit=16)
    for index, entry in enumerate(wanted or ()):
        if isinstance(entry, Table):
            if "port" not in entry:
                entry.text("port")
            listen.append(
                ListenRequest(port=entry.parsed("port", names.parse_port, 0), reason=entry.parsed("reason", prose, ""))
            )
            entry.finish()
        else:
            try:
                listen.append(ListenRequest(port=names.parse_port(entry)))
            except ValueError as error:
                top.fail(("listen", index), str(error))
    requested.take(top)
    top.finish()
    return NetworkRequest(egress=egress, listen=None if wanted is None else tuple(listen))


def _egress(top: Table, entry: Table | Any, index: int) -> EgressRequest:
    if isinstance(entry, str):
        try:
            rule = names.parse_egress(printable(entry, 512))
        except ValueError as error:
            top.fail(("egress", index), str(error))
        return EgressRequest(host=rule.host, ports=rule.ports)
    if not isinstance(entry, Table):
        top.fail(("egress", index), "must be an object", 'write {"host": "hooks.slack.com", "ports": [443]}')
    if "host" not in entry:
        entry.text("host")
    host = entry.parsed("host", lambda value: str(parse_host(printable(value, 300))), "")
    ports = entry.items("ports", names.parse_port, limit=32)
    if ports == ():
        entry.fail("ports", "is empty", "name the ports, or leave the key out for 443")
    request = EgressRequest(
        host=host,
        ports=names.sorted_ports(ports if ports is not None else (443,)),
        reason=entry.parsed("reason", prose, ""),
    )
    entry.finish()
    return request


def _read(filesystem: Table) -> tuple[str, ...] | None:
    """Absolute paths, each plain or as ``{"path", "reason"}``."""
    entries = filesystem.tables("read", limit=32)
    if entries is None:
        return None
    paths = []
    for index, entry in enumerate(entries):
        if isinstance(entry, Table):
            paths.append(entry.parsed("path", lambda value: names.parse_read_path(printable(value, 1024)), ""))
            entry.text("path")
            entry.parsed("reason", prose, "")
            entry.finish()
        else:
            try:
                paths.append(names.parse_read_path(printable(entry, 1024)))
            except ValueError as error:
                filesystem.fail(("read", index), str(error))
    return tuple(paths)
