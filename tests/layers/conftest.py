"""A cage's network by itself, and what it lets through."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator

import pytest

from isolator.layers.network import namespace as network
from isolator.linux import netns
from isolator.policy.model import NetworkPolicy
from tests.broker.conftest import listed

PUBLIC = NetworkPolicy(mode="public")
LISTED = listed("hooks.example.com:443", "9.9.9.0/24:8080", "2620:fe::/48:8080")

Make = Callable[[NetworkPolicy], network.CageNetwork]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[network.CageNetwork] = []

    def prepare(policy: NetworkPolicy) -> network.CageNetwork:
        made.append(network.prepare(policy))
        return made[-1]

    yield prepare
    for item in made:
        network.release(item)


def connect(cage: network.CageNetwork, address: str, port: int) -> str:
    """Try to connect inside the cage: ``ok`` or the error's name."""

    def attempt() -> str:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
            sock.settimeout(2)
            try:
                sock.connect((address, port))
            except OSError as error:
                return errno.errorcode.get(error.errno or 0, type(error).__name__)
            return "ok"

    return netns.in_network(cage.netns_fd, attempt)
