"""The slice of a process, as the kernel tells it: how long it computes before others may have a turn (sched(7))."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest


def slice_of(pid: int) -> int:
    """Nanoseconds; skips the test on a kernel that does not tell, or has one slice for all (before 6.12)."""
    version = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    path = Path(f"/proc/{pid}/sched")
    found = re.search(r"^se.slice +: +(\d+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    if found is None or version < (6, 12):
        pytest.skip("this kernel does not tell the slice of a process")
    return int(found[1])
