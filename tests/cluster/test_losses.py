"""An event that was trimmed off the log before a plugin got it is never passed over in silence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from host.cluster import placing, snapshots
from host.cluster.delivery.follower import QueueFollower
from host.cluster.delivery.unread import MOST, UNREAD, Range, _between, bounded, ranges, rest
from host.cluster.entries import MAX_NUMBER, EventRef, Number, Plugin
from host.cluster.fold import Member, State
from tests.cluster.queues import Hosts, Make, SimHost

ONE = Plugin("p", "sha256:1", hooks=("deploy.completed",))
ALL = Plugin("p", "sha256:1", placement="all")


@pytest.fixture(autouse=True)
def with_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have hosts make copies of their fold often."""
    monkeypatch.setattr(snapshots, "LEAST", 3)


async def _emit(hosts: Hosts, host: SimHost, count: int) -> list[str]:
    before = len(hosts.accepted)
    for number in range(count):
        await hosts.emit(host, f"k{number % 3}")
        await hosts.passes(0.5)
    return hosts.accepted[before:]


async def _started(make: Make, plugin: Plugin, on: Sequence[int]) -> Hosts:
    hosts = make()
    await hosts.start()
    hosts.plugins["p"] = plugin
    for number in on:
        hosts.hosts[number].serve(plugin)
    await hosts.during(hosts.hosts[0].decide(plugin))
    return hosts


def _numbers(hosts: Hosts, host: SimHost) -> list[tuple[str, str, int, int]]:
    """What a host says that its plugins have lost: plugin, sender, first and last."""
    for one in host.losses:
        assert one.range.series == host.node.state.member(one.range.host).events.series
        assert one.why == UNREAD
    return [(one.plugin, one.range.host, one.range.first, one.range.last) for one in host.losses]


async def test_holder_that_was_away_too_long_says_which_events_its_plugin_has_lost(make: Make) -> None:
    hosts = await _started(make, ONE, [0])
    first, second, third = hosts.hosts
    await hosts.until(lambda: hosts.holder("p") is first)
    handled = await _emit(hosts, second, 4)
    await hosts.until(lambda: hosts.all_handled("p"))
    await hosts.passes(3.0)
    await first.end()
    lost = await _emit(hosts, second, 3) + await _emit(hosts, third, 2)
    await hosts.trim(second)
    later = await _emit(hosts, second, 3)
    await first.start()
    hosts.accepted[:] = handled + later
    await hosts.until(lambda: hosts.all_handled("p"))
    await hosts.passes(3.0)
    assert _numbers(hosts, first) == [("p", "h1", 5, 7), ("p", "h2", 1, 2)]
    assert not {*lost} & {act.event for act in hosts.witness.handled}
    for event, known in [*((one, "dead") for one in lost), (later[0], "ok")]:
        for host in (second, third):  # one has the plugin by now, and one has not
            host.plugins.update({"p": ONE} if host is third else {})
            row = await hosts.during(host.queue.complete(host.show(event)))
            assert [one.state for one in row.deliveries] == [known]
            assert known == "ok" or str(row.deliveries[0].detail).startswith("lost: ")
    assert hosts.witness.repeated("p") == 0
    first.losses.clear()
    await first.end()
    await first.start()
    await hosts.passes(5.0)
    assert first.losses == [], "it is told once"


async def test_open_events_that_were_read_before_are_no_loss(make: Make) -> None:
    hosts = await _started(make, ONE, [0])
    first, second, _ = hosts.hosts
    await hosts.until(lambda: hosts.holder("p") is first)
    hosts.failing = 1.0
    await _emit(hosts, second, 4)
    await hosts.passes(3.0)
    await first.end()
    hosts.failing = 0.0
    await hosts.trim(second)
    await first.start()
    await hosts.until(lambda: hosts.all_handled("p"))
    assert first.losses == []


async def test_own_copy_of_a_plugin_says_which_events_it_never_got(make: Make) -> None:
    hosts = await _started(make, ALL, [0, 1])
    first, second, _ = hosts.hosts
    await hosts.passes(3.0)
    before = await _emit(hosts, second, 2)
    await hosts.until(lambda: len(hosts.witness.handled) == 4)
    await first.end()
    await _emit(hosts, second, 4)
    await hosts.trim(second)
    later = await _emit(hosts, second, 2)
    await first.start()
    await hosts.until(lambda: {act.event for act in hosts.witness.handled if act.host == "h0"} >= {*before, *later})
    await hosts.passes(3.0)
    assert _numbers(hosts, first) == [("p", "h1", 3, 6)] and second.losses == []


async def test_loss_that_was_not_told_before_a_kill_is_told_afterwards(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = await _started(make, ALL, [0, 1])
    first, second, _ = hosts.hosts
    await hosts.passes(3.0)
    await first.end()
    await _emit(hosts, second, 2)
    await hosts.trim(second)
    with monkeypatch.context() as patch:
        patch.setattr(QueueFollower, "tell", lambda _: None)
        await first.start()
        await hosts.passes(3.0)
        await first.end()
    assert first.losses == []
    await first.start()
    await hosts.passes(3.0)
    assert _numbers(hosts, first) == [("p", "h1", 1, 2)]


async def _lacking(make: Make) -> tuple[Hosts, SimHost, SimHost]:
    """The plugin's host is gone, another has read what waits, and one that has not has the plugin."""
    hosts = await _started(make, ONE, [0])
    first, second, third = hosts.hosts
    await hosts.until(lambda: hosts.holder("p") is first)
    await third.end()
    await first.end()
    await _emit(hosts, second, 4)
    await hosts.trim(second)
    await third.start()
    third.serve(ONE)
    await hosts.until(lambda: third.node.unheld and second.node.unheld)
    return hosts, second, third


async def test_host_that_lacks_what_waits_does_not_take_the_plugin_and_all_say_so(make: Make) -> None:
    hosts, second, third = await _lacking(make)
    for host in (second, third):
        line = host.problems["unheld"]
        assert "nobody holds plugin p" in line and "h2 has it, and not the events, which the log has no more" in line
        assert "isolator plugin add it on a host that has read them" in line
        assert "isolator cluster place p --anew without them" in line
    assert hosts.holder("p") is None and third.losses == []
    second.serve(ONE)
    await hosts.until(lambda: hosts.all_handled("p"))
    assert {act.host for act in hosts.witness.handled} == {"h1"}
    await hosts.passes(5.0)
    assert not third.node.unheld and "p" in third.node.state.member("h2").beat.ready, "what it lacks is done"
    assert second.losses == [] == third.losses


async def test_events_that_an_operator_gives_up_are_said_by_the_host_that_lacks_them(make: Make) -> None:
    hosts, second, third = await _lacking(make)
    await hosts.during(placing.place(second.node, "p", anew=True))
    hosts.accepted.clear()
    await _emit(hosts, second, 2)
    await hosts.until(lambda: hosts.all_handled("p"))
    assert _numbers(hosts, third) == [("p", "h1", 1, 4)] and hosts.holder("p") is third


async def test_host_that_is_new_has_lost_nothing(make: Make) -> None:
    hosts = await _started(make, ONE, [0])
    first, second, third = hosts.hosts
    await third.end()
    third.path.unlink()
    await _emit(hosts, second, 4)
    await hosts.until(lambda: hosts.all_handled("p"))
    await hosts.trim(second)
    await third.start()
    third.serve(ONE)
    await hosts.passes(5.0)
    assert third.losses == [] and third.node.is_member
    assert "p" in third.node.state.member("h2").beat.ready
    await first.end()
    await _emit(hosts, second, 2)
    await hosts.until(lambda: hosts.all_handled("p"))
    assert third.losses == []


@pytest.mark.parametrize(
    ("last", "left"),
    [
        (None, (3, 9)), (EventRef("a", 5, 2), (3, 9)), (EventRef("a", 5, 6), (7, 9)), (EventRef("a", 5, 9), None),
        (EventRef("a", 4, 50), (3, 9)), (EventRef("a", 6, 1), None), (EventRef("a", 77, 1), (3, 9)),
    ],
)  # fmt: skip
def test_what_was_read_of_a_sender_bounds_what_is_missed(last: EventRef | None, left: tuple[int, int] | None) -> None:
    state = State(members={"a": Member(events=Number(6, 2), retired=(4, 5))})
    one = Range("a", 5, 3, 9)
    read = {"a": last} if last is not None else {}
    assert rest(state, one, read) == (one._replace(first=left[0], last=left[1]) if left is not None else None)


def test_never_read_is_what_a_copy_knows_and_this_host_does_not() -> None:
    before = State(
        members={"a": Member(Number(5, 7), retired=(4,)), "b": Member(Number(1, 1)), "c": Member(Number(2, 2))}
    )
    after = {
        "a": Member(Number(9, 3), retired=(4, 5, 6)), "b": Member(Number(1, 4)), "c": Member(Number(2, 2)),
        "d": Member(Number(3, 2)), "e": Member(),
    }  # fmt: skip
    assert list(_between(before, after)) == [
        Range("a", 5, 8, MAX_NUMBER), Range("a", 6, 1, MAX_NUMBER), Range("a", 9, 1, 3), Range("b", 1, 2, 4),
        Range("d", 3, 1, 2),
    ]  # fmt: skip
    assert str(Range("a", 5, 8, MAX_NUMBER)) == "a 8 to its last" and str(Range("a", 5, 8, 8)) == "a 8"


def test_losses_are_ranges_and_not_too_many_of_them() -> None:
    refs = [EventRef("a", 1, number) for number in (3, 1, 2, 7)] + [EventRef("b", 1, 4)]
    assert ranges(refs) == [Range("a", 1, 1, 3), Range("a", 1, 7, 7), Range("b", 1, 4, 4)]
    odd = ranges(EventRef(host, 1, number * 2) for host in "ab" for number in range(1, MOST))
    assert bounded(odd) == [Range("a", 1, 2, 2 * MOST - 2), Range("b", 1, 2, 2 * MOST - 2)]
