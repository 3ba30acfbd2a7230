"""The ledger: for this host, each control with its state, the kernel's reason and the remedy."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace

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


MAY_DEGRADE = tuple(key for layer in LAYERS for key in layer.may_degrade)
"""What ``may_degrade`` of host.toml can list.

Of the rest, none has a weaker form: a cage without its network or its own user is no cage.
"""


def missing(may_degrade: frozenset[str] = frozenset(), *, besides: frozenset[str] = frozenset()) -> list[Control]:
    """Mandatory controls without which nothing may start on this host.

    Those whose key is in ``may_degrade`` are done without; layers named in ``besides`` are not asked.
    """
    return [
        _with_key(control)
        for layer in LAYERS
        if layer.name not in besides
        for control in _controls(layer)
        if control.mandatory and control.state == "unavailable" and control.key not in may_degrade
    ]


def not_enforced() -> list[str]:
    """The keys of the controls that are weaker on this host than they should be; recorded with every start."""
    return [control.key for control in ledger() if control.state != "enforced"]


def optional_controllers(may_degrade: Iterable[str]) -> frozenset[str]:
    """The cgroup controllers that this host may lack."""
    return frozenset(key.removeprefix("cgroup.") for key in may_degrade if key.startswith("cgroup."))


def _with_key(control: Control) -> Control:
    """Tell in the remedy how to do without it, where that is possible."""
    if control.key not in MAY_DEGRADE:
        return control
    return replace(control, remedy=f'{control.remedy}; or list "{control.key}" in may_degrade of host.toml')
