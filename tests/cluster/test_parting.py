"""A host that stops in order gives its plugins to others at once; one that has left is listed no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from host.cluster.node import STOP
from host.cluster.standing import standing
from host.database import store
from tests.cluster.hosts import Cluster, Host


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(store.os, "fdatasync", lambda _: None)  # no power is cut here
    made = Cluster(tmp_path)
    await made.start()
    yield made
    await made.stop()


def _as_seen_by(host: Host) -> dict[str, dict[str, Any]]:
    """The hosts in its list, by name."""
    return {one["name"]: one for one in standing(host.node, host.clock.now())["hosts"]}


async def test_host_that_stops_gives_its_plugin_to_another_once_it_is_drained(cluster: Cluster) -> None:
    holder = await cluster.settled()
    other = next(host for host in cluster.hosts if host is not holder)
    assert not _as_seen_by(other)[holder.name]["stopped"]
    began = cluster.clock.time
    await cluster.during(holder.node.stop())
    assert holder.follower.drained == [("p", 0)]
    await cluster.passes(0.5)
    assert cluster.holder() is not holder and cluster.clock.time - began < 2.0
    seen = _as_seen_by(other)[holder.name]
    assert seen["stopped"] and not seen["alive"]
    await holder.stop()
    moves = cluster.moves
    await holder.start()
    await cluster.passes(5.0)
    seen = _as_seen_by(other)[holder.name]
    assert seen["alive"] and not seen["stopped"] and cluster.moves == moves


async def test_host_that_stops_keeps_what_no_other_could_hold(cluster: Cluster) -> None:
    holder = await cluster.settled()
    for host in cluster.hosts:
        if host is not holder:
            host.follower.names = ()
            host.node.changed()
    await cluster.passes(1.0)
    held = holder.node.held
    await cluster.during(holder.node.stop())
    await holder.stop()
    await holder.start()
    await cluster.passes(3.0)
    assert holder.node.held == held and cluster.holder() is holder


async def test_host_that_stops_without_an_answer_of_the_log_does_not_wait_for_long(cluster: Cluster) -> None:
    holder = await cluster.settled()
    cluster.servers.quorum_lost = True
    began = cluster.clock.time
    await cluster.during(holder.node.stop())
    assert cluster.clock.time - began <= STOP + 1.0
    await holder.stop()
    cluster.servers.quorum_lost = False
    await holder.start()
    await cluster.passes(20.0)
    assert cluster.holder() is holder


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("hosts", [1, 3])
async def test_host_that_stops_waits_for_its_events_and_counts_what_is_left(
    tmp_path: Path, hosts: int, answers: bool
) -> None:
    cluster = Cluster(tmp_path / "more", hosts=hosts)
    cluster.folder.mkdir()
    await cluster.start()
    await cluster.passes(5.0)
    cluster.servers.quorum_lost = True
    host = cluster.hosts[0]
    for number in range(3):
        await host.emit(f"e{number}")
    stopping = asyncio.create_task(host.node.stop())
    await cluster.passes(2.0)
    assert not stopping.done()
    cluster.servers.quorum_lost = not answers
    left = await cluster.during(asyncio.wait_for(stopping, None))
    assert left == host.node.waiting()[0] == (0 if answers else 3)
    await cluster.stop()


@pytest.mark.parametrize("holds", [True, False])
async def test_host_that_has_left_is_in_no_list_until_it_writes_again(cluster: Cluster, holds: bool) -> None:
    holder = await cluster.settled()
    leaver = next(host for host in cluster.hosts if (host is holder) == holds)
    other = next(host for host in cluster.hosts if host is not leaver)
    await cluster.during(leaver.node.leave())
    await cluster.passes(1.0)
    assert leaver.name not in _as_seen_by(other) and len(_as_seen_by(other)) == 2
    await leaver.stop()
    await leaver.start()
    await cluster.passes(3.0)
    assert _as_seen_by(other)[leaver.name]["alive"]
