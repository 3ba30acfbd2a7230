"""Both sides of the ledger: what a platform had acknowledged, and what each plugin wrote down."""

from __future__ import annotations

import bisect
import contextlib
import math
import random
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from host.client.client import Client
from isolator.errors import IsolatorError
from tests.support.sidecars import raw, stream
from tests.support.timeouts import seconds
from tests.system.daemon import EVENT, Daemon, write_plugin

KEYS = 6
NOTE = """
def note(params):
    import time
    meta = params["_meta"]
    line = f"{meta['id']} {meta['attempt']} {params['deployment_id']} {time.time()}\\n".encode()
    with open(os.environ["PLUGIN_STATE_DIR"] + "/seen", "ab", buffering=0) as seen:
        seen.write(line)
"""
_ONESHOT = """
try:
    request = json.loads(connection.recv(4096))
    note(request["params"])
    RESULT
    connection.sendall(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}).encode() + b"\\n")
except (OSError, ValueError):
    pass
connection.close()
"""
_DONE = 'result = {"status": "ok"}'
_UNSURE = (
    'first = request["params"]["_meta"]["attempt"] == 1 and request["params"]["deployment_id"].endswith("7")\n'
    '    result = {"status": "retry", "retry_after_ms": 50} if first else {"status": "ok"}'
)
STREAMS = stream('note(params)\nsend(id=id, result={"status": "ok"})', first=NOTE)
PLUGINS: dict[str, tuple[str, dict[str, Any]]] = {
    "oneshot": (raw(_ONESHOT.replace("RESULT", _DONE), first=NOTE), {}),
    "unsure": (raw(_ONESHOT.replace("RESULT", _UNSURE), first=NOTE), {}),
    "streams": (STREAMS, {"transport": {"mode": "stream"}}),
    "renewed": (STREAMS, {"transport": {"mode": "stream"}}),
}
"""``unsure`` asks for every tenth event again; ``renewed`` is removed, and another takes its name."""
LASTING = ("oneshot", "unsure", "streams")


class Note(NamedTuple):
    """One thing that a plugin was given: the event, which attempt, the event's number, and the Unix time."""

    event: str
    attempt: int
    number: int
    time: float


@dataclass
class Life:
    """A host process in the trail: the times of its first and of its last record."""

    first: float
    last: float


@dataclass
class Recorded:
    """Attempts on record, by plugin, and what explains those that are not."""

    attempts: set[tuple[str, str, int]] = field(default_factory=set)
    lives: list[Life] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Times of the gaps that have no count: a process has died, and what it had not handed over is lost."""

    @classmethod
    def read(cls, trail: Iterable[dict[str, Any]]) -> Recorded:
        """Take it from the records of a trail."""
        found, sessions = cls(), dict[str, Life]()
        for record in trail:
            at = datetime.fromisoformat(record["time"]).timestamp()
            if record["type"] == "event.dispatched":
                found.attempts.add((record["plugin"], record["event_id"], record["data"]["attempt"]))
            elif record["type"] == "audit.gap" and record["data"]["count"] is None:
                found.gaps.append(at)
            source, _, number = record["origin"].partition(":")
            if source == "host":
                life = sessions.setdefault(number.partition(":")[0], Life(at, at))
                life.first, life.last = min(life.first, at), max(life.last, at)
        found.lives = sorted(sessions.values(), key=lambda life: life.first)
        return found

    def lost_with_its_host(self, moment: float) -> bool:
        """Whether nothing that the host of that moment recorded later is there either, and a gap says so."""
        index = bisect.bisect_right(self.lives, moment, key=lambda life: life.first) - 1
        begun = self.lives[index].last if index >= 0 else 0.0
        ended = self.lives[index + 1].last if index + 1 < len(self.lives) else math.inf
        return begun < moment and any(begun < gap <= ended for gap in self.gaps)


class Sender:
    """A platform that emits whenever it may, and knows what was acknowledged, in the order in which it was."""

    def __init__(self, root: Path, rate: float) -> None:
        self.acknowledged: list[tuple[str, int]] = []
        """Id and number of each event."""
        self.number = 0
        self._root, self._pause, self._stop = root, 1 / rate, threading.Event()
        self._thread = threading.Thread(target=self._emit)

    def __enter__(self) -> Sender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _emit(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(IsolatorError, OSError, ValueError), Client(self._root, timeout=5) as client:
                while not self._stop.wait(self._pause):
                    self.number += 1
                    key = f"p{self.number % KEYS}"
                    payload = EVENT | {"deployment_id": f"d{self.number}", "project_id": key}
                    # Unanswered it counts as not acknowledged, whatever became of it.
                    answer = client.call("event.emit", name="deploy.completed", payload=payload)
                    self.acknowledged.append((str(answer["id"]), self.number))
            self._stop.wait(0.1)


def add(d: Daemon, source: Path, name: str) -> None:
    """Register a plugin; one of that name may be there from an attempt that was cut short."""
    script, manifest = PLUGINS[name]
    d.cli("plugin", "add", str(write_plugin(source / name, script, **manifest)), "--yes", code=None)


def seen(states: Path, name: str) -> list[Note]:
    """Everything that a plugin was given, in its order; nothing while it has no state."""
    path = states / f"{name}/mnt/state/seen"
    try:
        whole = path.read_bytes()
    except OSError:
        return []
    lines = [line.split() for line in whole[: whole.rfind(b"\n") + 1].decode().splitlines()]
    return [Note(event, int(attempt), int(number[1:]), float(time)) for event, attempt, number, time in lines]


def settle(client: Client, events: list[tuple[str, int]]) -> dict[str, dict[str, Any]]:
    """Wait for the outcome of every event, and return its row by its id."""
    return {event: client.call("event.wait", id=event, timeout=seconds(90)) for event, _ in events}


def check_plugin(
    name: str,
    rows: dict[str, dict[str, Any]],
    acknowledged: list[tuple[str, int]],
    given: list[Note],
    recorded: Recorded,
) -> list[str]:
    """Hold both sides against each other; returns one line for each thing that is wrong."""
    wrong = []
    times = Counter(note.event for note in given)
    deliveries = {event: _of(row, name) for event, row in rows.items()}
    for event, number in acknowledged:
        delivery = deliveries[event]
        if delivery is None:
            wrong.append(f"{name}: d{number} ({event}) has no delivery")
        elif delivery["state"] != "ok" or not times[event]:
            wrong.append(f"{name}: d{number} ({event}) is lost: {delivery}, seen {times[event]} times")
        elif times[event] > delivery["attempts"]:
            wrong.append(f"{name}: d{number} ({event}) came {times[event]} times: {delivery}")
    for note in given:
        unrecorded = (name, note.event, note.attempt) not in recorded.attempts
        if unrecorded and not recorded.lost_with_its_host(note.time):
            wrong.append(
                f"{name}: d{note.number} ({note.event}), attempt {note.attempt}, is not on record: {note.time}"
            )
    twice = [key for key, count in Counter((note.event, note.attempt) for note in given).items() if count > 1]
    wrong += [f"{name}: {event} came twice as attempt {attempt}" for event, attempt in twice]
    first: dict[str, int] = {}
    for place, note in enumerate(given):
        first.setdefault(note.event, place)
    for key in range(KEYS):
        order = [(number, first[event]) for event, number in acknowledged if number % KEYS == key and event in first]
        for (before, one), (after, other) in pairwise(order):
            if one > other:
                wrong.append(f"{name}: d{after} came before d{before}, both of key p{key}")
    return wrong


def _of(row: dict[str, Any], plugin: str) -> dict[str, Any] | None:
    return next((delivery for delivery in row["deliveries"] if delivery["plugin"] == plugin), None)


def choice(random: random.Random, weights: dict[str, int]) -> str:
    """One of the keys, by their weights."""
    return random.choices([*weights], [*weights.values()])[0]
