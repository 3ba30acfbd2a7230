"""A good plugin beside bad ones, and beside a local user who is nobody: how much longer do its things take?

Each bad neighbour has its turn once a round: some seconds without it, then as many with it. Figures are those that
somebody waits for: a delivery from ``event.emit`` to its outcome, a name, a connection and a call of the host API as
the good plugin sees them, and a command. Goal: no 99th percentile more than doubled. What does not come counts as 10 s.

A 99th percentile of a hundred samples is the second worst of them. So the samples of all rounds go together on either
side, and beside the ratio of the two percentiles stand the bounds between which nine of ten resamplings of rounds and
samples put it. Bounds with 2 between them show neither that the goal is reached nor that it is missed.

The daemon runs in a network namespace with a pretend internet behind it; nothing leaves the machine. Run it on a
machine that does nothing else: a bad plugin may use the whole core that it is granted, and that alone costs the others.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import bad_neighbours_own as own
from bench import bad_neighbours_subjects as subjects
from bench.delivery_subjects import payload
from bench.frame import Report, Series
from host.client.client import Client
from isolator.errors import IsolatorError
from tests.support.internet_servers import OTHER, WEB
from tests.support.pretend_internet import PretendInternet, pretend_internet
from tests.system.daemon import Daemon, daemon, wait_for, write_plugin

FIGURES = ("delivery", "dns", "connect", "host API", "command")
SERVICES = ("supervisor", "audit", "broker", "host")
LOST = 10_000.0
HOST_TOML = f"""
[network]
resolvers = ["{WEB}"]
[defaults]
cpu = "100%"
[ceiling]
cpu = "400%"
"""
EGRESS = (
    f"{subjects.GRANTED}:{subjects.ECHO_PORT},{subjects.TLS_PORT},{subjects.POUR_PORT},{subjects.MIRROR_PORT}",
    f"*.{subjects.HOSTILE_ZONE}:443",
)
NOBODY = "65534"
SETTLE, START = 1.0, 1.5
RESAMPLINGS = 400
Samples = dict[str, list[float]]


def measure(rounds: int) -> Report:
    """Measure each neighbour ``rounds // 12`` times, at least four times, for six seconds without it and with it.

    ``ISOLATOR_NEIGHBOUR``: words, with ``|`` between them; only neighbours with one of them in their names.
    """
    turns, length = max(4, rounds // 12), 6.0
    only = os.environ.get("ISOLATOR_NEIGHBOUR", "").split("|")
    quiet: dict[str, list[Samples]] = {}
    beside: dict[str, list[Samples]] = {}
    with pretend_internet() as made, _hostile_internet(made), _platform(made) as platform:
        neighbours = {name: act for name, act in _neighbours(platform).items() if any(one in name for one in only)}
        for _ in range(turns):
            for name, act in neighbours.items():
                quiet.setdefault(name, []).append(platform.during(length))
                with act():
                    time.sleep(START)
                    beside.setdefault(name, []).append(platform.during(length))
                time.sleep(SETTLE)
    return _report(quiet, beside)


def _report(quiet: dict[str, list[Samples]], beside: dict[str, list[Samples]]) -> Report:
    series = []
    notes = []
    for name, rounds in beside.items():
        told = []
        for figure in FIGURES:
            pairs = [(a[figure], b[figure]) for a, b in zip(quiet[name], rounds, strict=True)]
            series.append(
                Series(f"{name}: {figure}", "p99 with it / without", "×", tuple(_p99(b) / _p99(a) for a, b in pairs))
            )
            without, with_it = map(_p99, map(_together, zip(*pairs, strict=True)))
            low, high = _bounds(pairs)
            missed = "" if with_it <= 2 * without else " (!)" if low > 2 else " (?)"
            told.append(
                f"{figure} {without:.1f} → {with_it:.1f} ms "
                f"(× {with_it / without:.2f}, {low:.2f} to {high:.2f}){missed}"
            )
        notes.append(f"p99 beside one that {name}: {', '.join(told)}; {_of_services(quiet[name], rounds)}")
    notes.append("(!) above 2 with both bounds, (?) above 2 and perhaps not")
    return Report("bad_neighbours", "A good plugin beside bad neighbours", tuple(series), notes=tuple(notes))


def _together(parts: Sequence[Sequence[float]]) -> list[float]:
    return [value for part in parts for value in part]


def _bounds(pairs: Sequence[tuple[list[float], list[float]]]) -> tuple[float, float]:
    """The 5th and the 95th percentile of the ratio, over resamplings of the rounds and of the samples of each."""
    chance = random.Random(0)  # the same samples have the same bounds
    ratios = []
    for _ in range(RESAMPLINGS):
        drawn = chance.choices(pairs, k=len(pairs))
        without, with_it = (
            _p99(_together([chance.choices(one, k=len(one)) for one in side])) for side in zip(*drawn, strict=True)
        )
        ratios.append(with_it / without)
    ratios.sort()
    return ratios[RESAMPLINGS // 20], ratios[-RESAMPLINGS // 20]


def _of_services(quiet: list[Samples], beside: list[Samples]) -> str:
    """The processor time of each service: how much of what a neighbour costs is work that it makes for others."""
    told = []
    for name in SERVICES:
        without, with_it = (statistics.median(samples[name][0] for samples in side) for side in (quiet, beside))
        told.append(f"{name} {without:.0f} → {with_it:.0f}")
    return f"processor time in ms a second: {', '.join(told)}"


def _p99(values: list[float]) -> float:
    ordered = sorted(values) or [LOST]
    return ordered[(len(ordered) - 1) * 99 // 100]


class Platform:
    """A daemon with its good plugin, and what somebody outside sees of it."""

    def __init__(self, running: Daemon) -> None:
        self.running = running
        self.client = Client(running.root, timeout=60)
        self._samples = running.root / "var/lib/isolator/state/good/mnt/state/samples"
        self._numbers = iter(range(1 << 30))

    def add(self, name: str, script: str, hook: str, **manifest: object) -> None:
        """Add a plugin that may use the pretend internet."""
        policies = self.running.root / "etc/isolator/policies"
        policies.mkdir(parents=True, exist_ok=True)
        listed = ", ".join(f'"{one}"' for one in EGRESS)
        limits = "[limits]\nconnects_per_second = 200\n" if name == "good" else ""  # it never has that many
        (policies / f"{name}.toml").write_text(f'[grant]\nhooks = ["{hook}"]\negress = [{listed}]\n{limits}')
        destinations = [one.rpartition(":") for one in EGRESS]
        egress = [{"host": host, "ports": [int(port) for port in ports.split(",")]} for host, _, ports in destinations]
        folder = write_plugin(
            self.running.root / "src" / name, script, hooks=[hook], sandbox={"network": {"egress": egress}}, **manifest
        )
        self.running.cli("plugin", "add", str(folder), "--yes")

    def remove(self, name: str) -> None:
        """Remove a plugin with its policy."""
        self.running.cli("plugin", "remove", name, "--yes")
        (self.running.root / f"etc/isolator/policies/{name}.toml").unlink(missing_ok=True)
        shutil.rmtree(self.running.root / "src" / name)

    def emit(self, hook: str) -> str:
        """Emit an event; returns its id."""
        return str(self.client.call("event.emit", name=hook, payload=payload(hook, next(self._numbers)))["id"])

    def during(self, length: float) -> Samples:
        """Return the samples of so many seconds from now, in ms; of each service its processor time in ms a second."""
        before, size, began = self._used(), self._samples.stat().st_size, time.monotonic()
        found: Samples = {figure: [] for figure in FIGURES}
        commands = threading.Thread(target=self._commands, args=(began + length, found["command"]))
        commands.start()
        while time.monotonic() < began + length:
            found["delivery"].append(self._timed(self._deliver))
            time.sleep(0.04)
        commands.join()
        seconds = time.monotonic() - began
        with self._samples.open("rb") as file:
            file.seek(size)
            for line in file.read().decode().splitlines():
                figure, _, took = line.split("\t")[:3]
                found[figure].append(float(took))
        for figure in FIGURES:
            if not found[figure]:
                found[figure].append(LOST)
        after = self._used()
        return found | {name: [(after[name] - before[name]) * 1e3 / seconds] for name in SERVICES}

    def _used(self) -> dict[str, float]:
        """Seconds of processor time that each service has used."""
        pids = {entry["name"]: entry["pid"] for entry in self.client.call("status")["services"]}
        return {name: sum(_ticks(pids[name])) / os.sysconf("SC_CLK_TCK") for name in SERVICES}

    def _commands(self, end: float, found: list[float]) -> None:
        while time.monotonic() < end:
            found.append(self._timed(lambda: self.running.cli("plugin", "list")))
            time.sleep(0.1)

    def _deliver(self) -> None:
        row = self.client.call("event.wait", id=self.emit("deploy.completed"), timeout=10)
        if any(delivery["state"] != "ok" for delivery in row["deliveries"]):
            raise AssertionError(row["deliveries"])

    @staticmethod
    def _timed(action: Callable[[], object]) -> float:
        began = time.perf_counter()
        try:
            action()
        except (IsolatorError, AssertionError, subprocess.TimeoutExpired) as error:
            print(f"  lost: {str(error)[:300]}", file=sys.stderr)
            return LOST
        return (time.perf_counter() - began) * 1e3


def _ticks(pid: int) -> tuple[int, int]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]), int(fields[12])


@contextlib.contextmanager
def _platform(made: PretendInternet) -> Iterator[Platform]:
    with daemon(host_toml=HOST_TOML, network=made.host_fd) as running:
        platform = Platform(running)
        platform.add("good", subjects.GOOD, "deploy.completed")
        running.cli("plugin", "start", "good")
        wait_for(
            lambda: platform._samples.exists() and platform._samples.stat().st_size > 0, what=running.log.read_text()
        )
        yield platform
        platform.client.close()


def _neighbours(platform: Platform) -> dict[str, Callable[[], contextlib.AbstractContextManager[None]]]:
    found: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {}

    def plugin(number: int, bad: subjects.BadPlugin) -> None:
        @contextlib.contextmanager
        def act() -> Iterator[None]:
            name = f"bad-{number}"
            transport = {"transport": {"mode": "stream"}} if bad.stream else {}
            platform.add(name, bad.script, "deploy.failed", **transport)
            platform.emit("deploy.failed")
            yield
            platform.remove(name)

        found[bad.does] = act

    def stranger(how: str) -> None:
        @contextlib.contextmanager
        def act() -> Iterator[None]:
            control = platform.running.root / "run/isolator/control.sock"
            command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", sys.executable, "-I",
                       "-c", subjects.STRANGER, str(control), how]  # fmt: skip
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                process.stdout.readline()
                yield
                process.kill()

        found[subjects.STRANGERS[how]] = act

    for number, bad in enumerate(subjects.BAD + own.BAD):
        plugin(number, bad)
    for how in subjects.STRANGERS:
        stranger(how)
    return found


@contextlib.contextmanager
def _hostile_internet(made: PretendInternet) -> Iterator[None]:
    """The attackers' servers, and a zone whose answers have 64 KiB."""
    internet = made.internet
    zone = b"".join(bytes([len(label)]) + label.encode() for label in subjects.HOSTILE_ZONE.split("."))

    def crafted(wire: bytes, over_tcp: bool) -> list[bytes]:
        if zone not in wire.lower():
            reply = internet.dns._reply(wire)
            return [reply] if reply is not None else []
        question = wire[12 : wire.index(b"\0", 12) + 5]
        address = bytes(map(int, OTHER.split(".")))
        records = 4000 if over_tcp else 0
        flags = 0x8180 if over_tcp else 0x8380
        answer = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 60, 4) + address
        return [wire[:2] + struct.pack(">HHHHH", flags, 1, records, 0, 0) + question + answer * records]

    internet.dns.crafted = crafted
    command = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{internet.fd}", sys.executable, "-I", "-c", subjects.SERVERS]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as servers:
        assert servers.stdout is not None
        servers.stdout.readline()
        yield
        servers.kill()
