"""Handlers of the verbs with which an operator acts on deliveries: pauses, and events that wait."""

from __future__ import annotations

import time

from host.control.server import AnyEndpoint, Caller, Endpoint
from host.control.verbs import (
    ChangedEvent,
    EventCancel,
    EventJobs,
    EventRecover,
    EventRetry,
    EventSkip,
    PauseChange,
    PluginPause,
    PluginResume,
    Recovery,
    RecoveryJobs,
)
from host.delivery.dispatch import Dispatcher
from host.jobs import JOB, Jobs
from host.plugins.registry import Registry
from host.queue.interface import Changed, Result
from host.queue.sqlite import SqliteQueue
from isolator.audit.client import AuditClient
from isolator.audit.schema import EventCancelled, EventRetried, EventSkipped, PluginPaused, PluginResumed
from isolator.errors import UsageError


class OperationVerbs:
    """Deliveries as an operator changes them."""

    def __init__(
        self, queue: SqliteQueue, dispatcher: Dispatcher, registry: Registry, audit: AuditClient, jobs: Jobs
    ) -> None:
        self._queue, self._dispatcher, self._registry, self._audit = queue, dispatcher, registry, audit
        self._jobs = jobs

    def endpoints(self) -> list[AnyEndpoint]:
        """The verbs with their handlers."""
        return [
            Endpoint(PluginPause, self.pause),
            Endpoint(PluginResume, self.resume),
            Endpoint(EventRetry, self.retry),
            Endpoint(EventSkip, self.skip),
            Endpoint(EventCancel, self.cancel),
            Endpoint(EventRecover, self.recover),
            Endpoint(EventJobs, self.jobs),
        ]

    async def pause(self, request: PluginPause, caller: Caller) -> PauseChange:
        name = self._registry.need(request.name).name
        changed = await self._dispatcher.pause(name, caller.by)
        if changed:
            self._audit.record(PluginPaused(by=caller.by), plugin=name)
        return {"paused": True, "changed": changed}

    async def resume(self, request: PluginResume, caller: Caller) -> PauseChange:
        name = self._registry.need(request.name).name
        pause = await self._dispatcher.resume(name)
        if pause is not None:
            seconds = round(max(0.0, time.time() - pause.since), 3)
            self._audit.record(PluginResumed(by=caller.by, seconds=seconds), plugin=name)
        return {"paused": False, "changed": pause is not None}

    async def retry(self, request: EventRetry, caller: Caller) -> ChangedEvent:
        event_id = self._resolved(request.id, request.plugin)
        changed = await self._queue.retry(event_id, request.plugin)
        for one in changed:
            self._dispatcher.wake(one.plugin)
        return self._record(EventRetried, event_id, changed, caller)

    async def skip(self, request: EventSkip, caller: Caller) -> ChangedEvent:
        event_id = self._resolved(request.id, request.plugin)
        result = Result("skipped", "operator", f"skipped by {caller.by}")
        changed = await self._queue.end(event_id, request.plugin, result)
        return self._record(EventSkipped, event_id, changed, caller)

    async def cancel(self, request: EventCancel, caller: Caller) -> ChangedEvent:
        if request.id.startswith(JOB):
            job = await self._jobs.cancel(request.id)
            return {"id": job.id, "plugins": [job.plugin]}
        event_id = self._resolved(request.id)
        result = Result("cancelled", "operator", f"cancelled by {caller.by}")
        return self._record(EventCancelled, event_id, await self._queue.end(event_id, None, result), caller)

    async def recover(self, request: EventRecover, caller: Caller) -> Recovery:
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

    async def jobs(self, _: EventJobs, __: Caller) -> RecoveryJobs:
        return {
            "jobs": [
                {
                    "id": job.id,
                    "plugin": job.plugin,
                    "dead": bool(job.dead),
                    "missed": bool(job.missed),
                    "rate": job.rate,
                    "by": job.by,
                    "created": job.created,
                    "state": job.state,
                    "total": job.total,
                    "done": job.done,
                }
                for job in self._jobs.all()
            ]
        }

    def _resolved(self, text: str, plugin: str | None = None) -> str:
        """The id of the event, whose plugin has to be a registered one; raises NotFoundError, UsageError."""
        if plugin is not None:
            self._registry.need(plugin)
        return self._queue.resolve(text)

    def _record(
        self,
        kind: type[EventRetried | EventSkipped | EventCancelled],
        event_id: str,
        changed: list[Changed],
        caller: Caller,
    ) -> ChangedEvent:
        for one in changed:
            self._audit.record(
                kind(attempts=one.attempts, by=caller.by),
                plugin=one.plugin,
                event_id=event_id,
                delivery_id=f"{event_id}.{one.plugin}",
            )
        return {"id": event_id, "plugins": [one.plugin for one in changed]}
