"""Connections that are slow, or speak what is no HTTP: each ends, and leaves its place, without a line in the log."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from host.console import connections, upstream
from host.console.connections import Places, protocol
from host.console.serving import LONGEST_HEAD
from host.console.upstream import Upstream
from isolator.errors import UnavailableError
from tests.support.timeouts import seconds

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
LARGE = b"x" * (8 << 20)


async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer ``/large`` at length, and ``/early`` before the body has come; other requests with their bodies."""
    body, more = b"", scope["path"] != "/early"
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if message["type"] == "http.disconnect":
            return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": LARGE if scope["path"] == "/large" else b"fine"})


@contextlib.asynccontextmanager
async def served(folder: Path) -> AsyncIterator[tuple[Path, Places]]:
    """The socket of a server with the console's connections, and its places."""
    places, path = Places(), folder / "socket"
    config = uvicorn.Config(
        application, http=protocol(places), ws="none", lifespan="off", log_config=None, access_log=False, loop="none",
        h11_max_incomplete_event_size=LONGEST_HEAD, timeout_graceful_shutdown=1, timeout_keep_alive=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(16)
        task = asyncio.create_task(server.serve([listener]))
        while not server.started:  # noqa: ASYNC110 # uvicorn tells nobody
            await asyncio.sleep(0.01)
        yield path, places
        server.should_exit = True
        await task


async def until_none(places: Places) -> None:
    """Wait until no connection has a place."""
    async with asyncio.timeout(seconds(30)):
        while places._of:  # noqa: ASYNC110 # no event tells
            await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.3)


@pytest.mark.parametrize(
    "sent",
    [b"", b"\r\n", b"GET / HT", POST, GET + POST, GET + b"GET / HT", POST + b"x" * 100 + POST + b"x"],
    ids=["nothing", "a blank line", "half a head", "no body", "behind another", "half a head behind another", "twice"],
)
async def test_request_that_does_not_come_whole_ends_its_connection(tmp_path: Path, sent: bytes) -> None:
    async with served(tmp_path) as (path, places):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(sent)
        async with asyncio.timeout(seconds(30)):
            with contextlib.suppress(ConnectionError):
                assert (await reader.read()).count(b"fine") == (sent.startswith(GET) or sent.endswith(b"x"))
        await until_none(places)
        writer.close()


async def test_answer_that_nobody_reads_ends_its_connection(tmp_path: Path) -> None:
    async with served(tmp_path) as (path, places):
        reader, writer = await asyncio.open_unix_connection(path, limit=1024)
        writer.write(GET.replace(b"/", b"/large", 1))
        await reader.readexactly(12)
        await until_none(places)
        writer.close()


async def test_answer_that_is_read_is_whole(tmp_path: Path) -> None:
    async with served(tmp_path) as (path, _):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(GET.replace(b"/", b"/large", 1) + GET)
        async with asyncio.timeout(seconds(60)):
            await reader.readuntil(b"\r\n\r\n")
            assert (await reader.read()).count(b"x") >= len(LARGE)
        writer.close()


async def test_bytes_that_are_no_http_after_an_answer_leave_no_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(tmp_path) as (path, places):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"POST /early HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        async with asyncio.timeout(seconds(30)):
            await reader.readuntil(b"fine")
            writer.write(b"no chunk\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                await reader.read()
        await until_none(places)
        writer.close()
    assert not [one for one in caplog.records if one.levelname in ("ERROR", "CRITICAL")], caplog.text


def test_nobody_takes_the_places_of_others() -> None:
    places = Places()
    taken = sum(places.take(1000) for _ in range(connections.CONNECTIONS))
    assert taken == connections.SHARE and places.take(1001) and places.take(0) and places.take(None)


async def test_daemon_that_hangs_keeps_nobodys_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "ANSWER_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control.sock"))
        listener.listen(4)
        asking = Upstream(tmp_path / "control.sock")
        await asking.open()
        with pytest.raises(UnavailableError, match="does not answer"):
            await asking.call("status")
        await asking.close()
