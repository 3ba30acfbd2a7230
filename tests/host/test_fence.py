"""Past a plugin's deadline the host sends it nothing, answers it nothing, and takes no outcome of its as an attempt.

The sidecars here are plain processes that nobody freezes: what holds them back is the host alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from host.delivery.outcome import Outcomes
from host.fence.fences import NO_LEASE, Fences
from isolator.ipc.fence import LOST, Fence
from isolator.ipc.messages import FreePlugin, HoldPlugin
from isolator.linux.boottime import boottime
from tests.host.fake_supervisor import Daemon, Sidecar
from tests.support import sidecars
from tests.support.timeouts import seconds

ORDERS = """
import asyncio, json
from host.fence import fences
made = fences.Fences.__init__
def init(self, tell):
    made(self, tell)
    async def serve(reader, writer):
        verb, *arguments = json.loads(await reader.readline())
        getattr(self, verb)(*arguments)
        writer.write(b"done")
        writer.close()
    self.kept = asyncio.get_running_loop().create_task(asyncio.start_unix_server(serve, "PLACE"))
fences.Fences.__init__ = init
"""
"""Lets a test do in the host process what a holder of leases does."""
WITHOUT = "from isolator.ipc import fence\nfence.Fence.closed = property(lambda self: False)\n"
CALLER = sidecars.oneshot(
    """
say("handled")
while not os.path.exists("go"):
    time.sleep(0.01)
return {"status": "ok"}
""",
    first="""
def say(line):
    os.write(1, line.encode() + b"\\n")  # at once: print() writes the newline by itself, after another thread's word
def call():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.environ["PLUGIN_HOST_SOCKET"])
        sock.sendall(b'{"jsonrpc":"2.0","method":"whoami","id":1}\\n')
        sock.makefile().readline()
        say("answered")
def calls():
    while not os.path.exists("call"):
        time.sleep(0.01)
    say("calls")
    call()
import threading
threading.Thread(target=calls, daemon=True).start()
""",
)
"""Answers an event once there is a file ``go``, and calls the host API once there is a file ``call``."""


class FencedDaemon(Daemon):
    """A fake daemon with a host that takes orders."""

    async def order(self, verb: str, *arguments: Any) -> None:
        """Have the host ``hold``, ``free`` or lose (``lost``) a plugin."""
        orders = self.paths.host_lib / "orders"
        async with asyncio.timeout(seconds(30)):
            while True:
                with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):  # made, and soon listened at
                    reader, writer = await asyncio.open_unix_connection(str(orders))
                    break
                await asyncio.sleep(0.01)
        writer.write(json.dumps([verb, *arguments]).encode() + b"\n")
        assert await reader.read() == b"done"
        writer.close()

    async def lines(self, name: str) -> list[str]:
        """What a plugin has written."""
        found = await self.ask("plugin.logs", name=name, lines=100)
        return [line["line"] for line in found["lines"]]

    async def until_written(self, name: str, line: str) -> None:
        async with asyncio.timeout(seconds(30)):
            while line not in await self.lines(name):  # noqa: ASYNC110 # no event tells of a line in a log
                await asyncio.sleep(0.02)

    async def listed(self, name: str) -> dict[str, Any]:
        return next(one for one in (await self.ask("plugin.list"))["plugins"] if one["name"] == name)

    async def until_idle(self, name: str) -> None:
        """Wait until the host has noticed how an attempt ended."""
        async with asyncio.timeout(seconds(30)):
            while (await self.listed(name))["worker"] != "idle":  # noqa: ASYNC110 # no notification tells
                await asyncio.sleep(0.02)

    async def until_held(self, name: str) -> None:
        async with asyncio.timeout(seconds(30)):
            while (await self.listed(name))["holding"] != "it has no lease at the moment":  # noqa: ASYNC110 # as above
                await asyncio.sleep(0.02)


@pytest.fixture
async def made(shared_dir: Path) -> AsyncIterator[FencedDaemon]:
    fake = FencedDaemon(shared_dir)
    fake.first = ORDERS.replace("PLACE", str(fake.paths.host_lib / "orders"))
    yield fake
    await fake.stop()


def touch(sidecar: Sidecar, name: str) -> None:
    (sidecar.folder / name).touch()


async def deliveries(daemon: Daemon, event: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The deliveries of an event by plugin."""
    return {one["plugin"]: one for one in (await daemon.ask("event.show", id=event["id"]))["deliveries"]}


async def until_there(daemon: Daemon, event: dict[str, Any], **expected: tuple[str, int]) -> None:
    """Wait until the deliveries to some plugins have these states and attempts."""
    async with asyncio.timeout(seconds(30)):
        while True:
            found = await deliveries(daemon, event)
            if all((found[name]["state"], found[name]["attempts"]) == end for name, end in expected.items()):
                return
            await asyncio.sleep(0.02)


def test_only_a_plugin_that_is_bound_to_no_time_is_bound() -> None:
    told: list[object] = []
    fences, later = Fences(told.append), boottime() + 600
    fences.bind("p")
    assert fences.of("p").lost
    fences.hold("p", later)
    fences.bind("p")
    assert not fences.of("p").closed
    fences.free("p")
    assert told == [HoldPlugin(name="p", until=LOST), HoldPlugin(name="p", until=later), FreePlugin(name="p")]


async def test_plugin_past_its_deadline_is_sent_nothing_until_that_is_moved(made: FencedDaemon) -> None:
    await made.start()
    plugin = made.add("caller", CALLER)
    touch(plugin, "go")
    await made.order("hold", "caller", boottime() - 1)
    event = await made.emit()
    await made.until_held("caller")
    assert made.ensured == [] and (await deliveries(made, event))["caller"]["attempts"] == 0
    await made.kill_host()
    made.fences = {"caller": LOST}
    await made.start_host()
    await made.until_held("caller")
    await made.order("hold", "caller", boottime() + seconds(600))
    (outcome,) = (await made.outcome(event))["deliveries"]
    assert (outcome["state"], outcome["attempts"]) == ("ok", 1)


async def test_call_past_the_deadline_is_answered_once_that_is_moved(made: FencedDaemon) -> None:
    await made.start()
    plugin = made.add("caller", CALLER)
    touch(plugin, "go")
    assert (await made.deliver())["state"] == "ok"
    await made.order("hold", "caller", LOST)
    touch(plugin, "call")
    await made.until_written("caller", "calls")
    event = await made.emit()
    await made.until_held("caller")
    assert "answered" not in await made.lines("caller")
    assert made.of_type("api.called") == []
    await made.order("hold", "caller", boottime() + seconds(600))
    await made.until_written("caller", "answered")
    assert (await made.outcome(event))["deliveries"][0]["state"] == "ok"


async def test_attempt_that_ends_past_the_deadline_has_an_outcome_once_that_is_moved(made: FencedDaemon) -> None:
    await made.start()
    names = ("replies", "dies", "lost")
    plugins = {name: made.add(name, CALLER) for name in names}
    event = await made.emit()
    for name, plugin in plugins.items():
        await made.until_written(name, "handled")
        await made.order("hold", name, boottime() - 1)
        if name == "dies":
            assert plugin.process is not None
            plugin.process.kill()
        touch(plugin, "go")
        await made.until_idle(name)
    assert {one["state"] for one in (await deliveries(made, event)).values()} == {"in_flight"}
    assert made.of_type("event.response") == []

    await made.order("lost", "lost")
    await until_there(made, event, lost=("retry", 0))  # another host repeats it
    await made.until(lambda: [r["data"]["status"] for r in made.of_type("event.response")] == ["frozen"])
    for name in ("replies", "dies"):
        await made.order("hold", name, boottime() + seconds(600))
    await until_there(made, event, replies=("ok", 1), dies=("ok", 1))
    assert (await made.lines("replies")).count("handled") == 1


def test_request_is_given_up_if_the_deadline_passes_before_it_is_written() -> None:
    begun: list[Any] = []
    sent: list[str] = []
    fence = Fence(boottime() + 600)
    attempts: Any = SimpleNamespace(begin=begun.append)
    absent: Any = None
    outcomes = Outcomes("caller", absent, absent, absent, attempts, fence)
    delivery: Any = SimpleNamespace(seq=1)
    for _ in range(2):
        outcomes.begin(delivery, "run", b"request", lambda: sent.append("sent"), sent.append)
    begun[0].send()
    fence.move(LOST)
    begun[1].send()
    assert sent == ["sent", NO_LEASE]


async def test_host_without_the_check_sends_and_answers_past_the_deadline(made: FencedDaemon) -> None:
    made.first += WITHOUT
    await made.start()
    plugin = made.add("caller", CALLER)
    touch(plugin, "go")
    await made.order("hold", "caller", LOST)
    assert (await made.deliver())["state"] == "ok", "the attack is no attack"
    touch(plugin, "call")  # not before: the plugin may be quicker than the socket that it calls
    await made.until_written("caller", "answered")
