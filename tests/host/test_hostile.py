"""Hostile plugins on each channel to the host: their neighbours lose nothing.

Each behaviour runs while a neighbour is delivered to. Afterwards the host has the memory and the descriptors that it
had before, and every event of the neighbour's arrived at the first attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.host.fake_supervisor import Daemon
from tests.support import sidecars

NEIGHBOUR = {"project_id": "p", "domain": "a.example"}
GROWTH = 32 << 20
"""Bytes: two of the largest messages in several copies, and what the allocators keep; a flood would be a gigabyte.

Calls of 40 000 numbers each left 14 to 24 MiB in 20 runs, 21 mostly, and hardly more after ten seconds than after two:
nine are free in the C library's heap, which gives back only its end."""

API = """
import array, json, os, socket, time
def connect():
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(8)
    sock.connect(os.environ["PLUGIN_HOST_SOCKET"])
    return sock
def call(sock, request):
    sock.sendall(request + b"\\n")
    return json.loads(sock.makefile().readline())
WHOAMI = b'{"jsonrpc":"2.0","method":"whoami","id":1}'
"""

ON_THE_HOST_API = {
    "connect flood": """
        for _ in range(5000):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            try:
                sock.connect(os.environ["PLUGIN_HOST_SOCKET"])
            except OSError:
                pass
            sock.close()
        """,
    "connections that stay": """
        kept = globals()["kept"] = []
        for _ in range(200):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            try:
                sock.connect(os.environ["PLUGIN_HOST_SOCKET"])
                kept.append(sock)
            except OSError:
                pass
        """,
    "a gigabyte without a newline": """
        sock = connect()
        try:
            for _ in range(1024):
                sock.sendall(b"x" * (1 << 20))
            return {"message": "swallowed"}
        except OSError:
            return {"message": "cut off"}
        """,
    "byte by byte": """
        sock = connect()
        for byte in WHOAMI + b"\\n":
            sock.send(bytes((byte,)))
        return {"message": json.loads(sock.makefile().readline())["result"]["name"]}
        """,
    "calls without end, never read": """
        sock = connect()
        sock.settimeout(1)
        try:
            while True:
                sock.sendall((WHOAMI + b"\\n") * 1000)
        except OSError:
            pass
        """,
    "large calls without end": """
        sock = connect()
        sock.settimeout(1)
        big = b'{"jsonrpc":"2.0","method":"no.such","params":{"x":[' + b"1.5e3," * 40000 + b'1]},"id":1}\\n'
        end = time.monotonic() + 2
        try:
            while time.monotonic() < end:
                sock.sendall(big)
        except OSError:
            pass
        """,
    "descriptors": """
        sock = connect()
        null = os.open("/dev/null", os.O_RDONLY)
        fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null] * 200))]
        for _ in range(30):
            sock.sendmsg([WHOAMI + b"\\n"], fds)
        lines = sock.makefile()
        return {"message": json.loads([lines.readline() for _ in range(30)][-1])["result"]["name"]}
        """,
    "ids of any size and twice": """
        sock = connect()
        first = call(sock, b'{"jsonrpc":"2.0","method":"whoami","id":"' + b"x" * 200000 + b'"}')
        second = call(sock, b'{"jsonrpc":"2.0","method":"whoami","id":' + b"9" * 4000 + b"}")
        third = call(sock, WHOAMI), call(sock, WHOAMI)
        assert len(first["id"]) == 200000 and "result" in second and third[0] == third[1]
        return {"message": "answered"}
        """,
    "numbers of a megabyte": """
        sock = connect()
        try:
            return {"message": str(call(sock, b'{"jsonrpc":"2.0","method":"whoami","id":' + b"9" * 250000 + b"}"))}
        except OSError:
            return {"message": "cut off"}
        """,
    "deep": 'return {"message": call(connect(), b"[" * 100 + b"]" * 100)["error"]["message"]}',
    "half a surrogate pair": """
        sock = connect()
        answer = call(sock, b'{"jsonrpc":"2.0","method":"kv.set","params":{"key":"\\\\ud800","value":1},"id":1}')
        return {"message": f"answered {answer['result']}"}
        """,
    "lines that are dear to read": """
        sock = connect()
        sock.settimeout(1)
        digits = (b"1" * 299 + b" ") * 860
        line = b'{"jsonrpc":"2.0","id":1,"method":"x","params":{"a":"e000","s":"' + digits + b'"}}\\n'
        end = time.monotonic() + 3
        try:
            while time.monotonic() < end:
                sock.sendall(line)
        except OSError:
            pass
        """,
    "blank lines": """
        sock = connect()
        sock.settimeout(1)
        end = time.monotonic() + 3
        try:
            while time.monotonic() < end:
                sock.sendall(b"\\n" * 65536)
        except OSError:
            pass
        """,
    "half a request, then gone": """
        for _ in range(20):
            try:
                sock = connect()
                sock.sendall(WHOAMI[:20])
                sock.close()
            except OSError:
                pass  # one too many at once
        """,
}
ANSWERS = {
    "a gigabyte without a newline": "cut off",
    "byte by byte": "hostile",
    "descriptors": "hostile",
    "ids of any size and twice": "answered",
    "numbers of a megabyte": "not valid JSON",
    "deep": "nested deeper",
    "half a surrogate pair": "answered {}",
}

ON_A_STREAM = {
    "a gigabyte without a newline": """
        try:
            for _ in range(1024):
                connection.sendall(b"x" * (1 << 20))
        except OSError:
            pass
        """,
    "never reads": "time.sleep(60)",
    "byte by byte": """
        for byte in json.dumps({"jsonrpc": "2.0", "id": id, "result": {}}).encode() + b"\\n":
            connection.send(bytes((byte,)))
        """,
    "half a reply, then gone": """
        connection.sendall(json.dumps({"jsonrpc": "2.0", "id": id, "result": {}}).encode()[:20])
        connection.close()
        """,
    "replies to no request": """
        for n in range(100000):
            send(id="%016x" % n, result={})
        """,
    "calls without end, never read": """
        connection.settimeout(1)
        while True:
            connection.sendall(b'{"jsonrpc":"2.0","method":"whoami","id":1}\\n' * 1000)
        """,
    "descriptors": """
        import array
        null = os.open("/dev/null", os.O_RDONLY)
        fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null] * 200))]
        connection.sendmsg([json.dumps({"jsonrpc": "2.0", "id": id, "result": {}}).encode() + b"\\n"], fds)
        os.close(null)
        """,
    "values without end": """
        connection.sendall(b'{"jsonrpc":"2.0","id":1,"result":[' + b"1," * 500000 + b"1]}\\n")
        """,
}

ON_ONE_SHOT = {
    "half a reply": 'connection.sendall(b\'{"jsonrpc":"2.0","id":1,"resu\')',
    "a huge id": 'connection.sendall(b\'{"jsonrpc":"2.0","result":{},"id":\' + b\'1\' * 60000 + b\'}\')',
    "descriptors": """
        import array
        fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 200))]
        connection.sendmsg([b'{"jsonrpc":"2.0","id":1,"result":{}}\\n'], fds)
        """,
    "byte by byte": """
        for byte in b'{"jsonrpc":"2.0","id":1,"result":{}}\\n':
            connection.send(bytes((byte,)))
        """,
    # Gone before it answers: else the next event's connection would be among those that it closes.
    "its own socket, rebound for each event": """
        server.close()
        os.unlink(path)
        connection.sendall(b'{"jsonrpc":"2.0","id":1,"result":{}}\\n')
        connection.close()
        time.sleep(0.2)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.bind(path)
        time.sleep(0.2)
        server.listen(1)
        continue
        """,
    # Before it answers: the next event's connection would come in between, and be closed as one of its own.
    "its own backlog, filled": """
        own = []
        for _ in range(4):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            try:
                sock.connect(path)
                own.append(sock)
            except OSError:
                break
        connection.sendall(b'{"jsonrpc":"2.0","id":1,"result":{}}\\n')
        connection.close()
        time.sleep(0.5)
        for sock in own:
            server.accept()[0].close()
            sock.close()
        continue
        """,
}
DELIVERED = {"descriptors", "byte by byte", "its own socket, rebound for each event", "its own backlog, filled"}


@contextlib.asynccontextmanager
async def unharmed(daemon: Daemon) -> AsyncIterator[None]:
    """Assert that a neighbour gets its events meanwhile, and that the host is as before afterwards."""
    daemon.add("good", sidecars.OK, hooks=["domain.added"])
    await daemon.outcome(await daemon.ask("event.emit", name="domain.added", payload=NEIGHBOUR))
    assert daemon.host is not None
    before = _usage(daemon.host.pid)
    ids = []
    over = asyncio.Event()

    async def emit() -> None:
        while not over.is_set() or len(ids) < 10:
            ids.append((await daemon.ask("event.emit", name="domain.added", payload=NEIGHBOUR))["id"])
            await asyncio.sleep(0.05)

    emitting = asyncio.create_task(emit())
    try:
        yield
    finally:
        over.set()
        await emitting
    for event in ids:
        (delivery,) = (await daemon.ask("event.wait", id=event, timeout=15))["deliveries"]
        assert (delivery["state"], delivery["attempts"]) == ("ok", 1)
    await daemon.poll(lambda: _usage(daemon.host.pid)[1] <= before[1] + 40)  # connections that may be open, no more
    after = _usage(daemon.host.pid)
    assert after[0] - before[0] < GROWTH, f"the host grew by {(after[0] - before[0]) >> 20} MiB"


def _usage(pid: int) -> tuple[int, int]:
    """(resident bytes, descriptors) of the host."""
    status = Path(f"/proc/{pid}/statm").read_text()
    return int(status.split()[1]) * 4096, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _indent(body: str) -> str:
    import textwrap

    return textwrap.dedent(body).strip()


@pytest.mark.parametrize("kind", ON_THE_HOST_API)
async def test_hostile_caller_of_the_host_api_harms_nobody(daemon: Daemon, kind: str) -> None:
    script = API + sidecars.oneshot(_indent(ON_THE_HOST_API[kind]) + "\nreturn {}")
    async with unharmed(daemon):
        daemon.add("hostile", script, permissions=["kv"])
        row = await daemon.outcome(await daemon.emit())
    (delivery,) = row["deliveries"]
    assert delivery["state"] == "ok", delivery
    answer = json.loads(delivery["reply"])["result"].get("message", "")
    assert ANSWERS.get(kind, "") in answer, answer


@pytest.mark.parametrize("kind", ON_A_STREAM)
async def test_hostile_stream_plugin_harms_nobody(daemon: Daemon, kind: str) -> None:
    more: dict[str, Any] = {"transport": {"mode": "stream"}, "delivery": {"timeout": "2s", "attempts": 1}}
    async with unharmed(daemon):
        daemon.add("hostile", sidecars.stream(_indent(ON_A_STREAM[kind])), hooks=["noise.made"], **more)
        schema = {"type": "object", "properties": {"blob": {"type": "string"}}, "required": ["blob"]}
        await daemon.ask("event.register", name="noise.made", schema=schema)
        daemon.changed(daemon.sidecars["hostile"])
        if kind == "never reads":
            for _ in range(60):
                await daemon.ask("event.emit", name="noise.made", payload={"blob": "x" * 60_000})
            await daemon.until(
                lambda: any("does not read" in r["data"]["detail"] for r in daemon.of_type("plugin.health"))
            )
            return
        emitted = [await daemon.ask("event.emit", name="noise.made", payload={"blob": "x"}) for _ in range(8)]
        states = {(await daemon.outcome(e, timeout=12))["deliveries"][0]["state"] for e in emitted}
    assert states <= ({"ok"} if kind in ("byte by byte", "descriptors") else {"dead", "queued", "quarantined", "retry"})


@pytest.mark.parametrize("kind", ON_ONE_SHOT)
async def test_hostile_one_shot_plugin_harms_nobody(daemon: Daemon, kind: str) -> None:
    body = "connection.recv(4096)\n" + _indent(ON_ONE_SHOT[kind]) + "\nconnection.close()"
    async with unharmed(daemon):
        daemon.add("hostile", sidecars.raw(body), delivery={"attempts": 1})
        emitted = [await daemon.emit() for _ in range(3)]
        rows = [(await daemon.outcome(e))["deliveries"][0] for e in emitted]
    wanted = ("ok", 1) if kind in DELIVERED else ("dead", 1)
    assert {(row["state"], row["attempts"]) for row in rows} == {wanted}
