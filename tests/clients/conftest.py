"""A real host process for the published client, and a control socket that says exactly what a test wants."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from isolator_client import address
from tests.host.fake_supervisor import Daemon
from tests.support.timeouts import seconds


@pytest.fixture
async def daemon(shared_dir: Path) -> AsyncIterator[Daemon]:
    """A running host without plugins."""
    double = Daemon(shared_dir)
    await double.start()
    yield double
    await double.stop()


@pytest.fixture
def listener(shared_dir: Path) -> Iterator[socket.socket]:
    """A control socket that accepts when the test does; its backlog has room for one."""
    path = Path(address.control_socket(root=shared_dir))
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(0)
        sock.settimeout(seconds(10))
        yield sock


class Wire:
    """The daemon's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    async def read(self) -> dict[str, Any]:
        """The next message of the client."""
        message = json.loads(await asyncio.wait_for(self._reader.readline(), seconds(10)))
        assert isinstance(message, dict)
        return message

    def send(self, *messages: dict[str, Any]) -> None:
        """Send messages in one packet."""
        self.writer.write(b"".join(json.dumps({"jsonrpc": "2.0", **m}).encode() + b"\n" for m in messages))

    async def answer(self, **result: Any) -> dict[str, Any]:
        """Answer the next request, and return it."""
        request = await self.read()
        self.send({"id": request["id"], "result": result})
        return request

    async def refuse(self, code: str, **body: Any) -> dict[str, Any]:
        """Refuse the next request, and return it."""
        request = await self.read()
        self.send({"id": request["id"], "error": error(code, **body)})
        return request

    def close(self) -> None:
        self.writer.close()


def error(code: str, **body: Any) -> dict[str, Any]:
    """The ``error`` of an answer."""
    data = {"code": code, "what": "the test", "why": f"says {code}", "remedy": "", **body}
    return {"code": -32000, "message": "no", "data": data}


class Control:
    """The daemon's end: connections in the order in which they come."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._connections: asyncio.Queue[Wire] = asyncio.Queue()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._connections.put(Wire(reader, writer))

    async def next(self) -> Wire:
        return await asyncio.wait_for(self._connections.get(), seconds(10))


@pytest.fixture
async def control(shared_dir: Path) -> AsyncIterator[Control]:
    """A control socket whose path is longer than sun_path."""
    made = Control(shared_dir / ("long-" * 20))
    path = Path(address.control_socket(root=made.root))
    path.parent.mkdir(parents=True)
    short = shared_dir / "s"
    server = await asyncio.start_unix_server(made.connected, short)
    short.rename(path)
    yield made
    server.close()
