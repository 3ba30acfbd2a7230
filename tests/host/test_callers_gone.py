"""Callers of the control socket that have gone before they are answered: what they have changed is whole."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from host.control.endpoints import Caller, Endpoint
from host.control.event_types import EventWait
from host.control.plugin_types import PluginRemove, PluginStart
from host.control.server import ControlServer
from tests.host.fake_supervisor import Daemon
from tests.host.test_operations import _given_up, _rejects
from tests.support.timeouts import seconds

GOES = """
import asyncio
from host.control.connection import Connection
from host.database.store import Store
gone, lost, run = asyncio.Event(), Connection.connection_lost, Store.run
def connection_lost(self, error):
    lost(self, error)
    gone.set()
async def waits(self, apply):
    if ".replay." not in apply.__qualname__:
        return await run(self, apply)
    gone.clear()
    done = await run(self, apply)
    await gone.wait()
    return done
Connection.connection_lost, Store.run = connection_lost, waits
"""
"""The caller of a replay goes behind its transaction, and before its answer."""


def ask_and_go(path: Path, **requests: dict[str, Any]) -> None:
    """Ask for each verb, and be gone: the first answer that cannot be written ends the connection."""
    lines = [
        json.dumps({"jsonrpc": "2.0", "id": verb, "method": verb, "params": params})
        for verb, params in requests.items()
    ]
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
        caller.sendall("".join(f"{line}\n" for line in lines).encode())


async def answers(_: PluginStart, __: Caller) -> Any:
    return {}


async def abandoned(folder: Path, record: Callable[..., None], *more: Endpoint[Any]) -> ControlServer:
    """A server of ``plugin.start`` and more verbs, which a caller asks in turn, and is gone."""
    endpoints = [*more, Endpoint(PluginStart, answers)]
    server, path = ControlServer(endpoints, lambda _: "operator", record), folder / "control.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    await server.start(listener)
    ask_and_go(path, **{one.request.spec.verb: {"name": "one", "id": "x"} for one in endpoints})
    return server


async def test_change_goes_on_and_is_on_record_and_what_is_read_ends(shared_dir: Path) -> None:
    gone, safe, ended, stopped, recorded = (asyncio.Event() for _ in range(5))
    verbs: list[str] = []

    async def changes(_: PluginRemove, caller: Caller) -> Any:
        caller.keep(gone.set)
        await safe.wait()
        caller.keep(ended.set)
        return {}

    async def reads(_: EventWait, __: Caller) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    def record(called: Any, **_: Any) -> None:
        verbs.append(called.data["verb"])
        if "plugin.remove" in verbs:
            recorded.set()

    server = await abandoned(shared_dir, record, Endpoint(PluginRemove, changes), Endpoint(EventWait, reads))
    async with asyncio.timeout(seconds(20)):
        await gone.wait()
        await stopped.wait()
        assert server.changes, "a host that leaves waits for it"
        safe.set()
        await ended.wait()  # what is kept for a connection that has closed ends, too
        await recorded.wait()
    assert verbs == ["plugin.start", "plugin.remove"]
    await server.close()


async def test_host_that_ends_ends_what_a_caller_that_has_gone_has_begun(shared_dir: Path) -> None:
    gone, stopped = asyncio.Event(), asyncio.Event()

    async def changes(_: PluginRemove, caller: Caller) -> Any:
        caller.keep(gone.set)
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    server = await abandoned(shared_dir, lambda *_, **__: None, Endpoint(PluginRemove, changes))
    async with asyncio.timeout(seconds(20)):
        await gone.wait()
        await server.close()
        await stopped.wait()


async def test_replay_whose_caller_has_gone_is_delivered_and_on_record(daemon: Daemon) -> None:
    await daemon.kill_host()
    daemon.first = GOES
    await daemon.start_host()
    daemon.add("one", _rejects(daemon))
    (event,) = await _given_up(daemon, 1)
    ask_and_go(daemon.paths.control_socket, **{"event.replay": {"id": event}, "plugin.list": {}})
    await daemon.until(lambda: daemon.of_type("event.replayed"))
    row = await daemon.outcome({"id": event})
    assert [one["state"] for one in row["deliveries"]] == ["ok"]
    (called,) = [one for one in daemon.of_type("control.called") if one["data"]["verb"] == "event.replay"]
    assert called["data"]["verdict"] == "ok"
