"""Life cycle of one plugin's sidecar: start, watch, stop, back off, give up.

The host requests a start when an event waits, or for an operator. Once started it is wanted until it is stopped: a
crash is followed by a restart after a back-off (exponential with jitter); too many crashes in the window and it is
``failed``, kept and shown, until an operator starts it again. Only the plugin's own doing counts for that, and an exit
code after events had reached it does not: that is a failed attempt, which the host repeats and in the end gives up.
A trial is the start of a new version: watched until it
is up, and not repeated when it fails, so that the version before can come back.

One run at a time, and one task that owns it from the first journal entry to the last group removed. Whoever starts,
stops or exchanges a version holds the plugin's lock (``plugins.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from isolator.audit.schema import (
    PluginCrashed,
    PluginFailed,
    PluginQuarantined,
    PluginStopped,
    Resources,
)
from isolator.cage.processes import CageExit
from isolator.errors import (
    DeniedError,
    IsolatorError,
    NotApprovedError,
    UnavailableError,
    UsageError,
)
from isolator.ipc.messages import Environment, Origin, PluginState, StartInvocation
from isolator.ipc.tasks import Tasks, report, unless
from isolator.supervisor.ends import Ended, Ends
from isolator.supervisor.invocations import MODE as EXEC
from isolator.supervisor.invocations import Invocation, Invocations
from isolator.supervisor.preparing import adopt_run, origin_of, prepare_run, reason_of, start_record
from isolator.supervisor.rest import Waits
from isolator.supervisor.run import Run, RunContext

if TYPE_CHECKING:
    from isolator.ipc.handover import PluginKept
    from isolator.launcher.client import Launcher
    from isolator.policy.model import EffectivePolicy
    from isolator.registration.proposals import Loaded
    from isolator.registration.store import Registration


T = TypeVar("T")


class Plugin:
    """One registered plugin, and its run if it has one. ``changed`` is called with it after each change of state."""

    registration: Registration
    effective: EffectivePolicy | None
    argv: list[str]
    manifest: dict[str, Any]
    mode: str
    """``transport.mode`` of the manifest"""
    port: int | None
    """``transport.port``, likewise"""
    state: PluginState
    error: str

    def __init__(self, context: RunContext, loaded: Loaded, changed: Callable[[Plugin], None]) -> None:
        self.run: Run | None = None
        self.restarts = 0
        self.notice = ""
        """The fault of its policy file while an earlier content of it stays in force."""
        self.outdated = ""
        """Files and folders in its run's view that the host has replaced since."""
        self.lacking = ""
        """Layers that its run, which is older than this image of the daemon, came without."""
        self.on_trial = False
        """Whether the version in use is not judged yet."""
        self.invocations = Invocations(context, loaded.registration.name)
        self.fence = context.fences.of(loaded.registration.name)
        """Until when it may act."""
        self._context, self._on_change = context, changed
        self._unwanted = Ends()
        self._tasks = Tasks()
        self._task: asyncio.Task[None] | None = None
        self._settled = asyncio.Condition()
        """Notified after each change of state."""
        self._wanted = False
        self._end_backoff = asyncio.Event()
        self._stop = asyncio.Event()
        """The run is to end, however far its start has come."""
        self._stop_reason = ""
        self._verdict: asyncio.Future[str] | None = None
        """Outcome of the trial that is under way."""
        self._waits = Waits()
        """The task waits for something that takes as long as it takes; it can be given up and begun again."""
        self._reason = ""
        """Of the start that comes next, or was the last."""
        self._backoff_until: float | None = None
        self.adopt(loaded)

    @property
    def name(self) -> str:
        return self.registration.name

    @property
    def version(self) -> str:
        return self.registration.version

    @property
    def wanted(self) -> bool:
        """Whether the sidecar runs, or will by itself."""
        return self._wanted and self._task is not None and not self._task.done()

    def adopt(self, loaded: Loaded) -> None:
        """Switch to another version or policy. The plugin must not be running."""
        assert self.run is None and not self.invocations.runs
        self.registration, self.manifest, self.argv = loaded.registration, loaded.manifest, loaded.argv
        self.mode, self.port = loaded.mode, loaded.port
        self.effective = loaded.proposal.effective if loaded.proposal else None
        self.error, self.notice = loaded.error, ""
        self._unwanted.forget()
        self.state = self._idle_state()

    def set_enabled(self, registration: Registration) -> None:
        """Take over a registration that was enabled or disabled, and forget earlier failures."""
        self.registration = registration
        if not self.wanted:
            self._unwanted.forget()
            self.error = "" if self.effective is not None else self.error
            self._set(self._idle_state())

    def _idle_state(self) -> PluginState:
        if self.effective is None:
            return PluginState.REJECTED
        return PluginState.STOPPED if self.registration.enabled else PluginState.DISABLED

    # --- start and stop --------------------------------------------------------------------------------------

    async def wait_running(self) -> Run:
        """Return the running run, after a start or a back-off in progress; raises when nothing comes of it.

        Starts that fail for a reason of the daemon's or the operator's are tried for ever; whoever waits is answered
        after as many of them as a plugin's own would have.
        """
        async with self._settled:
            await self._settled.wait_for(lambda: self.state not in _PASSING or self._fails_to_start())
        if self.state != PluginState.RUNNING or self.run is None:
            raise UnavailableError(
                f"plugin {self.name}", self.error or f"is {self.state}", "see 'isolator plugin show'"
            )
        return self.run

    def _fails_to_start(self) -> bool:
        limits = self.effective.restart if self.effective is not None else None
        return self.state == PluginState.BACKOFF and limits is not None and self._unwanted.others >= limits.crashes

    @property
    def runs(self) -> list[Run]:
        """The runs that have a cage: its own, and those of its invocations."""
        return [*([self.run] if self.run is not None and self.run.cage.started else []), *self.invocations.runs]

    def check_allowed(self) -> None:
        """Raise IsolatorError if nothing of it may be started."""
        self._context.fences.check(self.name)
        if self.state in _REMEDIES:
            raise DeniedError(
                f"plugin {self.name}", self.error or f"is {self.state}", _REMEDIES[self.state].format(self.name)
            )

    def begin_invocation(self, request: StartInvocation, stdin: int) -> Invocation:
        """Begin an invocation, with its standard input, which stays the caller's; raises IsolatorError."""
        self.check_allowed()
        if self.mode != EXEC or self.effective is None:
            raise DeniedError(f"plugin {self.name}", "its mode is not exec", "nothing was started")
        return self.invocations.begin(self.registration, self.effective, self.argv, request, stdin)

    def start(self, reason: str) -> None:
        """Start the sidecar unless it is started; raises IsolatorError when it may not run."""
        self.check_allowed()
        if self.mode == EXEC:
            raise UsageError(f"plugin {self.name}", "has the mode exec: each event starts its program", "emit one")
        if self.state == PluginState.FAILED:
            if reason != "operator":
                raise IsolatorError(f"plugin {self.name}", self.error, f"isolator plugin start {self.name}")
            self._unwanted.forget()
        if reason == "operator":
            self._unwanted.others = 0  # what made earlier starts fail may be mended: wait for new ones
            self._end_backoff.set()
        if self._task is None or self._task.done():
            self._wanted = True
            self._stop.clear()
            self.error = ""
            self._set(PluginState.STARTING)
            self._task = self._tasks.run(f"life of plugin {self.name}", self._supervise(reason))

    async def try_version(self, reason: str) -> str:
        """Start a new version and watch until it is up; returns why it failed, empty when it did not."""
        if self.mode == EXEC or self.fence.closed:
            return ""  # an event shows it
        self._verdict = asyncio.get_running_loop().create_future()
        try:
            self.start(reason)
            return await self._verdict
        finally:
            self._verdict = None

    async def stop(self, reason: str) -> None:
        """Stop the run and want none; returns when everything of it is removed."""
        self._wanted = False
        self._stop_reason = reason
        self._end_backoff.set()
        self._stop.set()
        if self._task is not None and not self._task.done():
            if self.state in (PluginState.STARTING, PluginState.RUNNING):
                self._set(PluginState.STOPPING)
            await asyncio.wait([self._task])
        await self.invocations.stop(reason)
        if self.effective is not None and self.state != PluginState.FAILED:
            self.error = ""

    async def connect(self, run_id: str, deadline: float) -> list[socket.socket]:
        """Connect to the socket of a run, or to its standard streams; raises as ``Run.connect`` and ``Run.talk``."""
        run = self.run
        if run is None or run.id != run_id:
            raise UnavailableError(f"plugin {self.name}", "that run has ended", "ask again")
        if run.streams:
            return run.talk()
        return [await run.connect(self.registration.uid, deadline, lambda: self.run is run)]

    def note_ready(self, run_id: str) -> None:
        """Take the host's word that a run whose standard streams it has is up."""
        if self.run is not None and self.run.id == run_id and self.run.streams:
            self.run.socket_there.set()

    # --- the host and the trail --------------------------------------------------------------------------------

    def announce(self) -> None:
        """Give a new host the log pipes and the host API of the run, if there is one.

        A run whose standard streams the host before had cannot go on: nobody else knows what was said on them.
        """
        run = self.run
        if run is not None and run.streams and run.reached:
            run.terminate("the host process that spoke to it has ended")
        if run is not None and self.state == PluginState.RUNNING:
            self._context.host.run_started(self.name, self.registration.uid, run.id, run.cage.pid, run.pipes)

    def record_usage(self) -> None:
        """Write the ``resources`` record of the run, if there is one, and show the figures to its programs."""
        if self.run is not None and self.run.cage.started:
            usage = self.run.usage()
            self._context.audit.record(Resources(**usage), plugin=self.name, run=self.run.id)
            if not self.run.exited:
                self.run.cage.refresh_figures(usage)

    async def compare_files(self) -> None:
        """Note which paths that its run is shown were replaced on the host: a mount stays with the file it was made of.

        Paths may lie on file systems that hang, so whoever waits for this must not be waited for.
        """
        run = self.run
        if run is None or not run.shown:
            return
        replaced = await asyncio.to_thread(run.replaced)
        why = f"{', '.join(replaced)}: replaced on the host; it sees what was there until it is restarted"
        outdated = why if replaced else ""
        if self.run is run and outdated != self.outdated:
            self.outdated = outdated
            self.announce_change()

    # --- over an exec of this process --------------------------------------------------------------------------

    @property
    def under_way(self) -> str:
        """Change under way that is not to be broken off, in words; empty when there is none."""
        if self.invocations.under_way:
            return f"an invocation of plugin {self.name}"
        if self._task is None or self._task.done() or (self._waits.now and not self._stop.is_set()):
            return ""
        return f"plugin {self.name} ({self.state})"

    def hand_over(self) -> PluginKept:
        """The state of this plugin; when nothing is ``under_way`` its task can be given up."""
        from isolator.ipc.handover import PluginKept

        run = self.run if self.state == PluginState.RUNNING else None
        return PluginKept(
            name=self.name,
            state=self.state,
            error=self.error,
            notice=self.notice,
            outdated=self.outdated,
            wanted=self.wanted,
            reason=self._reason,
            restarts=self.restarts,
            ends=tuple(self._unwanted.times),
            others_ends=self._unwanted.others,
            crashes=tuple(self._unwanted.crashes),
            backoff_until=self._backoff_until,
            effective=self.effective.model_dump(mode="json") if self.effective is not None else None,
            run=run.hand_over() if run is not None else None,
            invocations=self.invocations.hand_over(),
            fence=self._context.fences.hand_over(self.name),
        )

    def take_over(self, before: PluginKept, kept_by: Launcher) -> str:
        """Go on from the state before the exec; returns why its run does not go on, if it had one that does not.

        A run that does not hold is ended, as by a drift, and started again. ``kept_by``: the launcher of then.
        """
        problem = ""
        if before.fence is not None:
            self._context.fences.adopt(self.name, before.fence)
        if before.effective is not None:
            from isolator.policy.model import EffectivePolicy

            self.effective = EffectivePolicy.model_validate(before.effective)
        self.state, self.error, self.notice = before.state, before.error, before.notice
        self.outdated, self.restarts = before.outdated, before.restarts
        self._unwanted = Ends(deque(before.ends), before.others_ends, deque(before.crashes))
        run: Run | None = None
        if before.run is not None:
            assert self.effective is not None
            run, without, problem = adopt_run(self._context, self.registration, self.effective, before.run, kept_by)
            if without:
                self.lacking = f"runs without {', '.join(without)}, which came with an update; restart it"
        if before.invocations:
            assert self.effective is not None
            problem = self.invocations.take_over(self.registration, self.effective, before.invocations, kept_by)
        if before.wanted:
            self._wanted, self.run = True, run
            life = self._supervise(before.reason, run, before.backoff_until)
            self._task = self._tasks.run(f"life of plugin {self.name}", life)
        return problem

    async def _opened(self) -> None:
        """Wait while the daemon comes to rest, unless the run is to stop."""
        if self._context.rest.coming:
            await unless(self._stop, self._context.rest.opened())

    # --- the task that owns a run ----------------------------------------------------------------------------

    async def _supervise(self, reason: str, run: Run | None = None, backoff_until: float | None = None) -> None:
        """Run it for as long as it is wanted. ``run``, or a back-off that ends then, is from before an exec."""
        try:
            if backoff_until is not None:
                await self._pause_until(backoff_until)
            while self._wanted:
                self._reason = reason
                if run is None and self.fence.closed:
                    with self._waits:
                        await unless(self._stop, self.fence.opened())
                    continue
                try:
                    retry = await self._run_once(reason, run)
                except Exception as error:  # whatever it was: one that is wanted must not stay away in silence
                    report(asyncio.get_running_loop(), f"life of plugin {self.name}", error)
                    retry = self._after_fault(reason_of(error))
                run = None
                if retry is None:
                    break
                reason = self._reason = "restart after a crash"
                self._end_backoff.clear()
                await self._pause_until(asyncio.get_running_loop().time() + retry)
        finally:
            self._conclude_trial("it was stopped")
        self._wanted = False
        if self.state != PluginState.FAILED:
            self._set(self._idle_state())

    async def _run_once(self, reason: str, run: Run | None) -> float | None:
        """One run, from start to end; returns the seconds to the next one, or None when there shall be none."""
        ended = await self._one_run(reason, run)
        expected = not self._wanted
        retry = None if expected or self._failed_trial(ended.why) else self._after_crash(ended)
        if ended.exit is not None:
            self._context.host.run_ended(
                self.name, ended.run, ended.exit, origin=ended.origin, state=self.state, expected=expected,
                retry_in=retry,
            )  # fmt: skip
        return retry

    async def _pause_until(self, until: float) -> None:
        """Wait until then, or until an operator ends the back-off; and while the daemon comes to rest."""
        self._backoff_until = until
        with self._waits:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._end_backoff.wait(), until - asyncio.get_running_loop().time())
            await self._opened()
        self._backoff_until = None
        if self._wanted:
            self.restarts += 1
            self._set(PluginState.STARTING)

    def _failed_trial(self, why: str) -> bool:
        if self._verdict is None or self._verdict.done():
            return False
        self.error = why
        self._set(PluginState.STOPPED)
        self._conclude_trial(why)
        return True

    def _conclude_trial(self, outcome: str) -> None:
        if self._verdict is not None and not self._verdict.done():
            self._verdict.set_result(outcome)

    def _after_crash(self, ended: Ended) -> float | None:
        """Note an end that nobody wanted; returns the seconds to wait, or None when too many of them count."""
        assert self.effective is not None
        limits, why = self.effective.restart, ended.why
        self._unwanted.note(ended, limits.window)
        if ended.hopeless:
            self.error = why
            self._set(PluginState.FAILED)
            self._context.audit.record(PluginFailed(reason=why), plugin=self.name)
            return None
        count = len(self._unwanted.crashes)
        if ended.counts and count >= limits.crashes:
            self.error = f"{why}; {count} crashes in {limits.window / 60:g} minutes"
            self._set(PluginState.FAILED)
            record = self._context.audit.record
            record(PluginFailed(reason=self.error), plugin=self.name)
            why = f"crashed too often; waits for 'isolator plugin start {self.name}'"
            record(PluginQuarantined(reason=why, crashes=count, seconds=limits.window), plugin=self.name)
            return None
        return self._back_off(why)

    def _after_fault(self, why: str) -> float | None:
        """Note that this daemon failed with a run or its end; returns as ``_after_crash``."""
        if not self._wanted or self._failed_trial(why):
            return None
        self._unwanted.others += 1
        return self._back_off(why)

    def _back_off(self, why: str) -> float:
        assert self.effective is not None
        self.error = why
        self._set(PluginState.BACKOFF)
        return self._unwanted.pause(self.effective.restart)

    async def _one_run(self, reason: str, run: Run | None = None) -> Ended:
        """Build one cage, or take over ``run``; watch it to its end, take everything down."""
        assert self.effective is not None
        run_id = run.id if run is not None else secrets.token_hex(5)
        try:
            if run is None:
                with self._waits:
                    environment = await unless(self._stop, self._environment())
                if environment is None:
                    return Ended(run_id, None, Origin.OPERATOR)
                run = self.run = await prepare_run(
                    self._context,
                    self.registration,
                    self.effective,
                    self.argv,
                    run_id,
                    environment,
                    port=self.port,
                    talks=self.mode == "mcp",
                )
                await run.cage.start()
                self._started(run, reason)
            with self._waits:
                await run.watch(
                    self._stop,
                    on_ready=self.announce_change,
                    on_steady=lambda: self._conclude_trial(""),
                    drain=lambda: self._context.host.drain(self.name, run_id, self._stop_reason),
                )
                await self._opened()
            end = await run.ended()
            origin = run.origin if self._wanted else Origin.OPERATOR
            self._record_end(run, end, origin, await self._context.host.stderr_tail(self.name, run_id))
            counts = origin == Origin.PLUGIN and not (run.reached and end.cause == "exit")
            return Ended(run_id, end, origin, counts=counts)
        except Exception as error:  # whatever it was: a start that ended in silence would be waited for without end
            why = reason_of(error)
            origin = origin_of(error)
            crashed = PluginCrashed(cause="did not start", origin=origin, reason=why)
            self._context.audit.record(crashed, plugin=self.name, run=run_id)
            hopeless = isinstance(error, NotApprovedError)
            return Ended(run_id, None, origin, why, counts=origin == Origin.PLUGIN, hopeless=hopeless)
        finally:
            self.run, self.outdated, self.lacking = None, "", ""
            if self.state == PluginState.RUNNING:
                self._set(PluginState.STOPPING)
            if run is not None:
                await run.take_down()

    async def _environment(self) -> Environment:
        """Wait until the trail can be written and the host is up, which knows the config; return that."""
        if self._context.wait_for_trail:
            await self._context.audit.writable()
        return await self._context.host.environment(self.name)

    def _started(self, run: Run, reason: str) -> None:
        from isolator.audit.client import utc_now

        run.started_at = utc_now()
        run.began = asyncio.get_running_loop().time()
        run.for_start.close()
        started = start_record(run, self.registration.release, reason)
        self._context.audit.record(started, plugin=self.name, run=run.id, urgent=True)
        listener, run.cage.listener = run.cage.listener, -1
        run.answer_denied(listener)
        if not self._stop.is_set():
            self._set(PluginState.RUNNING)
            self._unwanted.others = 0
        self._context.host.run_started(self.name, run.cage.spec.uid, run.id, run.cage.pid, run.pipes)
        self._context.fences.started(self.name, run)

    def _record_end(self, run: Run, end: CageExit, origin: Origin, stderr_tail: tuple[str, ...]) -> None:
        self.record_usage()
        kind = PluginCrashed if self._wanted else PluginStopped
        ended = kind(cause=end.cause, origin=origin, stderr=list(stderr_tail), **end.figures)
        # Urgent: on its way before the journal forgets the run. If we die between, nobody else would tell.
        self._context.audit.record(ended, plugin=self.name, run=run.id, urgent=True)

    def _set(self, state: PluginState) -> None:
        self.state = state
        self.announce_change()
        self._tasks.run(f"waiters for plugin {self.name}", self._notify())

    def announce_change(self) -> None:
        """Call ``changed``; that it fails is its owner's fault, and does not end this plugin's life."""
        try:
            self._on_change(self)
        except Exception as error:
            report(asyncio.get_running_loop(), f"announcement of plugin {self.name}", error)

    async def _notify(self) -> None:
        async with self._settled:
            self._settled.notify_all()


_PASSING = frozenset({PluginState.STARTING, PluginState.BACKOFF, PluginState.STOPPING})
"""Another state follows by itself."""
_REMEDIES = {
    PluginState.DISABLED: "isolator plugin enable {0}",
    PluginState.REJECTED: "see 'isolator plugin show {0}' and correct it",
}
