"""The ledger: for this host, each control with its state, the kernel's reason and the remedy.

``LAYERS`` is the one list of layers. A control that is no layer's (the size cap of ``/state``) is handed in by whoever
composes the ledger, as a ``Check``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
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


_checked: dict[type[Layer], tuple[Control, ...]] = {}


def check_in_a_copy() -> None:
    """Check every layer in a fork of this process, which has one thread: the libraries for it stay out of this one.

    If that fails, each is checked here when it is asked for.
    """
    told, tells = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException), os.fdopen(tells, "w") as answer:
            json.dump([[vars(control) for control in _controls(layer)] for layer in LAYERS], answer)
        os._exit(0)
    os.close(tells)
    with os.fdopen(told) as answer, contextlib.suppress(ValueError):
        for layer, controls in zip(LAYERS, json.load(answer), strict=True):
            _checked[layer] = tuple(Control(**control) for control in controls)
    os.waitpid(pid, 0)


def _controls(layer: type[Layer]) -> tuple[Control, ...]:
    if layer not in _checked:
        _checked[layer] = tuple(layer.check())
    return _checked[layer]


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
