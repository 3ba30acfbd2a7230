"""Processes that read a stranger's bytes: each is a user that nobody else is, and has no right to anything."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import IO

from isolator.layers.user import UidLease
from isolator.linux.unprivileged import service_command


@contextlib.contextmanager
def leased(uid_range: tuple[int, int]) -> Iterator[int]:
    """A uid that is nobody else's until the block ends."""
    lease = UidLease(uid_range)
    try:
        yield lease.uid
    finally:
        lease.release()


@contextlib.contextmanager
def running(
    module: str, uid: int, *arguments: str, stdin: int | IO[bytes] = subprocess.DEVNULL,
    fds: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[subprocess.Popen[bytes]]:  # fmt: skip
    """A module that runs as ``uid`` until the block ends; ``fds``: descriptors that it inherits, by name."""
    with subprocess.Popen(
        [*service_command(module, uid, uid, fds), *arguments], pass_fds=[*fds.values()], stdin=stdin,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def next_chunk(process: subprocess.Popen[bytes], end: float) -> bytes:
    """Read what a process writes next, empty at its end; raises TimeoutError at ``end``, in monotonic seconds."""
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
        raise TimeoutError
    return os.read(process.stdout.fileno(), 1 << 16)
