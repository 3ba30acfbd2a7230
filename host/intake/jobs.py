"""Recovery jobs: deliveries of one plugin that were given up, or that it has missed, queued again at a steady rate.

A job goes through the events of a span of the queue in their order. Each step is one transaction that queues a few
deliveries and moves the job's mark past them: killed at any instant, it goes on behind the last one, and repeats none.
What it has queued is delivered, retried and given up as any other delivery; the job does not wait for it, except where
the plugin's queue is half full.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from host.database.store import Store
from host.events import Catalogue
from host.plugins.registry import Plugin, Registry
from host.queue import rows
from host.queue.interface import Event, Subscriber
from host.queue.owed import Debts, Owed, owed
from host.queue.sqlite import REPLAY_TTL, Requeued, SqliteQueue
from isolator.audit.schema import EventReplayed
from isolator.errors import NotFoundError, UnavailableError, UsageError
from isolator.ipc.tasks import Tasks

JOB = "job_"
"""Begin of a job's id."""
KEPT = 100
"""Jobs that are kept when they have ended."""
RUNNING = 16
"""Jobs that may run at one time."""
BEAT = 0.1
"""Seconds between two steps."""
AGAIN = 1.0
"""Seconds before another step while the database cannot be written."""
SPAN = 2000
"""Events that one step goes through at most."""
_EVENT = ", ".join(f"e.{column}" for column in rows.EVENT_COLUMNS)
_COLUMNS = "id, plugin, added, dead, missed, first, last, rate, by, created, state, total, done"


@dataclass(frozen=True)
class Job:
    """A recovery job; ``first`` is the number of the event that is next, ``last`` that of its last one."""

    id: str
    plugin: str
    added: float
    """When the plugin was added: another one of its name is not meant."""
    dead: bool
    missed: bool
    first: int
    last: int
    rate: float
    by: str
    created: float
    state: str
    """``running``, ``done`` or ``cancelled``."""
    total: int
    done: int


@dataclass(frozen=True)
class _Found:
    """A delivery that a step queues; ``attempts`` None: there was none."""

    event: Event
    subscriber: Subscriber
    attempts: int | None


class Jobs:
    """The recovery jobs of one host."""

    def __init__(
        self, store: Store, queue: SqliteQueue, registry: Registry, catalogue: Catalogue, debts: Debts
    ) -> None:
        self._store, self._queue, self._registry = store, queue, registry
        self._catalogue, self._debts = catalogue, debts
        self._tasks = Tasks()
        self._running: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Go on with the jobs that an earlier process has left; the plugins are known."""
        for job in self.all():
            if job.state == "running":
                self._run(job.id)

    def close(self) -> None:
        """Stop; the process that comes next goes on."""
        self._tasks.cancel()

    def all(self) -> list[Job]:
        """Every job that is kept, the newest first."""
        return [Job(*row) for row in self._store.rows(f"SELECT {_COLUMNS} FROM jobs ORDER BY created DESC, id")]

    async def plan(self, plugin: Plugin, since: float, *, dead: bool, missed: bool) -> Job:
        """Return the job that queues what was given up, or missed, since a Unix time; nothing is changed."""

        def span(db: sqlite3.Connection) -> tuple[float, int | None, int | None]:
            (added,) = db.execute("SELECT added FROM plugins WHERE name=?", (plugin.name,)).fetchone()
            ends = db.execute("SELECT min(seq), max(seq) FROM events WHERE accepted >= ?", (since,)).fetchone()
            return (added, *ends)

        await self._store.run(lambda _: None)  # a plugin that was added just now has its row
        added, first, last = await self._store.scan(span)
        job = Job("", plugin.name, added, dead, missed, first or 1, last or 0, 0.0, "", 0.0, "", 0, 0)
        total = 0
        for begin in range(job.first, job.last + 1, SPAN):
            part = replace(job, first=begin, last=min(job.last, begin + SPAN - 1))
            total += len(self._store.read(functools.partial(self._found, job=part)))
            await asyncio.sleep(0)
        return replace(job, total=total)

    async def begin(self, job: Job, rate: float, by: str) -> Job:
        """Keep a job that was planned, and begin with it."""
        if len(self._running) >= RUNNING:
            raise UsageError("recovery", f"{RUNNING} jobs are running", "isolator event jobs, and event cancel JOB")
        now = time.time()
        new_id = f"{JOB}{int(now):x}{os.urandom(4).hex()}"
        job = replace(job, id=new_id, rate=rate, by=by, created=now, state="running")
        row = tuple(getattr(job, name) for name in _COLUMNS.split(", "))

        def keep(db: sqlite3.Connection) -> None:
            db.execute(f"INSERT INTO jobs ({_COLUMNS}) VALUES ({','.join('?' * len(row))})", row)
            newest = "SELECT id FROM jobs ORDER BY created DESC LIMIT ?"
            db.execute(f"DELETE FROM jobs WHERE state != 'running' AND id NOT IN ({newest})", (KEPT,))

        await self._store.run(keep)
        self._run(job.id)
        return job

    async def cancel(self, text: str) -> Job:
        """Cancel the running job whose id begins so; what it has queued stays. Raises NotFoundError, UsageError."""
        found = [job for job in self.all() if job.id.startswith(text)]
        if not found:
            raise NotFoundError(f"job {text}", "is not kept", "see 'isolator event jobs'")
        if len(found) > 1:
            raise UsageError(f"job {text}", "several ids begin so", "write more of it")
        job = found[0]
        change = "UPDATE jobs SET state='cancelled' WHERE id=? AND state='running'"
        ended = await self._store.run(lambda db: db.execute(change, (job.id,)).rowcount)
        if not ended:
            raise UsageError(f"job {job.id}", f"is {job.state} already")
        return job

    def _run(self, job_id: str) -> None:
        task = self._running[job_id] = self._tasks.run(f"recovery {job_id}", self._work(job_id))
        task.add_done_callback(lambda _: self._running.pop(job_id, None))

    async def _work(self, job_id: str) -> None:
        owed = 0.0
        while True:
            job = self._job(job_id)
            if job is None or job.state != "running":
                return
            await asyncio.sleep(BEAT)
            if self._queue.consumer(job.plugin).depth >= self._queue.limit // 2:
                continue
            owed = min(owed + job.rate * BEAT, max(job.rate, 1.0))
            if owed >= 1.0:
                try:
                    owed -= await self._step(job_id, int(owed), job.by)
                except UnavailableError:  # nothing was written, and the daemon's alarms say why
                    await asyncio.sleep(AGAIN)

    def _job(self, job_id: str) -> Job | None:
        row = self._store.row(f"SELECT {_COLUMNS} FROM jobs WHERE id=?", (job_id,))
        return Job(*row) if row is not None else None

    async def _step(self, job_id: str, most: int, by: str) -> int:
        """Queue at most so many deliveries; returns how many."""
        now = time.time()

        def queue(db: sqlite3.Connection) -> list[_Found]:
            row = db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE id=? AND state='running'", (job_id,)).fetchone()
            if row is None:
                return []
            job = Job(*row)
            known = db.execute("SELECT added FROM plugins WHERE name=?", (job.plugin,)).fetchone()
            if known != (job.added,):
                db.execute("UPDATE jobs SET state='cancelled' WHERE id=?", (job_id,))
                return []
            upto = min(job.last, job.first + SPAN - 1)
            found = self._found(db, replace(job, last=upto))
            if len(found) > most:
                found = found[:most]
                upto = found[-1].event.seq
            for one in found:
                key = (one.event.seq, job.plugin)
                if one.attempts is None:
                    db.execute(
                        "INSERT INTO deliveries (seq, plugin, state, attempts, key, detail, updated)"
                        " VALUES (?,?,'queued',0,?,'recovered',?)",
                        (*key, one.subscriber.key, now),
                    )
                else:
                    db.execute(
                        "UPDATE deliveries SET state='queued', attempts=0, crashes=0, due=0, detail='recovered',"
                        " updated=? WHERE seq=? AND plugin=?",
                        (now, *key),
                    )
                db.execute("UPDATE events SET expires=max(expires, ?) WHERE seq=?", (now + REPLAY_TTL, one.event.seq))
            state = "done" if upto >= job.last else "running"
            db.execute(
                "UPDATE jobs SET first=?, done=done+?, state=? WHERE id=?", (upto + 1, len(found), state, job_id)
            )
            again = [(one, EventReplayed(reason=job_id, attempts=one.attempts or 0, by=by)) for one in found]
            records[:] = [owed(record, one.subscriber.plugin, one.event.id) for one, record in again]
            self._debts.note(db, records)
            return found

        found: list[_Found] = []
        records: list[Owed] = []
        await self._queue.requeue(lambda db: self._requeued(db, queue, found))
        self._debts.pay(records)
        return len(found)

    @staticmethod
    def _requeued(
        db: sqlite3.Connection, queue: Callable[[sqlite3.Connection], list[_Found]], found: list[_Found]
    ) -> list[Requeued]:
        found[:] = queue(db)  # the transaction may be tried again
        return [(one.event, one.subscriber) for one in found]

    def _found(self, db: sqlite3.Connection, job: Job) -> list[_Found]:
        """The deliveries that a job has to queue, in order."""
        plugin = self._registry.get(job.plugin)
        if plugin is None:
            return []
        found = []
        for row in db.execute(
            f"SELECT {_EVENT}, d.state, d.attempts FROM events e LEFT JOIN deliveries d ON d.seq=e.seq AND d.plugin=?"
            " WHERE e.seq BETWEEN ? AND ? AND (d.seq IS NULL OR d.state IN ('dead', 'expired')) ORDER BY e.seq",
            (job.plugin, job.first, job.last),
        ):
            *columns, state, attempts = row
            event = rows.read_event(tuple(columns))
            kind = self._catalogue.get(event.name) if event is not None else None
            if event is None or kind is None or not (job.missed if state is None else job.dead):
                continue
            if state is None and not self._queue.has_missed(db, job.plugin, event.seq):
                continue
            to = self._registry.subscriber(plugin, kind, json.loads(event.payload))
            if to is not None:
                found.append(_Found(event, to, attempts if state is not None else None))
        return found
