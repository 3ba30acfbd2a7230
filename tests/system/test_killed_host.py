"""kill -9 of the host again and again under load: nothing is lost, nothing comes more often than its attempts."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from host.client.client import Client
from isolator.errors import IsolatorError
from tests.support.sidecars import raw, stream
from tests.support.timeouts import seconds
from tests.system.daemon import EVENT, Daemon, alive, daemon, event, kill_9, wait_for, write_plugin

NOTE = """
def note(meta):
    with open(os.environ["PLUGIN_STATE_DIR"] + "/seen", "a") as seen:
        seen.write(f"{meta['id']} {meta['attempt']}\\n")
"""
ONESHOT = raw(
    """
try:
    note(json.loads(connection.recv(4096))["params"]["_meta"])
    connection.sendall(b'{"jsonrpc":"2.0","id":1,"result":{"status":"ok"}}\\n')
except (OSError, ValueError):
    pass
connection.close()
""",
    first=NOTE,
)
STREAM = stream('note(params["_meta"])\nsend(id=id, result={"status": "ok"})', first=NOTE)


class Impatient(Daemon):
    """A daemon that starts its services again at once: the pause, which grows to 5 s, would only make this longer."""

    def command(self) -> list[str]:
        program = (
            "import sys; import isolator.supervisor.service as service;"
            " service._BACKOFF_LAST = service._LONGEST_AWAY = service._BACKOFF_FIRST;"
            " from host.cli.main import main; sys.exit(main())"
        )
        return [sys.executable, "-I", "-c", program, "--root", str(self.root), "serve"]


class Load:
    """A platform that emits as fast as it is answered, and knows what was accepted."""

    def __init__(self, root: Path) -> None:
        self.accepted: list[str] = []
        self._root, self._stop = root, threading.Event()
        self._thread = threading.Thread(target=self._emit)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _emit(self) -> None:
        number = 0
        while not self._stop.is_set():
            with contextlib.suppress(IsolatorError, OSError, ValueError), Client(self._root, timeout=5) as client:
                while not self._stop.wait(0.01):
                    number += 1
                    payload = EVENT | {"deployment_id": f"d{number}", "project_id": f"p{number % 4}"}
                    # Unanswered it counts as not accepted, whatever became of it.
                    self.accepted.append(str(client.call("event.emit", name="deploy.completed", payload=payload)["id"]))
            self._stop.wait(0.05)


def test_record_that_the_writer_has_not_read_as_the_host_is_killed_is_not_made_again() -> None:
    with daemon() as d, Client(d.root) as client:
        first = client.call("event.emit", name="deploy.completed", payload=EVENT)["id"]
        wait_for(lambda: [one for one in d.records() if one["event_id"] == first])
        writer, host = d.service_pid("audit.service"), d.service_pid("host.service")
        os.kill(writer, signal.SIGSTOP)
        try:
            # As the next one is read, the record of the one before is handed over; its own need not be.
            second, third = (client.call("event.emit", name="deploy.completed", payload=EVENT)["id"] for _ in range(2))
            kill_9(host)
            wait_for(lambda: d.service_pid("host.service", missing_ok=True) not in (0, host))
            wait_for(lambda: _connected(d)).close()
        finally:
            os.kill(writer, signal.SIGCONT)
        with wait_for(lambda: _connected(d)) as other:
            last = other.call("event.emit", name="deploy.completed", payload=EVENT)["id"]
            wait_for(lambda: [one for one in d.records() if one["event_id"] == last])
        accepted = [one for one in d.records() if one["type"] == "event.accepted"]
        assert sorted(one["event_id"] for one in accepted) == sorted((first, second, third, last))
        assert {one["event_id"] for one in accepted if "accepted_at" in one["data"]} <= {third}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [25, pytest.param(100, marks=pytest.mark.wide)])
def test_kill_9_of_the_host_under_load(tmp_path: Path, kills: int) -> None:
    folders = (
        write_plugin(tmp_path / "oneshot", ONESHOT),
        write_plugin(tmp_path / "streams", STREAM, transport={"mode": "stream"}),
    )
    with daemon(kind=Impatient) as d:
        for folder in folders:
            d.cli("plugin", "add", str(folder), "--yes")
            d.cli("plugin", "start", folder.name)
        runs = {folder.name: d.json("plugin", "show", folder.name)["run"] for folder in folders}
        with Load(d.root) as load:
            for _ in range(kills):
                before = len(load.accepted)
                pid = wait_for(lambda: d.service_pid("host.service", missing_ok=True))
                wait_for(lambda before=before: len(load.accepted) > before, what=d.log.read_text)
                time.sleep(random.uniform(0.0, 0.1))
                kill_9(pid)
                wait_for(lambda pid=pid: not alive(pid))
        wait_for(lambda: d.service_pid("host.service", missing_ok=True))
        with wait_for(lambda: _connected(d)) as client:
            rows = [client.call("event.wait", id=event, timeout=seconds(60)) for event in load.accepted]
        assert len(rows) >= kills
        for folder in folders:
            lines = d.noted(folder.name)
            seen = Counter(line.split()[0] for line in lines)
            deliveries = {row["id"]: _of(row, folder.name) for row in rows}
            lost = [event for event, delivery in deliveries.items() if delivery["state"] != "ok" or not seen[event]]
            assert not lost, lost
            often = [event for event, delivery in deliveries.items() if seen[event] > delivery["attempts"]]
            assert not often, [(seen[event], deliveries[event]) for event in often]
            assert max(Counter(lines).values()) == 1, "two deliveries with one number"
            first = {event: index for index, event in reversed(list(enumerate(line.split()[0] for line in lines)))}
            for key in range(4):
                order = [first[row["id"]] for row in rows if row["payload"]["project_id"] == f"p{key}"]
                assert order == sorted(order), "first deliveries of one key are in the order of acceptance"
            assert d.json("plugin", "show", folder.name)["run"] == runs[folder.name], "the sidecar was ended"
        recorded = Counter(one["event_id"] for one in d.records() if one["type"] == "event.accepted")
        assert not [event for event in load.accepted if recorded[event] != 1], "each is on record, and once"
        assert max(recorded.values()) == 1
        d.cli("audit", "verify")
        # Every delivery is one that the trail tells of.
        told = Counter(
            (r["event_id"], r["plugin"]) for r in d.records() if r["type"] == "event.dispatched"
        )  # fmt: skip
        assert all(told[event, folder.name] >= 1 for event in load.accepted for folder in folders)


def _connected(d: Daemon) -> Client | None:
    with contextlib.suppress(IsolatorError):
        return Client(d.root)
    return None


def _of(row: dict[str, Any], plugin: str) -> dict[str, Any]:
    return next(delivery for delivery in row["deliveries"] if delivery["plugin"] == plugin)


def is_well(d: Daemon) -> bool:
    with contextlib.suppress(IsolatorError, OSError), Client(d.root, timeout=seconds(10)) as client:
        return not client.call("status")["alarms"]
    return False


@pytest.mark.parametrize("pause", [0.0, pytest.param(0.2, marks=pytest.mark.wide)])
@pytest.mark.parametrize("first", ["host", "isolator.audit"])
def test_host_that_dies_with_the_audit_process_comes_back(first: str, pause: float) -> None:
    second = "host" if first == "isolator.audit" else "isolator.audit"
    with daemon(kind=Impatient) as d:
        pids = [d.service_pid(f"{first}.service"), d.service_pid(f"{second}.service")]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            time.sleep(pause)
        wait_for(lambda: d.service_pid("host.service", missing_ok=True) not in (0, *pids), seconds(60))
        wait_for(lambda: is_well(d), seconds(60), "one of them waits for the other")
        d.cli("event", "emit", "deploy.completed", event("after"))
