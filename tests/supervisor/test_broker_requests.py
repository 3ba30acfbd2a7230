"""A broker that was taken over gets sockets of the cages into which something is forwarded, and nothing else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isolator.errors import IsolatorError
from isolator.ipc.body import Message
from isolator.ipc.channel import Channel, pair
from isolator.ipc.messages import AttachCage, DetachCage
from isolator.layers.network import namespace as network_layer
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.policy.model import ListenRule, NetworkPolicy
from isolator.supervisor import broker_link
from isolator.supervisor.broker_link import BrokerLink

NETWORK = cast(network_layer.CageNetwork, SimpleNamespace())


def attached(*runs: tuple[str, NetworkPolicy]) -> BrokerLink:
    link = BrokerLink(cast(Any, None), Paths.of("/nonexistent"), HostConfig())
    for run, policy in runs:
        link._attached[run] = broker_link._Attached("plugin", NETWORK, policy, lambda why: None)
    return link


async def asked(link: BrokerLink, op: str, **fields: Any) -> str:
    mine, theirs = pair()
    supervisor, broker = Channel(mine, link.handlers(), name="broker"), Channel(theirs, name="supervisor")
    try:
        async with asyncio.timeout(30):
            answer = await broker.call(op, **fields)
        answer.close()
        return "done"
    except IsolatorError as error:
        return error.code
    finally:
        supervisor.close()
        broker.close()


OPEN = NetworkPolicy(listen=(ListenRule(port=3000, cage_port=3000),))


async def test_sockets_are_made_for_runs_that_listen_alone_and_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []

    def connectors(network: network_layer.CageNetwork, count: int, *, version: int) -> list[int]:
        made.append((count, version))
        return []

    monkeypatch.setattr(network_layer, "connectors", connectors)
    link = attached(("closed", NetworkPolicy()), ("open", OPEN))
    assert await asked(link, "cage.sockets", run="closed", count=1, version=4) == "not_found"
    assert await asked(link, "cage.sockets", run="another", count=1, version=4) == "not_found"
    assert await asked(link, "cage.sockets", run="../open", count=1, version=4) == "not_found"
    assert not made
    for count in (10**9, -5, 0):
        assert await asked(link, "cage.sockets", run="open", count=count, version=99) == "done"
    assert made == [(broker_link.MAX_CONNECTORS, 4), (1, 4), (1, 4)]


@pytest.mark.parametrize(
    "op", ["plugin.remove", "plugin.stage", "run.connect", "run.stop", "source", "hello", "ledger"]
)
async def test_broker_cannot_ask_for_anything_else(op: str) -> None:
    assert await asked(attached(("open", OPEN)), op, name="plugin", run="open") != "done"


async def test_cage_that_ends_while_a_new_broker_gets_it_is_taken_away_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sockets would stay with the broker, and its network with them, until that is started again."""
    mine, theirs = pair()
    supervisor, broker = Channel(mine, name="broker"), Channel(theirs, name="supervisor")
    seen: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    running, making = asyncio.Event(), threading.Event()
    link = attached(("ending", NetworkPolicy()), ("other", NetworkPolicy()))
    loop = asyncio.get_running_loop()

    def reopen(network: network_layer.CageNetwork) -> list[int]:
        loop.call_soon_threadsafe(running.set)
        assert making.wait(60)
        return []

    async def note(message: Message) -> None:
        seen.put_nowait((message.fields["op"], message.fields["run"]))

    monkeypatch.setattr(network_layer, "reopen", reopen)
    for op in (AttachCage.op, DetachCage.op):
        broker.handle(op, note)
    link.process = cast(Any, SimpleNamespace(present=present(supervisor)))
    try:
        async with asyncio.timeout(60):
            attaching = asyncio.create_task(link.attach_again(supervisor))
            await running.wait()
            await link.detach("ending")  # answered before the broker has it
            making.set()
            await attaching
            found = [await seen.get() for _ in range(4)]
    finally:
        supervisor.close()
        broker.close()
    of_it = [op for op, run in found if run == "ending"]
    assert of_it[-1] == DetachCage.op and ("cage.attach", "other") in found, found


def present(channel: Channel) -> Callable[[], Awaitable[Channel]]:
    async def there() -> Channel:
        return channel

    return there
