"""Watch over the network rules of a running cage: somebody who is root on the host may change them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

from isolator.errors import ConfinementError
from isolator.layers.network import namespace as network_layer
from isolator.policy.model import NetworkPolicy


@contextlib.contextmanager
def watched_ruleset(
    drift: socket.socket, network: network_layer.CageNetwork, policy: NetworkPolicy, changed: Callable[[str], None]
) -> Iterator[None]:
    """Call ``changed`` with the difference when a ruleset is not the one that was loaded any more.

    ``drift`` (``network_layer.watch``) stays the caller's.
    """
    loop = asyncio.get_running_loop()

    def compare() -> None:
        with contextlib.suppress(BlockingIOError):
            while drift.recv(65536):
                pass
        try:
            network_layer.confirm(network, policy)
        except ConfinementError as error:
            changed(error.why)

    loop.add_reader(drift, compare)
    try:
        yield
    finally:
        loop.remove_reader(drift)
