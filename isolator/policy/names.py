"""Names that requests and grants speak of: events, permissions, destinations, ports, paths.

One spelling per thing: a parsed name is lower case, bounded and printable, so that it can be compared, shown on a
terminal and put into a DNS answer or a TOML file as it is. Parsers raise ``ValueError`` with a sentence.
"""

from __future__ import annotations

import ipaddress

from isolator.base.patterns import pattern
from isolator.policy.addresses import bracketed
from isolator.policy.destinations import parse_host
from isolator.policy.model import EgressRule, ListenRule
from isolator.policy.units import shown

PLUGIN_NAME = pattern(r"[a-z][a-z0-9-]{1,62}")
HOOK = pattern(r"[a-z][a-z0-9_]{0,63}(?:\.[a-z][a-z0-9_]{0,63}){0,7}")
PERMISSION = pattern(r"[a-z][a-z0-9_.-]{0,63}(?::[a-z0-9][a-z0-9_.-]{0,63}){0,3}")

OLDER_HOOKS: dict[str, str] = {
    "on_deploy_start": "deploy.started",
    "on_deploy_started": "deploy.started",
    "on_deploy_complete": "deploy.completed",
    "on_deploy_completed": "deploy.completed",
    "on_deploy_fail": "deploy.failed",
    "on_deploy_failed": "deploy.failed",
    "on_project_create": "project.created",
    "on_project_created": "project.created",
    "on_error_detect": "error.detected",
    "on_error_detected": "error.detected",
    "on_domain_add": "domain.added",
    "on_domain_added": "domain.added",
}
"""Older spellings of events. A plugin that subscribes to one receives that one; a grant covers both."""

VARIABLE = pattern(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_THE_CAGES_OWN = pattern(r"(?:PATH|HOME|TMPDIR|PLUGIN_.*|ISOLATOR_.*)")
"""Variables in which a cage tells its program where things are; another value would be untrue."""
MAX_VARIABLE = 4096

NEVER_READ = ("/proc", "/sys", "/dev", "/run", "/var/run", "/state", "/plugin")
"""Host folders that are never bound into a cage: kernel interfaces, sockets of other services, the cage's own names."""


def parse_hook(text: str) -> str:
    """An event name as a manifest lists it; no wildcards, because the list is what will be dispatched."""
    if "*" in text:
        raise ValueError(f'"{shown(text)}": a manifest names each event; wildcards are for grants')
    if not HOOK.fullmatch(text):
        raise ValueError(f'"{shown(text)}" is not an event name like "deploy.completed"')
    return text


def parse_permission(text: str) -> str:
    """A permission as a manifest lists it, like ``read:deployments``."""
    if "*" in text:
        raise ValueError(f'"{shown(text)}": a manifest names each permission; wildcards are for grants')
    if not PERMISSION.fullmatch(text):
        raise ValueError(f'"{shown(text)}" is not a permission like "read:deployments"')
    return text


def parse_hook_grant(text: str) -> str:
    """An event name, ``deploy.*`` or ``*``."""
    if text != "*":
        parse_hook(text.removesuffix(".*"))
    return text


def parse_permission_grant(text: str) -> str:
    """A permission, ``read:*`` or ``*``."""
    if text != "*":
        parse_permission(text.removesuffix(":*"))
    return text


def covers_hook(grant: str, hook: str) -> bool:
    """Whether a granted pattern covers an event, whichever spelling either of them uses."""
    return _covers(OLDER_HOOKS.get(grant, grant), OLDER_HOOKS.get(hook, hook), ".")


def covers_permission(grant: str, permission: str) -> bool:
    """Whether a granted pattern covers a permission."""
    return _covers(grant, permission, ":")


def _covers(grant: str, name: str, separator: str) -> bool:
    if grant in ("*", name):
        return True
    return grant.endswith(separator + "*") and name.startswith(grant[:-1])


def parse_port(value: object) -> int:
    """A TCP port, 1 to 65535."""
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65535:
        return value
    raise ValueError(f"{shown(str(value))} is not a port from 1 to 65535")


def _port_text(text: str) -> int:
    # isascii: int() also reads digits of other scripts, which would give one port two spellings.
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        raise ValueError(f'"{shown(text)}" is not a port from 1 to 65535')
    return parse_port(int(text))


def parse_egress(text: str) -> EgressRule:
    """``hooks.slack.com:443``, ``*.example.com:443,8443``, ``203.0.113.7:5432``, ``[2001:db8::/32]:443``."""
    if "://" in text:
        raise ValueError(f'"{shown(text)}" is a URL; write HOST:PORT, like "hooks.slack.com:443"')
    host, separator, ports = text.rpartition(":")
    if not separator or host.endswith(":") or (":" in host and not (host.startswith("[") and host.endswith("]"))):
        raise ValueError(f'"{shown(text)}" has no port; write HOST:PORT, like "hooks.slack.com:443"')
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            raise ValueError(f'"{shown(text)}": brackets are for IPv6 addresses')
    return EgressRule(host=str(parse_host(host)), ports=sorted_ports(_port_text(p.strip()) for p in ports.split(",")))


def sorted_ports(ports: object) -> tuple[int, ...]:
    """Ports ascending and without repetition: one spelling for one set."""
    return tuple(sorted(set(ports)))  # type: ignore[call-overload]  # every caller passes an iterable of int


def format_egress(rule: EgressRule) -> str:
    """The spelling that ``parse_egress`` reads back."""
    return f"{bracketed(rule.host)}:{','.join(map(str, rule.ports))}"


def parse_listen(text: str) -> ListenRule:
    """``8080``, ``8080:3000`` or ``ADDRESS:8080:3000``: host port, then the port on the cage's loopback."""
    address, ports = "127.0.0.1", text.strip()
    if ports.startswith("["):
        address, _, ports = ports[1:].partition("]:")
    elif ports.count(":") == 2 or (ports.count(":") == 1 and "." in ports.partition(":")[0]):
        address, _, ports = ports.partition(":")
    port, separator, cage_port = ports.partition(":")
    try:
        canonical = str(ipaddress.ip_address(address))
    except ValueError:
        raise ValueError(f'"{shown(text)}": "{shown(address)}" is not an address of this host') from None
    host_port = _port_text(port)
    return ListenRule(address=canonical, port=host_port, cage_port=_port_text(cage_port) if separator else host_port)


def format_listen(rule: ListenRule) -> str:
    """The spelling that ``parse_listen`` reads back."""
    return f"{bracketed(rule.address)}:{rule.port}:{rule.cage_port}"


def parse_read_path(text: str) -> str:
    """An absolute host path to bind read-only at the same place, in canonical form.

    Refused: anything below the kernel's own folders and ``/run``, because a read-only bind does not keep a process
    from connecting to a socket or from writing to a device; and the places where the cage has something of its own.
    """
    if not text.startswith("/"):
        raise ValueError(f'"{shown(text)}" is not an absolute path')
    if not text.isprintable() or len(text) > 1024:
        raise ValueError(f'"{shown(text)}" has unprintable characters or is longer than 1024')
    parts = [p for p in text.split("/") if p not in ("", ".")]
    if ".." in parts:
        raise ValueError(f'"{shown(text)}" contains ".."')
    path = "/" + "/".join(parts)
    if path in ("/", "/tmp", "/etc", "/usr", "/lib", "/lib64", "/bin", "/sbin"):
        why = {"/": "is the whole host", "/tmp": "is the cage's own"}.get(path, "is provided by the cage itself")
        raise ValueError(f'"{path}" {why}; name what lies below it')
    for never in NEVER_READ:
        if path_covers(never, path):
            raise ValueError(f'"{shown(path)}" is below {never}, which is never made visible in a cage')
    return path


def parse_variable(name: str, value: object) -> str:
    """The value of a variable that an operator sets in the environment of a plugin."""
    if not VARIABLE.fullmatch(name):
        raise ValueError(f'"{shown(name)}" is not the name of a variable: letters, digits and "_", no digit first')
    if _THE_CAGES_OWN.fullmatch(name):
        raise ValueError(f"{shown(name)} is set by the cage itself; leave it out")
    if not isinstance(value, str):
        raise ValueError('must be text; write "1" for the number 1')
    if len(value) > MAX_VARIABLE:
        raise ValueError(f"{len(value)} characters; at most {MAX_VARIABLE}")
    if not value.isprintable():
        raise ValueError("holds control or invisible characters")
    return value


def path_covers(outer: str, inner: str) -> bool:
    """Whether ``inner`` is the same path as ``outer`` or lies below it; both canonical."""
    return outer in (inner, "/") or inner.startswith(outer + "/")


def parse_tool(text: str) -> str:
    """The name of an MCP tool, in which ``*`` stands for any characters; raises ValueError."""
    if not text or len(text) > 128 or not text.isprintable():
        raise ValueError("must be the name of a tool, with * for any characters")
    return text


def parse_uid(value: object) -> int:
    """A uid of a policy; raises ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32 - 1:
        raise ValueError("must be a uid (a number; see id -u NAME)")
    return value
