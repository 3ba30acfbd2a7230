"""Events that come in over HTTP: as CloudEvents from callers with the role ``emitter``, signed from anywhere else.

Of a signed request (Standard Webhooks) nothing is parsed before its signature fits. Whatever is wrong until then gets
the same answer, 401: nobody learns which ingresses there are. A sender whose signature fits learns that a type does not
come in: 403 (RFC 9110, section 15.5.4).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from isolator.errors import DeniedError, UsageError
from isolator.policy.host import Ingress
from isolator.policy.names import covers_hook

MOST_BYTES = 1 << 20
"""Bytes of a request's body."""
WINDOW = 300
"""Seconds that the time of a signed request may differ from now."""
STRUCTURED = "application/cloudevents+json"
_SIGNATURES = 16
_NOBODYS = base64.b64encode(secrets.token_bytes(32)).decode()
"""A secret that nobody has."""
_ID = re.compile(r"[\x21-\x7e]{1,256}")


class UnknownSenderError(DeniedError):
    """A request that no key of its ingress has signed."""


def cloud_event(kind: str, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """Parameters of ``event.emit`` from a CloudEvent, structured or binary; ``kind`` is its content type.

    ``source`` and ``id`` make the dedupe key. Raises UsageError.
    """
    if kind == STRUCTURED:
        fields = _object(body, "CloudEvent")
        data = fields.get("data")
        if "data_base64" in fields:
            raise UsageError("CloudEvent", "data_base64 is not taken", "send a JSON object as data")
    else:
        if kind not in ("application/json", ""):
            why = "is not taken"
            raise UsageError(f"content type {kind}", why, f"send {STRUCTURED}, or application/json with ce- headers")
        fields = {name[3:]: unquote(value) for name, value in headers.items() if name[:3] == "ce-"}
        data = _object(body, "data") if body else None
    for name in ("specversion", "id", "source", "type"):
        value = fields.get(name)
        if not isinstance(value, str) or not value:
            raise UsageError(f"CloudEvent {name}", "is missing or not text", 'specversion is "1.0"')
    if fields["specversion"] != "1.0":
        raise UsageError("CloudEvent specversion", "is not 1.0")
    if data is not None and not isinstance(data, dict):
        raise UsageError("CloudEvent data", "is not a JSON object")
    key = json.dumps([fields["source"], fields["id"]]).encode()
    found: dict[str, Any] = {"name": fields["type"], "payload": data or {}, "dedupe_key": f"ce:{_digest(key)}"}
    if isinstance(trace := fields.get("traceparent"), str):
        found["trace"] = trace[:128]
    return found


def as_many(keys: Sequence[str], of_all: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The keys of one ingress and others that fit nothing, as many as any has: how long it takes tells nobody apart."""
    most = max((len(one) for one in of_all), default=0)
    return (*keys, *[_NOBODYS] * max(1 - len(keys), most - len(keys)))


def signed_event(
    name: str, ingress: Ingress | None, keys: Sequence[str], headers: Mapping[str, str], body: bytes
) -> dict[str, Any]:
    """Parameters of ``event.emit`` from a signed request.

    Raises UnknownSenderError without a good signature, DeniedError for an event that does not come in there, and
    UsageError for a bad signed body.
    """
    number = headers.get("webhook-id", "")
    genuine = _genuine(keys, number, headers, body)  # takes as long for a name that does not exist
    if ingress is None or not genuine:
        why = "there is none of this name, or the signature does not fit"
        raise UnknownSenderError("ingress", why, "see docs/console.md")
    fields = _object(body, "body")
    kind, data = fields.get("type"), fields.get("data", {})
    if not isinstance(kind, str) or not isinstance(data, dict):
        raise UsageError("body", "has no type, or its data is not an object", '{"type": "NAME", "data": {...}}')
    if not any(covers_hook(pattern, kind) for pattern in ingress.events):
        raise DeniedError(f"event {kind[:80]}", f"does not come in at {name}", f"[ingress.{name}] events")
    return {"name": kind, "payload": data, "dedupe_key": f"in:{_digest(f'{name} {number}'.encode())}"}


def _genuine(keys: Sequence[str], number: str, headers: Mapping[str, str], body: bytes) -> bool:
    stamp = headers.get("webhook-timestamp", "")
    sent = [part.partition(",") for part in headers.get("webhook-signature", "").split(" ")[:_SIGNATURES]]
    if not _ID.fullmatch(number) or not re.fullmatch(r"[0-9]{1,12}", stamp, re.ASCII):
        return False
    content = f"{number}.{stamp}.".encode() + body
    fits = False
    for secret in keys:
        try:
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except (binascii.Error, ValueError):
            continue
        if len(key) < 16:
            continue  # a guess, not a secret
        expected = base64.b64encode(hmac.digest(key, content, "sha256")).decode()
        for version, _, signature in sent:
            fits |= version == "v1" and hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace"))
    return fits and abs(time.time() - int(stamp)) <= WINDOW


def _object(body: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UsageError(what, f"is no JSON: {str(error)[:80]}") from None
    if not isinstance(found, dict):
        raise UsageError(what, "is not a JSON object")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
