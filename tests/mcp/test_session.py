"""A session with a server: what is in flight, what is refused, and servers that do as they like."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from host.channel.reply import LostError, NotSentError
from host.mcp.session import PAGES, STRAYS, Session
from host.plugins.manifest import ERAS
from host.wire.mcp import SESSION, STATELESS
from tests.support.timeouts import seconds

TOOLS = {"tools": {"listChanged": True}}


class Server:
    """The other end: reads lines, answers as it is told to."""

    def __init__(self, input_: socket.socket, output: socket.socket) -> None:
        self._input, self._output = input_, output
        self.asked: list[dict[str, Any]] = []
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def start(self) -> None:
        self.reader, self._back = await asyncio.open_unix_connection(sock=self._input, limit=4 << 20)
        _, self.writer = await asyncio.open_unix_connection(sock=self._output)

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(seconds(10)):
            message = json.loads(await self.reader.readline())
        self.asked.append(message)
        assert isinstance(message, dict)
        return message

    def send(self, **message: Any) -> None:
        self.writer.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")

    async def answer(self, **body: Any) -> dict[str, Any]:
        request = await self.next()
        self.send(id=request["id"], **body)
        return request

    def close(self) -> None:
        self.writer.close()
        self._back.close()


class Both:
    def __init__(self, session: Session, server: Server, over: list[str]) -> None:
        self.session, self.server, self.over = session, server, over


@contextlib.asynccontextmanager
async def pair(era: Any = STATELESS, *, greeted: bool = True) -> AsyncIterator[Both]:
    (in_host, in_server), (out_host, out_server) = socket.socketpair(), socket.socketpair()
    over: list[str] = []
    session, server = Session("run", era, lambda _, why: over.append(why)), Server(in_server, out_server)
    await session.connect(in_host, out_host)
    await server.start()
    try:
        if greeted:
            greet = asyncio.ensure_future(session.greet(seconds(10)))
            if era == STATELESS:
                await server.answer(result={"supportedVersions": [STATELESS], "capabilities": TOOLS})
            else:
                await server.answer(result={"protocolVersion": SESSION, "capabilities": TOOLS})
                assert (await server.next())["method"] == "notifications/initialized"
            await greet
        yield Both(session, server, over)
    finally:
        session.close()
        server.close()


@pytest.mark.parametrize("era", ERAS)
async def test_call_is_answered_in_each_era(era: Any) -> None:
    async with pair(era) as both:
        call = asyncio.ensure_future(both.session.ask("tools/call", {"name": "t", "arguments": {"a": 1}}, seconds(10)))
        asked = await both.server.answer(result={"content": []})
        assert (await call)[0].result == {"content": []}
        assert asked["params"]["name"] == "t" and ("_meta" in asked["params"]) is (era == STATELESS)
        first = both.server.asked[0]["method"]
        assert first == ("server/discover" if era == STATELESS else "initialize")


async def test_server_that_refuses_the_opening_is_reported_with_its_reason() -> None:
    async with pair(greeted=False) as both:
        greet = asyncio.ensure_future(both.session.greet(seconds(10)))
        await both.server.answer(error={"code": -32601, "message": "no discover"})
        with pytest.raises(NotSentError, match="no discover"):
            await greet
        assert "right era" in both.over[0]


async def test_silent_server_is_given_up() -> None:
    async with pair(greeted=False) as both:
        with pytest.raises(NotSentError, match="server/discover: no answer in"):
            await both.session.greet(0.05)


async def test_tools_of_all_pages_are_listed() -> None:
    async with pair() as both:
        listing = asyncio.ensure_future(both.session.list_tools())
        await both.server.answer(result={"tools": [{"name": "a"}], "nextCursor": "2"})
        asked = await both.server.answer(result={"tools": [{"name": "b"}]})
        assert [item.name for item in await listing] == ["a", "b"] and asked["params"]["cursor"] == "2"


async def test_endless_pages_end() -> None:
    async with pair() as both:
        listing = asyncio.ensure_future(both.session.list_tools())
        with contextlib.suppress(TimeoutError, ValueError):
            for _ in range(200):
                page = {"tools": [], "nextCursor": "again"}
                await asyncio.wait_for(asyncio.shield(both.server.answer(result=page)), 1)
                if listing.done():
                    break
        with pytest.raises(ValueError, match="more than 64 pages"):
            await listing


async def test_list_of_tools_is_bounded_by_its_bytes() -> None:
    async with pair() as both:
        listing = asyncio.ensure_future(both.session.list_tools())
        pages = 0
        while not listing.done() and pages < PAGES:
            tool = {"name": f"t{pages}", "description": "x" * 100_000}
            page = asyncio.ensure_future(both.server.answer(result={"tools": [tool], "nextCursor": "again"}))
            await asyncio.wait({page, listing}, return_when="FIRST_COMPLETED")
            pages += 1
        page.cancel()
        with pytest.raises(ValueError, match="more than 1048576 bytes of tools"):
            await listing
        assert pages <= 12 and both.session.open


async def test_requests_of_the_servers_own_are_refused_and_ping_is_answered() -> None:
    async with pair(SESSION) as both:
        for method in ("roots/list", "sampling/createMessage", "elicitation/create"):
            both.server.send(id=7, method=method, params={})
            refusal = await both.server.next()
            assert (refusal["id"], refusal["error"]["code"]) == (7, -32601)
        both.server.send(id="p", method="ping")
        assert await both.server.next() == {"jsonrpc": "2.0", "id": "p", "result": {}}
        assert both.session.open


async def test_progress_goes_to_its_call_alone_and_no_faster_than_allowed() -> None:
    async with pair() as both:
        seen: list[dict[str, Any]] = []
        call = asyncio.ensure_future(both.session.ask("tools/call", {}, seconds(10), lambda p: seen.append(dict(p))))
        asked = await both.server.next()
        token = asked["params"]["_meta"]["progressToken"]
        for number in range(1000):
            both.server.send(method="notifications/progress", params={"progressToken": token, "progress": number})
            both.server.send(method="notifications/progress", params={"progressToken": "x", "progress": number})
        both.server.send(id=asked["id"], result={})
        await call
        assert 0 < len(seen) < 100 and seen[0] == {"progress": 0}


async def test_cancelled_call_is_cancelled_at_the_server_and_its_late_answer_is_no_stray() -> None:
    async with pair() as both:
        call = asyncio.ensure_future(both.session.ask("tools/call", {}, seconds(10)))
        asked = await both.server.next()
        call.cancel()
        cancelled = await both.server.next()
        assert cancelled["method"] == "notifications/cancelled"
        assert cancelled["params"]["requestId"] == asked["id"]
        for _ in range(2):
            both.server.send(id=asked["id"], result={})
        again = asyncio.ensure_future(both.session.ask("tools/call", {}, seconds(10)))
        await both.server.answer(result={"second": True})
        assert (await again)[0].result == {"second": True}


async def test_call_that_is_never_answered_is_given_up_and_cancelled() -> None:
    async with pair() as both:
        call = asyncio.ensure_future(both.session.ask("tools/call", {}, 0.05))
        asked = await both.server.next()
        with pytest.raises(LostError, match="no answer in time"):
            await call
        cancelled = await both.server.next()
        assert cancelled["params"] == {"requestId": asked["id"], "reason": "not answered in time"}
        assert both.session.open and both.session.in_flight == 0


async def test_sixteen_requests_at_most_are_in_flight() -> None:
    async with pair() as both:
        calls = [asyncio.ensure_future(both.session.ask("tools/call", {}, seconds(10))) for _ in range(20)]
        asked = [await both.server.next() for _ in range(16)]
        assert both.session.in_flight == 16
        for request in asked:
            both.server.send(id=request["id"], result={})
        for _ in range(4):
            await both.server.answer(result={})
        await asyncio.gather(*calls)


async def _end(both: Both, act: Callable[[], object]) -> str:
    call = asyncio.ensure_future(both.session.ask("tools/call", {}, seconds(30)))
    await both.server.next()
    act()
    with pytest.raises(LostError):
        await call
    return both.over[0]


async def test_line_without_end_cuts_the_server_off_and_costs_a_megabyte() -> None:
    async with pair() as both:

        def flood() -> None:
            task = asyncio.ensure_future(_flood(both.server.writer))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

        assert "longer than 1048576 bytes" in await _end(both, flood)


async def _flood(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"a" * (1 << 16))
        await writer.drain()


async def test_strays_are_dropped_until_there_are_too_many() -> None:
    async with pair() as both:
        both.server.writer.write(b"Server is listening on stdio\n")
        for number in range(STRAYS - 2):
            both.server.send(id=number, result={})
        call = asyncio.ensure_future(both.session.ask("tools/call", {}, seconds(10)))
        await both.server.answer(result={"fine": True})
        assert (await call)[0].result == {"fine": True}
        assert f"{STRAYS} lines" in await _end(both, lambda: both.server.send(id=3, result={}))


async def test_flood_of_notifications_delays_no_answer_for_ever() -> None:
    async with pair() as both:
        call = asyncio.ensure_future(both.session.ask("tools/call", {}, seconds(60)))
        asked = await both.server.next()
        for _ in range(100_000):
            both.server.send(method="notifications/message", params={"level": "info", "data": "x"})
        both.server.send(id=asked["id"], result={})
        await call
        assert both.session.open


async def test_server_that_ends_loses_its_calls() -> None:
    async with pair() as both:
        assert await _end(both, both.server.writer.close) == ""


async def test_server_that_asks_and_does_not_read_is_not_read_either() -> None:
    async with pair() as both:
        writing = asyncio.ensure_future(_ask_for_ever(both.server.writer))
        for _ in range(2000):
            await asyncio.sleep(0)
        async with asyncio.timeout(seconds(30)):
            while not both.session._held - {"budget", "cpu"}:  # noqa: ASYNC110 # the hold of a session wakes nobody
                await asyncio.sleep(0.01)
        assert both.session.open
        writing.cancel()


async def _ask_for_ever(writer: asyncio.StreamWriter) -> None:
    request = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "x" * 60}).encode() + b"\n"
    while True:
        writer.write(request * 100)
        await writer.drain()
