"""The queue of this host, which follows the cluster's log."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Protocol

from host.cluster.entries import EventRef, Position
from host.cluster.fold import Applied, Shard, State


class Follower(Protocol):
    """The queue of this host, which follows the log. All methods are called on the event loop, in the log's order.

    What is behind, because a lane was full, reads the log by itself (``Node.log``): the fold waits for nobody.
    """

    def applied(self, db: sqlite3.Connection, place: int, time: float, entries: Sequence[Applied]) -> None:
        """Write rows that follow from a message, in the transaction that keeps the fold.

        It runs again with the same arguments when the transaction fails, so it changes the database alone; an error
        of it ends the reading.
        """

    def kept(self, place: int, time: float, entries: Sequence[Applied]) -> None:
        """Act on a message, once, after that transaction: the database has it, and survives this process."""

    def renumbered(self, db: sqlite3.Connection, events: Sequence[tuple[EventRef, EventRef]]) -> None:
        """Know events that this host has accepted by other numbers: in the log others have the old. As ``applied``."""

    def again(self, db: sqlite3.Connection) -> None:
        """Forget how far the log was read: it is folded from its beginning, and some is known. As ``applied``.

        Every shard was lost before.
        """

    def adopted(self, db: sqlite3.Connection, before: State) -> None:
        """Go on from a copy of the fold at a later place, which has taken the place of ``before``. As ``applied``.

        What stands between is not in the log any more: this host has never read it.
        """

    def left(self, db: sqlite3.Connection) -> None:
        """Keep as this host's own what it has from the cluster and needs without it: it leaves, ``again`` follows."""

    def read_up(self) -> None:
        """Know that the log was read to the end that it had; what this host emits in this life stands behind."""

    def held(self, shard: Shard, epoch: int, position: Position) -> None:
        """Begin with a shard: the own claim was read back, or, after a start, the lease from before it still stands.

        Called after ``kept`` of the claim. ``position`` is the fold's: what the last beat of its holder came to.
        """

    def lost(self, shard: Shard, why: str) -> None:
        """End with a shard at once: another's claim, a void, a removal, or nobody knows. What is open becomes moved.

        Also called for a shard whose release was read back.
        """

    def fenced(self, over: bool) -> None:
        """Send nothing and answer no call from now on: this host's deadline is over; or, if not ``over``, go on."""

    async def drain(self, shard: Shard) -> None:
        """Begin nothing new of a shard; return when nothing of it is in flight, or has been for too long."""

    def positions(self) -> Sequence[Position]:
        """Positions that have changed since they were taken here last; beats carry them until they are read back.

        After ``held`` the shard's position counts as changed.
        """

    def here(self) -> Sequence[str]:
        """Names of the plugins that this host has, the cluster's or not."""

    def ready(self) -> Sequence[str]:
        """Names of the plugins that this host could hold: it has the cluster's version, and they are enabled."""

    def lacking(self) -> Sequence[str]:
        """Names of those that it could hold if it had the events that wait for them."""
