"""The life of one plugin's sidecar: start, watch, stop, back off, give up.

States: ``stopped starting running stopping backoff failed disabled rejected``. A start is asked for by the
host when an event waits, or by an operator. Once started it is wanted until it is stopped: a crash is followed by
a restart after a back-off (exponential with jitter); too many crashes in the window and it is ``failed``, kept and
shown, until an operator starts it again. A ``trial`` is the start of a new version: watched until it is up, and not
repeated when it fails, so that the version before can come back.

One run at a time, and one task that owns it from the first journal entry to the last group removed. Whoever starts,
stops or exchanges a version holds the plugin's lock (``registration_ops.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import socket
import time
from collections import deque
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from isolator.audit.schema import (
    PluginCrashed,
    PluginFailed,
    PluginQuarantined,
    PluginStarted,
    PluginStopped,
    SyscallDenied,
)
from isolator.cage.processes import CageExit
from isolator.errors import DeniedError, IsolatorError, UnavailableError
from isolator.supervisor.cage_spec import Environment
from isolator.supervisor.run import Run, RunSurroundings, close_all, prepare_run

if TYPE_CHECKING:
    from isolator.policy.model import EffectivePolicy
    from isolator.registration.proposals import Loaded
    from isolator.registration.store import Registration


T = TypeVar("T")


class Surroundings(RunSurroundings, Protocol):
    """What a plugin's life needs of the supervisor."""

    def run_started(self, plugin: Plugin, pipes: list[int]) -> None: ...

    async def run_stopping(self, plugin: Plugin, run: str, reason: str) -> None: ...

    def run_ended(self, plugin: Plugin, run: str, end: CageExit, *, expected: bool, retry_in: float | None) -> None: ...

    def changed(self, plugin: Plugin) -> None: ...

    def record_resources(self, plugin: Plugin) -> None: ...


class Plugin:
    """One registered plugin, and its run if it has one."""

    registration: Registration
    effective: EffectivePolicy | None
    argv: list[str]
    manifest: dict[str, Any]
    state: str
    error: str

    def __init__(self, around: Surroundings, loaded: Loaded) -> None:
        self.run: Run | None = None
        self.restarts = 0
        self.notice = ""
        """What is wrong with its policy file while an earlier content of it stays in force."""
        self._around = around
        self._crashes: deque[float] = deque()
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._wanted = False
        self._hurry = asyncio.Event()
        self._halt = asyncio.Event()
        """The run is to end, however far its start has come."""
        self._reason = ""
        """Why it is to end."""
        self.on_trial = False
        """Whether the version in use is not judged yet."""
        self._trial: asyncio.Future[str] | None = None
        self.take(loaded)

    @property
    def name(self) -> str:
        return self.registration.name

    @property
    def version(self) -> str:
        return self.registration.version

    @property
    def wanted(self) -> bool:
        """Whether it runs, or will by itself."""
        return self._wanted and self._task is not None and not self._task.done()

    def take(self, loaded: Loaded) -> None:
        """Go on with this version and policy; nothing of it may run."""
        assert self.run is None
        self.registration, self.manifest, self.argv = loaded.registration, loaded.manifest, loaded.argv
        self.effective = loaded.proposal.effective if loaded.proposal else None
        self.error, self.notice = loaded.error, ""
        self._crashes.clear()
        self.state = self._resting()

    def renew(self, registration: Registration) -> None:
        """It was enabled or disabled; version and policy are the same, and what had failed is forgiven."""
        self.registration = registration
        if not self.wanted:
            self._crashes.clear()
            self.error = "" if self.effective is not None else self.error
            self._set(self._resting())

    def _resting(self) -> str:
        if self.effective is None:
            return "rejected"
        return "stopped" if self.registration.enabled else "disabled"

    # --- what others ask -------------------------------------------------------------------------------------

    async def up(self) -> Run:
        """The running run; waits for a start or a back-off in progress, and raises when nothing comes of it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.state not in ("starting", "backoff", "stopping"))
        if self.state != "running" or self.run is None:
            raise UnavailableError(
                f"plugin {self.name}", self.error or f"is {self.state}", "see 'isolator plugin show'"
            )
        return self.run

    def begin(self, reason: str) -> None:
        """Start it unless it is started; raises when it may not."""
        if self.state in _REMEDIES:
            raise DeniedError(
                f"plugin {self.name}", self.error or f"is {self.state}", _REMEDIES[self.state].format(self.name)
            )
        if self.state == "failed":
            if reason != "operator":
                raise IsolatorError(f"plugin {self.name}", self.error, f"isolator plugin start {self.name}")
            self._crashes.clear()
        if reason == "operator":
            self._hurry.set()
        if self._task is None or self._task.done():
            self._wanted = True
            self._halt.clear()
            self.error = ""
            self._set("starting")
            self._task = asyncio.create_task(self._live(reason), name=f"plugin {self.name}")

    async def trial(self, reason: str) -> str:
        """Start it and watch until it is up; returns why it failed, empty when it did not."""
        self._trial = asyncio.get_running_loop().create_future()
        try:
            self.begin(reason)
            return await self._trial
        finally:
            self._trial = None

    async def stop(self, reason: str) -> None:
        """Stop the run and want none; returns when everything of it is gone."""
        self._wanted = False
        self._reason = reason
        self._hurry.set()
        self._halt.set()
        if self._task is not None and not self._task.done():
            if self.state in ("starting", "running"):
                self._set("stopping")
            await asyncio.wait([self._task])
        if self.effective is not None and self.state != "failed":
            self.error = ""

    async def connect(self, run_id: str, deadline: float) -> socket.socket:
        """A connection to the sidecar's socket, made for the host, which could not reach it itself."""
        run = self.run
        if run is None or run.id != run_id:
            raise UnavailableError(f"plugin {self.name}", "that run has ended", "ask again")
        return await run.connect(self.registration.uid, deadline, lambda: self.run is run)

    # --- the task that owns a run ----------------------------------------------------------------------------

    async def _live(self, reason: str) -> None:
        try:
            while self._wanted:
                run_id, end, problem = await self._one_run(reason)
                expected = not self._wanted
                why = problem or _describe(end)
                retry = None if expected or self._failed_trial(why) else self._after_crash(why)
                if end is not None:
                    self._around.run_ended(self, run_id, end, expected=expected, retry_in=retry)
                if retry is None:
                    break
                self._hurry.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), retry)
                if self._wanted:
                    self.restarts += 1
                    self._set("starting")
                    reason = "restart after a crash"
        finally:
            self._conclude_trial("it was stopped")
        self._wanted = False
        if self.state != "failed":
            self._set(self._resting())

    def _failed_trial(self, why: str) -> bool:
        if self._trial is None or self._trial.done():
            return False
        self.error = why
        self._set("stopped")
        self._conclude_trial(why)
        return True

    def _conclude_trial(self, outcome: str) -> None:
        if self._trial is not None and not self._trial.done():
            self._trial.set_result(outcome)

    def _after_crash(self, why: str) -> float | None:
        """Note a crash; returns the seconds to wait, or None when there were too many."""
        assert self.effective is not None
        limits = self.effective.restart
        now = time.monotonic()
        self._crashes.append(now)
        while self._crashes and now - self._crashes[0] > limits.window:
            self._crashes.popleft()
        count = len(self._crashes)
        if count >= limits.crashes:
            self.error = f"{why}; {count} crashes in {limits.window / 60:g} minutes"
            self._set("failed")
            record = self._around.audit.record
            record(PluginFailed(reason=self.error), plugin=self.name)
            why = f"crashed too often; waits for 'isolator plugin start {self.name}'"
            record(PluginQuarantined(reason=why, crashes=count, seconds=limits.window), plugin=self.name)
            return None
        self.error = why
        self._set("backoff")
        pause: float = min(limits.backoff_max, limits.backoff_min * 2 ** (count - 1))
        return pause * random.uniform(0.8, 1.2)

    async def _one_run(self, reason: str) -> tuple[str, CageExit | None, str]:
        """Build one cage, watch it to its end, take everything down: (run id, its end, what kept it from starting)."""
        assert self.effective is not None
        run: Run | None = None
        run_id = secrets.token_hex(5)
        try:
            environment = await self._until_halted(self._environment())
            if environment is None:
                return run_id, None, ""
            run = self.run = await prepare_run(
                self._around, self.registration, self.effective, self.argv, run_id, environment
            )
            await run.cage.start()
            self._started(run, reason)
            end = await run.watch(
                self._halt,
                steady=lambda: self._conclude_trial(""),
                leave=lambda: self._around.run_stopping(self, run_id, self._reason),
            )
            self._record_end(run, end, await self._around.last_words(self.name, run_id))
            return run_id, end, ""
        except Exception as error:  # whatever it was: a start that ended in silence would be waited for without end
            why = _why(error)
            crashed = PluginCrashed(cause="did not start", reason=why)
            self._around.audit.record(crashed, plugin=self.name, run=run_id)
            return run_id, None, why
        finally:
            self.run = None
            if run is not None:
                await run.take_down()

    async def _environment(self) -> Environment:
        """What waits for others: until the trail can be written, and until the host, which knows the config, is up."""
        await self._around.may_start()
        return await self._around.environment(self.name)

    async def _until_halted(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The outcome of ``work``; None when it was given up because the plugin is to stop."""
        task = asyncio.create_task(work)
        halted = asyncio.create_task(self._halt.wait())
        await asyncio.wait({task, halted}, return_when=asyncio.FIRST_COMPLETED)
        halted.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        return None if task.cancelled() else task.result()

    def _started(self, run: Run, reason: str) -> None:
        from isolator.audit.client import utc_now
        from isolator.layers.ledger import ledger, not_enforced
        from isolator.volume import volume

        controls = ledger(volume.check)
        spec = run.cage.spec
        run.started_at = utc_now()
        close_all(run.loose)
        audit = self._around.audit
        started = PluginStarted(
            reason=reason,
            pid=run.cage.pid,
            uid=spec.uid,
            cgroup=str(run.cage.leaf.unified),
            digest=self.registration.digest,
            binary_sha256=self.registration.release.binary_sha256 or None,
            policy_sha256=run.effective.digest(),
            env=sorted(spec.env),
            milliseconds=run.cage.steps,
            ledger={control.key: control.state for control in controls},
            degraded=not_enforced(controls),
        )
        audit.record(started, plugin=self.name, run=run.id, urgent=True)
        if run.cage.listener >= 0:
            self._around.denials.watch(
                run.cage.listener,
                lambda denied: audit.record(
                    SyscallDenied(call=denied.call, count=denied.count),
                    plugin=self.name,
                    run=run.id,
                    happened_ns=denied.last_ns,
                    since_ns=denied.first_ns,
                ),
            )
            run.cage.listener = -1
        if not self._halt.is_set():
            self._set("running")
        self._around.run_started(self, run.pipes)

    def _record_end(self, run: Run, end: CageExit, last_words: list[str]) -> None:
        self._around.record_resources(self)
        ended = (PluginCrashed if self._wanted else PluginStopped)(
            exit_code=end.exit_code,
            signal=end.signal,
            cause=end.cause,
            oom_kills=end.events.oom_kills,
            task_denials=end.events.task_denials,
            uptime=round(end.uptime, 3),
            stderr=last_words,
        )
        # Urgent: on its way before the journal forgets the run. If we die between, nobody else would tell.
        self._around.audit.record(ended, plugin=self.name, run=run.id, urgent=True)

    def _set(self, state: str) -> None:
        self.state = state
        self._around.changed(self)
        asyncio.get_running_loop().create_task(self._notify()).add_done_callback(lambda t: t.exception())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


_REMEDIES = {
    "disabled": "isolator plugin enable {0}",
    "rejected": "see 'isolator plugin show {0}' and correct it",
}


def _why(error: Exception) -> str:
    if isinstance(error, IsolatorError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'start'}: {error.strerror}"
    return f"a fault of the daemon: {type(error).__name__}: {error}"


def _describe(end: CageExit | None) -> str:
    if end is None:
        return "did not start"
    if end.cause in ("exit", "signal"):
        return f"exit code {end.exit_code}" if end.signal is None else f"killed by signal {end.signal}"
    return end.cause
