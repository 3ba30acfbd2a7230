"""The launcher: a small, single-threaded root process that clones the cages.

The supervisor is threaded and large: a fork from it copies page tables for milliseconds and leaves other
threads' locks held in the child. This process is started before any of that, imports only the standard library,
``isolator.linux`` and python-prctl, and does one thing: receive a plan with its descriptors, clone3 with CLONE_PARENT
(so that the child is the *supervisor's* child, which waits for it by pidfd), answer with the pid and the pidfd.

It keeps the cgroup descriptor of every cage that it started until it is told ``forget``. When the supervisor's
end of the socket closes, however that came about, it kills those cgroups and ends.

Packets, supervisor → launcher: a ``Plan`` with descriptors, or ``{"forget": CAGE}``. Answers: ``{"pid": N}`` with the
pidfd, or ``{"step", "errno", "detail"}``.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys

import prctl  # noqa: F401  # the layers use it after the cage's root has replaced the one it is found in

from isolator.ipc_packet import receive_packet, send_packet
from isolator.launch import cage
from isolator.launch.plan import Plan
from isolator.layers.filesystem import build_template
from isolator.linux.namespaces import CLONE_PARENT, clone3


def serve(sock: socket.socket) -> None:
    """Answer plans until the supervisor goes away, then kill every cage that is left."""
    cgroups: dict[str, int] = {}
    while True:
        try:
            packet, fds = receive_packet(sock)
        except OSError:
            packet, fds = b"", []
        if not packet:
            break
        body = json.loads(packet)
        if "forget" in body:
            fd = cgroups.pop(body["forget"], -1)
            if fd >= 0:
                os.close(fd)
            continue
        _start(sock, Plan.unpack(packet, fds), cgroups)
    for fd in cgroups.values():
        _kill(fd)


def _start(sock: socket.socket, plan: Plan, cgroups: dict[str, int]) -> None:
    cgroup = plan.fds.pop("cgroup", -1)
    try:
        pid, pidfd = clone3(plan.clone_flags | CLONE_PARENT, cgroup_fd=cgroup)
    except OSError as error:
        answer = {"step": "clone3", "errno": error.errno, "detail": error.strerror}
        send_packet(sock, json.dumps(answer).encode())
    else:
        if pid == 0:
            sock.close()
            cage.become(plan)
        if cgroup >= 0:
            cgroups[plan.cage] = os.dup(cgroup)
        send_packet(sock, json.dumps({"pid": pid}).encode(), [pidfd])
        os.close(pidfd)
    finally:
        for fd in (*plan.fds.values(), cgroup):
            if fd >= 0:
                os.close(fd)


def _kill(cgroup: int) -> None:
    try:
        fd = os.open("cgroup.kill", os.O_WRONLY | os.O_CLOEXEC, dir_fd=cgroup)
    except OSError:
        return  # already removed
    try:
        os.write(fd, b"1")
    except OSError:
        pass  # nothing in it any more
    finally:
        os.close(fd)


def main() -> None:
    """Entry point: ``launcher.py FD``; the supervisor set sys.path by its arguments."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the end of the socket ends this process, never a terminal's ^C
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    # What exists now is shared by every cage's pid 1; without this the collector would touch, and so copy, all of it.
    try:
        build_template()
        os.umask(0o022)
    except OSError as error:
        detail = f"{error.filename}: {error.strerror}"
        send_packet(sock, json.dumps({"step": "template", "errno": error.errno, "detail": detail}).encode())
        return
    send_packet(sock, b'{"ready": true}')
    gc.collect()
    gc.freeze()
    gc.disable()
    serve(sock)
