"""Events of any host reach the plugin where it is held, once and in order, wherever it moves."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest

from host.cluster import placing
from host.cluster.delivery import cursor, follower
from host.cluster.delivery.queue import ClusterQueue
from host.cluster.entries import Plugin
from host.cluster.fold import State
from host.queue.interface import FINAL
from isolator.errors import IsolatorError, UsageError
from tests.cluster.queues import MOST_AT_ONCE, Hosts, Make, SimHost

ONE = Plugin("p", "d")


async def _holder(hosts: Hosts, plugin: str = "p") -> SimHost:
    await hosts.until(lambda: hosts.holder(plugin))
    holder = hosts.holder(plugin)
    assert holder is not None
    return holder


def _another(hosts: Hosts, holder: SimHost) -> SimHost:
    return next(host for host in hosts.hosts if host is not holder)


def _states(host: SimHost, event: str) -> dict[str, str]:
    return {row.plugin: row.state for row in host.show(event).deliveries}


async def test_events_of_all_hosts_are_delivered_where_the_plugin_is_held(make: Make) -> None:
    hosts = make()
    await hosts.start(ONE)
    holder = await _holder(hosts)
    for number in range(30):
        await hosts.emit(hosts.hosts[number % 3], f"k{number % 4}")
    await hosts.until(lambda: hosts.all_handled("p"))
    assert {act.host for act in hosts.witness.handled} == {holder.name}
    assert hosts.witness.repeated("p") == 0
    hosts.witness.check_order()


async def test_killed_holder_has_its_events_delivered_by_another(make: Make) -> None:
    hosts = make()
    await hosts.start(ONE)
    first = await _holder(hosts)
    for number in range(12):
        await hosts.emit(hosts.hosts[number % 3], "k")
    await hosts.until(lambda: hosts.witness.begun)
    await first.end()
    await hosts.until(lambda: any(host.is_up and host.node.held for host in hosts.hosts))
    await first.start()
    await hosts.until(lambda: hosts.all_handled("p"))
    hosts.witness.check_order()
    second = await _holder(hosts)
    assert second is not first
    await hosts.until(lambda: all(_states(first, event)["p"] in FINAL for event in hosts.accepted))
    pending = "SELECT count(*) FROM deliveries WHERE state IN ('queued', 'retry', 'in_flight')"
    assert first.store is not None
    assert first.store.read(lambda db: db.execute(pending).fetchone()) == (0,)


async def _handled_twice_over_a_restart(hosts: Hosts) -> int:
    """Restart the holder when all is handled and the log does not know of it."""
    await hosts.start(ONE)
    holder = await _holder(hosts)
    other = _another(hosts, holder)
    for _ in range(20):
        await hosts.emit(other, None)
    await hosts.until(lambda: hosts.witness.handled)
    holder.faults.lost = 1.0
    await hosts.until(lambda: hosts.all_handled("p"))
    await hosts.passes(0.01)
    await holder.end()
    holder.faults.lost = 0.0
    await holder.start()
    await hosts.until(lambda: hosts.holder("p") is holder)
    await hosts.emit(other, None)
    await hosts.until(lambda: hosts.all_handled("p"))
    return hosts.witness.repeated("p")


async def test_host_that_is_started_again_repeats_nothing_that_has_ended(make: Make) -> None:
    assert await _handled_twice_over_a_restart(make()) == 0


async def test_what_has_ended_is_repeated_if_its_host_does_not_know_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("host.cluster.delivery.places.Places.local", lambda *_: {})
    assert await _handled_twice_over_a_restart(make()) > 0


@pytest.mark.parametrize(("bound", "most"), [(8, 8 + MOST_AT_ONCE), (1000, 60)])
async def test_lane_pauses_before_a_move_would_repeat_too_many(
    make: Make, monkeypatch: pytest.MonkeyPatch, bound: int, most: int
) -> None:
    monkeypatch.setattr(follower, "MOST_ENDED", bound)
    hosts = make()
    await hosts.start(ONE)
    holder = await _holder(hosts)
    holder.faults.lost = 1.0
    for _ in range(60):
        await hosts.emit(_another(hosts, holder), None)
    before = hosts.clock.time
    await hosts.until(lambda: len(hosts.witness.handled) >= min(most, bound))
    await hosts.passes(max(0.0, before + 9 - hosts.clock.time))
    assert holder.node.may_act("p"), "what holds it back is the bound, not the deadline"
    assert bound <= len(hosts.witness.handled) <= most or most == len(hosts.witness.handled)
    await hosts.heal()
    await hosts.until(lambda: hosts.all_handled("p"))


async def _left_after_a_loss(hosts: Hosts) -> int:
    """How many deliveries the lane of a host has that was cut off while another took its plugin over."""
    await hosts.start(ONE)
    first = await _holder(hosts)
    hosts.failing = 1.0
    for number in range(8):
        await hosts.emit(first, f"k{number}")
    await hosts.until(lambda: len(hosts.witness.begun) > 4)
    first.cut_until(1e9)
    second = _another(hosts, first)
    await hosts.until(lambda: second.node.held)
    hosts.failing = 0.0
    await hosts.heal()
    await hosts.until(lambda: not first.node.held)
    return first.queue.consumer("p").depth


async def test_host_that_has_lost_a_plugin_has_nothing_to_deliver_to_it(make: Make) -> None:
    hosts = make(hosts=2)
    assert await _left_after_a_loss(hosts) == 0
    await hosts.until(lambda: hosts.all_handled("p"))
    first, second = hosts.hosts if hosts.holder("p") is hosts.hosts[1] else hosts.hosts[::-1]
    await second.end()
    await hosts.until(lambda: first.node.held)
    await hosts.passes(5.0)
    assert hosts.witness.repeated("p") == 0


async def test_deliveries_stay_in_the_lane_of_a_host_that_does_not_move_them(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClusterQueue, "move", lambda *_: None)
    assert await _left_after_a_loss(make(hosts=2)) > 0


async def test_cursor_reads_no_further_while_too_many_are_open(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursor, "MOST_OPEN", 10)
    hosts = make()
    await hosts.start(ONE)
    holder = await _holder(hosts)
    most = 0

    def look() -> bool:
        nonlocal most
        most = max(most, holder.queue.consumer("p").depth)
        return hosts.all_handled("p")

    for number in range(60):
        await hosts.emit(hosts.hosts[number % 3], f"k{number % 2}")
    await hosts.until(look)
    assert most == 10
    hosts.witness.check_order()


async def test_dead_letter_is_on_every_host_and_any_host_has_it_repeated(make: Make) -> None:
    hosts = make()
    hosts.rejecting = 1.0
    await hosts.start(ONE)
    holder = await _holder(hosts)
    await hosts.emit(holder, "k")
    event = hosts.accepted[0]
    await hosts.until(lambda: all(_is_dead(host, event) for host in hosts.hosts))
    other = _another(hosts, holder)
    hosts.rejecting = 0.0
    handled = len(hosts.witness.handled)
    assert await other.queue.replay(event) == ["p"]
    await hosts.until(lambda: len(hosts.witness.handled) > handled)
    assert hosts.witness.handled[-1].host == holder.name
    await hosts.until(lambda: all(_states(host, event) == {"p": "ok"} for host in hosts.hosts))


def _is_dead(host: SimHost, event: str) -> bool:
    try:
        return _states(host, event) == {"p": "dead"}
    except IsolatorError:
        return False


async def test_only_events_from_before_a_plugin_are_missed_whoever_delivered_the_others(make: Make) -> None:
    hosts = make()
    await hosts.start()
    before = await hosts.during(hosts.hosts[0].emit("k"))
    await hosts.passes(2.0)
    hosts.plugins["p"] = ONE
    for host in hosts.hosts:
        host.serve(ONE)
    await hosts.during(hosts.hosts[0].decide(ONE))
    holder = await _holder(hosts)
    await hosts.emit(_another(hosts, holder), "k")
    await hosts.until(lambda: hosts.all_handled("p"))
    for host in hosts.hosts:
        assert _has_missed(host, before) and not _has_missed(host, hosts.accepted[0])


def _has_missed(host: SimHost, event: str) -> bool:
    def query(db: sqlite3.Connection) -> bool:
        (seq,) = db.execute("SELECT seq FROM events WHERE id=?", (event,)).fetchone()
        return host.queue.has_missed(db, "p", seq)

    assert host.store is not None
    return host.store.read(query)


async def test_holder_whose_database_is_put_back_delivers_what_it_accepts_before_it_knows(make: Make) -> None:
    hosts = make(hosts=1)
    await hosts.start(ONE)
    host = await _holder(hosts)
    await hosts.emit(host, "k")
    await hosts.until(lambda: hosts.all_handled("p"))
    await hosts.passes(3.0)
    await host.end()
    copy = host.path.with_suffix(".copy")
    copy.write_bytes(host.path.read_bytes())
    await host.start()
    for _ in range(3):
        await hosts.emit(host, "k")
    await hosts.until(lambda: hosts.all_handled("p"))
    await hosts.passes(3.0)
    await host.end()
    for end in ("-wal", "-shm"):
        host.path.with_name(host.path.name + end).unlink(missing_ok=True)
    host.path.write_bytes(copy.read_bytes())
    host.cut_until(1e9)
    await host.start()
    for _ in range(2):  # under numbers that the log has for other events
        await hosts.emit(host, "k")
    host.cut_until(0.0)
    await hosts.until(lambda: hosts.all_handled("p"))


async def test_event_emitted_twice_with_one_key_is_one_event_of_all_hosts(make: Make) -> None:
    hosts = make()
    await hosts.start(ONE)
    await _holder(hosts)
    for host in hosts.hosts:
        await hosts.emit(host, "k", dedupe_key="once")
    await hosts.emit(hosts.hosts[0], "k", dedupe_key="twice")
    assert len(set(hosts.accepted)) == 2
    await hosts.until(lambda: hosts.all_handled("p"))
    await hosts.passes(3.0)
    assert len(hosts.witness.handled) == 2
    assert [_states(host, hosts.accepted[0]) for host in hosts.hosts] == [{"p": "ok"}] * 3


async def test_plugin_of_all_hosts_gets_each_event_on_each_host(make: Make) -> None:
    hosts = make()
    await hosts.start(Plugin("p", "d", placement="all"))
    for number in range(9):
        await hosts.emit(hosts.hosts[number % 3], "k")
    await hosts.until(lambda: len(hosts.witness.handled) == 27)
    await hosts.hosts[0].end()
    await hosts.emit(hosts.hosts[1], "k")
    await hosts.passes(2.0)
    await hosts.hosts[0].start()
    await hosts.until(lambda: len(hosts.witness.handled) == 30)
    await hosts.passes(5.0)
    assert len({(act.host, act.event) for act in hosts.witness.handled}) == 30 == len(hosts.witness.handled)


async def test_plugin_of_all_hosts_gets_the_events_of_a_host_that_is_cut_off_at_once(make: Make) -> None:
    hosts = make()
    await hosts.start(Plugin("p", "d", placement="all"))
    cut = hosts.hosts[0]
    cut.cut_until(1e9)
    await hosts.passes(15.0)
    await hosts.emit(cut, "k")
    await hosts.passes(2.0)
    assert [act.host for act in hosts.witness.handled] == [cut.name]
    await hosts.heal()
    await hosts.until(lambda: len(hosts.witness.handled) == 3)
    await hosts.passes(5.0)
    assert len(hosts.witness.handled) == 3


async def test_events_wait_on_a_host_that_is_cut_off_and_are_not_lost(make: Make) -> None:
    hosts = make()
    await hosts.start(ONE)
    holder = await _holder(hosts)
    other = _another(hosts, holder)
    other.cut_until(1e9)
    await hosts.emit(other, "k")
    assert _states(other, hosts.accepted[0]) == {"p": "queued"}
    await other.end()
    await other.start()
    await hosts.passes(30.0)
    assert not hosts.witness.handled
    await hosts.heal()
    await hosts.until(lambda: hosts.all_handled("p"))


async def test_one_waits_for_an_event_that_another_host_delivers(make: Make) -> None:
    hosts = make()
    await hosts.start(ONE)
    holder = await _holder(hosts)
    other = _another(hosts, holder)
    await hosts.emit(other, "k")
    row = await hosts.during(other.queue.wait(hosts.accepted[0], timeout=60))
    (delivery,) = row.deliveries
    assert (delivery.state, delivery.detail) == ("ok", f"on {holder.name}")
    assert hosts.all_handled("p")


async def test_shards_are_held_apart_and_each_key_stays_in_order(make: Make) -> None:
    hosts = make()
    await hosts.start(Plugin("p", "d", shards=8))
    await hosts.until(lambda: all(hosts.holder("p", shard) for shard in range(8)))
    for number in range(40):
        await hosts.emit(hosts.hosts[number % 3], f"k{number % 10}")
    await hosts.until(lambda: hosts.all_handled("p"))
    assert len({act.host for act in hosts.witness.handled}) > 1
    assert hosts.witness.repeated("p") == 0
    hosts.witness.check_order()


async def test_newer_version_is_delivered_to_where_a_host_has_it(make: Make) -> None:
    hosts = make()
    await hosts.start(ONE)
    holder = await _holder(hosts)
    other = _another(hosts, holder)
    for _ in range(20):
        await hosts.emit(holder, "k")
    newer = Plugin("p", "d2")
    other.serve(newer)
    await hosts.during(other.decide(newer))
    for host in hosts.hosts:
        if host is not other:
            host.forget("p")
    await hosts.until(lambda: hosts.holder("p") is other)
    await hosts.emit(holder, "k")
    await hosts.until(lambda: hosts.all_handled("p"))
    assert hosts.witness.handled[-1].host == other.name
    assert hosts.witness.repeated("p") == 0
    hosts.witness.check_order()


async def test_what_waits_for_a_plugin_of_one_host_is_delivered_when_the_cluster_has_it(make: Make) -> None:
    hosts = make()
    await hosts.start()
    host = hosts.hosts[0]
    host.serve(ONE)
    hosts.plugins["p"] = ONE
    host.cut_until(1e9)
    for _ in range(6):
        await hosts.emit(host, "k")
    await host.end()  # before a delivery has ended
    host.plugins.clear()
    await host.start()
    host.plugins["p"] = ONE
    host.follower.serve("p")
    host.cut_until(0.0)
    await hosts.passes(1.0)
    await hosts.during(host.decide(ONE))
    host._work_for("p")
    await hosts.until(lambda: hosts.all_handled("p"))


async def test_nothing_of_before_a_removal_reaches_the_plugin_that_takes_its_name(make: Make) -> None:
    hosts = make()
    await hosts.start(ONE)
    holder = await _holder(hosts)
    hosts.failing = 1.0
    await hosts.emit(holder, "k")
    await hosts.passes(1.0)
    await hosts.during(holder.decide(Plugin("p", "d", removed=True), ONE))
    hosts.failing, before = 0.0, hosts.accepted.pop()
    await hosts.emit(holder, "k")
    await hosts.until(lambda: hosts.all_handled("p"))
    await hosts.passes(5.0)
    assert before not in {act.event for act in hosts.witness.handled}


async def test_log_that_loses_its_newest_events_gets_them_again(make: Make) -> None:
    hosts = make()
    await hosts.start(ONE)
    await _holder(hosts)
    for number in range(6):
        await hosts.emit(hosts.hosts[number % 3], "k")
    await hosts.passes(0.3)
    hosts.servers.lose_tail(8)
    for number in range(6):
        await hosts.emit(hosts.hosts[number % 3], "k")
    await hosts.until(lambda: hosts.all_handled("p"))


async def test_full_outbox_refuses_events_and_keeps_those_that_it_has(make: Make) -> None:
    hosts = make()
    hosts.outbox = 2000
    await hosts.start(ONE)
    await _holder(hosts)
    host = hosts.hosts[0]
    host.cut_until(1e9)
    with pytest.raises(IsolatorError, match="is full"):
        for _ in range(50):
            await hosts.emit(host, "k")
    kept: Any = len(hosts.accepted)
    assert 0 < kept < 50
    await hosts.heal()
    await hosts.until(lambda: hosts.all_handled("p"))
    assert len({act.event for act in hosts.witness.handled}) == kept


async def test_host_that_began_with_a_copied_fold_holds_no_plugin_whose_events_it_does_not_have(make: Make) -> None:
    hosts = make()
    hosts.failing = 1.0
    await hosts.start(ONE)
    holder = await _holder(hosts)
    for host in hosts.hosts:
        await hosts.emit(host, "k")
    await hosts.passes(3.0)
    other = _another(hosts, holder)
    assert other.store is not None
    assert "p" in other.follower.ready()
    adopt, before = other.follower.adopted, State()
    await other.store.run(lambda db: (adopt(db, before), db.execute("DELETE FROM cluster_events")))
    assert "p" not in other.follower.ready()
    hosts.failing = 0.0
    await hosts.until(lambda: hosts.all_handled("p"))
    await hosts.until(lambda: "p" in other.follower.ready())


async def test_operator_places_a_plugin_and_is_asked_before_events_are_dropped(make: Make) -> None:
    hosts = make()
    await hosts.start(ONE)
    holder = await _holder(hosts)

    async def place(**wanted: Any) -> Plugin:
        return await hosts.during(placing.place(holder.node, "p", **wanted))

    assert (await place(labels=["eu", "big"])).labels == ("big", "eu")
    with pytest.raises(UsageError, match="begins anew"):
        await place(placement="all")
    with pytest.raises(UsageError, match="not a label"):
        await place(labels=["No"])
    with pytest.raises(UsageError, match="no shards"):
        await place(placement="all", shards=2, anew=True)
    with pytest.raises(UsageError, match="none of the cluster"):
        await hosts.during(placing.place(holder.node, "q"))
    placed = await place(placement="all", labels=[], anew=True)
    given = await hosts.during(placing.place(holder.node, "r", shards=2, here="d7"))
    assert given == Plugin("r", "d7", shards=2) == holder.node.state.plugins["r"].plugin
    assert placed == Plugin("p", "d", placement="all") == holder.node.state.plugins["p"].plugin
    hosts.plugins["p"] = placed
    await hosts.emit(holder, "k")
    await hosts.until(lambda: len(hosts.witness.handled) == 3)
