"""Figures: those of Prometheus, over real sockets, and those of a real control group."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.audit.client import AuditClient
from isolator.audit.metrics import MAX_LABELS, Metrics
from isolator.audit.record import Incoming
from isolator.audit.sources.snapshots import snapshot
from isolator.layers.cgroup import Leaf, open_subtree
from isolator.policy.model import ResourcePolicy
from tests.audit.conftest import Daemon
from tests.audit.test_service import settled


async def scrape(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str = "/metrics") -> str:
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    async with asyncio.timeout(10):
        answer = (await reader.read()).decode()
    writer.close()
    return answer


async def fill(host: AuditClient) -> None:
    host.record("event.accepted", event_id="e", event="deploy.completed")
    host.record("event.dispatched", plugin="p", event_id="e", delivery_id="d", queued_us=250)
    host.record("event.response", plugin="p", event_id="e", delivery_id="d", outcome="ok", latency_us=1500)
    await settled(host)


async def test_over_a_unix_socket_that_the_supervisor_made(daemon: Daemon) -> None:
    import socket

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


async def test_over_tcp_when_the_configuration_asks(daemon: Daemon) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    await daemon.start(metrics={"address": "127.0.0.1", "port": port})
    await fill(await daemon.source("host"))
    # A client that never finishes its request holds nobody up.
    _, idle = await asyncio.open_connection("127.0.0.1", port)
    idle.write(b"GET ")
    assert "isolator_audit_seq 3.0\n" in await scrape(*await asyncio.open_connection("127.0.0.1", port))
    idle.close()


async def test_a_port_that_is_taken_costs_the_figures_not_the_trail(daemon: Daemon) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        await daemon.start(metrics={"address": "127.0.0.1", "port": taken.getsockname()[1]})
        await fill(await daemon.source("host"))
        assert await daemon.stop() == 0


def test_labels_stay_bounded_whatever_is_recorded() -> None:
    metrics = Metrics()
    for number in range(3 * MAX_LABELS):
        metrics.observe(
            Incoming("", "event.response", plugin=f"p{number}", data={"outcome": number, "latency_us": "x"})
        )
    assert len(metrics._children) <= MAX_LABELS + 10


@pytest.fixture
def leaf() -> Iterator[Leaf]:
    subtree = open_subtree(f"isolator-test-{os.getpid()}")
    leaf = Leaf.under(subtree, "snapshot")
    limits = ResourcePolicy(memory=64 << 20, cpu=500)
    leaf.create(limits)
    leaf.cap_processor(limits)
    try:
        yield leaf
    finally:
        for folder in leaf.folders():
            folder.rmdir()
        subtree.remove()


def test_figures_of_a_process_in_a_control_group(leaf: Leaf) -> None:
    """It fills memory, burns processor time, opens files; all of it is seen in the figures, and nothing else is."""
    work = (
        "import sys, time\n"
        "sys.stdin.readline()\n"
        "kept = b'x' * (20 << 20)\n"
        "files = [open('/dev/null') for _ in range(17)]\n"
        "end = time.process_time() + 0.3\n"
        "while time.process_time() < end: pass\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            for folder in leaf.folders():
                (folder / "cgroup.procs").write_text(str(process.pid))
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"ready\n"
            figures = snapshot(leaf.folders(), [process.pid])
        finally:
            process.kill()
            process.wait()
    assert 20 << 20 <= figures["memory"] <= 64 << 20
    assert figures["memory_peak"] >= figures["memory"] * 0.9
    assert 300_000 <= figures["cpu_us"] <= 5_000_000
    assert figures["throttled"] > 0 and figures["throttled_us"] > 0  # half a processor, and it wanted a whole one
    assert (figures["tasks"], figures["processes"]) == (1, 1)
    assert 20 <= figures["open_files"] <= 24
    assert figures["oom_kills"] == 0


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    figures = snapshot([tmp_path, tmp_path / "gone"], [2**22 + 1])
    assert figures == {"tasks": 0, "processes": 1, "open_files": 0, "io_read": 0, "io_written": 0}
