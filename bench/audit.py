"""Audit trail: a batch of records handed over until all of it is durable, beside writing the same without a chain.

Isolator's figure is taken from the sender's side, over the real socket to the real writer process: made, checked,
tagged, chained, written, fdatasync'ed and acknowledged. The others write the same fields as JSON lines, same disk:
once with one fdatasync at the end (the floor: nothing can be proved about such a file), once with one for each record
(the price of "log it, then go on"; fewer records, scaled up).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import isolator
from bench.frame import Contender, Report, Series, interleave
from isolator.audit import files, reader
from isolator.audit.client import AuditClient, utc_now
from isolator.audit.schema import EventAccepted, EventDispatched, EventResponse, NetConnect
from isolator.audit.seal import load_public
from isolator.audit.verify import verify
from isolator.ipc import channel as ipc
from isolator.paths import Paths

BATCH = 2000
SYNCED = 100
LONG = 1_000_000
EVENTS, A_SECOND = 4000, 1000
_DATA: dict[str, Any] = {
    "name": "hooks.slack.com",
    "address": "198.51.100.4",
    "port": 443,
    "verdict": "allowed",
    "rule": "hooks.slack.com:443",
}
_START = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); import isolator.audit.budget as budget;"
    "budget.BURST = 1e12;"  # each record is written: to count the noise of one plugin is much cheaper
    "runpy.run_module('isolator.audit.service', run_name='__main__')"
)


class Writer:
    """Audit process on a root of its own, and one source."""

    def __init__(self, root: Path) -> None:
        self.paths = Paths.of(root)
        self.paths.audit_log.mkdir(parents=True)
        self.paths.audit_lib.mkdir(parents=True, mode=0o700)
        ours, theirs = ipc.pair()
        code = str(Path(isolator.__file__).parents[1])
        command = [sys.executable, "-I", "-c", _START, code, "--channel-fd", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._runner = asyncio.Runner()
        self._runner.run(self._connect(ours))

    async def _connect(self, ours: Any) -> None:
        self._channel = ipc.Channel(ours, name="audit")
        await self._channel.call("hello", root=str(self.paths.root), config={}, timeout=30)
        mine, theirs = ipc.pair()
        await self._channel.call("source", name="broker", fds=[theirs.fileno()], timeout=30)
        theirs.close()
        self._client = AuditClient(mine)

    def source(self, name: str) -> socket.socket:
        """Add a source; returns its sending end."""
        mine, theirs = ipc.pair()
        self._runner.run(self._channel.call("source", name=name, fds=[theirs.fileno()], timeout=30))
        theirs.close()
        return mine

    def send(self, count: int = BATCH) -> None:
        """Hand over ``count`` records and wait until all are durable."""
        self._runner.run(self._send(count))

    async def _send(self, count: int) -> None:
        for number in range(count):
            record = NetConnect(flow=str(number), **_DATA)
            self._client.record(record, plugin="slack-deploy-notifier", run="0123456789ab")
            if number % 500 == 499:
                await self._client.durable(within=10_000)
        await self._client.durable()

    def deliver(self) -> float:
        """Hand over the records of events at a pace, one event at a time; returns the writer's seconds for them."""
        before = self.processor_time()
        self._runner.run(self._deliver(self.source("host")))
        return self.processor_time() - before

    async def _deliver(self, end: socket.socket) -> None:
        client = AuditClient(end)
        plugin, run, digest = "slack-deploy-notifier", "0123456789ab", hashlib.sha256().hexdigest()
        began = time.perf_counter()
        for number in range(EVENTS):
            await asyncio.sleep(max(0.0, began + number / A_SECOND - time.perf_counter()))
            event = f"evt_{number:016x}"
            ids: dict[str, Any] = {"event_id": event, "plugin": plugin, "run": run, "delivery_id": f"{event}.{plugin}"}
            client.record(
                EventAccepted(
                    event="deploy.completed", subject="proj_1", bytes=150, sha256=digest, plugins=[plugin], by="uid:0"
                ),
                event_id=event,
            )
            client.record(EventDispatched(attempt=1, queued_us=513, request_bytes=300, request_sha256=digest), **ids)
            client.record(
                EventResponse(
                    attempt=1, outcome="ok", status="ok", detail=None, latency_us=200, response_bytes=40,
                    response_sha256=digest, response='{"status": "ok"}',
                ),
                **ids,
            )  # fmt: skip
        await client.durable()
        client.close()

    def processor_time(self) -> float:
        """Return the seconds of processor time that the writer has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Return the writer's resident memory in MiB."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    def stop(self) -> None:
        """End the process as the supervisor would."""

        async def close() -> None:
            self._client.close()
            self._channel.close()

        self._runner.run(close())
        self._runner.close()
        self.process.wait(60)


FOLLOWERS = 10
"""Followers of each kind: of the files, and on the control socket."""
_BY_FILE = """
import signal, sys
from pathlib import Path
from isolator.audit.reader import Follower
followers = [Follower(Path(sys.argv[1]), 0, block=1 << 16) for _ in range(int(sys.argv[2]))]
for follower in followers:
    follower.available(1)
print("following", flush=True)
if sys.argv[3] == "stalled":
    signal.pause()
while True:
    for follower in followers:
        while follower.available():
            pass
    followers[0].wait()
"""
_SERVER = """
import asyncio, os, socket, sys
from pathlib import Path
from host.control.follow import TrailStreams
from host.control.server import ControlServer
from isolator.audit.client import AuditClient
async def main():
    audit = AuditClient(socket.socket(fileno=int(sys.argv[1])))
    streams = TrailStreams(Path(sys.argv[2]), audit)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[3])
    listener.listen(64)
    await ControlServer(streams.endpoints(), lambda uid: "operator", lambda *_, **__: None).start(listener)
    print("serving", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
_BY_SOCKET = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.sendall(b'{"jsonrpc":"2.0","id":1,"method":"audit.follow","params":{"after":0}}\\n')
print("following", flush=True)
while sock.recv(1 << 18):
    pass
"""


@contextlib.contextmanager
def _started(code: str, *words: str, fds: tuple[int, ...] = ()) -> Iterator[None]:
    """Start a process that runs ``code``; returns when it has printed its first line."""
    environment = {**os.environ, "PYTHONPATH": str(Path(isolator.__file__).parents[1])}
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, pass_fds=fds) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def followed(writer: Writer, *, stalled: bool) -> Iterator[None]:
    """Run followers of the files that have stopped reading, as far behind as can be; or one that keeps up."""
    count = FOLLOWERS if stalled else 1
    with _started(_BY_FILE, str(writer.paths.audit_log), str(count), "stalled" if stalled else "reading"):
        yield


@contextlib.contextmanager
def streamed(writer: Writer, place: Path, *, stalled: bool) -> Iterator[None]:
    """Run the same over a control socket, served by the host's own code in a process of its own."""
    end, log = writer.source("host"), str(writer.paths.audit_log)
    path = str(place / "control.sock")
    with contextlib.ExitStack() as stack:
        stack.callback(end.close)
        stack.enter_context(_started(_SERVER, str(end.fileno()), log, path, fds=(end.fileno(),)))
        if not stalled:
            stack.enter_context(_started(_BY_SOCKET, path))
        for _ in range(FOLLOWERS if stalled else 0):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(path)
            sock.sendall(b'{"jsonrpc":"2.0","id":1,"method":"audit.follow","params":{"after":0}}\n')
            sock.recv(1)
        yield


def plain(path: Path, count: int, *, every: bool) -> None:
    """Write the same records as JSON lines, with one fdatasync at the end or one for each."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        lines = []
        for number in range(count):
            record = {"time": utc_now(), "type": "net.connect", "plugin": "slack-deploy-notifier"}
            line = json.dumps({**record, "run": "0123456789ab", "data": {"flow": number, **_DATA}}) + "\n"
            if every:
                os.write(fd, line.encode())
                os.fdatasync(fd)
            else:
                lines.append(line)
        os.write(fd, "".join(lines).encode())
        os.fdatasync(fd)
    finally:
        os.close(fd)


def reading(directory: Path) -> list[str]:
    """Time verification and search of the finished trail; returns notes."""
    paths = files.trail(directory)
    keys = load_public(directory / "public.pem")
    took = []
    for _ in range(3):
        began = time.perf_counter()
        report = verify(paths, keys)
        took.append(time.perf_counter() - began)
        if report.misfits:
            raise RuntimeError(str(report.misfits[0]))
    size = sum(path.stat().st_size for path in paths)
    notes = [
        f"verify: {report.records / statistics.median(took):,.0f} records/s "
        f"({report.records:,} records of {size / report.records:.0f} bytes, {report.seals} seals)"
    ]
    for what, wanted in (
        ("that match all", reader.Query(plugin="slack-deploy-notifier")),
        ("that match none", reader.Query(types=("net.denied",))),
    ):
        began = time.perf_counter()
        count = sum(1 for _ in reader.lines(directory, wanted))
        seconds = time.perf_counter() - began
        notes.append(
            f"query over {report.records:,} records in {len(paths)} files with conditions {what}: {seconds:.2f} s "
            f"({count:,} found)"
        )
    return notes


def measure(rounds: int) -> Report:
    """Time a batch each way, ``rounds`` times (at most 60), then a long stream, then reading it."""
    rounds = min(rounds, 60)
    with tempfile.TemporaryDirectory(prefix="isolator-bench-") as folder:
        place = Path(folder)
        names = ("alone", "files", "socket", "file", "stream")
        writers = [Writer(place / name) for name in names]
        writer, files_stalled, socket_stalled, file_read, socket_read = writers
        for one in writers:
            one.send(20 * BATCH)  # enough for any follower to be behind
        try:
            with (
                followed(files_stalled, stalled=True),
                streamed(socket_stalled, place / "socket", stalled=True),
                followed(file_read, stalled=False),
                streamed(socket_read, place / "stream", stalled=False),
            ):
                series = interleave(
                    [
                        Contender("JSON lines, one fsync", "durable", lambda: plain(place / "p", BATCH, every=False)),
                        Contender("JSON lines, fsync each", "durable", lambda: plain(place / "e", SYNCED, every=True)),
                        Contender("isolator", "chain, seals, cause, durable", writer.send),
                        Contender(f"isolator, {FOLLOWERS} stalled in files", "the same, followed", files_stalled.send),
                        Contender(f"isolator, {FOLLOWERS} stalled on the socket", "the same", socket_stalled.send),
                        Contender("isolator, one reads the files", "the same", file_read.send),
                        Contender("isolator, one reads the socket", "the same", socket_read.send),
                    ],
                    rounds,
                )
            before, used, memory = time.perf_counter(), writer.processor_time(), writer.memory()
            writer.send(LONG)
            seconds = time.perf_counter() - before
            notes = [
                f"a stream of {LONG:,} records: {LONG / seconds:,.0f} records/s durable and acknowledged, writer "
                f"{(writer.processor_time() - used) / LONG * 1e6:.0f} µs of processor a record, "
                f"{memory:.0f} MiB before and {writer.memory():.0f} MiB after",
                f"{A_SECOND:,} events a second, the three records of each in one packet: writer "
                f"{writer.deliver() / EVENTS * 1e6:.0f} µs of processor an event",
            ]
        finally:
            for one in writers:
                one.stop()
        notes += reading(writer.paths.audit_log)
    scaled = tuple(
        Series(one.name, one.builds, one.unit, tuple(s * BATCH / SYNCED for s in one.samples))
        if one.name.endswith("each")
        else one
        for one in series
    )
    return Report(
        name="audit",
        title=f"Recording {BATCH:,} facts until all are durable",
        series=tuple(sorted(scaled, key=lambda one: one.median)),
        baselines=("JSON lines, one fsync", "isolator"),
        notes=tuple(notes),
    )
