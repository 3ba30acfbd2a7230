"""Handlers of the ``event`` verbs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

from host.control import event_types
from host.control.endpoints import AnyEndpoint, Caller, QuickEndpoint, Reply, Verbs, serves
from host.delivery.dispatch import Dispatcher
from host.events import OPERATIONAL, Catalogue
from host.intake.intake import EventIntake
from host.intake.jobs import JOB, Jobs
from host.plugins.registry import Registry
from host.queue.interface import FINAL, Accepted, DeliveryRow, EventRow, Result
from host.queue.owed import Change, Debts
from host.queue.sqlite import SqliteQueue
from isolator.audit.schema import EventCancelled, EventReplayed, EventRetried, EventSkipped
from isolator.errors import UsageError


class EventVerbs(Verbs):
    """Events: emitted, followed, replayed; and their deliveries, as an operator changes them."""

    def __init__(
        self,
        intake: EventIntake,
        queue: SqliteQueue,
        dispatcher: Dispatcher,
        registry: Registry,
        catalogue: Catalogue,
        debts: Debts,
        jobs: Jobs,
    ) -> None:
        self._intake, self._queue, self._dispatcher, self._registry = intake, queue, dispatcher, registry
        self._catalogue, self._debts, self._jobs = catalogue, debts, jobs

    def endpoints(self) -> list[AnyEndpoint]:
        """The verbs with their handlers."""
        intake, hurry = self._intake, self._queue.store.commit_alone
        return [
            *super().endpoints(),
            QuickEndpoint(event_types.EventEmit, self.emit, full=intake.full, room=intake.room, hurry=hurry),
        ]

    def emit(self, request: event_types.EventEmit, caller: Caller, reply: Reply) -> None:
        def done(accepted: Accepted | None, error: Exception | None) -> None:
            if accepted is None:
                reply(None, error)
                return
            answer: dict[str, Any] = {
                "id": accepted.event.id,
                "plugins": list(accepted.plugins),
                "overflowed": list(accepted.overflowed),
                "duplicate": accepted.duplicate,
            }
            if kept_back := self._queue.kept_back():
                answer["kept_back"] = kept_back
            reply(answer, None)

        person = request.on_behalf_of
        if request.name.startswith(OPERATIONAL):
            raise UsageError(f"event {request.name}", "is the daemon's own", "emit one whose name begins otherwise")
        self._intake.emit(
            request.name,
            request.payload,
            done,
            by=f"console:{person}" if caller.is_console and person else caller.by,
            on_behalf_of=None if caller.is_console else person,
            dedupe_key=request.dedupe_key,
            ttl=request.ttl,
            trace=request.trace,
        )

    @serves(event_types.EventWait)
    async def wait(self, request: event_types.EventWait, _: Caller) -> event_types.Event:
        event_id = self._queue.resolve(request.id)
        row = await self._queue.wait(event_id, timeout=request.timeout)
        return self._with_reasons(await self._queue.complete(row))

    @serves(event_types.EventList)
    async def list_newest(self, request: event_types.EventList, _: Caller) -> event_types.Events:
        name = self._catalogue.need(request.event).name if request.event is not None else None
        if request.plugin is not None:
            self._registry.need(request.plugin)
        rows = await self._queue.list_events(
            limit=request.limit, name=name, since=request.since, plugin=request.plugin, state=request.state,
            brief=request.brief,
        )  # fmt: skip
        return {"events": [_event(row) for row in rows]}

    @serves(event_types.EventShow)
    async def show(self, request: event_types.EventShow, _: Caller) -> event_types.Event:
        return self._with_reasons(await self._queue.complete(self._queue.show(self._queue.resolve(request.id))))

    def _with_reasons(self, row: EventRow) -> event_types.Event:
        """The event, each delivery that waits with the reason."""
        event = _event(row)
        for delivery in event["deliveries"]:
            if delivery["state"] not in FINAL:
                delivery["holding"] = self._dispatcher.status(delivery["plugin"])["holding"]
        return event

    @serves(event_types.EventDead)
    async def dead(self, request: event_types.EventDead, _: Caller) -> event_types.Deliveries:
        if request.plugin is not None:
            self._registry.need(request.plugin)
        rows = await self._queue.list_dead(plugin=request.plugin, limit=request.limit)
        return cast(event_types.Deliveries, {"deliveries": [_fields(row) for row in rows]})

    @serves(event_types.EventReplay)
    async def replay(self, request: event_types.EventReplay, caller: Caller) -> event_types.ChangedEvent:
        event_id = self._resolved(request.id, request.plugin)
        change = self._debts.of_event(
            event_id, lambda one: EventReplayed(reason="operator", attempts=one.attempts, by=caller.by)
        )
        with change:
            plugins = await self._queue.replay(event_id, request.plugin, change.note)
        if not plugins:
            raise UsageError(f"event {event_id}", "no delivery of it was given up", "name a --plugin to repeat one")
        return {"id": event_id, "plugins": plugins}

    @serves(event_types.EventRetry)
    async def retry(self, request: event_types.EventRetry, caller: Caller) -> event_types.ChangedEvent:
        event_id = self._resolved(request.id, request.plugin)
        change = self._recorded(EventRetried, event_id, caller)
        with change, self._of_this_host(event_id, request.plugin):
            changed = await self._queue.retry(event_id, request.plugin, change.note)
        for one in changed:
            self._dispatcher.wake(one.plugin)
        return {"id": event_id, "plugins": [one.plugin for one in changed]}

    @serves(event_types.EventSkip)
    async def skip(self, request: event_types.EventSkip, caller: Caller) -> event_types.ChangedEvent:
        event_id = self._resolved(request.id, request.plugin)
        result = Result("skipped", "operator", f"skipped by {caller.by}")
        return await self._end(EventSkipped, event_id, request.plugin, result, caller)

    @serves(event_types.EventCancel)
    async def cancel(self, request: event_types.EventCancel, caller: Caller) -> event_types.ChangedEvent:
        if request.id.startswith(JOB):
            job = await self._jobs.cancel(request.id)
            return {"id": job.id, "plugins": [job.plugin]}
        event_id = self._resolved(request.id)
        result = Result("cancelled", "operator", f"cancelled by {caller.by}")
        return await self._end(EventCancelled, event_id, None, result, caller)

    async def _end(
        self, kind: type[EventSkipped | EventCancelled], event_id: str, plugin: str | None, result: Result,
        caller: Caller,
    ) -> event_types.ChangedEvent:  # fmt: skip
        change = self._recorded(kind, event_id, caller)
        with change, self._of_this_host(event_id, plugin):
            changed = await self._queue.end(event_id, plugin, result, change.note)
        return {"id": event_id, "plugins": [one.plugin for one in changed]}

    @serves(event_types.EventRecover)
    async def recover(self, request: event_types.EventRecover, caller: Caller) -> event_types.Recovery:
        plugin = self._registry.need(request.plugin)
        both = not request.dead and not request.missed
        dead, missed = request.dead or both, request.missed or both
        if not request.rate:
            raise UsageError("rate", "must be more than nothing", "such as 20")
        job = await self._jobs.plan(plugin, request.since, dead=dead, missed=missed)
        if request.dry_run or not job.total:
            return {"job": None, "plugin": plugin.name, "count": job.total}
        begun = await self._jobs.begin(job, request.rate, caller.by)
        return {"job": begun.id, "plugin": plugin.name, "count": begun.total}

    @serves(event_types.EventJobs)
    async def jobs(self, _: event_types.EventJobs, __: Caller) -> event_types.RecoveryJobs:
        keys = event_types.RecoveryJob.__annotations__
        found = [
            {key: getattr(job, key) for key in keys} | {"dead": bool(job.dead), "missed": bool(job.missed)}
            for job in self._jobs.all()
        ]
        return {"jobs": cast(list[event_types.RecoveryJob], found)}

    @contextlib.contextmanager
    def _of_this_host(self, event_id: str, plugin: str | None) -> Iterator[None]:
        """Say which host has a delivery that waits, where none of this host's does."""
        try:
            yield
        except UsageError:
            for one in self._queue.show(event_id).deliveries:
                if one.host is not None and one.state not in FINAL and plugin in (None, one.plugin):
                    why = f"its delivery to {one.plugin} is {one.host}'s"
                    raise UsageError(f"event {event_id}", why, f"run it on {one.host}") from None
            raise

    def _resolved(self, text: str, plugin: str | None = None) -> str:
        """The id of the event, whose plugin has to be a registered one; raises NotFoundError, UsageError."""
        if plugin is not None:
            self._registry.need(plugin)
        return self._queue.resolve(text)

    def _recorded(
        self, kind: type[EventRetried | EventSkipped | EventCancelled], event_id: str, caller: Caller
    ) -> Change:  # fmt: skip
        return self._debts.of_event(event_id, lambda one: kind(attempts=one.attempts, by=caller.by))


def _event(row: EventRow) -> event_types.Event:
    fields = {**_fields(row), "deliveries": [_fields(delivery) for delivery in row.deliveries]}
    del fields["size"]
    if not row.cut:
        del fields["cut"]
    return cast(event_types.Event, fields)


def _fields(row: EventRow | DeliveryRow) -> dict[str, Any]:
    """The fields by name; ``dataclasses.asdict`` copies deeply, which takes a millisecond for fifty deliveries."""
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
