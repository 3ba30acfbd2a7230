"""Hosts that follow one log: who holds a plugin, and that no accepted event is lost, over cuts and bad disks."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from host.cluster import snapshots
from host.cluster.entries import (
    Beat,
    Claim,
    Event,
    EventRef,
    KeyValue,
    Message,
    Number,
    Plugin,
    Position,
    decode,
    encode,
    subject,
)
from host.cluster.fold import State, fold
from host.cluster.lease import HOLD
from host.cluster.life import PUT_BACK
from host.cluster.log import Entered, LogUnavailableError
from host.cluster.outbox import OutboxFullError
from host.cluster.store import value_of
from isolator.errors import IsolatorError
from tests.cluster.hosts import Cluster, Host
from tests.cluster.simulation import MemoryStore


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """Three hosts that have just started."""
    made = Cluster(tmp_path)
    await made.start()
    yield made
    await made.stop()


def _line(host: Host, kind: str) -> str:
    return {str(known): line for known, line in host.node.problems.lines.items()}.get(kind, "")


async def test_one_host_holds_a_plugin_and_all_have_one_fold(cluster: Cluster) -> None:
    holder = await cluster.settled()
    assert {host.node.state.digest for host in cluster.hosts} == {holder.node.state.digest}
    assert holder.node.held == {("p", 0): holder.node.state.leases["p", 0].epoch}
    assert [host.node.is_member for host in cluster.hosts] == [True] * 3


async def test_host_that_is_cut_off_stops_acting_before_another_takes_over_and_gives_up_when_it_hears_of_it(
    cluster: Cluster,
) -> None:
    first = await cluster.settled()
    epoch = first.node.held["p", 0]
    first.log.cut = True
    await cluster.passes(HOLD + 1)
    assert first.follower.is_over and not first.acting()
    assert first.node.held  # nobody has taken it yet
    await cluster.passes(12)
    second = cluster.holder()
    assert second is not first and second.node.held["p", 0] > epoch
    first.log.cut = False
    await cluster.passes(5)
    assert first.follower.lost_because == [(("p", 0), f"held by {second.name}")]
    assert not first.follower.is_over
    assert cluster.holder() is second


async def test_host_that_is_cut_off_for_a_short_time_goes_on(cluster: Cluster) -> None:
    first = await cluster.settled()
    first.log.cut = True
    await cluster.passes(HOLD + 1)
    assert first.follower.is_over
    first.log.cut = False
    await cluster.passes(3)
    assert cluster.holder() is first and not first.follower.is_over and not first.follower.lost_because


async def test_events_of_all_hosts_reach_all_in_one_order_though_answers_are_lost(cluster: Cluster) -> None:
    await cluster.passes(3)
    cluster.hosts[1].log.loses_answers = True
    for number in range(30):
        await cluster.hosts[number % 3].emit(f"e{number}")
    await cluster.passes(10)
    seen = cluster.hosts[0].seen
    assert sorted(seen) == sorted(f"e{number}" for number in range(30))
    assert [host.seen for host in cluster.hosts] == [seen] * 3
    assert [host.node.waiting() for host in cluster.hosts] == [(0, 0)] * 3
    assert [seen.index(f"e{number}") for number in range(0, 30, 3)] == sorted(
        seen.index(f"e{number}") for number in range(0, 30, 3)
    )


async def test_events_that_are_accepted_while_cut_off_are_in_the_log_later_and_a_restart_loses_none(
    cluster: Cluster,
) -> None:
    await cluster.passes(3)
    host = cluster.hosts[0]
    host.log.cut = True
    for number in range(5):
        await host.emit(f"e{number}")
    await cluster.passes(30)
    assert host.node.waiting()[0] == 5 and cluster.hosts[1].seen == []
    await host.stop()
    await host.start()
    await cluster.passes(5)
    assert cluster.hosts[1].seen == [f"e{number}" for number in range(5)]
    assert host.node.waiting() == (0, 0)


async def test_event_with_a_dedupe_key_counts_once_whoever_emits_it(cluster: Cluster) -> None:
    await cluster.passes(3)
    await cluster.hosts[0].emit("one", "order 1")
    await cluster.hosts[1].emit("two", "order 1")
    await cluster.passes(3)
    assert [len(host.seen) for host in cluster.hosts] == [1] * 3
    await cluster.hosts[2].stop()
    await cluster.hosts[2].start()
    await cluster.passes(3)
    await cluster.hosts[2].emit("three", "order 1")
    await cluster.passes(3)
    assert len(cluster.hosts[0].seen) == 1


async def test_restart_and_exchange_of_a_process_carry_leases_and_positions_by_the_database_and_a_new_session(
    cluster: Cluster,
) -> None:
    holder = await cluster.settled()
    epoch, session = holder.node.held["p", 0], holder.node.state.member(holder.name).decisions.series
    position = Position("p", 0, epoch, (EventRef("h1", 7, 3),))
    holder.follower.changed = [position]
    holder.node.changed()
    await cluster.passes(1)
    await holder.stop()
    await holder.start()
    assert not holder.acting()  # before anything was read back nobody knows whether it still holds it
    await cluster.passes(1)
    assert holder.follower.held_now == {("p", 0): (epoch, position)}
    assert holder.acting() == {("p", 0): epoch}
    assert holder.node.state.member(holder.name).decisions.series > session
    await cluster.passes(30)
    assert cluster.moves == 0 and cluster.holder() is holder


async def test_decision_in_flight_at_a_restart_counts_before_the_new_session_or_never(
    cluster: Cluster,
) -> None:
    holder = await cluster.settled()
    caught: list[tuple[str, bytes]] = []
    holder.log.append = lambda subject, body: _catch(caught, subject, body)  # type: ignore[method-assign]
    await cluster.passes(3)
    await holder.stop()
    await holder.start()
    await cluster.passes(3)
    for published_to, body in caught:
        cluster.servers.put(published_to, body)
    await cluster.passes(3)
    assert cluster.holder() is holder and not holder.node.problems.lines


async def _catch(caught: list[tuple[str, bytes]], published_to: str, body: bytes) -> None:
    caught.append((published_to, body))
    raise LogUnavailableError("lost")


async def test_value_is_kept_by_all_and_that_of_an_earlier_holder_is_void(cluster: Cluster) -> None:
    holder = await cluster.settled()
    epoch = holder.node.held["p", 0]
    one = await cluster.during(holder.node.decide(KeyValue("p", 0, epoch, "k", "v")))
    assert one.void == ""
    late = await cluster.during(holder.node.decide(KeyValue("p", 0, epoch - 1, "k", "old")))
    assert late.void == "of another epoch"
    await cluster.passes(1)
    assert [host.database.read(lambda db: value_of(db, "p", "k")) for host in cluster.hosts] == ["v"] * 3


async def test_decision_of_a_host_that_is_cut_off_is_an_error_after_a_while(cluster: Cluster) -> None:
    holder = await cluster.settled()
    holder.log.cut = True
    with pytest.raises(LogUnavailableError, match="in time"):
        await cluster.during(holder.node.decide(KeyValue("p", 0, 1, "k", "v")))
    with pytest.raises(ValueError, match="too large"):
        await holder.node.decide(KeyValue("p", 0, 1, "k", "v" * (200 << 10)))


async def test_database_that_fails_a_transaction_applies_the_message_once(cluster: Cluster) -> None:
    await cluster.passes(3)
    host = cluster.hosts[0]
    host.follower.fails = [sqlite3.OperationalError("database is locked")]
    await cluster.hosts[1].emit("e")
    for _ in range(50):  # the database tries again by the machine's clock
        await cluster.passes(0.25)
        if host.seen:
            break
        await asyncio.sleep(0.05)
    await cluster.passes(1)
    assert host.seen == ["e"] and not host.follower.fails
    assert host.node.state.digest == cluster.hosts[1].node.state.digest


async def test_leaving_host_drains_and_releases_sends_what_waits_and_may_join_again(cluster: Cluster) -> None:
    first = await cluster.settled()
    await first.emit("last words")
    assert await cluster.during(first.node.leave()) == 0
    assert first.follower.drained == [("p", 0)] and not first.acting()
    assert "remove [cluster] from host.toml" in _line(first, "left")
    with pytest.raises(IsolatorError, match="has left its cluster"):
        await first.emit("too late")
    await cluster.passes(3)
    others = [host for host in cluster.hosts if host is not first]
    assert cluster.holder() in others and [host.seen for host in others] == [["last words"]] * 2
    await first.stop()
    cluster.servers.created = "another"
    for host in others:
        await host.stop()
    cluster.hosts = [first]
    cluster.servers.messages.clear()
    await first.start()
    await first.emit("first words")
    await cluster.passes(5)
    assert first.seen == ["first words"] and not first.node.problems.lines


async def test_host_that_is_cut_off_leaves_only_by_force_and_says_what_stays_behind(cluster: Cluster) -> None:
    first = await cluster.settled()
    first.log.cut = True
    await first.emit("waits")
    with pytest.raises(LogUnavailableError):
        await cluster.during(first.node.leave())
    assert not first.node._parting and not _line(first, "left")
    assert await cluster.during(first.node.leave(force=True)) == 1
    assert not first.acting() and "p" not in first.follower.until


@pytest.mark.parametrize("wait", [0.0, 1.0, 2.5])
async def test_release_that_never_left_leaves_nobody_without_the_plugin(cluster: Cluster, wait: float) -> None:
    first = await cluster.settled()
    first.log.cut = True
    await cluster.passes(wait)
    with pytest.raises(LogUnavailableError):
        await cluster.during(first.node.leave())
    first.log.cut = False
    await cluster.passes(30)
    assert cluster.holder()


async def test_leader_that_has_not_taken_up_all_yet_is_no_loss(cluster: Cluster) -> None:
    first = await cluster.settled()
    first.log.lag = 3
    first.node._life.look_soon()
    await cluster.passes(1)
    first.log.lag = 0
    await cluster.passes(15)
    assert cluster.holder() is first and not first.problems


async def test_fault_of_the_follower_ends_the_reading_and_has_its_line(cluster: Cluster) -> None:
    first = await cluster.settled()
    first.follower.fails = [ValueError("a fault")]
    await cluster.passes(5)
    assert "ValueError('a fault')" in _line(first, "failed")
    assert not first.acting()
    await cluster.passes(30)
    assert cluster.holder() is not first


# Bad disks and bad hosts


async def test_earlier_copy_of_a_database_loses_no_event_and_repeats_none_that_was_read_back(cluster: Cluster) -> None:
    await cluster.passes(3)
    host = cluster.hosts[0]
    await host.emit("before")
    await cluster.passes(3)
    await host.stop()
    shutil.copytree(host.folder, host.folder.with_name("copy"))
    await host.start()
    for number in range(4):
        await host.emit(f"lost {number}")
    await cluster.passes(3)
    await host.stop()
    shutil.rmtree(host.folder)
    host.folder.with_name("copy").rename(host.folder)
    await host.start()
    await host.emit("after")
    await cluster.passes(10)
    assert cluster.hosts[1].seen == ["before", *(f"lost {number}" for number in range(4)), "after"]
    assert host.problems == [("put_back", PUT_BACK), ("put_back", None)] and not host.node.problems.lines


async def test_later_copy_of_a_database_that_is_put_back_after_an_earlier_one_loses_no_event(cluster: Cluster) -> None:
    host, other = cluster.hosts[:2]
    emitted = []

    async def emit(text: str) -> None:
        await host.emit(text)
        emitted.append(text)
        await cluster.passes(2)

    for copy in ("earlier", "later"):
        await emit(f"before the {copy} copy")
        await host.stop()
        shutil.copytree(host.folder, host.folder.with_name(copy))
        await host.start()
        await cluster.passes(2)
    # Nothing was sent after the later copy, so no number says that it is one.
    for copy in ("earlier", "later"):
        await host.stop()
        shutil.rmtree(host.folder)
        shutil.copytree(host.folder.with_name(copy), host.folder)
        await host.start()
        await cluster.passes(10)
        await emit(f"after the {copy} copy")
    assert host.node.waiting() == (0, 0) and not host.node.problems.lines
    assert other.seen == emitted and host.node.state.digest == other.node.state.digest


async def test_lost_database_begins_anew_and_takes_its_plugin_up(cluster: Cluster) -> None:
    holder = await cluster.settled()
    await holder.emit("one")
    await cluster.passes(2)
    await holder.stop()
    shutil.rmtree(holder.folder)
    await holder.start()
    await holder.emit("two")
    await cluster.passes(10)
    assert cluster.hosts[0].seen[-2:] == ["one", "two"]
    assert cluster.holder() and not holder.node.problems.lines


async def test_copy_of_a_disk_stops_one_of_both_and_says_so(cluster: Cluster) -> None:
    await cluster.passes(3)
    host = cluster.hosts[0]
    await host.stop()
    twin = cluster.copy_of(host, "twin")
    await host.start()
    await cluster.passes(5)
    await twin.start()
    cluster.hosts.append(twin)
    await cluster.passes(5)
    assert "another daemon has this name, or a copy of this disk runs" in _line(host, "twin")
    assert not host.acting() and not host.node.is_member
    with pytest.raises(LogUnavailableError, match="copy of this disk"):
        await host.node.decide(Plugin("q", "d"))
    await host.emit("kept")
    await cluster.passes(5)
    assert host.node.waiting()[0] == 1  # nothing is sent under a name that two have, and nothing is lost


async def test_host_with_another_name_sends_what_waited_under_the_one_before(cluster: Cluster) -> None:
    await cluster.passes(3)
    host = cluster.hosts[0]
    host.log.cut = True
    await host.emit("kept")
    await host.stop()
    host.name = "renamed"
    await host.start()
    await cluster.passes(5)
    assert [ref.host for ref, text in cluster.hosts[1].follower.events if text == "kept"] == ["renamed"]


async def test_log_that_lost_its_tail_gets_its_events_again_and_every_lease_ends(cluster: Cluster) -> None:
    holder = await cluster.settled()
    await cluster.hosts[1].emit("early")
    await cluster.passes(3)
    await cluster.hosts[1].emit("late")
    await cluster.passes(1)
    for host in cluster.hosts:
        host.log.cut = True
    await cluster.passes(1)
    place = next(one.place for one in cluster.servers.messages if b"late" in one.body)
    cluster.servers.lose_tail(len(cluster.servers.messages) - place + 1)
    for host in cluster.hosts:
        host.log.cut = False
    await cluster.passes(60)
    assert [sorted(host.seen) for host in cluster.hosts] == [["early", "late"]] * 3
    assert any(kind == "log_lost" and line for host in cluster.hosts for kind, line in host.problems)
    assert len({host.node.state.digest for host in cluster.hosts}) == 1
    assert holder.follower.lost_because and cluster.holder()
    assert not any(host.node.problems.lines for host in cluster.hosts)


async def test_log_that_lost_its_tail_and_has_grown_again_is_known_by_its_content(cluster: Cluster) -> None:
    await cluster.settled()
    for host in cluster.hosts[1:]:
        await host.stop()
    cluster.hosts = [cluster.hosts[0]]
    host = cluster.hosts[0]
    await host.stop()
    cluster.servers.lose_tail(3)
    for number in range(5):
        cluster.servers.put(subject("h9", "ctl"), encode(Message("h9", "ctl", Number(1, 1 + number), (Beat(),))))
    await host.start()
    await cluster.passes(5)
    assert "log_lost" in {kind for kind, _ in host.problems}
    assert host.node.state.members["h9"].decisions == Number(1, 5)


async def test_another_log_is_not_followed(cluster: Cluster) -> None:
    await cluster.settled()
    host = cluster.hosts[0]
    await host.stop()
    cluster.servers.wrong = ("there is no stream",)
    await host.start()
    await cluster.passes(5)
    assert [*host.node.problems.lines] == ["settings"]
    cluster.servers.created, before = "of another cluster", cluster.servers.created
    cluster.servers.wrong = ()
    await cluster.passes(5)
    assert [*host.node.problems.lines] == ["another_log"]
    assert "this is another cluster's log" in _line(host, "another_log")
    cluster.servers.created = before
    await cluster.passes(5)
    assert not host.node.problems.lines and host.node.is_member


async def test_log_whose_beginning_is_gone_lets_a_new_host_hold_nothing_and_keeps_its_events(cluster: Cluster) -> None:
    await cluster.settled()
    cluster.servers.trimmed = 2
    new = cluster.host("new")
    cluster.hosts.append(new)
    await new.start()
    await new.emit("kept")
    await cluster.passes(5)
    assert "it holds nothing; its events wait" in _line(new, "trimmed")
    assert new.node.waiting()[0] == 1 and not new.node.is_member


async def test_new_host_takes_over_a_fold_from_before_when_the_logs_beginning_is_gone(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "LEAST", 5)
    first = await cluster.settled()
    await first.emit("early", "key")
    epoch = first.node.held["p", 0]
    await cluster.during(first.node.decide(KeyValue("p", 0, epoch, "k", "v")))
    await cluster.passes(30)
    for number in range(20):
        await cluster.hosts[number % 3].emit(f"e{number}")
        await cluster.passes(1)
    places = sorted(int(path.stem) for path in (first.folder / "folds").glob("*.fold"))
    cluster.servers.trimmed = places[-2] - 1
    new = cluster.host("new")
    cluster.hosts.append(new)
    await new.start()
    await cluster.passes(10)
    assert new.node.is_member and not new.node.problems.lines
    assert new.node.state.digest == first.node.state.digest and "early" not in new.seen and "e19" in new.seen
    assert new.database.read(lambda db: value_of(db, "p", "k")) == "v"
    await new.emit("again", "key")
    await cluster.passes(3)
    assert all("again" not in host.seen for host in cluster.hosts)
    await first.stop()
    cluster.hosts.remove(first)
    await cluster.passes(25)
    assert cluster.holder() in cluster.hosts


@pytest.mark.parametrize("answer", [b"", b"{}", b'{"host":"h","place":9,"size":1}', b"[" * 9999, b"\xff"])
async def test_hostile_copy_of_a_fold_is_not_taken(cluster: Cluster, answer: bytes) -> None:
    await cluster.settled()
    cluster.servers.trimmed = 8
    new = cluster.host("new")
    cluster.hosts.append(new)
    cluster.servers.answers = {name: [(cluster.hosts[0].log, lambda _: answer)] for name in ("iso.ask", "iso.ask.h")}
    await new.start()
    await cluster.passes(5)
    assert "it holds nothing" in _line(new, "trimmed") and new.node.state.place == 0


@pytest.mark.parametrize("fault", ["full", "refused", "unreachable", "unwritable", "settings"])
async def test_log_that_cannot_be_used_has_its_line_and_events_wait(cluster: Cluster, fault: str) -> None:
    await cluster.passes(3)
    host = cluster.hosts[0]
    match fault:
        case "full":
            cluster.servers.full = True
        case "refused":
            host.log.refused = True
        case "unreachable":
            host.log.cut = True
        case "unwritable":
            cluster.servers.quorum_lost = True
        case "settings":
            cluster.servers.wrong = ("nats-server 2.9.10 is too old for three servers: 2.10.26",)
    await cluster.passes(12)
    await host.emit("kept")
    await cluster.passes(12)
    assert _line(host, fault), host.node.problems.lines
    assert host.node.waiting()[0] == 1 and not host.node.is_member
    cluster.servers.full = cluster.servers.quorum_lost = host.log.refused = host.log.cut = False
    cluster.servers.wrong = ()
    await cluster.passes(10)
    assert not host.node.problems.lines and cluster.hosts[1].seen == ["kept"]
    assert [line is None for kind, line in host.problems if kind == fault] == [False, True]  # on record, once each


async def test_full_outbox_refuses_an_event_and_loses_none(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, hosts=1)
    host = cluster.hosts[0]
    host.outbox = 1000
    await cluster.start()
    await cluster.passes(3)
    host.log.cut = True
    accepted = []
    with pytest.raises(OutboxFullError, match="see 'isolator cluster status'"):
        for number in range(100):
            await host.emit(f"event {number}")
            accepted.append(f"event {number}")
    assert _line(host, "outbox_full")
    host.log.cut = False
    await cluster.passes(5)
    assert host.seen == accepted and not host.node.problems.lines
    with pytest.raises(IsolatorError, match="fit a cluster"):
        await host.emit("x" * (300 << 10))
    await cluster.stop()


async def test_steps_of_the_wall_clock_move_nothing(cluster: Cluster) -> None:
    first = await cluster.settled()
    for host, step in zip(cluster.hosts, (86400.0, -86400.0, 3600.0), strict=True):
        host.clock.step = step
    await cluster.passes(40)
    assert cluster.holder() is first and cluster.moves == 0


async def test_hostile_entries_are_passed_over_and_have_their_line(cluster: Cluster) -> None:
    first = await cluster.settled()
    epoch = first.node.held["p", 0]
    for body in (b"", b"\xff" * 100, b"[]", b'{"first":[1,1],"entries":[{"kind":"beat","extra":1}]}', b"[" * 100_000):
        cluster.servers.put("iso.ctl.evil", body)
    cluster.servers.put("iso.ctl.evil.one", b"{}")
    forged = (Claim("p", 0, "d", first.name, Number(1, 1)), KeyValue("p", 0, epoch, "k", "stolen"))
    cluster.servers.put("iso.ctl.evil", encode(Message("evil", "ctl", Number(1, 1), forged)))
    await cluster.passes(5)
    assert cluster.holder() is first and first.node.held["p", 0] == epoch
    for host in cluster.hosts:
        assert "'iso.ctl.evil'" in _line(host, "unreadable") or "iso.ctl.evil" in _line(host, "unreadable")
        assert host.database.read(lambda db: value_of(db, "p", "k")) is None


async def test_message_of_a_newer_version_stops_a_host_from_holding(cluster: Cluster) -> None:
    await cluster.settled()
    cluster.servers.put("iso.ctl.newer", b'{"first":[1,1],"entries":[{"kind":"unknown"}],"format":2}')
    await cluster.passes(3)
    for host in cluster.hosts:
        assert "until it is updated" in _line(host, "newer_version")
        assert not host.acting()


async def test_server_that_stays_away_is_a_problem_and_one_that_is_started_anew_is_none(cluster: Cluster) -> None:
    holder = await cluster.settled()
    for seconds, problem in ((10.0, ""), (40.0, "n2")):
        cluster.servers.behind = ("n2",)
        await cluster.passes(seconds)
        cluster.servers.behind = () if not problem else ("n2",)
        await cluster.passes(12.0)
        assert all(host.node.problems.lines.get("copies", "").endswith(problem) for host in cluster.hosts)
        assert bool(problem) == any("copies" in host.node.problems.lines for host in cluster.hosts)
    assert cluster.holder() is holder and not holder.node.kept_back()
    cluster.servers.behind = ()
    await cluster.passes(12.0)
    assert not any(host.node.problems.lines for host in cluster.hosts)


async def test_host_goes_on_past_what_a_distrusted_host_has_written_in_an_unknown_format(cluster: Cluster) -> None:
    await cluster.settled()
    cluster.servers.put("iso.ctl.hostile", b'{"first":[1,1],"entries":[{"kind":"unknown"}],"format":2}')
    cluster.distrusted = ("hostile",)
    await cluster.passes(3)
    for host in cluster.hosts:
        assert "[cluster] distrusted names hostile" in _line(host, "newer_version")
        await host.stop()
        await host.start()
    await cluster.passes(10)
    assert cluster.holder()
    for host in cluster.hosts:
        assert "is passed over" in _line(host, "unreadable") and host.node.is_member
    cluster.servers.put("iso.ctl.newer", b'{"first":[1,1],"entries":[{"kind":"unknown"}],"format":2}')
    await cluster.passes(3)
    assert all(_line(host, "newer_version") and not host.acting() for host in cluster.hosts)


async def test_host_whose_server_has_other_content_stops_and_the_others_go_on(cluster: Cluster) -> None:
    await cluster.settled()
    odd = cluster.hosts[2]

    def otherwise(entered: Entered) -> Entered:
        if entered.subject != subject("h0", "ev"):
            return entered
        return entered._replace(body=entered.body.replace(b"true text", b"other text"))

    odd.log.sees = otherwise
    await cluster.hosts[0].emit("true text")
    await cluster.passes(12)
    assert "means something else to h0, h1" in _line(odd, "diverged") or "h1, h0" in _line(odd, "diverged")
    assert not odd.acting() and not odd.node.is_member
    assert [host.node.problems.lines for host in cluster.hosts[:2]] == [{}, {}]
    await cluster.passes(30)
    assert cluster.holder() is not odd


async def test_host_that_lies_about_its_fold_stops_nobody_else(cluster: Cluster) -> None:
    first = await cluster.settled()
    lie = Message("liar", "ctl", Number(1, 1), (Beat(place=cluster.hosts[0].node.state.place, digest="x"),))
    cluster.servers.put(subject("liar", "ctl"), encode(lie))
    await cluster.passes(3)
    assert cluster.holder() is first and not first.node.problems.lines


async def test_unread_event_of_a_large_batch_is_no_loss(cluster: Cluster) -> None:
    await cluster.passes(3)
    host = cluster.hosts[0]
    host.log.cut = True
    texts = [f"{number} " + "x" * 40_000 for number in range(20)]
    for text in texts:
        await host.emit(text)
    host.log.cut = False
    await cluster.passes(5)
    assert cluster.hosts[1].seen == texts
    assert len([one for one in cluster.servers.messages if one.subject == subject("h0", "ev")]) >= 4


@pytest.mark.parametrize("seed", range(2))
async def test_whatever_happens_one_host_acts_and_every_accepted_event_counts_once(tmp_path: Path, seed: int) -> None:
    await _run(tmp_path, seed, 40)


@pytest.mark.wide
@pytest.mark.parametrize("seed", range(100, 130))
async def test_one_host_acts_and_every_accepted_event_counts_once_in_many_histories(tmp_path: Path, seed: int) -> None:
    await _run(tmp_path, seed, 200)


async def _run(folder: Path, seed: int, steps: int) -> None:
    cluster = Cluster(folder, seed=seed, names=("p", "q"))
    chance = cluster.random
    await cluster.start()
    await cluster.settled()
    await cluster.during(cluster.hosts[0].node.decide(Plugin("q", "d", shards=2)))
    accepted: list[str] = []
    for step in range(steps):
        host = chance.choice(cluster.hosts)
        fault = chance.random()
        if fault < 0.15:
            host.log.cut = not host.log.cut
        elif fault < 0.25:
            host.log.loses_answers = not host.log.loses_answers
        elif fault < 0.35:
            await host.stop()
            await host.start()
        elif fault < 0.4:
            cluster.servers.quorum_lost = not cluster.servers.quorum_lost
        elif fault < 0.45:
            host.log.keeps = lambda _: chance.random() < 0.5
        for number in range(chance.randrange(4)):
            text = f"{host.name} {step} {number}"
            await host.emit(text)
            accepted.append(text)
        await cluster.passes(chance.choice((0.3, 1, 3, 8)))
    cluster.servers.quorum_lost = False
    for host in cluster.hosts:
        host.log.cut = host.log.loses_answers = False
        host.log.keeps = lambda _: True
    await cluster.passes(40)
    for host in cluster.hosts:
        assert host.node.waiting() == (0, 0) and not host.node.problems.lines
        assert host.node.state.digest == cluster.hosts[0].node.state.digest
    counted = [event.cloudevent for event in _counted(cluster)]
    assert sorted(counted) == sorted(accepted)
    for host in cluster.hosts:
        mine = [text for text in accepted if text.startswith(f"{host.name} ")]
        assert [text for text in counted if text.startswith(f"{host.name} ")] == mine
    cluster.holder("p")
    await cluster.stop()


def _counted(cluster: Cluster) -> list[Event]:
    """The events of the whole log that count, by the fold."""
    state, store = State(), MemoryStore()
    found = []
    for place, _, published_to, body in cluster.servers.messages:
        for one in fold(state, store, decode(published_to, body), place, 0.0):
            if isinstance(one.entry, Event) and not one.void:
                found.append(one.entry)
    return found
