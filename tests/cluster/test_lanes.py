"""Deliveries that end while they enter a lane of a host in a cluster, or on the way from it to the plugin."""

from __future__ import annotations

from dataclasses import replace

import pytest

from host.cluster.delivery.places import Local
from host.cluster.entries import Plugin
from host.queue.interface import Delivery, Result, Subscriber
from tests.cluster.queues import Make, SimHost

ONE = Plugin("p", "d")


async def test_delivery_that_moves_as_its_attempt_begins_is_no_longer_in_flight_here(make: Make) -> None:
    hosts = make()
    await hosts.start(replace(ONE, name="q"))
    host = hosts.hosts[0]
    event = await hosts.during(host.emit("k"))
    stored = host.queue._event(event)
    delivery = host.queue.fill(Subscriber("p", "k"), stored, Local("queued", 0, 0, 0.0))
    taken = await host.queue.lane("p").take()
    assert taken is delivery
    host.queue.move([delivery])
    await host.queue.sent([delivery])
    assert host.store is not None
    await host.store.committed()
    assert host.store.row("SELECT state FROM deliveries WHERE plugin='p'") == ("moved",)


@pytest.mark.parametrize("placement", ["one", "all"])
async def test_event_that_its_taker_gives_up_as_it_comes_from_the_log_has_ended(
    make: Make, monkeypatch: pytest.MonkeyPatch, placement: str
) -> None:
    async def give_up_all(host: SimHost, plugin: str) -> None:
        consumer = host.queue.consumer(plugin)

        def give_up(delivery: Delivery) -> bool:
            consumer.term(delivery, Result("dead", detail="the plugin no longer receives this event"))
            return True

        while True:
            give_up(await consumer.take(send_now=give_up))

    monkeypatch.setattr(SimHost, "_work", give_up_all)
    hosts = make()
    await hosts.start(replace(ONE, placement=placement))
    await hosts.until(lambda: hosts.holder("p") or (placement == "all" and hosts.hosts[2].node.is_member))
    for number in range(4):
        await hosts.emit(hosts.hosts[number % 3], "k")
    await hosts.passes(10.0)
    for host in hosts.hosts:
        assert [row.state for event in hosts.accepted for row in host.show(event).deliveries] == ["dead"] * 4
        assert not any(one.open for one in (*host.follower._held.values(), *host.follower._own.values()))
