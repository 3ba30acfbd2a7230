"""The fold and its entries: one state on all hosts, repetitions and gaps without effect, nothing hostile gets in."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host.cluster.entries import (
    MAX_LOST,
    MAX_MESSAGE,
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
    Stream,
    UnknownFormatError,
    VoidLeases,
    decode,
    encode,
    next_session,
    subject,
)
from host.cluster.fold import Applied, Freed, Lease, State, fold
from host.cluster.placement import pick, shard_of
from tests.cluster.simulation import MemoryStore

REF = EventRef("a", 7, 1)
DECISIONS: list[Entry] = [
    Plugin("p", "d1", shards=2),
    Plugin("q", "d2", placement="all", labels=("eu",)),
    Claim("p", 0, "d1"),
    Claim("p", 0, "d1", "a", Number(1, 3)),
    Beat(ready=("p",), positions=(Position("p", 0, 3, (REF,), (Opened(REF, 2, 1),)),)),
    KeyValue("p", 0, 3, "k", "v"),
    KeyValue("p", 0, 3, "k", None),
    Ended("p", 0, 3, REF, "dead", "it failed"),
    Lost("p", 0, 3, (Range("a", 7, 1, 4),)),
    Release("p", 0, 3),
    EventType("shop.order", "{}"),
    VoidLeases("lost"),
    Plugin("p", "d1", shards=2, removed=True),
]
EVENTS: list[Entry] = [Event("{}"), Event("{}", "key"), Replay(REF, "p"), Replay(REF, "unknown")]


class Log:
    """A log that is folded as it grows."""

    def __init__(self) -> None:
        self.state, self.store, self.place = State(), MemoryStore(), 0
        self._numbers: dict[tuple[str, str], int] = {}

    def put(self, host: str, *entries: Entry, series: int = 1, first: int | None = None) -> list[str]:
        """Append a message with the host's next numbers, or others; why each entry is void."""
        stream: Any = "ev" if isinstance(entries[0], Event | Replay) else "ctl"
        number = self._numbers.get((host, stream), 0) + 1 if first is None else first
        self._numbers[host, stream] = number + len(entries) - 1
        body = encode(Message(host, stream, Number(series, number), entries))
        return [one.void for one in self.add(subject(host, stream), body)]

    def add(self, published_to: str, body: bytes) -> list[Applied]:
        self.place += 1
        return fold(self.state, self.store, decode(published_to, body), self.place, float(self.place))


def test_claim_of_a_free_shard_counts_once() -> None:
    log = Log()
    assert log.put("a", DECISIONS[0], Claim("p", 0, "d1")) == ["", ""]
    assert log.state.leases == {("p", 0): Lease("a", 1)}
    assert log.put("b", Claim("p", 0, "d1")) == ["held by a"]
    assert log.put("b", Claim("p", 1, "other"), Claim("p", 2, "d1"), Claim("x", 0, "d1")) == [
        "of another version", "of no shard that one host holds", "of no shard that one host holds",
    ]  # fmt: skip


def test_claim_counts_if_its_holder_has_written_nothing_since() -> None:
    log = Log()
    log.put("a", DECISIONS[0], Claim("p", 0, "d1"))
    assert log.put("b", Claim("p", 0, "d1", "a", Number(1, 1))) == ["its holder has written since"]
    assert log.put("b", Claim("p", 0, "d1", "c", Number(1, 2))) == ["held by a"]
    assert log.put("b", Claim("p", 0, "d1", "a", Number(1, 2))) == [""]
    assert log.state.leases == {("p", 0): Lease("b", 4)}
    assert log.put("a", Release("p", 0, 1), KeyValue("p", 0, 1, "k", "v")) == ["not its holder", "not its holder"]
    assert log.store.values == {}


def test_claim_of_a_shard_that_was_held_meanwhile_is_void() -> None:
    log = Log()
    log.put("a", DECISIONS[0], Claim("p", 0, "d1"), Release("p", 0, 1))
    assert log.state.freed == {("p", 0): Freed(1, drained=True)}
    assert log.put("b", Claim("p", 0, "d1")) == ["it was held since"]
    assert log.put("b", log.state.claim(("p", 0))) == [""]
    log.put("c", VoidLeases("the log has lost its tail"))
    assert log.state.leases == {} and log.state.freed == {("p", 0): Freed(4, drained=False)}


def test_what_a_holder_calls_lost_is_kept_within_bounds_until_the_plugin_ends() -> None:
    log, one = Log(), Range("a", 7, 1, 4)
    log.put("a", DECISIONS[0], Claim("p", 0, "d1"))
    assert log.put("b", Lost("p", 0, 1, (one,))) == ["not its holder"]
    assert log.put("a", Lost("p", 0, 2, (one,)), Lost("p", 0, 1, (one,)), Lost("p", 0, 1, (one,)))[1:] == ["", ""]
    assert log.state.lost == {("p", 0): (one,)}
    assert one.has(EventRef("a", 7, 4)) and not one.has(EventRef("a", 7, 5)) and not one.has(EventRef("a", 8, 4))
    log.put("a", *(Lost("p", 0, 1, (Range("b", 1, number, number),)) for number in range(MAX_LOST)))
    assert len(log.state.lost["p", 0]) == MAX_LOST and one not in log.state.lost["p", 0]
    log.put("b", Plugin("p", "", removed=True))
    assert log.state.lost == {}


def test_message_claims_a_shard_once() -> None:
    log = Log()
    log.put("a", Plugin("p", "d1"))
    claim, again = Claim("p", 0, "d1"), Claim("p", 0, "d1", "", Number(0, 2))
    assert log.put("b", claim, replace(claim, holder="b"), Release("p", 0, 2), again) == [
        "", "claimed by this message", "", "claimed by this message",
    ]  # fmt: skip


def test_late_work_of_an_earlier_epoch_is_void() -> None:
    log = Log()
    log.put("a", DECISIONS[0], Claim("p", 0, "d1"))
    log.put("a", Claim("p", 0, "d1", "a"))
    assert log.put("a", KeyValue("p", 0, 1, "k", "old"), Ended("p", 0, 1, REF, "dead", "x")) == ["of another epoch"] * 2
    assert log.put("a", KeyValue("p", 0, 2, "k", "new")) == [""]
    assert log.put("a", Beat(positions=(Position("p", 0, 1, (REF,)), Position("p", 1, 2, (REF,))))) == [""]
    assert log.state.positions == {}
    assert log.put("a", Beat(positions=(Position("p", 0, 2, (REF,)),))) == [""]
    assert log.state.positions["p", 0].read == (REF,)


def test_removal_ends_an_incarnation_and_what_it_kept() -> None:
    log = Log()
    log.put("a", DECISIONS[0], Claim("p", 0, "d1"), KeyValue("p", 0, 1, "k", "v"))
    log.put("a", Beat(positions=(Position("p", 0, 1, (REF,)),)))
    assert log.put("b", Plugin("p", "d1", shards=3)) == ["shards and placement change only with a removal"]
    assert log.put("b", Plugin("p", "d2", shards=2)) == [""] and log.state.plugins["p"].began == 1
    assert log.put("b", Plugin("p", "", removed=True), Plugin("p", "", removed=True)) == ["", "of an unknown plugin"]
    assert (log.state.leases, log.state.positions, log.store.values) == ({}, {}, {})
    assert log.put("b", Plugin("p", "d3", shards=3)) == [""] and log.state.plugins["p"].began == 6
    assert log.put("a", KeyValue("p", 0, 1, "k", "late")) == ["not its holder"]


def test_numbers_make_repetitions_and_gaps_harmless() -> None:
    log = Log()
    assert log.put("a", Event("{}"), Event("{}")) == ["", ""]
    assert log.put("a", Event("{}"), Event("{}"), Event("{}"), first=1) == ["seen before", "seen before", ""]
    assert log.put("a", Event("{}"), first=5) == ["after a gap"]
    assert log.put("a", Event("{}"), series=2, first=2) == ["after a gap"]
    assert log.put("a", Event("{}"), series=2, first=1) == [""]
    assert log.put("a", Event("{}"), series=1, first=4) == ["of an outbox that has been replaced"]
    assert log.put("b", Beat(), series=5, first=1) == [""]
    assert log.put("b", Beat(), series=4, first=1) == ["of an earlier session"]
    assert log.put("b", Beat(), series=5, first=1) == ["seen before"]


def test_event_with_a_known_key_is_accepted_once() -> None:
    log = Log()
    assert log.put("a", Event("{}", "k")) == [""]
    assert log.put("b", Event("{}", "k"), Event("{}")) == ["accepted before", ""]


def test_log_that_goes_back_is_noticed() -> None:
    log = Log()
    log.put("a", Event("{}"))
    with pytest.raises(ValueError, match="place 1 comes after 1"):
        fold(log.state, log.store, Message("a", "ev", Number(1, 2), ()), 1, 0.0)


entries = st.one_of(
    st.tuples(st.just("ctl"), st.lists(st.sampled_from(DECISIONS), min_size=1, max_size=4)),
    st.tuples(st.just("ev"), st.lists(st.sampled_from(EVENTS), min_size=1, max_size=4)),
)
batches = st.lists(st.tuples(st.sampled_from("abc"), entries), max_size=12)


@settings(deadline=None)
@given(batches, st.randoms(use_true_random=False))
def test_repetitions_anywhere_change_nothing(written: list[Any], chance: Any) -> None:
    numbers: dict[tuple[str, str], int] = {}
    bodies = []
    for host, (stream, some) in written:
        first = numbers.get((host, stream), 0) + 1
        numbers[host, stream] = first + len(some) - 1
        bodies.append((subject(host, stream), encode(Message(host, stream, Number(1, first), tuple(some)))))
    clean, noisy = Log(), Log()
    expected = [one for body in bodies for one in clean.add(*body) if not one.void]
    counted = []
    for at, body in enumerate(bodies):
        counted += [one for one in noisy.add(*body) if not one.void]
        for _ in range(chance.randrange(3)):
            assert all(one.void for one in noisy.add(*chance.choice(bodies[: at + 1])))
    # Epochs are places, and the places are others: what depends on one is void in both, or in the noisy log alone.
    assert [one.ref for one in counted if not isinstance(one.entry, Claim | KeyValue | Ended | Lost | Release)] == [
        one.ref for one in expected if not isinstance(one.entry, Claim | KeyValue | Ended | Lost | Release)
    ]
    assert (noisy.state.plugins.keys(), noisy.state.types) == (clean.state.plugins.keys(), clean.state.types)
    assert {host: (one.events, one.decisions) for host, one in noisy.state.members.items()} == {
        host: (one.events, one.decisions) for host, one in clean.state.members.items()
    }


def test_entries_come_back_as_they_were_written() -> None:
    written: list[tuple[Stream, list[Entry]]] = [("ctl", DECISIONS), ("ev", EVENTS)]
    for stream, some in written:
        message = Message("host-1", stream, Number(3, 4), tuple(some))
        assert decode(subject("host-1", stream), encode(message)) == message


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.sampled_from(["first", "entries", "kind", "format", "plugin"])
trees = st.recursive(values, lambda some: st.lists(some) | st.dictionaries(keys, some))


@settings(deadline=None)
@given(st.binary(max_size=400) | trees.map(lambda tree: json.dumps(tree).encode()))
def test_hostile_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        decode("iso.ctl.a", body)


@pytest.mark.parametrize(
    ("published_to", "body"),
    [
        ("iso.ev.a.b", b"{}"),
        ("iso.ctl.A", b"{}"),
        ("iso.ctl.a", b'{"first":[1,1],"entries":[{"kind":"event","cloudevent":""}],"format":1}'),
        ("iso.ev.a", b'{"first":[1,1],"entries":[{"kind":"claim","plugin":"p","shard":0,"digest":"d"}],"format":1}'),
        ("iso.ctl.a", b'{"first":[1,9007199254740991],"entries":[{"kind":"beat"}],"format":1}'),
        ("iso.ctl.a", b'{"first":[1,1],"entries":[{"kind":"beat","clock":1e999}],"format":1}'),
        ("iso.ctl.a", b'{"first":[1,1],"entries":[{"kind":"plugin","name":"p","digest":"","shards":65}],"format":1}'),
        ("iso.ctl.a", b'{"first":[1,1],"entries":[{"kind":"beat","more":1}],"format":1}'),
        ("iso.ctl.a", b"[" * 100_000),
        ("iso.ctl.a", b" " * (MAX_MESSAGE + 1)),
    ],
)
def test_message_that_no_host_writes_is_refused(published_to: str, body: bytes) -> None:
    with pytest.raises(ValueError):
        decode(published_to, body)


def test_newer_format_is_told_from_a_broken_message() -> None:
    with pytest.raises(UnknownFormatError):
        decode("iso.ctl.a", b'{"first":[1,1],"entries":[{"kind":"new"}],"format":2}')
    with pytest.raises(UnknownFormatError):
        decode("iso.ctl.a", b'{"first":[1,1],"entries":[],"format":2}')


def test_newer_session_is_higher_whatever_its_random_part() -> None:
    assert next_session(next_session(0, 2**20 - 1), 0) > next_session(0, 2**20 - 1)
    assert next_session(0, 1) != next_session(0, 2)


def test_host_that_leaves_moves_its_shards_alone() -> None:
    shards = [(f"p{number}", 0) for number in range(200)]
    before = {shard: pick(shard, "abcd") for shard in shards}
    after = {shard: pick(shard, "abc") for shard in shards}
    assert {before[shard] for shard in shards} == {*"abcd"}
    assert all(after[shard] == host for shard, host in before.items() if host != "d")
    assert pick(("p", 0), []) is None
    assert {shard_of(str(key), 4) for key in range(100)} == {0, 1, 2, 3} and shard_of("a", 1) == 0
