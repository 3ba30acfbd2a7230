#!/usr/bin/python3
"""A plugin in stream mode, with the fault that ``args`` of its manifest name."""

import contextlib
import json
import os
import socket
import sys
import time

FAULT = sys.argv[1] if len(sys.argv) > 1 else ""


def lines(connection):
    if FAULT == "takes one message of each piece":
        while piece := connection.recv(1 << 20):
            yield piece.split(b"\n")[0]
        return
    data = b""
    while piece := connection.recv(1 << 20):
        if FAULT == "takes each piece for a message":
            yield piece
            continue
        *whole, data = (data + piece).split(b"\n")
        yield from whole


def answer(message):
    if "id" not in message and FAULT != "answers notifications":
        return b""
    hello = message["method"] == "host.hello"
    result = {"protocol": "1", "handles": message["params"].get("hooks", [])} if hello else {"status": "ok"}
    number = "of another" if FAULT == "answers with another id" and not hello else message.get("id")
    line = json.dumps({"jsonrpc": "2.0", "id": number, "result": result}).encode() + b"\n"
    return line * 2 if FAULT == "answers twice" and not hello else line


def serve(connection):
    for line in lines(connection):
        connection.sendall(answer(json.loads(line)))


with contextlib.suppress(FileNotFoundError):
    os.unlink(os.environ["PLUGIN_SOCKET"])
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(os.environ["PLUGIN_SOCKET"])
    listener.listen(1)
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError, ValueError):
            serve(connection)
        if FAULT == "takes one connection":
            listener.close()
            time.sleep(3600)
