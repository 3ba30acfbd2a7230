"""Reading ``host.toml`` and ``policies/NAME.toml``: who may have written them, what they say, and at which line.

These files decide what untrusted code may do, so they are believed only if nobody but root can write them: the file
is opened without following a link and its owner, type and mode are checked on the open descriptor, so that what was
checked is what is read. Every value keeps its ``FILE:LINE``; every error is one line that begins with it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tomllib
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from isolator.errors import DeniedError, NotFoundError, UsageError
from isolator.policy import names
from isolator.policy.addresses import never_reachable
from isolator.policy.fields import BY_NAME, NUMBERS
from isolator.policy.grant import GrantedLimits, GrantedRestart, PluginPolicy
from isolator.policy.hostconfig import (
    CEILING,
    CONTROLS,
    AuditSettings,
    Ceiling,
    HostConfig,
    Inbound,
    Limits,
    Metrics,
    Roles,
)
from isolator.policy.model import AddressException, EgressRule, RestartPolicy
from isolator.policy.strict import Table, did_you_mean, printable
from isolator.policy.toml_lines import parse_toml
from isolator.policy.units import parse_duration, parse_size

__all__ = [
    "HostConfig",
    "PluginPolicy",
    "check_ceiling",
    "load_host_config",
    "load_plugin_policy",
    "parse_host_config",
    "parse_plugin_policy",
    "read_trusted",
]

MAX_BYTES = 256 * 1024
_AT = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def load_host_config(path: Path | str, *, also_owner: int | None = None) -> HostConfig:
    """``host.toml``; the defaults when there is no such file. Raises UsageError or DeniedError with file and line."""
    try:
        return parse_host_config(read_trusted(path, also_owner=also_owner), source=str(path))
    except NotFoundError:
        return HostConfig()


def load_plugin_policy(
    path: Path | str, host: HostConfig | None = None, *, also_owner: int | None = None
) -> PluginPolicy:
    """One plugin's policy file. With ``host``, whatever exceeds its ceiling is refused with file and line.

    Raises NotFoundError when there is no such file, DeniedError when others can write it, UsageError for its content.
    """
    policy = parse_plugin_policy(read_trusted(path, also_owner=also_owner), source=str(path))
    if host is not None:
        check_ceiling(policy, host)
    return policy


def read_trusted(path: Path | str, *, also_owner: int | None = None, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a file that only root can write.

    ``also_owner`` admits one more owner: the person at the command line who names a file of their own.
    """
    try:
        # O_NONBLOCK: opening a FIFO that somebody put there must not hang the daemon.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotFoundError(str(path), "no such file") from None
        if error.errno == errno.ELOOP:
            raise DeniedError(str(path), "is a symbolic link", "name the file itself") from None
        raise DeniedError(str(path), error.strerror or str(error), "run as root") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise DeniedError(str(path), "is not a regular file", "name a TOML file")
        if status.st_uid not in (0, also_owner):
            raise DeniedError(str(path), f"belongs to uid {status.st_uid}, not to root", f"chown root {path}")
        # Distributions with user-private groups make files 0664; such a group is its owner alone.
        loose = stat.S_IWOTH if also_owner and status.st_uid == status.st_gid == also_owner else stat.S_IWOTH | 0o020
        if status.st_mode & loose:
            mode = stat.S_IMODE(status.st_mode)
            raise DeniedError(str(path), f"others can write it (mode {mode:04o})", f"chmod go-w {path}")
        chunks = bytearray()
        while len(chunks) <= max_bytes and (chunk := os.read(fd, 65536)):
            chunks += chunk
        if len(chunks) > max_bytes:
            raise UsageError(str(path), f"larger than {max_bytes} bytes", "split or shorten it")
        return bytes(chunks)
    finally:
        os.close(fd)


def _document(text: bytes, source: str) -> Table:
    try:
        data, lines = parse_toml(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{source}:{line}", "not UTF-8", "save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        match = _AT.search(str(error))
        line = int(match[1]) if match and match[1] else max(1, len(text.splitlines()))
        raise UsageError(f"{source}:{line}", f"not TOML: {_AT.sub('', str(error))}") from None
    except RecursionError:
        raise UsageError(source, "nested too deeply", "flatten it") from None
    return Table(data, name=source, lines=lines)


def _where(top: Table) -> dict[str, str]:
    bare = Table({}, name=top.name, lines=top.lines)
    return {bare.dotted(*path): f"{top.name}:{line}" for path, line in top.lines.items()}


def _egress(table: Table, key: str) -> tuple[tuple[EgressRule, ...] | None, bool]:
    """Rules of a list and whether it holds "public"; also plain ``key = "public"``."""
    if table.data.get(key) == "public":
        table.take(key)
        return (), True
    entries = table.strings(key, lambda text: None if text == "public" else names.parse_egress(text), limit=256)
    if entries is None:
        return None, False
    return tuple(entry for entry in entries if entry is not None), None in entries


def _numbers(table: Table, section: str | None) -> dict[str, float]:
    """The numbers that a table sets, by field of ``Limits``; ``section`` None takes all of them by their flat names."""
    found: dict[str, float] = {}
    for number in NUMBERS:
        key = number.name if section is None else number.key
        if section in (None, number.section):
            value = table.parsed(key, number.check, None)
            if value is not None:
                found[number.name] = value
    return found


def parse_plugin_policy(text: bytes, *, source: str) -> PluginPolicy:
    """A policy file's content; ``source`` is what errors and ``explain`` call it."""
    top = _document(text, source)
    grant, limits, filesystem = top.table("grant"), top.table("limits"), top.table("filesystem")
    syscalls, restart, delivery = top.table("syscalls"), top.table("restart"), top.table("delivery")
    egress, public = _egress(grant, "egress")
    numbers: dict[str, Any] = {}
    for table, section in (
        (limits, "limits"),
        (filesystem, "filesystem"),
        (restart, "restart"),
        (delivery, "delivery"),
    ):
        numbers |= _numbers(table, section)
    policy = PluginPolicy(
        source=source,
        hooks=grant.strings("hooks", names.parse_hook_grant),
        permissions=grant.strings("permissions", names.parse_permission_grant),
        egress=egress,
        egress_public=public,
        listen=grant.strings("listen", names.parse_listen, limit=32),
        allow_no_sni=grant.boolean("allow_no_sni", None),
        limits=GrantedLimits(**numbers),
        restart=GrantedRestart(**_restart(restart)),
        read=filesystem.strings("read", names.parse_read_path),
        syscalls=syscalls.choice("profile", ("default", "strict"), None),  # type: ignore[arg-type]  # choice() checks it
        where=_where(top),
    )
    for table in (grant, limits, filesystem, syscalls, restart, delivery, top):
        table.finish()
    return policy


def _restart(table: Table) -> dict[str, Any]:
    found: dict[str, Any] = {
        "backoff_min": table.parsed("backoff_min", _duration(0.1, 3600), None),
        "backoff_max": table.parsed("backoff_max", _duration(0.1, 86400), None),
        "crashes": table.integer("crashes", None, low=1, high=1000),
        "window": table.parsed("window", _duration(1, 86400), None),
    }
    low, high = found["backoff_min"], found["backoff_max"]
    if low is not None and high is not None and low > high:
        table.fail("backoff_min", "is more than backoff_max")
    return {key: value for key, value in found.items() if value is not None}


def _duration(low: float, high: float) -> Any:
    def check(value: Any) -> float:
        seconds = parse_duration(value)
        if not low <= seconds <= high:
            raise ValueError(f"must be {low:g} to {high:g} seconds")
        return seconds

    return check


def check_ceiling(policy: PluginPolicy, host: HostConfig) -> None:
    """Refuse a policy that grants more than the host allows at all, at the line that does so."""
    ceiling = host.ceiling
    edit = f"lower it, or raise the ceiling in {host.source or 'host.toml'}"

    def refuse(key: str, why: str, remedy: str = edit) -> None:
        raise UsageError(policy.at(key), f"{key}: {why}", remedy)

    for number in NUMBERS:
        granted, most = getattr(policy.limits, number.name), getattr(ceiling.limits, number.name)
        if granted is not None and granted > most:
            refuse(f"{number.section}.{number.key}", f"{number.show(granted)} is over the ceiling, {number.show(most)}")
    if policy.syscalls == "default" and ceiling.syscalls == "strict":
        refuse("syscalls.profile", '"default" is over the ceiling, "strict"')
    if policy.allow_no_sni and not ceiling.allow_no_sni:
        refuse("grant.allow_no_sni", "the ceiling forbids it")
    if policy.egress_public and not ceiling.egress_public:
        refuse("grant.egress", '"public" is over the ceiling')
    for rule in policy.egress or ():
        blocked = never_reachable(rule, host.exceptions)
        if blocked:
            refuse(
                _element(policy, "grant.egress", names.format_egress(rule)),
                f"{names.format_egress(rule)} is never reachable ({blocked})",
                "to open it for this host, list it in [network] exceptions of host.toml",
            )
    for index, listen in enumerate(policy.listen or ()):
        if not host.inbound.allows(listen.address, listen.port):
            refuse(
                f"grant.listen[{index}]",
                f"{listen.address} port {listen.port} is not open to plugins",
                "allow it in [inbound] of host.toml",
            )
    for index, path in enumerate(policy.read or ()):
        if not any(names.path_covers(allowed, path) for allowed in ceiling.read):
            refuse(f"filesystem.read[{index}]", f"{path} is outside what the ceiling lets plugins read")


def _element(policy: PluginPolicy, key: str, text: str) -> str:
    """The path of the list element that gave a rule; the list itself when it cannot be told."""
    rules = [names.format_egress(rule) for rule in policy.egress or ()]
    return f"{key}[{rules.index(text)}]" if not policy.egress_public and text in rules else key


def parse_host_config(text: bytes, *, source: str) -> HostConfig:
    """The content of ``host.toml``."""
    top = _document(text, source)
    ceiling, defaults, network = top.table("ceiling"), top.table("defaults"), top.table("network")
    inbound, roles, audit = top.table("inbound"), top.table("roles"), top.table("audit")
    metrics, restart = top.table("metrics"), top.table("restart")
    most = CEILING.model_copy(update=_numbers(ceiling, None))
    usual = _numbers(defaults, None)
    for name, value in usual.items():
        if value > getattr(most, name):
            shown = BY_NAME[name].show
            defaults.fail(name, f"{shown(value)} is over the ceiling, {shown(getattr(most, name))}")
    egress, public = _egress(ceiling, "egress")
    base = Ceiling()
    stop_grace = Limits(**usual).stop_grace  # type: ignore[arg-type]  # _numbers() gives ints where ints belong
    config = HostConfig(
        uid_range=_uid_range(top),
        plugin_dirs=top.strings("plugin_dirs", _absolute) or (),
        may_degrade=top.strings("may_degrade", _control) or (),
        ceiling=Ceiling(
            limits=most,
            hooks=_or(ceiling.strings("hooks", names.parse_hook_grant), base.hooks),
            permissions=_or(ceiling.strings("permissions", names.parse_permission_grant), base.permissions),
            egress=None if public else egress,
            egress_public=public or egress is None,
            read=_or(ceiling.strings("read", _absolute), base.read),
            syscalls=ceiling.choice("syscalls", ("default", "strict"), base.syscalls),  # type: ignore[arg-type]  # checked
            allow_no_sni=ceiling.boolean("allow_no_sni", base.allow_no_sni),
        ),
        defaults=Limits(**usual),  # type: ignore[arg-type]  # as above
        default_syscalls=defaults.choice("syscalls", ("default", "strict"), "default"),  # type: ignore[arg-type]  # checked
        restart=RestartPolicy(**_restart(restart), stop_grace=stop_grace),
        roles=Roles(
            viewer=roles.items("viewer", _uid) or (),
            emitter=roles.items("emitter", _uid) or (),
            operator=_or(roles.items("operator", _uid), (0,)),
        ),
        exceptions=_exceptions(network),
        resolvers=network.strings("resolvers", _resolver, limit=8) or (),
        inbound=Inbound(
            addresses=_or(inbound.strings("addresses", _address), Inbound().addresses),
            ports=inbound.items("ports", _port_range) or (),
        ),
        audit=_audit(audit),
        metrics=_metrics(metrics),
        source=source,
        where=_where(top),
    )
    for table in (ceiling, defaults, network, inbound, roles, audit, metrics, restart, top):
        table.finish()
    return config


def _or(value: tuple[Any, ...] | None, default: tuple[Any, ...]) -> tuple[Any, ...]:
    return default if value is None else value


def _audit(table: Table) -> AuditSettings:
    base = AuditSettings()
    disk_full = table.choice("disk_full", ("stop", "continue"), base.disk_full)
    return AuditSettings(
        disk_full=disk_full,  # type: ignore[arg-type]  # choice() checks it
        rotate_size=table.parsed("rotate_size", _size(1 << 16), base.rotate_size),
        rotate_age=table.parsed("rotate_age", _duration(60, 366 * 86400), base.rotate_age),
        keep_files=table.integer("keep_files", base.keep_files, high=1_000_000),
        seal_records=table.integer("seal_records", base.seal_records, low=1, high=1_000_000),
        seal_interval=table.parsed("seal_interval", _duration(1, 86400), base.seal_interval),
        snapshot_interval=table.parsed("snapshot_interval", _duration(1, 86400), base.snapshot_interval),
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


def _size(low: int) -> Any:
    def check(value: Any) -> int:
        size = parse_size(value)
        if size < low:
            raise ValueError(f"must be at least {low} bytes")
        return size

    return check


def _uid(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32 - 1:
        raise ValueError("must be a uid (a number; see id -u NAME)")
    return value


def _uid_range(top: Table) -> tuple[int, int]:
    found = top.items("uid_range", _uid)
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
    if text not in CONTROLS:
        raise ValueError(f'"{text}" is not a control; {did_you_mean(text, CONTROLS)}')
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
    address = _address(rule.host)
    return f"[{address}]:{rule.ports[0]}" if ":" in address else f"{address}:{rule.ports[0]}"


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
        try:
            cidr = str(ip_network(rule.host))
        except ValueError:
            raise ValueError(f'"{text}": an exception is an address or a CIDR with its port, never a name') from None
        return tuple(AddressException(cidr=cidr, port=port) for port in rule.ports)

    found: Iterable[tuple[AddressException, ...]] = network.strings("exceptions", parse, limit=256) or ()
    return tuple(exception for group in found for exception in group)
