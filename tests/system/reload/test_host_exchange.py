"""The host's process is exchanged under load: no event is lost or delivered twice, no caller and no sidecar notices."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from host.client.client import Client
from tests.support.processes import start_time
from tests.support.sidecars import raw
from tests.support.timeouts import seconds
from tests.system.daemon import EVENT, Daemon, daemon, wait_for, write_plugin
from tests.system.reload.exchanges import SLOW_ONESHOT, SLOW_STREAM, exchange, open_files, seen

TALKER = raw(
    "connection.close()",
    first="""
import threading
state = os.environ["PLUGIN_STATE_DIR"]
def talk():
    host = socket.socket(socket.AF_UNIX)
    host.connect(os.environ["PLUGIN_HOST_SOCKET"])
    lines = host.makefile("rb")
    print("half a line", end="", flush=True)
    open(state + "/said", "w").close()
    while not os.path.exists(state + "/go"):
        time.sleep(0.05)
    host.sendall(b'{"jsonrpc":"2.0","id":1,"method":"projects.get","params":{}}\\n')
    print(", and its end:", json.loads(lines.readline())["result"]["name"], flush=True)
threading.Thread(target=talk).start()
""",
)
"""Writes half a line, keeps its connection to the host API, and goes on when it is let."""


class Emitter:
    """A platform that emits without a pause on one connection, and insists on each answer."""

    def __init__(self, root: Path) -> None:
        self.accepted: list[str] = []
        self.failed: list[BaseException] = []
        self._root, self._stop = root, threading.Event()
        self._thread = threading.Thread(target=self._emit)

    def __enter__(self) -> Emitter:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _emit(self) -> None:
        number = 0
        try:
            with Client(self._root, timeout=seconds(30)) as client:
                while not self._stop.wait(0.01):
                    number += 1
                    duration = 2500 if number % 100 == 0 else 0  # longer than an exchange takes
                    payload = EVENT | {
                        "deployment_id": f"d{number}",
                        "project_id": f"p{number}",
                        "duration_ms": duration,
                    }
                    self.accepted.append(str(client.call("event.emit", name="deploy.completed", payload=payload)["id"]))
        except BaseException as error:
            self.failed.append(error)


@pytest.mark.parametrize("exchanges", [3, pytest.param(20, marks=pytest.mark.wide)])
def test_host_is_exchanged_again_and_again_under_events_and_nobody_notices(tmp_path: Path, exchanges: int) -> None:
    folders = (
        write_plugin(tmp_path / "oneshot", SLOW_ONESHOT),
        write_plugin(
            tmp_path / "streams", SLOW_STREAM,
            transport={"mode": "stream", "max_in_flight": 16}, delivery={"concurrency": 16},
        ),
    )  # fmt: skip
    with daemon() as d:
        for folder in folders:
            d.cli("plugin", "add", str(folder), "--yes")
            d.cli("plugin", "start", folder.name)
        runs = {folder.name: d.json("plugin", "show", folder.name) for folder in folders}
        born = {name: (run["pid"], start_time(run["pid"])) for name, run in runs.items()}
        with Emitter(d.root) as load:
            exchange(d, "host")
            files = _open_files(d)
            for _ in range(exchanges - 1):
                before = len(load.accepted)
                exchange(d, "host")
                wait_for(lambda before=before: len(load.accepted) > before or load.failed, what="nothing is accepted")
        assert not load.failed, load.failed
        with Client(d.root) as client:
            rows = [client.call("event.wait", id=event, timeout=seconds(60)) for event in load.accepted]
        for folder in folders:
            reached = seen(d, folder.name)
            outcomes = {row["id"]: next(x for x in row["deliveries"] if x["plugin"] == folder.name) for row in rows}
            assert [e for e, one in outcomes.items() if one["state"] != "ok"] == []
            assert [e for e in load.accepted if reached[e] != 1] == [], "each event comes once"
            assert {one["attempts"] for one in outcomes.values()} == {1}
            shown = d.json("plugin", "show", folder.name)
            assert (shown["pid"], start_time(shown["pid"])) == born[folder.name]
        # A cage that is prepared meanwhile has some until it is.
        most = {"supervisor": files["supervisor"] + 2, "host": files["host"] + 8}
        wait_for(lambda: all(count <= most[name] for name, count in _open_files(d).items()), what=f"more than {most}")
        assert not [r for r in d.records() if r["type"] in ("service.ended", "audit.gap")]
        d.cli("audit", "verify")


@pytest.mark.wide
def test_stream_with_sixteen_in_flight_answers_after_ten_seconds_and_two_reloads(tmp_path: Path) -> None:
    stream = write_plugin(
        tmp_path / "streams", SLOW_STREAM,
        transport={"mode": "stream", "max_in_flight": 16}, delivery={"concurrency": 16, "timeout": "60s"},
    )  # fmt: skip
    with daemon() as d:
        d.cli("plugin", "add", str(stream), "--yes")
        d.cli("plugin", "start", "streams")
        pid = d.json("plugin", "show", "streams")["pid"]
        born = start_time(pid)
        with Client(d.root, timeout=seconds(60)) as client:
            payloads = [EVENT | {"project_id": f"p{n}", "duration_ms": 10_000 if n % 4 else 5000} for n in range(16)]
            emitted = [client.call("event.emit", name="deploy.completed", payload=one)["id"] for one in payloads]
            wait_for(lambda: len(seen(d, "streams")) == 16)
            for _ in range(2):
                d.cli("reload")
        with Client(d.root, timeout=seconds(60)) as client:
            rows = [client.call("event.wait", id=event, timeout=seconds(60)) for event in emitted]
        assert {(one["state"], one["attempts"]) for row in rows for one in row["deliveries"]} == {("ok", 1)}
        assert seen(d, "streams") == Counter(emitted)
        assert (d.json("plugin", "show", "streams")["pid"], start_time(pid)) == (pid, born)


def _open_files(d: Daemon) -> dict[str, int]:
    assert d.process is not None
    return {"supervisor": open_files(d.process.pid), "host": open_files(d.service_pid("host.service"))}


def test_what_is_open_while_the_host_is_exchanged_is_answered(tmp_path: Path) -> None:
    """A command that waits, a half-sent request, a half-written line of a log, a method of the platform's."""
    folder = write_plugin(tmp_path / "slow", SLOW_ONESHOT)
    talker = write_plugin(tmp_path / "talker", TALKER, permissions=["read:projects"])
    with daemon() as d:
        for one in (folder, talker):
            d.cli("plugin", "add", str(one), "--yes")
        d.cli("plugin", "start", "talker")
        with Client(d.root, timeout=seconds(30)) as platform, socket.socket(socket.AF_UNIX) as half:
            platform.call("api.register", method="projects.get", permission="read:projects")
            half.connect(str(d.root / "run/isolator/control.sock"))
            half.sendall(b'{"jsonrpc":"2.0","id":7,"method":"sta')
            payload = EVENT | {"duration_ms": 3000}
            emitted = platform.call("event.emit", name="deploy.completed", payload=payload)["id"]
            wait_for(lambda: len(seen(d, "slow")) == 1)
            with ThreadPoolExecutor() as threads:
                waiting = threads.submit(_wait_for_event, d.root, emitted)
                wait_for((d.state_of("talker") / "said").exists)
                exchange(d, "host")
                exchange(d, "host")
                half.sendall(b'tus","params":{}}\n')
                answer = json.loads(half.makefile("rb").readline())
                assert answer["id"] == 7 and answer["result"]["pid"] == d.service_pid("host.service")
                (delivery,) = [x for x in waiting.result()["deliveries"] if x["plugin"] == "slow"]
                assert (delivery["state"], delivery["attempts"]) == ("ok", 1)
            # The method is still the platform's, on the same connection.
            (d.state_of("talker") / "go").touch()
            call = next(iter(platform.notifications()))
            assert call["method"] == "projects.get"
            platform.call("api.answer", call=call["call"], result={"name": "p1"})
            wait_for(lambda: "its end" in d.cli("plugin", "logs", "talker").stdout)
        assert "half a line, and its end: p1" in d.cli("plugin", "logs", "talker").stdout


def _wait_for_event(root: Path, event: str) -> dict[str, Any]:
    with Client(root, timeout=seconds(60)) as client:
        return dict(client.call("event.wait", id=event, timeout=seconds(30)))


@pytest.mark.wide
def test_plugin_that_is_added_during_exchanges_is_known_to_every_host(tmp_path: Path) -> None:
    with daemon() as d:
        stopped = threading.Event()

        def exchange_on_and_on() -> None:
            while not stopped.is_set():
                exchange(d, "host")

        with ThreadPoolExecutor(1) as pool:
            exchanging = pool.submit(exchange_on_and_on)
            try:
                for number in range(6):
                    name = f"added{number}"
                    d.cli("plugin", "add", str(write_plugin(tmp_path / name)), "--yes")
                    assert d.json("plugin", "show", name)["name"] == name
            finally:
                stopped.set()
            exchanging.result()
