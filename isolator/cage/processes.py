"""Processes of a cage, from birth to the end of the last: pid 1, which is a child of this process, and the sidecar.

Whatever is known of an end comes from the kernel (pidfd, counters of the control groups) or from pid 1 of the cage
(isolator.launcher.init), which writes the sidecar's raw wait status into a pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import struct
import time
from typing import TYPE_CHECKING, Any

from isolator.base.structs import field, struct_class
from isolator.launcher.client import Clone
from isolator.layers.cgroup.leaf import Events, Leaf

if TYPE_CHECKING:
    from isolator.ipc.handover import CageState


@struct_class(frozen=True)
class CageExit:
    """End of a cage. ``cause``: exit, signal, out of memory, task limit, forbidden ABI, stopped, or a sentence."""

    exit_code: int | None
    signal: int | None
    cause: str
    uptime: float
    events: Events = field(default_factory=Events)

    @property
    def returncode(self) -> int:
        """Exit code as a shell shows it: the code, or 128 + the signal."""
        return self.exit_code if self.exit_code is not None else 128 + (self.signal or 9)

    @property
    def figures(self) -> dict[str, Any]:
        """The fields that records of an end share, whatever has ended."""
        return {
            "exit_code": self.exit_code,
            "signal": self.signal,
            "oom_kills": self.events.oom_kills,
            "task_denials": self.events.task_denials,
            "uptime": round(self.uptime, 3),
        }


class CageProcesses:
    """Owns the pidfd; ``status``, the non-blocking end of pid 1's pipe, stays the caller's until ``reap``.

    ``leaf`` is None for a cage without control groups, which only tests build.
    """

    def __init__(self, clone: Clone, status: int, leaf: Leaf | None) -> None:
        self.pid, self.pidfd = clone.pid, clone.pidfd
        self.exited = asyncio.Event()
        """Set once pid 1 has ended: the kernel takes its namespaces down, which takes milliseconds."""
        self.ended = asyncio.Event()
        """Set once the sidecar has ended: pid 1 has reported it, or has ended itself."""
        self.started = 0.0
        """Time of the sidecar's exec, by the monotonic clock; 0 before that."""
        self._status = status
        self._leaf = leaf
        self._stopping = self._killed = False
        self._oom = -1
        self._oom_seen = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.pidfd, self._pid1_ended)
        self._loop.add_reader(status, self._reported)

    @classmethod
    def adopt(cls, before: CageState, leaf: Leaf | None) -> CageProcesses:
        """The processes of a cage that runs since before this process's exec; what has ended meanwhile shows."""
        made = cls(Clone(before.pid, before.pidfd), before.status, leaf)
        made.started, made._oom, made._oom_seen = before.started, before.oom, before.oom_seen
        if made._oom >= 0:
            made._loop.add_reader(made._oom, made._out_of_memory)
        return made

    @property
    def memory_events(self) -> tuple[int, bool]:
        """The eventfd of ``watch_memory`` (-1: none), and whether the cage was ended for its memory."""
        return self._oom, self._oom_seen

    @property
    def lasts(self) -> bool:
        """Whether its program has begun, and neither has pid 1 ended nor has anybody here ended the cage."""
        return self.started > 0 and not (self._killed or self.exited.is_set())

    @property
    def uptime(self) -> float:
        """Seconds since exec."""
        return time.monotonic() - self.started

    def watch_memory(self) -> None:
        """End the whole cage when it is out of memory, as v2 does: v1 kills one process of the group."""
        memory = self._leaf.v1.get("memory") if self._leaf is not None else None
        if memory is None:
            return
        control = os.open(memory / "memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
        self._oom = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            (memory / "cgroup.event_control").write_text(f"{self._oom} {control}")
        finally:
            os.close(control)
        self._loop.add_reader(self._oom, self._out_of_memory)

    def _out_of_memory(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._oom)
        assert self._leaf is not None
        try:
            populated = self._leaf.populated()
        except OSError:  # no descriptor is free
            populated = True
        if populated:
            self._oom_seen = True
            self.kill()

    def _pid1_ended(self) -> None:
        self._loop.remove_reader(self.pidfd)
        self.exited.set()
        self._reported()

    def _reported(self) -> None:
        self._loop.remove_reader(self._status)
        self.ended.set()

    def signal(self, number: int) -> None:
        """Send a signal to pid 1 of the cage, which forwards it to the sidecar."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        """End the whole cage at once: its group, and pid 1, in case somebody has moved processes to another group."""
        self._killed = True
        with contextlib.suppress(OSError):  # no descriptor may be free: pid 1 takes its namespace along all the same
            if self._leaf is not None:
                self._leaf.kill()
        self.signal(signal.SIGKILL)

    async def stop(self, grace: float) -> None:
        """Send SIGTERM; after ``grace`` seconds kill the whole group. ``wait`` returns the outcome."""
        self._stopping = True
        self.signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self.ended.wait()
                return
        self.kill()

    async def wait(self) -> CageExit:
        """Wait until the sidecar has ended; returns how and why. The rest of the cage may still run."""
        await self.ended.wait()
        raw = b""
        with contextlib.suppress(BlockingIOError):
            raw = os.read(self._status, 4)
        if len(raw) == 4:
            code = os.waitstatus_to_exitcode(struct.unpack("=i", raw)[0])
        else:
            # The pipe ended empty: pid 1 was killed, and its own death is all that is known.
            await self.exited.wait()
            info = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
            code = -info.si_status if info and info.si_code != os.CLD_EXITED else 125
        events = self._events()
        number = -code if code < 0 else None
        return CageExit(None if code < 0 else code, number, self._cause(code, number, events), self.uptime, events)

    def _events(self) -> Events:
        if self._leaf is None:
            return Events()
        events = self._leaf.events()
        return Events(max(events.oom_kills, int(self._oom_seen)), events.task_denials)

    def _cause(self, code: int, number: int | None, events: Events) -> str:
        if events.oom_kills:
            from isolator.ipc.messages import OUT_OF_MEMORY

            return OUT_OF_MEMORY
        if self._stopping:
            return "stopped"
        if number == signal.SIGSYS:
            return "forbidden ABI"
        if events.task_denials and code != 0:
            return "task limit"
        return "signal" if number is not None else "exit"

    async def silence(self) -> None:
        """Kill what is left; returns when nothing of the plugin's runs any more. Pid 1, which is ours, may still end.

        The kernel takes a process out of its group's list when it ends, and a new one is the last of the list
        (css_task_iter_advance and css_set_move_task in kernel/cgroup): none that forks and ends is passed by.
        """
        alone = False
        with contextlib.suppress(OSError):  # no descriptor may be free to look
            alone = self._leaf is not None and not {*self._leaf.processes()} - {self.pid}
        if not alone:
            self.kill()
            await self.exited.wait()

    async def reap(self) -> None:
        """Wait for pid 1, which has ended or was killed, and close all descriptors."""
        await self.exited.wait()
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        self._loop.remove_reader(self._status)
        os.close(self.pidfd)
        if self._oom >= 0:
            self._loop.remove_reader(self._oom)
            os.close(self._oom)


def end_child(pid: int) -> None:
    """Kill a child of this process that nobody has reaped, and wait for its end."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def reap_group(leader: int) -> None:
    """Wait for the end of every child of this process that is in a process group."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitid(os.P_PGID, leader, os.WEXITED)


async def empty(leaf: Leaf) -> None:
    """Kill what is left without pid 1, and wait without blocking the loop until no process, zombie included, is."""
    if leaf.populated():
        leaf.kill()
        await asyncio.to_thread(leaf.wait_empty, 5.0)
