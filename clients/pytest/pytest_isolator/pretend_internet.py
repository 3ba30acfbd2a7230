# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: 0BSD
"""Answers in the place of the names that a plugin was granted, as a recording that ``isolator dev`` plays."""

from __future__ import annotations

import json as encoding
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sent:
    """A request that the plugin has made; values of its secret config are redacted in it."""

    method: str
    url: str
    body: str
    status: int
    """of the answer that it got; 504 where there was none to give"""


class PretendInternet:
    """See the module."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "answers.jsonl"
        self._lines = [encoding.dumps({"isolator_recording": 1})]
        self._playing = False
        self.requests: list[Sent] = []

    def answer(
        self, method: str, url: str, *, status: int = 200, headers: Mapping[str, str] | None = None, json: Any = None,
        text: str | None = None,
    ) -> None:  # fmt: skip
        """Answer such requests so. Raises RuntimeError once a sidecar has started: it has its answers then."""
        if self._playing:
            raise RuntimeError("pretend_internet.answer() comes before the sidecar starts")
        sent = dict(headers or {})
        if json is not None:
            sent.setdefault("content-type", "application/json")
            text = encoding.dumps(json)
        request = {"method": method.upper(), "url": url, "body_sha256": ""}
        response = {"status": status, "headers": [list(pair) for pair in sent.items()], "body": text or ""}
        self._lines.append(encoding.dumps({"request": request, "response": response}))

    def recording(self) -> Path:
        """The file to play."""
        if not self._playing:
            self._playing = True
            self._file.write_text("\n".join(self._lines) + "\n")
        return self._file

    def note(self, exchange: Mapping[str, Any]) -> None:
        """Keep a request that was made."""
        self.requests.append(Sent(exchange["method"], exchange["url"], exchange["body"], exchange["status"]))
