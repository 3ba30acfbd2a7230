"""The trail as the daemon streams it: refusals of the last minutes, invocations, calls of tools."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from datetime import datetime

from host.cli import invocations
from host.cli.denials import REFUSALS, refused
from host.client.client import Client
from isolator.audit import files
from isolator.audit.record import parse
from isolator.audit.schema import ToolCalled
from isolator.errors import IsolatorError, UnavailableError

WINDOW = 600.0
"""Seconds for which a refusal is counted."""
BEGIN = 10_000
"""Newest records among which those of before are looked for (``MAX_RECORDS``)."""
MOST = 100_000
"""Refusals that are kept; many of one kind within a second are one record."""
AGAIN = 1.0
"""Seconds until the daemon is asked again."""
_MARKS = tuple(f'"type":"{kind}"' for kind in (*REFUSALS, *invocations.TYPES, ToolCalled.TYPE))


class Trail:
    """The trail, followed in a thread that ends with the process."""

    def __init__(self, root: str | None) -> None:
        self._root = root
        self._seen: deque[tuple[float, str, int]] = deque(maxlen=MOST)
        """Unix time, plugin and number of each."""
        self.invocations = invocations.Invocations()
        self.calls: Counter[str] = Counter()
        """Calls of each plugin's tools that have ended."""
        self._seq: int | None = None
        self._caught_up = threading.Event()
        threading.Thread(target=self._run, name="trail", daemon=True).start()

    def wait(self, seconds: float) -> None:
        """Wait until the records of before have been read, or cannot be."""
        self._caught_up.wait(seconds)

    def denials(self) -> Counter[str] | None:
        """How many refusals of each plugin there were in ``WINDOW`` seconds; None when the trail cannot be followed."""
        if self._seq is None:
            return None
        oldest = time.time() - WINDOW
        found: Counter[str] = Counter()
        for at, plugin, count in tuple(self._seen):
            if at >= oldest:
                found[plugin] += count
        return found

    def _run(self) -> None:
        while True:
            try:
                self._follow()
            except IsolatorError as error:
                self._caught_up.set()
                if not isinstance(error, UnavailableError):  # no longer the trail that it was, or not for this user
                    self._seq = None
                    self._seen.clear()
            time.sleep(AGAIN)

    def _follow(self) -> None:
        with Client(self._root) as client:
            wanted = {"lines": BEGIN} if self._seq is None else {"after": self._seq}
            answer = client.call("audit.follow", **wanted)
            self._seq = answer["after"]
            if self._seq >= answer["last"]:
                self._caught_up.set()
            for notification in client.notifications():
                for line in notification.get("lines", ()):
                    self._take(line)
                if self._seq >= answer["last"]:
                    self._caught_up.set()

    def _take(self, line: str) -> None:
        raw = line.encode("ascii", "replace")
        self._seq = files.seq_of(raw) or self._seq
        if not any(mark in line for mark in _MARKS):
            return
        record = parse(raw)
        if record is None:
            return
        count = record.data.get("count", 1)
        number = count if isinstance(count, int) else 1
        if record.type in invocations.TYPES:
            self.invocations.take(record.type, record.plugin, record.run, record.data)
        elif record.plugin is None:
            return
        elif record.type == ToolCalled.TYPE:
            self.calls[record.plugin] += number
        elif refused(record):
            self._seen.append((datetime.fromisoformat(record.time).timestamp(), record.plugin, number))
