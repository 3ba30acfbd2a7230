"""The ledger: for this host, each control with its state, the kernel's reason and the remedy."""

from __future__ import annotations

import functools

from isolator.layers.base import Control, Layer
from isolator.sandbox import LAYERS


@functools.cache
def _controls(layer: type[Layer]) -> tuple[Control, ...]:
    return tuple(layer.check())


@functools.cache
def ledger() -> tuple[Control, ...]:
    """Every control of every layer, checked once a process: the kernel does not change under it."""
    from isolator import state

    return (*(control for layer in LAYERS for control in _controls(layer)), state.check())


def missing(may_degrade: frozenset[str] = frozenset(), *, besides: frozenset[str] = frozenset()) -> list[Control]:
    """Mandatory controls without which nothing may start on this host; layers named in ``besides`` are not asked."""
    return [
        control
        for layer in LAYERS
        if layer.name not in besides
        for control in _controls(layer)
        if control.mandatory and control.state == "unavailable" and control.layer not in may_degrade
    ]
