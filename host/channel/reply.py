"""Requests to a sidecar, and the outcomes that its replies mean.

``oneshot`` connects per event and sends one line; ``stream`` keeps one connection with many requests in flight. Both
raise ``NotSentError`` when the plugin cannot have seen a byte (no attempt is counted) and ``LostError`` when it may
have (the outcome is unknown: at least once means that the event is delivered again).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from host.events import EventType
from host.queue.interface import Event
from host.wire.strict_json import WireError, dumps, parse_object

ONESHOT_REQUEST = 4096
"""Bytes of a one-shot request, newline included: scripts of that kind call recv(4096) once."""
ONESHOT_REPLY = 64 * 1024
STREAM_MESSAGE = 1 << 20

RETRY_LATER, PERMANENT, UNSUPPORTED_PROTOCOL, PAYLOAD_TOO_LARGE, DEADLINE_EXCEEDED = range(-31000, -31005, -1)
BUSY, DUPLICATE, CONFIG_INVALID = range(-31006, -31009, -1)
PERMISSION_DENIED, QUOTA_EXCEEDED = -31010, -31011

# Errors that no repetition mends: "unknown method" and "bad params" of the standard, and permanent refusals.
_PERMANENT = {PERMANENT, UNSUPPORTED_PROTOCOL, PAYLOAD_TOO_LARGE, CONFIG_INVALID, -32601, -32602}

SHORTEST_PAUSE = 0.1
"""Seconds before another attempt, also where the plugin asks for none."""
Kind = Literal["ok", "skipped", "retry", "busy", "rejected", "failed", "unknown"]


class NotSentError(Exception):
    """A request of which nothing reached the plugin."""


class LostError(Exception):
    """A request that may have reached the plugin and has no reply that can be used.

    ``crash``: the connection broke; ``answered``: there was a reply, too long to be read.
    """

    def __init__(self, why: str, *, crash: bool = False, answered: bool = False) -> None:
        super().__init__(why)
        self.crash, self.answered = crash, answered

    @property
    def outcome(self) -> Outcome:
        """The outcome of the attempt."""
        return Outcome("failed", "bad_reply", str(self)) if self.answered else Outcome("unknown", detail=str(self))


class Outcome(NamedTuple):
    """Outcome of an attempt; ``text`` is the plugin's reply, not yet redacted, ``size`` its bytes."""

    kind: Kind
    status: str | None = None
    detail: str | None = None
    text: str = ""
    size: int = 0
    sha256: str | None = None
    retry_after: float | None = None
    """Seconds; a tenth of one at least, and ten minutes at most."""


def build_params(event: Event, event_type: EventType | None, major: int) -> dict[str, Any]:
    """Build ``params``: the payload as a plugin of that major knows it."""
    fields = parse_object(event.payload.encode())
    return event_type.translate(fields, major) if event_type is not None else fields


def is_plain(event_type: EventType | None, major: int) -> bool:
    """Whether a plugin of that major gets payloads as they were accepted."""
    return event_type is None or major >= event_type.version


def params_text(event: Event, event_type: EventType | None, major: int, meta: Mapping[str, Any] | None = None) -> str:
    """Build ``params`` as JSON, with ``_meta`` if there is one; a payload that needs no translation is not parsed."""
    body = event.payload if is_plain(event_type, major) else dumps(build_params(event, event_type, major))
    if meta is None:
        return body
    return f'{body[:-1]}{"" if body == "{}" else ","}"_meta":{dumps(meta)}}}'


def meta_of(event: Event, attempt: int, timeout: float, epoch: int = 0) -> dict[str, Any]:
    """Build ``params._meta`` of an attempt; ``timeout`` in seconds, ``epoch`` of the lease under which it is made."""
    meta: dict[str, Any] = {
        "id": event.id,
        "type": event.name,
        "time": event.time,
        "attempt": attempt,
        "deadline_ms": round(timeout * 1000),
    }
    if event.trace is not None:
        meta["traceparent"] = event.trace
    if epoch:
        meta["epoch"] = epoch
    return meta


def event_params(
    event: Event, event_type: EventType | None, major: int, attempt: int, timeout: float, epoch: int = 0
) -> str:  # fmt: skip
    """``params_text`` of an attempt with its ``meta_of``: made once of an event that goes to many plugins as it is."""
    if is_plain(event_type, major):
        return _plain_params(event, attempt, timeout, epoch)
    return params_text(event, event_type, major, meta_of(event, attempt, timeout, epoch))


@functools.lru_cache(maxsize=2)
def _plain_params(event: Event, attempt: int, timeout: float, epoch: int) -> str:
    return params_text(event, None, 0, meta_of(event, attempt, timeout, epoch))


def oneshot_request(
    event: Event,
    hook: str,
    event_type: EventType | None,
    *,
    attempt: int,
    timeout: float,
    major: int,
    meta: bool,
    epoch: int = 0,
) -> bytes | None:
    """Build the line to send, at most ``ONESHOT_REQUEST`` bytes; None if even the required fields do not fit.

    ``_meta`` is dropped first, then the optional fields in the event's published order. The JSON-RPC id is always 1:
    there is one request per connection, and scripts that answer with a fixed id are many.
    """
    head = f'{{"jsonrpc":"2.0","method":"{hook}","params":'
    tail = ',"id":1}\n'
    if meta:
        line = (head + event_params(event, event_type, major, attempt, timeout, epoch) + tail).encode()
        if len(line) <= ONESHOT_REQUEST:
            return line
    line = (head + params_text(event, event_type, major) + tail).encode()
    if len(line) <= ONESHOT_REQUEST:
        return line
    fields = build_params(event, event_type, major)
    for name in event_type.optional_fields() if event_type is not None else ():
        if fields.pop(name, None) is not None:
            line = (head + dumps(fields) + tail).encode()
            if len(line) <= ONESHOT_REQUEST:
                return line
    return None


def read_reply(data: bytes, *, expect: object = 1) -> Outcome:
    """Read a reply; anything that is no JSON-RPC reply to our request is a failed attempt.

    One that ends too early may have been cut off by the plugin's death: its outcome is unknown.
    """
    try:
        message = parse_object(data.strip())
    except WireError as error:
        kind: Kind = "unknown" if "EOF while parsing" in str(error) and data.strip() else "failed"
        return _outcome(data, kind, "bad_reply", str(error))
    if message.get("id", expect) not in (expect, None):
        return _outcome(data, "failed", "bad_reply", "the reply has another request's id")
    return judge_reply(message, data)


def judge_reply(message: Mapping[str, Any], data: bytes) -> Outcome:
    """Judge a JSON-RPC reply to our request, whose bytes are ``data``."""
    return _outcome(data, *interpret(message))


def _outcome(
    data: bytes, kind: Kind, status: str | None, detail: str | None, retry_after: float | None = None
) -> Outcome:  # fmt: skip
    text, digest = data.decode("utf-8", "replace"), hashlib.sha256(data).hexdigest()
    return Outcome(kind, status, detail, text, len(data), digest, retry_after)


def interpret(message: Mapping[str, Any]) -> tuple[Kind, str | None, str | None, float | None]:
    """Interpret a JSON-RPC reply: (kind, status, detail, seconds to wait before the next attempt).

    Status and detail are the plugin's, whole: to be redacted before they are cut.
    """
    error = message.get("error")
    if error is not None:
        return _interpret_error(error)
    if "result" not in message:
        return "failed", "bad_reply", "the reply has neither result nor error", None
    result = message["result"]
    if not isinstance(result, dict):
        return "ok", "ok", None, None
    status = result.get("status")
    detail = _text(result.get("message"))
    if status == "retry":
        return "retry", "retry", detail, _seconds(result.get("retry_after_ms"))
    if status == "rejected":
        return "rejected", "rejected", detail, None
    if status == "skipped":
        return "skipped", "skipped", detail, None
    return "ok", _text(status) or "ok", detail, None


def _interpret_error(error: Any) -> tuple[Kind, str | None, str | None, float | None]:
    if not isinstance(error, dict) or not isinstance(error.get("code"), int):
        return "failed", "bad_reply", "the error has no code", None
    code = error["code"]
    detail = f"{code}: {_text(error.get('message')) or 'no message'}"
    data = error.get("data")
    wait = _seconds(data.get("retry_after_ms")) if isinstance(data, dict) else None
    if code == DUPLICATE:
        return "ok", "duplicate", detail, None
    if code == BUSY:
        return "busy", "busy", detail, wait
    if code in _PERMANENT:
        return "rejected", "error", detail, None
    return "retry", "error", detail, wait


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def shown(text: str, redact: Callable[[str], str], most: int = 400) -> str:
    """A plugin's text as records and listings show it: redacted, then cut, then made printable."""
    cut = redact(text)[:most]
    return cut if cut.isprintable() else "".join(c if c.isprintable() else " " for c in cut)


def _seconds(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        return None
    return max(SHORTEST_PAUSE, min(value, 600_000) / 1000)  # a larger integer may be none that a float can hold
