"""The ledger: for this host, each control with its state, the kernel's reason and the remedy.

``LAYERS`` is the one list of layers. A control that is no layer's (the size cap of ``/state``) is handed in by whoever
composes the ledger, as a ``Check``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from isolator.base.structs import replace
from isolator.layers.base import Control, Layer
from isolator.layers.capabilities import Capabilities
from isolator.layers.cgroup.layer import Cgroup
from isolator.layers.filesystem import Filesystem
from isolator.layers.landlock import Landlock
from isolator.layers.namespaces import Namespaces
from isolator.layers.network.layer import Network
from isolator.layers.no_new_privs import NoNewPrivs
from isolator.layers.proc.layer import Proc
from isolator.layers.rlimits import Rlimits
from isolator.layers.seccomp.layer import Seccomp
from isolator.layers.user import User

Check = Callable[[], Control]

LAYERS: tuple[type[Layer], ...] = (
    User, Cgroup, Rlimits, Namespaces, Filesystem, Proc, Network, Capabilities, NoNewPrivs, Landlock, Seccomp,
)  # fmt: skip
"""Every layer, in the order in which a reader of the ledger meets them."""


EVERY_LAYER = frozenset(layer.name for layer in LAYERS)


@functools.cache
def _controls(layer: type[Layer]) -> tuple[Control, ...]:
    return tuple(layer.check())


@functools.cache
def ledger(*further: Check) -> tuple[Control, ...]:
    """Every control of every layer and of ``further``, checked once a process: the kernel does not change under it."""
    return (*(control for layer in LAYERS for control in _controls(layer)), *(check() for check in further))


def missing(may_degrade: frozenset[str] = frozenset(), *, besides: frozenset[str] = frozenset()) -> list[Control]:
    """Mandatory controls without which nothing may start on this host.

    Those whose key is in ``may_degrade`` are left out, and so are the layers named in ``besides``.
    """
    return [
        _with_key(control)
        for layer in LAYERS
        if layer.name not in besides
        for control in _controls(layer)
        if control.mandatory and control.state == "unavailable" and control.key not in may_degrade
    ]


def not_enforced(controls: Iterable[Control]) -> list[str]:
    """The keys of the controls that are weaker on this host than they should be; recorded with every start."""
    return [control.key for control in controls if control.state != "enforced"]


def optional_controllers(may_degrade: Iterable[str]) -> frozenset[str]:
    """The cgroup controllers that this host may lack."""
    return frozenset(key.removeprefix("cgroup.") for key in may_degrade if key.startswith("cgroup."))


def _with_key(control: Control) -> Control:
    """Add to the remedy how to do without the control, where that is possible."""
    from isolator.policy.host import MAY_DEGRADE

    if control.key not in MAY_DEGRADE:
        return control
    return replace(control, remedy=f'{control.remedy}; or list "{control.key}" in may_degrade of host.toml')
