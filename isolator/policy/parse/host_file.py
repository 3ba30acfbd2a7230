"""The content of ``host.toml``, key by key. ``policies/host.toml`` is the commented example of every one of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from typing import Any

from isolator.policy import cluster, names, trust
from isolator.policy.addresses import bracketed
from isolator.policy.cluster import Cluster
from isolator.policy.destinations import Name, Network, Wildcard, parse_host, parse_virtual
from isolator.policy.host import (
    MAY_DEGRADE,
    AuditSettings,
    Ceiling,
    Console,
    HostConfig,
    Inbound,
    Ingress,
    Metrics,
    Packages,
    Roles,
    Runner,
)
from isolator.policy.keys import BY_NAME, CEILING, LIMITS, MIB, SWITCHES, DeliveryLimits, Limits, RunLimits
from isolator.policy.meet.bounds import Egress, ceiling_egress, egress_within
from isolator.policy.model import VIRTUAL, AddressException, RestartPolicy
from isolator.policy.parse.strict import Table, did_you_mean, printable
from isolator.policy.parse.toml_file import document, duration_between, egress_of, restart_of, where_of
from isolator.policy.trust import Publisher, Trust
from isolator.policy.units import parse_size

OF_A_RUN = tuple(
    limit
    for limit in LIMITS
    if limit.name not in {*DeliveryLimits.model_fields, *RunLimits.model_fields, "state", "state_inodes"}
)
"""The numbers that mean something for a single run, which keeps nothing and has no events."""


def parse_host_config(text: bytes, *, source: str) -> HostConfig:
    """The content of ``host.toml``."""
    return host_config_of(document(text, source))


def host_config_of(top: Table) -> HostConfig:
    """As ``parse_host_config`` for the top table of the file."""
    source = top.name
    ceiling, defaults, network = top.table("ceiling"), top.table("defaults"), top.table("network")
    inbound, roles, audit = top.table("inbound"), top.table("roles"), top.table("audit")
    events = top.table("events")
    metrics, restart, runner = top.table("metrics"), top.table("restart"), top.table("runner")
    most = CEILING.model_copy(update=ceiling.declared(LIMITS, lambda key: f"ceiling.{key.name}"))
    usual = defaults.declared(LIMITS, lambda key: f"defaults.{key.name}")
    for name, value in usual.items():
        if value > getattr(most, name):
            shown = BY_NAME[name].show
            defaults.fail(name, f"{shown(value)} is over the ceiling, {shown(getattr(most, name))}")
    egress, public = egress_of(ceiling, "egress")
    base = Ceiling()
    exceptions = _exceptions(network)
    virtual = network.parsed("virtual", lambda value: parse_virtual(printable(value, 64)), VIRTUAL)
    for item in exceptions:
        if ip_network(item.cidr).overlaps(ip_network(virtual)):
            network.fail(
                "exceptions", f"{item.cidr} lies in {virtual}, which stands for names in cages",
                "choose another range with [network] virtual",
            )  # fmt: skip
    proxy = network.parsed("proxy", lambda value: _proxy(printable(value, 300)), "")
    if network.data.get("proxy_resolves") and not proxy:
        network.fail("proxy_resolves", "there is no proxy", 'name it: proxy = "HOST:PORT"')
    uid_range = _uid_range(top)
    config = HostConfig(
        uid_range=uid_range,
        plugin_dirs=top.strings("plugin_dirs", _absolute) or (),
        may_degrade=top.strings("may_degrade", _control) or (),
        ceiling=Ceiling(
            limits=most,
            hooks=_or(ceiling.strings("hooks", names.parse_hook_grant), base.hooks),
            permissions=_or(ceiling.strings("permissions", names.parse_permission_grant), base.permissions),
            egress=egress,
            egress_public=public or egress is None,
            read=_or(ceiling.strings("read", _absolute), base.read),
            syscalls=ceiling.choice("syscalls", ("default", "strict"), base.syscalls),  # type: ignore[arg-type]  # checked
            **ceiling.declared(SWITCHES, lambda key: f"ceiling.{key.name}"),
        ),
        defaults=Limits(**usual),
        default_syscalls=defaults.choice("syscalls", ("default", "strict"), "default"),  # type: ignore[arg-type]  # checked
        restart=RestartPolicy(
            **restart_of(restart),
            **RunLimits(**{n: v for n, v in usual.items() if n in RunLimits.model_fields}).model_dump(),
        ),
        roles=Roles(
            viewer=roles.items("viewer", names.parse_uid) or (),
            emitter=roles.items("emitter", names.parse_uid) or (),
            operator=_or(roles.items("operator", names.parse_uid), (0,)),
            caller=roles.items("caller", names.parse_uid) or (),
            runner=roles.items("runner", lambda value: _runner(value, uid_range)) or (),
        ),
        exceptions=exceptions,
        resolvers=network.strings("resolvers", _resolver, limit=8) or (),
        virtual=virtual,
        proxy=proxy,
        proxy_resolves=network.boolean("proxy_resolves", False),
        inbound=Inbound(
            addresses=_or(inbound.strings("addresses", _address), Inbound().addresses),
            ports=inbound.items("ports", _port_range) or (),
        ),
        event_source=events.parsed("source", _source, HostConfig().event_source),
        audit=_audit(audit),
        metrics=_metrics(metrics),
        console=_console(top),
        cluster=_cluster(top),
        packages=_packages(top.table("packages")),
        trust=_trust(top.table("trust")),
        source=source,
        where=where_of(top),
    )
    config = config.model_copy(update={"runner": _runners(runner, config)})
    top.finish()
    return config


def _runners(table: Table, config: HostConfig) -> Runner:
    base, host = Runner(), config.ceiling
    found: dict[str, Any] = {}
    numbers = table.declared(OF_A_RUN, lambda key: f"runner.{key.name}")
    for name, value in numbers.items():
        if value > getattr(host.limits, name):
            shown = BY_NAME[name].show
            table.fail(name, f"{shown(value)} is over the ceiling, {shown(getattr(host.limits, name))}")
    if numbers:
        found["limits"] = host.limits.model_copy(update=numbers)
    egress, public = egress_of(table, "egress")
    if egress is not None:
        if not egress_within(Egress(public=public, rules=egress), ceiling_egress(host)):
            table.fail("egress", "is over the ceiling's", "list only what [ceiling] egress allows")
        found |= {"egress": egress, "egress_public": public}
    read = table.strings("read", _absolute)
    if read is not None:
        for index, path in enumerate(read):
            if not any(names.path_covers(allowed, path) for allowed in host.read):
                table.fail(("read", index), f"{path} is outside what the ceiling lets plugins read")
        found["read"] = read
    syscalls = table.choice("syscalls", ("default", "strict"), host.syscalls)
    if syscalls != host.syscalls:
        if host.syscalls == "strict":
            table.fail("syscalls", '"default" is over the ceiling, "strict"')
        found["syscalls"] = syscalls
    return Runner(
        cages=table.integer("cages", base.cages, low=1, high=1000),
        all_tasks=table.integer("all_tasks", base.all_tasks, low=1, high=1_000_000),
        all_memory=table.parsed("all_memory", _size(4 * MIB), base.all_memory),
        share=table.integer("share", base.share, low=1, high=100),
        ceiling=host.model_copy(update=found) if found else None,
    )


def _source(value: Any) -> str:
    text = printable(value, 256)
    if not text or not text.isascii() or " " in text:
        raise ValueError('must be a URI, like "https://platform.example"')
    return text


def _or(value: tuple[Any, ...] | None, default: tuple[Any, ...]) -> tuple[Any, ...]:
    return default if value is None else value


def _audit(table: Table) -> AuditSettings:
    base = AuditSettings()
    disk_full = table.choice("disk_full", ("stop", "continue"), base.disk_full)
    return AuditSettings(
        disk_full=disk_full,  # type: ignore[arg-type]  # choice() checks it
        rotate_size=table.parsed("rotate_size", _size(1 << 16), base.rotate_size),
        rotate_age=table.parsed("rotate_age", duration_between(60, 366 * 86400), base.rotate_age),
        keep_files=table.integer("keep_files", base.keep_files, high=1_000_000),
        min_age=table.parsed("min_age", duration_between(0, 366 * 86400), base.min_age),
        seal_records=table.integer("seal_records", base.seal_records, low=1, high=1_000_000),
        seal_interval=table.parsed("seal_interval", duration_between(1, 86400), base.seal_interval),
        snapshot_interval=table.parsed("snapshot_interval", duration_between(1, 86400), base.snapshot_interval),
    )


def _metrics(table: Table) -> Metrics:
    def loopback(value: Any) -> str:
        text = _address(printable(value, 64))
        if not ip_address(text).is_loopback:
            raise ValueError(f"{text} is not a loopback address; publish it with a proxy that authenticates")
        return text

    return Metrics(
        address=table.parsed("address", loopback, Metrics().address), port=table.parsed("port", names.parse_port, None)
    )


def _trust(table: Table) -> Trust:
    publishers, found = table.table("publishers"), {}
    for name in _shown(publishers):
        one = publishers.table(name)
        key = one.parsed("key", _key, "")
        covered = one.strings("names", trust.parse_pattern)
        if not key or not covered:
            publishers.fail(name, f"has no {'names' if key else 'key'}", 'key = "HEX", names = ["acme-*"]')
        found[name] = Publisher(key=key, names=covered)
    certifiers = table.table("certifiers")
    return Trust(
        require=table.boolean("require", False),
        withdrawn=table.strings("withdrawn", trust.parse_withdrawn, limit=1000) or (),
        publishers=found,
        certifiers={name: certifiers.parsed(name, _key, "") for name in _shown(certifiers)},
    )


def _key(value: Any) -> str:
    return trust.parse_key(printable(value, 64))


def _shown(table: Table) -> Iterable[str]:
    """The keys of a table of names that records show."""
    for name in table.data:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,62}", name):
            table.fail(name, "is shown in records", "use small letters, digits and hyphens")
        yield name


def _console(top: Table) -> Console | None:
    if "console" not in top:
        if "ingress" in top:
            top.fail("ingress", "there is no [console], which serves it", "add [console]")
        return None
    console, ingress = top.table("console"), top.table("ingress")
    found = {}
    for name in ingress.data:
        table = ingress.table(name)
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,62}", name):
            ingress.fail(name, "its name is part of a path", "use small letters, digits and hyphens")
        file = table.parsed("secret_file", lambda value: _absolute(printable(value, 4096)), "")
        events = table.strings("events", names.parse_hook_grant)
        if not file or not events:
            missing = "secret_file" if not file else "events"
            ingress.fail(name, f"has no {missing}", f'secret_file = "/etc/isolator/ingress/{name}", events = ["NAME"]')
        found[name] = Ingress(secret_file=file, events=events)
    return Console(
        port=console.parsed("port", names.parse_port, None), emit=console.boolean("emit", False), ingress=found
    )


def _cluster(top: Table) -> Cluster | None:
    if "cluster" not in top:
        return None
    table = top.table("cluster")
    name = table.parsed("name", cluster.parse_name, "") or table.text("name")
    servers = table.strings("servers", cluster.parse_server, limit=16) or ()
    if not servers:
        table.fail("servers", "names no server", 'servers = ["10.0.0.1:4222"]')
    made = Cluster(
        name=name,
        servers=servers,
        credentials=table.parsed("credentials", lambda value: _absolute(printable(value, 4096)), ""),
        tls=table.boolean("tls", True),
        ca=table.parsed("ca", lambda value: _absolute(printable(value, 4096)), ""),
        labels=table.strings("labels", cluster.parse_label, limit=32) or (),
        outbox=table.parsed("outbox", _size(MIB), cluster.OUTBOX),
        distrusted=table.strings("distrusted", cluster.parse_name, limit=32) or (),
    )
    if made.ca and not made.tls:
        table.fail("ca", "certificates are not looked at without tls", "remove one of both")
    return made


def _packages(table: Table) -> Packages:
    base = Packages()
    return Packages(
        npm=table.strings("npm", _registry, limit=8) or base.npm,
        pypi=table.strings("pypi", _registry, limit=8) or base.pypi,
        ca=table.parsed("ca", lambda value: _absolute(printable(value, 4096)), base.ca),
        timeout=table.parsed("timeout", duration_between(1, 3600), base.timeout),
    )


def _registry(text: str) -> str:
    """``HOST``, ``HOST:PORT`` or ``HOST/PATH`` of a server that speaks HTTPS."""
    host, slash, path = text.partition("/")
    try:
        rule = names.parse_egress(host if ":" in host else f"{host}:443")
    except ValueError:
        raise ValueError(f'"{text}" is not a host, like "pypi.org" or "mirror.example:8443/simple"') from None
    if len(rule.ports) != 1 or not isinstance(parse_host(rule.host), Name) or not path.isascii() or " " in path:
        raise ValueError(f'"{text}" is not one host, like "pypi.org" or "mirror.example:8443/simple"')
    return host + slash + path.rstrip("/")


def _size(low: int) -> Any:
    def check(value: Any) -> int:
        size = parse_size(value)
        if size < low:
            raise ValueError(f"must be at least {low} bytes")
        return size

    return check


def _runner(value: Any, uid_range: tuple[int, int]) -> int:
    uid = names.parse_uid(value)
    if uid == 0:
        raise ValueError("root needs no role for it: its isolator run builds the cage itself")
    if uid_range[0] <= uid <= uid_range[1]:
        raise ValueError(f"{uid} lies in uid_range: it is a plugin's or a cage's own")
    return uid


def _uid_range(top: Table) -> tuple[int, int]:
    found = top.items("uid_range", names.parse_uid)
    if found is None:
        return HostConfig().uid_range
    if len(found) != 2 or found[0] >= found[1]:
        top.fail("uid_range", "must be two numbers, first and last", "uid_range = [70000, 74999]")
    # Below lie people and the system's own users (login.defs), which a plugin must never share a uid with.
    if found[0] < 60000 or found[1] >= 2**31 or found[0] <= 65535 <= found[1] + 1:
        top.fail("uid_range", "must lie above 60000, away from people and system users, and leave out 65534 (nobody)")
    return found[0], found[1]


def _absolute(text: str) -> str:
    if not text.startswith("/") or ".." in text.split("/"):
        raise ValueError(f'"{text}" is not an absolute path without ".."')
    return "/" + "/".join(part for part in text.split("/") if part not in ("", "."))


def _control(text: str) -> str:
    if text not in MAY_DEGRADE:
        raise ValueError(f'"{text}" is not a control that may degrade; {did_you_mean(text, MAY_DEGRADE)}')
    return text


def _address(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        raise ValueError(f'"{text}" is not an address') from None


def _resolver(text: str) -> str:
    """``ADDRESS`` or ``ADDRESS:PORT``, IPv6 in brackets when a port follows."""
    try:
        return str(ip_address(text))
    except ValueError:
        rule = names.parse_egress(text)
    if len(rule.ports) != 1 or "/" in rule.host:
        raise ValueError(f'"{text}" is not ADDRESS or ADDRESS:PORT')
    return f"{bracketed(_address(rule.host))}:{rule.ports[0]}"


def _proxy(text: str) -> str:
    rule = names.parse_egress(text.removeprefix("http://").removesuffix("/"))
    host = parse_host(rule.host)
    if isinstance(host, Wildcard) or len(rule.ports) != 1 or "/" in rule.host:
        raise ValueError(f'"{text}" is not one HOST:PORT')
    if isinstance(host, Name) and "." not in host.text:
        raise ValueError(f'"{text}": write the name with its domain; search domains of this host are not tried')
    return names.format_egress(rule)


def _port_range(value: Any) -> tuple[int, int]:
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,5})-(\d{1,5})", value, re.ASCII)):
        first, last = names.parse_port(int(match[1])), names.parse_port(int(match[2]))
        if first <= last:
            return first, last
    elif isinstance(value, int):
        return names.parse_port(value), value
    raise ValueError('must be a port or a range like "8000-8099"')


def _exceptions(network: Table) -> tuple[AddressException, ...]:
    def parse(text: str) -> tuple[AddressException, ...]:
        rule = names.parse_egress(text)
        host = parse_host(rule.host)
        if not isinstance(host, Network):
            raise ValueError(f'"{text}": an exception is an address or a CIDR with its port, never a name')
        return tuple(AddressException(cidr=str(host.network), port=port) for port in rule.ports)

    found: Iterable[tuple[AddressException, ...]] = network.strings("exceptions", parse, limit=256) or ()
    return tuple(exception for group in found for exception in group)
