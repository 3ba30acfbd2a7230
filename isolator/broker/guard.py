"""Compare the server name in a connection's first bytes with the granted name that it was opened for.

A grant is for a name, but a shared server (a CDN) answers for many: the name requested in the first bytes must be the
one that was resolved. This applies to whatever looks like TLS or HTTP on any port. On 443 and 80 nothing else is let
through, because it has no name to compare; on other ports other protocols pass, the server may speak first.
"""

from __future__ import annotations

from typing import Any

from isolator.broker.sniff import Hello
from isolator.policy.denial import DenialRule

TLS_PORTS = frozenset({443})
HTTP_PORTS = frozenset({80})


class Denied(Exception):
    """A connection that is refused; ``rule`` is a ``DenialRule``, ``found`` are further fields of its record."""

    def __init__(self, rule: str, **found: Any) -> None:
        super().__init__(rule)
        self.rule, self.found = rule, found


def speaks_first(port: int) -> bool:
    """Whether the client always speaks first on this port, so that nothing need pass before the check."""
    return port in TLS_PORTS or port in HTTP_PORTS


def objection(hello: Hello, name: str, port: int, *, allow_no_sni: bool, allow_ech: bool = False) -> DenialRule | None:
    """The rule that refuses these first bytes on a connection to ``name``, or None."""
    if hello.protocol in {"other", "http2"}:
        if allow_no_sni:
            return None
        unread = DenialRule.HTTP2 if hello.protocol == "http2" else None
        return DenialRule.NOT_TLS if port in TLS_PORTS else DenialRule.NOT_HTTP if port in HTTP_PORTS else unread
    if hello.protocol == "http":
        if port in TLS_PORTS and not allow_no_sni:
            return DenialRule.NOT_TLS
        if not hello.names:
            return None if allow_no_sni else DenialRule.NO_HOST
        return None if set(hello.names) == {name} else DenialRule.HOST_MISMATCH
    if not hello.names:
        return None if allow_no_sni else DenialRule.NO_SNI
    if set(hello.names) != {name}:
        return DenialRule.SNI_MISMATCH
    return DenialRule.ENCRYPTED_HELLO if hello.encrypted and not (allow_no_sni or allow_ech) else None
