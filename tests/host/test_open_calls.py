"""Calls of a plugin to the host API that are open as one host process leaves and another takes its place."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from host.channel.calls import patient
from host.channel.stream import Call, StreamConnection, open_stream
from isolator.base.pacing import TokenBucket
from isolator.ipc.succession import Departure, Descriptors


def made(call: Call) -> StreamConnection:
    return StreamConnection(call, pytest.fail, TokenBucket(1.0, 1.0), str)


async def test_call_that_is_open_is_read_again_and_answered_once() -> None:
    called, others = asyncio.Event(), asyncio.Event()

    async def never(method: str, params: Any) -> dict[str, Any]:
        called.set()
        with patient():
            await others.wait()
        return {"result": "of the host that has left"}

    async def at_once(method: str, params: Any) -> dict[str, Any]:
        return {"result": [method, params]}

    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        leaves = await open_stream(ours, lambda: made(never))
        theirs.sendall(b'{"jsonrpc":"2.0","id":7,"method":"projects.get","params":{"a":1}}\n{"jsonrpc":')
        await called.wait()
        assert not leaves.busy, "nobody waits for what others do"
        departure = Departure()
        state = leaves.pass_on_all(departure)
        others.set()
        comes = made(at_once)
        with Descriptors(departure._fds.release_all()) as descriptors:
            await comes.take_over_all(state, {}, descriptors)
        theirs.sendall(b'"2.0","id":8,"method":"whoami"}\n')
        answers = b""
        while answers.count(b"\n") < 2:
            answers += await loop.sock_recv(theirs, 4096)
        assert [json.loads(line) for line in answers.splitlines()] == [
            {"jsonrpc": "2.0", "id": 7, "result": ["projects.get", {"a": 1}]},
            {"jsonrpc": "2.0", "id": 8, "result": ["whoami", None]},
        ]
        comes.close()


async def test_call_that_this_host_serves_itself_is_waited_for() -> None:
    called, done = asyncio.Event(), asyncio.Event()

    async def serves(method: str, params: Any) -> dict[str, Any]:
        called.set()
        await done.wait()
        return {"result": {}}

    ours, theirs = socket.socketpair()
    with theirs:
        connection = await open_stream(ours, lambda: made(serves))
        theirs.sendall(b'{"jsonrpc":"2.0","id":7,"method":"kv.set"}\n')
        await called.wait()
        assert connection.busy
        done.set()
        while connection.busy:  # noqa: ASYNC110 # a turn or two
            await asyncio.sleep(0)
        connection.close()
