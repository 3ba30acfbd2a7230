"""Sidecars for tests: small scripts of the kind that people write, and some of the kind that they should not.

Each is a whole file that can be executed. ``first`` is what it does before it makes its socket.
"""

from __future__ import annotations

_TOP = """#!/usr/bin/python3
import json, os, signal, socket, sys, time
"""
_LISTEN = """
path = os.environ["PLUGIN_SOCKET"]
if os.path.exists(path):
    os.unlink(path)
server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
server.bind(path)
server.listen(1)
"""


def _indented(body: str, depth: int) -> str:
    return "\n".join(" " * depth + line for line in body.strip().splitlines())


def raw(body: str, *, first: str = "") -> str:
    """A plugin that does as it likes with each accepted ``connection``."""
    return f"{_TOP}{first}{_LISTEN}\nwhile True:\n    connection, _ = server.accept()\n{_indented(body, 4)}\n"


def oneshot(body: str, *, first: str = "") -> str:
    """A one-shot plugin whose ``handle(method, params)`` has this body."""
    handle = f"def handle(method, params):\n{_indented(body, 4)}\n"
    answer = """
request = json.loads(connection.recv(4096))
result = handle(request["method"], request["params"])
reply = {"jsonrpc": "2.0", "result": result, "id": request["id"]}
connection.sendall(json.dumps(reply).encode() + b"\\n")
connection.close()
"""
    return raw(answer, first=handle + first)


def stream(
    body: str, *, first: str = "", hello: str = '{"protocol": "1", "handles": params["hooks"], "capabilities": []}'
) -> str:
    """A single-threaded stream plugin; ``body`` handles (method, params, id) and may ``send(...)``."""
    serve = f"""
def send(**message):
    connection.sendall(json.dumps({{"jsonrpc": "2.0", **message}}).encode() + b"\\n")
try:
    for line in connection.makefile("rb"):
        message = json.loads(line)
        method, params, id = message.get("method"), message.get("params"), message.get("id")
        if method == "host.hello":
            send(id=id, result={hello})
            continue
{_indented(body, 8)}
except (OSError, ValueError) as error:
    print("connection:", error, flush=True)
"""
    return raw(serve, first=first)


OK = oneshot('return {"status": "ok"}')
LOGGED = oneshot('print("event", json.dumps(params), flush=True)\nreturn {"status": "ok"}')
STREAM_OK = stream("if id is not None:\n    send(id=id, result={'status': 'ok'})")
