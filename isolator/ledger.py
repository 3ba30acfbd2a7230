"""The ledger: for this host, each control with its state, the kernel's reason and the remedy."""

from __future__ import annotations

import functools

from isolator.layers.base import Control
from isolator.sandbox import LAYERS


@functools.cache
def ledger() -> tuple[Control, ...]:
    """Every control of every layer, checked once a process: the kernel does not change under it."""
    from isolator import state

    controls = [control for layer in LAYERS for control in layer.check()]
    return (*controls, state.check())


def missing(may_degrade: frozenset[str] = frozenset()) -> list[Control]:
    """Mandatory controls without which nothing may start on this host."""
    return [
        control
        for control in ledger()
        if control.mandatory and control.state == "unavailable" and control.layer not in may_degrade
    ]
