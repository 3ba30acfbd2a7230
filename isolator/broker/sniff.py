"""Read the server name in what a client sends in the clear: TLS server name, HTTP Host.

Hostile input, read by hand: every length is checked against the bytes that came, at most ``LIMIT`` are read, and
the only outcomes are a ``Hello``, ``None`` (more bytes are needed) or ``Malformed``. Nothing is decrypted or changed.
A reader takes bytes as they come and looks at each a fixed number of times, however small the pieces are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, Self

from isolator.ipc.body import Body
from isolator.ipc.succession import to_bytes, to_text
from isolator.policy.destinations import normal_name

LIMIT = 16 * 1024
"""Bytes that a ClientHello or an HTTP head may take; real ones are well below 4 KiB."""
RECORDS = 512
"""TLS records over which a ClientHello may be spread; real clients use one or two, and each costs a reader as much as
hundreds of bytes."""
HANDSHAKE = 22
"""Type of a TLS record with handshake messages."""

_METHODS = (
    b"GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH PROPFIND PROPPATCH MKCOL COPY MOVE LOCK UNLOCK "
    b"SEARCH REPORT MKCALENDAR ACL BIND REBIND UNBIND MERGE PURGE QUERY PRI"
)
_WAIT_FOR = tuple(method + b" " for method in _METHODS.split())
_HTTP2 = b"PRI * HTTP/2.0"
_BLANK = b"\r\n\t "
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_MAX_METHOD = 32
_CHANGE_CIPHER, _ALERT = b"\x14\x03", b"\x15\x03"

_SERVER_NAME, _ECH, _ESNI = 0, 0xFE0D, 0xFFCE


class Malformed(Exception):
    """The bytes begin like TLS or HTTP and then break its rules."""


class Request(Body):
    """The framing of an HTTP/1 request."""

    length: int = 0
    """Bytes of the body; -1 for a chunked one."""
    connect: bool = False
    upgrade: tuple[str, ...] = ()
    """The protocols that it offers to go on with."""


class ReaderState(Body):
    """A half-read ClientHello on its way to another broker."""

    header: str
    message: str
    left: int
    read: int


class SnifferState(Body):
    """First bytes that are not understood yet, on their way to another broker."""

    data: str
    certain: bool
    start: int
    line: int
    seen: int
    tls: ReaderState | None


@dataclass(frozen=True)
class Hello:
    """The names in the first bytes, all of them; ``encrypted``: another may be hidden (ECH)."""

    protocol: Literal["tls", "http", "http2", "other"]
    names: tuple[str, ...] = ()
    encrypted: bool = False
    request: Request | None = field(default=None, compare=False)
    """For ``http``."""


class Sniffer:
    """Reads the first bytes of a client, or the head of its next request. ``rest``: bytes behind what was read."""

    def __init__(self) -> None:
        self.rest = b""
        self.certain = False
        """Whether the bytes so far begin TLS or HTTP; those that may turn out to be can be no whole request yet."""
        self._data = bytearray()
        self._tls: HelloReader | None = None
        self._start = 0  # of the text: servers skip blank lines before a request, so they hide nothing here either
        self._line = -1
        self._seen = 0

    @property
    def in_records(self) -> bool:
        """Whether the first byte was that of a TLS handshake record."""
        return self._tls is not None

    def pass_on(self) -> SnifferState:
        """The state for another broker, of a sniffer that has not read everything yet."""
        return SnifferState(
            data=to_text(self._data), certain=self.certain, start=self._start, line=self._line, seen=self._seen,
            tls=self._tls.pass_on() if self._tls is not None else None,
        )  # fmt: skip

    @classmethod
    def taken_over(cls, state: SnifferState) -> Self:
        """A sniffer that goes on where another has stopped."""
        sniffer = cls()
        sniffer._data += to_bytes(state.data)
        sniffer.certain, sniffer._start, sniffer._line, sniffer._seen = (
            state.certain, state.start, state.line, state.seen,
        )  # fmt: skip
        sniffer._tls = HelloReader.taken_over(state.tls) if state.tls is not None else None
        return sniffer

    def feed(self, part: bytes | memoryview) -> Hello | None:
        """The hello, once there is enough of it; raises Malformed."""
        if self._tls is not None:
            return self._read_tls(self._tls, part)
        self._data += part
        data = self._data
        if not data:
            return None
        if data[0] >= 0x80 or (data[0] < 0x20 and data[0] not in _BLANK):
            return self._binary(bytes(data))
        return self._text()

    def _binary(self, data: bytes) -> Hello | None:
        if data[0] == HANDSHAKE:
            if len(data) >= 2 and data[1] != 3:
                return Hello("other")
            self.certain = True
            if len(data) < 2:
                return None
            self._tls = HelloReader()
            return self._read_tls(self._tls, data)
        if len(data) < 5 and (data[0] >= 0x80 or data[:2] in {_CHANGE_CIPHER, _ALERT, _CHANGE_CIPHER[:1], _ALERT[:1]}):
            return None
        # A server may skip what precedes a ClientHello; no client begins so.
        if data[:2] in {_CHANGE_CIPHER, _ALERT} and data[2] <= 4 and data[3:5] in {b"\0\1", b"\0\2"}:
            raise Malformed("TLS that does not begin with a ClientHello")
        # The ClientHello of SSL 2, which servers still read as the way to TLS: it has no server name.
        if data[0] >= 0x80 and data[2:4] == b"\1\3" and data[4] <= 4:
            return Hello("tls")
        return Hello("other")

    def _read_tls(self, reader: HelloReader, part: bytes | memoryview) -> Hello | None:
        hello = reader.feed(part)
        self.rest = reader.rest
        return hello

    def _text(self) -> Hello | None:
        data = self._data
        while self._start < len(data) and data[self._start] in _BLANK:
            self._start += 1
        if self._start == len(data):
            return self._more()
        if self._line < 0:
            self._line = data.find(b"\n", max(self._start, self._seen))
            self._seen = len(data)
            if self._line < 0:
                return self._half_line()
            line = bytes(data[self._start : self._line])
            # Anything that names HTTP in its first line is held to its rules; ``EHLO name`` and the like are not HTTP.
            if b"HTTP/" not in line.upper():
                return Hello("other")
            if line.startswith(_HTTP2):
                return Hello("http2")
            self.certain = True
            self._seen = self._line
        end, size = _blank_line(data, max(self._line, self._seen - 2))
        self._seen = len(data)
        if end < 0:
            return self._more()
        self.rest = bytes(data[end + size :])
        return _request(bytes(data[self._start : end + size]))

    def _half_line(self) -> Hello | None:
        """Other protocols may wait for an answer to half a line, so only what must be HTTP is certain."""
        start = bytes(self._data[self._start : self._start + _MAX_METHOD + 1])
        method, space, _ = start.partition(b" ")
        if not _TOKEN.fullmatch(method) or (not space and len(method) > _MAX_METHOD):
            return Hello("other")
        upper = start.upper()
        self.certain = any(upper.startswith(method) or method.startswith(upper) for method in _WAIT_FOR)
        return self._more()

    def _more(self) -> Hello | None:
        if len(self._data) >= LIMIT:
            raise Malformed(f"no end within {LIMIT} bytes")
        return None


class HelloReader:
    """Reads one ClientHello, which may be spread over several records (RFC 8446, 4 and 5.1)."""

    def __init__(self) -> None:
        self.rest = b""
        self._header = bytearray()
        self._message = bytearray()
        self._left = 0
        self._read = 0
        self._records = 0
        """Records since this broker took over, as many as one has to read."""

    def pass_on(self) -> ReaderState:
        """The state for another broker, of a reader that has not read everything yet."""
        return ReaderState(
            header=to_text(self._header), message=to_text(self._message), left=self._left, read=self._read
        )  # fmt: skip

    @classmethod
    def taken_over(cls, state: ReaderState) -> Self:
        """A reader that goes on where another has stopped."""
        reader = cls()
        reader._header += to_bytes(state.header)
        reader._message += to_bytes(state.message)
        reader._left, reader._read = state.left, state.read
        return reader

    def feed(self, data: bytes | memoryview) -> Hello | None:
        """The hello, once it is whole; ``rest`` are the bytes behind it. Raises Malformed."""
        at = 0
        while at < len(data):
            if not self._left:
                part = data[at : at + 5 - len(self._header)]
                self._header += part
                at += len(part)
                self._left = self._length()
                self._records += self._left > 0
                if self._records > RECORDS:
                    raise Malformed(f"a ClientHello in more than {RECORDS} TLS records")
                continue
            part = data[at : at + self._left]
            at += len(part)
            self._left -= len(part)
            self._message += part
            if self._whole():
                self.rest = bytes(data[at:])
                return _client_hello(_Reader(bytes(self._message[4:])))
        self._read += len(data)
        if self._read >= LIMIT:
            raise Malformed(f"no end within {LIMIT} bytes")
        return None

    def _length(self) -> int:
        header = self._header
        if header[0] != HANDSHAKE or (len(header) > 1 and header[1] != 3):
            raise Malformed("a TLS record that is no handshake in the middle of the ClientHello")
        if len(header) < 5:
            return 0
        length = int.from_bytes(header[3:5], "big")
        if not 0 < length <= LIMIT:
            raise Malformed("a TLS record of impossible length")
        header.clear()
        return length

    def _whole(self) -> bool:
        message = self._message
        if message[0] != 1:
            raise Malformed("the first TLS message is no ClientHello")
        if len(message) < 4:
            return False
        need = 4 + int.from_bytes(message[1:4], "big")
        if need > LIMIT:
            raise Malformed("a ClientHello of impossible length")
        if len(message) > need or (len(message) == need and self._left):
            raise Malformed("something behind the ClientHello in its record")
        return len(message) == need


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


def _blank_line(data: bytearray, start: int) -> tuple[int, int]:
    """Offset and size of the first empty line with the line end before it; -1 when there is none from ``start`` on."""
    while (end := data.find(b"\n", start)) >= 0:
        before = 1 if end and data[end - 1] == 0x0D else 0
        if data[end + 1 : end + 2] == b"\n":
            return end - before, before + 2
        if data[end + 1 : end + 3] == b"\r\n":
            return end - before, before + 3
        start = end + 1
    return -1, 0


def _request(head: bytes) -> Hello:
    """Every server name in an HTTP/1 request's head: Host headers and an absolute target; and its framing."""
    ends = head.count(b"\r\n")
    if head.count(b"\r") != ends or (ends and head.count(b"\n") != ends):
        # Some servers end a line there and others do not: two readers, two Hosts.
        raise Malformed("a lone CR, or two kinds of line ends, in the HTTP head")
    if b"\0" in head:
        raise Malformed("a zero byte in the HTTP head")
    lines = head.rstrip(b"\r\n").split(b"\r\n" if ends else b"\n")
    request = lines[0].split(b" ")
    if len(request) != 3 or not re.fullmatch(rb"HTTP/1\.[0-9]", request[2]):
        raise Malformed("no HTTP/1 request line")
    names = []
    if b"://" in request[1].partition(b"?")[0]:
        authority = re.split(rb"[/?#]", request[1].split(b"://", 1)[1], maxsplit=1)[0]
        names.append(_host(authority.rpartition(b"@")[2]))
    elif request[0] == b"CONNECT":
        names.append(_host(request[1]))
    headers: dict[bytes, list[bytes]] = {}
    for line in lines[1:]:
        if line[:1] in {b" ", b"\t"}:
            raise Malformed("a folded HTTP header")
        key, colon, value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(key):
            raise Malformed("an HTTP header without a name")
        headers.setdefault(key.lower(), []).append(value.strip(b" \t"))
    names += map(_host, headers.get(b"host", []))
    upgrade = tuple(
        item.strip().decode("latin-1").lower() for item in b",".join(headers.get(b"upgrade", [])).split(b",")
    )
    framing = Request(
        length=_length(headers, request[2]), connect=request[0] == b"CONNECT",
        upgrade=upgrade if upgrade != ("",) else (),
    )  # fmt: skip
    return Hello("http", tuple(names), request=framing)


def _length(headers: dict[bytes, list[bytes]], version: bytes) -> int:
    """Length of the body, -1 for a chunked one; refuses what two readers could read differently (RFC 9112, 6.3)."""
    lengths, codings = headers.get(b"content-length", []), headers.get(b"transfer-encoding", [])
    if codings:
        if lengths or len(codings) > 1 or codings[0].lower() != b"chunked" or version == b"HTTP/1.0":
            raise Malformed("an HTTP request whose length is ambiguous")
        return -1
    if not lengths:
        return 0
    if len(set(lengths)) > 1 or not re.fullmatch(rb"[0-9]{1,18}", lengths[0]):
        raise Malformed("an HTTP request whose length is ambiguous")
    return int(lengths[0])


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
