# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: Apache-2.0
"""Bytes of the control socket, without any input or output: JSON-RPC 2.0, one message a line.

The daemon answers a line that it cannot read with an error that has no number, and may close the connection after it.
On a connection that carries several calls nobody could say whose line that was. Therefore ``request`` refuses what the
daemon would not read (too long, too deep, too many values, not JSON) before a byte of it is sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from isolator_client.errors import IsolatorError, UsageError, make

REQUEST_LIMIT = 1 << 20
"""Longest request in bytes, without its newline."""

DEPTH_LIMIT = 64
"""Most levels of objects and lists in a request, its own envelope included."""

COMMA_LIMIT = 100_000
"""Most commas in a request, which bounds the number of its values."""

ANSWER_LIMIT = 256 << 20
"""Longest line in bytes that is accepted from the daemon: a guard against a line without end, not against an answer."""

TICKETED = {
    "plugin.stage": (),
    "plugin.commit": ("token",),
    "plugin.update": ("token", "approve"),
    "plugin.approve": ("name", "digest"),
    "plugin.rollback": ("name", "to"),
    "plugin.reject": ("name",),
    "plugin.remove": ("name",),
    "plugin.enable": ("name",),
}
"""Verbs that take a ticket, with the parameters that make its purpose; of ``plugin.stage`` it is the files."""

# Made once: what json.dumps and json.loads do besides takes as long as a short message itself.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
_decode = json.JSONDecoder().raw_decode


class Reply(NamedTuple):
    """An answer; ``number`` is that of the request, or None when the daemon could not read one."""

    number: int | None
    result: dict[str, Any]
    error: IsolatorError | None


class Notification(NamedTuple):
    """A message that the daemon sent by itself."""

    method: str
    params: dict[str, Any]


Message = Reply | Notification


class Lines:
    """Incoming bytes, cut into messages."""

    def __init__(self, limit: int = ANSWER_LIMIT) -> None:
        self._limit = limit
        self._held = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Take the next bytes; returns the messages that they complete. Raises IsolatorError for anything else."""
        if not self._held and 0 < data.find(b"\n") == len(data) - 1:  # as nearly always: one complete line
            return [message_of(data)]
        searched = len(self._held)
        self._held += data
        end = self._held.rfind(b"\n", searched)
        if end < 0:
            if len(self._held) > self._limit:
                raise _foreign(f"sent a line of more than {self._limit} bytes")
            return []
        whole = bytes(self._held[:end])
        del self._held[: end + 1]
        return [message_of(line) for line in whole.split(b"\n") if line]


def request(number: int, method: str, params: Mapping[str, Any]) -> bytes:
    """Write a request as a line, newline included. Raises UsageError for one that the daemon would not read."""
    try:
        return encode(number, method, params)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"request {method}", f"cannot be sent: {error}") from error


def encode(number: int, method: str, params: Mapping[str, Any]) -> bytes:
    """Write a request; raises TypeError, ValueError or RecursionError for one that the daemon would not read."""
    message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
    data = _encode(message).encode()
    if len(data) > REQUEST_LIMIT:
        raise ValueError(f"it has {len(data)} bytes, the limit is {REQUEST_LIMIT}")
    if data.count(b",") > COMMA_LIMIT:
        raise ValueError(f"it has more than {COMMA_LIMIT} values")
    # A level costs a bracket, so nearly every message is proved flat by counting them.
    if data.count(b"[") + data.count(b"{") > DEPTH_LIMIT and _depth(message) > DEPTH_LIMIT:
        raise ValueError(f"it is nested deeper than {DEPTH_LIMIT} levels")
    return data + b"\n"


def message_of(line: bytes) -> Message:
    """Read one line from the daemon. Raises IsolatorError for one that is no message."""
    try:
        text = line.decode().strip()
        message, end = _decode(text)
        if end != len(text):
            raise ValueError("more than one value")
    except (ValueError, RecursionError):
        raise _foreign("sent a line that is not JSON") from None
    if not isinstance(message, dict):
        raise _foreign("sent a line that is no object")
    if isinstance(method := message.get("method"), str):
        return Notification(method, _object(message.get("params")))
    number = message.get("id")
    error = error_of(message["error"]) if "error" in message else None
    return Reply(number if isinstance(number, int) else None, _object(message.get("result")), error)


def error_of(body: Any) -> IsolatorError:
    """Rebuild the exception from the ``error`` of an answer; one without ``data`` keeps its message."""
    body = _object(body)
    data = _object(body.get("data"))
    if not data:
        return IsolatorError(str(body.get("message", "the daemon reported an error without a message")))
    code, what, why, remedy = (str(data.get(key) or "") for key in ("code", "what", "why", "remedy"))
    return make(code or IsolatorError.code, what or "the request failed", why, remedy)


def pauses(first: float = 0.05, longest: float = 5.0) -> Iterator[float]:
    """Yield the seconds to wait before each further attempt: doubled each time, up to ``longest``."""
    pause = first
    while True:
        yield pause
        pause = min(2 * pause, longest)


def _foreign(why: str) -> IsolatorError:
    return IsolatorError("the control socket", why, "check that it is the socket of an Isolator daemon")


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _depth(message: Mapping[str, Any]) -> int:
    """Count the levels of objects and lists, one after the other: no recursion, however deep the message is."""
    depth = 0
    level: list[Any] = [message]
    while level:
        depth += 1
        level = [item for outer in level for item in _items(outer) if isinstance(item, (dict, list, tuple))]
    return depth


def _items(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container
