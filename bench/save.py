"""From a save to the answer of the new version under ``isolator dev``, beside the start of the same program alone.

A round writes the program anew, as an editor does, and waits for the answer to the event that ``--event`` sends then:
the copy, both reads of the folder, the exchange of the cages and the start of the program are in it. Each round waits
untimed until the trial of the version before is over. Goal: 500 ms at most in 95 of 100 rounds, on a machine at rest;
the load average stands below the table.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import tempfile
import textwrap
import time
from pathlib import Path

from bench.frame import Contender, Report, interleave
from tests.authoring.dev_process import DevProcess, answering
from tests.system.daemon import write_plugin

NAME, ALONE = "isolator dev", "the program alone"
TRIAL = 1.3
"""Seconds: a version is on trial for one."""
REQUEST = {"jsonrpc": "2.0", "id": 1, "method": "deploy.completed", "params": {}}
GOAL = 500


def measure(rounds: int) -> Report:
    """Save ``rounds`` times."""
    with tempfile.TemporaryDirectory(prefix="isolator-bench-") as work:
        folder = write_plugin(Path(work) / "saved", answering(), sandbox={"network": {"egress": []}})
        with DevProcess(folder, "--event", "deploy.completed") as dev:
            dev.next("answer")
            versions = itertools.count(2)
            in_use: list[float] = []

            def save() -> None:
                number = next(versions)
                (folder / "main").write_text(_program(number))
                in_use.append(dev.next("loaded")["seconds"] * 1e3)
                answer = dev.next("answer")
                assert answer["ok"] and f'"saved {number}"' in answer["reply"], answer

            def alone() -> None:
                _answer_of(folder / "main", Path(work))

            loads = [os.getloadavg()[0]]
            series = interleave(
                [
                    Contender(ALONE, "its start and one answer", alone),
                    Contender(NAME, "everything", save, before=lambda: time.sleep(TRIAL)),
                ],
                rounds,
            )
            loads.append(os.getloadavg()[0])
    mine = next(one for one in series if one.name == NAME)
    notes = (
        f"p95 {mine.quantile(0.95):.0f} ms (to reach: {GOAL} ms); until it is in use, median: "
        f"{sorted(in_use)[len(in_use) // 2]:.0f} ms",
        f"load average {loads[0]:.1f} at the beginning, {loads[1]:.1f} at the end",
    )
    return Report("save", "From a save to the answer of the new version", series, baselines=(ALONE,), notes=notes)


def _program(number: int) -> str:
    return textwrap.dedent(answering(f'"saved {number}"', number))


def _answer_of(program: Path, work: Path) -> None:
    path = work / "alone.sock"
    process = subprocess.Popen(
        [program], env={"PATH": os.environ["PATH"], "PLUGIN_SOCKET": str(path)}, stdout=subprocess.DEVNULL
    )
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            while True:
                with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                    connection.connect(str(path))
                    break
                time.sleep(0.001)  # no event tells when a plain program listens
            connection.sendall(json.dumps(REQUEST).encode() + b"\n")
            assert b'"ok"' in connection.recv(4096)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        path.unlink(missing_ok=True)
