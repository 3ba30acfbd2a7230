"""Read the server name in a connection's first bytes: TLS server name, HTTP Host.

Hostile input, read by hand: every length is checked against the bytes that came, at most ``LIMIT`` are read, and
the only outcomes are a ``Hello``, ``None`` (more bytes are needed) or ``Malformed``. Nothing is decrypted or changed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from isolator.policy.destinations import normal_name

LIMIT = 16 * 1024
"""Bytes that a ClientHello or an HTTP head may take; real ones are well below 4 KiB."""

_METHODS = (
    b"GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH PROPFIND PROPPATCH MKCOL COPY MOVE LOCK UNLOCK "
    b"SEARCH REPORT MKCALENDAR ACL BIND REBIND UNBIND MERGE PURGE QUERY PRI"
)
_WAIT_FOR = tuple(method + b" " for method in _METHODS.split())
_HTTP2 = b"PRI * HTTP/2.0\r\n"

_SERVER_NAME, _ECH, _ESNI = 0, 0xFE0D, 0xFFCE


class Malformed(Exception):
    """The bytes begin like TLS or HTTP and then break its rules."""


@dataclass(frozen=True)
class Hello:
    """The names in the first bytes, all of them; ``encrypted``: another may be hidden (ECH)."""

    protocol: Literal["tls", "http", "other"]
    names: tuple[str, ...] = ()
    encrypted: bool = False


def sniff(data: bytes) -> Hello | None:
    """Read the first bytes a client sent; None when more are needed; raises Malformed."""
    if not data:
        return None
    if data[0] == 0x16:
        return _tls(data)
    # Servers skip blank lines before a request, so they hide nothing here either.
    text = data[:LIMIT].lstrip(b"\r\n\t ")
    if not text:
        return _more(data)
    line, end, _ = text.partition(b"\n")
    if not end:
        # Waiting for a line that never comes would hang other protocols, so only what begins like HTTP waits.
        start = text[:16].upper()
        waits = any(start.startswith(method) or method.startswith(start) for method in _WAIT_FOR)
        return _more(data) if waits else Hello("other")
    # Anything that names HTTP in its first line is held to its rules; ``EHLO name`` and the like are not HTTP.
    if b"HTTP/" not in line.upper() or text.startswith(_HTTP2):
        return Hello("other")
    return _http(text)


def _tls(data: bytes) -> Hello | None:
    """The ClientHello, which may be spread over several records (RFC 8446, 4 and 5.1)."""
    if len(data) >= 2 and data[1] != 3:
        return Hello("other")
    message = bytearray()
    offset = 0
    need = 4
    while len(message) < need:
        if len(data) - offset < 5:
            return _more(data)
        if data[offset] != 0x16 or data[offset + 1] != 3:
            raise Malformed("a TLS record that is no handshake in the middle of the ClientHello")
        length = int.from_bytes(data[offset + 3 : offset + 5], "big")
        if not 0 < length <= LIMIT:
            raise Malformed("a TLS record of impossible length")
        part = data[offset + 5 : offset + 5 + length]
        message += part
        if len(message) >= 4:
            if message[0] != 1:
                raise Malformed("the first TLS message is no ClientHello")
            need = 4 + int.from_bytes(message[1:4], "big")
            if need > LIMIT:
                raise Malformed("a ClientHello of impossible length")
        if len(part) < length and len(message) < need:
            return _more(data)
        offset += 5 + length
    return _client_hello(_Reader(bytes(message[4:need])))


def _client_hello(body: _Reader) -> Hello:
    body.take(2 + 32)  # version, random
    body.block(1)  # session id
    body.block(2)  # cipher suites
    body.block(1)  # compression
    names: list[str] = []
    encrypted = False
    if body.left:
        extensions = _Reader(body.block(2))
        while extensions.left:
            kind = extensions.number(2)
            content = extensions.block(2)
            if kind == _SERVER_NAME:
                entries = _Reader(_Reader(content).block(2))
                while entries.left:
                    name_type = entries.number(1)
                    name = entries.block(2)
                    if name_type == 0:
                        names.append(_text(name))
            elif kind in {_ECH, _ESNI}:
                encrypted = True
    return Hello("tls", tuple(names), encrypted)


def _http(data: bytes) -> Hello | None:
    """Every server name in an HTTP/1 request's head: Host headers and an absolute target."""
    end = re.search(rb"\r?\n\r?\n", data)
    if end is None:
        return _more(data)
    lines = re.split(rb"\r?\n", data[: end.start()])
    if b"\r" in data[: end.start()].replace(b"\r\n", b""):
        # A lone CR ends a line for some servers and not for others: two readers, two Hosts.
        raise Malformed("a lone CR in the HTTP head")
    request = lines[0].split(b" ")
    if len(request) != 3 or not request[2].startswith(b"HTTP/1."):
        raise Malformed("no HTTP/1 request line")
    names = []
    if b"://" in request[1].partition(b"?")[0]:
        authority = re.split(rb"[/?#]", request[1].split(b"://", 1)[1], maxsplit=1)[0]
        names.append(_host(authority.rpartition(b"@")[2]))
    elif request[0] == b"CONNECT":
        names.append(_host(request[1]))
    for line in lines[1:]:
        if line[:1] in {b" ", b"\t"}:
            raise Malformed("a folded HTTP header")
        key, colon, value = line.partition(b":")
        if not colon or key != key.strip() or not key:
            raise Malformed("an HTTP header without a name")
        if key.lower() == b"host":
            names.append(_host(value.strip(b" \t")))
    return Hello("http", tuple(names))


def _host(authority: bytes) -> str:
    """The host of ``host[:port]``, as a normal name where it is one."""
    text = _text(authority)
    host, colon, port = text.rpartition(":")
    if colon and (port.isdigit() or not port) and (":" not in host or host.endswith("]")):
        text = host
    return normal_name(text) or text


def _text(raw: bytes) -> str:
    text = raw.decode("ascii", "backslashreplace")
    return normal_name(text) or text[:255]


def _more(data: bytes) -> Hello | None:
    """More bytes are needed, unless there were enough already."""
    if len(data) >= LIMIT:
        raise Malformed(f"no end within {LIMIT} bytes")
    return None


class _Reader:
    """Takes length-checked pieces off the front; raises Malformed where there are too few bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise Malformed("a TLS field that is longer than what contains it")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def block(self, size: int) -> bytes:
        return self.take(self.number(size))
