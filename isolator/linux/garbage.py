"""The garbage collector of a process that lasts."""

from __future__ import annotations

import gc


def spare_the_collector() -> None:
    """Keep it from walking the objects of the start-up over and over, and from looking after every few requests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
