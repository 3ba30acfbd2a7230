"""Sidecars that speak stream mode, well and badly. ``serve(line)`` gets each message; ``send(dict)`` answers."""

from __future__ import annotations

from tests.host.scripts import HEAD


def stream(body: str, *, hello: str = '{"protocol": "1", "handles": params["hooks"], "capabilities": []}') -> str:
    """A single-threaded stream plugin; ``body`` handles (method, params, id) and may call send()."""
    lines = "\n".join("            " + line for line in body.strip().splitlines())
    return f"""{HEAD}
while True:
    connection, _ = server.accept()
    def send(**message):
        connection.sendall(json.dumps({{"jsonrpc": "2.0", **message}}).encode() + b"\\n")
    try:
        for line in connection.makefile("rb"):
            message = json.loads(line)
            method, params, id = message.get("method"), message.get("params"), message.get("id")
            if method == "host.hello":
                send(id=id, result={hello})
                continue
{lines}
    except (OSError, ValueError) as error:
        print("connection:", error, flush=True)
"""


OK = stream("if id is not None:\n    send(id=id, result={'status': 'ok'})")
