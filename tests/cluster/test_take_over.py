"""How soon a plugin is taken over: as its holder's silence is over, and not at the beat after that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from host.cluster.entries import Release
from host.cluster.lease import BEAT, SILENCE, STEADY
from host.cluster.nats import _ANSWER, _of_any_replica
from host.database import store
from tests.cluster.hosts import Cluster

SOON = 0.5
"""Seconds for a decision that nobody waits for, and for reading it."""


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(store.os, "fdatasync", lambda _: None)  # no power is cut here
    made = Cluster(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def _until_held(cluster: Cluster, patience: float) -> float:
    """Seconds until a host of those that are there acts on the plugin."""
    began = cluster.clock.time
    while not any(host.acting() for host in cluster.hosts):
        assert cluster.clock.time - began < patience, "it has not been taken over"
        await cluster.passes(0.05)
    return cluster.clock.time - began


@pytest.mark.parametrize("phase", [0.0, 0.7, 1.3, 1.9])
async def test_plugin_is_claimed_when_the_silence_of_its_holder_is_over(cluster: Cluster, phase: float) -> None:
    holder = await cluster.settled()
    await cluster.passes(phase)
    cluster.hosts.remove(holder)
    await holder.stop()
    assert await _until_held(cluster, 30) <= SILENCE + SOON


async def test_host_that_was_not_steady_claims_as_soon_as_it_is(cluster: Cluster) -> None:
    holder = await cluster.settled()
    cluster.hosts.remove(holder)
    await holder.stop()
    await cluster.passes(SILENCE - 4 * BEAT)
    cluster.servers.quorum_lost = True
    await cluster.passes(4 * BEAT + 0.3)
    cluster.servers.quorum_lost = False
    # A message is sent again after a second, and its answer was awaited for another one.
    assert await _until_held(cluster, 30) <= STEADY + SOON + 2.0


async def test_plugin_that_is_given_up_is_claimed_at_once(cluster: Cluster) -> None:
    holder = await cluster.settled()
    holder.follower.names = ()
    holder.node.changed()
    await cluster.passes(SOON)
    await cluster.during(holder.node.decide(Release("p", 0, holder.node.held["p", 0])))
    assert await _until_held(cluster, 10) <= SOON
    assert cluster.holder() is not holder


class _Replicas:
    """Replicas of which the first ones that are asked say nothing."""

    def __init__(self, silent: int) -> None:
        self.silent, self.asked = silent, 0

    async def request(self, _: str, body: bytes, *, timeout: float) -> Any:
        self.asked += 1
        if self.asked <= self.silent:
            await asyncio.sleep(timeout)
            raise TimeoutError
        return body


@pytest.mark.parametrize("silent", [0, 1, 2])
async def test_another_replica_is_asked_before_one_is_given_up(silent: int) -> None:
    replicas = _Replicas(silent)
    assert await _of_any_replica(replicas, "", b"one") == b"one"
    assert replicas.asked == silent + 1


async def test_no_replica_that_answers_is_known_within_the_time_of_one_answer() -> None:
    replicas = _Replicas(9)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5 * _ANSWER):
            await _of_any_replica(replicas, "", b"one")
    assert replicas.asked == 3
