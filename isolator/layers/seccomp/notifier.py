"""Answer the calls that seccomp handed over: EPERM, at a capped rate, and counted by name.

One call is answered with a descriptor instead: a socket of NETLINK_ROUTE, made here in the network of whoever asks.

One thread for all cages: receiving a notification can block when its caller dies at that moment (on kernels before
6.6), and must not hold up the event loop. A plugin that floods only makes itself wait: its listener is polled again
when its bucket has a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from isolator.base.pacing import TokenBucket
from isolator.base.structs import struct_class
from isolator.ipc.tasks import keep_in_thread, report
from isolator.linux import netns, seccomp
from isolator.linux.descriptors import owning

AF_NETLINK, NETLINK_ROUTE = 16, 0
_WORD = 0xFFFFFFFF
ANSWERS_PER_SECOND, LENDING = 500, 4
"""Answers to a cage, and how many of them a socket that is lent counts for: it takes more work, and still 125 names can
be looked up in a second, each of which opens one."""
NETLINK_SOCKETS = 20
"""Netlink sockets in a cage's network at once, those of the daemon among them. What waits in one, up to 416 KiB, is
charged to nobody."""
REPORT_SECONDS = 1.0
_SEEN_SECONDS = 0.1
"""A thread that has seen that it is to end does so within this time."""


@struct_class()
class Denied:
    """The denials of one call since the last report: their number, and the first and the last time.

    Times are CLOCK_MONOTONIC in ns. A report is up to a second late for repetitions: without these times the trail
    would name the event that is in flight by then.
    """

    call: str
    first_ns: int
    last_ns: int
    count: int = 0


Report = Callable[[Denied], None]
"""Called on the event loop."""


class _Watched:
    def __init__(self, report: Report) -> None:
        self.report = report
        self.answers = TokenBucket(ANSWERS_PER_SECOND, ANSWERS_PER_SECOND)
        self.counts: dict[int, Denied] = {}
        self.reported: dict[int, float] = {}
        self.paused = False


class SeccompNotifier:
    """Answers the denied calls of running cages, by their listeners."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._cages: dict[int, _Watched] = {}
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._stopped = threading.Event()
        self._thread = self._begin()

    def _begin(self) -> threading.Thread:
        return keep_in_thread("answers to denied calls", self._serve, self._stopped)

    def pause(self, timeout: float) -> bool:
        """Answer no call for now: those that come wait in the kernel. Reports what is counted, and blocks until then.

        The thread ends between two calls: one that was received and not answered would wait for ever. Returns whether
        it has ended within ``timeout`` seconds; ``go_on`` in any case.
        """
        self._stopped.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        for _, cage in self._present():
            self._report(cage, time.monotonic(), last=True)
        return True

    def go_on(self) -> None:
        """Answer calls again after ``pause``."""
        self._stopped.clear()
        self._thread.join(_SEEN_SECONDS)
        if not self._thread.is_alive():
            self._thread = self._begin()

    def watch(self, listener: int, report: Report) -> object:
        """Answer a cage's denied calls. The listener becomes this object's, which closes it when the cage has ended.

        Returns a token for ``listener_of``.
        """
        with self._lock:
            self._epoll.register(listener, select.EPOLLIN)
            watched = self._cages[listener] = _Watched(report)
        return watched

    def listener_of(self, token: object) -> int:
        """The listener that is watched by a token of ``watch``; -1 once it is closed, for its number means another."""
        with self._lock:
            return next((listener for listener, watched in self._cages.items() if watched is token), -1)

    def close(self) -> None:
        """Stop answering; calls that wait are refused by the kernel when their listener closes."""
        self._stopped.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for listener in list(self._cages):
            self._drop(listener)
        self._epoll.close()
        os.close(self._wake)

    def _serve(self) -> None:
        while not self._stopped.is_set():
            for fd, events in self._epoll.poll(0.1 if self._busy() else -1):
                if fd == self._wake:
                    os.eventfd_read(self._wake)
                elif not self._stopped.is_set():
                    self._guarded(fd, functools.partial(self._handle, fd, events))
            now = time.monotonic()
            for listener, cage in self._present():
                self._guarded(listener, functools.partial(self._go_on, listener, cage, now))

    def _present(self) -> list[tuple[int, _Watched]]:
        with self._lock:
            return list(self._cages.items())

    def _busy(self) -> bool:
        return any(cage.counts or cage.paused for _, cage in self._present())

    def _guarded(self, listener: int, work: Callable[[], None]) -> None:
        """Do one cage's work; its failure costs that cage its answers (the kernel refuses its calls), nobody else."""
        try:
            work()
        except Exception as error:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(report, self._loop, "answers to a cage's denied calls", error)
            self._drop(listener)

    def _handle(self, listener: int, events: int) -> None:
        if events & select.EPOLLIN:
            self._answer(listener)
        elif events & (select.EPOLLHUP | select.EPOLLERR):
            self._drop(listener)

    def _go_on(self, listener: int, cage: _Watched, now: float) -> None:
        self._report(cage, now)
        if cage.paused and cage.answers.tokens >= 1:
            cage.paused = False
            self._epoll.modify(listener, select.EPOLLIN)

    def _answer(self, listener: int) -> None:
        with self._lock:
            cage = self._cages[listener]
        if cage.answers.tokens < 1:
            cage.paused = True
            self._epoll.modify(listener, 0)  # EPOLLHUP is still reported
            return
        try:
            notification = seccomp.receive(listener)
            if notification is None:
                return
            if _asks_for_netlink(notification):
                cage.answers.take(LENDING)
                _lend_netlink(listener, notification)
                return
            cage.answers.take()
            # Before the answer: the plugin cannot have gone on, so the event that it works on is still in flight.
            now = time.monotonic_ns()
            denied = cage.counts.setdefault(notification.number, Denied(call_name(notification.number), now, now))
            denied.last_ns, denied.count = now, denied.count + 1
            seccomp.deny(listener, notification, errno.EPERM)
        except OSError:
            self._drop(listener)

    def _report(self, cage: _Watched, now: float, *, last: bool = False) -> None:
        """Report the first refusal of a call at once, repetitions at most once a second."""
        for number in list(cage.counts):
            if last or now - cage.reported.get(number, -REPORT_SECONDS) >= REPORT_SECONDS:
                denied = cage.counts.pop(number)
                cage.reported[number] = now
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(cage.report, denied)

    def _drop(self, listener: int) -> None:
        with self._lock:
            cage = self._cages.pop(listener, None)
        if cage is None:
            return
        self._report(cage, time.monotonic(), last=True)
        with contextlib.suppress(OSError, ValueError):
            self._epoll.unregister(listener)
        os.close(listener)


def _asks_for_netlink(asked: seccomp.Notification) -> bool:
    family, protocol = asked.args[0] & _WORD, asked.args[2] & _WORD
    return call_name(asked.number) == "socket" and (family, protocol) == (AF_NETLINK, NETLINK_ROUTE)


def _lend_netlink(listener: int, asked: seccomp.Notification) -> None:
    """Answer with a new socket of the caller's own network, or with EMFILE when there are many.

    Its rights are no more than the caller's: rtnetlink asks for CAP_NET_ADMIN of who opened a socket and of who sends.
    """
    kind = asked.args[1] & _WORD
    try:
        with owning(os.open(f"/proc/{asked.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)) as network:
            lines = Path(f"/proc/{asked.pid}/net/protocols").read_text().splitlines()
            if not seccomp.is_waiting(listener, asked):
                return
            if sum(int(line.split()[2]) for line in lines if line.startswith("NETLINK ")) >= NETLINK_SOCKETS:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            made = netns.in_network(network, lambda: socket.socket(AF_NETLINK, kind & ~socket.SOCK_CLOEXEC, 0))
        with made:
            flags = os.O_CLOEXEC if kind & socket.SOCK_CLOEXEC else 0
            seccomp.answer_with(listener, asked, made.fileno(), flags)
    except OSError as error:
        seccomp.deny(listener, asked, error.errno or errno.EPERM)


_names: dict[int, str] = {}


def call_name(number: int) -> str:
    """The name of a system call of this architecture, or ``syscall_N``."""
    if not _names:
        import pyseccomp

        from isolator.layers.seccomp import profiles as syscalls

        for name in {rule[0] for rule in syscalls.rules("default")}:
            with contextlib.suppress(ValueError, RuntimeError):
                _names[pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)] = name
    return _names.get(number, f"syscall_{number}")
