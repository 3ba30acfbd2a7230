"""Commands of ``isolator``, each a process of its own, forked from one that has imported what most of them need.

A test suite calls thousands. The start of an interpreter and the imports take most of a command's processor time, and
are the same for all: a command that is forked does what ``bin/isolator`` does after them. One server serves a process
of tests; it is a program of its own, so a command gets nothing of a test but what is handed to it: arguments,
environment, folder, standard streams. ``./dev test --all`` starts each as a program.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module

from isolator.ipc.packet import pair, receive_message, send_message
from isolator.linux.files import close_all_but

_PRELOADED = (
    "host.cli.root", "host.cli.plugin", "host.cli.event", "host.cli.audit", "host.cli.status", "host.cli.check",
    "host.cli.add", "host.cli.config", "isolator.cli.install", "isolator.cli.purge", "isolator.layers.user",
    "isolator.recovery.daemon", "isolator.recovery.standalone", "isolator.registration.store",
)  # fmt: skip
_OWN_PROGRAM = frozenset({"serve", "run", "prove", "top", "mcp", "new"})
"""Commands whose own start is what they are about, or which take over a terminal."""
EXECUTE = "ISOLATOR_TEST_EXECUTE"
"""Variable that has every command be started as a program; set by ``--all``."""
_VIEWS = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


class _Server:
    def __init__(self) -> None:
        self.sock, theirs = pair()
        program = f"from tests.support import commands; commands.serve({theirs.fileno()})"
        command = [sys.executable, "-I", "-c", program]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd="/")
        theirs.close()
        self.view = _view()


_server: _Server | None = None
_starting = threading.Lock()


def run(words: Sequence[str], *, stdin: str | None, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run ``isolator WORDS`` as ``subprocess.run`` would, with its output as text; raises TimeoutExpired."""
    names = [word for word in words if not word.startswith("-")]
    if os.environ.get(EXECUTE) or _OWN_PROGRAM & {*names[:2]} or not _fits():
        return subprocess.run(
            ["isolator", *words], capture_output=True, text=True, check=False, timeout=timeout, input=stdin,
            stdin=None if stdin is not None else subprocess.DEVNULL,
        )  # fmt: skip
    assert _server is not None
    mine, theirs = socket.socketpair()
    with mine, contextlib.ExitStack() as stack:
        stack.callback(theirs.close)
        streams = [stack.enter_context(os.fdopen(os.memfd_create(name), "w+b")) for name in ("in", "out", "err")]
        streams[0].write((stdin or "").encode())
        streams[0].seek(0)
        order = {"arguments": list(words), "environment": dict(os.environ), "folder": os.getcwd()}
        send_message(_server.sock, json.dumps(order).encode(), [*(one.fileno() for one in streams), theirs.fileno()])
        theirs.close()
        mine.settimeout(timeout)
        pid = int(_line(mine, words))
        try:
            code = int(_line(mine, words))
        except subprocess.TimeoutExpired:
            os.kill(pid, signal.SIGKILL)
            raise
        out, err = (os.pread(one.fileno(), 1 << 30, 0).decode() for one in streams[1:])
    return subprocess.CompletedProcess(["isolator", *words], code, out, err)


def end() -> None:
    """End the server, if there is one."""
    global _server
    if _server is not None:
        server, _server = _server, None
        server.sock.close()
        server.process.wait()


def _fits() -> bool:
    """Whether the server sees what this process does; there is one afterwards."""
    global _server
    with _starting:
        if _server is None:
            _server = _Server()
    return _server.view == _view()


def _view() -> tuple[object, ...]:
    places = [os.stat(f"/proc/self/ns/{name}").st_ino for name in _VIEWS]
    return (*places, os.getresuid(), os.getresgid(), os.getgroups())


def _line(sock: socket.socket, words: Sequence[str]) -> bytes:
    text = b""
    while not text.endswith(b"\n"):
        try:
            more = sock.recv(1)
        except TimeoutError:
            raise subprocess.TimeoutExpired(["isolator", *words], sock.gettimeout() or 0.0) from None
        assert more, "the server of commands has ended"
        text += more
    return text


def _orders(sock: socket.socket) -> Iterator[tuple[dict[str, object], list[int]]]:
    while True:
        packet, fds = receive_message(sock)
        if not packet:
            return
        yield json.loads(packet), fds


def serve(fd: int) -> None:
    """Fork for each order a process that forks the command, and reports its pid and its exit code."""
    for module in _PRELOADED:
        import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that report
    for order, fds in _orders(socket.socket(fileno=fd)):
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            report = socket.socket(fileno=fds[3])
            pid = os.fork()
            if pid == 0:
                _become(order, fds)
            report.sendall(b"%d\n" % pid)
            report.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
        for inherited in fds:
            os.close(inherited)


def _become(order: dict[str, object], fds: list[int]) -> None:
    code: object = 1
    try:
        for number, fd in enumerate(fds[:3]):
            os.dup2(fd, number)
        close_all_but({0, 1, 2})
        os.environ.clear()
        os.environ.update(order["environment"])  # type: ignore[call-overload]
        os.chdir(str(order["folder"]))
        sys.argv[:] = ["isolator", *order["arguments"]]  # type: ignore[misc]
        from host.cli.main import main

        main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)
