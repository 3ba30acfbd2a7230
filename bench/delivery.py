"""Delivery of an event: from a whole daemon (cages, validation, durable queue, audit) to a sidecar and back.

Beside it stands a plugin host that has none of that: a Node process (or, where there is no Node, a Python
one) that connects to the same script's socket, writes one line and reads one line. Per round each contender delivers
one event; the daemon's times are those of its own audit records (made in the process that did it):

    dispatch      accepted (safe on disk) → written to the running plugin
    round trip    accepted → reply recorded
    emit          the caller's call of ``emit`` → answered, which includes the sync to disk
    one sync      of a block of 4 KiB to the same disk: no durable queue can do without it

The notes have the times of each stage, and the figures of a busy daemon (``delivery_load.py``).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.delivery_load import under_load
from bench.delivery_subjects import EVENT, HOST_TOML, ONESHOT, STREAM, Passage, Subject, Trail, one_sync, settle
from bench.frame import Report, Series, Skipped
from host.client.client import Client
from tests.support.timeouts import EMULATED
from tests.system.daemon import Daemon, daemon

NODE = """
const net = require("net");
require("readline").createInterface({input: process.stdin}).on("line", (line) => {
  const began = process.hrtime.bigint();
  const socket = net.createConnection(process.argv[1], () => socket.write(line + "\\n"));
  let reply = "";
  socket.on("data", (data) => { reply += data; });
  socket.on("end", () => {
    JSON.parse(reply);
    console.log(Number(process.hrtime.bigint() - began) / 1000);
  });
});
"""
PYTHON = """
import json, socket, sys, time
for line in sys.stdin:
    began = time.perf_counter_ns()
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(sys.argv[1])
    peer.sendall(line.encode())
    json.loads(peer.makefile().read())
    peer.close()
    print((time.perf_counter_ns() - began) / 1000, flush=True)
"""


class Reference:
    """Plain host and its sidecar: the same script, no cage, no queue, no trail."""

    def __init__(self, work: Path, name: str, command: list[str]) -> None:
        self.name = name
        path = work / f"{name.split(maxsplit=1)[0]}.sock"
        script = work / "sidecar.py"
        script.write_text("\n".join(line[4:] for line in ONESHOT.splitlines()))
        self._sidecar = subprocess.Popen(
            ["/usr/bin/python3", str(script)], env={**os.environ, "PLUGIN_SOCKET": str(path)}
        )
        while not path.exists():
            time.sleep(0.01)
        self._host = subprocess.Popen(
            [*command, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._line = json.dumps({"jsonrpc": "2.0", "method": "deploy.completed", "params": EVENT, "id": 1}) + "\n"

    def once(self) -> float:
        """Deliver an event; returns µs as the plain host measured them."""
        assert self._host.stdin is not None
        assert self._host.stdout is not None
        self._host.stdin.write(self._line)
        return float(self._host.stdout.readline())

    def close(self) -> None:
        for process in (self._host, self._sidecar):
            process.kill()
            process.wait()


@contextlib.contextmanager
def references() -> Iterator[tuple[list[Reference], list[Skipped]]]:
    """Start every plain host that this machine can run."""
    found: list[Reference] = []
    skipped: list[Skipped] = []
    with tempfile.TemporaryDirectory(prefix="isolator-bench-") as folder, contextlib.ExitStack() as stack:
        for name, program, words in (
            ("node host, no durability, no audit, no cage", shutil.which("node"), ["-e", NODE]),
            ("python host, no durability, no audit, no cage", "/usr/bin/python3", ["-c", PYTHON]),
        ):
            if program is None:
                skipped.append(Skipped(name, "node is not installed"))
                continue
            found.append(Reference(Path(folder), name, [program, *words]))
            stack.callback(found[-1].close)
        yield found, skipped


def measure(rounds: int) -> Report:
    """Deliver ``rounds`` events per contender, one at a time; then load the daemon."""
    with daemon(host_toml=HOST_TOML) as running, Client(running.root) as client:
        samples, skipped, subjects, notes = one_at_a_time(running, client, rounds)
        if EMULATED:
            notes.append("a busy daemon is not measured: this processor is emulated, and has no speed of its own")
        else:
            notes += [
                "to reach: dispatch p50 300 µs, p99 1 ms; round trip stream p50 400 µs, oneshot p50 3 × the first line",
                *under_load(running, client, subjects),
            ]
    builds = {"isolator": "cage, validation, durable queue, audit"}
    series = tuple(
        Series(name, builds.get(name.split(maxsplit=1)[0].rstrip(":"), ""), "µs", tuple(taken))
        for name, taken in samples.items()
    )
    return Report(
        name="delivery",
        title="Delivering an event (one at a time)",
        series=series,
        skipped=tuple(skipped),
        baselines=(next(iter(samples)),),
        notes=tuple(notes),
    )


def one_at_a_time(
    running: Daemon, client: Client, rounds: int
) -> tuple[dict[str, list[float]], list[Skipped], list[Subject], list[str]]:
    """Deliver ``rounds`` events per contender; returns µs by series, plain hosts first, who was skipped, and notes."""
    samples: dict[str, list[float]] = {}
    with references() as (plain, skipped):
        subjects = [
            Subject(running, "oneshot", "deploy.completed", ONESHOT),
            Subject(running, "stream", "deploy.started", STREAM, transport={"mode": "stream"}),
        ]
        for number in range(-3, rounds):
            if number == 0:
                for subject in subjects:
                    subject.clear()
            turns: list[Reference | Subject] = [*plain, *subjects]
            turn = number % len(turns)
            for one in (*turns[turn:], *turns[:turn]):
                if isinstance(one, Subject):
                    one.once(client)
                    continue
                took = one.once()
                if number >= 0:
                    samples.setdefault(one.name, []).append(took)
            if number >= 0:
                samples.setdefault("one sync", []).append(one_sync(running.root / "block"))
        settle(running, client)
        trail, notes = Trail(running), []
        for subject in subjects:
            passages = trail.passages(subject.name, subject.ids)
            samples[f"isolator {subject.name}: dispatch"] = [p.dispatch for p in passages]
            samples[f"isolator {subject.name}: round trip"] = [p.round_trip for p in passages]
            notes.append(_stages(subject, trail, passages))
        samples["isolator: emit"] = list(subjects[0].emits)
    return samples, skipped, subjects, notes


def _stages(subject: Subject, trail: Trail, passages: list[Passage]) -> str:
    """Report the median of each stage; the first ends with the sync to disk."""
    began = dict(zip(subject.ids, subject.began, strict=True))
    stages = {
        "called → accepted": [trail.accepted[event] - began[event] for event in subject.ids],
        "→ attempt on record": [p.queued for p in passages],
        "→ in the trail's hands and written": [p.dispatch - p.queued for p in passages],
        "→ reply read": [p.latency for p in passages],
    }
    return f"stages of {subject.name}, p50 in µs: " + ", ".join(
        f"{stage} {statistics.median(values):.0f}" for stage, values in stages.items()
    )
