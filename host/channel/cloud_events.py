"""Events as HTTP requests, and the outcomes that answers to them mean.

Events go out as CloudEvents 1.0 in binary mode: the payload is the body, the rest is headers (``ce-*``). A plugin whose
manifest names a secret also gets the headers of Standard Webhooks, by which its libraries know the sender.
"""

from __future__ import annotations

import base64
import binascii
import email.utils
import hashlib
import hmac
import re
from datetime import UTC, datetime
from typing import Any

from host.channel.http import Headers, Response
from host.channel.reply import SHORTEST_PAUSE, Outcome, interpret
from host.queue.interface import Event
from host.wire.strict_json import WireError, parse_object

DUPLICATE, GONE = 409, 410
RETRY = frozenset({408, 425, 429})
LONGEST_PAUSE = 600.0
"""Seconds of a ``Retry-After`` that are granted."""
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""As W3C Trace Context has it."""


def event_headers(event: Event, hook: str, source: str, *, key: str, attempt: int, epoch: int = 0) -> Headers:
    """The headers of an event, but for a signature; ``source`` is the platform's, ``key`` the delivery's order key."""
    attributes = {
        "specversion": "1.0",
        "id": event.id,
        "source": source,
        "type": hook,
        "time": event.time,
        "subject": key.partition("=")[2],
        "attempt": str(attempt),
        "traceparent": event.trace or "",
        "epoch": str(epoch) if epoch else "",
    }
    headers = [(f"ce-{name}", _escape(value)) for name, value in attributes.items() if value]
    headers.append(("content-type", "application/json"))
    if event.trace and _TRACEPARENT.fullmatch(event.trace):  # an emitter may name any text
        headers.append(("traceparent", event.trace))
    return headers


def outcome_of(response: Response) -> Outcome:
    """The outcome that an answer means."""
    text, sha256 = response.body.decode("utf-8", "replace"), hashlib.sha256(response.body).hexdigest()
    result = _result(response)
    status, size = response.status, len(response.body)
    named = result.get("status") if result is not None else None
    _, word, message, _ = interpret({"result": result})
    detail = message or f"HTTP {status}"
    if 200 <= status < 300:
        return Outcome("ok", word if isinstance(named, str) else "ok", message, text, size, sha256)
    if status == DUPLICATE:
        return Outcome("ok", "duplicate", message, text, size, sha256)
    if status == GONE:
        return Outcome("busy", "gone", detail, text, size, sha256, SHORTEST_PAUSE)
    if status in RETRY or status >= 500:
        return Outcome("retry", str(status), detail, text, size, sha256, _pause(response.retry_after))
    return Outcome("rejected", str(status), detail, text, size, sha256)


def _result(response: Response) -> dict[str, Any] | None:
    if not response.whole or not response.body.lstrip().startswith(b"{"):
        return None
    try:
        return parse_object(response.body.strip())
    except WireError:
        return None


def _pause(retry_after: str | None) -> float | None:
    """Seconds of a ``Retry-After`` (RFC 9110: a number of them, or a date); None where it has neither."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        seconds = float(retry_after[:9])
    else:
        try:
            date = email.utils.parsedate_to_datetime(retry_after)
        except (ValueError, OverflowError):
            return None
        date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return min(max(seconds, SHORTEST_PAUSE), LONGEST_PAUSE)


def _escape(value: str) -> str:
    """An attribute as a header (CloudEvents, HTTP binding 3.1.3.2): what is not plainly printable, in percents."""
    plain = (c if 0x21 <= ord(c) <= 0x7E and c not in '"%' else None for c in value)
    return "".join(
        c if c is not None else "".join(f"%{byte:02X}" for byte in value[i].encode()) for i, c in enumerate(plain)
    )


def sign(secret: str, message: str, at: int, body: bytes) -> Headers:
    """The headers of Standard Webhooks; a secret is base64, mostly after ``whsec_``, or any other text as it is."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = secret.encode()
    signature = hmac.new(key, f"{message}.{at}.".encode() + body, hashlib.sha256).digest()
    return [
        ("webhook-id", message),
        ("webhook-timestamp", str(at)),
        ("webhook-signature", f"v1,{base64.b64encode(signature).decode()}"),
    ]
