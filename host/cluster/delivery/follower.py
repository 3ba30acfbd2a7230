"""The work of a host's queue with the log that its node reads (``host.cluster.node.Follower``).

Of each shard that this host holds, and of each plugin of which every host has its own copy, there is a cursor. The
lanes of others are empty: their deliveries are another host's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from host.cluster.delivery.cursor import MOST_ENDED, Cursor, Held, Own
from host.cluster.delivery.mine import Names
from host.cluster.delivery.places import BEGIN, END, Subscriptions
from host.cluster.delivery.queue import ClusterQueue
from host.cluster.delivery.replies import Replies
from host.cluster.delivery.unread import GONE, UNREAD, Loss, bounded, lose, losses, ranges, since, told
from host.cluster.entries import Beat, Ended, Event, EventRef, Lost, Plugin, Position, Range, Release, Replay
from host.cluster.fold import Applied, Shard, State
from host.cluster.log import LogUnavailableError
from host.cluster.node import Node
from host.fence.fences import Fences
from host.queue.interface import Delivery, Result
from isolator.ipc.tasks import Tasks

_log = logging.getLogger(__name__)

DRAIN: Final = 30.0
"""Seconds for which a release waits for replies."""
AGAIN: Final = 1.0
"""Seconds until the log is asked for the same decision again."""
_WHY = 1000
"""Characters of the reason why a delivery was given up."""


class TypesFollower:
    """Whoever keeps the event types that the log has; see ``Follower`` for the first four."""

    def applied(self, db: sqlite3.Connection, entries: Sequence[Applied]) -> None: ...

    def kept(self, entries: Sequence[Applied]) -> None: ...

    def again(self, db: sqlite3.Connection) -> None: ...

    def left(self, db: sqlite3.Connection) -> None: ...

    def follow(self, *, complete: bool = False) -> None:
        """Have this host know what the fold has; ``complete``: the log was read, what it does not have is gone."""


class QueueFollower:
    """The ``Follower`` of this host, which keeps its cursors and lanes in step with the log.

    ``ready`` names the plugins that this host could hold: it has the version that the cluster uses. ``lost_events``
    gets what its plugins will never get. ``types`` follows the log beside it.
    """

    def __init__(
        self,
        queue: ClusterQueue,
        subscriptions: Subscriptions,
        ready: Callable[[], Sequence[str]],
        fences: Fences,
        lost_events: Callable[[Sequence[Loss]], None],
        types: TypesFollower,
    ) -> None:
        self._queue, self._subscriptions, self._ready, self._fences = queue, subscriptions, ready, fences
        self._lost_events, self._types = lost_events, types
        self._here: set[str] = set()
        """Plugins that this host has."""
        self._before: set[str] = set()
        """Plugins among them that are its own unless the log knows them."""
        self._mine, self._alone = Names(queue.store, "cluster_mine"), Names(queue.store, "cluster_alone")
        """Plugins here that are, or were, the cluster's; and those that the log did not know when it was read."""
        self._node: Node
        self._held: dict[Shard, Held] = {}
        self._own: dict[str, Own] = {}
        self._acting = self._is_read = False
        self._place = 0
        self._draining: set[Shard] = set()
        self._lacking: dict[str, list[Range]] = {}
        """Events that this host does not have, by the plugin that it could hold otherwise."""
        self._state: State | None = None
        self._tasks = Tasks()

    def attach(self, node: Node) -> None:
        """Follow a node, before it begins to read."""
        self._node, queue = node, self._queue
        queue.emit, queue.places.fold = node.emit, lambda: node.state
        queue.replies = Replies(queue.store, node)
        queue.on_final, queue.subscribers = self._on_final, self._subscriptions
        queue.is_of_one, queue.is_cut_off = self._is_of_one, lambda: not self._acting
        queue.may_act, queue.has_ended, queue.kept_back = self.may_act, self.has_ended, node.kept_back

    def close(self) -> None:
        """Wait for no decision any more."""
        self._tasks.cancel()

    def may_act(self, plugin: str) -> bool:
        """Whether a plugin may be sent anything at the moment."""
        if self._is_of_one(plugin):
            return self._acting and self.holds(plugin)
        return plugin in self._node.state.plugins or plugin in self._alone

    def holds(self, plugin: str) -> bool:
        """Whether this host has the work of a plugin: it holds a shard of it, or every host has its own copy."""
        return not self._is_of_one(plugin) or any(shard[0] == plugin for shard in self._held)

    def epoch(self, plugin: str) -> tuple[int, int] | None:
        """A shard that this host holds of a plugin, and its epoch: what other entries about the plugin go by."""
        return next(((one.shard[1], one.epoch) for one in self._of(plugin)), None)

    # What the node reads

    def applied(self, db: sqlite3.Connection, place: int, time: float, entries: Sequence[Applied]) -> None:
        self._queue.places.apply(db, place, time, entries)
        self._types.applied(db, entries)

    def kept(self, place: int, time: float, entries: Sequence[Applied]) -> None:
        if place <= self._place:  # the log is read once more
            for own in self._own.values():
                own.at, own.behind = BEGIN, True
        self._place = place
        if self._node.state is not self._state:
            self._state = self._node.state
            self._consider()
            self.tell()
        self._types.kept(entries)
        counted = [one for one in entries if not one.void]
        events = sum(isinstance(one.entry, Event | Replay) for one in counted)
        if events:
            self._queue.count(events)
            reads = self._queue.places.at(place)
            for cursor in [*self._cursors()]:
                cursor.offer(reads)
        for one in counted:
            if isinstance(one.entry, Beat):
                self._read_back(one)
            elif isinstance(one.entry, Plugin):
                self._described(one.entry)
        self._queue.look()

    def _read_back(self, one: Applied) -> None:
        assert isinstance(one.entry, Beat)
        if one.ref.host != self._node.host:
            return
        for position in one.entry.positions:
            held = self._held.get((position.plugin, position.shard))
            if held is not None and held.epoch == position.epoch:
                held.read_back(position)
                self._gate(held.plugin)

    def _described(self, plugin: Plugin) -> None:
        if plugin.removed:
            self._lose(plugin.name, bounded(self._lacking.pop(plugin.name, [])), UNREAD)
            self._forget_own(plugin.name)
            self._look_whose(plugin.name)
        else:
            self._follow(plugin)
            if self._acting:
                self._look_whose(plugin.name)
        self._gate(plugin.name)
        self.look()

    def _follow(self, plugin: Plugin) -> None:
        """Go by what the log has of a plugin."""
        if plugin.placement != "one":
            self._begin_own(plugin.name)
            return
        if not self.holds(plugin.name):
            # What a copy of its own has begun goes on in no epoch.
            (self._fences.lost if plugin.name in self._own else self._fences.bind)(plugin.name)
        self._hand_over(plugin.name)

    def _consider(self) -> None:
        """Go by a fold that was not read entry by entry."""
        state = self._node.state
        for name in self._here:
            if name in state.plugins:
                self._follow(state.plugins[name].plugin)
                if state.plugins[name].plugin.placement == "all":
                    self._fences.free(name)
            self._gate(name)

    def read_up(self) -> None:
        self._is_read = True
        self._consider()
        for plugin in self._here:
            self._begin_own(plugin)

    def held(self, shard: Shard, epoch: int, position: Position) -> None:
        before = self._held.pop(shard, None)
        if before is not None:
            self._queue.move(before.open.values())
        places, state = self._queue.places, self._node.state
        known = state.plugins[shard[0]]
        self._draining.discard(shard)
        cursor = self._held[shard] = Held(shard, epoch, position, self._queue, self._subscriptions, self._gave_up)
        places.hold(shard, epoch)
        gone, found = bounded(ranges(cursor.lost)), self._queue.store.read(lambda db: since(db, known))
        unread = bounded(places.unread(found, position))
        cursor.pass_over(unread)
        self._lose(shard[0], gone, GONE)
        self._lose(shard[0], unread, UNREAD)
        if gone or unread:
            entry = Lost(*shard, epoch, (*gone, *unread))
            self._tasks.run(f"what {shard[0]} has lost", self._decide(cursor, entry))
        cursor.begin()
        self._gate(shard[0])
        self.look()

    def lost(self, shard: Shard, why: str) -> None:
        cursor = self._held.pop(shard, None)
        self._draining.discard(shard)
        if cursor is not None:
            self._queue.move([*cursor.open.values()])
            self._gate(shard[0])

    def renumbered(self, db: sqlite3.Connection, events: Sequence[tuple[EventRef, EventRef]]) -> None:
        self._queue.places.renumbered(db, events)

    def again(self, db: sqlite3.Connection) -> None:
        self._queue.places.again(db)
        self._types.again(db)

    def adopted(self, db: sqlite3.Connection, before: State) -> None:
        self._queue.places.adopted(db, before)
        self._types.again(db)

    def left(self, db: sqlite3.Connection) -> None:
        self._mine.clear(db)
        self._alone.clear(db)
        self._types.left(db)

    def fenced(self, over: bool) -> None:
        self._acting = not over
        if not over:
            self._types.follow(complete=True)
            for plugin in self._here:
                self._look_whose(plugin)
        for plugin in {*self._here, *(shard[0] for shard in self._held)}:
            self._gate(plugin)
        self._queue.look()

    async def drain(self, shard: Shard) -> None:
        held = self._held.get(shard)
        if held is None:
            return
        self._draining.add(shard)
        self._gate(held.plugin)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN):
                while self._held.get(shard) is held and not held.is_settled:
                    self._node.changed()
                    await self._queue.settled()

    def positions(self) -> Sequence[Position]:
        return [position for held in self._held.values() if (position := held.to_write()) is not None]

    def here(self) -> Sequence[str]:
        return [*self._here]

    def ready(self) -> Sequence[str]:
        ready = [*self._ready()]
        known = self._node.state.plugins
        self._lacking = self._queue.places.lacking(one for one in ready if one in known and self._is_of_one(one))
        return [name for name in ready if name not in self._lacking]

    def lacking(self) -> Sequence[str]:
        return [*self._lacking]

    # What is lost

    def _lose(self, plugin: str, lost: Sequence[Range], why: str) -> None:
        """Keep that a plugin never gets events, and tell it once that is on disk."""
        if lost:
            self._queue.store.submit(lambda db: lose(db, plugin, lost, why), lambda _, __: self.tell())

    def tell(self) -> None:
        """Tell of what is lost and was not told yet, be it from before a restart."""
        found = self._queue.store.read(losses)
        if found:
            self._lost_events(found)
            self._queue.store.submit(lambda db: told(db, found))

    # Cursors

    def _cursors(self) -> Iterator[Cursor]:
        yield from self._held.values()
        yield from self._own.values()

    def _of(self, plugin: str) -> Iterator[Held]:
        return (one for one in self._held.values() if one.plugin == plugin)

    def _is_of_one(self, plugin: str) -> bool:
        known = self._node.state.plugins.get(plugin)
        return known.plugin.placement == "one" if known is not None else plugin in self._mine

    def has_ended(self, plugin: str) -> bool:
        """Whether a plugin that this host has was the cluster's, and is that no more: nobody delivers to it."""
        return plugin in self._mine and plugin not in self._node.state.plugins

    @property
    def ended(self) -> list[str]:
        """Names of such plugins."""
        return sorted(filter(self.has_ended, self._here))

    def _look_whose(self, plugin: str) -> None:
        """Note that a plugin of this host is the cluster's, or was; the log was read so far that this is known."""
        if plugin not in self._here:
            return
        if plugin in self._node.state.plugins:
            self._mine.add(plugin)
        elif plugin in self._mine:
            self._forget_own(plugin)
            self._fences.lost(plugin)
        elif plugin in self._before:
            self._alone.add(plugin)
            self._fences.free(plugin)

    def serve(self, plugin: str, *, before: bool = False) -> None:
        """Take note of a plugin that this host has, or that has changed.

        ``before``: it was here when this process began, and no command has given it to the cluster.
        """
        self._here.add(plugin)
        if before:
            self._before.add(plugin)
        if self._acting or self.has_ended(plugin):
            self._look_whose(plugin)
        self._begin_own(plugin)
        if not self.may_act(plugin) and "left" not in self._node.problems.lines:
            self._fences.bind(plugin)
        self._gate(plugin)
        self.look()

    def forget(self, plugin: str) -> None:
        """Take note of a plugin that this host has no more."""
        self._here.discard(plugin)
        self._before.discard(plugin)
        self._mine.discard(plugin)
        self._alone.discard(plugin)
        self._forget_own(plugin)

    def _forget_own(self, plugin: str) -> None:
        """Read no further for a plugin as for one of which every host has its own copy."""
        own = self._end_own(plugin)
        if own is not None:
            self._queue.move([*own.open.values()])

    def _end_own(self, plugin: str) -> Own | None:
        own = self._own.pop(plugin, None)
        if own is not None:
            self._queue.store.submit(lambda db: db.execute("DELETE FROM cluster_read WHERE plugin=?", (plugin,)))
        return own

    def _hand_over(self, plugin: str) -> None:
        """Have one host deliver what waits here for a plugin of which this host had its own copy."""
        own, queue = self._end_own(plugin), self._queue
        if own is None:
            return
        replays = own.replays()

        def handed_over(_: object, error: Exception | None) -> None:
            if error is None:
                queue.move([*own.open.values()])
            else:  # they wait in the lane until this host has the plugin
                _log.error("%d events for %s are not handed over: %s", len(replays), plugin, error)

        queue.store.submit(lambda db: [queue.emit(db, one) for one in replays], handed_over)

    def _begin_own(self, plugin: str) -> None:
        """Begin with a plugin of which this host has its own copy, as every host has, or as the cluster knows none."""
        if plugin in self._own or self._is_of_one(plugin):
            return
        state = self._node.state
        known = state.plugins.get(plugin)
        began = known.began if known is not None else state.place
        at = self._queue.places.own(plugin)
        if at is None:
            if known is None and not self._is_read:
                return  # nobody knows where the log ends
            at = (began, END)
            self._queue.places.begin_own(plugin, at)
        self._own[plugin] = Own(plugin, self._queue, self._subscriptions, at)
        self._own[plugin].catch_up()

    def look(self) -> None:
        """Release the shards of plugins that this host can no longer hold, or lacks the labels for."""
        state, labels = self._node.state, {*self._node.settings.labels}
        ready = {name for name in self._ready() if name not in state.plugins or state.plugins[name].fits(labels)}
        for held in [*self._held.values()]:
            if held.plugin not in ready and held.shard not in self._draining:
                self._draining.add(held.shard)
                self._gate(held.plugin)
                self._tasks.run(f"release of {held.plugin}", self._release(held))
        self._node.changed()

    def _gate(self, plugin: str) -> None:
        """Give a plugin no delivery while this host may make none, it drains, or a move would repeat too many."""
        shards = [*self._of(plugin)]
        closed = not self.may_act(plugin) or sum(one.unconfirmed for one in shards) >= MOST_ENDED
        self._queue.lane(plugin).hold_back(closed or any(one.shard in self._draining for one in shards))

    # Outcomes

    def _on_final(self, delivery: Delivery, result: Result) -> None:
        for cursor in (*self._of(delivery.plugin), *filter(None, [self._own.get(delivery.plugin)])):
            if cursor.ref_of(delivery.seq) is not None:
                ref = cursor.ended(delivery, result)
                if ref is not None and isinstance(cursor, Held):
                    self._end(cursor, ref, result.state, result.detail or "")
                if isinstance(cursor, Held):
                    self._gate(cursor.plugin)
                    self._node.changed()
                return

    def _end(self, held: Held, ref: EventRef, state: str, why: str) -> None:
        entry = Ended(*held.shard, held.epoch, ref, state, why[:_WHY])
        self._tasks.run(f"end of a delivery to {held.plugin}", self._have_ended(held, entry))

    def _gave_up(self, held: Held, ref: EventRef, state: str) -> None:
        self._end(held, ref, state, "given up before this host was started again")

    async def _have_ended(self, held: Held, entry: Ended) -> None:
        if await self._decide(held, entry):
            held.close(entry.event)
            self._node.changed()

    async def _release(self, held: Held) -> None:
        await self.drain(held.shard)
        await self._decide(held, Release(*held.shard, held.epoch))

    async def _decide(self, held: Held, entry: Ended | Lost | Release) -> bool:
        """Have the log decide something about a shard while it is held; whether it counts."""
        while self._held.get(held.shard) is held:
            try:
                return not (await self._node.decide(entry)).void
            except LogUnavailableError as error:
                _log.info("%s of %s waits: %s", entry.kind, held.plugin, error)
                await asyncio.sleep(AGAIN)
        return False
