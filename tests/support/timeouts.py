"""How much longer than usual this machine may take: for the deadlines of tests, never for what they measure.

A deadline says "by now it must have happened, or it never will". Under software emulation (``./dev vm``) everything
takes ten times as long, so every deadline goes through ``seconds``.
"""

from __future__ import annotations

import os
from pathlib import Path

# What QEMU calls its processors "max" and "qemu64"; nobody gives the latter to a machine that has a real one.
EMULATED = any(name in Path("/proc/cpuinfo").read_text() for name in ("QEMU TCG", "QEMU Virtual CPU"))

FACTOR = float(os.environ.get("ISOLATOR_TEST_PATIENCE") or (10 if EMULATED else 1))


def seconds(usual: float) -> float:
    """The deadline to use here for what takes at most ``usual`` seconds on an ordinary machine."""
    return usual * FACTOR
