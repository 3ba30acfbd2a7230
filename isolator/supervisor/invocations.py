"""Invocations: the runs of a plugin with the mode ``exec``, each a fresh cage for one event.

An invocation has the event on its standard input and ends by itself; how it ends is for the host, which has the queue.
It is no crash of the plugin, however it ends, and nothing is started again here. One that takes longer than the
plugin's timeout is stopped. Before the plugin is stopped, its invocations may end: no new one begins meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Coroutine, Iterable
from typing import TYPE_CHECKING, Any

from isolator.audit.schema import ExecEnded, ExecStarted
from isolator.audit.snapshots import snapshot
from isolator.cage.processes import CageExit
from isolator.errors import ExecError, IsolatorError, UnavailableError, UsageError
from isolator.ipc.messages import Environment, InvocationEnded, InvocationStarted, Origin, StartInvocation
from isolator.ipc.tasks import Tasks, unless
from isolator.layers.ledger import EVERY_LAYER
from isolator.linux.descriptors import FdSet
from isolator.linux.memfd import is_sealed
from isolator.supervisor.cage_spec import host_api_folder
from isolator.supervisor.host_link import DRAIN_SECONDS
from isolator.supervisor.listener import listen
from isolator.supervisor.preparing import Input, adopt_run, origin_of, prepare_run, reason_of
from isolator.supervisor.rest import Waits
from isolator.supervisor.ruleset_watch import watched_ruleset
from isolator.supervisor.run import STEADY_SECONDS, Run, RunContext

if TYPE_CHECKING:
    from isolator.ipc.handover import InvocationState
    from isolator.launcher.client import Launcher
    from isolator.policy.model import EffectivePolicy
    from isolator.registration.store import Registration

MODE = "exec"
MOST = 256
"""Invocations of a plugin at a time."""
_RUN = re.compile(r"[0-9a-f]{10}")


class Invocation:
    """One invocation, from its request to the last trace."""

    def __init__(
        self, context: RunContext, registration: Registration, effective: EffectivePolicy, run: str, policy: str = ""
    ) -> None:
        """``policy``: the digest of ``effective``, for the record of the start."""
        self.id, self.name = run, registration.name
        self.run: Run | None = None
        self.deadline = 0.0
        """Loop time at which it is stopped."""
        self.waits = Waits()
        """Its task waits for something that takes as long as it takes; it can be given up and begun again."""
        self.begun: asyncio.Future[InvocationStarted] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        """Nothing of it is left."""
        self.fds = FdSet()
        """For the host: the listener of its host API, then its standard output and errors."""
        self._api = f"{registration.name}.{run}"
        self._context, self._registration, self._effective, self._policy = context, registration, effective, policy
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Stop it, once it has had a moment to end by itself."""
        self._stop.set()

    async def live(self, request: StartInvocation, argv: list[str], stdin: int) -> None:
        """Build the cage and stay with it to its end; owns ``stdin``."""
        try:
            with FdSet([stdin]):
                run = self.run = await self._prepare(request, argv, stdin)
                if not await run.cage.start(self._stop):
                    raise self._stopped()
            self._started(run, request)
        except Exception as error:  # whoever has asked for it is answered, whatever it was
            not_started = ExecEnded(cause="did not start", origin=origin_of(error), reason=reason_of(error)[:512])
            self._context.audit.record(not_started, plugin=self.name, run=self.id)
            await self._take_down()
            if isinstance(error, ExecError):
                self.begun.set_result(InvocationStarted(failed=reason_of(error)))
            else:
                known = isinstance(error, IsolatorError)
                self.begun.set_exception(error if known else IsolatorError(f"plugin {self.name}", reason_of(error)))
            # For a host that has taken the place of the one that gets the answer.
            self._tell_host(CageExit(None, None, "did not start", 0.0), origin_of(error))
            return
        self.begun.set_result(InvocationStarted(pid=run.cage.pid))
        await self.watch(run)

    async def watch(self, run: Run) -> None:
        """Wait for the end, which the host is told of when nothing of it runs; what it was in is removed after that."""
        end, origin = CageExit(None, None, "a fault of the daemon", 0.0), Origin.DAEMON
        try:
            with self.waits:
                await self._wait(run)
                if self._context.rest.coming:  # who stops it is waited for, and so is not to wait for that
                    await unless(self._stop, self._context.rest.opened())
            end = await run.ended()
            origin = Origin.OPERATOR if self._stop.is_set() and end.cause == "stopped" else run.origin
            self._record_end(run, end, origin)
            await run.cage.processes.silence()
        except BaseException:
            await self._take_down()  # first: something of it may still run
            raise
        finally:
            self._tell_host(end, origin)
        await self._take_down()

    def _tell_host(self, end: CageExit, origin: Origin) -> None:
        ended = InvocationEnded(
            name=self.name, run=self.id, exit_code=end.exit_code, signal=end.signal, cause=end.cause, origin=origin
        )
        self._context.host.invocation_ended(ended)

    def hand_over(self) -> InvocationState:
        """The state of an invocation that runs, before an exec."""
        from isolator.ipc.handover import InvocationState

        assert self.run is not None
        deadline = self.deadline + self.run.frozen_seconds
        return InvocationState(run=self.run.hand_over(), deadline=deadline)

    def take_over(self, before: InvocationState, kept_by: Launcher) -> str:
        """Take over an invocation from before this process's exec; returns why it does not go on, if it does not."""
        self.run, _, problem = adopt_run(self._context, self._registration, self._effective, before.run, kept_by)
        self.deadline = before.deadline
        return problem

    async def _prepare(self, request: StartInvocation, argv: list[str], stdin: int) -> Run:
        context = self._context
        environment = await unless(self._stop, self._environment(request))
        if environment is None:
            raise self._stopped()
        variables = {
            "PLUGIN_EVENT_ID": request.event,
            "PLUGIN_EVENT_TYPE": request.type,
            "PLUGIN_EVENT_ATTEMPT": str(request.attempt),
        }
        folder = host_api_folder(context.paths, self._api)
        with listen(folder / "host.sock", mode=0o600, owner=self._registration.uid, backlog=16) as listener:
            self.fds.add(listener.detach())
        given = Input(stdin, variables, self._api)
        return await prepare_run(context, self._registration, self._effective, argv, self.id, environment, given)

    async def _environment(self, request: StartInvocation) -> Environment:
        """Wait until the trail can be written, and return the plugin's config."""
        if self._context.wait_for_trail:
            await self._context.audit.writable()
        return request.environment or await self._context.host.environment(self.name)

    def _stopped(self) -> UnavailableError:
        return UnavailableError(f"plugin {self.name}", "it was stopped as it was started", "try again")

    def _started(self, run: Run, request: StartInvocation) -> None:
        # The next one may come before the pool has had its rest.
        self._context.runtime.pool.begin(EVERY_LAYER, hurried=True)
        for pipe in run.open_logs().release_all():
            self.fds.add(pipe)
        run.release_start()
        run.began = asyncio.get_running_loop().time()
        self.deadline = run.began + self._effective.delivery_timeout
        started = ExecStarted(
            attempt=request.attempt, pid=run.cage.pid, digest=self._registration.digest,
            policy_sha256=self._policy, milliseconds=round(sum(run.cage.steps.values()), 1),
            **self._registration.release.signed_by,
        )  # fmt: skip
        self._context.audit.record(started, plugin=self.name, run=self.id, urgent=True)
        listener, run.cage.listener = run.cage.listener, -1
        run.answer_denied(listener)
        self._context.fences.started(self.name, run)

    async def _wait(self, run: Run) -> None:
        """Return when it has ended, by itself or because it had to."""
        loop = asyncio.get_running_loop()
        ended = asyncio.create_task(run.cage.processes.ended.wait())
        stopping = asyncio.create_task(self._stop.wait())
        left = max(0.0, self.deadline - loop.time())
        if run.forced_cause:
            run.cage.kill()
        try:
            await asyncio.wait({ended, stopping}, timeout=min(STEADY_SECONDS, left), return_when="FIRST_COMPLETED")
            if ended.done():
                return  # most do: what is watched below is not worth beginning for those
            with watched_ruleset(run.cage.network, self._effective.network, run.ruleset_changed):
                await run.first_of({ended, stopping}, self.deadline)
                if stopping.done():
                    await self._end_in_time(run, ended)
                elif not ended.done():
                    run.forced_cause = f"no end in {self._effective.delivery_timeout:g} s"
                    run.stopping = True
                if not ended.done():
                    await run.cage.stop(self._effective.restart.stop_grace)
                await ended
        finally:
            for task in (ended, stopping):
                task.cancel()

    async def _end_in_time(self, run: Run, ended: asyncio.Task[Any]) -> None:
        """Give one that is to stop a moment to end by itself, if it can."""
        left = max(0.0, self.deadline + run.frozen_seconds - asyncio.get_running_loop().time())
        run.stopping = True
        if run.frozen:
            run.freeze()
        else:
            await asyncio.wait({ended}, timeout=min(DRAIN_SECONDS, left))

    def _record_end(self, run: Run, end: CageExit, origin: Origin) -> None:
        leaf = run.cage.leaf
        living = [] if run.cage.processes.exited.is_set() else [run.cage.pid]
        use = snapshot(leaf.folders(), living, totals=True)
        counted = ("cpu_us", "memory_peak", "io_read", "io_written", "network_bytes")
        used = {field: use[field] for field in counted if field in use}
        ended = ExecEnded(cause=end.cause, origin=origin, **end.figures, **used)
        # Urgent: on its way before the journal forgets the run.
        self._context.audit.record(ended, plugin=self.name, run=self.id, urgent=True)

    async def _take_down(self) -> None:
        if self.run is not None:
            await self.run.take_down()
        self.fds.close()
        folder = self._context.paths.run / "hostapi" / self._api
        with contextlib.suppress(OSError):
            os.unlink(f"{folder}/host.sock")
        with contextlib.suppress(OSError):
            os.rmdir(folder)
        self.ended.set()


class Invocations:
    """The invocations of one plugin."""

    def __init__(self, context: RunContext, name: str) -> None:
        self._context, self._name = context, name
        self._invocations: dict[str, Invocation] = {}
        self._policy: tuple[EffectivePolicy | None, str] = (None, "")
        """The policy of the last invocation, and its digest."""
        self._tasks = Tasks()
        self._stopping = ""

    @property
    def runs(self) -> list[Run]:
        """The runs that have a cage."""
        return [
            invocation.run
            for invocation in self._invocations.values()
            if invocation.run is not None and invocation.run.cage.started
        ]

    @property
    def under_way(self) -> bool:
        """Whether something happens that is not to be broken off."""
        runs = (one.run for one in self._invocations.values())
        ending = any(run.ending for run in runs if run is not None)
        return ending or any(not one.waits.now for one in self._invocations.values())

    def begin(
        self,
        registration: Registration,
        effective: EffectivePolicy,
        argv: list[str],
        request: StartInvocation,
        stdin: int,
    ) -> Invocation:
        """Begin an invocation; its sealed standard input ``stdin`` stays the caller's. Raises IsolatorError."""
        self._context.fences.check(self._name)
        where = f"plugin {self._name}"
        if self._stopping or self._context.rest.coming:
            raise UnavailableError(
                where, f"begins no invocation now: {self._stopping or 'the daemon is reloaded'}", "try again"
            )
        if not _RUN.fullmatch(request.run) or request.run in self._invocations:
            raise UsageError(request.op, "no new name of a run")
        if len(self._invocations) >= MOST:
            raise UnavailableError(where, f"{MOST} invocations run", "try again")
        if not is_sealed(stdin):
            raise UsageError(request.op, "its standard input is no sealed file in memory")
        if self._policy[0] is not effective:
            self._policy = effective, effective.digest()
        invocation = Invocation(self._context, registration, effective, request.run, self._policy[1])
        # A description of its own: read from the beginning, and for reading only.
        own = os.open(f"/proc/self/fd/{stdin}", os.O_RDONLY | os.O_CLOEXEC)
        self._own(invocation, invocation.live(request, argv, own))
        return invocation

    async def stop(self, reason: str) -> None:
        """End every invocation, and begin none meanwhile; returns when nothing of them is left."""
        self._stopping = reason
        try:
            invocations = list(self._invocations.values())
            for invocation in invocations:
                invocation.stop()
            for invocation in invocations:
                await invocation.ended.wait()
        finally:
            self._stopping = ""

    async def end(self, cause: str) -> None:
        """Kill every invocation at once; returns when nothing of them is left."""
        invocations = list(self._invocations.values())
        for invocation in invocations:
            invocation.stop()  # also one that is being started
            if invocation.run is not None:
                invocation.run.terminate(cause)
        for invocation in invocations:
            await invocation.ended.wait()

    def hand_over(self) -> tuple[InvocationState, ...]:
        """The states of the invocations that run, before an exec; those that are ``under_way`` are not among them."""
        return tuple(invocation.hand_over() for invocation in self._invocations.values() if invocation.waits.now)

    def take_over(
        self,
        registration: Registration,
        effective: EffectivePolicy,
        states: Iterable[InvocationState],
        kept_by: Launcher,
    ) -> dict[str, str]:
        """Go on with the invocations from before the exec; returns why some do not go on, by run."""
        problems = {}
        for state in states:
            invocation = Invocation(self._context, registration, effective, state.run.id)
            if problem := invocation.take_over(state, kept_by):
                problems[invocation.id] = problem
            if invocation.run is not None:
                self._own(invocation, invocation.watch(invocation.run))
        return problems

    def _own(self, invocation: Invocation, life: Coroutine[Any, Any, None]) -> None:
        self._invocations[invocation.id] = invocation
        invocation.begun.add_done_callback(lambda begun: begun.exception())  # who waited may have gone
        task = self._tasks.run(f"invocation of plugin {self._name}", life)
        task.add_done_callback(lambda _: self._invocations.pop(invocation.id, None))
