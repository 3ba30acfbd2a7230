"""Fixtures: one pretend internet per module, one broker and any number of cages per test."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from isolator.linux import netns
from isolator.policy.model import EgressRule, NetworkPolicy
from tests.support.pretend_internet import BrokerProcess, CageNet, PretendInternet, pretend_internet
from tests.support.timeouts import seconds

MakeCage = Callable[..., Awaitable[CageNet]]


def listed(*rules: str, **fields: object) -> NetworkPolicy:
    """A policy that lists ``HOST:PORT[,PORT]`` rules."""
    parsed = []
    for rule in rules:
        host, _, ports = rule.rpartition(":")
        parsed.append(EgressRule(host=host, ports=tuple(map(int, ports.split(",")))))
    return NetworkPolicy.model_validate({"mode": "listed", "egress": tuple(parsed), **fields})


async def assert_watched(network: int, selector: str) -> None:
    """From the broker's next tick on the kernel looks every minute or sooner whether the other end of these connections
    is there (``ss``'s filter)."""
    command = ["ss", "-Htno", "state", "established", selector]

    def found() -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    async with asyncio.timeout(seconds(10)):
        while not re.search(r"keepalive,(1min|[0-9]+sec)", netns.in_network(network, found)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # the kernel tells nobody of it


@pytest.fixture(scope="module")
def pretend() -> Iterator[PretendInternet]:
    with pretend_internet() as made:
        yield made


@pytest.fixture
async def broker(pretend: PretendInternet) -> AsyncIterator[BrokerProcess]:
    started = await BrokerProcess.start(pretend)
    pretend.internet.dns.queries.clear()
    yield started
    await started.stop()


@pytest.fixture
async def cages(broker: BrokerProcess) -> AsyncIterator[MakeCage]:
    made: list[CageNet] = []

    async def make(policy: NetworkPolicy, run: str = "r1") -> CageNet:
        cage = await CageNet.attach(broker, policy, run)
        made.append(cage)
        return cage

    yield make
    for cage in made:
        await cage.detach()
