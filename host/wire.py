"""JSON from people we do not trust, and the lines it travels in.

``parse`` accepts exactly one JSON value of bounded depth, in valid UTF-8, without NaN or infinities; everything
else is a ``WireError`` whose text is safe to show. ``LineProtocol`` cuts a byte stream into lines of bounded
length: a peer that sends no newline costs at most ``limit`` bytes, a peer that does not read its answers is
paused, and a peer that breaks a rule is told once and cut off.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import struct
from typing import Any

import pydantic_core

MAX_DEPTH = 64

# Only such numbers can overflow to infinity, which the JSON reader itself lets pass.
_HUGE = re.compile(rb"[eE]\+?0*[1-9][0-9]{2}|[0-9]{300}")


class WireError(ValueError):
    """The bytes are not what the protocol allows; ``code`` is the JSON-RPC error code."""

    def __init__(self, why: str, code: int = -32700) -> None:
        super().__init__(why)
        self.code = code


def parse(data: bytes, *, max_depth: int = MAX_DEPTH) -> Any:
    """One JSON value, strictly; raises WireError."""
    try:
        value = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise WireError(f"not valid JSON: {_short(str(error))}") from None
    # Each level needs an opening bracket, so few brackets prove the depth without walking the value.
    if data.count(b"[") + data.count(b"{") > max_depth and _deeper(value, max_depth):
        raise WireError(f"nested deeper than {max_depth} levels")
    if _HUGE.search(data) and _infinite(value):
        raise WireError("a number is too large")
    return value


def parse_object(data: bytes, *, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """As ``parse``; the value must be an object."""
    value = parse(data, max_depth=max_depth)
    if not isinstance(value, dict):
        raise WireError("not a JSON object", -32600)
    return value


def dumps(value: Any) -> str:
    """Compact JSON as it goes on the wire."""
    return _encode(value).decode()


def line(value: Any) -> bytes:
    """One JSON line, newline included."""
    return _encode(value) + b"\n"


def _encode(value: Any) -> bytes:
    try:
        return pydantic_core.to_json(value)
    except pydantic_core.PydanticSerializationError:
        # Half a surrogate pair, as file names may hold: escaped, so that what is sent is valid UTF-8.
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def peer_of(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process at the other end, as the kernel recorded it at connect or listen."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid


class LineProtocol(asyncio.Protocol):
    """Newline-framed messages on a stream; subclasses implement ``line_received``."""

    limit = 1 << 20
    """Longest line in bytes."""
    write_high = 1 << 20
    """Unsent answers beyond this pause reading."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._partial: list[bytes] = []
        self._size = 0
        self._held: set[str] = set()

    def line_received(self, data: bytes) -> None:
        """One complete line without its newline."""
        raise NotImplementedError

    def too_long(self) -> None:
        """A line exceeded ``limit``; the connection is closed after this returns."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=self.write_high)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._partial.clear()

    def data_received(self, data: bytes) -> None:
        head, newline, rest = data.partition(b"\n")
        while newline:
            if self._partial:
                head = b"".join((*self._partial, head))
                self._partial.clear()
            self._size = 0
            if len(head) > self.limit:
                return self._overflow()
            if head:
                self.line_received(head)
            if self.transport is None or self.transport.is_closing():
                return None
            head, newline, rest = rest.partition(b"\n")
        if head:
            self._partial.append(head)
            self._size += len(head)
            if self._size > self.limit:
                return self._overflow()
        return None

    def pause_writing(self) -> None:
        self.hold("unread answers")

    def resume_writing(self) -> None:
        self.unhold("unread answers")

    def hold(self, why: str) -> None:
        """Read nothing more until every reason is gone."""
        if not self._held and self.transport is not None:
            self.transport.pause_reading()
        self._held.add(why)

    def unhold(self, why: str) -> None:
        """One reason is gone."""
        if why in self._held:
            self._held.discard(why)
            if not self._held and self.transport is not None and not self.transport.is_closing():
                self.transport.resume_reading()

    def send(self, data: bytes) -> None:
        """Write bytes if the peer is still there."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """Close after what was written has been sent."""
        if self.transport is not None:
            self.transport.close()

    def _overflow(self) -> None:
        self._partial.clear()
        self._size = 0
        self.too_long()
        self.close()


def _deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        following: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                following.extend(item.values())
            elif isinstance(item, list):
                following.extend(item)
        if not following:
            return False
        level = following
    return any(isinstance(item, (dict, list)) for item in level)


def _infinite(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_infinite(item) for item in value.values())
    if isinstance(value, list):
        return any(_infinite(item) for item in value)
    return isinstance(value, float) and math.isinf(value)


def _short(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "..."
