"""Arguments and environment of the calling process, as the kernel shows them to others."""

from __future__ import annotations

import ctypes
import os

_FIRST = 48
"""Field of /proc/PID/stat, by its number in proc(5): the first of four addresses, begin and end of the arguments and of
the environment."""


def overwrite_arguments(title: str) -> None:
    """Zero the memory that the arguments and the environment came in, and put ``title`` in their place.

    Copies that somebody made of them stay. Variables that were there are gone for this process too.
    """
    os.environ.clear()
    with open("/proc/self/stat", "rb") as file:  # noqa: PTH123  # the launcher avoids importing pathlib
        third_and_later = file.read().rpartition(b")")[2].split()
    arguments, arguments_end, environment, environment_end = map(int, third_and_later[_FIRST - 3 :][:4])
    for begin, end in ((arguments, arguments_end), (environment, environment_end)):
        ctypes.memset(begin, 0, end - begin)
    text = os.fsencode(title)
    ctypes.memmove(arguments, text, min(len(text), arguments_end - arguments - 1))
