"""Is what a client says to a granted name's server consistent with that name?

A grant is for a name, but a shared server (a CDN) answers for many: what it is asked for in the first bytes must be
the name that was resolved. It applies to whatever looks like TLS or HTTP on any port. On 443 and 80 nothing else is let
through, because there is nothing there to compare; on other ports other protocols pass, the server may speak first.
"""

from __future__ import annotations

from isolator.broker.sniff import Hello

TLS_PORTS = frozenset({443})
HTTP_PORTS = frozenset({80})


def speaks_first(port: int) -> bool:
    """Whether on this port the client always speaks first, so nothing need pass before it was checked."""
    return port in TLS_PORTS or port in HTTP_PORTS


def objection(hello: Hello, name: str, port: int, *, allow_no_sni: bool) -> str | None:
    """The rule that refuses these first bytes on a connection to ``name``, or None."""
    if hello.protocol == "other":
        if allow_no_sni:
            return None
        return "not-tls" if port in TLS_PORTS else "not-http" if port in HTTP_PORTS else None
    if hello.protocol == "http":
        if port in TLS_PORTS and not allow_no_sni:
            return "not-tls"
        if not hello.names:
            return None if allow_no_sni else "no-host"
        return None if set(hello.names) == {name} else "host-mismatch"
    if not hello.names:
        return None if allow_no_sni else "no-sni"
    if set(hello.names) != {name}:
        return "sni-mismatch"
    return "encrypted-hello" if hello.encrypted and not allow_no_sni else None
