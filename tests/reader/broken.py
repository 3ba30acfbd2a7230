"""A reader in the hands of whoever broke it: each manifest is the name of what it does instead of an answer."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from isolator.reader import service
from isolator.reader.hardening import begin_share, harden

GOOD = service.answer(b'{"name": "good", "version": "1.0.0", "api_version": "1", "binary": "./x", "hooks": ["a.b"]}')


def _changed(**core: object) -> Callable[[], bytes]:
    def make() -> bytes:
        answer = json.loads(GOOD)
        return json.dumps(answer | {"core": answer["core"] | core}).encode() + b"\n"

    return make


def _flood() -> bytes:
    while True:
        os.write(1, b"x" * 65536)


def _spin() -> bytes:
    while True:
        pass


def _silent() -> bytes:
    lock = threading.Lock()  # to sleep is a call that a hardened reader no longer has; to wait for a lock is one it has
    lock.acquire()
    lock.acquire()
    return b""


def _eat() -> bytes:
    kept = []
    while True:
        kept.append(bytearray(1 << 20))


def _end() -> bytes:
    os._exit(7)


ANSWERS: dict[str, Callable[[], bytes]] = {
    "good": lambda: GOOD,
    "flood": _flood,
    "spin": _spin,
    "silent": _silent,
    "eat": _eat,
    "end": _end,
    "no json": lambda: b"hello\n",
    "deep": lambda: b"[" * 100_000 + b"\n",
    "no object": lambda: b"[]\n",
    "other keys": lambda: b'{"core": {"admin": true}, "manifest": {}}\n',
    "name": _changed(name="../../etc"),
    "binary": _changed(binary="./../../bin/sh"),
    "hook": _changed(hooks=["*"]),
    "read": _changed(sandbox={"read": ["/run/secret"]}),
    "text": _changed(description="\x1b[2J"),
    "argument": _changed(args=["\ud800"]),
    "limit": _changed(limits={"memory": -1}),
    "huge limit": _changed(limits={"memory": 1e308}),
    "unknown limit": _changed(limits={"wishes": 3}),
    "switch": _changed(switches={"root": True}),
    "nan": lambda: GOOD.replace(b'"manifest": {', b'"manifest": {"n": NaN, '),
    "half a character": lambda: GOOD.replace(b'"manifest": {', b'"manifest": {"n": "\\ud800", '),
    "nested": lambda: GOOD.replace(b'"manifest": {', b'"manifest": {"n": ' + b"[" * 60 + b"]" * 60 + b", "),
    "error with another line": lambda: b'{"at": "\\n<0>kernel", "why": "x", "remedy": ""}\n',
}


# --- attempts, with and without what harden() leaves out -------------------------------------------------------------


def _open() -> None:
    os.close(os.open("/etc/hostname", os.O_RDONLY))


def _connect() -> None:
    socket.socket(socket.AF_INET).close()


def _unix() -> None:
    socket.socketpair()


def _fork() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _execute() -> None:
    os.execv("/bin/true", ["true"])


def _signal() -> None:
    os.kill(os.getpid(), 0)


def _memory() -> None:
    bytearray(1 << 30)


def _more_cpu() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard != resource.RLIM_INFINITY:
        raise OSError(errno.EPERM, "bounded")


ATTEMPTS: dict[str, Callable[[], None]] = {
    "open": _open, "connect": _connect, "unix": _unix, "fork": _fork, "signal": _signal, "memory": _memory,
    "cpu": _more_cpu, "execute": _execute,
}  # fmt: skip


def attempt(hardened: bool) -> None:
    """Print the names of the attempts that succeed; ``execute`` comes last and succeeds with silence."""
    if hardened:
        harden(1)
    for name, do in ATTEMPTS.items():
        try:
            if name == "execute":
                sys.stdout.flush()
            do()
            print(name, flush=True)
        except (OSError, MemoryError):
            continue
    print("still here", flush=True)


def main() -> None:
    """Answer for the manifests on standard input, or make the attempts."""
    if sys.argv[1] in ("hardened", "free"):
        attempt(sys.argv[1] == "hardened")
        return
    count = int(sys.argv[1])
    service.answer(b"{}")
    ready = {name: make for name, make in ANSWERS.items()}
    harden(count)
    for _ in range(count):
        begin_share()
        wanted = service._read(int.from_bytes(service._read(4), "big")).decode()
        data = memoryview(ready[wanted]())
        while data:
            data = data[os.write(1, data) :]


if __name__ == "__main__":
    assert Path("/").exists()
    main()
