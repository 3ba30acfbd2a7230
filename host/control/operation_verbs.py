"""Handlers of the verbs with which an operator acts on deliveries: pauses, and events that wait."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

from host.control import event_types
from host.control.elsewhere import Elsewhere
from host.control.endpoints import Caller, Verbs, serves
from host.control.plugin_types import PauseChange, PluginPause, PluginResume
from host.delivery.dispatch import Dispatcher
from host.intake.jobs import JOB, Jobs
from host.plugins.registry import Registry
from host.queue.interface import FINAL, Result
from host.queue.owed import Change, Debts
from host.queue.sqlite import SqliteQueue
from isolator.audit.schema import EventCancelled, EventRetried, EventSkipped
from isolator.errors import UsageError


class OperationVerbs(Verbs):
    """Deliveries as an operator changes them."""

    def __init__(
        self,
        queue: SqliteQueue,
        dispatcher: Dispatcher,
        registry: Registry,
        debts: Debts,
        jobs: Jobs,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self._queue, self._dispatcher, self._registry, self._debts = queue, dispatcher, registry, debts
        self._jobs, self._elsewhere = jobs, elsewhere or Elsewhere()

    @serves(PluginPause)
    async def pause(self, request: PluginPause, caller: Caller) -> PauseChange:
        name = self._registry.need(request.name).name
        changed = await self._dispatcher.pause(name, caller.by)
        return {"paused": True, "changed": changed, "holders": [*self._elsewhere.holders(name)]}

    @serves(PluginResume)
    async def resume(self, request: PluginResume, caller: Caller) -> PauseChange:
        name = self._registry.need(request.name).name
        changed = await self._dispatcher.resume(name, caller.by) is not None
        return {"paused": False, "changed": changed, "holders": [*self._elsewhere.holders(name)]}

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
