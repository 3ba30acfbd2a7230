"""MCP servers for tests, of the standard library alone: one that behaves, and what others do instead."""

from __future__ import annotations

import textwrap

_TOP = """#!/usr/bin/python3
import json, os, signal, socket, subprocess, sys, threading, time
OLD, NEW = "2025-11-25", "2026-07-28"
TOOLS = [
    {"name": "echo", "description": "Returns its arguments.", "inputSchema": {"type": "object"}},
    {"name": "fail", "description": "Fails.", "inputSchema": {"type": "object"}},
    {"name": "slow", "description": "Takes its time.", "inputSchema": {"type": "object"}},
    {"name": "delete_all", "description": "Deletes everything.", "inputSchema": {"type": "object"}},
]
INSTRUCTIONS = "Be kind."
LOCK = threading.Lock()
def send(**message):
    with LOCK:
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\\n")
        sys.stdout.flush()
def text(value, **more):
    return {"content": [{"type": "text", "text": value}], **more}
def call(id, name, arguments, meta):
    if name.endswith("echo"):
        send(id=id, result=text(json.dumps(arguments, sort_keys=True)))
    elif name == "fail":
        send(id=id, result=text("it cannot", isError=True))
    elif name == "connect":
        try:
            socket.create_connection((arguments["host"], 80), 2).close()
        except OSError as error:
            send(id=id, result=text(str(error)))
        else:
            send(id=id, result=text("connected"))
    else:
        send(id=id, error={"code": -32602, "message": "unknown tool " + name})
def notified(method, params):
    pass
"""
_SERVE = """
def serve():
    for line in sys.stdin:
        message = json.loads(line)
        method, params, id = message.get("method"), message.get("params", {}), message.get("id")
        if id is None or method is None:
            notified(method, params)
        elif method == "initialize" and OLD in ERAS:
            send(id=id, result={"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}},
                                "serverInfo": {"name": "test", "version": "1"}, "instructions": INSTRUCTIONS})
        elif method == "server/discover" and NEW in ERAS:
            send(id=id, result={"supportedVersions": [NEW], "capabilities": {"tools": {}}, "instructions": INSTRUCTIONS,
                                "resultType": "complete", "ttlMs": 0, "cacheScope": "private"})
        elif method == "ping":
            send(id=id, result={})
        elif method == "tools/list":
            at = int(params.get("cursor", 0))
            more = {"nextCursor": str(at + 2)} if at + 2 < len(TOOLS) else {}
            send(id=id, result={"tools": TOOLS[at:at + 2], **more})
        elif method == "tools/call":
            call(id, params["name"], params.get("arguments", {}), params.get("_meta", {}))
        else:
            send(id=id, error={"code": -32601, "message": "unknown method"})
serve()
"""


def server(more: str = "", *, eras: str = "(OLD,)") -> str:
    """A server; ``more`` is Python that may define ``TOOLS``, ``call`` and whatever else anew."""
    return f"{_TOP}\nERAS = {eras}\n{textwrap.dedent(more)}\n{_SERVE}"
