"""Database of the host: transactions on the event loop, durability beside it.

SQLite in WAL mode. All operations of one turn of the event loop are written in one transaction, which costs some twenty
microseconds because nothing is synced there; then a sync of the write-ahead log is begun (``host.database.wal``), whose
end tells the loop up to which transaction the log is on disk. While a sync runs the next transactions gather behind
it, so many of them share the next sync: group commit. An operation that must be safe before its caller goes on (an
accepted event, a config value) waits for that mark; one that may be repeated (the outcome of a delivery: at-least-once)
only rides along.

``synchronous=FULL`` does the same, except that SQLite would sync inside COMMIT and hold up the loop, and that
a writer thread that holds the connection would fight the loop for the interpreter lock once per row.
``synchronous=NORMAL`` stays on, for the order of writes when the log is restarted and when it is checkpointed.

After a failed sync the kernel may have dropped the pages it could not write, so nothing written since can be
called safe: the process logs that and exits; its supervisor starts a new one, which recovers, moves the log into
the database with a full checkpoint, and goes on. A checkpoint is made after so many commits, whether anything of them
has to be durable or not, and when the log takes too large a part of the disk; it never holds up the loop.

Before a sync counts, the files have to be those that the next start will find: when somebody removed, replaced, cut or
overwrote one, all that the connection knows is written to a new file in the database's place, and the process ends as
after a failed sync.

When the disk is full the log is moved into the database all the same, which gives its space back: some space is
reserved for that in a file beside the database, and writes are tried again until they succeed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from host.database import files
from host.database.schema import INDEX, MIGRATIONS, SCHEMA
from host.database.wal import Sync, WriteAheadLog
from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.formats import TABLES

T = TypeVar("T")
Apply = Callable[[sqlite3.Connection], Any]
_log = logging.getLogger(__name__)

CHECKPOINT_COMMITS = 250
CHECKPOINT_ROWS = 4000
CHECKPOINT_LEAST = 8
"""Commits between two checkpoints at least, however large the log is: a reader may keep it from shrinking."""
RESCUE_EVERY = 1.0
"""Seconds between two checkpoints of a full disk."""
LAZY = 0.002
"""Seconds that the outcome of a delivery may wait for company. Lost in a crash, it means one more delivery."""
RETRY = 0.1
"""Seconds between attempts while the database cannot be written (disk full, locked by somebody)."""
GIVE_UP = 5.0
"""Seconds after which an awaited write fails; writes that are not awaited are kept and retried."""

_NOTHING_LOST = "make room on its disk, or mend that, then it starts by itself; nothing is lost"


@dataclass
class _Op:
    """An operation that waits for a transaction, or for the sync of its own."""

    apply: Apply
    done: Callable[[Any, Exception | None], None] | None
    durable: bool
    deadline: float
    meanwhile: Callable[[], None] = lambda: None
    result: Any = None


class Store:
    """Database of one host process; all methods belong to the event loop's thread."""

    def __init__(self, path: Path, *, fatal: Callable[[str], None] | None = None, made: Apply | None = None) -> None:
        """Open a database, or make one; ``made`` is called in the transaction that makes its tables."""
        self.path, self._made = path, made
        self.blocked: str | None = None
        """Why the database cannot be written at the moment, else None."""
        self.unblocked = asyncio.Event()
        self.unblocked.set()
        self.commits = self.syncs = 0
        self._loop = asyncio.get_running_loop()
        self._fatal = fatal or exit_after_failed_sync
        self._ops: list[_Op] = []
        self._scheduled: asyncio.Handle | None = None
        """The next commit, but for that of the lazy operations."""
        self._alone = False
        """Whether that commit is for the next turn, and nothing else of this turn can share its transaction."""
        self._lazy: asyncio.TimerHandle | None = None
        self._gathering: list[_Op] = []
        self._in_sync: list[_Op] = []
        """Operations of the sync that is under way, or was the last."""
        self._syncing = False
        self._checkpoint: Sync[_Op] | None = None
        """The newest checkpoint, if it is under way."""
        self._checkpointed = (0, 0)
        self._rescued = 0.0
        """Loop time of the newest checkpoint of a full disk."""
        self._closed = False
        self._reserve = files.Reserve(f"{path}-reserve")
        self._reserve.release()
        self._connection = self._open()
        self._reserve.hold()
        self._wal = WriteAheadLog[_Op](path, self._reserve, self._synced, self._release, self._writing)
        self._wal_high = self._wal.high()

    def _open(self) -> sqlite3.Connection:
        files.check_file(self.path)
        try:
            connection = files.connect(self.path)
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > TABLES:
                why = f"was written by a newer version (schema {version}, this one knows {TABLES})"
                raise IsolatorError(str(self.path), why, "install that version again; nothing was changed")
            damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]  # some 30 ms for 50 000 events
            if damage != "ok":
                raise IsolatorError(str(self.path), f"is damaged: {damage.splitlines()[-1]}", files.RESTORE)
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            if mode != "wal":
                raise IsolatorError(str(self.path), f"journal mode {mode} instead of wal", "use a local file system")
            if version < TABLES:
                steps = SCHEMA if version == 0 else "".join(MIGRATIONS[v] for v in range(version, TABLES))
                # One transaction: interrupted at any instant, it is the old version or the new one.
                connection.execute("BEGIN IMMEDIATE")
                for step in steps.split(";"):
                    connection.execute(step)
                if version == 0 and self._made is not None:
                    self._made(connection)
                connection.execute(f"PRAGMA user_version={TABLES}")
                connection.execute("COMMIT")
            found = connection.execute("SELECT sql FROM sqlite_master WHERE name='deliveries_given_up'").fetchone()
            if found != (INDEX,):
                connection.executescript(f"BEGIN IMMEDIATE;DROP INDEX IF EXISTS deliveries_given_up;{INDEX};COMMIT;")
            # Writes that an earlier process never synced are made safe before anything is added behind them.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            # One harmless write, so that the log file exists for the thread to open.
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA user_version={TABLES}")
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            remedy = files.RESTORE if files.is_damage(error) else _NOTHING_LOST
            if "locked" in str(error):
                remedy = "end what holds it (see 'fuser')"
            raise IsolatorError(str(self.path), f"cannot be used as the host's database: {error}", remedy) from None
        connection.execute("PRAGMA wal_autocheckpoint=0")
        return connection

    def submit(
        self,
        apply: Apply,
        done: Callable[[Any, Exception | None], None] | None = None,
        *,
        durable: bool = False,
        lazy: bool = False,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Run ``apply`` in the next transaction; ``lazy`` waits a moment (``LAZY``) for others to share it with.

        ``done(result, error)`` is called on the loop: after the commit, or when ``durable``, once it is on disk, and
        ``meanwhile`` before that, for ``wal.WRITING`` seconds, where it delays nothing. An operation without ``done``
        never fails: it is retried until the database can be written.
        """
        self._ops.append(_Op(apply, done, durable, self._loop.time() + GIVE_UP, meanwhile))
        if not lazy:
            self.flush_soon()
        elif self._scheduled is None and self._lazy is None:
            self._lazy = self._loop.call_later(LAZY, self._commit_lazy)  # not anew after each commit before it

    def flush_soon(self) -> None:
        """Commit all that is submitted in the loop's next turn, the lazy operations with the others."""
        if self._scheduled is None:
            # asyncio has no interface for that; all that waited for this turn is in there by now.
            self._alone = not (self._syncing or self._loop._ready)  # type: ignore[attr-defined]
            self._scheduled = self._loop.call_soon(self.commit)

    def commit_alone(self) -> None:
        """Commit what is due a turn early, if nothing else of this turn can share it, and no sync is under way."""
        if self._alone:
            self._loop._ready.remove(self._scheduled)  # type: ignore[attr-defined] # or the loop turns before it rests
            self.commit()

    async def committed(self) -> None:
        """Return once all that is submitted so far is in the log: at once, unless the database cannot be written now.

        In the log it survives the end of this process, though not yet that of the machine.
        """
        self.commit()
        written = not self._ops
        while not written:
            future: asyncio.Future[bool] = self._loop.create_future()
            self.submit(lambda _: True, _into(future))
            with contextlib.suppress(UnavailableError):
                written = await future

    async def durable(self) -> None:
        """Return once every durable operation that is committed by now is on disk; nothing is written for that.

        Raises UnavailableError if the sync fails.
        """
        waiting = self._gathering or (self._in_sync if self._syncing else None)
        if waiting is None:
            return
        future: asyncio.Future[None] = self._loop.create_future()
        waiting.append(_Op(lambda _: None, _into(future), True, math.inf))
        await future

    async def run(self, apply: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``apply`` in a transaction and wait until it is on disk."""
        future: asyncio.Future[T] = self._loop.create_future()
        self.submit(apply, _into(future), durable=True)
        return await future

    def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Run a short query on the loop's own connection, which sees every commit, synced or not."""
        try:
            return query(self._connection)
        except sqlite3.DatabaseError as error:
            self._end_if_damaged(error)
            raise

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """The rows of a short query, as ``read`` reads."""
        return self.read(lambda db: db.execute(query, values).fetchall())

    def row(self, query: str, values: Sequence[Any] = ()) -> Any:
        """The first row of a short query, None if there is none."""
        return self.read(lambda db: db.execute(query, values).fetchone())

    def make(self, tables: str) -> None:
        """Make tables, unless they are there, while nothing is served yet: another's lock of a moment is waited for."""
        wait = int(files.OPENING * 1000)

        def apply(db: sqlite3.Connection) -> None:
            db.execute(f"PRAGMA busy_timeout={wait}")
            try:
                db.executescript(tables)
            finally:
                db.execute("PRAGMA busy_timeout=0")

        self.read(apply)

    async def scan(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Run a query of any length, in another thread on a connection of its own, so that the loop goes on."""

        def work() -> T:
            with contextlib.closing(files.connect(self.path)) as connection:
                connection.execute("PRAGMA query_only=1")
                return query(connection)

        return await asyncio.to_thread(work)

    async def copy(self, target: Path, at: Callable[[], None]) -> None:
        """Write a copy as of one turn of the loop, in which ``at`` is called: all that was submitted before is in it.

        Raises sqlite3.Error and OSError.
        """
        self.commit()
        while self._ops:
            await self.committed()
        source = files.connect(self.path)
        try:
            source.execute("BEGIN")
            source.execute("SELECT count(*) FROM sqlite_master").fetchall()  # from here on it sees no later commit
            at()
        except BaseException:
            source.close()
            raise
        await asyncio.to_thread(files.copy, source, target)

    def _commit_lazy(self) -> None:
        self._lazy = None
        self.commit()

    def commit(self) -> None:
        """Commit all that is submitted; what cannot be written now is tried again until it can."""
        if self._scheduled is not None:
            self._scheduled.cancel()  # or it is this one
        self._scheduled, self._alone = None, False
        if not self._ops or self._closed or self._held:
            return None
        ops, self._ops = self._ops, []
        # When one operation fails by itself the others must not suffer: then each gets its own savepoint.
        for isolated in (False, True):
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                failed = self._apply(ops, isolated)
                self._connection.execute("COMMIT")
                break
            except sqlite3.OperationalError as error:
                self._rollback()
                if files.is_full(error):
                    self._rescue()
                return self._postpone(ops, str(error))
            except sqlite3.DatabaseError as error:
                self._rollback()
                self._end_if_damaged(error)
                if isolated:
                    raise
            except Exception:  # an operation's own error is reported to its caller on the isolated round
                self._rollback()
                if isolated:
                    raise
        self.commits += 1
        if self.blocked is not None:
            self.blocked = None
            self.unblocked.set()
        waiting = []
        for op in ops:
            if op in failed:
                continue
            if op.durable:
                waiting.append(op)
            elif op.done is not None:
                op.done(op.result, None)
        for op in failed:
            if op.done is not None:
                op.done(None, op.result)
        self._gathering += waiting
        if waiting or self._checkpoint_due:
            self._start_sync()
        return None

    @property
    def _held(self) -> bool:
        """Whether commits wait for the checkpoint that is under way."""
        return self._checkpoint is not None and (self._checkpoint.hold or self._wal.size > self._wal_high)

    @property
    def _checkpoint_due(self) -> bool:
        commits, rows = self._checkpointed
        return self._checkpoint is None and (
            self.commits - commits >= CHECKPOINT_COMMITS
            or self._connection.total_changes - rows >= CHECKPOINT_ROWS
            or (self.commits - commits >= CHECKPOINT_LEAST and self._wal.size > self._wal_high)
        )

    def _rescue(self) -> None:
        """Give the space of the log back to a full disk, if that was not done just now."""
        if not self._syncing and self._loop.time() - self._rescued > RESCUE_EVERY:
            self._rescued = self._loop.time()
            self._syncing = True
            self._in_sync = []
            self._checkpoint = Sync(self._in_sync, checkpoint=True, hold=True, rescue=True)
            self._wal.begin(self._checkpoint)

    def _apply(self, ops: list[_Op], isolated: bool) -> list[_Op]:
        failed = []
        for op in ops:
            if not isolated:
                op.result = op.apply(self._connection)
                continue
            self._connection.execute("SAVEPOINT one")
            try:
                op.result = op.apply(self._connection)
            except sqlite3.OperationalError:
                raise
            except Exception as error:  # the operation's own error, which its caller gets by done()
                self._connection.execute("ROLLBACK TO one")
                op.result = error
                failed.append(op)
            self._connection.execute("RELEASE one")
        return failed

    def _end_if_damaged(self, error: sqlite3.DatabaseError) -> None:
        # Whatever is written into a damaged file may be lost. The next start reports the damage.
        if error.sqlite_errorcode in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            self._fatal(f"{self.path}: is damaged: {error}")

    def _rollback(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("ROLLBACK")

    def _postpone(self, ops: list[_Op], why: str) -> None:
        if self.blocked is None:
            self.blocked = why
            self.unblocked.clear()
        now = self._loop.time()
        keep: list[_Op] = []
        over = []
        for op in ops:
            if op.done is not None and now > op.deadline:
                over.append(op.done)
            else:
                keep.append(op)
        self._ops = keep + self._ops
        for done in over:  # only now: who is told may write, which comes behind what is kept
            done(None, UnavailableError(str(self.path), f"cannot be written: {why}", "free the disk or the lock"))
        if self._ops and self._scheduled is None:
            self._scheduled = self._loop.call_later(RETRY, self.commit)

    def _start_sync(self, *, one_has_ended: bool = False) -> None:
        """Begin the sync that operations wait for; a checkpoint that is due begins where a sync has ended.

        So it takes its turn from nobody who waits alone, and under load it has its turn all the same; with any sync
        once the log is large.
        """
        checkpoint = self._checkpoint_due and (one_has_ended or not self._gathering or self._wal.size > self._wal_high)
        if self._syncing or not (self._gathering or checkpoint):
            return
        self._syncing = True
        job, self._gathering = Sync(self._gathering), []
        self._in_sync = job.ops
        if checkpoint:
            self._checkpointed = (self.commits, self._connection.total_changes)
            job.checkpoint = True
            self._wal_high = self._wal.high()
            job.hold = self._wal.size > self._wal_high
            self._checkpoint = job
        self._wal.begin(job, alone=not one_has_ended)

    @staticmethod
    def _writing(ops: list[_Op]) -> None:
        for op in ops:
            op.meanwhile()

    def _start_checkpoint(self) -> None:
        if not self._closed:
            self._start_sync(one_has_ended=True)

    def _release(self, job: Sync[_Op]) -> None:
        if self._checkpoint is job:
            self._checkpoint = None
            self.commit()

    def _synced(self, ops: list[_Op], error: OSError | None, harm: str | None) -> None:
        if harm is not None:
            self._move(ops, harm)
            return
        self._syncing = False
        self.syncs += 1
        if error is not None:
            self._fail(ops, f"cannot be synced: {error.strerror}")
            self._fatal(f"{self.path}: sync failed: {error.strerror}")
            return
        if self._gathering:
            self._start_sync(one_has_ended=True)
        for op in ops:
            if op.done is not None:
                op.done(op.result, None)
        if self._checkpoint_due:
            self._loop.call_soon(self._start_checkpoint)  # behind what tells of these

    def _fail(self, ops: list[_Op], why: str) -> None:
        for op in ops:
            if op.done is not None:
                op.done(None, UnavailableError(str(self.path), why, "see the disk"))

    def _move(self, ops: list[_Op], harm: str) -> None:
        """Save all that the connection knows in a new file in the database's place, and end: see the module."""
        self._closed = True
        try:
            became = files.save_elsewhere(self._connection, self.path, self._wal.fd, self._wal.identity)
        except (OSError, sqlite3.Error) as error:
            became = f"its content could not be saved ({error}), and accepted events may be lost"
        self._fail(ops, harm)
        self._fatal(f"{harm}; {became}")

    async def close(self) -> bool:
        """Write and sync all that is submitted, and close; the log is moved into the database.

        Returns whether all of it was written; if not, ``blocked`` names the reason. Operations that are submitted once
        it closes are never run.
        """
        if self._closed:
            return not self._ops
        # Neither a sync nor a checkpoint that commits wait for may be under way, or this commit would not be let in.
        while self.blocked is None and (self._ops or self._gathering or self._syncing or self._held):
            with contextlib.suppress(UnavailableError):
                await self.run(lambda _: None)
        self._checkpoint = None
        self.commit()
        self._closed = True
        written = not self._ops
        await self._wal.close()
        self._connection.close()
        return written


def _into(future: asyncio.Future[Any]) -> Callable[[Any, Exception | None], None]:
    """Return what gives the outcome of an operation to a future, unless nobody awaits it any more."""

    def done(result: Any, error: Exception | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(result)

    return done


def exit_after_failed_sync(why: str) -> None:
    """End this process at once."""
    _log.critical("%s; stopping, because nothing written since can be called safe", why)
    os._exit(1)
