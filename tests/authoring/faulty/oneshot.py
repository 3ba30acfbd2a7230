#!/usr/bin/python3
"""A plugin in the mode oneshot, with the fault that ``args`` of its manifest name."""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

FAULT = sys.argv[1] if len(sys.argv) > 1 else ""
PATH, STATE = os.environ["PLUGIN_SOCKET"], os.environ["PLUGIN_STATE_DIR"]
seen = set()


def read(connection):
    if FAULT == "reads once":
        return connection.recv(4096)
    if FAULT == "will not wait":
        connection.settimeout(0.2)
    data = b""
    while not data.endswith(b"\n"):
        piece = connection.recv(4096)
        if not piece:
            break
        data += piece
    return data


def handle(params):
    event = params.get("_meta", {}).get("id")
    if FAULT == "dies of an event that it knows" and event in seen:
        raise RuntimeError("handled already")
    seen.add(event)
    if FAULT == "takes too long":
        time.sleep(4)
    if FAULT == "leans on the host":
        with socket.socket(socket.AF_UNIX) as host:
            host.settimeout(1)
            host.connect(os.environ["PLUGIN_HOST_SOCKET"])
            host.sendall(b'{"jsonrpc":"2.0","method":"whoami","id":1}\n')
            host.recv(4096)
    if FAULT == "leans on the disk":
        Path(STATE, "log").write_bytes(bytes(1 << 20))


def reply(request):
    number = 1 if FAULT == "answers every request as the first" else request["id"]
    if FAULT == "answers another request":
        number = 7
    line = json.dumps({"jsonrpc": "2.0", "id": number, "result": {"status": "ok"}}).encode() + b"\n"
    return {
        "answers twice": line * 2,
        "forgets the newline": line[:-1],
        "answers without JSON": b"ok\n",
        "answers too much": line[:-2] + b" " * 70000 + b"}\n",
    }.get(FAULT, line)


def serve(connection):
    data = read(connection)
    if FAULT == "expects a request of each connection" and not data:
        raise RuntimeError("no request")
    request = json.loads(data)
    handle(request["params"])
    connection.sendall(reply(request))


if FAULT == "ignores SIGTERM":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if FAULT == "leaves a lock":
    os.close(os.open(f"{STATE}/lock", os.O_CREAT | os.O_EXCL))
with contextlib.suppress(FileNotFoundError):
    os.unlink(PATH)
patient = {
    "": (OSError, ValueError),
    "dies of a connection that ends": (ValueError,),
    "dies of what is no message": (OSError,),
}
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(PATH)
    listener.listen(1)
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(*patient.get(FAULT, patient[""])):
            if FAULT.startswith("leans") or FAULT == "will not wait":
                try:
                    serve(connection)
                except (TimeoutError, OSError) as error:
                    if not isinstance(error, (BrokenPipeError, ConnectionError)):
                        sys.exit(f"{type(error).__name__}: {error}")
            else:
                serve(connection)
