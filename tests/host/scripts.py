"""Sidecars for tests: small scripts of the kind that people write, and some of the kind that they should not."""

from __future__ import annotations

HEAD = """
import json, os, socket, sys, time
path = os.environ["PLUGIN_SOCKET"]
if os.path.exists(path):
    os.unlink(path)
server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
server.bind(path)
server.listen(1)
"""

SERVE = (
    HEAD
    + """
while True:
    connection, _ = server.accept()
    request = json.loads(connection.recv(4096))
    result = handle(request["method"], request["params"])
    reply = {"jsonrpc": "2.0", "result": result, "id": request["id"]}
    connection.sendall(json.dumps(reply).encode() + b"\\n")
    connection.close()
"""
)


def oneshot(body: str) -> str:
    """A one-shot plugin whose ``handle(method, params)`` has this body."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    return f"import json, os, sys, time\ndef handle(method, params):\n{lines}\n{SERVE}"


def raw(body: str) -> str:
    """A plugin that does as it likes with each accepted ``connection``."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    return f"{HEAD}\nwhile True:\n    connection, _ = server.accept()\n{lines}\n"


OK = oneshot('return {"status": "ok"}')
LOGGED = oneshot('print("event", json.dumps(params), flush=True)\nreturn {"status": "ok"}')
