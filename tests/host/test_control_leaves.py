"""The control socket as one host process leaves and another takes its place."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

from host.control.endpoints import Caller, Endpoint
from host.control.plugin_types import PluginStart
from host.control.server import ControlServer
from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.succession import Departure, Descriptors


def made(answer: Any) -> ControlServer:
    return ControlServer([Endpoint(PluginStart, answer)], lambda uid: "operator", lambda *_, **__: None)


async def test_request_that_the_supervisor_has_broken_off_is_begun_again_by_the_next_host(shared_dir: Path) -> None:
    """The caller was told to ask again, though both hosts could do it."""
    asked, broken_off = asyncio.Event(), asyncio.Event()

    async def breaks_off(request: PluginStart, _: Caller) -> Any:
        asked.set()
        await broken_off.wait()
        if request.name == "wrong":
            raise IsolatorError("plugin wrong", "has no program", "mend it")
        raise UnavailableError("host", "was broken off", "ask again")

    async def starts(request: PluginStart, _: Caller) -> Any:
        return {"run": f"of {request.name}"}

    leaves, comes, path = made(breaks_off), made(starts), shared_dir / "control.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    await leaves.start(listener)
    reader, writer = await asyncio.open_unix_connection(str(path))
    for number, name in enumerate(("echo", "wrong")):
        request = {"jsonrpc": "2.0", "id": number, "method": "plugin.start", "params": {"name": name}}
        writer.write(json.dumps(request).encode() + b"\n")
    await asked.wait()
    held = await leaves.hold()
    assert held is not None
    broken_off.set()
    answers = [json.loads(await reader.readline())]
    departure = Departure()
    state = leaves.pass_on(held, departure)
    with Descriptors(departure._fds.release_all()) as descriptors:
        await comes.take_over(state, descriptors)
    await comes.begin()
    answers.append(json.loads(await reader.readline()))
    assert "has no program" in answers[0]["error"]["message"] and answers[0]["id"] == 1
    assert answers[1] == {"jsonrpc": "2.0", "id": 0, "result": {"run": "of echo"}}
    writer.close()
    await comes.close()
