"""Metrics over real sockets, and the use of a real control group."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isolator.audit import snapshots
from isolator.audit.client import AuditClient, utc_now
from isolator.audit.metrics import MAX_LABELS, Metrics
from isolator.audit.record import Incoming
from isolator.audit.snapshots import refreshed, snapshot
from isolator.ipc import channel as ipc
from isolator.layers.cgroup.leaf import Leaf
from isolator.layers.cgroup.subtree import open_subtree
from isolator.policy.model import ResourcePolicy
from tests.audit.any_record import any_record
from tests.audit.conftest import Daemon
from tests.audit.test_service import durable
from tests.support.processes import state


async def scrape(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str = "/metrics") -> str:
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    async with asyncio.timeout(10):
        answer = (await reader.read()).decode()
    writer.close()
    return answer


async def fill(host: AuditClient) -> None:
    host.record(any_record("event.accepted", event="deploy.completed"), event_id="e")
    host.record(any_record("event.dispatched", queued_us=250), plugin="p", event_id="e", delivery_id="d")
    host.record(any_record("event.response", outcome="ok", latency_us=1500), plugin="p", event_id="e", delivery_id="d")
    await durable(host)


async def test_metrics_are_served_on_a_unix_socket_of_the_supervisor(daemon: Daemon) -> None:
    await daemon.start()
    await fill(await daemon.source("host"))
    path = str(daemon.paths.root / "metrics.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        assert daemon.channel is not None
        await daemon.channel.call("metrics", fds=[listener.fileno()], timeout=5)
    text = await scrape(*await asyncio.open_unix_connection(path))
    assert text.startswith("HTTP/1.1 200 OK")
    for line in (
        'isolator_audit_records_total{type="event.accepted"} 1.0',
        'isolator_events_accepted_total{event="deploy.completed"} 1.0',
        'isolator_deliveries_total{outcome="ok",plugin="p"} 1.0',
        'isolator_delivery_seconds_bucket{le="0.0025",plugin="p"} 1.0',
        'isolator_delivery_seconds_bucket{le="0.001",plugin="p"} 0.0',
        "isolator_audit_seq 3.0",
        "isolator_audit_blocked 0.0",
    ):
        assert f"{line}\n" in text, line
    assert "404" in await scrape(*await asyncio.open_unix_connection(path), path="/other")


async def test_metrics_are_served_on_tcp_if_configured(daemon: Daemon) -> None:
    port = free_port()
    await daemon.start(metrics={"address": "127.0.0.1", "port": port})
    await fill(await daemon.source("host"))
    # A client that never finishes its request holds nobody up.
    _, idle = await asyncio.open_connection("127.0.0.1", port)
    idle.write(b"GET ")
    assert "isolator_audit_seq 3.0\n" in await scrape(*await asyncio.open_connection("127.0.0.1", port))
    idle.close()


async def test_taken_port_costs_the_metrics_not_the_trail(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        await daemon.start(metrics={"address": "127.0.0.1", "port": taken.getsockname()[1]})
        await fill(await daemon.source("host"))
        assert await daemon.stop() == 0


async def test_queue_lengths_of_the_host_are_shown_and_in_no_trail(daemon: Daemon) -> None:
    await daemon.start(metrics={"port": (port := free_port())})
    host, broker = await daemon.source("host"), await daemon.source("broker")
    host.gauges(queue={"slack": 3, "mail": 1})
    host.gauges(queue={"slack": 4})
    broker.gauges(queue={"slack": 9})
    await durable(host)
    await durable(broker)
    text = await scrape(*await asyncio.open_connection("127.0.0.1", port))
    assert 'isolator_queue_depth{plugin="slack"} 4.0\n' in text and 'isolator_queue_depth{plugin="mail"} 0.0\n' in text
    await daemon.stop()
    assert [r["type"] for r in daemon.records()] == ["audit.gap", "audit.seal"]
    assert daemon.records()[0]["data"]["source"] == "broker"


async def test_gauges_nested_too_deep_cost_no_record_beside_them(daemon: Daemon) -> None:
    await daemon.start()
    ours, theirs = ipc.pair()
    assert daemon.channel is not None
    with ours, theirs:
        await daemon.channel.call("source", name="host", fds=[theirs.fileno()], timeout=20)
        data = {"event": "e", "subject": "s", "bytes": 1, "sha256": "0" * 64, "plugins": [], "by": "uid:0"}
        record = json.dumps({"time": utc_now(), "type": "event.accepted", "data": data}).encode()
        ours.send(b'{"gauges":' + b"[" * 50_000 + b"\n" + record)
        await daemon.flush()
        assert "event.accepted" in [r["type"] for r in daemon.records()]
    await daemon.stop()


def test_records_of_a_plugins_life_are_counted() -> None:
    metrics = Metrics()

    def happens(type: str, **data: Any) -> None:
        metrics.observe(Incoming("", type, plugin="p", data=data))

    def value(name: str, **labels: str) -> float | None:
        samples = [sample for family in metrics.families() for sample in family.samples()]
        return next((found for *key, found in samples if key == [f"isolator_{name}", {"plugin": "p", **labels}]), None)

    happens("plugin.started", reason="event")
    happens("resources", memory=5, memory_peak=9, tasks=2, open_files=7, cpu_us=10, throttled_us=3)
    assert (value("plugin_running"), value("plugin_memory_bytes"), value("plugin_tasks")) == (1, 5, 2)
    happens("resources", memory=4, memory_peak=9, tasks=0)
    happens("plugin.crashed", cause="signal")
    assert (value("plugin_running"), value("plugin_memory_bytes"), value("plugin_open_files")) == (0, 0, 0)
    assert (value("plugin_memory_peak_bytes"), value("plugin_cpu_microseconds")) == (9, 10)
    happens("plugin.started", reason="restart after a crash")
    assert value("plugin_restarts_total") == 1
    assert (value("plugin_total", what="started"), value("plugin_total", what="crashed")) == (2, 1)
    happens("net.denied", count=3)
    happens("net.closed", sent=100, received=50)
    happens("syscall.denied", call="ptrace", count=4)
    happens("fs.denied", path="/x")
    happens("api.called", verdict="granted")
    happens("api.called", verdict="denied")
    denied = [value("denied_total", what=what) for what in ("network", "syscall", "fs", "api")]
    assert denied == [3, 4, 1, 1]
    assert [value("network_bytes_total", direction=way) for way in ("out", "in")] == [100, 50]
    happens("event.dead", reason="expired")
    assert value("dead_letters_total") == 1


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def test_labels_stay_bounded_whatever_is_recorded() -> None:
    metrics = Metrics()
    for number in range(3 * MAX_LABELS):
        metrics.observe(
            Incoming("", "event.response", plugin=f"p{number}", data={"outcome": number, "latency_us": "x"})
        )
    assert sum(len(family.children) for family in metrics.families()) <= MAX_LABELS + 40


@pytest.fixture
def leaf() -> Iterator[Leaf]:
    subtree = open_subtree(f"isolator-test-{os.getpid()}")
    leaf = Leaf.under(subtree, "snapshot")
    limits = ResourcePolicy(memory=64 << 20, cpu=50)
    leaf.create()
    leaf.create_v1()
    leaf.limit(limits)
    leaf.cap_processor(limits)
    try:
        yield leaf
    finally:
        for folder in leaf.folders():
            folder.rmdir()
        subtree.remove()


@contextlib.contextmanager
def running(leaf: Leaf, work: str) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], bytes]]]:
    """A Python process in the groups, and what gives it a line and returns its next one; it is killed at the end."""
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        given, told = process.stdin, process.stdout

        def go_on() -> bytes:
            given.write(b"\n")
            given.flush()
            return told.readline()

        try:
            for folder in leaf.folders():
                (folder / "cgroup.procs").write_text(str(process.pid))
            yield process, go_on
        finally:
            process.kill()
            process.wait()


def test_use_of_a_process_in_a_control_group(leaf: Leaf) -> None:
    """A process that fills memory, burns processor time and opens files has all of it in its snapshot, and no more."""
    work = (
        "import sys, threading, time\n"
        "sys.stdin.readline()\n"
        "kept = b'x' * (20 << 20)\n"
        "files = [open('/dev/null') for _ in range(17)]\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "end = time.process_time() + 0.1\n"
        "while time.process_time() < end: pass\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with running(leaf, work) as (process, go_on):
        assert go_on() == b"ready\n"
        figures = snapshot(leaf.folders(), [process.pid])
    assert 20 << 20 <= figures["memory"] <= 64 << 20
    assert figures["memory_peak"] >= figures["memory"] * 0.9
    assert 100_000 <= figures["cpu_us"] <= 5_000_000
    assert (
        figures["throttled"] > 0 and figures["throttled_us"] > 0
    )  # a cap so small that even a busy host gives it more
    assert (figures["tasks"], figures["threads"], figures["processes"]) == (2, 2, 1)
    assert 20 <= figures["open_files"] <= 24
    assert figures["oom_kills"] == 0


def test_what_a_process_can_change_is_read_again_once_it_has_run(leaf: Leaf) -> None:
    """A snapshot of one that sleeps repeats the one before, and tells of it whatever it does next."""
    work = (
        "import sys, threading\nsys.stdin.readline()\nprint(flush=True)\nsys.stdin.readline()\n"
        "files = [open('/dev/null') for _ in range(10)]\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "print(flush=True)\nsys.stdin.readline()\n"
    )
    with running(leaf, work) as (process, go_on):
        go_on()
        before = asleep(leaf, process.pid)
        assert (again := refreshed(before, leaf.folders(), process.pid)) is not None
        read = snapshot(leaf.folders(), [process.pid])
        assert {**again, "memory": 0} == {**read, "memory": 0}
        go_on()
        assert refreshed(before, leaf.folders(), process.pid) is None
        after = asleep(leaf, process.pid)
        assert (after["threads"], after["open_files"]) == (before["threads"] + 1, before["open_files"] + 10)
        assert refreshed({}, leaf.folders(), process.pid) is None
        assert refreshed({"memory": 1}, [], process.pid) is None, "nobody knows whether it has run"
    assert refreshed(after, leaf.folders(), process.pid) is None


def test_memory_that_is_taken_back_from_one_that_rests_shows(leaf: Leaf, tmp_path: Path) -> None:
    """As the kernel does for others: nothing of the process has run."""
    (tmp_path / "file").write_bytes(bytes(8 << 20))
    work = (
        f"import sys\nsys.stdin.readline()\nopen({str(tmp_path / 'file')!r}, 'rb').read(16 << 20)\n"
        "print(flush=True)\nsys.stdin.readline()\n"
    )
    _drop_cache(tmp_path / "file")
    with running(leaf, work) as (process, go_on):
        go_on()
        rests = refreshed(asleep(leaf, process.pid), leaf.folders(), process.pid)
        assert rests is not None and rests["cached"] >= 8 << 20
        _take_back(leaf)
        after = refreshed(rests, leaf.folders(), process.pid, settled=True)
        read = snapshot(leaf.folders(), [process.pid])
    assert after is not None
    assert after["cached"] < rests["cached"] - (4 << 20)
    assert {**after, "memory": 0} == {**read, "memory": 0}


def _drop_cache(file: Path) -> None:
    """Have the pages of a file charged to whoever reads it next."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _take_back(leaf: Leaf) -> None:
    if "memory" in leaf.v1:
        (leaf.v1["memory"] / "memory.force_empty").write_text("0")
    else:
        with contextlib.suppress(OSError):  # it has less than that
            (leaf.unified / "memory.reclaim").write_text(str(32 << 20))


@pytest.mark.parametrize(("field", "value"), [("pressure_io", 12.5), ("background", 1)])
def test_what_moves_on_while_nothing_runs_is_read_until_it_is_at_rest(leaf: Leaf, field: str, value: float) -> None:
    work = "import sys\nsys.stdin.readline()\nprint(flush=True)\nsys.stdin.readline()\n"
    with running(leaf, work) as (process, go_on):
        go_on()
        rests = refreshed(asleep(leaf, process.pid), leaf.folders(), process.pid)
        assert rests is not None
        if field not in rests:
            pytest.skip(f"this kernel counts no {field}")
        after = refreshed({**rests, field: value}, leaf.folders(), process.pid, settled=True)
    assert after is not None and after[field] == rests[field]


def test_connections_are_counted_again_once_a_byte_was_sent() -> None:
    listens = (
        "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname());"
        "print(flush=True); sys.stdin.readline()"
    )
    script = f'ip link set lo up && echo && read _ && exec {sys.executable} -c "{listens}"'
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        before = snapshots._network([process.pid])
        assert before == {"network_bytes": before["network_bytes"], "tcp_sockets": 0}
        assert snapshots._network([process.pid], known=before) == {}
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        assert snapshots._network([process.pid], known=before)["tcp_sockets"] >= 2
        process.stdin.close()


def asleep(leaf: Leaf, pid: int) -> dict[str, Any]:
    """A snapshot of a process once it waits and has nothing left to do."""
    while True:
        found = snapshot(leaf.folders(), [pid])
        if state(pid) == "S" and refreshed(found, leaf.folders(), pid) is not None:
            return found


def test_missing_counter_is_left_out(tmp_path: Path) -> None:
    figures = snapshot([tmp_path, tmp_path / "gone"], [2**22 + 1])
    nothing = {"tasks": 0, "threads": 0, "open_files": 0, "io_read": 0, "io_written": 0}
    assert figures == {"processes": 1, **nothing}
    assert snapshot([tmp_path], []) == {"tasks": 0, "processes": 0}
