"""Deadlines of the requests on one stream, which share a timer."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from host.channel.reply import LostError
from host.channel.stream import StreamConnection, open_stream
from host.wire.lines import CPU_A_SECOND, CPU_AT_ONCE
from isolator.base.pacing import TokenBucket

Made = tuple[StreamConnection, asyncio.StreamReader, asyncio.StreamWriter, list[str]]
LONG = 600.0


@pytest.fixture
async def stream() -> AsyncIterator[Made]:
    """A stream, the plugin's end of it, and its breaches."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    breaches: list[str] = []

    async def call(_: str, __: Any) -> dict[str, Any]:
        raise AssertionError("nothing is called")

    cpu = TokenBucket(CPU_A_SECOND, CPU_AT_ONCE)
    connection = await open_stream(ours, lambda: StreamConnection(call, breaches.append, cpu, str))
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    yield connection, reader, writer, breaches
    connection.close()
    writer.close()


async def line(reader: asyncio.StreamReader) -> dict[str, Any]:
    read = json.loads(await reader.readline())
    assert isinstance(read, dict)
    return read


async def test_each_request_is_lost_at_its_own_deadline(stream: Made) -> None:
    connection, reader, writer, breaches = stream
    long = asyncio.create_task(connection.request("long", {}, LONG))
    numbers = [(await line(reader))["id"]]
    for timeout in (0.05, 0.01):  # the second one is due before what the timer was set for
        short = asyncio.create_task(connection.request("short", {}, timeout))
        numbers.append((await line(reader))["id"])
        with pytest.raises(LostError, match="no reply in time"):
            await short
        assert await line(reader) == {"jsonrpc": "2.0", "method": "$/cancel", "params": {"id": numbers[-1]}}
    for number in reversed(numbers):
        writer.write(json.dumps({"jsonrpc": "2.0", "result": {}, "id": number}).encode() + b"\n")
    assert (await long)[0]["result"] == {}
    assert not breaches, "a late reply"


async def test_two_requests_that_are_due_are_both_lost(stream: Made) -> None:
    connection, _, _, _ = stream
    asking = [asyncio.create_task(connection.request("short", {}, 0.01)) for _ in range(2)]
    for one in asking:
        with pytest.raises(LostError, match="no reply in time"):
            await one


async def test_plugin_is_told_of_a_request_that_is_given_up_and_may_still_answer(stream: Made) -> None:
    connection, reader, writer, breaches = stream
    asking = asyncio.create_task(connection.request("ping", {}, LONG))
    number = (await line(reader))["id"]
    asking.cancel()
    assert await line(reader) == {"jsonrpc": "2.0", "method": "$/cancel", "params": {"id": number}}
    writer.write(json.dumps({"jsonrpc": "2.0", "result": {}, "id": number}).encode() + b"\n")
    following = asyncio.create_task(connection.request("ping", {}, LONG))
    writer.write(json.dumps({"jsonrpc": "2.0", "result": {}, "id": (await line(reader))["id"]}).encode() + b"\n")
    await following
    assert not breaches


async def test_of_a_request_that_is_given_up_its_number_alone_is_kept(stream: Made) -> None:
    connection, reader, writer, breaches = stream
    with pytest.raises(LostError, match="no reply in time"):
        await connection.request("short", {}, 0.01)
    number = (await line(reader))["id"]
    assert connection._pending == {number: None}, "it may have had a payload of a megabyte"
    writer.write(json.dumps({"jsonrpc": "2.0", "result": {}, "id": number}).encode() + b"\n")
    await line(reader)  # it is told of that
    while connection._pending:  # noqa: ASYNC110 # a turn or two
        await asyncio.sleep(0)
    assert not breaches
