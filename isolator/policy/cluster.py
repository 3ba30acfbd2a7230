"""``[cluster]`` of ``host.toml``: this host as one of several."""

import re
from typing import Any

from isolator.policy import names
from isolator.policy.frozen import Frozen

OUTBOX = 256 << 20


class Cluster(Frozen):
    """This host's name, and how it reaches the cluster's log."""

    name: str
    servers: tuple[str, ...]
    """``HOST:PORT`` of servers of NATS; any of them will do."""
    credentials: str = ""
    """A file that only root can read: ``USER:PASSWORD``."""
    tls: bool = True
    ca: str = ""
    """A file of certificates to trust in place of the system's."""
    labels: tuple[str, ...] = ()
    outbox: int = OUTBOX
    """Bytes of accepted events that may wait for the log."""
    distrusted: tuple[str, ...] = ()
    """Hosts whose messages are passed over where this version cannot read them: it waits for an update otherwise."""
    secret: str = ""
    """What is in ``credentials``; the supervisor fills it in for the host alone."""


def parse_name(value: Any) -> str:
    """The name of a host in its cluster, which is part of subjects."""
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value):
        raise ValueError('must be small letters, digits and hyphens, like "host-1"')
    return value


def parse_server(text: str) -> str:
    """``HOST:PORT`` of a server; the port of NATS is 4222."""
    rule = names.parse_egress(text if re.search(r":\d+\Z", text) else f"{text}:4222")
    if len(rule.ports) != 1 or "/" in rule.host or "*" in rule.host:
        raise ValueError(f'"{text}" is not HOST:PORT, like "10.0.0.1:4222"')
    return names.format_egress(rule)


def parse_label(text: str) -> str:
    """A label of a host, which plugins may ask for."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", text):
        raise ValueError(f'"{text}" is not a label: small letters, digits, dots, hyphens and underscores')
    return text


def stranger_in(secret: str, name: str) -> tuple[str, str] | None:
    """Why ``USER:PASSWORD`` is not the host's of that name, and what to do; None if it is, or there is none.

    Servers know a host by its user, and no host is to have an administrator's rights.
    """
    user = secret.partition(":")[0]
    if not secret or user == name:
        return None
    return (
        f"is of the user {user[:64]!a}, and this host is {name}",
        f"put {name}.secret of 'isolator cluster users' there",
    )
