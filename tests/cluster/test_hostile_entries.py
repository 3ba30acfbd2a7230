"""Entries of a hostile host, which only it would write: no other host stops, and what is bounded stays so."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from host.cluster import fold as folding
from host.cluster import snapshots
from host.cluster.delivery.unread import bounded
from host.cluster.entries import (
    MAX_LOST,
    MAX_OPEN,
    MAX_READ,
    MAX_TIMES,
    Beat,
    Claim,
    Entry,
    Event,
    EventRef,
    Message,
    Number,
    Opened,
    Plugin,
    Position,
    Range,
    Release,
    Stream,
    encode,
    subject,
)
from host.cluster.fold import State, fold
from host.cluster.log import Facts
from host.cluster.placement import shard_of
from host.cluster.problems import FINAL
from host.cluster.store import make_tables
from host.database.store import Store
from tests.cluster.hosts import Cluster
from tests.cluster.queues import Hosts, Make
from tests.cluster.simulation import MemoryStore

P = ("p", 0)
Write = Callable[[State], Sequence[Entry]]


class _Hostile:
    """A host with credentials of its own, that writes what it likes."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts, self._numbers = hosts, {"ctl": 1, "ev": 1}

    async def writes(self, write: Write) -> None:
        hosts = self._hosts
        entries = tuple(write(hosts.hosts[0].node.state))
        stream: Stream = "ev" if isinstance(entries[0], Event) else "ctl"
        body = encode(Message("evil", stream, Number(1, self._numbers[stream]), entries))
        self._numbers[stream] += len(entries)
        hosts.servers.put(subject("evil", stream), body)
        await hosts.passes(1.0)


def _claim(state: State) -> Sequence[Entry]:
    return [state.claim(P)]


def _epoch(state: State) -> int:
    assert state.leases[P].holder == "evil"
    return state.leases[P].epoch


def _says(position: Callable[[State, int], Position]) -> Write:
    return lambda state: [Beat(positions=(position(state, _epoch(state)),))]


def _emit(_: State) -> Sequence[Entry]:
    moments = '"time": "2098-12-31T00:00:00Z", "expirytime": "2099-01-01T00:00:00Z"'
    return [Event(f'{{"id": "ev_{7:028x}", "type": "a.b", "data": {{}}, {moments}}}')]


def _event_of(state: State) -> EventRef:
    return EventRef("evil", *state.member("evil").events)


def _release(state: State) -> Sequence[Entry]:
    return [Release(*P, _epoch(state))]


def _strangers(count: int) -> tuple[EventRef, ...]:
    return tuple(EventRef(f"ghost{number}", number, number) for number in range(count))


@pytest.mark.parametrize(
    "writes",
    [
        [lambda state: [state.claim(P), Plugin("p", "d", removed=True)], lambda _: [Plugin("p", "d")]],
        [lambda state: [state.claim(P), Plugin("p", "d", removed=True), Plugin("p", "d", shards=3)]],
        [
            _claim,
            _says(lambda _, epoch: Position(*P, epoch, (), tuple(Opened(ref, 1, 1) for ref in _strangers(MAX_OPEN)))),
            _release,
        ],
        [
            _emit,
            _claim,
            _says(lambda state, epoch: Position(*P, epoch, (), (Opened(_event_of(state), MAX_TIMES, MAX_TIMES),))),
            _release,
        ],
        [_claim, _says(lambda _, epoch: Position(*P, epoch, _strangers(MAX_READ))), _release],
        [
            _claim,
            _says(lambda _, epoch: Position(*P, epoch, tuple(EventRef("h0", n, n) for n in range(900)))),
            _release,
        ],
    ],
    ids=[
        "claimed and removed",
        "with other shards",
        "events of nobody open",
        "attempts without number",
        "of nobody read",
        "of many outboxes",
    ],
)
async def test_no_host_stops_over_what_a_hostile_one_writes_of_a_plugin(make: Make, writes: list[Write]) -> None:
    hosts = make()
    await hosts.start(Plugin("p", "d"))
    await hosts.until(lambda: hosts.holder("p"))
    hostile, hosts.failing = _Hostile(hosts), 1.0
    for write in writes:
        await hostile.writes(write)
    await hosts.until(lambda: hosts.holder("p"))
    await hosts.passes(5.0)
    hosts.failing = 0.0
    await hosts.emit(hosts.hosts[0], "a")
    await hosts.until(lambda: hosts.all_handled("p"))
    for host in hosts.hosts:
        assert host.node.is_member and not {*host.node.problems.lines} & FINAL
        for position in host.node.state.positions.values():
            assert len(position.read) <= len(host.node.state.members)


def test_ranges_of_lost_events_fit_one_entry_whoever_made_them_up() -> None:
    some = [Range(f"ghost{number}", number, 1, 2) for number in range(1000)]
    assert len(bounded(some)) == MAX_LOST // 2
    assert bounded(some[:3]) == some[:3]


def _fold(state: State, *entries: Entry) -> list[str]:
    number = state.member("evil").decisions.number + 1
    message = Message("evil", "ctl", Number(1, number), entries)
    return [one.void for one in fold(state, MemoryStore(), message, state.place + 1, 1.0)]


def test_plugins_of_a_cluster_and_what_is_kept_of_each_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "MAX_PLUGINS", 10)
    state = State()
    assert _fold(state, Plugin("a", "d", shards=6), Plugin("b", "d", shards=4)) == ["", ""]
    assert _fold(state, Plugin("c", "d")) == ["there are 10 plugins and shards"]
    assert _fold(state, Plugin("a", "e", shards=6)) == [""], "another version of one that there is"
    assert _fold(state, Plugin("b", "d", hooks=("x" * 1000,) * 17)) == ["it wants too many events"]
    for number in range(50):
        _fold(state, Plugin("b", "d", removed=True))
        name = f"p{number}"
        held = [Plugin(name, "d", shards=4), *(Claim(name, shard, "d") for shard in range(4))]
        assert _fold(state, *held, Plugin(name, "d", removed=True)) == [""] * 6
    newest = {("p49", shard) for shard in range(4)}
    assert len(state.freed) == 20 and newest < {*state.freed}


async def test_shard_that_a_hostile_host_takes_and_gives_away_has_one_actor(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    await cluster.start()
    first = await cluster.settled()
    first.log.cut = True
    await cluster.passes(30)
    first.log.cut = False
    await cluster.passes(10)
    holder, state = cluster.holder(), first.node.state
    assert holder is not first  # which is the first to take it up again
    holder.log.cut = True
    numbers = iter(range(1, 3))

    async def writes(entry: Entry) -> None:
        cluster.servers.put("iso.ctl.evil", encode(Message("evil", "ctl", Number(1, next(numbers)), (entry,))))
        await cluster.passes(0.5)

    await writes(state.claim(P))
    await writes(Release(*P, _epoch(state)))
    await cluster.passes(40)  # the one that is cut off may act for some seconds yet
    assert cluster.holder() is not holder
    await cluster.stop()


async def test_event_of_another_shard_that_a_hostile_holder_calls_open_stays_with_that_shards_holder(
    make: Make,
) -> None:
    hosts, other = make(), 1 - shard_of("a", 2)
    await hosts.start(Plugin("p", "d", shards=2))
    await hosts.until(lambda: hosts.holder("p", 0) and hosts.holder("p", 1))
    hosts.failing = 1.0
    await hosts.emit(hosts.hosts[0], "a")
    state, hostile = hosts.hosts[0].node.state, _Hostile(hosts)
    await hosts.until(lambda: any(one.open for one in state.positions.values()))
    (opened,) = (one for position in state.positions.values() for one in position.open)
    await hostile.writes(lambda state: [state.claim(("p", other))])
    epoch = state.leases["p", other].epoch
    position = Position("p", other, epoch, (), (opened,))
    await hostile.writes(lambda _: [Beat(positions=(position,)), Release("p", other, epoch)])
    await hosts.until(lambda: hosts.holder("p", other) and state.positions["p", other] != position)
    assert not state.positions["p", other].open and opened.event in {
        one.event for one in state.positions["p", 1 - other].open
    }
    hosts.failing = 0.0
    await hosts.until(lambda: hosts.all_handled("p"))


@pytest.mark.parametrize(("most", "made"), [(snapshots.UNPACKED, True), (1000, False)])
async def test_fold_that_a_holder_has_filled_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, made: bool
) -> None:
    monkeypatch.setattr(snapshots, "UNPACKED", most)
    database = Store(tmp_path / "db")

    def fill(db: sqlite3.Connection) -> None:
        make_tables(db, "h", 1)
        db.execute("INSERT INTO cluster_values VALUES ('p', 'k', ?)", ("v" * 1000,))

    await database.run(fill)
    await snapshots.Snapshots("h", database, tmp_path / "folds").keep_up(Facts(1, 20_000, "log"), 20_000, 1.0)
    assert any((tmp_path / "folds").glob("*.fold")) is made
    await database.close()
