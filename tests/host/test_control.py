"""The control socket: roles, bounds, garbage."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from host.control import server as server_module
from host.control.endpoints import Caller, QuickEndpoint, Reply
from host.control.event_types import EventEmit
from host.control.server import CONNECTIONS, STRANGER_SHARE, STRANGERS, ControlServer
from host.control.verbs import listing
from isolator import __version__
from isolator.base.pacing import TokenBucket
from isolator.errors import UnavailableError
from tests.host.fake_supervisor import Daemon
from tests.support import sidecars
from tests.support.timeouts import seconds

CALL = """
import json, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
request = {"jsonrpc": "2.0", "id": 1, "method": sys.argv[2], "params": json.loads(sys.argv[3])}
try:
    sock.sendall(json.dumps(request).encode() + b"\\n")
except BrokenPipeError:
    pass
print(sock.makefile().readline())
"""


@pytest.fixture
async def daemon(shared_dir: Path) -> AsyncIterator[Daemon]:
    fake = Daemon(shared_dir, config={"roles": {"viewer": [64010], "emitter": [64011], "operator": [64012]}})
    await fake.start()
    yield fake
    await fake.stop()


async def _as(daemon: Daemon, uid: int, method: str, **params: Any) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-c", CALL, str(daemon.paths.control_socket), method, json.dumps(params)),
        stdout=subprocess.PIPE, user=uid, group=uid, extra_groups=[], cwd="/",
    )  # fmt: skip
    out, _ = await process.communicate()
    answer = json.loads(out)
    assert isinstance(answer, dict)
    return answer


async def test_each_role_may_call_its_own_verbs_and_no_others(daemon: Daemon) -> None:
    daemon.add("one", sidecars.OK)
    payload = {"project_id": "p", "deployment_id": "d", "url": "https://x.example", "duration_ms": 1}
    calls = {
        "plugin.list": {},
        "event.emit": {"name": "deploy.completed", "payload": payload},
        "plugin.stop": {"name": "one"},
    }
    allowed = {uid: [] for uid in (64009, 64010, 64011, 64012)}
    for uid, done in allowed.items():
        for method, params in calls.items():
            answer = await _as(daemon, uid, method, **params)
            if "result" in answer:
                done.append(method)
            else:
                assert answer["error"]["data"]["code"] == "denied"
                assert f"uid {uid}" in answer["error"]["message"]
    assert allowed == {
        64009: [],
        64010: ["plugin.list"],
        64011: ["plugin.list", "event.emit"],
        64012: ["plugin.list", "event.emit", "plugin.stop"],
    }
    await daemon.until(lambda: len(daemon.of_type("control.called")) >= 7)
    denied = [r["data"] for r in daemon.of_type("control.called") if r["data"]["verdict"] == "denied"]
    assert len(denied) == 6
    (stop,) = [r for r in daemon.of_type("control.called") if r["data"]["verdict"] == "ok"]
    assert (stop["plugin"], stop["data"]["verb"], stop["data"]["uid"]) == ("one", "plugin.stop", 64012)
    (accepted, _) = daemon.of_type("event.accepted")
    assert accepted["data"]["by"] == "uid:64011"


async def test_refusal_that_names_a_plugin_at_any_length_is_recorded(daemon: Daemon) -> None:
    answer = await _as(daemon, 64009, "plugin.stop", name="n" * 5_000)
    assert answer["error"]["data"]["code"] == "denied"
    await daemon.until(lambda: daemon.of_type("control.called"))
    (record,) = daemon.of_type("control.called")
    assert (record["plugin"], record["data"]["uid"]) == ("n" * 256, 64009)


async def _raw(daemon: Daemon, data: bytes) -> list[dict[str, Any]]:
    reader, writer = await asyncio.open_unix_connection(str(daemon.paths.control_socket), limit=1 << 24)
    writer.write(data)
    writer.write_eof()
    answers = [json.loads(line) async for line in reader]
    writer.close()
    return answers


async def test_garbage_gets_an_error_and_the_connection_lives(daemon: Daemon) -> None:
    reader, writer = await asyncio.open_unix_connection(str(daemon.paths.control_socket))
    for bad, code in ((b"nonsense", -32700), (b"[]", -32600), (b"\xff", -32700), (b"[" * 3000, -32700)):
        writer.write(bad + b"\n")
        assert json.loads(await reader.readline())["error"]["code"] == code
    for method in ("no.such", 17, None):
        writer.write(json.dumps({"jsonrpc": "2.0", "id": 5, "method": method}).encode() + b"\n")
        assert json.loads(await reader.readline())["id"] == 5
    writer.write(b'{"jsonrpc":"2.0","id":6,"method":"status","params":[1]}\n')
    assert "must be an object" in json.loads(await reader.readline())["error"]["message"]
    writer.write(b'{"jsonrpc":"2.0","id":7,"method":"status"}\n')
    assert json.loads(await reader.readline())["result"]["plugins"] == 0
    writer.close()


async def test_an_endless_request_is_cut_off(daemon: Daemon) -> None:
    reader, writer = await asyncio.open_unix_connection(str(daemon.paths.control_socket))
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        for _ in range(64):
            writer.write(b"x" * (1 << 18))
            await writer.drain()
        await reader.readexactly(1 << 20)
    assert (await daemon.ask("status"))["plugins"] == 0


async def test_many_requests_on_one_connection_are_all_answered(daemon: Daemon) -> None:
    requests = b"".join(
        json.dumps({"jsonrpc": "2.0", "id": n, "method": "status"}).encode() + b"\n" for n in range(2000)
    )
    reader, writer = await asyncio.open_unix_connection(str(daemon.paths.control_socket))
    writer.write(requests)
    seen = {json.loads(await reader.readline())["id"] for _ in range(2000)}
    assert seen == set(range(2000))
    writer.close()


@pytest.mark.parametrize(
    "params",
    [
        {"name": "deploy.completed", "payload": []},
        {"name": 5},
        {"name": "deploy.completed", "payload": {}, "ttl": -1},
        {"name": "deploy.completed", "payload": {}, "dedupe_key": ""},
        {"name": "deploy.completed", "payload": {"project_id": "x" * 200}},
    ],
)
async def test_bad_parameters_are_usage_errors(daemon: Daemon, params: dict[str, Any]) -> None:
    (answer,) = await _raw(
        daemon, json.dumps({"jsonrpc": "2.0", "id": 1, "method": "event.emit", "params": params}).encode() + b"\n"
    )
    assert answer["error"]["data"]["code"] == "usage"


async def test_a_caller_that_half_closes_still_gets_its_answer(daemon: Daemon) -> None:
    daemon.add("slow", sidecars.oneshot("time.sleep(0.5)\nreturn {}"))
    emitted = await daemon.emit()
    request = {"jsonrpc": "2.0", "id": 1, "method": "event.wait", "params": {"id": emitted["id"], "timeout": 10}}
    (answer,) = await _raw(daemon, json.dumps(request).encode() + b"\n")
    assert answer["result"]["deliveries"][0]["state"] == "ok"


async def test_answer_waits_for_others_of_its_connection_and_for_nothing_else(shared_dir: Path) -> None:
    replies, hurried = list[Reply](), list[int]()
    started = asyncio.Semaphore(0)

    def start(_: EventEmit, __: Caller, reply: Reply) -> None:
        replies.append(reply)
        started.release()

    emit = QuickEndpoint(
        EventEmit, start, lambda: False, lambda: asyncio.sleep(0), lambda: hurried.append(len(replies))
    )
    request = b'{"id":1,"method":"event.emit","params":{"name":"a.b","payload":{}}}\n'
    server = ControlServer([emit], role_of=lambda _: "emitter", record=lambda *_, **__: None)
    listener, path = socket.socket(socket.AF_UNIX), str(shared_dir / "control.sock")
    listener.bind(path)
    await server.start(listener)
    with socket.socket(socket.AF_UNIX) as caller:
        caller.setblocking(False)
        await asyncio.get_running_loop().sock_connect(caller, path)
        caller.send(request * 2)
        for _ in range(2):
            await started.acquire()
        replies[0]({"id": "first"}, None)
        with pytest.raises(BlockingIOError):
            caller.recv(4096)
        replies[1]({"id": "second"}, None)
        assert re.findall(rb"first|second", caller.recv(4096)) == [b"first", b"second"]
        assert hurried == [], "what comes together shares a transaction"
        caller.send(request)
        await started.acquire()
        assert hurried == [3]
        replies[2]({"id": "third"}, None)
        assert b"third" in caller.recv(4096)
    await server.close()


async def test_a_burst_of_callers_that_cannot_wait_is_served(daemon: Daemon) -> None:
    # Non-blocking callers (Go, Node, asyncio) get EAGAIN from a full backlog. A stopped host accepts none of them.
    assert daemon.host is not None
    daemon.host.send_signal(signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        try:
            callers = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(300)]
            for caller in callers:
                caller.setblocking(False)
                caller.connect(str(daemon.paths.control_socket))
                caller.sendall(b'{"jsonrpc":"2.0","id":1,"method":"status"}\n')
        finally:
            daemon.host.send_signal(signal.SIGCONT)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(seconds(15)):
            answers = await asyncio.gather(*(loop.sock_recv(caller, 1 << 16) for caller in callers))
    assert all(json.loads(answer)["result"]["plugins"] == 0 for answer in answers)


async def test_one_caller_too_many_is_refused_with_a_remedy(daemon: Daemon) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS):
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(daemon.paths.control_socket))
        with pytest.raises(UnavailableError, match="try again"):
            await daemon.ask("status")


HOLD = """
import socket, sys
held = []
for _ in range(int(sys.argv[2])):
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].connect(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
"""


@contextlib.asynccontextmanager
async def _held(daemon: Daemon, uid: int, count: int) -> AsyncIterator[None]:
    """Idle connections of a uid."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-c", HOLD, str(daemon.paths.control_socket), str(count)),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=uid, group=uid, extra_groups=[], cwd="/",
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    assert await process.stdout.readline() == b"held\n"
    try:
        yield
    finally:
        process.stdin.close()
        await process.wait()


async def test_idle_connections_of_strangers_keep_nobody_out(daemon: Daemon) -> None:
    async with _held(daemon, 64020, STRANGER_SHARE):
        refused = await _as(daemon, 64020, "status")
        assert "connections of uid 64020 are open" in refused["error"]["message"]
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(seconds(60)):
        uid, said = 64020, ""
        while f"{STRANGERS} connections without a role are open" not in said:  # not that they come too fast
            # They are served twenty a second: whether so many are open already is a matter of speed.
            await stack.enter_async_context(_held(daemon, uid, STRANGER_SHARE))
            uid += 1
            said = (await _as(daemon, 64099, "status"))["error"]["message"]
        assert uid - 64020 >= STRANGERS // STRANGER_SHARE
        assert (await daemon.ask("status"))["plugins"] == 0
        assert "result" in await _as(daemon, 64011, "status")
        # Nothing tells a caller that its users are let in again.
        while "come, in great number" in (said := (await _as(daemon, 64020, "status"))["error"]["message"]):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert re.search("connections (of uid 64020|without a role) are open", said)


async def test_stranger_has_a_few_requests_and_connections_a_second(shared_dir: Path) -> None:
    """In this process and with a clock that stands still: all that a stranger is served is what he has at once."""
    server = ControlServer([], role_of=lambda _: None, record=lambda *_, **__: None)
    server.stranger_bytes = TokenBucket(1.0, 300.0, clock=lambda: 0.0)
    server._stranger_connects = TokenBucket(1.0, 4.0, clock=lambda: 0.0)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(shared_dir / "control.sock"))
    await server.start(listener)
    answers = []
    loop = asyncio.get_running_loop()
    for _ in range(10):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.setblocking(False)
            await loop.sock_connect(caller, str(shared_dir / "control.sock"))
            with contextlib.suppress(BrokenPipeError):
                await loop.sock_sendall(caller, b'{"jsonrpc":"2.0","id":1,"method":"status"}\n' * 5)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    first = (await loop.sock_recv(caller, 65536)).split(b"\n")[0]
                    answers.append(json.loads(first)["error"]["message"])
    await server.close()
    too_fast = [answer for answer in answers if "come, in great number" in answer]
    # Four are served in turn: the first one's requests are paid for, those of the others wait.
    assert (len(too_fast), len(answers)) == (6, 7), answers


async def test_strangers_who_connect_without_end_are_shut_out_once(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "FLOOD_BURST", 8.0)
    asked: list[int] = []
    server = ControlServer([], role_of=lambda _: None, record=lambda *_, **__: None, shut_out=asked.append)
    server._stranger_connects = TokenBucket(1.0, 4.0, clock=lambda: 0.0)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(shared_dir / "control.sock"))
    await server.start(listener)
    for count in range(1, 1000):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.setblocking(False)
            await asyncio.get_running_loop().sock_connect(caller, str(shared_dir / "control.sock"))
        await asyncio.sleep(0)
        assert not asked or count > 12, "four are served, and eight refused, before that"
    await server.close()
    assert asked == [0]


async def test_idle_connections_of_one_role_leave_places_for_the_others(daemon: Daemon) -> None:
    async with _held(daemon, 64010, CONNECTIONS), _held(daemon, 64011, CONNECTIONS):
        assert (await daemon.ask("status"))["plugins"] == 0
        refused = await _as(daemon, 64012, "status")
        assert "connections are open" in refused["error"]["message"]
    async with _held(daemon, 64010, CONNECTIONS):
        assert "result" in await _as(daemon, 64011, "status")


async def test_verb_that_does_not_exist_has_the_code_of_json_rpc(daemon: Daemon) -> None:
    answer = await daemon.answer("plugin.lst", {})
    assert answer["error"]["code"] == -32601 and answer["error"]["data"]["code"] == "usage"
    denied = await daemon.answer("plugin.show", {"name": "nobody"})
    assert denied["error"]["code"] == -32000


async def test_help_describes_every_verb_and_version_names_the_daemon(daemon: Daemon) -> None:
    everything = await daemon.ask("help")
    assert everything["verbs"].keys() == listing().keys() and "audit.found" in everything["notifications"]
    one = (await daemon.answer("help", {"verb": "event.emit"}))["result"]
    assert list(one["verbs"]) == ["event.emit"] and one["verbs"]["event.emit"]["params"]["name"]["required"]
    wrong = await daemon.answer("help", {"verb": "event.emti"})
    assert "did you mean event.emit?" in wrong["error"]["message"]
    assert await daemon.ask("version") == {"isolator": __version__, "protocols": [1]}


async def test_person_for_whom_a_platform_acts_is_on_record(daemon: Daemon) -> None:
    for person in ("alice", 7, "x" * 1000):
        await daemon.answer("plugin.stop", {"name": "nobody", "on_behalf_of": person})
    await daemon.until(lambda: len(daemon.of_type("control.called")) == 3)
    called = [record["data"] for record in daemon.of_type("control.called")]
    assert [one.get("on_behalf_of") for one in called] == ["alice", None, "x" * 256]
