"""The launcher: a small, single-threaded root process that clones the cages.

The supervisor is threaded and large: a fork from it copies page tables for milliseconds and leaves other
threads' locks held in the child. The launcher is a program of its own, imports only the standard library
and modules of isolator that do the same (a test sees to it), and does one thing: clone3 a process that
waits for a cage's plan (isolator.launcher.prefork). By CLONE_PARENT it is the *supervisor's* child, which waits for it
by pidfd.

The launcher holds the cgroup descriptor of every cage between ``keep`` and ``forget``. When the supervisor's end of the
socket closes, for whatever reason, it kills those cgroups and ends.

Packets, supervisor → launcher: ``{"park": ORDER}`` with the link, the status pipe, the figures of a cage with the layer
proc, and ``tasks`` of each v1 group that the parked process is to put itself into, answered by ``{"pid": N}`` with the
pidfd or by ``{"step", "errno", "detail"}``; ``{"keep": CAGE}`` with its cgroup, ``{"forget": CAGE}``: no answer;
``{"alive": true}``, which is sent back. They are JSON as ``isolator.launcher.client`` writes it, and known by how they
begin: whatever this process reads of its own after a clone, the kernel copies page by page.

A table that is full of descriptors refuses a park, and ends nothing.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import signal
import socket
import sys

from isolator.ipc.packet import TruncatedPacketError, receive_packet, send_packet
from isolator.launcher.prefork import Way, park
from isolator.layers.filesystem import build_template
from isolator.layers.plan import ParkOrder, learn_parts
from isolator.layers.proc import layer as proc
from isolator.linux import successor
from isolator.linux.coredump import leave_memory_out
from isolator.linux.descriptors import close_all, open_standard_streams
from isolator.linux.namespaces import clone3
from isolator.linux.priority import take_turns

_ALIVE, _KEEP, _FORGET = b'{"alive": true}', b'{"keep": ', b'{"forget": '


def serve(sock: socket.socket) -> None:
    """Answer the supervisor's packets until it goes away, then kill every cage that is left."""
    cgroups: dict[bytes, int] = {}
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has gone before its answer
        _answer(sock, cgroups)
    sock.close()  # a full table has room for one descriptor again
    for fd in cgroups.values():
        _kill(fd)


def _answer(sock: socket.socket, cgroups: dict[bytes, int]) -> None:
    """Answer packets until the supervisor goes away; ``cgroups``: those of the cages that are to be killed then."""
    ways: dict[bytes, Way] = {}  # there are few, and most are like the one before
    while True:
        try:
            packet, fds = receive_packet(sock)
        except TruncatedPacketError as error:
            packet, fds = error.payload, []  # no descriptor is left: refuse, and keep the cages that there are
        except OSError:
            packet, fds = b"", []
        if not packet:
            return
        if packet == _ALIVE:
            send_packet(sock, packet)
        elif packet.startswith(_FORGET):
            _forget(cgroups, packet.removeprefix(_FORGET))
        elif packet.startswith(_KEEP):
            if fds:  # or its pid 1 alone watches for the end of the supervisor
                cage = packet.removeprefix(_KEEP)
                _forget(cgroups, cage)
                cgroups[cage] = fds[0]
        elif len(fds) < 2:
            answer = {"step": "park", "errno": errno.EMFILE, "detail": os.strerror(errno.EMFILE)}
            send_packet(sock, json.dumps(answer).encode())
        else:
            _park(sock, ways, packet, fds)


def _forget(cgroups: dict[bytes, int], cage: bytes) -> None:
    fd = cgroups.pop(cage, -1)
    if fd >= 0:
        os.close(fd)


def _park(sock: socket.socket, ways: dict[bytes, Way], packet: bytes, fds: list[int]) -> None:
    link, status, *others = fds
    try:
        if packet not in ways:
            ways[packet] = Way(ParkOrder.of(json.loads(packet)["park"]))
        way = ways[packet]
        pid, pidfd = clone3(way.to_be_parked)
    except OSError as error:
        answer = {"step": "clone3", "errno": error.errno, "detail": error.strerror}
        send_packet(sock, json.dumps(answer).encode())
    else:
        if pid == 0:
            park(way, sock, link, status, others)
        send_packet(sock, b'{"pid": %d}' % pid, [pidfd])
        os.close(pidfd)
    finally:
        close_all(fds)


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
    """Entry point: ``FD PATH``; the supervisor set sys.path by its arguments (``client._BOOT``)."""
    open_standard_streams()
    run(socket.socket(fileno=int(sys.argv[1])))


def run(sock: socket.socket) -> None:
    """Become the launcher of whoever has the other end of ``sock``; returns when that has gone away."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the end of the socket ends this process, never a terminal's ^C
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        leave_memory_out()  # every cage inherits it
        take_turns()  # this, too
        found = proc.entries("/proc")
        build_template()
        proc.learn_covers(found)
        learn_parts()
        successor.learn()
        os.umask(0o022)
    except OSError as error:
        detail = f"{error.filename}: {error.strerror}"
        send_packet(sock, json.dumps({"step": "template", "errno": error.errno, "detail": detail}).encode())
        return
    try:
        send_packet(sock, b'{"ready": true}')
    except BrokenPipeError:
        return  # the command line was wrong: the process that started this one has ended
    # The objects that exist now are shared by every cage's pid 1: the collector would write to all of them.
    if gc.isenabled():  # a fork of a command has collected no garbage yet
        gc.collect()
    gc.freeze()
    gc.disable()
    serve(sock)
