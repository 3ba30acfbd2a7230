"""Faults of a staged folder, found by a process without rights (``isolator/reader/inspector.py``).

Its answer is text for an operator and nothing else: whoever breaks it can lie to the operator about the plugin, as its
author can. So it fails no registration.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from isolator.errors import IsolatorError
from isolator.linux.descriptors import owning
from isolator.policy.parse.strict import prose
from isolator.registration.processes import leased, next_chunk, running

_MODULE = "isolator.reader.inspector"
"""Named, never imported."""
_SECONDS = 60.0
_MOST_SENTENCES = 12
_LARGEST_ANSWER = 64 << 10
_MISLEADING = ("its files take too much processor time or memory to look through, or are made to mislead",)


def inspect_folder(folder: Path, uid_range: tuple[int, int]) -> tuple[str, ...]:
    """The faults of a staged folder, each a sentence; one that says why, where it could not be looked through."""
    try:
        with leased(uid_range) as uid:
            return _answer(folder, uid)
    except TimeoutError:
        return _MISLEADING
    except (IsolatorError, OSError):
        return ("its files could not be looked through: the host is short of something; see 'isolator check'",)
    except (ValueError, TypeError):
        return _MISLEADING


def _answer(folder: Path, uid: int) -> tuple[str, ...]:
    """Sentences of the inspector. Raises ValueError, TypeError or TimeoutError when it gave no answer to speak of."""
    with (
        owning(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd,
        _shown(fd, uid),
        running(_MODULE, uid, fds={"folder": fd}) as process,
    ):
        text, end = b"", time.monotonic() + _SECONDS
        while chunk := next_chunk(process, end):
            text += chunk
            if len(text) > _LARGEST_ANSWER:
                raise ValueError("too much")
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
