"""The fold: what the entries of a cluster's log mean, as a pure function of their order.

Every host applies the same messages in the same order to the same state, so that all agree without asking. An entry
counts or is void by its place alone: no clock of a host or server takes part. The digest is a hash over every message
and every decision; two hosts at the same place with another digest read different logs, or decide differently.

Numbers make repetitions harmless: of each host and subject the next number is taken, a lower one has been seen, and a
higher one is passed over until its sender, which reads its own entries back, has sent the gap again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from host.cluster import entries

MAX_TYPES = 1000
"""Event types of a cluster."""
MAX_PLUGINS = 4096
"""Plugins of a cluster, and shards of all of them: what one host writes into the fold, every host keeps in memory."""
MAX_HOOKS = 16 << 10
"""Characters of the events that a plugin wants, and of its labels."""
MAX_RETIRED = 16
"""Earlier outboxes of a host that the fold remembers."""

Shard = tuple[str, int]
"""A plugin's name and the number of one of its shards."""


class Store(Protocol):
    """The large part of a fold; a host has it in its database, in one transaction with the state."""

    def is_first(self, unique: str, event: entries.EventRef, time: float) -> bool:
        """Keep a dedupe key, for as long as the log keeps its entries; False if it is there already."""

    def put(self, plugin: str, key: str, value: str | None) -> None:
        """Keep a plugin's value, or remove it."""

    def forget(self, plugin: str) -> None:
        """Remove every value of a plugin."""


@dataclass(frozen=True, slots=True)
class Applied:
    """An entry of the log and its fate: ``void`` is the reason why it does not count, empty if it does."""

    ref: entries.EventRef
    entry: entries.Entry
    void: str = ""


@dataclass(slots=True)
class Member:
    """A host as the log shows it: how far it has written, and its newest beat.

    ``retired`` are the outboxes before the one in use: a restored or cloned disk still writes for them.
    """

    events: entries.Number = entries.NOTHING
    decisions: entries.Number = entries.NOTHING
    beat: entries.Beat = entries.NO_BEAT
    retired: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Lease:
    """A shard's holder. ``epoch`` is the place of the claim that counted: a later holder has a higher one."""

    holder: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Freed:
    """Since when a shard is free. ``drained``: its holder had ended its work; else it may act until it reads this."""

    place: int
    drained: bool


@dataclass(frozen=True, slots=True)
class Incarnation:
    """A plugin of the cluster; ``began`` is the place from which it reads."""

    plugin: entries.Plugin
    began: int

    def fits(self, labels: Collection[str]) -> bool:
        """Whether a host with these labels may hold it."""
        return {*self.plugin.labels} <= {*labels}


@dataclass(slots=True)
class State:
    """The sum of a log up to ``place``, where the log's newest time is ``time``."""

    place: int = 0
    time: float = 0.0
    digest: str = ""
    members: dict[str, Member] = field(default_factory=dict)
    plugins: dict[str, Incarnation] = field(default_factory=dict)
    leases: dict[Shard, Lease] = field(default_factory=dict)
    freed: dict[Shard, Freed] = field(default_factory=dict)
    positions: dict[Shard, entries.Position] = field(default_factory=dict)
    lost: dict[Shard, tuple[entries.Range, ...]] = field(default_factory=dict)
    """The newest events of a shard, at most ``MAX_LOST`` ranges, that its position is behind and that it never got."""
    types: dict[str, entries.EventType] = field(default_factory=dict)

    def member(self, host: str) -> Member:
        """The host's part of the state; one that has never written has the first numbers."""
        return self.members.get(host) or Member()

    def position(self, shard: Shard) -> entries.Position:
        """How far the shard's holders are by their beats; one of the epoch 0, at the beginning, where none has told."""
        return self.positions.get(shard) or entries.Position(*shard, 0)

    def claim(self, shard: Shard) -> entries.Claim:
        """The claim of a shard that counts if nothing is written before it; raises KeyError for an unknown plugin."""
        digest = self.plugins[shard[0]].plugin.digest
        lease = self.leases.get(shard)
        if lease is not None:
            return entries.Claim(*shard, digest, lease.holder, self.member(lease.holder).decisions)
        freed = self.freed.get(shard)
        return entries.Claim(*shard, digest, "", entries.Number(0, freed.place if freed else 0))


def fold(state: State, store: Store, message: entries.Message, place: int, time: float) -> list[Applied]:
    """Apply a message that stands at ``place`` of the log, where it was put at ``time``; the fate of its entries.

    Raises ValueError for a place that is not later than the state's: the log has lost its tail, or another is read.
    """
    if place <= state.place:
        raise ValueError(f"place {place} comes after {state.place}")
    state.place, state.time = place, max(state.time, time)
    applied = list(_Folding(state, store, message.host).apply(message))
    mark = hashlib.sha256(f"{state.digest}\n{place}\n{message.stream}\n{message.host}\n".encode())
    mark.update(hashlib.sha256(message.body).digest())
    mark.update("\n".join(one.void for one in applied).encode())
    state.digest = mark.hexdigest()
    return applied


class _Folding:
    """One message of a host on its way into the state."""

    def __init__(self, state: State, store: Store, host: str) -> None:
        self._state, self._store, self._host = state, store, host
        self._member = state.members.setdefault(host, Member())
        self._claimed: set[Shard] = set()

    def apply(self, message: entries.Message) -> Iterator[Applied]:
        for offset, entry in enumerate(message.entries):
            number = entries.Number(message.first.series, message.first.number + offset)
            ref = entries.EventRef(self._host, *number)
            take = self._take_event if message.stream == "ev" else self._take_decision
            yield Applied(ref, entry, take(number) or self._act(ref, entry))

    def _take_event(self, number: entries.Number) -> str:
        member = self._member
        if number.series in member.retired:
            return "of an outbox that has been replaced"
        if void := _out_of_turn(member.events, number):
            return void
        if member.events.series not in (0, number.series):
            member.retired = (*member.retired, member.events.series)[-MAX_RETIRED:]
        member.events = number
        return ""

    def _take_decision(self, number: entries.Number) -> str:
        if number.series < self._member.decisions.series:
            return "of an earlier session"
        void = _out_of_turn(self._member.decisions, number)
        if not void:
            self._member.decisions = number
        return void

    def _act(self, ref: entries.EventRef, entry: entries.Entry) -> str:
        """Change the state by an entry whose turn it is; or the reason why it is void."""
        state = self._state
        match entry:
            case entries.Event():
                if entry.unique and not self._store.is_first(entry.unique, ref, state.time):
                    return "accepted before"
            case entries.Replay():
                return "" if entry.plugin in state.plugins else "of an unknown plugin"
            case entries.Beat():
                for position in entry.positions:
                    if not self._not_held(position):
                        state.positions[position.plugin, position.shard] = position
                self._member.beat = replace(entry, positions=())
            case entries.Claim():
                return self._claim(entry)
            case entries.OfHolder():
                if void := self._not_held(entry):
                    return void
                if isinstance(entry, entries.Release):
                    self._free((entry.plugin, entry.shard), drained=True)
                elif isinstance(entry, entries.KeyValue):
                    self._store.put(entry.plugin, entry.key, entry.value)
                elif isinstance(entry, entries.Lost):
                    shard = (entry.plugin, entry.shard)
                    lost = dict.fromkeys((*state.lost.get(shard, ()), *entry.events))
                    state.lost[shard] = tuple(lost)[-entries.MAX_LOST :]
            case entries.Plugin():
                return self._describe(entry)
            case entries.EventType():
                return self._register(entry)
            case entries.VoidLeases():
                for shard in [*state.leases]:
                    self._free(shard, drained=False)
        return ""

    def _not_held(self, entry: entries.OfHolder) -> str:
        lease = self._state.leases.get((entry.plugin, entry.shard))
        if lease is None or lease.holder != self._host:
            return "not its holder"
        return "" if lease.epoch == entry.epoch else "of another epoch"

    def _claim(self, claim: entries.Claim) -> str:
        shard = (claim.plugin, claim.shard)
        known = self._state.plugins.get(claim.plugin)
        if known is None or claim.shard >= known.plugin.shards or known.plugin.placement != "one":
            return "of no shard that one host holds"
        expected = self._state.claim(shard)
        if claim.digest != expected.digest:
            return "of another version"
        if claim.holder != expected.holder:
            return f"held by {expected.holder}" if expected.holder else "it is free"
        if claim.cited != expected.cited and claim.holder != self._host:
            return "its holder has written since" if claim.holder else "it was held since"
        if shard in self._claimed:
            return "claimed by this message"  # its epoch, the place, would name two holdings
        self._claimed.add(shard)
        self._state.freed.pop(shard, None)
        self._state.leases[shard] = Lease(self._host, self._state.place)
        return ""

    def _describe(self, plugin: entries.Plugin) -> str:
        known = self._state.plugins.get(plugin.name)
        if plugin.removed:
            if known is None:
                return "of an unknown plugin"
            for number in range(known.plugin.shards):
                self._free((plugin.name, number), drained=False)
                self._state.positions.pop((plugin.name, number), None)
                self._state.lost.pop((plugin.name, number), None)
            del self._state.plugins[plugin.name]
            self._store.forget(plugin.name)
            self._forget_freed()
            return ""
        if void := self._too_much(plugin):
            return void
        if known is not None and (known.plugin.shards, known.plugin.placement) != (plugin.shards, plugin.placement):
            return "shards and placement change only with a removal"
        self._state.plugins[plugin.name] = Incarnation(plugin, known.began if known else self._state.place)
        return ""

    def _too_much(self, plugin: entries.Plugin) -> str:
        """Why a plugin is more than all hosts are to keep of it, if it is."""
        if sum(map(len, (*plugin.hooks, *plugin.labels))) > MAX_HOOKS:
            return "it wants too many events"
        plugins = self._state.plugins
        if plugin.name not in plugins:
            shards = plugin.shards + sum(one.plugin.shards for one in plugins.values())
            if shards > MAX_PLUGINS:
                return f"there are {MAX_PLUGINS} plugins and shards"
        return ""

    def _forget_freed(self) -> None:
        """Forget the oldest shards that were freed, of plugins that there are no more, beyond a bound.

        Whoever held one has read that long since: so many removals take more than the seconds of a lease.
        """
        freed, plugins = self._state.freed, self._state.plugins
        if len(freed) > 2 * MAX_PLUGINS:
            gone = sorted((one.place, shard) for shard, one in freed.items() if shard[0] not in plugins)
            for _, shard in gone[: len(freed) - 2 * MAX_PLUGINS]:
                del freed[shard]

    def _register(self, entry: entries.EventType) -> str:
        types = self._state.types
        known = types.get(entry.name)
        if entry.replaces != (known.digest if known is not None else ""):
            return "it has changed since" if known is not None else "it is gone"
        if entry.unread:
            for one in self._state.plugins.values():
                if entry.name in one.plugin.hooks:
                    return f"{one.plugin.name} subscribes to it"
        if entry.removed:
            types.pop(entry.name, None)
        elif known is None and len(types) >= MAX_TYPES:
            return f"there are {MAX_TYPES} event types"
        else:
            types[entry.name] = entry
        return ""

    def _free(self, shard: Shard, *, drained: bool) -> None:
        if self._state.leases.pop(shard, None) is not None:
            self._state.freed[shard] = Freed(self._state.place, drained)


def _out_of_turn(last: entries.Number, number: entries.Number) -> str:
    expected = last.number + 1 if number.series == last.series else 1
    if number.number == expected:
        return ""
    return "seen before" if number.number < expected else "after a gap"
