"""A cage: the layers composed around one process, from start to the last trace removed.

    async with Cage(spec, runtime, stdio) as cage:
        await cage.start()
        end = await cage.wait()

Start, in order: a spare is taken (isolator.cage.warm_pool: a parked process, its groups, a network with rules); the
parked process clones the cage; every layer prepares, while the child makes its /proc; the child is sent the plan,
applies the layers to itself and reports, while the network gets its rules and what is in force is read back; every
layer is confirmed from the kernel; only then may it exec.
Whatever fails on the way destroys all of it and raises ConfinementError with the step and the kernel's reason. Leaving
the context kills what is left, and releases the layers in reverse order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from isolator.base.structs import struct_class
from isolator.cage.link import Link
from isolator.cage.processes import CageExit, CageProcesses, empty, end_child, reap_group
from isolator.cage.runtime import CageRuntime
from isolator.cage.warm_pool import Spare
from isolator.errors import ConfinementError
from isolator.ipc.packet import send_packet
from isolator.ipc.tasks import unless
from isolator.launcher.client import Clone, Launcher
from isolator.layers.base import CageSpec, Kept, Layer, Process
from isolator.layers.capabilities import Capabilities
from isolator.layers.cgroup.layer import Cgroup
from isolator.layers.cgroup.leaf import Leaf
from isolator.layers.filesystem import Filesystem
from isolator.layers.landlock import Landlock
from isolator.layers.namespaces import Namespaces
from isolator.layers.network.layer import Network
from isolator.layers.no_new_privs import NoNewPrivs
from isolator.layers.plan import LOGS, Birth, Plan
from isolator.layers.proc.layer import Proc
from isolator.layers.rlimits import Rlimits
from isolator.layers.seccomp.layer import Seccomp
from isolator.layers.stopwatch import Stopwatch
from isolator.layers.user import User
from isolator.linux.apart import apart
from isolator.linux.descriptors import close_all
from isolator.linux.shortage import is_shortage
from isolator.recovery.journal import Entry

if TYPE_CHECKING:
    from isolator.ipc.handover import CageState
    from isolator.layers.network.namespace import CageNetwork

_SET_UP_SECONDS = 20.0


@struct_class(frozen=True)
class Stdio:
    """The three standard descriptors of the sidecar; they stay the caller's."""

    stdin: int
    stdout: int
    stderr: int


class Cage:
    """A cage, from ``start`` to ``release``.

    ``logs``: reading ends of stdout and stderr, if they are pipes, which pid 1 keeps. ``handover`` gets the cage's
    network once its rules are in force, and is awaited before the exec: it takes the broker's sockets. ``admit`` is
    called right before the exec; what it raises keeps it from happening. ``without`` names layers to leave out, for
    tests of their absence.
    """

    def __init__(
        self,
        spec: CageSpec,
        runtime: CageRuntime,
        stdio: Stdio,
        *,
        logs: Sequence[int] = (),
        without: frozenset[str] = frozenset(),
        handover: Callable[[CageNetwork], Awaitable[None]] | None = None,
        admit: Callable[[], None] = lambda: None,
    ) -> None:
        self.spec = spec
        self.listener = -1
        """The seccomp listener of the cage's denied calls, from ``start`` on; the caller takes it over."""
        self.steps: dict[str, float] = {}
        """Milliseconds by step of the start."""
        self._runtime = runtime
        self._stdio, self._logs = stdio, logs
        self._cgroup = Cgroup(runtime.subtree)
        self._network = Network()
        self._namespaces = Namespaces()
        self._proc = Proc(self._namespaces)
        every: list[Layer] = [
            self._cgroup, self._namespaces, Rlimits(), Filesystem(), self._proc, User(), Capabilities(), NoNewPrivs(),
            Landlock(), Seccomp(), self._network,
        ]  # fmt: skip
        self._layers = [layer for layer in every if layer.name not in without]
        self._names = frozenset(layer.name for layer in self._layers)
        self._handover, self._admit = handover, admit
        self._spare: Spare | None = None
        self._kept_by: Launcher | None = None
        """The launcher that holds a descriptor of the cage's group, however far the start came."""
        self._loading: asyncio.Task[None] | None = None
        self._processes: CageProcesses | None = None
        self._process = Process(0)

    @property
    def started(self) -> bool:
        """Whether there is a process."""
        return self._processes is not None

    @property
    def processes(self) -> CageProcesses:
        """The cage's processes, while there are any."""
        assert self._processes is not None
        return self._processes

    @property
    def pid(self) -> int:
        """Pid 1 of the cage as the host sees it."""
        return self.processes.pid

    @property
    def leaf(self) -> Leaf:
        """The cage's control groups."""
        assert self._cgroup.leaf is not None
        return self._cgroup.leaf

    @property
    def network(self) -> CageNetwork:
        """The cage's network, once there is one."""
        assert self._network.network is not None
        return self._network.network

    async def __aenter__(self) -> Cage:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.release()

    async def start(self, stop: asyncio.Event | None = None) -> bool:
        """Build the cage and exec; returns True once exec has happened, False if nothing runs because of ``stop``.

        Once that is set nobody waits any more for a process that may hang: launcher, parked process, broker. What was
        begun is removed by ``release``. If the program may have begun, the cage is killed, and ``wait`` tells that it
        was stopped. Raises ConfinementError, and whatever ``admit`` and ``handover`` raise.
        """
        stop = stop or asyncio.Event()
        try:
            if not await unless(stop, self._build()):
                return False
            self._admit()
            await self._execute(stop)
        finally:
            if self._runtime.keep_warm and self._spare is not None:
                self._runtime.pool.refill(self._names)
        return True

    async def _build(self) -> bool:
        """Build the cage, up to the exec; True."""
        mark = Stopwatch(self.steps)
        spec = self.spec
        spare = self._spare = await self._runtime.pool.take(self._names, spec.policy.network, self._journalled)
        self._network.network, self._cgroup.ahead = spare.network, spare.groups
        self._namespaces.parked = spare.pid
        self._proc.folder = spare.figures
        self._link = Link(spare.link, spec.name)
        mark("spare")
        async with self._in_time():
            birth = Birth()
            try:
                if self._namespaces in self._layers:
                    self._namespaces.prepare_clocks(birth)
                spare.send(*birth.pack_clocks())
                mark("clocks")
                if spare.name != spec.leaf:
                    self._journalled()
                mark("journal")
                for layer in self._layers:
                    layer.prepare_birth(spec, birth)
                spare.send(*birth.pack())
                mark("birth")
                await self._prepare(spare, birth, mark)
            finally:
                birth.close()
            if self._network in self._layers:
                self._loading = asyncio.create_task(self._load_network())
            mark("send")
            await self._confirmed(spare, mark)
        return True

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(_SET_UP_SECONDS):
                yield
        except TimeoutError:
            why = f"not built in {_SET_UP_SECONDS:g} s"
            raise ConfinementError(f"cage of {self.spec.name}", why, "the host may be overloaded") from None

    def _journalled(self) -> Leaf:
        """The cage's groups, on record before they are made."""
        leaf = Leaf.under(self._runtime.subtree, self.spec.leaf, self.spec.policy.resources)
        self._runtime.journal.record(Entry(self.spec.leaf, "leaf", tuple(map(str, leaf.folders()))))
        return leaf

    async def _prepare(self, spare: Spare, birth: Birth, mark: Stopwatch) -> None:
        """Make the plan and send it; meanwhile the cage is born."""
        spec, launcher = self.spec, self._runtime.launcher
        plan = Plan(cage=spec.leaf, argv=spec.argv, env=spec.env, cwd=spec.cwd)
        plan.to_group, plan.terminal = spec.to_group, spec.terminal
        plan.fds = {"stdin": self._stdio.stdin, "stdout": self._stdio.stdout, "stderr": self._stdio.stderr}
        plan.fds |= zip(LOGS, self._logs, strict=False)
        try:
            for layer in self._layers:
                layer.prepare(spec, plan)
                mark(f"prepare {layer.name}")
                self._proc.leaf = self._cgroup.leaf
            if spare.groups is not None:
                spare.hand_over_groups()
            spare.send(*plan.pack())
            if birth.cgroup >= 0:
                self._kept_by = launcher
                await launcher.keep(spec.leaf, birth.cgroup)
        finally:
            plan.close_owned()

    async def _load_network(self) -> None:
        if not self._network.is_loaded(self.spec):
            loading = asyncio.ensure_future(apart(lambda: self._network.load(self.spec)))
            try:
                await asyncio.shield(loading)
            except asyncio.CancelledError:
                await asyncio.gather(loading, return_exceptions=True)  # the thread is in what is to be released
                raise
        if self._handover is not None:
            await self._handover(self.network)

    async def _confirmed(self, spare: Spare, mark: Stopwatch) -> None:
        """Wait until the cage is built, and every layer is confirmed."""
        await self._wait_caged(spare, mark)
        if self._loading is not None:
            await asyncio.shield(self._loading)  # ``release`` ends it
        mark("network")
        self._confirm("end")
        if self._cgroup in self._layers:
            self._cgroup.cap_processor()
            if self._cgroup.caps_disks:
                await asyncio.to_thread(self._cgroup.cap_disks, self.pid)
        mark("confirm")

    async def _execute(self, stop: asyncio.Event) -> None:
        mark, spare = Stopwatch(self.steps), self._spare
        assert spare is not None
        send_packet(spare.link, b"x")
        async with self._in_time():
            answer = await unless(stop, self._link.receive())
            if answer is None:
                await self.processes.stop(0.0)
                answer = await self._link.receive()
        if answer[0]:
            raise self._link.failure(answer[0])
        spare.link.close()
        mark("exec")
        self.processes.started, self._process = time.monotonic(), Process(self.pid)  # without what was read of it

    async def _wait_caged(self, spare: Spare, mark: Stopwatch) -> None:
        """Wait for three messages of the cage's, in this order: its pid, "viewed" and "caged"."""
        caged = False
        while not caged:
            answer, fds = await self._link.receive()
            if "pid" in answer:
                self._born(answer, fds, spare)
                mark("clone")
                self._confirm_early("birth")
                self.processes.watch_memory()
                mark("confirm groups")
            elif answer.get("step") == "viewed":
                mark("view")
                self._confirm_early("view")
                mark("confirm view")
                await spare.ended()  # it counts as a task of the cage until then
            elif answer.get("step") == "caged":
                caged = True
                self.listener = fds[0] if fds else -1
                took = answer.get("took")
                if isinstance(took, dict):
                    self.steps.update({f"enter {step}": float(ms) for step, ms in took.items()})
            else:
                raise self._link.failure(answer)
        mark("enter")

    def _confirm(self, moment: str) -> None:
        for layer in self._layers:
            if layer.in_force_from == moment:
                layer.confirm(self._process)

    def _confirm_early(self, moment: str) -> None:
        try:
            self._confirm(moment)
        except (ConfinementError, OSError):
            # A process that has failed and ended is in no group any more; its report came before that.
            if (failure := self._link.told_failure()) is not None:
                raise failure from None
            raise

    def _born(self, answer: dict[str, Any], fds: list[int], spare: Spare) -> None:
        clone = Clone(int(answer["pid"]), fds[0])
        self._processes = CageProcesses(clone, spare.status, self._cgroup.leaf)
        self._process = Process(clone.pid)

    async def _reap_late_clone(self, spare: Spare) -> None:
        """Drain the link after a start that came to nothing before the clone's pid arrived: that is a child to reap.

        A clone that was killed before it could tell its pid is still in the parked process's process group. One whose
        pidfd found no room goes on: nothing more is heard of it, and its pid is its own until it is reaped.
        """
        spare.kill()
        with contextlib.suppress(OSError):
            while not self._link.lost:
                answer, fds = await self._link.receive()
                if "pid" in answer:
                    self._born(answer, fds, spare)
                    self.kill()
                else:
                    close_all(fds)
                if not answer:
                    break
        if lost := self._link.lost:
            self._link.lost = 0  # its pid may be another's as soon as it is reaped
            await apart(lambda: end_child(lost))
        elif self._processes is None:
            await apart(lambda: reap_group(spare.pid))
        await spare.ended()

    # --- over an exec of this process ----------------------------------------------------------------------------

    def hand_over(self) -> CageState:
        """The state of a running cage, for ``adopt``; every descriptor stays open."""
        from isolator.ipc.handover import CageState, LayerState

        assert self._spare is not None
        layers = [(layer.name, layer.hand_over()) for layer in self._layers]
        oom, oom_seen = self.processes.memory_events
        return CageState(
            pid=self.pid,
            pidfd=self.processes.pidfd,
            status=self._spare.status,
            oom=oom,
            oom_seen=oom_seen,
            started=self.processes.started,
            layers=tuple(LayerState(name=name, values=kept.values, fds=kept.fds) for name, kept in layers),
        )

    @classmethod
    def adopt(
        cls, spec: CageSpec, runtime: CageRuntime, before: CageState, kept_by: Launcher
    ) -> tuple[Cage, tuple[str, ...]]:
        """A cage that runs since before this process's exec, and the layers that it came without.

        Nothing is compared yet: ``confirm`` does that. ``kept_by``: the launcher of then.
        """
        kept = {layer.name: Kept(layer.values, layer.fds) for layer in before.layers}
        cage = cls(spec, runtime, Stdio(-1, -1, -1))
        without = tuple(layer.name for layer in cage._layers if layer.name not in kept)
        cage._layers = [layer for layer in cage._layers if layer.name in kept]
        for layer in cage._layers:
            layer.adopt(spec, kept[layer.name])
        cage._proc.leaf = cage.leaf
        network = cage._network.network
        cage._spare = Spare.spent(spec.leaf, kept_by, runtime.journal, before.status, cage._proc.folder, network)
        cage._processes = CageProcesses.adopt(before, cage.leaf)
        cage._process = Process(before.pid)
        cage._kept_by = kept_by
        return cage, without

    def confirm(self) -> None:
        """Read every layer of the running cage back; raises ConfinementError for the first that is not in force.

        A cage that has ended is passed over: how it ended, ``wait`` tells.
        """
        process = Process(self.pid)
        try:
            try:
                for layer in self._layers:
                    layer.confirm(process)
            except (ConfinementError, OSError, KeyError):
                if not process.ending:
                    raise
        except (OSError, KeyError) as error:
            raise ConfinementError(f"cage of {self.spec.name}", f"cannot be read back: {error}") from error

    async def be_kept_by(self, launcher: Launcher) -> None:
        """Have another launcher kill this cage when the supervisor goes away, too."""
        folder = self.leaf.open_folder()
        try:
            await launcher.keep(self.spec.leaf, folder)
        finally:
            os.close(folder)
        if not self.started:  # it has ended meanwhile
            launcher.forget(self.spec.leaf)
            return
        self._kept_by = launcher

    def signal(self, number: int) -> None:
        """Send a signal to pid 1 of the cage, which forwards it to the sidecar or its group (``CageSpec.to_group``)."""
        self.processes.signal(number)

    async def wait(self) -> CageExit:
        """Wait until the sidecar has ended; returns how and why. ``release`` ends the rest of the cage."""
        return await self.processes.wait()

    async def stop(self, grace: float) -> None:
        """Send SIGTERM; after ``grace`` seconds kill the whole group. ``wait`` returns the outcome."""
        await self.processes.stop(grace)

    def kill(self) -> None:
        """End the whole cage at once."""
        self.processes.kill()

    def detect_drift(self) -> str:
        """Compare the running cage's groups and /proc with their making; returns the first difference, or nothing.

        Of one that is being made, or ends, there is none. Raises OSError when this host is too short of something to
        look: that is no change.
        """
        if not self.processes.lasts:
            return ""
        try:
            if self._cgroup in self._layers:
                self._cgroup.confirm_again(self._process)
            if self._proc in self._layers:
                return self._proc.detect_drift(self._process, self._runtime.proc_watch)
        except (ConfinementError, OSError) as error:
            if is_shortage(error):
                raise
            return "" if self._process.ending else str(error)
        return ""

    def refresh_figures(self, usage: Mapping[str, object]) -> None:
        """Show the cage's programs its present use, as in a ``resources`` record."""
        self._proc.refresh(usage, self.processes.uptime)

    async def release(self) -> None:
        """Kill what is left and undo every layer, in reverse order; idempotent.

        The groups are the last: only they have to be empty. What else there is is let go of while the kernel ends pid 1
        and takes its memory and namespaces down, which is most of a removal.
        """
        if self._loading is not None:
            if not self._loading.cancelling():
                self._loading.cancel()  # the broker may hang
            await asyncio.wait([self._loading])
            if not self._loading.cancelled():
                self._loading.exception()
            self._loading = None
        if self._spare is not None and self._processes is None and self._spare.link.fileno() >= 0:
            await self._reap_late_clone(self._spare)
        self._proc.unwatch()
        if self._processes is not None and not self._processes.exited.is_set():
            self._processes.kill()
        if self.listener >= 0:
            os.close(self.listener)
            self.listener = -1
        if self._spare is None:
            return  # nothing was made, or it is the pool's
        for layer in reversed(self._layers):
            if layer is not self._cgroup:
                layer.release()
        if self._processes is not None:
            await self._processes.reap()
            self._processes = None
        if self._kept_by is not None:
            self._kept_by.forget(self.spec.leaf)
            self._kept_by = None
        await self._spare.release()
        if self._cgroup.leaf is not None:
            await empty(self._cgroup.leaf)
        self._cgroup.release()
        self._runtime.journal.forget(self.spec.leaf)
        self._spare = None
