"""One cage: the layers composed around one process, from start to the last trace removed.

    async with Sandbox(spec, tools, stdio) as cage:
        await cage.start()
        end = await cage.wait()

Start, in order: every layer prepares; the launcher clones; the pid goes into its groups; the child applies the
layers to itself and reports; every layer is confirmed from the kernel; only then may it exec. Whatever fails on the
way destroys all of it and raises ConfinementError with the step and the kernel's reason. Leaving the context
kills what is left, and releases the layers in reverse order.
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
from isolator.ipc import pair, receive_packet, send_packet
from isolator.journal import Entry, Journal
from isolator.launch.client import Clone, Launcher
from isolator.launch.plan import Plan
from isolator.layers.base import CageSpec, Layer
from isolator.layers.capabilities import Capabilities
from isolator.layers.cgroup import Cgroup, Events, Leaf, Subtree
from isolator.layers.filesystem import Filesystem
from isolator.layers.landlock import Landlock
from isolator.layers.namespaces import Namespaces
from isolator.layers.netns import Network
from isolator.layers.no_new_privs import NoNewPrivs
from isolator.layers.rlimits import Rlimits
from isolator.layers.seccomp import Seccomp
from isolator.layers.user import User

if TYPE_CHECKING:
    from isolator.layers.network import CageNetwork

LAYERS: tuple[type[Layer], ...] = (
    User, Cgroup, Rlimits, Namespaces, Filesystem, Network, Capabilities, NoNewPrivs, Landlock, Seccomp,
)  # fmt: skip
"""Every layer, in the order in which a reader of the ledger meets them."""

_SET_UP_SECONDS = 10.0


@dataclass
class Tools:
    """What every cage of one daemon shares; the launcher is replaced when it dies."""

    launcher: Launcher
    journal: Journal
    subtree: Subtree


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

    ``network`` may be made already, else it is made during the start. ``handover`` is given the network as soon as
    it is there, and awaited before the exec: it takes the broker's sockets. ``without`` names layers to leave out,
    for tests of their absence.
    """

    def __init__(
        self,
        spec: CageSpec,
        tools: Tools,
        stdio: Stdio,
        network: Network | None,
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
        every: list[Layer] = [
            self._cgroup, Namespaces(), Rlimits(), Filesystem(), User(), Capabilities(), NoNewPrivs(), Landlock(),
            Seccomp(),
        ]  # fmt: skip
        if network is not None:
            every.append(network)
        self._layers = [layer for layer in every if layer.name not in without]
        self._network = network if network in self._layers else None
        self._handover = handover
        self._ahead: list[asyncio.Task[None]] = []
        self._clone: Clone | None = None
        self._exited = asyncio.Event()
        """Pid 1 is gone: its namespaces are taken down, which takes milliseconds."""
        self._ended = asyncio.Event()
        """The sidecar has ended: pid 1 has said so, or is gone itself."""
        self._status = -1
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
        # Two slow things need nothing of the child: making the network, and (on hybrid hosts) waking the lock under
        # which the kernel moves a process between v1 groups. They are done while the rest is prepared and cloned.
        if self._network is not None and self._network.unmade:
            policy = spec.policy.network
            self._ahead.append(asyncio.create_task(asyncio.to_thread(self._network.make, policy, spec.name)))
        if tools.subtree.v1 and self._cgroup in self._layers:
            self._ahead.append(asyncio.create_task(asyncio.to_thread(tools.subtree.warm)))
        leaf = Leaf.under(tools.subtree, spec.leaf)
        tools.journal.make(Entry(spec.leaf, "leaf", tuple(map(str, leaf.folders()))))
        mark("journal")
        plan = Plan(cage=spec.leaf, argv=spec.argv, env=spec.env, cwd=spec.cwd)
        (mine, report), (go, go_read) = pair(), pair()
        self._status, status_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._status, False)
        plan.fds = {
            "stdin": self._stdio.stdin, "stdout": self._stdio.stdout, "stderr": self._stdio.stderr,
            "report": report.fileno(), "go": go_read.fileno(), "status": status_write,
        }  # fmt: skip
        try:
            for layer in self._layers:
                layer.prepare(spec, plan)
                mark(f"prepare {layer.name}")
            self._clone = await tools.launcher.clone(plan)
            loop = asyncio.get_running_loop()
            loop.add_reader(self._clone.pidfd, self._gone)
            loop.add_reader(self._status, self._reported)
            mark("clone")
        except BaseException:
            mine.close()
            go.close()
            raise
        finally:
            report.close()
            go_read.close()
            plan.close_given()
            os.close(status_write)
        mine.setblocking(False)
        try:
            async with asyncio.timeout(_SET_UP_SECONDS):
                await self._build(mine, go, mark)
        except TimeoutError:
            raise ConfinementError(
                f"cage of {spec.name}", f"not built in {_SET_UP_SECONDS:g} s", "the host may be overloaded"
            ) from None
        finally:
            mine.close()
            go.close()

    async def _build(self, report: socket.socket, go: socket.socket, mark: _Stopwatch) -> None:
        # The child makes its file view meanwhile.
        while self._ahead:
            await self._ahead[-1]
            self._ahead.pop()
        mark("made ahead")
        if self._cgroup in self._layers:
            self.leaf.attach(self.pid)
        mark("attach")
        handed_over: asyncio.Future[None] | None = None
        if self._network is not None:
            send_packet(go, b"a", [self._network.network.netns_fd])
            if self._handover is not None:
                handed_over = asyncio.ensure_future(self._handover(self._network.network))
        else:
            send_packet(go, b"a")
        try:
            answer, fds = await self._receive(report)
            if answer.get("step") != "caged":
                raise self._failure(answer)
            self.listener = fds[0] if fds else -1
            took = answer.get("took")
            if isinstance(took, dict):
                self.steps.update({f"enter {step}": float(ms) for step, ms in took.items()})
            mark("enter")
            for layer in self._layers:
                layer.confirm(self.pid)
            mark("confirm")
        except BaseException:
            if handed_over is not None:
                await asyncio.wait([handed_over])
            raise
        if handed_over is not None:
            await handed_over
            mark("broker")
        self._watch_oom()
        send_packet(go, b"x")
        answer, _ = await self._receive(report)
        if answer:
            raise self._failure(answer)
        mark("exec")
        self._started = time.monotonic()

    async def _receive(self, report: socket.socket) -> tuple[dict[str, object], list[int]]:
        """The child's next word; empty when it exec'd (or died, which ``wait`` tells apart)."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                packet, fds = receive_packet(report)
            except BlockingIOError:
                ready = loop.create_future()
                loop.add_reader(report, _resolve, ready)
                try:
                    await ready
                finally:
                    loop.remove_reader(report)
                continue
            return (json.loads(packet) if packet else {}), fds

    def _failure(self, answer: dict[str, object]) -> ConfinementError:
        if not answer:
            return ConfinementError(
                f"cage of {self.spec.name}", "it died while it was being built", "see the kernel log"
            )
        step, detail = answer.get("step"), str(answer.get("detail"))
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
        asyncio.get_running_loop().remove_reader(self._status)
        self._ended.set()

    def signal(self, number: int) -> None:
        """Send a signal to pid 1 of the cage, which forwards it to the sidecar."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    async def wait(self) -> End:
        """Wait until the sidecar has ended, and say how and why. ``release`` ends what else is in the cage."""
        await self._ended.wait()
        raw = b""
        with contextlib.suppress(BlockingIOError):
            raw = os.read(self._status, 4)
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
        self.leaf.kill()

    async def release(self) -> None:
        """Kill what is left and undo every layer, in reverse order; idempotent."""
        if self._ahead:
            await asyncio.wait(self._ahead)
            for task in self._ahead:
                task.exception()
            self._ahead = []
        if self._oom >= 0:
            asyncio.get_running_loop().remove_reader(self._oom)
            os.close(self._oom)
            self._oom = -1
        if self._clone is not None:
            if self._cgroup in self._layers:
                self.leaf.kill()
            else:
                self.signal(signal.SIGKILL)
            await self._exited.wait()
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
            os.close(self.pidfd)
            self._tools.launcher.forget(self.spec.leaf)
            self._clone = None
        if self.listener >= 0:
            os.close(self.listener)
            self.listener = -1
        if self._status >= 0:
            asyncio.get_running_loop().remove_reader(self._status)
            os.close(self._status)
            self._status = -1
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
