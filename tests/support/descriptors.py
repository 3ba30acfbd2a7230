"""The open descriptors of the tests' process."""

from __future__ import annotations

import gc
import os
from collections.abc import Collection


def open_descriptors() -> list[str]:
    """Their numbers, without those that event loops of earlier tests leave to the collector (``linux/apart.py``)."""
    gc.collect()
    return os.listdir("/proc/self/fd")


def opened_since(before: Collection[str]) -> set[str]:
    """Those that were not open before; an earlier test's event loop may have been collected meanwhile."""
    return set(os.listdir("/proc/self/fd")).difference(before)
