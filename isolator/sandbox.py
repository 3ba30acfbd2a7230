"""One cage: the layers composed around one process, from start to the last trace removed.

    async with Sandbox(spec, tools, stdio) as cage:
        await cage.start()
        end = await cage.wait()

Start, in order: a spare is taken (isolator.spares: a parked process, its groups, a network without rules); every
layer prepares; the parked process is sent the plan and clones the cage; the child applies the layers to itself and
reports, while the network's rules are loaded; every layer is confirmed from the kernel; only then may it exec.
Whatever fails on the way destroys all of it and raises ConfinementError with the step and the kernel's reason. Leaving
the context kills what is left, and releases the layers in reverse order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from isolator.errors import ConfinementError
from isolator.ipc import receive_packet, send_packet
from isolator.journal import Entry, Journal
from isolator.launch.client import Clone, Launcher, clone_remedy
from isolator.launch.plan import Plan
from isolator.layers.base import CageSpec, Layer, Process
from isolator.layers.capabilities import Capabilities
from isolator.layers.cgroup import Cgroup, Events, Leaf
from isolator.layers.cgroup_subtree import Subtree
from isolator.layers.filesystem import Filesystem
from isolator.layers.landlock import Landlock
from isolator.layers.namespaces import Namespaces
from isolator.layers.netns import Network
from isolator.layers.no_new_privs import NoNewPrivs
from isolator.layers.rlimits import Rlimits
from isolator.layers.seccomp import Seccomp
from isolator.layers.user import User
from isolator.spares import Spare, Spares

if TYPE_CHECKING:
    from isolator.layers.network import CageNetwork

LAYERS: tuple[type[Layer], ...] = (
    User, Cgroup, Rlimits, Namespaces, Filesystem, Network, Capabilities, NoNewPrivs, Landlock, Seccomp,
)  # fmt: skip
"""Every layer, in the order in which a reader of the ledger meets them."""
EVERY_LAYER = frozenset(layer.name for layer in LAYERS)

_SET_UP_SECONDS = 10.0


@dataclass
class Tools:
    """What every cage of one daemon shares; the launcher is replaced when it dies."""

    launcher: Launcher
    journal: Journal
    subtree: Subtree
    keep_spare: bool = False
    """After each start make what the next one needs."""
    spares: Spares = field(init=False)

    def __post_init__(self) -> None:
        self.spares = Spares(self)


@dataclass(frozen=True)
class Stdio:
    """The three standard descriptors of the sidecar; they stay the caller's."""

    stdin: int
    stdout: int
    stderr: int


@dataclass(frozen=True)
class End:
    """How a cage ended. ``cause``: exit, signal, out of memory, task limit, forbidden ABI, stopped, or a sentence."""

    exit_code: int | None
    signal: int | None
    cause: str
    uptime: float
    events: Events = field(default_factory=Events)

    @property
    def returncode(self) -> int:
        """As a shell shows it: the exit code, or 128 + the signal."""
        return self.exit_code if self.exit_code is not None else 128 + (self.signal or 9)


class Sandbox:
    """One cage; see the module's text.

    ``handover`` is given the cage's network once its rules are in force, and awaited before the exec: it takes the
    broker's sockets. ``without`` names layers to leave out, for tests of their absence.
    """

    def __init__(
        self,
        spec: CageSpec,
        tools: Tools,
        stdio: Stdio,
        *,
        without: frozenset[str] = frozenset(),
        handover: Callable[[CageNetwork], Awaitable[None]] | None = None,
    ) -> None:
        self.spec = spec
        self.listener = -1
        """The seccomp listener of the cage's denied calls, from ``start`` on; the caller takes it over."""
        self.steps: dict[str, float] = {}
        """Milliseconds by step of the start."""
        self._tools = tools
        self._stdio = stdio
        self._cgroup = Cgroup(tools.subtree)
        self._network = Network()
        every: list[Layer] = [
            self._cgroup, Namespaces(), Rlimits(), Filesystem(), User(), Capabilities(), NoNewPrivs(), Landlock(),
            Seccomp(), self._network,
        ]  # fmt: skip
        self._layers = [layer for layer in every if layer.name not in without]
        self._handover = handover
        self._spare: Spare | None = None
        self._loading: asyncio.Task[None] | None = None
        self._clone: Clone | None = None
        self._process = Process(0)
        self._exited = asyncio.Event()
        """Pid 1 is gone: its namespaces are taken down, which takes milliseconds."""
        self._ended = asyncio.Event()
        """The sidecar has ended: pid 1 has said so, or is gone itself."""
        self._started = 0.0
        self._stopping = False
        self._oom = -1
        self._oom_seen = False

    @property
    def started(self) -> bool:
        """Whether there is a process."""
        return self._clone is not None

    @property
    def pid(self) -> int:
        """Pid 1 of the cage as the host sees it."""
        assert self._clone is not None
        return self._clone.pid

    @property
    def pidfd(self) -> int:
        """A descriptor of pid 1 of the cage."""
        assert self._clone is not None
        return self._clone.pidfd

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

    @property
    def uptime(self) -> float:
        """Seconds since exec."""
        return time.monotonic() - self._started

    async def __aenter__(self) -> Sandbox:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.release()

    async def start(self) -> None:
        """Build the cage and exec; returns when exec has happened."""
        mark = _Stopwatch(self.steps)
        spec, tools = self.spec, self._tools
        layers = frozenset(layer.name for layer in self._layers)
        spare = self._spare = await tools.spares.take(layers)
        self._network.network, self._cgroup.ahead = spare.network, spare.groups
        mark("spare")
        try:
            leaf = Leaf.under(tools.subtree, spec.leaf, spec.policy.resources)
            tools.journal.make(Entry(spec.leaf, "leaf", tuple(map(str, leaf.folders()))))
            mark("journal")
            plan = Plan(cage=spec.leaf, argv=spec.argv, env=spec.env, cwd=spec.cwd)
            plan.fds = {"stdin": self._stdio.stdin, "stdout": self._stdio.stdout, "stderr": self._stdio.stderr}
            try:
                for layer in self._layers:
                    layer.prepare(spec, plan)
                    mark(f"prepare {layer.name}")
                if spare.groups is not None:
                    spare.given_over()
                packet, fds = plan.pack()
                with contextlib.suppress(BrokenPipeError):  # it has died: the end of its link says so below
                    send_packet(spare.link, packet, fds)
                if "cgroup" in plan.fds:
                    await tools.launcher.keep(spec.leaf, plan.fds["cgroup"])
            finally:
                plan.close_given()
            if self._network in self._layers:
                self._loading = asyncio.create_task(self._load_network())
            mark("send")
            await self._build(spare, mark)
        finally:
            if tools.keep_spare:
                tools.spares.refill(layers)

    async def _load_network(self) -> None:
        await asyncio.to_thread(self._network.load, self.spec)
        if self._handover is not None:
            await self._handover(self.network)

    async def _build(self, spare: Spare, mark: _Stopwatch) -> None:
        try:
            async with asyncio.timeout(_SET_UP_SECONDS):
                await self._cloned_and_caged(spare, mark)
                await spare.ended()  # it counts as a task of the cage until then
        except TimeoutError:
            raise self._too_slow() from None
        if self._loading is not None:
            await asyncio.shield(self._loading)  # a cancelled start waits for it in ``release``
        mark("network")
        for layer in self._layers:
            if not layer.from_birth:
                layer.confirm(self._process)
        if self._cgroup in self._layers:
            self._cgroup.cap_processor()
            if self._cgroup.caps_disks:
                await asyncio.to_thread(self._cgroup.cap_disks, self.pid)
        mark("confirm")
        send_packet(spare.link, b"x")
        try:
            async with asyncio.timeout(_SET_UP_SECONDS):
                answer, _ = await self._receive(spare)
        except TimeoutError:
            raise self._too_slow() from None
        if answer:
            raise self._failure(answer)
        spare.link.close()
        mark("exec")
        self._started = time.monotonic()

    async def _cloned_and_caged(self, spare: Spare, mark: _Stopwatch) -> None:
        """Wait for the parked process's word that it has cloned, and the cage's that it is one; either may be first."""
        caged = False
        while self._clone is None or not caged:
            answer, fds = await self._receive(spare)
            if "pid" in answer:
                self._born(answer, fds, spare)
                mark("clone")
                for layer in self._layers:
                    if layer.from_birth:
                        layer.confirm(self._process)
                self._watch_oom()
                mark("confirm groups")
            elif answer.get("step") == "caged":
                caged = True
                self.listener = fds[0] if fds else -1
                took = answer.get("took")
                if isinstance(took, dict):
                    self.steps.update({f"enter {step}": float(ms) for step, ms in took.items()})
            else:
                raise self._failure(answer)
        mark("enter")

    def _born(self, answer: dict[str, object], fds: list[int], spare: Spare) -> None:
        self._clone = Clone(int(str(answer["pid"])), fds[0])
        self._process = Process(self._clone.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._clone.pidfd, self._gone)
        loop.add_reader(spare.status, self._reported)

    async def _given_up(self, spare: Spare) -> None:
        """The start ended without a word of the clone: learn of it, for it is a child of this process."""
        with contextlib.suppress(OSError):
            spare.link.shutdown(socket.SHUT_WR)  # nothing more comes: what still waits there ends
        await spare.ended()
        with contextlib.suppress(OSError):
            while True:
                packet, fds = receive_packet(spare.link)
                answer = json.loads(packet) if packet else {}
                if "pid" in answer:
                    self._born(answer, fds, spare)
                else:
                    for fd in fds:
                        os.close(fd)
                if not packet:
                    break

    async def _receive(self, spare: Spare) -> tuple[dict[str, object], list[int]]:
        """The next word on the link; empty when the cage exec'd (or died, which ``wait`` tells apart)."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                packet, fds = receive_packet(spare.link)
            except BlockingIOError:
                ready = loop.create_future()
                loop.add_reader(spare.link, _resolve, ready)
                try:
                    await ready
                finally:
                    loop.remove_reader(spare.link)
                continue
            return (json.loads(packet) if packet else {}), fds

    def _too_slow(self) -> ConfinementError:
        return ConfinementError(
            f"cage of {self.spec.name}", f"not built in {_SET_UP_SECONDS:g} s", "the host may be overloaded"
        )

    def _failure(self, answer: dict[str, object]) -> ConfinementError:
        if not answer:
            return ConfinementError(
                f"cage of {self.spec.name}", "it died while it was being built", "see the kernel log"
            )
        step, detail = answer.get("step"), str(answer.get("detail"))
        if step == "clone3":
            number = answer.get("errno")
            remedy = clone_remedy(number if isinstance(number, int) else 0)
            return ConfinementError(f"clone of the cage of {self.spec.name}", detail, remedy)
        if step == "exec":
            return ConfinementError(f"start of {self.spec.name}", detail, _exec_remedy(answer.get("errno")))
        return ConfinementError(f"cage of {self.spec.name}", f"{step}: {detail}", "see 'isolator check'")

    def _watch_oom(self) -> None:
        """On v1 the kernel kills one process of a group that is out of memory; end the whole cage, as v2 does."""
        memory = self.leaf.v1.get("memory") if self._cgroup in self._layers else None
        if memory is None:
            return
        control = os.open(memory / "memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
        self._oom = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            (memory / "cgroup.event_control").write_text(f"{self._oom} {control}")
        finally:
            os.close(control)
        asyncio.get_running_loop().add_reader(self._oom, self._out_of_memory)

    def _out_of_memory(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._oom)
        if self.leaf.populated():
            self._oom_seen = True
            self.leaf.kill()

    def _gone(self) -> None:
        asyncio.get_running_loop().remove_reader(self.pidfd)
        self._exited.set()
        self._reported()

    def _reported(self) -> None:
        assert self._spare is not None
        asyncio.get_running_loop().remove_reader(self._spare.status)
        self._ended.set()

    def signal(self, number: int) -> None:
        """Send a signal to pid 1 of the cage, which forwards it to the sidecar."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    async def wait(self) -> End:
        """Wait until the sidecar has ended, and say how and why. ``release`` ends what else is in the cage."""
        await self._ended.wait()
        raw = b""
        assert self._spare is not None
        with contextlib.suppress(BlockingIOError):
            raw = os.read(self._spare.status, 4)
        info = None
        if len(raw) != 4:
            # The pipe's end without a word: pid 1 was killed, and its own death is all there is to tell.
            await self._exited.wait()
            info = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        if self._cgroup in self._layers:
            events = self.leaf.events()
            events = Events(max(events.oom_kills, int(self._oom_seen)), events.task_denials)
        else:
            events = Events()
        if len(raw) == 4:
            code: int | None = os.waitstatus_to_exitcode(struct.unpack("=i", raw)[0])
        else:
            code = -info.si_status if info and info.si_code != os.CLD_EXITED else 125
        assert code is not None
        number = -code if code < 0 else None
        return End(None if code < 0 else code, number, self._cause(code, number, events), self.uptime, events)

    def _cause(self, code: int, number: int | None, events: Events) -> str:
        if events.oom_kills:
            return "out of memory"
        if self._stopping:
            return "stopped"
        if number == signal.SIGSYS:
            return "forbidden ABI"
        if events.task_denials and code != 0:
            return "task limit"
        return "signal" if number is not None else "exit"

    async def stop(self, grace: float) -> None:
        """SIGTERM, then after ``grace`` seconds the whole group is killed. ``wait`` tells the rest."""
        self._stopping = True
        self.signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._ended.wait()
                return
        self.kill()

    def kill(self) -> None:
        """End the whole cage at once: its group, and pid 1, in case somebody has moved processes to another group."""
        if self._cgroup in self._layers:
            self.leaf.kill()
        self.signal(signal.SIGKILL)

    def changed_outside(self) -> str:
        """What somebody changed about the groups of the running cage; empty when they are as they were made."""
        if self._cgroup not in self._layers or self._exited.is_set():
            return ""
        try:
            self._cgroup.confirm_again(self._process)
        except (ConfinementError, OSError) as error:
            return "" if self._exited.is_set() or self._ended.is_set() else str(error)
        return ""

    async def release(self) -> None:
        """Kill what is left and undo every layer, in reverse order; idempotent."""
        if self._loading is not None:
            await asyncio.wait([self._loading])
            if not self._loading.cancelled():
                self._loading.exception()
            self._loading = None
        loop = asyncio.get_running_loop()
        if self._oom >= 0:
            loop.remove_reader(self._oom)
            os.close(self._oom)
            self._oom = -1
        if self._spare is not None and self._clone is None and not self._exited.is_set():
            await self._given_up(self._spare)
        if self._clone is not None:
            self.kill()
            await self._exited.wait()
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
            os.close(self.pidfd)
            self._tools.launcher.forget(self.spec.leaf)
            self._clone = None
        if self.listener >= 0:
            os.close(self.listener)
            self.listener = -1
        if self._spare is not None:
            if self._spare.status >= 0:
                loop.remove_reader(self._spare.status)
            await self._spare.release()
        for layer in reversed(self._layers):
            if layer is self._cgroup and self._cgroup.leaf is not None:
                await _empty(self._cgroup.leaf)
            layer.release()
        self._tools.journal.gone(self.spec.leaf)


async def _empty(leaf: Leaf) -> None:
    """Wait without blocking the loop until a killed leaf has no process, zombie included, left."""
    if leaf.populated():
        await asyncio.to_thread(leaf.wait_empty, 5.0)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Stopwatch:
    def __init__(self, steps: dict[str, float]) -> None:
        self._steps, self._last = steps, time.perf_counter()

    def __call__(self, step: str) -> None:
        now = time.perf_counter()
        self._steps[step] = round((now - self._last) * 1000, 3)
        self._last = now


def _exec_remedy(number: object) -> str:
    import errno

    return {
        errno.ENOENT: "check the name; only /usr, the plugin's files and the folders named in the policy are visible",
        errno.EACCES: "make it executable (chmod +x) and readable by everyone",
        errno.ENOEXEC: "it is neither a program of this architecture nor a script that starts with #!",
    }.get(number if isinstance(number, int) else 0, "check the program")
