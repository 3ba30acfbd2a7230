"""Traffic of a plugin: through a cage's ruleset and the broker, beside a direct connection in the same run.

Client, broker and server are processes of their own. The server is in a namespace behind a veth, the broker in the one
that plays the host; the client runs once there (direct) and once in a cage (isolator). Nothing leaves the machine. The
broker is the product's own, unprivileged and hardened; its records are read, acknowledged and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bench.frame import Report, Series
from isolator.linux import netns
from isolator.policy.model import NetworkPolicy
from tests.broker.conftest import listed
from tests.support.pretend_internet import WEB, BrokerProcess, CageNet, PretendInternet, pretend_internet

ENDS = Path(__file__).with_name("egress_ends.py")
CONNECTS = 100
FLOW = 256_000_000
PLUGINS, FLOWS = 25, 20
WARM, MANY = 2_000, 20_000
STORM, RATE = 10_000, 1_000
COMMIT = 0.005
"""Seconds from one commit of the trail to the next, and so from one acknowledgement of its writer to the next."""


def measure(rounds: int) -> Report:
    """Measure latency and one flow, interleaved; then many flows, memory, and whether every flow is on record."""
    return asyncio.run(_measure(max(5, rounds // 5)))


async def _measure(rounds: int) -> Report:
    with pretend_internet() as made:
        async with _line(made) as (broker, cage, address):
            series = await _side_by_side(made, cage, address, rounds)
            notes = [_compared(series), await _on_record(broker, cage, address), await _memory(broker, cage, address)]
        async with _line(made) as (broker, _, _):
            notes.append(await _many_flows(made, broker))
    return Report("egress", f"Carrying traffic ({FLOW // 1_000_000} MB a flow)", series, notes=tuple(notes))


@asynccontextmanager
async def _line(made: PretendInternet) -> AsyncIterator[tuple[BrokerProcess, CageNet, str]]:
    """Start server, broker and one cage; yields the address that stands for the server's name in the cage."""
    server = await _start(made.internet.fd, "server")
    assert server.stdout is not None
    await server.stdout.readline()
    broker = await BrokerProcess.start(made)
    broker.gather = COMMIT
    cage = await CageNet.attach(broker, _policy())
    for fd in (made.host_fd, cage.network.netns_fd):
        # Closed connections keep their port for a minute, and there are more of them here than ports by default.
        netns.in_network(fd, lambda: Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("1024 64999"))
    try:
        yield broker, cage, await cage.client("print(socket.gethostbyname('hooks.example.com'))")
    finally:
        await cage.detach()
        await broker.stop()
        with contextlib.suppress(ProcessLookupError):
            server.kill()
        await server.wait()


def _policy() -> NetworkPolicy:
    ports = "hooks.example.com:9000,9001,9002"
    return listed(ports, connects_per_second=100_000, connect_burst=100_000, connects_open=512)


async def _start(fd: int, *words: object) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        "nsenter", f"--net=/proc/{os.getpid()}/fd/{fd}", sys.executable, "-I", str(ENDS), *map(str, words),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def _run(fd: int, *words: object) -> list[float]:
    process = await _start(fd, *words)
    out, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{words[0]} ended with {process.returncode}")
    return [float(word) for word in out.split()]


async def _side_by_side(made: PretendInternet, cage: CageNet, address: str, rounds: int) -> tuple[Series, ...]:
    samples: dict[str, list[float]] = {}
    sides = [("direct", made.host_fd, WEB), ("isolator", cage.network.netns_fd, address)]
    for number in range(-1, rounds):
        for side, fd, where in sides if number % 2 else reversed(sides):
            connect, first = await _run(fd, "latency", where, CONNECTS)
            (seconds,) = await _run(fd, "flow", where, FLOW)
            if number >= 0:
                for what, value in (("connect", connect), ("first byte", first), ("flow", seconds * 1e3)):
                    samples.setdefault(f"{side}: {what}", []).append(value)
    builds = {"direct": "no cage", "isolator": "ruleset, broker, records"}
    names = sorted(samples, key=lambda name: name.partition(": ")[::-1])
    return tuple(Series(name, builds[name.partition(":")[0]], "ms", tuple(samples[name])) for name in names)


def _compared(series: tuple[Series, ...]) -> str:
    by_name = {one.name: one for one in series}
    told = []
    for what in ("connect", "first byte"):
        ours, direct = by_name[f"isolator: {what}"], by_name[f"direct: {what}"]
        added = statistics.median(a - b for a, b in zip(ours.samples, direct.samples, strict=True))
        told.append(f"{what} + {added:.2f} ms (× {ours.ratio_to(direct):.2f})")
    ours, direct = by_name["isolator: flow"], by_name["direct: flow"]
    rates = [FLOW / one.median / 1e6 for one in (ours, direct)]
    told.append(f"one flow {rates[0]:.2f} GB/s, direct {rates[1]:.2f} (takes × {ours.ratio_to(direct):.2f})")
    return "added by isolator: " + ", ".join(told)


async def _on_record(broker: BrokerProcess, cage: CageNet, address: str) -> str:
    broker.records.clear()
    served, seconds = await _run(cage.network.netns_fd, "storm", address, STORM, RATE)
    await broker.quiet()
    kinds = [record["type"] for record in broker.records]
    connects, closed = kinds.count("net.connect"), kinds.count("net.closed")
    return (
        f"{STORM} connects asked at {RATE}/s: {served / seconds:.0f}/s served ({served:.0f}), "
        f"on record {connects} connects and {closed} ends"
    )


async def _memory(broker: BrokerProcess, cage: CageNet, address: str) -> str:
    sizes = []
    for count in (WARM, MANY - WARM):
        await _run(cage.network.netns_fd, "storm", address, count, 0)
        await broker.quiet()
        sizes.append(_resident(broker))
    return f"broker's memory: {sizes[0]:.1f} MB after {WARM} connections, {sizes[1]:.1f} MB after {MANY}"


def _resident(broker: BrokerProcess) -> float:
    for line in Path(f"/proc/{broker.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the broker has gone")


async def _many_flows(made: PretendInternet, broker: BrokerProcess) -> str:
    before = _resident(broker)
    cages = [await CageNet.attach(broker, _policy(), f"many{number}") for number in range(PLUGINS)]
    holders = []
    for cage in cages:
        address = await cage.client("print(socket.gethostbyname('hooks.example.com'))")
        holders.append(await _start(cage.network.netns_fd, "hold", address, FLOWS))
    for holder in holders:
        assert holder.stdout is not None
        assert await holder.stdout.readline() == b"open\n"
    after = _resident(broker)
    answering = 0
    for holder in holders:
        out, _ = await holder.communicate(b"")  # ends its input, which is what it waits for
        answering += int(out)
    for cage in cages:
        await cage.detach()
    return (
        f"{PLUGINS * FLOWS} flows of {PLUGINS} plugins open at once: {answering} answer; "
        f"the broker takes {after - before:.1f} MB more for them"
    )
