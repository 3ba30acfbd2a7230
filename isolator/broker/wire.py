"""DNS messages by hand: the few fields that the broker needs of a question and of an answer, read in bounded work.

Both are a stranger's: the question a plugin's, the answer often that of a server which the plugin's author runs. So a
message costs what it is worth: a name at most 255 bytes, an answer at most ``MAX_RECORDS`` records and ``MAX_LABELS``
labels over all its names, whatever compression makes of them. RFC 1035, section 4; EDNS RFC 6891.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address

from isolator.policy.addresses import Address

MAX_RECORDS = 128
"""Records of an answer that are read; those behind them do not count."""
MAX_LABELS = 2048
"""Labels of all names of one answer together; an answer with more is refused."""
_MAX_NAME = 255
_POINTER = 0xC0

A, CNAME, SOA, TXT, AAAA, SRV, SVCB, HTTPS, ANY = 1, 5, 6, 16, 28, 33, 64, 65, 255
_TYPES = {
    A: "A", 2: "NS", CNAME: "CNAME", SOA: "SOA", 10: "NULL", 12: "PTR", 13: "HINFO", 15: "MX", TXT: "TXT", AAAA: "AAAA",
    SRV: "SRV", 35: "NAPTR", 43: "DS", 46: "RRSIG", 48: "DNSKEY", 52: "TLSA", SVCB: "SVCB", HTTPS: "HTTPS", ANY: "ANY",
    251: "IXFR", 252: "AXFR", 257: "CAA",
}  # fmt: skip
_IN = 1
_RESPONSE, _TRUNCATED, _WANTED, _AVAILABLE, _OPCODE = 0x8000, 0x0200, 0x0100, 0x0080, 0x7800
_HEADER = struct.Struct("!HHHHHH")
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


class Code(IntEnum):
    """Response codes."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5


class Broken(Exception):
    """A message that breaks the rules of DNS, or is larger than any honest one."""


def type_text(kind: int) -> str:
    """The name of a record type; ``TYPE65280`` for one without."""
    return _TYPES.get(kind, f"TYPE{kind}")


@dataclass(frozen=True)
class Question:
    """A client's question; ``name`` as text without its final dot (``.`` is the root), other bytes as ``\\DDD``."""

    id: int
    flags: int
    name: str
    kind: int
    plain: bool
    """Whether it is an ordinary query of the class IN."""
    wire: bytes
    """The question section."""

    def reply(self, code: Code, address: IPv4Address | None = None, ttl: int = 0) -> bytes:
        """The response, with one ``A`` record for ``address``."""
        flags = _RESPONSE | _AVAILABLE | self.flags & (_OPCODE | _WANTED) | code
        head = _HEADER.pack(self.id, flags, 1, 1 if address is not None else 0, 0, 0)
        if address is None:
            return head + self.wire
        return head + self.wire + struct.pack("!HHHIH", 0xC00C, A, _IN, ttl, 4) + address.packed


def read_question(wire: bytes) -> Question:
    """Read a client's message; raises Broken for whatever is no message with one question."""
    if len(wire) < _HEADER.size:
        raise Broken("too short")
    number, flags, questions, *_ = _HEADER.unpack_from(wire)
    if flags & _RESPONSE or questions != 1:
        raise Broken("no question")
    labels, at = _plain_name(wire, _HEADER.size)
    if at + 4 > len(wire):
        raise Broken("no type")
    kind, group = struct.unpack_from("!HH", wire, at)
    plain = group == _IN and not flags & _OPCODE
    return Question(number, flags, _text(labels), kind, plain, wire[_HEADER.size : at + 4])


def refusal(wire: bytes) -> bytes | None:
    """The response REFUSED to a message that is not read: the plain bytes of its question; None for what has none."""
    if len(wire) < _HEADER.size:
        return None
    number, flags, questions, *_ = _HEADER.unpack_from(wire)
    end = wire.find(b"\0", _HEADER.size) + 5
    if flags & _RESPONSE or questions != 1 or not _HEADER.size + 5 <= end <= len(wire):
        return None
    flags = _RESPONSE | _AVAILABLE | flags & (_OPCODE | _WANTED) | Code.REFUSED
    return _HEADER.pack(number, flags, 1, 0, 0, 0) + wire[_HEADER.size : end]


def query(number: int, name: str, kind: int) -> bytes:
    """A recursive query for a normal name, with EDNS for answers up to 1232 bytes."""
    question = b"".join(bytes((len(label),)) + label.encode("ascii") for label in name.split("."))
    head = _HEADER.pack(number, _WANTED, 1, 0, 0, 1)
    return head + question + b"\0" + struct.pack("!HH", kind, _IN) + struct.pack("!BHHIH", 0, 41, 1232, 0, 0)


@dataclass
class Reply:
    """A server's answer: the aliases and addresses of its answer section, by owner in lower case."""

    code: int
    truncated: bool
    aliases: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Target and TTL."""
    addresses: dict[str, list[tuple[Address, int]]] = field(default_factory=dict)
    """Addresses with their TTL."""
    final: bool = False
    """Whether the authority section has a SOA: nothing more is to be found by asking on."""


def answers(wire: bytes, asked: bytes) -> bool:
    """Whether ``wire`` is a response to the query ``asked``: the same number and the same question."""
    if len(wire) < _HEADER.size or wire[:2] != asked[:2] or not wire[2] & 0x80 or wire[4:6] != b"\0\1":
        return False
    end = asked.index(b"\0", _HEADER.size) + 5
    return wire[_HEADER.size : end].lower() == asked[_HEADER.size : end].lower()


def read_reply(wire: bytes, asked: bytes, kind: int) -> Reply:
    """Read the aliases and the addresses of ``kind`` in a response to ``asked`` (see ``answers``); raises Broken."""
    _, flags, _, answer, authority, _ = _HEADER.unpack_from(wire)
    reply = Reply(flags & 15, bool(flags & _TRUNCATED))
    at = asked.index(b"\0", _HEADER.size) + 5
    names = _Names(wire)
    for number in range(min(answer + authority, MAX_RECORDS)):
        start, at = at, _skip_name(wire, at)
        if at + 10 > len(wire):
            raise Broken("half a record")
        found, group, ttl, length = struct.unpack_from("!HHIH", wire, at)
        data, at = at + 10, at + 10 + length
        if at > len(wire):
            raise Broken("half a record")
        if group != _IN:
            continue
        if number >= answer:
            reply.final |= found == SOA
        elif found == CNAME:
            reply.aliases.setdefault(names.read(start), (names.read(data), ttl))
        elif found == kind and length == (4 if kind == A else 16):
            address = (IPv4Address if kind == A else IPv6Address)(wire[data:at])
            reply.addresses.setdefault(names.read(start), []).append((address, ttl))
    return reply


class _Names:
    """Reads the compressed names of one message, with one budget of labels for them all."""

    def __init__(self, wire: bytes) -> None:
        self._wire, self._left = wire, MAX_LABELS

    def read(self, at: int) -> str:
        """The name at an offset, in lower case; a pointer leads backwards only, so each name has an end."""
        wire, limit = self._wire, at
        labels: list[bytes] = []
        size = 1
        while True:
            length = _byte(wire, at)
            if length >= _POINTER:
                at = (length & 0x3F) << 8 | _byte(wire, at + 1)
                if at >= limit:
                    raise Broken("a name that leads forwards")
                limit = at
            elif not length:
                return _text(labels).lower()
            else:
                size += 1 + length
                if length > 63 or size > _MAX_NAME or at + 1 + length > len(wire):
                    raise Broken("no name")
                labels.append(wire[at + 1 : at + 1 + length])
                at += 1 + length
            self._left -= 1
            if self._left < 0:
                raise Broken("too many labels")


def _plain_name(wire: bytes, at: int) -> tuple[list[bytes], int]:
    """An uncompressed name and the offset behind it."""
    labels = []
    start = at
    while length := _byte(wire, at):
        if length > 63 or at + 1 + length - start >= _MAX_NAME:
            raise Broken("no name")
        labels.append(wire[at + 1 : at + 1 + length])
        at += 1 + length
    return labels, at + 1


def _skip_name(wire: bytes, at: int) -> int:
    while length := _byte(wire, at):
        if length >= _POINTER:
            return at + 2
        if length > 63:
            raise Broken("no name")
        at += 1 + length
    return at + 1


def _byte(wire: bytes, at: int) -> int:
    if at >= len(wire):
        raise Broken("too short")
    return wire[at]


def _text(labels: Iterable[bytes]) -> str:
    """Labels as text; a byte that no host name has becomes ``\\DDD``, so that two names never look alike."""
    return ".".join(map(_label, labels)) or "."


def _label(raw: bytes) -> str:
    if _PLAIN.issuperset(raw):
        return raw.decode("ascii")
    return "".join(chr(byte) if byte in _PLAIN else f"\\{byte:03}" for byte in raw)
