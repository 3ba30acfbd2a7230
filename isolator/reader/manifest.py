"""Parser of the part of ``plugin.json`` that decides about security.

The host reads the whole file (``host/plugins/manifest.py``) and warns about unknown top-level keys. What runs as root
imports neither: it starts ``service.py`` and checks the answer.
"""

from __future__ import annotations

from typing import Any

from isolator.policy import names, request
from isolator.policy.destinations import parse_host
from isolator.policy.keys import LIMITS, SWITCHES
from isolator.policy.parse.strict import Path, Table, printable, prose
from isolator.reader.json_text import load_json_with_lines


def parse_manifest_core(text: bytes, *, name: str = request.MANIFEST_NAME) -> request.ManifestCore:
    """Parse ``plugin.json``; ``name`` is what errors call it. Raises UsageError with file, line, key and remedy."""
    data, lines = load_json_with_lines(text, max_bytes=request.MAX_BYTES, max_depth=request.MAX_DEPTH, name=name)
    return parse_manifest(data, lines=lines, name=name)


def parse_manifest(
    data: dict[str, Any], *, lines: dict[Path, int] | None = None, name: str = request.MANIFEST_NAME
) -> request.ManifestCore:
    """As ``parse_manifest_core`` for an object that is already parsed; without ``lines`` errors name keys only."""
    top = Table(data, name=name, lines=lines or {})
    top.take("$schema")
    plugin = top.text("name")
    if not names.PLUGIN_NAME.fullmatch(plugin):
        top.fail("name", "must be 2 to 63 lower-case letters, digits and dashes, starting with a letter")
    version = top.text("version")
    if not request.VERSION.fullmatch(version):
        top.fail("version", "not a semantic version", 'write it like "1.2.0"')
    if isinstance(data.get("api_version"), (int, float)):
        top.fail("api_version", "must be text", f'write "{data["api_version"]}"')
    api = top.text("api_version")
    if not request.API.fullmatch(api):
        top.fail("api_version", "not a protocol version", 'write it like "1"')
    if int(api.partition(".")[0]) not in request.API_MAJORS:
        spoken = ", ".join(map(str, request.API_MAJORS))
        top.fail("api_version", f"this host speaks {spoken}", "update the host, or use an older version of the plugin")
    if "hooks" not in data:
        top.text("hooks")
    delivery, restart, transport = top.table("delivery"), top.table("restart"), top.table("transport")
    requested = _Requested()
    mode = transport.choice("mode", request.MODES, request.MODES[0])
    core = request.ManifestCore(
        name=plugin,
        version=version,
        api_version=api,
        binary=_binary(top),
        hooks=top.strings("hooks", names.parse_hook) or (),
        args=top.items("args", _argument, limit=request.MAX_ARGUMENTS) or (),
        description=top.parsed("description", prose, ""),
        permissions=top.strings("permissions", names.parse_permission) or (),
        sandbox=_sandbox(top.table("sandbox"), requested),
        mode=mode,
        port=transport.integer("port", None, low=request.MIN_PORT, high=request.MAX_PORT) if mode == "http" else None,
        transport=dict(transport.data),
        delivery=dict(delivery.data),
        activation=dict(top.table("activation").data),
        health=dict(top.table("health").data),
        config_schema=dict(top.table("config_schema").data) if "config_schema" in top else None,
    )
    requested.take(delivery)
    requested.take(restart)
    restart.finish()
    return core.model_copy(update={"limits": requested.limits, "switches": requested.switches, "extra": top.unknown()})


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


def _argument(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value or len(value) > request.MAX_ARGUMENT:
        raise ValueError(f"must be text of at most {request.MAX_ARGUMENT} characters without NUL")
    return value


class _Requested:
    """The declared keys (``keys.py``) that a manifest sets, collected table by table."""

    def __init__(self) -> None:
        self.limits: dict[str, float] = {}
        self.switches: dict[str, bool] = {}

    def take(self, table: Table) -> None:
        """Read those of one table."""
        self.limits |= table.declared(LIMITS, lambda key: key.manifest)
        self.switches |= table.declared(SWITCHES, lambda key: key.manifest)


def _sandbox(top: Table, requested: _Requested) -> request.SandboxRequest:
    network = _network(top.table("network"), requested) if "network" in top else None
    syscalls: Any
    if isinstance(top.data.get("syscalls"), dict):
        inner = top.table("syscalls")
        syscalls = inner.choice("profile", ("default", "strict"), None)
    else:
        syscalls = top.choice("syscalls", ("default", "strict"), None)
    filesystem, resources = top.table("filesystem"), top.table("resources")
    requested.take(filesystem)
    read = _read(filesystem)
    requested.take(resources)
    top.finish()
    return request.SandboxRequest(network=network, read=read, syscalls=syscalls)


def _network(top: Table, requested: _Requested) -> request.NetworkRequest:
    egress: tuple[request.EgressRequest, ...] | None = None
    if top.data.get("egress") == "public":
        top.take("egress")
    else:
        egress = top.tables("egress", _egress, _egress_table)
    listen = top.tables(
        "listen", lambda port: request.ListenRequest(port=names.parse_port(port)), _listen_table, limit=16
    )
    requested.take(top)
    return request.NetworkRequest(egress=egress, listen=listen)


def _egress(value: Any) -> request.EgressRequest:
    if not isinstance(value, str):
        raise ValueError('must be an object like {"host": "hooks.slack.com", "ports": [443]}')
    rule = names.parse_egress(printable(value, 512))
    return request.EgressRequest(host=rule.host, ports=rule.ports)


def _egress_table(entry: Table) -> request.EgressRequest:
    if "host" not in entry:
        entry.text("host")
    host = entry.parsed("host", lambda value: str(parse_host(printable(value, 300))), "")
    ports = entry.items("ports", names.parse_port, limit=32)
    if ports == ():
        entry.fail("ports", "is empty", "name the ports, or leave the key out for 443")
    return request.EgressRequest(
        host=host,
        ports=names.sorted_ports(ports if ports is not None else (443,)),
        reason=entry.parsed("reason", prose, ""),
    )


def _listen_table(entry: Table) -> request.ListenRequest:
    if "port" not in entry:
        entry.text("port")
    return request.ListenRequest(
        port=entry.parsed("port", names.parse_port, 0), reason=entry.parsed("reason", prose, "")
    )


def _read(filesystem: Table) -> tuple[str, ...] | None:
    """Absolute paths, each plain or as ``{"path", "reason"}``."""

    def path(value: Any) -> str:
        return names.parse_read_path(printable(value, 1024))

    def in_table(entry: Table) -> str:
        found = entry.parsed("path", path, "")
        entry.text("path")
        entry.parsed("reason", prose, "")
        return found

    return filesystem.tables("read", path, in_table, limit=32)
