"""Platforms that emit on one host each, whenever it takes something, and know what was accepted."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from host.client.client import Client
from isolator.errors import IsolatorError

KEYS = 40


class Platform:
    """A platform on the host with a root: ``rate`` events a second, ``most`` altogether, keys by ``seed``.

    What it could not emit in time, while its host took nothing, it emits afterwards, four times as fast.
    """

    def __init__(self, root: Path, name: str, rate: float, most: int, seed: int) -> None:
        self.accepted: list[str] = []
        """Ids of events."""
        self.unanswered = 0
        """How often a call had no answer, or another one."""
        self._root, self._name, self._pause, self._most = root, name, 1 / rate, most
        self._random, self._stop, self._calls = random.Random(seed), threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._emit)
        self._thread.start()

    def close(self) -> None:
        """Emit no more."""
        self._stop.set()
        self._thread.join()

    def silent(self) -> contextlib.AbstractContextManager[object]:
        """A time in which it emits nothing; begins when no call is under way."""
        return self._calls

    def _emit(self) -> None:
        self._number, self._began = 0, time.monotonic()
        while not self._stop.is_set() and self._number < self._most:
            with contextlib.suppress(IsolatorError, OSError, ValueError):
                self._emit_on_one_connection()
                return
            self.unanswered += 1
            self._stop.wait(0.2)

    def _left(self) -> float:
        """Seconds until the next event."""
        return max(self._pause / 4, self._began + (self._number + 1) * self._pause - time.monotonic())

    def _emit_on_one_connection(self) -> None:
        with Client(self._root, timeout=5) as client:
            while self._number < self._most and not self._stop.wait(self._left()):
                self._number += 1
                payload = {
                    "project_id": f"k{self._random.randrange(KEYS)}", "deployment_id": f"{self._name}-{self._number}",
                    "url": "https://shop.example", "duration_ms": 1,
                }  # fmt: skip
                with self._calls:
                    # Unanswered it counts as not accepted, whatever became of it.
                    self.accepted.append(str(client.call("event.emit", name="deploy.completed", payload=payload)["id"]))


@contextlib.contextmanager
def platforms(roots: dict[str, Path], rate: float, most: int = 1 << 40, seed: int = 0) -> Iterator[Sequence[Platform]]:
    """A platform on each host, by its name."""
    made = [Platform(root, name, rate, most, seed + at) for at, (name, root) in enumerate(roots.items())]
    try:
        yield made
    finally:
        for one in made:
            one.close()
