"""Network namespaces by thread: ``unshare`` and ``setns`` act on the calling thread alone.

A cage's namespace is made, or entered, by a thread that exists for nothing else and ends right after (the caller's, if
it is such a thread: ``isolator.linux.apart``), so no other thread of the daemon ever finds itself in the wrong network.
A socket keeps the namespace it was created in for its whole life, whichever process holds it.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from isolator.linux.apart import is_apart

CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


def unshare_network() -> None:
    """Move the calling thread into a new, empty network namespace; raises OSError."""
    if _libc.unshare(CLONE_NEWNET) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"unshare(CLONE_NEWNET): {os.strerror(errno)}")


def enter_network(fd: int) -> None:
    """Move the calling thread into the network namespace behind ``fd``; raises OSError."""
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"setns(CLONE_NEWNET): {os.strerror(errno)}")


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
    if is_apart():
        enter()
        return work()
    results: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            enter()
            results.append(work())
        except BaseException as error:  # handed to the caller's thread, whatever it is
            errors.append(error)

    thread = threading.Thread(target=body, name="netns", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
