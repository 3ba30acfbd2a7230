"""Build the cages that the battery runs in, and read its answers.

Nearly all attempts share one cage. Those that may take it down with them (they go for its memory) get one each: there
the kernel's verdict, told by how the cage ended, is the answer. When another attempt ends the cage, that is reported
as a fault and the rest goes on in a fresh one.

Standard input is a terminal made for the purpose: attempts on the operator's terminal need one to attack.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from isolator.cage.cage import Cage, Stdio
from isolator.layers.base import Bind, CageSpec
from isolator.layers.filesystem import TERMINALS
from isolator.layers.ledger import LAYERS, ledger
from isolator.linux.descriptors import close_all
from isolator.linux.shared_memory import readable_segment
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.probe.attacks import battery
from isolator.probe.attacks.kit import ATTEMPTS, CALLS, Attempt, Promise
from isolator.standalone.records import Records
from isolator.standalone.session import StandaloneSession

PLACE = "/run/isolator/probe"
_MAIN = f"import sys; sys.path.insert(0, {os.path.dirname(PLACE)!r}); from probe.battery import main; main()"
_OUT_OF_MEMORY = "out of memory"
_PATIENCE = 180.0
"""Seconds for one cage: every attempt has a limit of its own, this is for a cage that says nothing at all."""

_LAYERS = [*(layer.name for layer in LAYERS), "descriptors", "environment"]

SpecFactory = Callable[[str, list[str], list[int]], CageSpec]
"""(run id, argv, descriptors to close afterwards) → the cage to attack."""


@dataclass(frozen=True)
class Finding:
    """Outcome of one attempt. ``broken`` is a fault of the attempt itself; it proves nothing."""

    name: str
    layer: str
    title: str
    outcome: Literal["held", "through", "broken"]
    detail: str = ""
    errno: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "succeeded": self.outcome == "through"}


@dataclass
class Target:
    """Target of an attack: the recipe of the cage, and for tests the parts of it to leave out."""

    spec: SpecFactory
    host: HostConfig
    inline: bool = False
    """The cage may start no process: each attempt is made by the one it has, in a cage of its own."""
    cage_type: type[Cage] = Cage
    further: dict[str, Any] = field(default_factory=dict)


def attempts_at(target: Target) -> list[str]:
    """Names of all attempts that the target's profile stops."""
    return [name for name, attempt in ATTEMPTS.items() if target.inline or not attempt.strict]


async def attack(
    session: StandaloneSession, target: Target, records: Records, names: Sequence[str] | None = None
) -> AsyncIterator[Finding]:
    """Make the attempts, layer by layer, yielding each finding as it comes; by default ``attempts_at`` the target."""
    if names is None:
        names = attempts_at(target)
    chosen = [ATTEMPTS[name] for name in names]
    chosen.sort(key=lambda attempt: _LAYERS.index(attempt.layer))
    with _bait() as bait:
        shared = [] if target.inline else [attempt for attempt in chosen if not attempt.alone]
        waiting = shared
        while waiting:
            done = 0
            async for finding in _cage(session, target, records, waiting, bait):
                done += 1
                yield finding
            waiting = waiting[done:]
        for attempt in chosen:
            if attempt not in shared:
                async for finding in _cage(session, target, records, [attempt], bait):
                    yield finding


async def _cage(
    session: StandaloneSession, target: Target, records: Records, attempts: list[Attempt], bait: dict[str, Any]
) -> AsyncIterator[Finding]:
    """Build a cage for these attempts; ends early, after a finding about it, when the cage does."""
    owned: list[int] = []
    try:
        run = secrets.token_hex(5)
        spec = target.spec(run, [], owned)
        spec.argv = ["/usr/bin/python3", "-I", "-c", _MAIN, _task(spec, session.paths, attempts, bait, target)]
        probe = os.open(Path(battery.__file__).parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        owned.append(probe)
        spec.binds = [*spec.binds, Bind(PLACE, probe)]
        master, terminal = pty.openpty()
        owned += [master, terminal]
        (out, out_end), (problem, problem_end) = await _pipe(), await _pipe()
        try:
            stdio = Stdio(terminal, out_end, problem_end)
            async with (
                asyncio.timeout(_PATIENCE),
                session.cage(spec, target.host, stdio, records, cage_type=target.cage_type, **target.further) as cage,
            ):
                os.close(out_end)
                os.close(problem_end)
                out_end = problem_end = -1
                left = list(attempts)
                while left and (line := await out.readline()):
                    left.pop(0)
                    yield Finding(**json.loads(line))
                if left:
                    end = await cage.wait()
                    yield _unanswered(left[0], target, end.cause, end.returncode, await problem.read(4096))
        finally:
            for fd in (out_end, problem_end):
                if fd >= 0:
                    os.close(fd)
    finally:
        close_all(owned)


def _unanswered(attempt: Attempt, target: Target, cause: str, code: int, problem: bytes) -> Finding:
    if target.inline and cause == "forbidden ABI":
        return Finding(attempt.name, attempt.layer, attempt.title, "held", "killed at once (SIGSYS)")
    if attempt.alone and cause == _OUT_OF_MEMORY:
        return Finding(attempt.name, attempt.layer, attempt.title, "held", "ended by the kernel: out of memory")
    said = problem.decode(errors="replace").strip().rpartition("\n")[2]
    why = f"the cage ended: {cause}, code {code}{f', {said}' if said else ''}"
    return Finding(attempt.name, attempt.layer, attempt.title, "broken", why)


def _task(spec: CageSpec, paths: Paths, attempts: list[Attempt], bait: dict[str, Any], target: Target) -> str:
    resources, fs = spec.policy.resources, spec.policy.filesystem
    promise = Promise(
        uid=spec.uid,
        gid=spec.gid,
        memory=resources.memory,
        cpu=resources.cpu,
        tasks=resources.tasks,
        nofile=resources.nofile,
        tmp=fs.tmp,
        tmp_inodes=fs.tmp_inodes,
        shm=fs.shm,
        state=fs.state,
        terminals=TERMINALS,
        read_only=["/", "/usr", "/etc", "/run", "/run/isolator", "/run/isolator/host", "/plugin", PLACE, *fs.read],
        hidden=[
            str(path)
            for path in (
                paths.etc, paths.policies, paths.lib, paths.plugins, paths.state, paths.host_lib, paths.audit_lib,
                paths.log, paths.audit_log, paths.plugin_log, paths.control_socket, paths.ticket_socket,
                paths.run_socket, paths.journal,
                paths.run / "hostapi",
            )
        ],
        granted=list(fs.read),
        **bait,
    )  # fmt: skip
    body = {key: value for key, value in asdict(promise).items() if key not in ("init", "descriptors")}
    names = [attempt.name for attempt in attempts]
    return json.dumps({"promise": body, "numbers": _numbers(), "names": names, "inline": target.inline})


def _numbers() -> dict[str, int]:
    import pyseccomp

    return {name: pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) for name in CALLS}


@contextlib.contextmanager
def _bait() -> Iterator[dict[str, Any]]:
    """Things of the host to be found: services on its loopback, shared memory, its environment, its names."""
    marker, abstract = secrets.token_hex(8), f"isolator-probe-{secrets.token_hex(8)}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        readable_segment(marker.encode()) as segment,
    ):
        unix.bind(f"\0{abstract}")
        unix.listen()
        os.environ["ISOLATOR_PROBE"] = marker
        try:
            yield {
                "marker": marker,
                "abstract": abstract,
                "segment": segment,
                "host_port": tcp.getsockname()[1],
                "host_name": socket.gethostname(),
                "machine_id": _machine_id(),
                "booted": _boot_clock(),
            }
        finally:
            del os.environ["ISOLATOR_PROBE"]


def _machine_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/etc/machine-id").read_text().strip()
    return ""


def _boot_clock() -> float:
    own = [control.state for control in ledger() if control.key == "namespaces.time"]
    return time.clock_gettime(time.CLOCK_BOOTTIME) if own == ["enforced"] else 0.0


async def _pipe() -> tuple[asyncio.StreamReader, int]:
    """A pipe: a reader of its one end, the descriptor of the other."""
    read, write = os.pipe2(os.O_CLOEXEC)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read, "rb")
    )
    return reader, write
