"""Both sides of the ledger: what a platform had acknowledged, and what each plugin wrote down."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from host.client.client import Client
from isolator.errors import IsolatorError
from tests.support.sidecars import raw, stream
from tests.support.timeouts import seconds
from tests.system.daemon import EVENT, Daemon, write_plugin

KEYS = 6
NOTE = """
def note(params):
    line = f"{params['_meta']['id']} {params['_meta']['attempt']} {params['deployment_id']}\\n".encode()
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


def seen(states: Path, name: str) -> list[tuple[str, int, int]]:
    """Id, attempt and number of everything that a plugin was given, in its order; nothing while it has no state."""
    path = states / f"{name}/mnt/state/seen"
    try:
        whole = path.read_bytes()
    except OSError:
        return []
    lines = [line.split() for line in whole[: whole.rfind(b"\n") + 1].decode().splitlines()]
    return [(event, int(attempt), int(number[1:])) for event, attempt, number in lines]


def settle(client: Client, events: list[tuple[str, int]]) -> dict[str, dict[str, Any]]:
    """Wait for the outcome of every event, and return its row by its id."""
    return {event: client.call("event.wait", id=event, timeout=seconds(90)) for event, _ in events}


def check_plugin(
    name: str,
    rows: dict[str, dict[str, Any]],
    acknowledged: list[tuple[str, int]],
    given: list[tuple[str, int, int]],
    recorded: Counter[str],
) -> list[str]:
    """Hold both sides against each other; returns one line for each thing that is wrong."""
    wrong = []
    times = Counter(event for event, _, _ in given)
    deliveries = {event: _of(row, name) for event, row in rows.items()}
    for event, number in acknowledged:
        delivery = deliveries[event]
        if delivery is None:
            wrong.append(f"{name}: d{number} ({event}) has no delivery")
        elif delivery["state"] != "ok" or not times[event]:
            wrong.append(f"{name}: d{number} ({event}) is lost: {delivery}, seen {times[event]} times")
        elif times[event] > delivery["attempts"]:
            wrong.append(f"{name}: d{number} ({event}) came {times[event]} times: {delivery}")
        elif recorded[event] < times[event]:
            wrong.append(f"{name}: d{number} ({event}) came {times[event]} times, on record are {recorded[event]}")
    twice = [key for key, count in Counter((event, attempt) for event, attempt, _ in given).items() if count > 1]
    wrong += [f"{name}: {event} came twice as attempt {attempt}" for event, attempt in twice]
    first: dict[str, int] = {}
    for place, (event, _, _) in enumerate(given):
        first.setdefault(event, place)
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
