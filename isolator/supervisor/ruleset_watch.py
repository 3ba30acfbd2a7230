"""Watch over the network rules of a running cage: somebody who is root on the host may change them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from isolator.errors import ConfinementError
from isolator.layers.network import namespace as network_layer
from isolator.linux.shortage import is_shortage
from isolator.policy.model import NetworkPolicy

_AGAIN = 0.2
"""Seconds until rules are read again that could not be, as no descriptor was free: what was heard is not told twice."""


@contextlib.contextmanager
def watched_ruleset(
    network: network_layer.CageNetwork, policy: NetworkPolicy, changed: Callable[[str], None]
) -> Iterator[None]:
    """Call ``changed`` with the difference when a ruleset is not the one that was loaded any more."""
    loop = asyncio.get_running_loop()
    again: asyncio.TimerHandle | None = None

    def compare() -> None:
        nonlocal again
        if again is not None:
            again.cancel()
        try:
            network_layer.confirm(network, policy)
        except ConfinementError as error:
            if is_shortage(error):
                again = loop.call_later(_AGAIN, compare)
            else:
                changed(error.why)

    descriptor = network_layer.watch(network)
    network_layer.settle(network)
    loop.add_reader(descriptor, compare)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        if again is not None:
            again.cancel()
