"""Network namespaces by thread: ``unshare`` and ``setns`` act on the calling thread alone.

A cage's namespace is made, or entered, by a thread that exists for nothing else and ends right after (the caller's, if
it is such a thread: ``isolator.linux.apart``), so no other thread of the daemon ever finds itself in the wrong network.
A socket keeps the namespace it was created in for its whole life, whichever process holds it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar, cast

from isolator.linux._libc import call, libc
from isolator.linux.apart import collector, is_apart, outcome_of
from isolator.linux.namespaces import CLONE_NEWNET

T = TypeVar("T")


def unshare_network() -> None:
    """Move the calling thread into a new, empty network namespace; raises OSError."""
    call(libc.unshare, "unshare(CLONE_NEWNET)", CLONE_NEWNET)


def enter_network(fd: int) -> None:
    """Move the calling thread into the network namespace behind ``fd``; raises OSError."""
    call(libc.setns, "setns(CLONE_NEWNET)", fd, CLONE_NEWNET)


def current_network() -> int:
    """A close-on-exec descriptor of the calling thread's network namespace."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def in_new_network(work: Callable[[], T]) -> T:
    """Run ``work`` in a fresh network namespace, in a thread of its own; the caller's is untouched."""
    return _in_thread(unshare_network, work)


def in_network(fd: int, work: Callable[[], T]) -> T:
    """Run ``work`` in the namespace behind ``fd``, in a thread of its own; the caller's is untouched."""
    return _in_thread(lambda: enter_network(fd), work)


def _in_thread(enter: Callable[[], None], work: Callable[[], T]) -> T:
    def entered() -> T:
        enter()
        return work()

    if is_apart():
        return entered()
    outcomes: list[tuple[T | None, BaseException | None]] = []
    thread = threading.Thread(target=lambda: outcomes.append(outcome_of(entered)), name="netns", daemon=True)
    thread.start()
    thread.join()
    assert thread.ident is not None
    collector.end(thread.ident)
    ((result, error),) = outcomes
    if error is not None:
        raise error
    return cast(T, result)
