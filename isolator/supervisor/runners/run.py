"""One run of a runner's: from the request to the last trace. Its caller's connection is the run: it ends with it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

from isolator.audit.schema import NetDenied, Resources, RunEnded, RunStarted, SyscallDenied
from isolator.audit.snapshots import snapshot
from isolator.base.pacing import TokenBucket
from isolator.base.structs import replace
from isolator.cage.cage import Cage, Stdio
from isolator.cage.processes import CageExit
from isolator.cage.terminal import new_terminal
from isolator.cage.view import PATH, time_zone
from isolator.errors import ConfinementError, DeniedError, IsolatorError, UnavailableError, UsageError, printable
from isolator.ipc.messages import Origin
from isolator.ipc.packet import receive_anything, send_packet
from isolator.ipc.run_request import POLICY, POLICY_NAME, TERMINAL, RunRequest, error_fields, pack, read_signal
from isolator.ipc.tasks import made_in_thread
from isolator.layers.base import Bind, CageSpec
from isolator.layers.network import namespace as network_layer
from isolator.layers.user import UidLease
from isolator.linux.descriptors import FdSet
from isolator.linux.readable import readable
from isolator.linux.shortage import is_shortage
from isolator.policy.denial import INSTEAD, DenialRule
from isolator.policy.meet.single_run import Net, policy_for_run
from isolator.registration.reading import read_policy
from isolator.supervisor.ruleset_watch import watched_ruleset
from isolator.supervisor.runners.paths import find_paths
from isolator.supervisor.tickets import by_uid

if TYPE_CHECKING:
    from isolator.ipc.handover import RunnerState
    from isolator.launcher.client import Launcher
    from isolator.layers.seccomp.notifier import Denied
    from isolator.policy.grant import PluginPolicy
    from isolator.policy.host import HostConfig
    from isolator.policy.model import EffectivePolicy
    from isolator.supervisor.run import RunContext
    from isolator.supervisor.runners.shares import Place

PREFIX = "_run."
"""Begins the name of a runner's cages in groups and trail, before the uid; a plugin's name begins with a letter."""
STREAMS = 3
"""Descriptors that come first: standard input, output and errors."""
_WAIT_SECONDS = 10.0
"""For the trail, while it cannot be written."""
_MOST_SHOWN = 5
"""Different calls whose refusal the caller is shown; the trail has all."""
_MOST_REASON = 1000
"""Characters of it on record: a caller's words are in it."""
_SIGNALS = 20.0
"""Signals a second that a caller may send."""


class RunnerRun:
    """One run of a caller (uid, gid, groups). ``connection`` stays the owner's."""

    def __init__(
        self,
        context: RunContext,
        config: HostConfig,
        connection: socket.socket,
        caller: tuple[int, int, Sequence[int]],
        reading: asyncio.Semaphore,
        theirs: list[int],
        id: str = "",
    ) -> None:
        """``reading``: taken while a policy file is read, in a thread that the daemon's other work shares.

        ``theirs``: descriptors that lead to what is a stranger's, more of which come; the owner closes them apart.
        """
        self.id = id or os.urandom(5).hex()
        self.name = f"{PREFIX}{caller[0]}"
        self.theirs = theirs
        self.trees = FdSet()
        """Those of mounts, likewise."""
        self._context, self._config, self._caller, self._connection = context, config, caller, connection
        self._by = by_uid(caller[0])
        self._reading = reading
        self.cage: Cage | None = None
        self._lease: UidLease | None = None
        self._denials: object = None
        """The notifier's token of its denied calls."""
        self._watched = False
        """Nothing is awaited but its end."""
        self._shown: set[str] = set()
        self._cause, self._origin = "", Origin.PLUGIN
        self._ended = False
        self._stop = asyncio.Event()
        """Set once the run is to end, however far its start has come."""

    async def serve(
        self, request: RunRequest, streams: Sequence[int], paths: Sequence[int], place: Place
    ) -> Sequence[tuple[str, str]]:
        """Do what is requested; returns the answer: how it ended, or why it could not be."""
        try:
            policy = self._effective(request, await self._file(request))
            place.claim(tasks=policy.resources.tasks, memory=policy.resources.memory)
            if self._context.wait_for_trail:
                await _trail_writable(self._context)
            reading = functools.partial(UidLease, self._config.uid_range)  # every user there is
            lease = self._lease = await made_in_thread(reading, UidLease.release)
            try:
                binds: list[Bind] = []
                if request.paths:
                    binds = await find_paths(request.paths, paths, self._caller, lease.uid, self.trees)
                spec = self._spec(request, policy, lease.uid, binds)
                with FdSet() as for_start:
                    if TERMINAL in request.once:
                        spec.mounts["/dev/pts"], master, stream = new_terminal(lease.uid, for_start)
                        spec.terminal, streams = True, [stream] * STREAMS
                        answer(self._connection, [(TERMINAL, "yes")], [master])
                    end = await self._live(spec, request, Stdio(*streams), for_start)
            finally:
                lease.release()
        except (IsolatorError, OSError) as error:
            return error_fields(self._for_caller(error))
        return self._told(end)

    def _told(self, end: CageExit) -> Sequence[tuple[str, str]]:
        return _end_fields(replace(end, cause=self._cause) if self._cause else end)

    def terminate(self, cause: str, origin: Origin = Origin.DAEMON) -> None:
        """End the run at once; ``cause`` and ``origin`` are recorded as those of its end."""
        if not self._cause:
            self._cause, self._origin = cause, origin
        self._stop.set()
        if self.cage is not None and self.cage.started:
            self.cage.kill()

    def take_snapshot(self) -> None:
        """Record the use of resources, and end a run whose groups or /proc somebody has changed."""
        cage = self.cage
        if cage is None or not cage.started or self._ended or cage.processes.started == 0:
            return
        usage = snapshot(cage.leaf.folders(), cage.leaf.processes())
        self._record(Resources(**usage))
        cage.refresh_figures(usage)
        if changed := cage.detect_drift():
            self.terminate(changed, Origin.OPERATOR)

    # --- over an exec of this process ---------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether it can be handed over: its command runs."""
        return self._watched and not self._cause and self.cage is not None and not self.cage.processes.ended.is_set()

    def hand_over(self) -> RunnerState:
        """The state of this run, when it is settled."""
        from isolator.ipc.handover import RunnerState

        assert self.cage is not None and self._lease is not None
        uid, gid, groups = self._caller
        return RunnerState(
            id=self.id, uid=uid, gid=gid, groups=tuple(groups), connection=self._connection.fileno(),
            cage=self.cage.hand_over(), effective=self.cage.spec.policy.model_dump(mode="json"),
            lease=self._lease.uid, lock=self._lease.lock, listener=self._context.notifier.listener_of(self._denials),
            theirs=(*self.theirs, *self.trees), shown=tuple(self._shown),
        )  # fmt: skip

    def take_over(self, before: RunnerState, kept_by: Launcher) -> EffectivePolicy:
        """Go on from the state before the exec, and return the policy; what does not hold is ended."""
        from isolator.policy.model import EffectivePolicy

        policy, context = EffectivePolicy.model_validate(before.effective), self._context
        uid = before.lease
        spec = CageSpec(self.name, self.id, uid, uid, "cage", policy, context.paths, [], {}, to_group=True)
        cage, _ = Cage.adopt(spec, context.runtime, before.cage, kept_by)
        self.cage, self._shown, self._lease = cage, {*before.shown}, UidLease.adopt(before.lease, before.lock)
        context.broker.adopt(self.id, self.name, cage.network, policy.network, self.terminate)
        try:
            cage.confirm()
        except ConfinementError as error:
            origin = Origin.DAEMON if is_shortage(error) else Origin.OPERATOR
            self.terminate(f"it did not hold when the daemon was reloaded: {error}", origin)
        if before.listener >= 0:
            self._denials = context.notifier.watch(before.listener, self._denied)
        return policy

    async def go_on(self) -> Sequence[tuple[str, str]]:
        """Stay with a run that was taken over; returns the answer, as ``serve``."""
        assert self.cage is not None and self._lease is not None
        try:
            return self._told(await self._to_its_end(self.cage))
        except (IsolatorError, OSError) as error:
            return error_fields(self._for_caller(error))
        finally:
            await self._take_down(self.cage)
            self._lease.release()

    # --- before there is a cage --------------------------------------------------------------------------------

    async def _file(self, request: RunRequest) -> PluginPolicy | None:
        """The policy file of the request, read by a process that has no right to anything."""
        text = request.once.get(POLICY)
        if text is None:
            return None
        name = printable(request.once.get(POLICY_NAME, "policy"))
        async with self._reading:
            found = await asyncio.to_thread(read_policy, os.fsencode(text), name, self._config.uid_range)
        if found.listen:
            raise DeniedError(found.at("grant.listen"), "a user's run gets no port of the host", "leave it out")
        if found.read:
            why = "the daemon opens no path for a user"
            raise DeniedError(found.at("filesystem.read"), why, "name each with --read: your own process opens it")
        return found

    def _effective(self, request: RunRequest, file: PluginPolicy | None) -> EffectivePolicy:
        once: dict[str, Any] = {key: request.once.get(key) for key in ("memory", "cpu", "tmp")}
        net = request.once.get("net")
        if net is not None and net not in get_args(Net):
            raise UsageError("--net", f"is none of {', '.join(get_args(Net))}")
        for path in (*request.read, *request.write):
            if path != "/" + "/".join(part for part in path.split("/") if part not in ("", ".")):
                raise UsageError(path, "is not the shortest form of a path", "write it without // and /./")
        policy = policy_for_run(
            self._config.for_runners(), file, tasks=request.number("tasks"), nofile=request.number("nofile"),
            net=cast("Net | None", net), egress=request.egress, read=request.read, write=request.write,
            note=lambda text: answer(self._connection, [("note", text)]), **once,
        )  # fmt: skip
        return policy.model_copy(update={"plugin": self.name})  # shown is what it has opened, and nothing else

    def _spec(self, request: RunRequest, policy: EffectivePolicy, uid: int, binds: list[Bind]) -> CageSpec:
        return CageSpec(
            name=self.name,
            run=self.id,
            uid=uid,
            gid=uid,
            user="cage",
            policy=policy,
            paths=self._context.paths,
            argv=request.argument,
            env={
                "PATH": f"{PATH}:/usr/sbin:/sbin", "HOME": "/tmp", "LANG": "C.UTF-8", "TMPDIR": "/tmp",
                "TZ": time_zone(), **request.variables(request.own), **policy.env, **request.variables(request.env),
            },
            cwd=request.once.get("cwd", "/"),
            binds=sorted(binds, key=lambda bind: bind.target),  # a folder before those below it
            to_group=True,
        )  # fmt: skip

    # --- its life ----------------------------------------------------------------------------------------------

    async def _live(self, spec: CageSpec, request: RunRequest, stdio: Stdio, for_start: FdSet) -> CageExit:
        context = self._context

        async def hand_over(made: network_layer.CageNetwork) -> None:
            await context.broker.attach(self.id, self.name, made, spec.policy.network, self.terminate)

        cage = self.cage = Cage(spec, context.runtime, stdio, handover=hand_over)
        try:
            try:
                if not await cage.start(self._stop):
                    raise UnavailableError(self.name, self._cause, "try again")
            except Exception as error:
                self._record(RunEnded(cause="did not start", by=self._by, reason=str(error)[:_MOST_REASON]))
                raise
            for_start.close()
            self._started(cage, request)
            return await self._to_its_end(cage)
        finally:
            await self._take_down(cage)

    async def _to_its_end(self, cage: Cage) -> CageExit:
        end = await self._watch(cage)
        self._ended = True
        self._record_end(cage, end)
        return end

    async def _take_down(self, cage: Cage) -> None:
        await cage.release()
        with contextlib.suppress(UnavailableError):
            await self._context.broker.detach(self.id)

    async def _watch(self, cage: Cage) -> CageExit:
        """Wait for the end of the program, or of the connection, which ends it."""
        waiting = asyncio.create_task(cage.wait())
        talking = asyncio.create_task(self._talk(cage))
        try:
            with watched_ruleset(cage.network, cage.spec.policy.network, self._ruleset_changed):
                if self._cause:  # ended while it was being started
                    cage.kill()
                self._watched = True
                await asyncio.wait({waiting, talking}, return_when=asyncio.FIRST_COMPLETED)
                self._watched = False
                if not waiting.done():
                    self.terminate("its caller has left")
                return await waiting
        finally:
            for task in (waiting, talking):
                task.cancel()
            await asyncio.gather(waiting, talking, return_exceptions=True)

    async def _talk(self, cage: Cage) -> None:
        """Pass the caller's signals on, at a bounded rate; returns with the connection's end, or with what is none."""
        pace = TokenBucket(_SIGNALS, 2 * _SIGNALS)
        while True:
            await readable(self._connection.fileno())
            try:
                packet, fds = receive_anything(self._connection, 64)
            except BlockingIOError:
                continue
            except OSError:
                return
            self.theirs += fds
            number = 0 if fds else read_signal(packet)
            if not number:
                return
            cage.signal(number)
            await asyncio.sleep(pace.take())

    # --- the caller and the trail ------------------------------------------------------------------------------

    def _for_caller(self, error: Exception) -> IsolatorError:
        if isinstance(error, IsolatorError):
            return type(error)(error.what.replace(self.name, "run"), error.why, error.remedy)
        return IsolatorError("isolator run", str(error), "see the daemon's log")

    def _record(self, record: Any, **further: Any) -> None:
        self._context.audit.record(record, plugin=self.name, run=self.id, **further)

    def _started(self, cage: Cage, request: RunRequest) -> None:
        from isolator.layers.ledger import ledger, not_enforced
        from isolator.volume import volume

        spec = cage.spec
        started = RunStarted(
            pid=cage.pid,
            uid=spec.uid,
            policy_sha256=spec.policy.digest(),
            milliseconds=cage.steps,
            degraded=not_enforced(ledger(volume.check)),
            by=self._by,
            program=printable(spec.argv[0])[:256],
            cgroup=str(cage.leaf.unified),
            env=sorted(printable(name)[:128] for name in spec.env)[:256],
            read=request.read,
            write=request.write,
        )
        self._record(started, urgent=True)
        if cage.listener >= 0:
            self._denials = self._context.notifier.watch(cage.listener, self._denied)
            cage.listener = -1

    def _denied(self, denied: Denied) -> None:
        record = SyscallDenied(call=denied.call, count=denied.count)
        self._record(record, happened_ns=denied.last_ns, since_ns=denied.first_ns)
        if denied.call not in self._shown and len(self._shown) < _MOST_SHOWN:
            self._shown.add(denied.call)
            instead = INSTEAD.get(denied.call)
            text = f"system call {denied.call}" + (f"; {instead}" if instead else "")
            answer(self._connection, [("denied", text)])

    def _record_end(self, cage: Cage, end: CageExit) -> None:
        self._record(Resources(**snapshot(cage.leaf.folders(), [])))
        ended = RunEnded(cause=self._cause or end.cause, origin=self._origin, by=self._by, **end.figures)
        # Urgent: on its way before the journal forgets the run.
        self._record(ended, urgent=True)

    def _ruleset_changed(self, difference: str) -> None:
        self._record(NetDenied(rule=DenialRule.RULESET_CHANGED, why=difference))
        self.terminate("its network rules were changed", Origin.OPERATOR)


def answer(connection: socket.socket, fields: Sequence[tuple[str, str]], fds: Sequence[int] = ()) -> None:
    """Send fields to a caller if there is room: nobody waits for one who does not read."""
    with contextlib.suppress(OSError):
        send_packet(connection, pack(fields), fds)


async def _trail_writable(context: RunContext) -> None:
    try:
        async with asyncio.timeout(_WAIT_SECONDS):
            await context.audit.writable()
    except TimeoutError:
        why = 'the audit trail cannot be written, and nothing starts without it (disk_full = "stop")'
        raise UnavailableError("isolator run", why, "try again; 'isolator check' has the reason") from None


def _end_fields(end: CageExit) -> Sequence[tuple[str, str]]:
    code = "" if end.exit_code is None else str(end.exit_code)
    number = "" if end.signal is None else str(end.signal)
    return [
        ("end", end.cause), ("exit_code", code), ("signal", number), ("seconds", f"{end.uptime:.4f}"),
        ("oom_kills", str(end.events.oom_kills)), ("task_denials", str(end.events.task_denials)),
    ]  # fmt: skip
