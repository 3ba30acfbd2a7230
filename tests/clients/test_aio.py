"""The published client for asyncio: against a real host that dies, and against a socket that behaves badly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from isolator_client import (
    AsyncClient,
    DeniedError,
    IsolatorError,
    NotFoundError,
    Notification,
    UnavailableError,
    UsageError,
    link,
)
from isolator_client.protocol import REQUEST_LIMIT
from tests.clients.conftest import Control, Wire, error
from tests.clients.test_blocking import _records, _sent
from tests.host.fake_supervisor import Daemon
from tests.support import sidecars
from tests.support.timeouts import seconds

PAYLOAD = {"project_id": "p", "deployment_id": "d", "url": "https://x.example", "duration_ms": 1}
SCHEMA = {"type": "object", "properties": {"volume": {"type": "string"}}, "required": ["volume"]}

CALLER = """
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(os.environ["PLUGIN_HOST_SOCKET"])
    request = {"jsonrpc": "2.0", "id": 1, "method": "projects.get", "params": {"id": params["project_id"]}}
    sock.sendall(json.dumps(request).encode() + b"\\n")
    return json.loads(sock.makefile().readline())
"""


async def get_project(plugin: str, params: dict[str, Any]) -> Any:
    if params.get("id") == "none":
        raise NotFoundError("project", "does not exist")
    return {"id": params.get("id"), "for": plugin}


async def connected(client: AsyncClient) -> None:
    """Wait until the client has come back."""
    async with asyncio.timeout(seconds(20)):
        while not client.connected:  # noqa: ASYNC110 # no event tells
            await asyncio.sleep(0.01)


# Against the real host


async def test_a_platform_emits_serves_and_comes_back_after_a_kill(daemon: Daemon) -> None:
    daemon.add("reader", sidecars.oneshot(CALLER), permissions=["read:projects"])
    async with AsyncClient(root=daemon.root) as client:
        await client.serve("projects.get", "read:projects", get_project)
        await client.register_event("backup.failed", SCHEMA, order_by="volume")
        for project in ("shop", "none", "shop"):
            event = await client.emit("deploy.completed", PAYLOAD | {"project_id": project})
            (delivery,) = await client.wait(event.id, timeout=seconds(20))
            answer = json.loads(delivery.reply or "")["result"]
            if project == "none":
                assert (answer["error"]["code"], answer["error"]["message"]) == (-31001, "project: does not exist")
                await daemon.kill_host()
                with pytest.raises(UnavailableError):
                    await client.plugins()
                assert not client.connected
                with pytest.raises(UnavailableError):
                    await client.emit("deploy.completed", PAYLOAD)
                await daemon.start_host()
                await connected(client)
            else:
                assert answer["result"] == {"id": "shop", "for": "reader"}
        assert (await client.emit("backup.failed", {"volume": "grün ⚙"})).id
        assert [plugin["name"] for plugin in await client.plugins()] == ["reader"]
        with pytest.raises(UsageError, match="volume"):
            await client.emit("backup.failed", {})


async def test_a_thousand_calls_at_once(daemon: Daemon) -> None:
    async with AsyncClient(root=daemon.root) as client:
        payloads = [PAYLOAD | {"deployment_id": f"d{n}"} for n in range(1000)]
        events = await asyncio.gather(*(client.emit("deploy.completed", payload) for payload in payloads))
        assert len({event.id for event in events}) == 1000
        bad = {"name": "deploy.completed", "payload": {"text": "x" * REQUEST_LIMIT}}
        good, refused = await asyncio.gather(client.plugins(), client.call("event.emit", **bad), return_exceptions=True)
        # What is too long for the daemon ends one call, and not the connection of all.
        assert good == [] and isinstance(refused, UsageError)
        assert client.connected


# One connection


async def test_answers_in_any_order_reach_their_calls(control: Control) -> None:
    async with AsyncClient(root=control.root) as client:
        wire = await control.next()
        calls = [asyncio.create_task(client.call("echo", n=n)) for n in range(20)]
        requests = [await wire.read() for _ in calls]
        calls[3].cancel()
        wire.send(*({"id": r["id"], "result": r["params"]} for r in reversed(requests)), {"id": 999, "result": {}})
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(answers.pop(3), asyncio.CancelledError)
        assert answers == [{"n": n} for n in range(20) if n != 3]
        wire.close()


async def test_an_open_call_fails_when_the_connection_ends(control: Control) -> None:
    async with AsyncClient(root=control.root) as client:
        wire = await control.next()
        calls = [asyncio.create_task(client.call("status")) for _ in range(3)]
        for _ in calls:
            await wire.read()
        wire.close()
        for failed in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(failed, UnavailableError) and "before it answered" in str(failed)
        wire = await control.next()
        await connected(client)
        again = asyncio.create_task(client.call("status"))
        await wire.answer(n=1)
        assert await again == {"n": 1}
        wire.close()


async def test_why_the_daemon_closed_is_told(control: Control) -> None:
    refusal = error("unavailable", what="control socket", why="512 connections are open")
    async with AsyncClient(root=control.root) as client:
        wire = await control.next()
        call = asyncio.create_task(client.call("status"))
        await wire.read()
        wire.send({"id": None, "error": refusal})
        with pytest.raises(UnavailableError, match="512 connections"):
            await call
        with pytest.raises(UnavailableError, match="512 connections"):  # also of a call that comes after it
            await client.call("status")
        wire.close()
        wire = await control.next()
        wire.close()


async def test_nobody_is_to_blame_for_a_line_of_several_that_was_not_read(control: Control) -> None:
    for count, kind in ((1, UsageError), (2, UnavailableError)):
        async with AsyncClient(root=control.root) as client:
            wire = await control.next()
            calls = [asyncio.create_task(client.call("status")) for _ in range(count)]
            for _ in calls:
                await wire.read()
            wire.send({"id": None, "error": error("usage", why="is no JSON")})
            for failed in await asyncio.gather(*calls, return_exceptions=True):
                assert type(failed) is kind and "is no JSON" in str(failed)
            wire.close()


async def test_what_is_no_message_ends_the_connection(control: Control) -> None:
    async with AsyncClient(root=control.root) as client:
        wire = await control.next()
        call = asyncio.create_task(client.call("status"))
        await wire.read()
        wire.writer.write(b"nonsense\n")
        with pytest.raises(IsolatorError, match="is not JSON"):
            await call
        wire.close()
        (await control.next()).close()


async def test_it_is_open_once_and_closed_for_good(control: Control) -> None:
    client = AsyncClient(root=control.root)
    with pytest.raises(UnavailableError, match="is not open"):
        await client.call("status")
    async with client:
        wire = await control.next()
        with pytest.raises(RuntimeError, match="open already"):
            await client.open()
        open_call = asyncio.create_task(client.call("status"))
        await wire.read()
    with pytest.raises(UnavailableError):
        await open_call
    with pytest.raises(UnavailableError, match="was closed"):
        await client.call("status")
    assert len(asyncio.all_tasks()) <= 2  # this one, and that of the server's end
    wire.close()
    async with client:  # and opened again, if need be
        wire = await control.next()
        again = asyncio.create_task(client.call("status"))
        await wire.answer(n=1)
        assert await again == {"n": 1}
    wire.close()


async def test_without_a_daemon_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="the daemon is not running"):
        await AsyncClient(root=tmp_path).open()


async def test_who_finds_no_place_in_time_is_told(listener: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(listener.getsockname())
        with pytest.raises(UnavailableError, match="too many callers are waiting; try again"):
            await link.connect(listener.getsockname(), patience=0.1)


# Methods of the host API


def _call(number: int, method: str = "a.get", **params: Any) -> dict[str, Any]:
    return {"method": "api.call", "params": {"call": number, "method": method, "plugin": "p", "params": params}}


async def serving(client: AsyncClient, wire: Wire, handler: Any, method: str = "a.get") -> None:
    registering = asyncio.create_task(client.serve(method, "read:a", handler))
    request = await wire.answer()
    assert request["params"] == {"method": method, "permission": "read:a"}
    await registering


async def test_what_a_handler_gives_is_what_the_plugin_gets(control: Control) -> None:
    results: dict[str, Any] = {
        "null": None,
        "list": [1, 2],
        "refused": UsageError("id", "is missing " + "x" * 1000 + "\ud800"),
        "bug": KeyError("x"),
        "no json": object(),
        "too long": "x" * REQUEST_LIMIT,
        "not a number": float("nan"),
    }

    async def handler(plugin: str, params: dict[str, Any]) -> Any:
        result = results[params["which"]]
        if isinstance(result, Exception):
            raise result
        return result

    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    async with AsyncClient(root=control.root) as client:
        wire = await control.next()
        await serving(client, wire, handler)
        answers = {}
        for number, which in enumerate(results):
            wire.send(_call(number, which=which))
            answer = await wire.answer()
            assert answer["method"] == "api.answer" and answer["params"].pop("call") == number
            answers[which] = answer["params"]
        wire.send(_call(99, "b.get"))
        assert (await wire.refuse("usage"))["params"]["error"]["message"] == "b.get: is not served here"
        wire.close()
    refusal = answers.pop("refused")["error"]
    assert refusal["code"] == -31001 and refusal["message"].startswith("id: is missing xxx")
    assert len(refusal["message"]) == 400
    failed = {"error": {"code": -32603, "message": "the platform failed"}}
    assert answers == {
        **{"null": {"result": None}, "list": {"result": [1, 2]}},
        **dict.fromkeys(("bug", "no json", "too long", "not a number"), failed),
    }
    assert [type(context["exception"]) for context in reported] == [KeyError, TypeError, ValueError, ValueError]
    assert "isolator_client: the handler of a.get failed" in reported[0]["message"]


async def test_handlers_overlap_and_end_with_the_client(control: Control) -> None:
    ended = asyncio.Event()

    async def handler(plugin: str, params: dict[str, Any]) -> Any:
        if params["wait"]:
            try:
                await asyncio.sleep(3600)
            finally:
                ended.set()
        return "quick"

    async with AsyncClient(root=control.root) as client:
        wire = await control.next()
        await serving(client, wire, handler)
        wire.send(_call(1, wait=True), _call(2, wait=False))
        assert (await wire.answer())["params"] == {"call": 2, "result": "quick"}
    assert ended.is_set()
    wire.close()


async def test_a_refused_registration_leaves_the_handler_before(control: Control) -> None:
    async def first(plugin: str, params: dict[str, Any]) -> Any:
        return 1

    async def second(plugin: str, params: dict[str, Any]) -> Any:
        return 2

    async with AsyncClient(root=control.root) as client:
        wire = await control.next()
        await serving(client, wire, first)
        registering = asyncio.create_task(client.serve("a.get", "read:a", second))
        await wire.refuse("failed", why="is registered already")
        with pytest.raises(IsolatorError, match="registered already"):
            await registering
        wire.send(_call(1))
        assert (await wire.answer())["params"] == {"call": 1, "result": 1}
        wire.close()


# A new connection


async def test_everything_is_registered_again_until_it_is_taken(control: Control) -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    async with AsyncClient(root=control.root) as client:
        wire = await control.next()
        for method in ("a.get", "b.get", "c.get"):
            await serving(client, wire, get_project, method)
        registering = asyncio.create_task(client.register_event("backup.failed", SCHEMA))
        event = await wire.answer()
        await registering
        wire.close()
        wire = await control.next()
        # An event type first; each is asked for whatever becomes of the others; what is refused comes again, unless
        # the role is missing, which only a person can mend.
        assert (await wire.answer())["params"] == event["params"]
        asked = [await wire.refuse("unavailable"), await wire.refuse("denied"), await wire.answer()]
        asked.append(await wire.answer())
        assert [request["params"]["method"] for request in asked] == ["a.get", "b.get", "c.get", "a.get"]
        last = asyncio.create_task(client.call("status"))
        assert (await wire.answer())["method"] == "status"
        await last
        wire.close()
        (await control.next()).close()
    assert ["registering again was refused" in context["message"] for context in reported] == [True]
    assert isinstance(reported[0]["exception"], DeniedError)


async def test_a_connection_that_ends_while_registering_again_is_replaced(control: Control) -> None:
    async with AsyncClient(root=control.root) as client:
        wire = await control.next()
        await serving(client, wire, get_project)
        for _ in range(3):
            wire.close()
            wire = await control.next()
            assert (await wire.read())["method"] == "api.register"
        wire.close()
        wire = await control.next()
        await wire.answer()
        wire.send(_call(1, id="x"))
        assert (await wire.answer())["params"]["result"] == {"id": "x", "for": "p"}
        wire.close()


async def test_the_client_comes_back_when_its_process_had_no_descriptor_left(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    async def connect(path: str) -> link.Link:
        attempts.append(path)
        if len(attempts) == 1:
            raise OSError(24, "Too many open files")
        if len(attempts) == 2:
            raise DeniedError(path, "not yet")
        return await link.connect(path)

    async with AsyncClient(root=control.root) as client:
        wire = await control.next()
        monkeypatch.setattr("isolator_client.aio.connect", connect)
        wire.close()
        wire = await control.next()
        await connected(client)
        assert len(attempts) == 3
        wire.close()


# The trail


async def test_the_trail_goes_on_where_it_was(control: Control) -> None:
    lines, begin = _records(6), {"id": 1, "result": {"after": 2, "last": 4}}

    async def answer() -> list[Any]:
        asked = []
        for messages in (
            [begin],
            [{"id": 1, "error": error("unavailable")}],
            [begin, _sent(lines[2:4])],
            [],
            [begin, _sent(lines[4:])],
        ):
            wire = await control.next()
            asked.append((await wire.read())["params"])
            wire.send(*messages)
            wire.close()
        return asked

    async with AsyncClient(root=control.root) as client:
        main = await control.next()
        answering = asyncio.create_task(answer())
        async with contextlib.aclosing(client.audit(lines=2)) as records:
            taken = [(await anext(records)).line for _ in range(4)]
        assert taken == lines[2:]
        assert await answering == [{"lines": 2}, {"after": 2}, {"after": 2}, {"after": 4}, {"after": 4}]
        main.close()


@pytest.mark.parametrize(
    ("messages", "kind", "why"),
    [
        ([{"id": 1, "error": error("denied", why="needs viewer")}], DeniedError, "needs viewer"),
        ([{"id": 1, "error": error("failed", why="it was cut")}], IsolatorError, "it was cut"),
        ([{"id": 1, "error": error("unavailable", why="32 callers")}], UnavailableError, "32 callers"),
        ([{"id": 1, "result": {"after": 0}}, _sent(["nonsense"])], IsolatorError, "is no record"),
        ([], UnavailableError, "before it answered"),
    ],
)
async def test_what_is_wrong_with_the_trail_is_told(
    control: Control, messages: list[dict[str, Any]], kind: type[IsolatorError], why: str
) -> None:
    async with AsyncClient(root=control.root) as client:
        main = await control.next()
        taking = asyncio.create_task(anext(client.audit(after=0)))
        wire = await control.next()
        await wire.read()
        wire.send(*messages)
        wire.close()
        with pytest.raises(kind, match=why):
            await taking
        assert client.connected
        main.close()


async def test_who_reads_the_trail_slowly_holds_up_the_daemon_and_not_this_process(control: Control) -> None:
    async with AsyncClient(root=control.root) as client:
        main = await control.next()
        async with contextlib.aclosing(client.audit(after=0)) as records:
            first = asyncio.create_task(anext(records))
            wire = await control.next()
            await wire.answer(after=0)
            lines = _records(20_000)
            for begin in range(0, len(lines), 100):
                wire.send(_sent(lines[begin : begin + 100]))
            assert (await first).seq == 1
            await asyncio.sleep(0.2)
            # 8 MB were sent: what the reader did not ask for waits in the daemon.
            assert wire.writer.transport.get_write_buffer_size() > 2_000_000
            status = asyncio.create_task(client.call("status"))
            await main.answer()
            await status
            async for record in records:
                if record.seq == len(lines):
                    break
            wire.close()
        main.close()


def test_a_notification_is_a_pair() -> None:
    method, params = Notification("log", {"n": 1})
    assert (method, params) == ("log", {"n": 1})
