"""The supervisor's side of the launcher: start it, park processes, receive pids."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any, Protocol

import isolator
from isolator.base.structs import struct_class
from isolator.errors import ConfinementError, UnavailableError
from isolator.ipc.packet import TruncatedPacketError, pair, receive_packet, send_packet
from isolator.ipc.tasks import Tasks
from isolator.layers.plan import ParkOrder
from isolator.linux.apart import apart
from isolator.linux.capability import last_capability
from isolator.linux.shortage import is_shortage

_BOOT = "import sys; sys.path[:0] = sys.argv[2:]; from isolator.launcher.server import main; main()"
_IMPORT_PATH = str(Path(isolator.__file__).parents[1])

_END_SECONDS = 5.0
_SHORT_SECONDS = 0.1
"""Until an order is sent again for which the kernel had no memory."""


@struct_class(frozen=True)
class Clone:
    """A child of this process that another process cloned (CLONE_PARENT), held by its pidfd."""

    pid: int
    pidfd: int


class LauncherProcess(Protocol):
    """The process of a launcher: ``subprocess.Popen``, or a fork."""

    @property
    def pid(self) -> int: ...
    def wait(self, timeout: float | None = None) -> object: ...
    def kill(self) -> None: ...


class Launcher:
    """One launcher process. Answers come in the order of the questions."""

    def __init__(self, started: tuple[LauncherProcess, socket.socket] | None = None, *, adopted: bool = False) -> None:
        """Start a process, or take over one that was ``started``, with this end of its socket.

        ``adopted``: it was before this process's exec, and has long been ready.
        """
        self._process, self._sock = started or _start()
        self._waiting: deque[asyncio.Future[Clone]] = deque()
        self._alive: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._room: asyncio.Future[None] | None = None
        """Done when the socket has room again, or is lost; everybody who has found it full awaits it."""
        self._tasks = Tasks()
        self.closed = asyncio.Event()
        self._ready = adopted
        self._problem: ConfinementError | None = None
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock, self._readable)

    @property
    def link(self) -> int:
        """The descriptor of its socket."""
        return self._sock.fileno()

    @property
    def unsettled(self) -> bool:
        """Whether an answer of it is awaited, as its first word is."""
        return not self._ready or bool(self._waiting) or (self._alive is not None and not self._alive.done())

    @property
    def pid(self) -> int:
        """The launcher's pid (to be put into its group)."""
        return self._process.pid

    async def park(self, link: int, status: int, *others: int, layers: frozenset[str], hurried: bool = False) -> Clone:
        """Park a process that will become a cage with these layers (isolator.launcher.prefork).

        The descriptors, its end of the link and of the status pipe, the figures of a cage with the layer proc and the
        v1 groups for it, stay the caller's. Raises ConfinementError, or UnavailableError when the launcher is not
        running.
        """
        self._require()
        await self._send(ParkOrder(layers, last_capability(), hurried).pack(), [link, status, *others])
        return await self.parked()

    async def parked(self) -> Clone:
        """The answer to an order to park that has been sent; raises as ``park`` does."""
        self._require()
        future: asyncio.Future[Clone] = self._loop.create_future()
        self._waiting.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if (
                future.done() and not future.cancelled() and future.exception() is None
            ):  # the answer came at that very moment
                self._abandon(future.result())
            raise

    def _require(self) -> None:
        if self._problem is not None:
            raise self._problem
        if self.closed.is_set():
            raise UnavailableError("launcher", "not running at the moment", "try again")

    async def alive(self) -> None:
        """Return when the launcher answers; raises UnavailableError when it has died. One call at a time."""
        if self.closed.is_set():
            raise UnavailableError("launcher", "not running at the moment", "try again")
        self._alive = self._loop.create_future()
        await self._send(b'{"alive": true}', [])
        await self._alive

    async def keep(self, cage: str, cgroup: int) -> None:
        """Have the launcher kill this group when the supervisor goes away.

        Until the launcher has read this, only the cage's own pid 1 watches for that (``init.guard``).
        """
        await self._send(json.dumps({"keep": cage}).encode(), [cgroup])

    def forget(self, cage: str) -> None:
        """Stop keeping a cage that has ended: its group need not be killed any more."""
        if not self.closed.is_set():
            self._tasks.run("an order to the launcher", self.forgotten(cage), expected=(UnavailableError,))

    async def forgotten(self, cage: str) -> None:
        """As ``forget``; returns when it is sent. Raises UnavailableError when the launcher has died."""
        await self._send(json.dumps({"forget": cage}).encode(), [])

    def dismiss(self) -> None:
        """Have the launcher end, without waiting for that; it kills the cages that it still keeps."""
        self._lost()

    def close(self) -> None:
        """End the launcher; it kills the cages that it still keeps. One that hangs is killed after a moment."""
        self._lost()
        try:
            self._process.wait(_END_SECONDS)
        except (subprocess.TimeoutExpired, TimeoutError):
            self.kill()
            self._process.wait()

    def kill(self) -> None:
        """Kill the launcher alone: its cages are left to the caller."""
        self._process.kill()

    async def _send(self, packet: bytes, fds: list[int]) -> None:
        while True:
            try:
                send_packet(self._sock, packet, fds)
                return
            except BlockingIOError:
                if self._room is None:
                    self._room = self._loop.create_future()
                    self._loop.add_writer(self._sock, self._has_room)
                await asyncio.shield(self._room)
            except OSError as error:
                if is_shortage(error):
                    await asyncio.sleep(_SHORT_SECONDS)
                    continue
                # That it has ended is told behind its last answers; any other error is this order's alone.
                died = self.closed.is_set() or error.errno in (errno.EPIPE, errno.ECONNRESET)
                why = "it has died" if died else f"the order cannot be sent: {error.strerror}"
                raise UnavailableError("launcher", why, "the supervisor starts it again" if died else "") from None

    def _has_room(self) -> None:
        self._loop.remove_writer(self._sock)
        room, self._room = self._room, None
        if room is not None:
            room.set_result(None)

    def _readable(self) -> None:
        try:
            packet, fds = receive_packet(self._sock)
        except BlockingIOError:
            return
        except TruncatedPacketError as error:
            packet, fds = error.payload, []
        except OSError:
            packet, fds = b"", []
        if not packet:
            self._lost()
            return
        answer = json.loads(packet)
        if "alive" in answer:
            if self._alive is not None and not self._alive.done():
                self._alive.set_result(None)
            return
        if not self._ready:
            self._ready = True
            if "ready" not in answer:
                self._problem = ConfinementError("root of the cages", answer["detail"], "see 'isolator check'")
            return
        future = self._waiting.popleft()
        if "pid" in answer and not fds:  # no descriptor is free for its pidfd
            self._reap(answer["pid"])
            answer = {"errno": errno.EMFILE, "detail": os.strerror(errno.EMFILE)}
        if future.done():  # nobody waits for it any more
            if "pid" in answer:
                self._abandon(Clone(answer["pid"], fds[0]))
        elif "pid" in answer:
            future.set_result(Clone(answer["pid"], fds[0]))
        else:
            future.set_exception(
                ConfinementError("clone of a parked process", answer["detail"], clone_remedy(answer["errno"]))
            )

    def _abandon(self, parked: Clone) -> None:
        """Reap a parked process that nobody waits for: it sees the end of its link, and ends."""
        os.close(parked.pidfd)
        self._reap(parked.pid)

    def _reap(self, pid: int) -> None:
        # Not in the loop's executor: it may have to be imported first, and a full table has no room for that.
        self._tasks.run("the end of a parked process", apart(lambda: os.waitpid(pid, 0)))

    def _lost(self) -> None:
        if self.closed.is_set():
            return
        self.closed.set()
        self._loop.remove_reader(self._sock)
        self._has_room()
        self._sock.close()
        waiting: list[asyncio.Future[Any]] = [*self._waiting, *([self._alive] if self._alive is not None else [])]
        for future in waiting:
            if not future.done():
                error = self._problem or UnavailableError("launcher", "it has died", "the supervisor starts it again")
                future.set_exception(error)


def _start() -> tuple[subprocess.Popen[bytes], socket.socket]:
    mine, theirs = pair()
    process = subprocess.Popen(
        # -I -S: no environment, no user site, no .pth files; the few modules it needs are found by an explicit path.
        [sys.executable, "-I", "-S", "-c", _BOOT, str(theirs.fileno()), _IMPORT_PATH],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        # Functions of libraries are looked up now, not at their first use in each clone.
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "LD_BIND_NOW": "1"},
        cwd="/",
        close_fds=True,
    )
    theirs.close()
    return process, mine


def clone_remedy(number: int) -> str:
    """The remedy to suggest for an errno of clone3."""
    return {
        errno.EPERM: "run as root, outside a container that forbids namespaces",
        errno.ENOSYS: "use kernel 5.7 or newer",
        errno.EMFILE: "allow the daemon more descriptors (ulimit -n, LimitNOFILE=)",
        errno.EAGAIN: "the host is out of process ids",
        errno.EBUSY: "the cgroup leaf distributes controllers; run 'isolator gc'",
    }.get(number, "see 'isolator check'")


HOSTS_DOING = frozenset({errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO, errno.ETXTBSY})
"""Numbers of an exec that failed for want of something, by the host's state or a cap, whatever the program is."""


def exec_remedy(number: object) -> str:
    """The remedy to suggest for an errno of exec."""
    return {
        errno.ENOENT: "check the name; it sees /usr, a plugin's files, and what its policy, --read or --write names",
        errno.EACCES: "make it executable (chmod +x) and readable by everyone",
        errno.E2BIG: "the kernel takes 2 MiB of arguments and variables, and 128 KiB in one of them",
        errno.ENOEXEC: "it is neither a program of this architecture nor a script that starts with #!",
    }.get(number if isinstance(number, int) else 0, "check the program")
