"""A hostile host that writes anything that decodes, and much that does not: the others stay one cluster."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from host.cluster.entries import (
    MAX_NUMBER,
    MAX_TIMES,
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
    subject,
)
from host.cluster.fold import Shard, State
from host.cluster.problems import FINAL
from host.cluster.standing import standing
from tests.cluster.queues import Hosts, Make

NOT_ENTRIES = (
    b"", b"null", b"[]", b"\xff", b"{}", b"[" * 200_000, b'{"a":' * 40_000, b" " * 262_144, b"x" * 262_145,
    b'{"first":[NaN,1],"entries":[]}', b'{"first":[1e400,1],"entries":[]}', b'{"first":[-1,1],"entries":[]}',
    b'{"first":[9223372036854775808,1],"entries":[]}', b'{"first":["1",1],"entries":[]}',
)  # fmt: skip
SCHEMAS = ("", "{", "1", '{"type":"object"}', "[" * 4000, '{"$ref":"#"}', '{"pattern":"("}', '{"allOf":[' * 900)


class _Hostile:
    """Entries that fit the cluster as it is, more often than not."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts, self._random = hosts, random.Random(hosts.random.random())

    @property
    def _state(self) -> State:
        return self._hosts.hosts[0].node.state

    def _one(self, *some: Any) -> Any:
        return self._random.choice(some)

    def _number(self) -> int:
        return int(self._one(0, 1, 2, self._random.randrange(60), 1 << 31, MAX_NUMBER))

    def _ref(self) -> EventRef:
        host = self._one(*self._state.members, "ghost", "")
        series, number = self._state.member(host).events
        if self._random.random() < 0.3:
            return EventRef(host, self._number(), self._number())
        return EventRef(host, series, max(0, number - self._random.randrange(3)))

    def _held(self) -> tuple[str, int, int]:
        """A shard, and an epoch that is its own, if it is held."""
        shard: Shard = (self._one("p", "p", "q", "r"), self._one(0, 0, 1, MAX_NUMBER))
        lease = self._state.leases.get(shard)
        return (*shard, lease.epoch if lease is not None else self._number())

    def _position(self) -> Position:
        times = self._one(0, 7, MAX_TIMES)
        opened = [Opened(self._ref(), times, times) for _ in range(self._one(0, 1, 300))]
        return Position(*self._held(), tuple(self._ref() for _ in range(self._one(0, 3, 200))), tuple(opened))

    def _claim(self) -> Claim:
        name, shard, _ = self._held()
        if name in self._state.plugins and shard < 64:
            return self._state.claim((name, shard))
        return Claim(name, shard, "d", self._one("h0", ""), Number(self._number(), self._number()))

    def _plugin(self) -> Plugin:
        name, labels = self._one("p", "q", "r", "x\n\x1b[31my", "z" * 1024), self._one((), (), ("eu",))
        known = self._state.plugins.get(name)
        placement, shards = self._one("one", "all"), self._one(1, 2, 64)
        if known is not None:
            placement, shards = known.plugin.placement, known.plugin.shards
        hooks = self._one((), ("deploy.completed",), ("",))
        return Plugin(name, self._one("d", "e"), placement, shards, labels, self._random.random() < 0.25, hooks)

    def _type(self) -> EventType:
        name = self._one("deploy.completed", "a.b", "", "A B")
        known = self._state.types.get(name)
        digest = known.digest if known is not None else ""
        key, version, removed = self._one(None, "", "key", "a.b"), self._one(0, 1, 10**6), self._one(True, False, False)
        return EventType(name, self._one(*SCHEMAS), key, version, "evil", digest, False, removed)

    def _decision(self) -> Entry:
        ready, text, of = self._one((), ("p", "r"), ("p",) * 500), self._one("", "y" * 1000), self._held
        beat = Beat(
            ("eu",), text, self._one(0.0, 5e9, 1e308), self._one(0, self._state.place), self._one("", "zz"), ready,
            self._one((), ("p",)), tuple(self._position() for _ in range(self._one(0, 1, 2))),
        )  # fmt: skip
        lost = tuple(Range(*self._ref(), self._number()) for _ in range(self._one(0, 1, 256)))
        made: Entry = self._one(
            beat, beat, self._claim(), self._claim(), self._claim(), Release(*of()), self._plugin(), self._type(),
            KeyValue(*of(), text, self._one(None, "", "v" * 50_000)), Lost(*of(), lost),
            Ended(*of(), self._ref(), self._one("dead", "ok", "moved", text), text), VoidLeases(text),
        )  # fmt: skip
        return made

    def _event(self) -> Entry:
        found: dict[str, Any] = {
            "id": f"ev_{self._random.getrandbits(110):028x}", "type": "deploy.completed", "data": {"key": "a"},
            "time": "2026-01-01T00:00:00Z", "expirytime": "2099-01-01T00:00:00Z",
        }  # fmt: skip
        if self._random.random() < 0.6:
            wrong = ("\x00", None, [], {"key": 5}, {"key": [[1] * 100]}, "0001-01-01T00:00:00+23:59", 1e308, "x" * 2000)
            found[self._one(*found)] = self._one(*wrong)
        text = self._one(json.dumps(found), json.dumps(found), "", "[" * 5000, '{"data":{"x":1e999}}')
        return self._one(Event(text, self._one("", "", "u")), Replay(self._ref(), self._one("p", "q", "r")))  # type: ignore[no-any-return]

    def _body(self, stream: Stream, entries: Sequence[Entry]) -> bytes:
        member = self._state.member("evil")
        last = member.events if stream == "ev" else member.decisions
        number = Number(last.series or 1, last.number + 1)
        if self._random.random() < 0.1:
            number = Number(self._number(), 1)
        try:
            body = encode(Message("evil", stream, number, tuple(entries)))
            decode(subject("evil", stream), body)
        except UnknownFormatError:  # for which the others wait, as they have to
            return b""
        except ValueError:  # too large, say
            return b""
        return body

    def writes(self) -> None:
        stream: Stream = self._one("ev", "ctl", "ctl")
        make = self._event if stream == "ev" else self._decision
        body = self._body(stream, [make() for _ in range(self._one(1, 1, 2, 6))])
        if self._random.random() < 0.15:
            body = self._one(*NOT_ENTRIES, body[:-3])
        self._hosts.servers.put(subject("evil", stream), body)


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.wide) for seed in range(3, 60))])
async def test_hosts_stay_a_cluster_whatever_a_hostile_one_writes(make: Make, seed: int) -> None:
    hosts = make(seed)
    await hosts.start(Plugin("p", "d", hooks=("deploy.completed",)), Plugin("q", "d", placement="all"))
    hostile = _Hostile(hosts)
    for _ in range(100):
        for _ in range(hosts.random.choice((1, 1, 3))):
            hostile.writes()
        if hosts.random.random() < 0.3:
            await hosts.emit(hosts.random.choice(hosts.hosts), hosts.random.choice(("a", None)))
        await hosts.passes(hosts.random.choice((0.25, 1.0, 3.0)))
    await hosts.passes(60.0)
    for host in hosts.hosts:
        lines = host.node.problems.lines
        assert host.node.is_member and not {*lines} & {*FINAL, "log_lost"}, lines
        assert "unreadable" in lines and json.dumps(standing(host.node, host.clock.now()))
        host.show(hosts.accepted[-1])
    assert len({host.node.state.digest for host in hosts.hosts}) == 1
    # Whatever is left of the plugin, an operator gives it to the cluster again, and it is handled.
    state = hosts.hosts[0].node.state
    await hosts.during(hosts.hosts[0].decide(Plugin("p", "d", removed=True), Plugin("p", "d")))
    assert state.plugins["p"].plugin == Plugin("p", "d")
    hosts.accepted.clear()
    await hosts.emit(hosts.hosts[0], "last", dedupe_key="last")
    await hosts.until(lambda: hosts.all_handled("p"))
