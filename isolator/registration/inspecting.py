"""Faults of a staged folder, found by a process without rights (``isolator/reader/inspector.py``).

Its answer is text for an operator and nothing else: whoever breaks it can lie to the operator about the plugin, as its
author can. So it fails no registration.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from isolator.errors import IsolatorError
from isolator.layers.user import UidLease
from isolator.linux.unprivileged import service_command
from isolator.policy.parse.strict import prose

_MODULE = "isolator.reader.inspector"
"""Named, never imported."""
_SECONDS = 60.0
_MOST_SENTENCES = 12
_LARGEST_ANSWER = 64 << 10


def inspect_folder(folder: Path, uid_range: tuple[int, int]) -> tuple[str, ...]:
    """The faults of a staged folder, each a sentence; one that says why, where it could not be looked through."""
    try:
        lease = UidLease(uid_range)
        try:
            return _answer(folder, lease.uid)
        finally:
            lease.release()
    except (IsolatorError, OSError):
        return ("its files could not be looked through: the host is short of something; see 'isolator check'",)
    except (ValueError, TypeError):
        return ("its files take too much processor time or memory to look through, or are made to mislead",)


def _answer(folder: Path, uid: int) -> tuple[str, ...]:
    """Sentences of the inspector. Raises ValueError or TypeError when it gave no answer that makes sense."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _shown(fd, uid):
            text = _run(fd, uid)
    finally:
        os.close(fd)
    sentences = json.loads(text)
    if not isinstance(sentences, list) or len(sentences) > _MOST_SENTENCES:
        raise ValueError("no list of sentences")
    return tuple(prose(sentence) for sentence in sentences)


@contextlib.contextmanager
def _shown(fd: int, gid: int) -> Iterator[None]:
    """Let a group that nobody else has into a staged folder, which is root's alone."""
    os.fchown(fd, 0, gid)
    os.fchmod(fd, 0o750)
    try:
        yield
    finally:
        os.fchmod(fd, 0o700)
        os.fchown(fd, 0, 0)


def _run(fd: int, uid: int) -> bytes:
    process = subprocess.Popen(
        service_command(_MODULE, uid, uid, {"folder": fd}), pass_fds=[fd], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        return _read(process.stdout.fileno())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _read(fd: int) -> bytes:
    """Everything up to the end. Raises ValueError when that is too much or does not come."""
    data, end, poll = b"", time.monotonic() + _SECONDS, select.poll()
    poll.register(fd, select.POLLIN)
    while len(data) <= _LARGEST_ANSWER and poll.poll(max(0.0, end - time.monotonic()) * 1000):
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            return data
        data += chunk
    raise ValueError("no answer")
