"""The library against a control socket whose every byte the test chooses."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from host import PluginHost
from isolator.errors import IsolatorError, NotFoundError, UnavailableError, UsageError
from isolator.paths import Paths
from tests.support.timeouts import seconds

Wire = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Control:
    """Daemon's end: the connections in the order in which they come."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[Wire] = asyncio.Queue()

    async def next(self) -> Wire:
        return await asyncio.wait_for(self.connections.get(), 10)


@pytest.fixture
async def control(shared_dir: Path) -> AsyncIterator[tuple[Control, Path]]:
    # Longer than sun_path: the library must reach it all the same.
    root = shared_dir / ("long-" * 20)
    path = Paths.of(root).control_socket
    path.parent.mkdir(parents=True)
    made = Control()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await made.connections.put((reader, writer))

    short = shared_dir / "s"
    server = await asyncio.start_unix_server(connected, short)
    short.rename(path)
    yield made, root
    server.close()


async def _read(reader: asyncio.StreamReader) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(await asyncio.wait_for(reader.readline(), 10))
    return message


def _ok(message: dict[str, Any]) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": {}}).encode() + b"\n"


def _refused(message: dict[str, Any]) -> bytes:
    data = IsolatorError(message["params"]["method"], "is registered already").to_json()
    error = {"code": -32000, "message": "no", "data": data}
    return json.dumps({"jsonrpc": "2.0", "id": message["id"], "error": error}).encode() + b"\n"


def _call(number: int, method: str) -> bytes:
    params = {"call": number, "method": method, "plugin": "p", "params": {}}
    return json.dumps({"jsonrpc": "2.0", "method": "api.call", "params": params}).encode() + b"\n"


async def _one(plugin: str, params: dict[str, Any]) -> Any:
    return {"n": 1}


async def test_a_call_that_comes_along_with_the_registration_is_answered(control: tuple[Control, Path]) -> None:
    server, root = control
    async with PluginHost.connect(root) as host:
        reader, writer = await server.next()
        serving = asyncio.create_task(host.serve("a.get", "read:a", _one))
        # The call first: it is there before anybody awaits the answer.
        writer.write(_call(1, "a.get") + _ok(await _read(reader)))
        await serving
        assert (await _read(reader))["params"] == {"call": 1, "result": {"n": 1}}
        writer.close()


async def test_a_method_that_was_refused_is_not_served(control: tuple[Control, Path]) -> None:
    server, root = control
    async with PluginHost.connect(root) as host:
        reader, writer = await server.next()
        serving = asyncio.create_task(host.serve("a.get", "read:a", _one))
        writer.write(_refused(await _read(reader)))
        with pytest.raises(IsolatorError, match="registered already"):
            await serving
        writer.write(_call(1, "a.get"))
        assert "error" in (await _read(reader))["params"]
        writer.close()


async def test_after_a_reconnect_one_refusal_stops_nothing_and_is_tried_again(control: tuple[Control, Path]) -> None:
    server, root = control
    async with PluginHost.connect(root) as host:
        reader, writer = await server.next()
        for method in ("a.get", "b.get"):
            serving = asyncio.create_task(host.serve(method, "read:a", _one))
            writer.write(_ok(await _read(reader)))
            await serving
        writer.close()
        reader, writer = await server.next()
        first = await _read(reader)
        writer.write(_refused(first))
        second = await _read(reader)
        writer.write(_ok(second))
        again = await _read(reader)
        writer.write(_ok(again))
        asked = [message["params"]["method"] for message in (first, second, again)]
        assert asked == ["a.get", "b.get", "a.get"]
        writer.close()


async def test_a_result_that_is_no_json_is_an_error_at_once(control: tuple[Control, Path]) -> None:
    async def bad(plugin: str, params: dict[str, Any]) -> Any:
        return {"when": object()}

    server, root = control
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    async with PluginHost.connect(root) as host:
        reader, writer = await server.next()
        serving = asyncio.create_task(host.serve("a.get", "read:a", bad))
        writer.write(_ok(await _read(reader)))
        await serving
        writer.write(_call(7, "a.get"))
        answer = (await _read(reader))["params"]
        assert answer == {"call": 7, "error": {"code": -32603, "message": "the platform failed"}}
        assert isinstance(reported[0]["exception"], TypeError)
        writer.close()


async def test_the_platforms_errors_cross_in_both_directions(control: tuple[Control, Path]) -> None:
    async def refusing(plugin: str, params: dict[str, Any]) -> Any:
        raise NotFoundError("project", "does not exist")

    server, root = control
    async with PluginHost.connect(root) as host:
        reader, writer = await server.next()
        serving = asyncio.create_task(host.serve("a.get", "read:a", refusing))
        writer.write(_ok(await _read(reader)))
        await serving
        writer.write(_call(7, "a.get"))
        answer = (await _read(reader))["params"]
        assert answer == {"call": 7, "error": {"code": -31001, "message": "project: does not exist"}}
        call = asyncio.create_task(host.plugins())
        await _read(reader)
        writer.close()
        with pytest.raises(UnavailableError):
            await call


async def test_every_verb_of_the_client_raises_the_projects_errors(control: tuple[Control, Path]) -> None:
    server, root = control
    async with PluginHost.connect(root) as host:
        _, writer = await server.next()
        with pytest.raises(UsageError, match="No such file"):
            await host.stage(root / "nowhere")
        with pytest.raises(UsageError):
            await host.call("plugin.stage", path=str(root / "nowhere"))
        writer.close()


async def test_host_that_is_not_there_is_the_projects_error_however_it_is_opened(shared_dir: Path) -> None:
    with pytest.raises(UnavailableError):
        await PluginHost(root=shared_dir).open()
    with pytest.raises(UnavailableError):
        async with PluginHost(root=shared_dir):
            pass


async def test_a_record_of_the_trail_that_is_none_is_the_projects_error(control: tuple[Control, Path]) -> None:
    server, root = control
    async with PluginHost.connect(root) as host:
        _, main = await server.next()
        taking = asyncio.ensure_future(anext(host.audit(after=0)))
        reader, writer = await server.next()
        records = {"jsonrpc": "2.0", "method": "audit.records", "params": {"lines": ["nonsense"]}}
        writer.write(_ok(await _read(reader)) + json.dumps(records).encode() + b"\n")
        with pytest.raises(IsolatorError, match="audit trail: record 1 is no record"):
            await taking
        for side in (writer, main):
            side.close()


async def test_a_full_backlog_is_waited_for(shared_dir: Path) -> None:
    path = Paths.of(shared_dir).control_socket
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as before:
        listener.bind(str(path))
        listener.listen(0)  # room for one
        before.connect(str(path))

        async def status() -> dict[str, Any]:
            async with PluginHost.connect(shared_dir) as host:
                return await host.call("status")

        asked = asyncio.create_task(status())
        await asyncio.sleep(0.1)  # long enough for it to have found the backlog full
        assert not asked.done()
        listener.accept()[0].close()
        listener.setblocking(False)
        async with asyncio.timeout(seconds(10)):
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            reader, writer = await asyncio.open_unix_connection(sock=connection)
            writer.write(_ok(await _read(reader)))
            assert await asked == {}
        writer.close()
