"""The open descriptors of the tests' process."""

from __future__ import annotations

import gc
import os


def open_descriptors() -> list[str]:
    """Their numbers, without those that event loops of earlier tests leave to the collector (``linux/apart.py``)."""
    gc.collect()
    return os.listdir("/proc/self/fd")
