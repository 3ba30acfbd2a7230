"""Host API: permissions, the private store, limits, and a platform's own methods."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel

from host import PluginHost
from host.host_api.api import HostApi
from host.host_api.methods import KeyValue
from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.succession import Departure, Descriptors
from tests.host.fake_supervisor import PLUGIN_UID, Daemon
from tests.support import sidecars

CALLER = """
import json, os, socket, sys
def call(method, params=None, id=1):
    global host
    if "host" not in globals():
        host = socket.socket(socket.AF_UNIX)
        host.connect(os.environ["PLUGIN_HOST_SOCKET"])
        globals()["lines"] = host.makefile()
    host.sendall(json.dumps({"jsonrpc": "2.0", "method": method, "params": params, "id": id}).encode() + b"\\n")
    return json.loads(lines.readline())
"""
HASTY = """
def ask(sock):
    for method, params in ("kv.set", {"key": "a", "value": 1}), ("projects.list", {}):
        sock.sendall(json.dumps({"jsonrpc": "2.0", "method": method, "params": params, "id": method}).encode() + b"\\n")
    sock.close()
"""
"""Calls whose answers the plugin does not wait for."""


def _caller(body: str) -> str:
    return CALLER + sidecars.oneshot(body)


async def _reply(daemon: Daemon, **fields: Any) -> Any:
    (delivery,) = (await daemon.outcome(await daemon.emit(**fields)))["deliveries"]
    assert delivery["state"] == "ok", delivery
    return json.loads(delivery["reply"])["result"]


async def test_hello_and_whoami_answer_with_the_plugin_itself(daemon: Daemon) -> None:
    daemon.add("who", _caller('return [call("plugin.hello", {"name": "who", "api_version": "1"}), call("whoami")]'))
    hello, whoami = await _reply(daemon)
    assert hello["result"]["protocol"] == "1"
    assert whoami["result"]["name"] == "who"
    assert whoami["result"]["hooks"] == ["deploy.completed"]


async def test_an_unknown_protocol_is_refused_with_those_supported(daemon: Daemon) -> None:
    daemon.add("old", _caller('return call("plugin.hello", {"api_version": "9"})'))
    error = (await _reply(daemon))["error"]
    assert (error["code"], error["data"]["supported"]) == (-31002, ["1"])


async def test_call_without_its_permission_is_refused_with_the_line_that_grants_it(daemon: Daemon) -> None:
    daemon.add("nosy", _caller('return call("kv.get", {"key": "a"})'))
    error = (await _reply(daemon))["error"]
    assert error["code"] == -31010
    assert error["data"]["permission"] == "kv"
    assert error["data"]["grant"] == 'permissions = ["kv"]'
    # The line of the policy is not enough here: the manifest does not ask for it.
    assert error["message"].endswith("which the manifest does not ask for")
    assert error["data"]["manifest"] == '"permissions": ["kv"]'
    (record,) = daemon.of_type("api.called")
    assert (record["data"]["method"], record["data"]["verdict"]) == ("kv.get", "denied")


async def test_the_private_store_is_private_and_survives_the_host(daemon: Daemon) -> None:
    body = """
if params["deployment_id"] == "write":
    return [call("kv.set", {"key": "color", "value": {"deep": [1, None, "é"]}}),
            call("kv.set", {"key": "gone", "value": 1, "ttl": 0.05}),
            call("kv.set", {"key": "size", "value": 3})]
time.sleep(0.1)
return [call("kv.get", {"key": "color"}), call("kv.get", {"key": "gone"}), call("kv.list", {"prefix": ""}),
        call("kv.delete", {"key": "size"}), call("kv.delete", {"key": "size"})]
"""
    daemon.add("store", _caller(body), permissions=["kv"])
    daemon.add("other", _caller('return call("kv.list")'), permissions=["kv"], hooks=["domain.added"])
    assert [a["result"] for a in await _reply(daemon, deployment_id="write")] == [{}] * 3
    await daemon.kill_host()
    await daemon.start_host()
    await daemon.ask("plugin.restart", name="store")
    got, gone, keys, first, second = [a["result"] for a in await _reply(daemon, deployment_id="read")]
    assert got == {"value": {"deep": [1, None, "é"]}, "found": True}
    assert gone == {"value": None, "found": False}
    assert keys["keys"] == ["color", "size"]
    assert (first["deleted"], second["deleted"]) == (True, False)
    emitted = await daemon.ask("event.emit", name="domain.added", payload={"project_id": "p", "domain": "a.example"})
    (delivery,) = (await daemon.outcome(emitted))["deliveries"]
    assert json.loads(delivery["reply"])["result"]["result"]["keys"] == []


async def test_half_an_emoji_is_stored_and_logged_as_its_replacement(daemon: Daemon) -> None:
    body = r"""
half = "half \ud83d"
return [call("kv.set", {"key": "a", "value": half}), call("kv.get", {"key": "a"}),
        call("log.write", {"level": "info", "message": half})]
"""
    daemon.add("cuts", _caller(body), permissions=["kv", "log"])
    stored, read, logged = await _reply(daemon)
    assert (stored["result"], read["result"]["value"], logged["result"]) == ({}, "half \ufffd", {})


async def test_the_store_has_a_quota(daemon: Daemon) -> None:
    body = """
errors = []
for n in range(40):
    answer = call("kv.set", {"key": "k%d" % n, "value": "x" * 60000})
    if "error" in answer:
        errors.append(answer["error"]["code"])
big = call("kv.set", {"key": "big", "value": "x" * 70000})["error"]["code"]
bad = call("kv.set", {"key": "", "value": 1})["error"]["code"]
return [len(errors), errors[-1], big, bad]
"""
    daemon.add("hoarder", _caller(body), permissions=["kv"])
    refused, code, big, bad = await _reply(daemon)
    assert refused == 40 - 17
    assert (code, big, bad) == (-31011, -31011, -32602)


async def test_calls_are_limited_and_the_flood_does_not_move_into_the_trail(daemon: Daemon) -> None:
    body = """
codes = {}
call("whoami")
host.sendall(b"".join(b'{"jsonrpc":"2.0","method":"whoami","id":%d}\\n' % n for n in range(1000)))
for n in range(1000):
    code = json.loads(lines.readline()).get("error", {}).get("code", 0)
    codes[code] = codes.get(code, 0) + 1
time.sleep(1.1)
call("whoami")
return codes
"""
    daemon.add("flood", _caller(body))
    codes = await _reply(daemon)
    assert codes["-31000"] > 50
    limited = [r for r in daemon.of_type("api.called") if r["data"]["verdict"] == "limited"]
    assert 1 <= len(limited) <= 10
    assert sum(r["data"]["count"] for r in limited) == codes["-31000"]


async def test_refusals_are_answered_one_after_another_on_however_many_connections(daemon: Daemon) -> None:
    body = """
call("whoami")
sockets = [host] + [socket.socket(socket.AF_UNIX) for _ in range(15)]
for one in sockets[1:]:
    one.connect(os.environ["PLUGIN_HOST_SOCKET"])
import time
began, answers = time.monotonic(), 0
for one in sockets:
    one.sendall(b'{"jsonrpc":"2.0","method":"kv.get","params":{"key":"k"},"id":1}\\n' * 8)
for one in sockets:
    answers += sum(1 for _ in zip(range(8), one.makefile()))
return [answers, time.monotonic() - began]
"""
    daemon.add("refused", _caller(body))
    answers, took = await _reply(daemon)
    assert answers == 128 and answers <= 100 * took + 1


async def test_log_lines_of_a_plugin_carry_their_level(daemon: Daemon) -> None:
    body = 'return [call("log.write", {"level": "warning", "message": "disk is filling"}), call("log.write", {})]'
    daemon.add("logger", _caller(body), permissions=["log"])
    fine, bad = await _reply(daemon)
    assert fine["result"] == {}
    assert bad["error"]["code"] == -32602
    (entry,) = (await daemon.ask("plugin.logs", name="logger"))["lines"]
    assert (entry["stream"], entry["line"]) == ("warning", "disk is filling")


@pytest.mark.parametrize(
    "breach",
    [
        "b'nonsense\\n'",
        "b'[]\\n'",
        "b'\\xff\\n'",
        'b\'{"jsonrpc":"2.0","result":{},"id":1}\\n\'',
        "b'x' * 600_000",
    ],
)
async def test_a_breach_gets_an_error_a_record_and_a_closed_connection(daemon: Daemon, breach: str) -> None:
    body = f"""
import socket
sock = socket.socket(socket.AF_UNIX)
sock.connect(os.environ["PLUGIN_HOST_SOCKET"])
try:
    sock.sendall({breach})
except OSError:
    pass
data = b""
try:
    while True:
        chunk = sock.recv(65536)
        if not chunk:
            break
        data += chunk
except OSError:
    pass
return {{"message": data.decode()}}
"""
    daemon.add("breaker", _caller(body))
    message = (await _reply(daemon))["message"]
    if message:
        assert json.loads(message)["error"]["code"] in (-32700, -32600, -31003)
    (record,) = daemon.of_type("plugin.health")
    assert record["data"]["detail"].startswith("protocol:")


async def test_another_user_is_turned_away(daemon: Daemon) -> None:
    sidecar = daemon.add("mine", sidecars.OK)
    await daemon.outcome(await daemon.emit())
    path = daemon._host_socket(sidecar)
    path.chmod(0o666)
    script = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(30); "
    script += "s.connect(sys.argv[1]); print(s.makefile().read())"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-c", script, str(path)),
        stdout=subprocess.PIPE, user=PLUGIN_UID + 7, group=PLUGIN_UID + 7, extra_groups=[], cwd="/",
    )  # fmt: skip
    out, _ = await process.communicate()
    assert json.loads(out)["error"]["code"] == -31010
    (record,) = daemon.of_type("api.called")
    assert (record["data"]["verdict"], record["data"]["uid"]) == ("denied", PLUGIN_UID + 7)


async def test_a_caller_that_never_reads_costs_a_bounded_amount(daemon: Daemon) -> None:
    sidecar = daemon.add("mute", sidecars.OK, permissions=["kv"])
    await daemon.outcome(await daemon.emit())
    path = daemon._host_socket(sidecar)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.setgid(PLUGIN_UID)
            os.setuid(PLUGIN_UID)
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(path))
            sock.settimeout(1)
            request = b'{"jsonrpc":"2.0","method":"no.such","params":{"x":"' + b"y" * 1000 + b'"},"id":1}\n'
            for _ in range(20_000):
                sock.sendall(request)
        os._exit(0)
    await asyncio.to_thread(os.waitpid, pid, 0)
    assert (await daemon.ask("status"))["plugins"] == 1
    (delivery,) = (await daemon.outcome(await daemon.emit()))["deliveries"]
    assert delivery["state"] == "ok"


# The platform


class BackupFailed(BaseModel):
    """Event of a platform's own."""

    volume: str
    attempts: int
    note: str | None = None


async def test_a_platform_serves_its_own_methods_and_events(daemon: Daemon) -> None:
    async def get_project(plugin: str, params: dict[str, Any]) -> Any:
        if params.get("id") == "missing":
            raise IsolatorError("project missing", "no such project")
        return {"id": params["id"], "for": plugin}

    script = 'return [call("projects.get", {"id": params["volume"]}), call("projects.get", {"id": "missing"})]'
    daemon.add("reader", _caller(script), permissions=["read:projects"], hooks=["backup.failed"])
    daemon.add("stranger", _caller(script), hooks=["backup.failed"])
    async with PluginHost.connect(daemon.root) as host:
        await host.register_event("backup.failed", BackupFailed, order_by="volume")
        await host.serve("projects.get", "read:projects", get_project)
        emitted = await host.emit("backup.failed", {"volume": "v1", "attempts": 3}, dedupe_key="once")
        again = await host.emit("backup.failed", {"volume": "v1", "attempts": 3}, dedupe_key="once")
        assert (again.id, again.duplicate) == (emitted.id, True)
        delivered = {d.plugin: json.loads(d.reply or "")["result"] for d in await host.wait(emitted.id)}
        with pytest.raises(IsolatorError, match="attempts is required"):
            await host.emit("backup.failed", {"volume": "v1"})
    assert delivered["reader"][0]["result"] == {"id": "v1", "for": "reader"}
    assert delivered["reader"][1]["error"]["message"] == "project missing: no such project"
    assert delivered["stranger"][0]["error"]["code"] == -31010


async def test_the_library_comes_back_after_the_host_died(daemon: Daemon) -> None:
    async def answer(plugin: str, params: dict[str, Any]) -> Any:
        return {"n": 1}

    daemon.add("reader", _caller('return call("projects.list")'), permissions=["read:projects"])
    async with PluginHost.connect(daemon.root) as host:
        await host.serve("projects.list", "read:projects", answer)
        await daemon.kill_host()
        await daemon.start_host()
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(UnavailableError):
                    if await host.plugins():
                        break
                await asyncio.sleep(0.02)
        payload = {"project_id": "p", "deployment_id": "d", "url": "https://x.example", "duration_ms": 1}
        (delivered,) = await host.wait((await host.emit("deploy.completed", payload)).id)
        assert json.loads(delivered.reply or "")["result"]["result"] == {"n": 1}


async def test_a_platform_that_dies_fails_its_calls_at_once(daemon: Daemon) -> None:
    async def never(plugin: str, params: dict[str, Any]) -> Any:
        called.set()
        await asyncio.sleep(60)

    called = asyncio.Event()
    daemon.add("reader", _caller('return call("projects.list")'), permissions=["read:projects"])
    async with PluginHost.connect(daemon.root) as host:
        await host.serve("projects.list", "read:projects", never)
        emitted = await daemon.emit()
        async with asyncio.timeout(10):
            await called.wait()
    (delivery,) = (await daemon.outcome(emitted))["deliveries"]
    error = json.loads(delivery["reply"])["result"]["error"]
    assert (error["code"], error["message"]) == (-31000, "the platform went away")


@pytest.mark.parametrize(
    "script",
    [
        sidecars.oneshot('call("whoami")\nask(host)\nlines.close()\nreturn {"status": "ok"}', first=CALLER + HASTY),
        sidecars.stream("ask(connection)\nos._exit(0)", first=HASTY),
    ],
    ids=["oneshot", "stream"],
)
async def test_call_whose_plugin_does_not_wait_for_the_answer_is_on_record(
    daemon: Daemon, script: str, request: pytest.FixtureRequest
) -> None:
    async def never(plugin: str, params: dict[str, Any]) -> Any:
        await asyncio.Event().wait()

    mode = request.node.callspec.id
    daemon.add("hasty", script, permissions=["kv", "read:projects"], transport={"mode": mode})
    async with PluginHost.connect(daemon.root) as host:
        await host.serve("projects.list", "read:projects", never)
        await daemon.emit()
        await daemon.until(lambda: {("granted", "kv.set"), ("granted", "projects.list")} <= set(_called(daemon)))


def _called(daemon: Daemon) -> list[tuple[str, str]]:
    return [(one["data"]["verdict"], one["data"]["method"]) for one in daemon.of_type("api.called")]


async def test_library_without_a_daemon_reports_that_it_is_not_running(tmp_path: Any) -> None:
    with pytest.raises(UnavailableError, match="the daemon is not running"):
        async with PluginHost.connect(tmp_path):
            pass


def _listener() -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("\0" + os.urandom(8).hex())
    listener.listen()
    return listener


async def test_listeners_that_come_and_go_while_the_host_leaves_are_handed_on_as_they_are() -> None:
    """An invocation begins or ends between the hold and the hand-over, when the supervisor's answer comes late."""
    nobody: Any = None
    api = HostApi(nobody, nobody, KeyValue(nobody), nobody, nobody, nobody)
    api.serve("lasting", "r1", _listener())
    api.serve_invocation("exec", "r2", _listener())
    await api.hold()
    api.end_invocation("exec", "r2")
    new = _listener()
    name = new.getsockname()
    api.serve_invocation("exec", "r3", new)
    departure = Departure()
    states = api.pass_on(departure)
    api.close()
    assert {(one.plugin, one.run, one.invocation) for one in states} == {("lasting", "r1", False), ("exec", "r3", True)}
    with socket.socket(socket.AF_UNIX) as plugin:
        plugin.connect(name)  # it waits in the backlog for the successor
        (listener,) = (one.listener for one in states if one.run == "r3")
        with Descriptors(departure._fds.release_all()) as handed, socket.socket(fileno=handed.take(listener)) as kept:
            kept.setblocking(False)
            kept.accept()[0].close()
