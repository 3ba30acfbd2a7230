"""Any interleaving of any hosts' messages means one thing to every reader, and what the leases promise holds in it.

Hosts write what they should and what they should not: repetitions, gaps, numbers of earlier lives, claims from what
they read long ago, entries about what is another's, bytes that no host writes. Readers lag, start again, and begin with
another's copy of the fold, at any place. Storage, clock and network are arguments of the fold: here a database in
memory for each reader, times that jump, and a list.

What has to hold is kept beside the fold in terms of the log alone (``_Promises``). Each planted fault is found.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from host.cluster import fold as folding
from host.cluster import store as storing
from host.cluster.entries import (
    NOTHING,
    Beat,
    Claim,
    Ended,
    Entry,
    Event,
    EventRef,
    EventType,
    KeyValue,
    Lost,
    Message,
    Number,
    Opened,
    Plugin,
    Position,
    Range,
    Release,
    Replay,
    VoidLeases,
    decode,
    encode,
    subject,
)
from host.cluster.fold import Applied, Shard, State, fold
from host.cluster.store import FoldStore, dump, make_tables, restore, value_of
from tests.support.timeouts import seconds

HOSTS = ("a", "b", "c")
PLUGINS = ("p", "q")
SHARDS: list[Shard] = [("p", 0), ("p", 1), ("q", 0)]
DAY = 86400.0
_OUT_OF_TURN = ("seen before", "after a gap", "of an earlier session", "of an outbox that has been replaced")


class _Reader:
    """One host's fold, in its own database. ``at`` is how many messages of the log it has read."""

    def __init__(self, name: str) -> None:
        self.name, self.at = name, 0
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        make_tables(self.db, name, 1)
        self.load()

    def row(self, query: str, values: Sequence[Any] = ()) -> Any:
        return self.db.execute(query, values).fetchone()

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        return self.db.execute(query, values).fetchall()

    def load(self) -> None:
        """Start as a process does, from what the database has."""
        self.store = FoldStore(self)  # type: ignore[arg-type]
        self.state = self.store.load()

    def take(self, time: float, published_to: str, body: bytes) -> list[Applied]:
        """Read the next message; one that no host writes is passed over."""
        self.at += 1
        try:
            message = decode(published_to, body)
        except ValueError:
            return []
        applied = fold(self.state, self.store, message, self.at, time)
        self.store.changes(self.state, message.host, "mark")(self.db)
        return applied

    def copy_from(self, other: _Reader) -> None:
        """Begin with another's copy of the fold."""
        restore(self.db, json.loads(json.dumps(dump(other.db))))
        self.at = other.at
        self.load()

    def content(self) -> dict[str, list[Any]]:
        tables = ("cluster_fold", "cluster_values")
        return {table: self.db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in tables}


class _Promises:
    """What must hold of the entries that count, by the log alone."""

    def __init__(self) -> None:
        self.last: dict[tuple[str, str], Number] = {}
        self.series: dict[tuple[str, str], set[int]] = {}
        self.holders: dict[Shard, tuple[str, int]] = {}
        self.epochs: dict[Shard, int] = {}
        self.freed: dict[Shard, int] = {}
        self.plugins: dict[str, Plugin] = {}
        self.types: dict[str, EventType] = {}

    def apply(self, message: Message, applied: list[Applied], place: int) -> None:
        for one in applied:
            if one.void not in _OUT_OF_TURN:
                self._take_turn(message.stream, one.ref)
            if not one.void:
                self._count(one, place)

    def _take_turn(self, stream: str, ref: EventRef) -> None:
        line = (ref.host, stream)
        last, known = self.last.get(line, NOTHING), self.series.setdefault(line, set())
        if ref.series == last.series:
            assert ref.number == last.number + 1, f"{ref} comes after {last}"
        else:
            assert ref.number == 1 and ref.series not in known, f"{ref} is of a series that has ended"
            assert stream == "ev" or ref.series > last.series, f"{ref} is of a session before {last}"
        known.add(ref.series)
        self.last[line] = Number(ref.series, ref.number)

    def _count(self, one: Applied, place: int) -> None:
        host, entry = one.ref.host, one.entry
        match entry:
            case Claim():
                self._claim(host, entry, place)
            case Release() | KeyValue() | Ended() | Lost():
                self._of_holder(host, (entry.plugin, entry.shard), entry.epoch)
                if isinstance(entry, Release):
                    self._end((entry.plugin, entry.shard), place)
            case Plugin() if entry.removed:
                del self.plugins[entry.name]
                for shard in [shard for shard in self.holders if shard[0] == entry.name]:
                    self._end(shard, place)
            case Plugin():
                known = self.plugins.setdefault(entry.name, entry)
                assert (known.shards, known.placement) == (entry.shards, entry.placement)
                self.plugins[entry.name] = entry
            case VoidLeases():
                for shard in [*self.holders]:
                    self._end(shard, place)
            case EventType():
                before = self.types.pop(entry.name, None)
                assert entry.replaces == (before.digest if before is not None else ""), "a type was changed unseen"
                if not entry.removed:
                    self.types[entry.name] = entry
            case Replay():
                assert entry.plugin in self.plugins

    def _claim(self, host: str, claim: Claim, place: int) -> None:
        shard, known = (claim.plugin, claim.shard), self.plugins[claim.plugin]
        assert claim.digest == known.digest and claim.shard < known.shards and known.placement == "one"
        holder, _ = self.holders.get(shard, ("", 0))
        assert claim.holder == holder, f"{host} took {shard} of {claim.holder!r}, and {holder!r} held it"
        if holder not in ("", host):
            # The claim itself is in the same message as what its host wrote, never as what the holder did.
            assert claim.cited == self.last[holder, "ctl"], f"{host} cites {claim.cited}, {holder} has written since"
        if not holder:
            assert claim.cited[1] >= self.freed.get(shard, 0), f"{shard} was held after {claim.cited}"
        assert place > self.epochs.get(shard, 0), f"the epoch of {shard} does not rise"
        self.holders[shard], self.epochs[shard] = (host, place), place
        self.freed.pop(shard, None)

    def _of_holder(self, host: str, shard: Shard, epoch: int) -> None:
        assert self.holders.get(shard) == (host, epoch), f"{host} in {epoch} is not the holder of {shard}"

    def _end(self, shard: Shard, place: int) -> None:
        if self.holders.pop(shard, None) is not None:
            self.freed[shard] = place

    def check(self, state: State) -> None:
        """The state has what was promised."""
        for shard, lease in state.leases.items():
            assert lease.epoch == self.epochs.get(shard), f"the epoch of {shard} does not rise"
        assert {shard: (one.holder, one.epoch) for shard, one in state.leases.items()} == self.holders
        assert {name: one.plugin for name, one in state.plugins.items()} == self.plugins
        assert state.types == self.types
        for shard, position in state.positions.items():
            assert position.epoch <= self.epochs.get(shard, 0), f"what wrote {position} is not the holder of any epoch"
            assert shard[0] in self.plugins, "a position of what was removed"
        assert {shard[0] for shard in state.lost} <= {*self.plugins}


numbers = st.integers(0, 3)
refs = st.builds(EventRef, st.sampled_from(HOSTS), st.integers(1, 2), st.integers(1, 3))
epochs = st.integers(0, 40)
shards = st.sampled_from(SHARDS)
positions = st.builds(
    lambda shard, epoch, read, opened: Position(*shard, epoch, tuple(read), tuple(Opened(one, 1, 0) for one in opened)),
    shards, epochs, st.lists(refs, max_size=2), st.lists(refs, max_size=2),
)  # fmt: skip
plugins = st.one_of(
    st.builds(
        Plugin, st.just("p"), st.sampled_from(("d1", "d2")), shards=st.sampled_from((1, 2)), removed=st.booleans()
    ),
    st.builds(Plugin, st.just("q"), st.just("d1"), st.sampled_from(("one", "all")), removed=st.booleans()),
)
anything = st.one_of(
    st.builds(Beat, ready=st.just(PLUGINS), positions=st.lists(positions, max_size=2).map(tuple)),
    st.builds(lambda shard, host, cited: Claim(*shard, "d1", host, cited), shards, st.sampled_from(("", *HOSTS)),
              st.builds(Number, numbers, numbers)),
    st.builds(lambda shard, epoch: Release(*shard, epoch), shards, epochs),
    st.builds(lambda shard, epoch, value: KeyValue(*shard, epoch, "k", value), shards, epochs,
              st.sampled_from((None, "v"))),
    st.builds(lambda shard, epoch, ref: Ended(*shard, epoch, ref, "dead", "why"), shards, epochs, refs),
    st.builds(lambda shard, epoch, ref: Lost(*shard, epoch, (Range(*ref, 9),)), shards, epochs, refs),
    st.builds(VoidLeases, st.just("lost")),
    st.builds(EventType, st.sampled_from(("shop.order", "shop.paid")), st.sampled_from(("{}", "[]")),
              replaces=st.sampled_from(("", EventType("", "{}").digest, EventType("", "[]").digest)),
              removed=st.booleans()),
    plugins,
)  # fmt: skip
events = st.one_of(
    st.builds(Event, st.just("{}"), st.sampled_from(("", "key 1", "key 2"))),
    st.builds(Replay, refs, st.sampled_from((*PLUGINS, "unknown"))),
)
hosts = st.sampled_from(HOSTS)
lagging = st.integers(0, 2)
_names = st.sampled_from(("first", "entries", "kind", "format", "plugin", "shard", "epoch"))
_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(_names, some, max_size=3),
    max_leaves=6,
)


class FoldMachine(RuleBasedStateMachine):
    """A log that hosts write and readers read."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[float, str, bytes]] = []
        self.time = 1e9
        self.ahead, self.promises = _Reader("ahead"), _Promises()
        self.readers = [_Reader(f"reader {number}") for number in range(3)]
        self.digests = [""]
        """By place, of the reader that is ahead."""
        self.next: dict[tuple[str, str], Number] = {}

    def put(self, published_to: str, body: bytes, later: float = 1.0) -> list[Applied]:
        """Append a message; the reader that is ahead reads it at once."""
        self.time += later
        self.log.append((self.time, published_to, body))
        applied = self.ahead.take(*self.log[-1])
        if applied:
            self.promises.apply(decode(published_to, body), applied, len(self.log))
        self.digests.append(self.ahead.state.digest)
        return applied

    def write(self, host: str, *entries: Entry, number: Number | None = None) -> list[Applied]:
        """Write as a host does: with its next numbers, or others."""
        stream: Any = "ev" if isinstance(entries[0], Event | Replay) else "ctl"
        first = number or self.next.get((host, stream), Number(1, 1))
        if number is None:
            self.next[host, stream] = Number(first.series, first.number + len(entries))
        return self.put(subject(host, stream), encode(Message(host, stream, first, entries)))

    # What hosts should write

    @initialize(host=hosts, held=st.booleans())
    def begin(self, host: str, held: bool) -> None:
        """Have plugins, perhaps held, with a value."""
        self.write(host, Plugin("p", "d1", shards=2), Plugin("q", "d1"))
        if held:
            self.write(host, *(self.ahead.state.claim(shard) for shard in SHARDS))
            self.work(("p", 0), "kv", EventRef("a", 1, 1))

    @rule(host=hosts, plugin=st.sampled_from(PLUGINS), parts=st.sampled_from((1, 2)))
    def describe(self, host: str, plugin: str, parts: int) -> None:
        self.write(host, Plugin(plugin, "d1", shards=parts if plugin == "p" else 1))

    @rule(host=hosts, plugin=st.sampled_from(PLUGINS))
    def remove(self, host: str, plugin: str) -> None:
        self.write(host, Plugin(plugin, "d1", removed=True))

    @rule(host=hosts, shard=shards, reader=lagging, behind=st.integers(0, 4))
    def claim(self, host: str, shard: Shard, reader: int, behind: int) -> None:
        """Claim by what a reader knows that lags behind; what the holder has written since has to void it."""
        one = self.readers[reader]
        self._read(one, max(0, len(self.log) - one.at - behind))
        state = one.state
        if shard[0] in state.plugins:
            self.write(host, state.claim(shard), Beat())

    @rule(shard=shards, take=st.booleans(), host=hosts)
    def claim_by_the_newest(self, shard: Shard, take: bool, host: str) -> None:
        if shard[0] in self.ahead.state.plugins:
            claim = self.ahead.state.claim(shard)
            if take or not claim.holder:
                self.write(host, claim)

    @rule(shard=shards, what=st.sampled_from(("release", "kv", "kv", "ended", "lost", "beat")), ref=refs)
    def work(self, shard: Shard, what: str, ref: EventRef) -> None:
        """Write what the holder of a shard writes."""
        lease = self.ahead.state.leases.get(shard)
        if lease is not None:
            at = (*shard, lease.epoch)
            made: dict[str, Entry] = {
                "release": Release(*at), "kv": KeyValue(*at, "k", "v"), "ended": Ended(*at, ref, "dead", "why"),
                "beat": Beat(positions=(Position(*at, (ref,)),)), "lost": Lost(*at, (Range(*ref, 9),)),
            }  # fmt: skip
            (one,) = self.write(lease.holder, made[what])
            assert one.void in ("", *_OUT_OF_TURN), one  # another may have written under its name

    @rule(host=hosts, some=st.lists(events, min_size=1, max_size=3), more=st.lists(anything, max_size=2))
    def emit(self, host: str, some: list[Entry], more: list[Entry]) -> None:
        self.write(host, *some)
        if more:
            self.write(host, *more)

    @rule(host=hosts, stream=st.sampled_from(("ev", "ctl")))
    def begin_anew(self, host: str, stream: str) -> None:
        """Start with another session, or another outbox."""
        self.next[host, stream] = Number(self.next.get((host, stream), Number(1, 1)).series + 1, 1)

    # What nobody should write, and what networks do

    @rule(host=hosts, entry=st.one_of(anything, events), number=st.builds(Number, numbers, st.integers(0, 12)))
    def write_with_any_number(self, host: str, entry: Entry, number: Number) -> None:
        self.write(host, entry, number=number)

    @rule(at=st.integers(0, 200))
    def repeat(self, at: int) -> None:
        if self.log:
            _, published_to, body = self.log[at % len(self.log)]
            taken = {(one.ref.host, one.ref.series, one.ref.number) for one in self.put(published_to, body)
                     if one.void not in _OUT_OF_TURN}  # fmt: skip
            assert len(taken) == len({*taken})

    @rule(
        published_to=st.sampled_from(("iso.ctl.a", "iso.ev.b", "iso.ctl.A", "iso.other")),
        body=st.binary(max_size=40) | _trees.map(lambda tree: json.dumps(tree).encode()),
    )
    def write_what_no_host_writes(self, published_to: str, body: bytes) -> None:
        before = self.ahead.content(), self.ahead.state.digest
        assert self.put(published_to, body) == []
        assert (self.ahead.content(), self.ahead.state.digest) == before

    @rule(days=st.sampled_from((0.1, 5.0, 15.0, -3.0)))
    def let_time_jump(self, days: float) -> None:
        self.time += days * DAY

    # Readers

    @rule(reader=lagging, count=st.integers(1, 8))
    def read(self, reader: int, count: int) -> None:
        self._read(self.readers[reader], count)

    def _read(self, reader: _Reader, count: int) -> None:
        for entered in self.log[reader.at : reader.at + count]:
            reader.take(*entered)
            assert reader.state.digest == self.digests[reader.at], f"{reader.name} differs at {reader.at}"

    @rule(reader=lagging)
    def start_again(self, reader: int) -> None:
        one, before = self.readers[reader], self.readers[reader].state
        one.load()
        assert one.state == before

    @rule(reader=lagging, other=lagging)
    def begin_with_a_copy(self, reader: int, other: int) -> None:
        self.readers[reader] = _Reader(f"reader {reader}")
        self.readers[reader].copy_from(self.readers[other])

    @rule(reader=lagging)
    def begin_with_the_newest_copy(self, reader: int) -> None:
        self.readers[reader] = _Reader(f"reader {reader}")
        self.readers[reader].copy_from(self.ahead)

    # What has to hold

    @invariant()
    def promises_hold(self) -> None:
        self.promises.check(self.ahead.state)
        for name in PLUGINS:
            if name not in self.ahead.state.plugins:
                assert value_of(self.ahead.db, name, "k") is None

    def teardown(self) -> None:
        if len(self.digests) <= len(self.log):
            return  # what was promised did not hold in the newest message, and that was said
        for reader in self.readers:
            self._read(reader, len(self.log))
            reader.load()
            assert reader.state == self.ahead.state
            assert reader.content() == self.ahead.content()


_QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def _run(examples: int, *, shrink: bool = True) -> None:
    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]
    run_state_machine_as_test(
        FoldMachine,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=_QUIET, phases=phases,
            database=None, derandomize=not shrink, report_multiple_bugs=False,
        ),
    )  # fmt: skip


def test_any_interleaving_means_one_thing_to_every_reader() -> None:
    _run(60)


@pytest.mark.wide
@pytest.mark.timeout(seconds(1800))
def test_many_interleavings_mean_one_thing_to_every_reader() -> None:
    _run(3000)


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def _stale_claim(claim: Any) -> Any:
    """Take the cited decision of a claim for the newest."""

    def mutated(self: Any, entry: Claim) -> Any:
        expected = self._state.claim((entry.plugin, entry.shard)) if entry.plugin in self._state.plugins else entry
        return claim(self, Claim(entry.plugin, entry.shard, entry.digest, entry.holder, expected.cited))

    return mutated


def _epoch_that_stays(claim: Any) -> Any:
    """Keep the epoch of the holder before."""

    def mutated(self: Any, entry: Claim) -> Any:
        before = self._state.leases.get((entry.plugin, entry.shard))
        void = claim(self, entry)
        if not void and before is not None:
            shard = (entry.plugin, entry.shard)
            self._state.leases[shard] = folding.Lease(self._host, before.epoch)
        return void

    return mutated


def _late_state(changes: Any) -> Any:
    """Keep every part but the leases."""

    def mutated(self: Any, state: State, host: str, mark: str) -> Any:
        leases, state.leases = state.leases, {}
        try:
            return changes(self, state, host, mark)
        finally:
            state.leases = leases

    return mutated


def _forgotten_keys(is_first: Any) -> Any:
    """Forget dedupe keys over a restart."""

    def mutated(self: Any, unique: str, event: EventRef, time: float) -> bool:
        known = self.__dict__.setdefault("mutated", {})
        return bool(known.setdefault(unique, event) == event)

    return mutated


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(_replace(folding._Folding, "_claim", _stale_claim),
                     id="a claim counts though its holder has written since"),
        pytest.param(_replace(folding._Folding, "_claim", _epoch_that_stays), id="an epoch does not rise"),
        pytest.param(_replace(folding._Folding, "_not_held", lambda _: lambda *_: ""),
                     id="anybody ends anybody's work"),
        pytest.param(_replace(folding, "_out_of_turn", lambda _: lambda last, number: (
            "" if number.series != last.series or number.number > last.number else "seen before")),
            id="a gap is not noticed"),
        pytest.param(_replace(folding._Folding, "_take_decision", lambda _: lambda self, number: folding._out_of_turn(
            self._member.decisions, number) or setattr(self._member, "decisions", number) or ""),
            id="an earlier session goes on"),
        pytest.param(_replace(storing.FoldStore, "forget", lambda _: lambda *_: None), id="values outlive a plugin"),
        pytest.param(_replace(folding._Folding, "_register", lambda _: lambda self, entry: self._state.types.update(
            {entry.name: entry}) or ""), id="a type is changed behind another's back"),
        pytest.param(_replace(storing.FoldStore, "changes", _late_state), id="a lease is not kept"),
        pytest.param(_replace(storing.FoldStore, "is_first", _forgotten_keys),
                     id="a dedupe key is forgotten over a restart"),
    ],
)  # fmt: skip
def test_each_planted_fault_is_found(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        _run(2000, shrink=False)
