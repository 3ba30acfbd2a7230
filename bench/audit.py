"""The audit trail: handing over a batch of records until all of it is durable, beside writing the same without a chain.

Isolator's figure is taken from the sender's side, over the real socket to the real writer process: made, checked,
tagged, chained, written, fdatasync'ed and acknowledged. The others write the same fields as JSON lines, same disk:
once with one fdatasync at the end (the floor: nothing can be proved about such a file), once with one for each record
(what "log it, then go on" costs; fewer records, scaled up).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
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
from isolator import ipc
from isolator.audit import files, reader
from isolator.audit.client import AuditClient, utc_now
from isolator.audit.seal import load_public
from isolator.audit.verify import verify
from isolator.paths import Paths

BATCH = 2000
SYNCED = 100
_DATA: dict[str, Any] = {
    "name": "hooks.slack.com",
    "address": "198.51.100.4",
    "port": 443,
    "verdict": "allowed",
    "rule": "hooks.slack.com:443",
}
_START = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1));"
    "runpy.run_module('isolator.audit.service', run_name='__main__')"
)


class Writer:
    """The audit process on a root of its own, and one source."""

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

    def send(self, count: int = BATCH) -> None:
        """Hand over ``count`` records and wait until all are durable."""
        self._runner.run(self._send(count))

    async def _send(self, count: int) -> None:
        for number in range(count):
            self._client.record("net.connect", plugin="slack-deploy-notifier", run="0123456789ab", flow=number, **_DATA)
            if number % 500 == 499:
                await self._client.settled(within=10_000)
        await self._client.settled()

    def processor_time(self) -> float:
        """Seconds of processor time that the writer has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """The writer's resident memory in MiB."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    def stop(self) -> None:
        """End it as the supervisor would."""

        async def close() -> None:
            self._client.close()
            self._channel.close()

        self._runner.run(close())
        self._runner.close()
        self.process.wait(60)


@contextlib.contextmanager
def followed(writer: Writer) -> Iterator[None]:
    """A follower that has stopped reading, as far behind as can be."""
    code = "import sys; from isolator.audit.reader import Follower; from pathlib import Path\n"
    code += "f = Follower(Path(sys.argv[1]), 0)\nf.available()\nprint('following', flush=True)\nf.wait(3600)"
    environment = {**os.environ, "PYTHONPATH": str(Path(isolator.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(writer.paths.audit_log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as follower:
        assert follower.stdout is not None
        follower.stdout.readline()
        follower.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            follower.kill()


def plain(path: Path, count: int, *, every: bool) -> None:
    """The same records as JSON lines, with one fdatasync at the end or one for each."""
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
    """How fast the finished trail is verified and searched, as notes."""
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
        count = sum(1 for _ in reader.query(directory, wanted))
        seconds = time.perf_counter() - began
        notes.append(
            f"query with conditions {what}: {seconds / report.records * 1e6:.1f} s per million ({count:,} found)"
        )
    return notes


def measure(rounds: int) -> Report:
    """Time a batch each way, ``rounds`` times (at most 60), then a long stream, then reading it."""
    rounds = min(rounds, 60)
    with tempfile.TemporaryDirectory(prefix="isolator-bench-") as folder:
        place = Path(folder)
        writer, watched = Writer(place / "one"), Writer(place / "two")
        try:
            with followed(watched):
                series = interleave(
                    [
                        Contender("JSON lines, one fsync", "durable", lambda: plain(place / "p", BATCH, every=False)),
                        Contender("JSON lines, fsync each", "durable", lambda: plain(place / "e", SYNCED, every=True)),
                        Contender("isolator", "chain, seals, cause, durable", writer.send),
                        Contender("isolator, stalled follower", "the same, watched", watched.send),
                    ],
                    rounds,
                )
            before, used, memory = time.perf_counter(), writer.processor_time(), writer.memory()
            long = 100 * BATCH
            writer.send(long)
            seconds = time.perf_counter() - before
            notes = [
                f"a stream of {long:,} records: {long / seconds:,.0f} records/s durable and acknowledged, writer "
                f"{(writer.processor_time() - used) / long * 1e6:.0f} µs of processor a record, "
                f"{memory:.0f} MiB before and {writer.memory():.0f} MiB after"
            ]
        finally:
            writer.stop()
            watched.stop()
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
        baselines=("JSON lines, one fsync",),
        notes=tuple(notes),
    )
