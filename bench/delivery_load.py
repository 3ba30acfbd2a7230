"""Delivery of events while the daemon is busy: the second half of the benchmark ``delivery``.

Each figure stands beside the one to reach. A rate depends on the machine's other users; the processor time per event
of each process shows the bound.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.delivery_subjects import ONESHOT, STREAM, Subject, Trail, one_sync, payload, settle
from host.client.client import Client
from tests.system.daemon import Daemon, write_plugin

MANY = 50
HEAD = """\
    #!/usr/bin/python3
    import os, socket, time
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    connection, _ = server.accept()
    connection.recv(4096)
"""
API = """\
    def connect():
        host = socket.socket(socket.AF_UNIX)
        host.connect(os.environ["PLUGIN_HOST_SOCKET"])
        return host
"""
BAD = {
    "hangs": "    time.sleep(3600)\n",
    "floods its log": '    while True:\n        os.write(1, b"x" * 65536)\n',
    "burns its processor": "    while True:\n        pass\n",
    "crashes again and again": "    os._exit(1)\n",
    "floods the host API": API
    + '    call = b\'{"jsonrpc":"2.0","method":"whoami","id":1}\\n\' * 100\n'
    + "    host = connect()\n    while True:\n        host.sendall(call)\n",
    "connects again and again": API
    + "    while True:\n        try:\n            connect().close()\n        except OSError:\n            pass\n",
}
"""Behaviour of a bad plugin from its first event on."""


def under_load(running: Daemon, client: Client, subjects: Sequence[Subject]) -> list[str]:
    """Measure a busy daemon; returns one line per figure."""
    return [
        *(_sustained(running, client, subject, 5000) for subject in subjects),
        _paced(running, client, subjects[0]),
        *_many(running, client),
        *_beside_bad_ones(running, client),
    ]


def _sustained(running: Daemon, client: Client, subject: Subject, count: int) -> str:
    subject.clear()
    pids = {
        "host": running.service_pid("host.service"),
        "audit": running.service_pid("isolator.audit.service"),
        "supervisor": running.process.pid if running.process is not None else 0,
    }
    before, began = {name: _processor(pid) for name, pid in pids.items()}, time.perf_counter()
    last = pour(running, subject, count)
    client.call("event.wait", id=last, timeout=300)
    took = time.perf_counter() - began
    each = ", ".join(f"{name} {(_processor(pid) - before[name]) / count:.0f}" for name, pid in pids.items())
    return (
        f"{subject.name}: {count / took:.0f} events/s sustained, emitted to answered (to reach: 3000);"
        f" processor time per event in µs: {each}"
    )


def _paced(running: Daemon, client: Client, subject: Subject) -> str:
    subject.clear()
    _at_pace(200, 600, lambda _: subject.once(client, wait=False))
    client.call("event.wait", id=subject.ids[-1], timeout=60)
    settle(running, client)
    dispatch = [p.dispatch for p in Trail(running).passages(subject.name, subject.ids)]
    return f"200 events/s to one one-shot plugin: dispatch {spread(dispatch)} (to reach: p99 1000)"


def _many(running: Daemon, client: Client) -> list[str]:
    """Deliver to fifty plugins the same event, one-shot and stream; then to fifty an event of their own.

    The first event of each is not counted: it opens the streams.
    """
    schema = {"type": "object", "properties": {"project_id": {"type": "string"}}, "required": ["project_id"]}
    notes = []
    for mode, script in (("oneshot", ONESHOT), ("stream", STREAM)):
        names = [f"{mode}-{number}" for number in range(MANY)]
        client.call("event.register", name="load.all", schema=schema)
        for number, name in enumerate(names):
            client.call("event.register", name=f"load.n{number}", schema=schema)
            hooks = ["load.all", f"load.n{number}"]
            folder = write_plugin(running.root / "src" / name, script, hooks=hooks, transport={"mode": mode})
            staged = client.call("plugin.stage", path=str(folder))
            client.call("plugin.commit", token=staged["token"])
            client.call("plugin.start", name=name)

        client.call("event.wait", id=_emit(client, "load.all", 0), timeout=120)
        for how, a_second, events in (
            ("at once", 20, ["load.all"]),
            ("in turn", 20 * MANY, [f"load.n{number}" for number in range(MANY)]),
        ):
            dispatch = _dispatch(running, client, names, events, a_second)
            notes.append(f"20 events/s to each of {MANY} {mode} plugins, {how}: {dispatch} (to reach: p99 1000)")
        for name in names:
            client.call("plugin.remove", name=name)
    return notes


def _dispatch(running: Daemon, client: Client, names: Sequence[str], events: Sequence[str], a_second: int) -> str:
    ids: list[str] = []
    _at_pace(a_second, 5 * a_second, lambda number: ids.append(_emit(client, events[number % len(events)], number)))
    client.call("event.wait", id=ids[-1], timeout=120)
    settle(running, client)
    trail = Trail(running)
    return f"dispatch {spread([p.dispatch for name in names for p in trail.passages(name, ids)])}"


def _emit(client: Client, event: str, number: int) -> str:
    return str(client.call("event.emit", name=event, payload={"project_id": f"p{number % 64}"})["id"])


def _beside_bad_ones(running: Daemon, client: Client) -> list[str]:
    """Measure the effect of bad plugins on emitters and on a neighbour."""
    good = Subject(running, "neighbour", "project.created", ONESHOT)
    good.once(client)
    notes = []
    for number, (what, script) in enumerate({"does nothing": "", **BAD}.items()):
        name = f"bad-{number}"
        if script:
            Subject(running, name, "deploy.failed", HEAD + script).once(client, wait=False)
            time.sleep(1)
        syncs = _emit_and_sync(running, client, good)
        client.call("event.wait", id=good.ids[-1], timeout=60)
        settle(running, client)
        dispatch = spread([p.dispatch for p in Trail(running).passages(good.name, good.ids)])
        emits = f"emit {spread(good.emits)} (to reach: p99 2000)"
        notes.append(
            f"beside a plugin that {what}: {emits}, one sync {spread(syncs)}, a neighbour's dispatch {dispatch}"
        )
        if script:
            client.call("plugin.remove", name=name)
    return notes


def _emit_and_sync(running: Daemon, client: Client, good: Subject) -> list[float]:
    """Emit for ten seconds; returns µs of a bare sync after every fourth event: what the disk gave meanwhile.

    The 99th percentile of 1 000 is the eleventh largest; of 200 it would be the third, which says little.
    """
    good.clear()
    syncs: list[float] = []

    def once(number: int) -> None:
        good.once(client, wait=False)
        if number % 4 == 0:
            syncs.append(one_sync(running.root / "block"))

    _at_pace(100, 1000, once)
    return syncs


def _at_pace(a_second: int, count: int, do: Callable[[int], object]) -> None:
    began = time.perf_counter()
    for number in range(count):
        time.sleep(max(0.0, began + number / a_second - time.perf_counter()))
        do(number)


def pour(running: Daemon, subject: Subject, count: int) -> str:
    """Emit many events over one connection without waiting for each answer; returns the id of the last."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(running.root / "run/isolator/control.sock"))
    lines = sock.makefile("rb")

    def line(number: int) -> bytes:
        params: dict[str, Any] = {"name": subject.hook, "payload": payload(subject.hook, number)}
        return json.dumps({"jsonrpc": "2.0", "id": number, "method": "event.emit", "params": params}).encode() + b"\n"

    requests = b"".join(line(number) for number in range(count))
    sender = threading.Thread(target=sock.sendall, args=(requests,))
    sender.start()
    answers = [json.loads(lines.readline()) for _ in range(count)]
    sender.join()
    sock.close()
    return str(max(answers, key=lambda answer: int(answer["id"]))["result"]["id"])


def memory(pid: int) -> int:
    """Return the resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _processor(pid: int) -> float:
    """Return a process's µs of processor time so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") * 1e6


def spread(values: Sequence[float]) -> str:
    """Format median and 99th percentile of µs."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return f"p50 {ordered[last // 2]:.0f} µs, p99 {ordered[last * 99 // 100]:.0f} µs" if ordered else "nothing"
