"""Life cycle of one plugin's sidecar: start, watch, stop, back off, give up.

The host requests a start when an event waits, or for an operator. Once started it is wanted until it is stopped: a
crash is followed by a restart after a back-off (exponential with jitter); too many crashes in the window and it is
``failed``, kept and shown, until an operator starts it again. Only the plugin's own doing counts for that, and an exit
code after events had reached it does not: that is a failed attempt, which the host repeats and in the end gives up.
A trial is the start of a new version: watched until it is up, and not repeated when it fails, so that the version
before can come back.

One run at a time, and one task that owns it (``life.py``). Whoever starts, stops or exchanges a version holds the
plugin's lock (``plugins.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from isolator.audit.schema import Resources
from isolator.cage.processes import CageExit
from isolator.errors import DeniedError, IsolatorError, UnavailableError, UsageError
from isolator.ipc.messages import Origin, PluginState, StartInvocation
from isolator.ipc.tasks import report
from isolator.linux.apart import apart
from isolator.supervisor.ends import Ends
from isolator.supervisor.invocations import MODE as EXEC
from isolator.supervisor.invocations import Invocation, Invocations
from isolator.supervisor.lifecycle.life import Life
from isolator.supervisor.preparing import adopt_run
from isolator.supervisor.run import Run, RunContext

if TYPE_CHECKING:
    from isolator.ipc.handover import PluginKept
    from isolator.launcher.client import Launcher
    from isolator.policy.model import EffectivePolicy
    from isolator.registration.proposals import Loaded
    from isolator.registration.store import Registration


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
        self.told: tuple[Registration, EffectivePolicy | None] | None = None
        """What the host was told of beyond its state."""
        self.invocations = Invocations(context, loaded.registration.name)
        self.fence = context.fences.of(loaded.registration.name)
        """Until when it may act."""
        self._context, self._on_change = context, changed
        self._life = Life(self, context)
        self._turn = asyncio.Event()
        """Set at the next change of state, when another takes its place."""
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
        return self._life.wanted and not self._life.over

    def adopt(self, loaded: Loaded) -> None:
        """Switch to another version or policy. The plugin must not be running."""
        assert self.run is None and not self.invocations.runs
        self.registration, self.manifest, self.argv = loaded.registration, loaded.manifest, loaded.argv
        self.mode, self.port = loaded.mode, loaded.port
        self.effective = loaded.proposal.effective if loaded.proposal else None
        self.error, self.notice = loaded.error, ""
        self._life.ends.forget()
        self.state = self.idle_state()

    def set_enabled(self, registration: Registration) -> None:
        """Take over a registration that was enabled or disabled, and forget earlier failures."""
        self.registration = registration
        if not self.wanted:
            self._life.ends.forget()
            self.error = "" if self.effective is not None else self.error
            self.set_state(self.idle_state())

    def idle_state(self) -> PluginState:
        """Its state while nothing of it runs."""
        if self.effective is None:
            return PluginState.REJECTED
        return PluginState.STOPPED if self.registration.enabled else PluginState.DISABLED

    # --- start and stop --------------------------------------------------------------------------------------

    async def wait_running(self) -> Run:
        """Return the running run, after a start or a back-off in progress; raises when nothing comes of it.

        Starts that fail for a reason of the daemon's or the operator's are tried for ever; whoever waits is answered
        after as many of them as a plugin's own would have.
        """
        while self.state in _PASSING and not self._fails_to_start():
            await self._turn.wait()
        if self.state != PluginState.RUNNING or self.run is None:
            raise UnavailableError(
                f"plugin {self.name}", self.error or f"is {self.state}", "see 'isolator plugin show'"
            )
        return self.run

    def _fails_to_start(self) -> bool:
        limits = self.effective.restart if self.effective is not None else None
        return self.state == PluginState.BACKOFF and limits is not None and self._life.ends.others >= limits.crashes

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
                again = f"see 'isolator plugin logs {self.name}', then isolator plugin start {self.name}"
                raise IsolatorError(f"plugin {self.name}", self.error, again)
            self._life.ends.forget()
        if reason == "operator":
            self._life.ends.others = 0  # what made earlier starts fail may be mended: wait for new ones
            self._life.end_backoff.set()
        if self._life.over:
            self._life.stopping.clear()
            self.error = ""
            self.set_state(PluginState.STARTING)
            self._life.begin(reason)

    async def try_version(self, reason: str) -> str:
        """Start a new version and watch until it is up; returns why it failed, empty when it did not."""
        if self.mode == EXEC or self.fence.closed:
            return ""  # an event shows it
        self._life.verdict = asyncio.get_running_loop().create_future()
        try:
            self.start(reason)
            return await self._life.verdict
        finally:
            self._life.verdict = None

    async def stop(self, reason: str) -> None:
        """Stop the run and want none; returns when everything of it is removed."""
        self._life.wanted = False
        self._life.stop_reason = reason
        self._life.end_backoff.set()
        self._life.stopping.set()
        if not self._life.over:
            if self.state in (PluginState.STARTING, PluginState.RUNNING):
                self.set_state(PluginState.STOPPING)
            await self._life.ended()
        await self.invocations.stop(reason)
        if self.effective is not None and self.state != PluginState.FAILED:
            self.error = ""

    async def connect(self, run_id: str, deadline: float) -> list[socket.socket]:
        """Connect to the socket of a run, or to its standard streams; raises as ``Run.connect`` and ``Run.talk``."""
        run = self.run
        if run is None or run.id != run_id:
            raise UnavailableError(f"plugin {self.name}", "that run has ended", "tried again")
        if run.streams:
            return run.talk()
        return [await run.connect(self.registration.uid, deadline, lambda: self.run is run)]

    def connect_at_once(self, run_id: str) -> socket.socket | None:
        """Connect to the Unix socket of a run; None when that takes longer, and for whatever else serves a run."""
        run = self.run
        if run is None or run.id != run_id or run.streams or run.port is not None:
            return None
        with contextlib.suppress(OSError):
            return run.connect_at_once(self.registration.uid)
        return None

    async def lend_socket(self, run_id: str, gid: int) -> tuple[int, int]:
        """Open a run's socket file for processes with that group, as ``SidecarSocket.lend``; raises IsolatorError."""
        run = self.run
        if run is None or run.id != run_id or run.streams or run.port is not None:
            raise UnavailableError(f"plugin {self.name}", "that run has no socket", "tried again")
        try:
            return await run.unix_socket.lend(self.registration.uid, gid, lambda: self.run is run)
        except OSError as error:
            raise UnavailableError(f"plugin {self.name}", f"its socket: {error.strerror}", "tried again") from None

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
            with self._context.host.listen(self.name, self.registration.uid) as listener, run.open_logs() as logs:
                self._context.host.run_started(self.name, run.id, run.cage.pid, tuple(logs), listener.fileno())

    def record_usage(self) -> None:
        """Write the ``resources`` record of the run, if there is one."""
        if self.run is not None and self.run.cage.started:
            self.record_use(self.run, self.run.usage())

    def record_use(self, run: Run, usage: Mapping[str, Any]) -> None:
        """Write the ``resources`` record of a run: data as of ``Run.usage``."""
        self._context.audit.record(Resources(**usage), plugin=self.name, run=run.id)

    async def compare_files(self) -> None:
        """Note which paths that its run is shown were replaced on the host: a mount stays with the file it was made of.

        Paths may lie on file systems that hang, so whoever waits for this must not be waited for; nor does a thread
        that others need.
        """
        run = self.run
        if run is None or not run.shown:
            return
        replaced = await apart(run.replaced)
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
        stops = self._life.stopping.is_set() or (self.run is not None and self.run.ending)
        if self._life.over or (self._life.waits.now and not stops):
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
            reason=self._life.reason,
            restarts=self.restarts,
            ends=tuple(self._life.ends.times),
            others_ends=self._life.ends.others,
            crashes=tuple(self._life.ends.crashes),
            backoff_until=self._life.backoff_until,
            effective=self.effective.model_dump(mode="json") if self.effective is not None else None,
            run=run.hand_over() if run is not None else None,
            invocations=self.invocations.hand_over(),
            fence=self._context.fences.hand_over(self.name),
        )

    def take_over(self, before: PluginKept, kept_by: Launcher) -> dict[str, str]:
        """Go on from the state before the exec; returns why runs do not go on, by id, of those that do not.

        A run that does not hold is among ``runs``: it is ended, as by a drift, and started again. Of one that is not,
        nothing was taken over. ``kept_by``: the launcher of then.
        """
        problems: dict[str, str] = {}
        if before.fence is not None:
            self._context.fences.adopt(self.name, before.fence)
        if before.effective is not None:
            from isolator.policy.model import EffectivePolicy

            self.effective = EffectivePolicy.model_validate(before.effective)
        self.state, self.error, self.notice = before.state, before.error, before.notice
        self.outdated, self.restarts = before.outdated, before.restarts
        self._life.ends = Ends(deque(before.ends), before.others_ends, deque(before.crashes))
        run: Run | None = None
        if before.run is not None:
            assert self.effective is not None
            run, without, problem = adopt_run(self._context, self.registration, self.effective, before.run, kept_by)
            if problem:
                problems[before.run.id] = problem
            if without:
                self.lacking = f"runs without {', '.join(without)}, which came with an update; restart it"
        if before.invocations:
            assert self.effective is not None
            problems |= self.invocations.take_over(self.registration, self.effective, before.invocations, kept_by)
        if before.wanted and (run is not None or before.run is None):
            self.run = run
            self._life.begin(before.reason, run, before.backoff_until)
        return problems

    def start_again(self, run: str | None, why: str) -> None:
        """Start the sidecar after a back-off: its ``run`` from before the exec was lost by a fault of this daemon."""
        pause = self._life.begin_again(why) if self.effective is not None else None
        if pause is None:
            self.set_state(self.idle_state())
        if run is not None:
            end = CageExit(None, None, why, 0.0)
            self._context.host.run_ended(
                self.name, run, end, origin=Origin.DAEMON, state=self.state, expected=False, retry_in=pause
            )

    def set_state(self, state: PluginState) -> None:
        """Take a state, and notify whoever waits for one."""
        self.state = state
        self.announce_change()
        self._turn.set()
        self._turn = asyncio.Event()

    def announce_change(self) -> None:
        """Call ``changed``; that it fails is its owner's fault, and does not end this plugin's life."""
        try:
            self._on_change(self)
        except Exception as error:
            report(asyncio.get_running_loop(), f"announcement of plugin {self.name}", error)


_PASSING = frozenset({PluginState.STARTING, PluginState.BACKOFF, PluginState.STOPPING})
"""Another state follows by itself."""
_REMEDIES = {
    PluginState.DISABLED: "isolator plugin enable {0}",
    PluginState.REJECTED: "see 'isolator plugin show {0}' and correct it",
}
