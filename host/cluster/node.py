"""A host of a cluster: it reads the log, folds it, and writes what this host decides.

``Node`` is what the rest of the host process has of the cluster; a ``Follower`` is what the queue does with it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Protocol

from host.cluster.entries import Entry, Event, EventRef, Position, Replay
from host.cluster.fold import Applied, Shard, State


class Fences(Protocol):
    """Until when this host's plugins may act, as broker and supervisor keep it beside the host."""

    def hold(self, plugin: str, until: float) -> None:
        """Let a plugin act until a time of CLOCK_BOOTTIME; each later call moves it on."""

    def free(self, plugin: str) -> None:
        """Bind a plugin to no time: it is not the cluster's any more."""

    def lost(self, plugin: str) -> None:
        """Let a plugin act no more: another host holds it, or may. Its cages are ended, frozen as they may be."""


class Follower(Protocol):
    """The queue of this host, which follows the log. All methods are called on the event loop, in the log's order."""

    def applied(self, db: sqlite3.Connection, place: int, time: float, entries: Sequence[Applied]) -> None:
        """Write rows that follow from a message, in the transaction that keeps the fold.

        It runs again with the same arguments when the transaction fails, so it changes the database alone; what it
        raises ends the process.
        """

    def kept(self, place: int, time: float, entries: Sequence[Applied]) -> None:
        """Act on a message, once, after that transaction: the database has it, and survives this process."""

    def held(self, shard: Shard, epoch: int, position: Position) -> None:
        """Begin with a shard: the own claim was read back, or, after a start, the lease from before it still stands.

        Called after ``kept`` of the claim. ``position`` is the fold's: what the last beat of its holder came to.
        """

    def lost(self, shard: Shard, why: str) -> None:
        """End with a shard at once: another's claim, a void, a removal, or nobody knows. What is open becomes moved.

        Also called for a shard whose release was read back.
        """

    def paused(self, acting: bool) -> None:
        """Send nothing and answer no call from now on, or again (``acting``): the deadline of this host is over."""

    def positions(self) -> Sequence[Position]:
        """Positions that have changed since they were taken here last; the next beat carries them.

        They are taken again if they were not read back: after ``held``, and whenever a beat got lost with its session.
        """

    def ready(self) -> Sequence[str]:
        """Names of the plugins that this host could hold: it has the cluster's version of them, and they are enabled."""


class Node(Protocol):
    """This host in its cluster."""

    host: str
    state: State

    def emit(self, db: sqlite3.Connection, entry: Event | Replay) -> EventRef:
        """Number an event for all hosts, in the caller's transaction, which may run again; durable when that is.

        Raises OutboxFullError, which leaves the transaction usable.
        """

    async def decide(self, entry: Entry) -> Applied:
        """Write a decision; returns its fate when it was read back.

        Raises LogUnavailableError when that takes too long: whether it counts is unknown then, as after a lost reply.
        """

    def changed(self) -> None:
        """Have the next beat sent soon (0.2 s): positions or readiness have changed."""

    def may_act(self, plugin: str) -> bool:
        """Whether a plugin's shards that this host holds may be acted on now."""
