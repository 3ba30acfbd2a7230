"""Preparing a run: everything of it but the cage itself is made, or taken over from before this process's exec."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from isolator.audit.schema import PluginStarted
from isolator.base.structs import struct_class
from isolator.cage.cage import Cage, Stdio
from isolator.errors import ConfinementError, DeniedError, ExecError, IsolatorError, NotFoundError, UsageError
from isolator.ipc.messages import Origin
from isolator.ipc.tasks import opened_in_thread, report
from isolator.layers.base import CageSpec
from isolator.layers.network import namespace as network_layer
from isolator.linux.apart import apart
from isolator.linux.descriptors import FdSet, check_open
from isolator.linux.shortage import is_shortage
from isolator.registration.staging import hash_binary
from isolator.supervisor.cage_spec import open_state, plugin_spec
from isolator.supervisor.reach import SOCKET_FOLDER, find_pipe, identity
from isolator.supervisor.run import Run, RunContext
from isolator.volume.volume import Volume

if TYPE_CHECKING:
    from isolator.ipc.handover import RunState
    from isolator.ipc.messages import Environment
    from isolator.launcher.client import Launcher
    from isolator.policy.model import EffectivePolicy
    from isolator.registration.store import Registration, Release


@struct_class(frozen=True)
class Input:
    """Things that an invocation gets beyond a plugin's other runs. The descriptor stays the caller's."""

    stdin: int
    variables: Mapping[str, str]
    api: str
    """Name of the folder of its host API."""


class Adopted(NamedTuple):
    """A run from before this process's exec."""

    run: Run | None
    """None: nothing of it was taken over."""
    without: tuple[str, ...]
    """The layers that its cage came without."""
    problem: str
    """Why it does not go on: it did not hold, and is being ended, or there is none."""


def adopt_run(
    context: RunContext, registration: Registration, effective: EffectivePolicy, before: RunState, kept_by: Launcher
) -> Adopted:
    """A run that began before this process's exec; it holds every descriptor of ``before``.

    ``kept_by``: the launcher of then. A fault is this run's alone.
    """
    try:
        return _adopt_run(context, registration, effective, before, kept_by)
    except Exception as error:  # whatever it was, the others go on
        report(asyncio.get_running_loop(), f"take-over of run {before.id} of plugin {registration.name}", error)
        return Adopted(None, (), reason_of(error))


def _adopt_run(
    context: RunContext, registration: Registration, effective: EffectivePolicy, before: RunState, kept_by: Launcher
) -> Adopted:
    from datetime import datetime

    from isolator.ipc.handover import descriptors

    name = registration.name
    if before.started_at:  # an invocation has none
        datetime.fromisoformat(before.started_at)
    check_open((before.directory, before.stdout, before.stderr, *before.streams.values(), *descriptors(before)))
    # Its program and environment are its own by now: only the names and the policy are needed from here on.
    spec = CageSpec(name, before.id, before.uid, before.gid, registration.user, effective, context.paths, [], {})
    cage, without = Cage.adopt(spec, context.runtime, before.cage, kept_by)
    pipes, folder = [before.stdout, before.stderr], os.fstat(before.directory)
    logs = tuple(os.fstat(pipe).st_ino for pipe in pipes)
    for_start = [before.directory]
    if all(find_pipe(before.cage.pid, pipe) for pipe in logs):  # not in a cage of an earlier version
        for_start += pipes
        pipes = []
    streams = [before.streams[key] for key in ("stdin", "stdout") if key in before.streams]
    run = Run(
        before.id, name, effective, cage, identity(folder), logs,
        FdSet([*pipes, *streams]), FdSet(for_start), context, pipes=pipes, streams=streams,
        started_at=before.started_at, began=before.began, forced_cause=before.forced_cause, origin=before.origin,
        reached=before.reached, shown={path: (device, inode) for path, (device, inode) in before.shown.items()},
        port=before.port,
    )  # fmt: skip
    run.use.latest = dict(before.usage)
    if before.drift >= 0:
        os.close(before.drift)  # of an earlier version: what it was told since, the confirmation below finds
    if before.ready:
        run.socket_there.set()
    context.broker.adopt(run.id, name, cage.network, effective.network, run.terminate)
    problem = ""
    try:
        run.cage.confirm()
    except ConfinementError as error:
        problem = str(error)
        origin = Origin.DAEMON if is_shortage(error) else Origin.OPERATOR
        run.terminate(f"it did not hold when the daemon was reloaded: {error}", origin)
    run.answer_denied(before.listener)
    run.for_start.close()
    return Adopted(run, without, problem)


async def prepare_run(
    context: RunContext, registration: Registration, effective: EffectivePolicy, argv: list[str], run_id: str,
    environment: Environment, given: Input | None = None, *, port: int | None = None, talks: bool = False,
) -> Run:  # fmt: skip
    """Make everything of a run but the cage itself; raises IsolatorError or OSError, and nothing of it is left then.

    ``talks``: the host speaks to it over its stdin and stdout.
    """
    name = registration.name
    if registration.release.kind == "binary":
        # Read whole, and from memory when the cage is specified.
        await apart(lambda: hash_binary(Path(registration.release.binary_path)))

    async def hand_over(made: network_layer.CageNetwork) -> None:
        await context.broker.attach(run_id, name, made, effective.network, run.terminate)

    with FdSet() as owned:
        state = -1
        if size := effective.filesystem.state:
            volume = Volume(context.paths.state, name, context.runtime.journal)
            state = volume.open_ready(size)
            if state < 0:
                # Formatting, checking and resizing take their time; nothing else of the daemon waits for them.
                (state,) = await opened_in_thread(lambda: [open_state(registration, effective, volume)])
            owned.add(state)
        api = given.api if given is not None else name
        spec = plugin_spec(registration, effective, argv, context.paths, run_id, environment, state, api, owned.add)
        if given is not None:
            spec.env.update(given.variables)
        if port is not None:
            spec.env["PLUGIN_PORT"] = str(port)
        pipes, writers = _log_pipes(owned)
        stdin, streams, stdout = given.stdin if given is not None else owned.add(_nothing()), list[int](), writers[0]
        if talks:
            streams, stdin, stdout = _streams(owned)
        stdio, admit = Stdio(stdin, stdout, writers[1]), functools.partial(context.fences.check, name)
        cage = Cage(spec, context.runtime, stdio, logs=pipes, handover=hand_over, admit=admit)
        folder = os.fstat(spec.mounts[SOCKET_FOLDER])
        read = set(effective.filesystem.read)
        shown = {bind.target: identity(os.fstat(bind.fd)) for bind in spec.binds if bind.target in read}
        logs = tuple(os.fstat(pipe).st_ino for pipe in pipes)
        kept = FdSet([owned.release(fd) for fd in streams])
        for_start = FdSet(owned.release_all())
        run = Run(
            run_id, name, effective, cage, identity(folder), logs, kept, for_start, context, pipes=pipes,
            streams=streams, shown=shown,
        )  # fmt: skip
        run.port = port
        return run


def _nothing() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def _streams(owned: FdSet) -> tuple[list[int], int, int]:
    """This end of a sidecar's stdin and stdout, then the sidecar's own ends.

    A socket for each, so that the flags that a runtime sets on one (O_NONBLOCK) are not on the other.
    """
    ours, theirs = [], []
    for _ in range(2):
        mine, its = socket.socketpair()
        ours.append(owned.add(mine.detach()))
        theirs.append(owned.add(its.detach()))
        os.set_blocking(ours[-1], False)
    return ours, theirs[0], theirs[1]


def _log_pipes(owned: FdSet) -> tuple[list[int], list[int]]:
    """Pipes for stdout and stderr: read ends, and write ends opened read-write.

    A write end alone would give the plugin EPIPE when the reader, the host, dies.
    """
    readers, writers = [], []
    for _ in range(2):
        read, write = os.pipe2(os.O_CLOEXEC)
        readers.append(owned.add(read))
        try:
            writers.append(owned.add(os.open(f"/proc/self/fd/{write}", os.O_RDWR | os.O_CLOEXEC)))
        finally:
            os.close(write)
        os.set_blocking(read, False)
    return readers, writers


def start_record(run: Run, release: Release, reason: str) -> PluginStarted:
    """The record of a run that has started."""
    from isolator.layers.ledger import ledger, not_enforced
    from isolator.volume import volume

    controls, spec = ledger(volume.check), run.cage.spec
    return PluginStarted(
        reason=reason, pid=run.cage.pid, uid=spec.uid, cgroup=str(run.cage.leaf.unified), digest=release.digest,
        binary_sha256=release.binary_sha256 or None, policy_sha256=run.effective.digest(), env=sorted(spec.env),
        milliseconds=run.cage.steps, ledger={control.key: control.state for control in controls},
        degraded=not_enforced(controls), **release.signed_by,
    )  # fmt: skip


def origin_of(error: Exception) -> Origin:
    """Whose doing it was that a start failed."""
    if isinstance(error, ExecError):
        return Origin.PLUGIN
    return Origin.OPERATOR if isinstance(error, (UsageError, NotFoundError, DeniedError)) else Origin.DAEMON


def reason_of(error: Exception) -> str:
    """Why a start failed, in words."""
    if isinstance(error, IsolatorError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'start'}: {error.strerror}"
    return f"a fault of the daemon: {type(error).__name__}: {error}"
