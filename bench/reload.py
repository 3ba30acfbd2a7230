"""Reloads under load: how long dispatch pauses, how long the slowest ``emit`` takes, and whether all came through.

Twenty plugins run and get a hundred deliveries a second between them: five events, each for all. One more plugin has
events of its own: a caller emits one and waits for its outcome, again and again. A round is one ``isolator reload``;
its sample is the longest such wait that began or ended in it. A sidecar that is started again, an event that is
refused, lost or delivered twice is an error of the benchmark. Then, in a daemon of its own, a plugin writes 10 MB a
second to its stdout and notes how long each write takes; the longest of a round is its sample.
Goal: a pause of 1 s at most in 99 of 100 rounds, and no write that takes longer.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.frame import Report, Series
from host.client.client import Client
from tests.system.daemon import ECHO, Daemon, daemon, wait_for, write_plugin
from tests.system.reload.test_output import FLOODS
from tests.system.reload.test_reload import STATE, held, running, seen, wait_until_parked

PLUGINS, RATE = 20, 100
LOAD, PROBE = "deploy.completed", "deploy.failed"
MORE: dict[str, dict[str, object]] = {
    LOAD: {"url": "https://x.example/", "duration_ms": 1},
    PROBE: {"error_code": "none"},
}
WRITES = FLOODS.replace(
    "lines = lines[os.write(1, lines):]",
    "before = time.monotonic(); lines = lines[os.write(1, lines):]; note(time.monotonic() - before)",
).replace(
    "def flood(",
    """def note(seconds):
    with open(os.environ["PLUGIN_STATE_DIR"] + "/writes", "a") as writes:
        writes.write("%.4f\\n" % seconds)
def flood(""",
)


def measure(rounds: int) -> Report:
    """Reload ``rounds`` times."""
    folder = Path(tempfile.mkdtemp(prefix="isolator-bench-"))
    folder.chmod(0o755)
    try:
        with daemon() as d:
            report = _measure(d, folder, rounds)
        with daemon() as d:
            calm, writes = _measure_writes(d, folder, rounds)
        note = f"longest write to stdout in the second before the first reload: {calm:.0f} ms"
        return replace(report, series=(*report.series, writes), notes=(*report.notes, note))
    finally:
        shutil.rmtree(folder)


def _measure_writes(d: Daemon, folder: Path, rounds: int) -> tuple[float, Series]:
    """The longest write to stdout in a second without a reload, in ms, and the longest of each round."""
    d.cli("plugin", "add", str(write_plugin(folder / "writes", WRITES, sandbox=STATE)), "--yes")
    d.cli("plugin", "start", "writes")
    before, state = running(d), d.root / "var/lib/isolator/state/writes/mnt/state"
    (state / "go").touch()
    wait_for((state / "writes").exists)
    longest = []
    with (state / "writes").open() as file:
        for number in range(rounds + 1):
            if number:
                d.cli("reload")
            time.sleep(0.5 if number else 1.0)  # events go on for as long between two reloads
            longest.append(max(float(line) * 1000 for line in file.read().split()))
    assert running(d) == before, "the sidecar was started again"
    return longest[0], Series("writes", "longest write to stdout, of 10 MB a second", "ms", tuple(longest[1:]))


def _measure(d: Daemon, folder: Path, rounds: int) -> Report:
    names = [f"p{number}" for number in range(PLUGINS)]
    for name in (*names, "probe"):
        hooks = [PROBE if name == "probe" else LOAD]
        d.cli("plugin", "add", str(write_plugin(folder / name, ECHO, sandbox=STATE, hooks=hooks)), "--yes")
        d.cli("plugin", "start", name)
    wait_until_parked(d)
    before, first = running(d), held(d)
    stopped, sent, waits, emits = threading.Event(), Counter[str](), [0.0], [0.0]

    def emit(client: Client, hook: str) -> str:
        sent[hook] += 1
        name, began = f"n{sent[hook]}", time.monotonic()
        payload = {"project_id": name, "deployment_id": name, **MORE[hook]}
        found = client.call("event.emit", name=hook, payload=payload)
        emits[0] = max(emits[0], time.monotonic() - began)
        return str(found["id"])

    def load() -> None:
        with Client(d.root) as client:
            while not stopped.wait(PLUGINS / RATE):
                emit(client, LOAD)

    def probe() -> None:
        with Client(d.root) as client:
            while not stopped.is_set():
                began = time.monotonic()
                client.call("event.wait", id=emit(client, PROBE), timeout=60)
                waits[0] = max(waits[0], time.monotonic() - began)

    failed: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (load, probe)]
    for thread in threads:
        thread.start()
    pauses, slowest = [], []
    try:
        for _ in range(rounds):
            if failed:
                raise AssertionError(d.log.read_text()) from failed[0]
            waits[0] = emits[0] = 0.0
            d.cli("reload")
            time.sleep(0.5)
            pauses.append(waits[0] * 1000)
            slowest.append(emits[0] * 1000)
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert not failed, failed
    with Client(d.root) as client:
        wait_for(lambda: not any(client.call("status")["queue"].values()), 300, "events are left")
    if (after := running(d)) != before:
        raise AssertionError(
            f"sidecars were started again: {set(after.items()) ^ set(before.items())}\n{d.log.read_text()}"
            + d.cli("plugin", "logs", *{name for name, _ in set(after.items()) ^ set(before.items())}).stdout[-4000:]
        )
    for name in (*names, "probe"):
        counts = seen(d, name)
        assert len(counts) == sent[PROBE if name == "probe" else LOAD] and set(counts.values()) == {1}, (
            f"{name}: events were lost or came twice"
        )
    seconds = [one["data"]["seconds"] * 1000 for one in d.records() if one["type"] == "daemon.reloaded"]
    return Report(
        "reload", f"reloads of a daemon with {PLUGINS} plugins under {RATE} deliveries a second",
        (
            Series("pause in dispatch", "longest from emit to outcome", "ms", tuple(pauses)),
            Series("emit", "longest until it is accepted", "ms", tuple(slowest)),
            Series("at rest", "as the daemon records it", "ms", tuple(seconds)),
        ),
        notes=(f"descriptors and threads of the supervisor: {first} before, {held(d)} after",),
    )  # fmt: skip
