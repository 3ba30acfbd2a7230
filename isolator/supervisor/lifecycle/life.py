"""The task that owns the runs of one plugin, each from the first journal entry to the last group removed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

from isolator.audit.schema import PluginCrashed, PluginFailed, PluginQuarantined, PluginStopped
from isolator.cage.processes import CageExit
from isolator.errors import NotApprovedError
from isolator.ipc.messages import Environment, Origin, PluginState
from isolator.ipc.tasks import Tasks, report, unless
from isolator.supervisor.ends import Ended, Ends
from isolator.supervisor.preparing import origin_of, prepare_run, reason_of, start_record
from isolator.supervisor.rest import Waits
from isolator.supervisor.run import Run, RunContext

if TYPE_CHECKING:
    from isolator.supervisor.lifecycle.plugin import Plugin


class Life:
    """Start, watch, back off, give up: for as long as the plugin is wanted."""

    def __init__(self, plugin: Plugin, context: RunContext) -> None:
        self._plugin, self._context = plugin, context
        self.ends = Ends()
        self.wanted = False
        self.stopping = asyncio.Event()
        """The run is to end, however far its start has come."""
        self.stop_reason = ""
        self.end_backoff = asyncio.Event()
        self.verdict: asyncio.Future[str] | None = None
        """Outcome of the trial that is under way."""
        self.waits = Waits()
        """The task waits for something that takes as long as it takes; it can be given up and begun again."""
        self.reason = ""
        """The reason of the start that comes next, or was the last."""
        self.backoff_until: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._tasks = Tasks()

    @property
    def over(self) -> bool:
        """Whether there is no task."""
        return self._task is None or self._task.done()

    def begin(self, reason: str, run: Run | None = None, backoff_until: float | None = None) -> None:
        """Begin the task; ``run``, or a back-off that ends then, is from before an exec."""
        self.wanted = True
        life = self._supervise(reason, run, backoff_until)
        self._task = self._tasks.run(f"life of plugin {self._plugin.name}", life)

    def begin_again(self, why: str) -> float | None:
        """Begin the task after a fault of this daemon; returns the seconds until the start."""
        self.wanted = True
        pause = self._after_fault(why)
        if pause is not None:
            self.begin("restart after a crash", backoff_until=asyncio.get_running_loop().time() + pause)
        return pause

    async def ended(self) -> None:
        """Wait for the end of the task."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _opened(self) -> None:
        """Wait while the daemon comes to rest, unless the run is to stop."""
        if self._context.rest.coming:
            await unless(self.stopping, self._context.rest.opened())

    async def _supervise(self, reason: str, run: Run | None = None, backoff_until: float | None = None) -> None:
        """Run it for as long as it is wanted. ``run``, or a back-off that ends then, is from before an exec."""
        try:
            if backoff_until is not None:
                await self._pause_until(backoff_until)
            while self.wanted:
                self.reason = reason
                if run is None and self._plugin.fence.closed:
                    with self.waits:
                        await unless(self.stopping, self._plugin.fence.opened())
                    continue
                try:
                    retry = await self._run_once(reason, run)
                except Exception as error:  # whatever it was: one that is wanted must not stay away in silence
                    report(asyncio.get_running_loop(), f"life of plugin {self._plugin.name}", error)
                    retry = self._after_fault(reason_of(error))
                run = None
                if retry is None:
                    break
                reason = self.reason = "restart after a crash"
                self.end_backoff.clear()
                await self._pause_until(asyncio.get_running_loop().time() + retry)
        finally:
            self._conclude_trial("it was stopped")
        self.wanted = False
        if self._plugin.state != PluginState.FAILED:
            self._plugin.set_state(self._plugin.idle_state())

    async def _run_once(self, reason: str, run: Run | None) -> float | None:
        """One run, from start to end; returns the seconds to the next one, or None when there shall be none."""
        ended = await self._one_run(reason, run)
        expected = not self.wanted
        retry = None if expected or self._failed_trial(ended.why) else self._after_crash(ended)
        if ended.exit is not None:
            self._context.host.run_ended(
                self._plugin.name, ended.run, ended.exit, origin=ended.origin, state=self._plugin.state,
                expected=expected, retry_in=retry,
            )  # fmt: skip
        return retry

    async def _pause_until(self, until: float) -> None:
        """Wait until then, or until an operator ends the back-off; and while the daemon comes to rest."""
        self.backoff_until = until
        with self.waits:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.end_backoff.wait(), until - asyncio.get_running_loop().time())
            await self._opened()
        self.backoff_until = None
        if self.wanted:
            self._plugin.restarts += 1
            self._plugin.set_state(PluginState.STARTING)

    def _failed_trial(self, why: str) -> bool:
        if self.verdict is None or self.verdict.done():
            return False
        self._plugin.error = why
        self._plugin.set_state(PluginState.STOPPED)
        self._conclude_trial(why)
        return True

    def _conclude_trial(self, outcome: str) -> None:
        if self.verdict is not None and not self.verdict.done():
            self.verdict.set_result(outcome)

    def _steady(self) -> None:
        """The run is up and stays: how those before it ended is over."""
        self._conclude_trial("")
        if self._plugin.error:
            self._plugin.error = ""
            self._plugin.announce_change()

    def _after_crash(self, ended: Ended) -> float | None:
        """Note an end that nobody wanted; returns the seconds to wait, or None when too many of them count."""
        assert self._plugin.effective is not None
        limits, why = self._plugin.effective.restart, ended.why
        self.ends.note(ended, limits.window)
        if ended.hopeless:
            self._plugin.error = why
            self._plugin.set_state(PluginState.FAILED)
            self._context.audit.record(PluginFailed(reason=why), plugin=self._plugin.name)
            return None
        count = len(self.ends.crashes)
        if ended.counts and count >= limits.crashes:
            self._plugin.error = f"{why}; {count} crashes in {limits.window / 60:g} minutes"
            self._plugin.set_state(PluginState.FAILED)
            record = self._context.audit.record
            record(PluginFailed(reason=self._plugin.error), plugin=self._plugin.name)
            why = f"crashed too often; waits for 'isolator plugin start {self._plugin.name}'"
            record(PluginQuarantined(reason=why, crashes=count, seconds=limits.window), plugin=self._plugin.name)
            return None
        return self._back_off(why)

    def _after_fault(self, why: str) -> float | None:
        """Note that this daemon failed with a run or its end; returns as ``_after_crash``."""
        if not self.wanted or self._failed_trial(why):
            return None
        self.ends.others += 1
        return self._back_off(why)

    def _back_off(self, why: str) -> float:
        assert self._plugin.effective is not None
        self._plugin.error = why
        self._plugin.set_state(PluginState.BACKOFF)
        return self.ends.pause(self._plugin.effective.restart)

    async def _one_run(self, reason: str, run: Run | None = None) -> Ended:
        """Build one cage, or take over ``run``; watch it to its end, take everything down."""
        assert self._plugin.effective is not None
        run_id = run.id if run is not None else os.urandom(5).hex()
        try:
            if run is None:
                with self.waits:
                    environment = await unless(self.stopping, self._environment())
                if environment is None:
                    return Ended(run_id, None, Origin.OPERATOR)
                run = self._plugin.run = await prepare_run(
                    self._context,
                    self._plugin.registration,
                    self._plugin.effective,
                    self._plugin.argv,
                    run_id,
                    environment,
                    port=self._plugin.port,
                    talks=self._plugin.mode == "mcp",
                )
                listener = run.for_start.add(self._context.host.listen(self._plugin.name, run.cage.spec.uid).detach())
                if not await run.cage.start(self.stopping):
                    return Ended(run_id, None, Origin.OPERATOR)  # nothing of it has run
                self._started(run, reason, listener)
            with self.waits:
                await run.watch(
                    self.stopping,
                    on_ready=self._plugin.announce_change,
                    on_steady=self._steady,
                    drain=lambda: self._context.host.drain(self._plugin.name, run_id, self.stop_reason),
                )
                await self._opened()
            end = await run.ended()
            origin = run.origin if self.wanted else Origin.OPERATOR
            self._record_end(run, end, origin, await self._context.host.stderr_tail(self._plugin.name, run_id))
            counts = origin == Origin.PLUGIN and not (run.reached and end.cause == "exit")
            return Ended(run_id, end, origin, counts=counts, up=run.socket_there.is_set())
        except Exception as error:  # whatever it was: a start that ended in silence would be waited for without end
            why = reason_of(error)
            origin = origin_of(error)
            crashed = PluginCrashed(cause="did not start", origin=origin, reason=why)
            self._context.audit.record(crashed, plugin=self._plugin.name, run=run_id)
            hopeless = isinstance(error, NotApprovedError)
            return Ended(run_id, None, origin, why, counts=origin == Origin.PLUGIN, hopeless=hopeless)
        finally:
            self._plugin.run, self._plugin.outdated, self._plugin.lacking = None, "", ""
            if self._plugin.state == PluginState.RUNNING:
                self._plugin.set_state(PluginState.STOPPING)
            if run is not None:
                await run.take_down()

    async def _environment(self) -> Environment:
        """Wait until the trail can be written and the host is up, which knows the config; return that."""
        if self._context.wait_for_trail:
            await self._context.audit.writable()
        return await self._context.host.environment(self._plugin.name)

    def _started(self, run: Run, reason: str, calls: int) -> None:
        from isolator.audit.client import utc_now

        run.started_at = utc_now()
        run.began = asyncio.get_running_loop().time()
        started = start_record(run, self._plugin.registration.release, reason)
        self._context.audit.record(started, plugin=self._plugin.name, run=run.id, urgent=True)
        listener, run.cage.listener = run.cage.listener, -1
        run.answer_denied(listener)
        if not self.stopping.is_set():
            self._plugin.set_state(PluginState.RUNNING)
            self.ends.others = 0
        self._context.host.run_started(self._plugin.name, run.id, run.cage.pid, run.pipes, calls)
        run.release_start()
        self._context.fences.started(self._plugin.name, run)

    def _record_end(self, run: Run, end: CageExit, origin: Origin, stderr_tail: tuple[str, ...]) -> None:
        self._plugin.record_usage()
        kind = PluginCrashed if self.wanted else PluginStopped
        ended = kind(cause=end.cause, origin=origin, stderr=list(stderr_tail), **end.figures)
        # Urgent: on its way before the journal forgets the run. If we die between, nobody else would tell.
        self._context.audit.record(ended, plugin=self._plugin.name, run=run.id, urgent=True)
