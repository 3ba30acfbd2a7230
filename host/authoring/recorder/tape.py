"""A recording: requests that a plugin has made and the answers that it got, one JSON object a line, without secrets.

The first line is ``{"isolator_recording": 1}``. Requests are there by method, URL and the digest of their body; their
headers are not kept. Of several answers to the same request each is played once, in order, and the last for ever.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

FORMAT = 1
MOST_BYTES, MOST_ENTRIES, MOST_BODY = 64 << 20, 10_000, 1 << 20
MOST_SHOWN = 64 * 1024
"""Bytes of a request's body that are shown."""
REDACTED = "[redacted]"
_SENSITIVE = re.compile(r"authoriz|cookie|token|secret|signature|api[-_]?key|passw|credential", re.IGNORECASE)
_SHORTEST = 4
"""Characters of a secret below which it is not looked for: it would be found everywhere."""
_DROPPED = frozenset({
    "connection", "keep-alive", "proxy-connection", "proxy-authenticate", "te", "trailer", "transfer-encoding",
    "upgrade", "content-length", "content-encoding", "alt-svc",
})  # fmt: skip
"""Headers of an answer that belong to its connection, or to bytes that are not kept."""


class RecordingError(ValueError):
    """A recording that cannot be used: the sentence says which line and why."""


@dataclass(frozen=True)
class Request:
    """A request as a recording has it."""

    method: str
    url: str
    body: str
    """SHA-256 of its body"""


@dataclass(frozen=True)
class Response:
    """An answer as a recording has it."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


class Redactor:
    """Takes secrets out: values that are known, and values of fields whose names say so."""

    def __init__(self) -> None:
        self._values: list[tuple[bytes, bytes]] = []

    def know(self, secrets: Mapping[str, str]) -> None:
        """Look for these values, each in the forms in which requests have it, and put its key in its place."""
        found: dict[bytes, bytes] = {}
        for key, value in secrets.items():
            for form in _forms(value.strip()):
                if len(form) >= _SHORTEST:
                    found[form.encode()] = f"[redacted:{key}]".encode()
        self._values = sorted(found.items(), key=lambda item: -len(item[0]))

    def url(self, url: str) -> str:
        """An address as it is kept; one that is kept already stays as it is."""
        before, mark, query = self._text(url).partition("?")
        if any(_SENSITIVE.search(name) for name, _ in parse_qsl(query, keep_blank_values=True)):
            query = _form(query)
        return before + mark + query

    def request(self, method: str, url: str, body: bytes) -> Request:
        """A request as it is kept."""
        return Request(method, self.url(url), hashlib.sha256(self._bytes(body)).hexdigest())

    def shown(self, body: bytes) -> str:
        """The beginning of a request's body, for its author's eyes."""
        return self._bytes(body)[:MOST_SHOWN].decode(errors="replace")

    def response(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> Response:
        """An answer as it is kept."""
        kept = [(name.lower(), value) for name, value in headers if name.lower() not in _DROPPED]
        kind = next((value for name, value in kept if name == "content-type"), "").lower()
        shown = tuple((name, REDACTED if _SENSITIVE.search(name) else self._text(value)) for name, value in kept)
        return Response(status, shown, self._bytes(_without_fields(body, kind)))

    def _bytes(self, data: bytes) -> bytes:
        for value, place in self._values:
            data = data.replace(value, place)
        return data

    def _text(self, text: str) -> str:
        return self._bytes(text.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def to_line(request: Request, response: Response) -> str:
    """One exchange as a line."""
    try:
        body = {"body": response.body.decode()}
    except UnicodeDecodeError:
        body = {"body_base64": base64.b64encode(response.body).decode()}
    return json.dumps({
        "request": {"method": request.method, "url": request.url, "body_sha256": request.body},
        "response": {"status": response.status, "headers": [list(pair) for pair in response.headers], **body},
    })  # fmt: skip


class Tape:
    """The answers of a recording."""

    def __init__(self, text: bytes) -> None:
        """Read a recording; raises RecordingError."""
        if len(text) > MOST_BYTES:
            raise RecordingError(f"it is larger than {MOST_BYTES >> 20} MiB")
        lines = text.splitlines()
        if not lines or _json(lines[0], 1) != {"isolator_recording": FORMAT}:
            raise RecordingError(f'its first line is not {{"isolator_recording": {FORMAT}}}')
        if len(lines) > MOST_ENTRIES + 1:
            raise RecordingError(f"it has more than {MOST_ENTRIES} answers")
        self._entries = [
            _entry(_json(line, number), number) for number, line in enumerate(lines[1:], 2) if line.strip()
        ]
        self._answers: dict[object, list[Response]] = {}
        self._played: dict[object, int] = {}
        self.hide(Redactor())

    def hide(self, redactor: Redactor) -> None:
        """Find requests by their addresses without these secrets, too: somebody may have written them there."""
        self._answers.clear()
        for request, response in self._entries:
            url = redactor.url(request.url)
            for key in (Request(request.method, url, request.body), (request.method, url)):
                self._answers.setdefault(key, []).append(response)

    def play(self, request: Request) -> Response | None:
        """The next answer to this request; to one with another body, if none was recorded with this one."""
        key: object = request if request in self._answers else (request.method, request.url)
        answers = self._answers.get(key)
        if answers is None:
            return None
        index = self._played.get(key, 0)
        self._played[key] = index + 1
        return answers[min(index, len(answers) - 1)]


def _forms(value: str) -> Iterable[str]:
    """The forms in which a secret stands in requests and answers."""
    yield value
    yield quote(value, safe="")
    yield quote(value)
    yield json.dumps(value)[1:-1]
    yield base64.b64encode(value.encode("utf-8", "surrogateescape")).decode()
    parts = urlsplit(value) if "://" in value else None
    if parts is not None:  # an address that is secret is asked for by its path
        rest = parts._replace(scheme="", netloc="", fragment="").geturl()
        yield rest
        yield rest.removeprefix("/")
        yield from filter(None, (parts.username, parts.password))


def _form(text: str) -> str:
    pairs = parse_qsl(text, keep_blank_values=True)
    return urlencode([(name, REDACTED if _SENSITIVE.search(name) else value) for name, value in pairs], safe="[]:")


def _without_fields(body: bytes, kind: str) -> bytes:
    """A body without the values of fields whose names say that they are secret."""
    try:
        if "json" in kind:
            value = json.loads(body)
            cleared = _cleared(value)
            return body if cleared == value else json.dumps(cleared).encode()
        if "form-urlencoded" in kind and _SENSITIVE.search(body.decode()):
            return _form(body.decode()).encode()
    except (ValueError, RecursionError):
        pass  # not what it says it is
    return body


def _cleared(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: REDACTED if isinstance(inner, str) and _SENSITIVE.search(key) else _cleared(inner)
            for key, inner in value.items()
        }  # fmt: skip
    return [_cleared(inner) for inner in value] if isinstance(value, list) else value


def _json(line: bytes, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise RecordingError(f"line {number} is not JSON") from None


def _entry(found: Any, number: int) -> tuple[Request, Response]:
    try:
        asked, answered = found["request"], found["response"]
        request = Request(asked["method"], asked["url"], asked["body_sha256"])
        texts = [request.method, request.url, request.body]
        headers = tuple((name, value) for name, value in answered["headers"])
        texts += [text for pair in headers for text in pair]
        status, encoded = answered["status"], answered.get("body_base64")
        body = answered["body"].encode() if encoded is None else base64.b64decode(encoded, validate=True)
        if not all(isinstance(text, str) for text in texts) or type(status) is not int or not 200 <= status <= 599:
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error):
        raise RecordingError(f"line {number} is no exchange of a recording") from None
    return request, Response(status, headers, body)
