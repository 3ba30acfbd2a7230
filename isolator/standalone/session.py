"""Cages without a daemon: what ``isolator run`` and ``isolator prove`` share.

    async with StandaloneSession(paths) as session:
        async with session.cage(spec, host, stdio, records) as cage:
            end = await cage.wait()

A workshop is what a supervisor is to its cages, for as long as one command lasts: a launcher, a journal, a cgroup
subtree and free uids of its own. Each cage gets its network and its broker. Leaving either context removes all of it.
The modules that take long to load are imported where they are needed: the launcher, another Python, starts meanwhile.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from isolator.errors import ConfinementError
from isolator.launcher.client import Launcher
from isolator.linux.coredump import let_children_start_no_handler
from isolator.linux.descriptors import allow_many_files

if TYPE_CHECKING:
    from isolator.audit.schema import CageStarted
    from isolator.cage.cage import Cage, Stdio
    from isolator.cage.runtime import CageRuntime
    from isolator.layers.base import CageSpec
    from isolator.layers.network.namespace import CageNetwork
    from isolator.layers.seccomp.notifier import Denied
    from isolator.layers.user import UidLease
    from isolator.paths import Paths
    from isolator.policy.host import HostConfig
    from isolator.policy.model import EffectivePolicy
    from isolator.standalone.beginning import Beginning
    from isolator.standalone.records import Records
    from isolator.standalone.terminal import CageTerminal


class StandaloneSession:
    """The runtime of a few cages; an async context manager."""

    def __init__(self, paths: Paths, beginning: Beginning | None = None) -> None:
        """``beginning``: what is there already, and stays the caller's. Otherwise this session starts a launcher."""
        self.paths = paths
        self._stack = contextlib.AsyncExitStack()
        self._beginning = beginning
        self._launcher: Launcher | None = None
        self._runtime: CageRuntime | None = None
        self._optional: frozenset[str] = frozenset()
        """The controllers that this host may lack."""

    async def __aenter__(self) -> StandaloneSession:
        let_children_start_no_handler()
        allow_many_files()
        begun = self._beginning
        if begun is None:
            self._launcher = Launcher()
            self._stack.callback(self._launcher.close)
        else:
            self._launcher = Launcher((begun.launcher, begun.launcher.sock))
            self._stack.callback(self._launcher.dismiss)
            self.runtime.pool.adopt(begun.take_parking())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def runtime(self) -> CageRuntime:
        """Launcher, journal and subtree; made on first use."""
        if self._runtime is None:
            from isolator.cage.runtime import CageRuntime

            assert self._launcher is not None
            if self._beginning is None:
                from isolator.standalone.beginning import open_place

                journal, subtree = open_place(self.paths, self._stack, self._optional)
            else:
                journal, subtree = self._beginning.journal, self._beginning.subtree
            self._runtime = CageRuntime(self._launcher, journal, subtree)
            self._stack.push_async_callback(self._runtime.pool.close)
        return self._runtime

    def permit(self, host: HostConfig) -> None:
        """Do without the controllers that host.toml lets be missing; call it before a cage is made."""
        from isolator.layers.ledger import optional_controllers

        self._optional = optional_controllers(host.may_degrade)
        if self._beginning is not None:
            self._beginning.subtree.optional = self._optional

    def lease(self, host: HostConfig) -> UidLease:
        """A free uid of the reserved range, until the workshop closes."""
        from isolator.layers.user import UidLease

        self.permit(host)
        lease = UidLease(host.uid_range)
        self._stack.callback(lease.release)
        return lease

    @contextlib.asynccontextmanager
    async def cage(
        self,
        spec: CageSpec,
        host: HostConfig,
        stdio: Stdio,
        records: Records,
        *,
        cage_type: type[Cage] | None = None,
        **further: Any,
    ) -> AsyncIterator[Cage]:
        """A started cage; killed, and every trace of it removed, when the context is left.

        ``cage_type`` and ``further`` are for tests, which leave layers out. Raises ConfinementError when this host
        lacks a mandatory control.
        """
        from isolator.cage.cage import Cage
        from isolator.layers.seccomp.notifier import SeccompNotifier
        from isolator.standalone.broker import broker_for

        _require(host)
        runtime = self.runtime
        async with contextlib.AsyncExitStack() as stack:
            # Ends after the cage: it has still to say what became of the connections.
            brokers = await stack.enter_async_context(contextlib.AsyncExitStack())

            async def hand_over(network: CageNetwork) -> None:
                await brokers.enter_async_context(broker_for(network, spec.policy, spec.run, self.paths, host, records))

            denials = SeccompNotifier()
            stack.callback(denials.close)
            built = (cage_type or Cage)(spec, runtime, stdio, handover=hand_over, **further)
            await stack.enter_async_context(built)
            await built.start()
            if records.keeps_all:
                records.record(_started(built))
            if built.listener >= 0:
                denials.watch(built.listener, lambda denied: _record_denied(records, denied))
                built.listener = -1
            yield built


def _require(host: HostConfig) -> None:
    """Raise ConfinementError when this host lacks a mandatory control."""
    from isolator.layers.ledger import missing
    from isolator.layers.network.layer import Network
    from isolator.layers.seccomp.layer import Seccomp

    # These two are not asked: what they would try, in a namespace made for that, is about to be done anyway.
    lacking = missing(frozenset(host.may_degrade), besides=frozenset({Network.name, Seccomp.name}))
    if lacking:
        raise ConfinementError(f"this host cannot enforce {lacking[0].name}", lacking[0].reason, lacking[0].remedy)


def _record_denied(records: Records, denied: Denied) -> None:
    from isolator.audit.schema import SyscallDenied

    records.record(SyscallDenied(call=denied.call, count=denied.count))


def _started(cage: Cage) -> CageStarted:
    from isolator.audit.schema import CageStarted
    from isolator.layers.ledger import ledger, not_enforced
    from isolator.volume import volume

    return CageStarted(
        pid=cage.pid, uid=cage.spec.uid, policy_sha256=cage.spec.policy.digest(),
        milliseconds=cage.steps, degraded=not_enforced(ledger(volume.check)),
    )  # fmt: skip


def run_spec(
    paths: Paths,
    policy: EffectivePolicy,
    argv: list[str],
    run: str,
    uid: int,
    owned: list[int],
    *,
    write: Iterable[str] = (),
    env: Mapping[str, str] = MappingProxyType({}),
    cwd: str = "/",
    terminal: CageTerminal | None = None,
) -> CageSpec:
    """The cage of one ``isolator run``; what it opens is appended to ``owned`` for the caller to close.

    ``write``: folders that it may change; ``env``: variables besides the usual ones and the policy's.
    """
    from isolator.cage.view import PATH, open_read_path, time_zone
    from isolator.layers.base import Bind, CageSpec

    binds = []
    for path in policy.filesystem.read:
        owned.append(open_read_path(path))
        binds.append(Bind(path, owned[-1]))
    for path in write:
        from isolator.standalone.writable import writable_folder

        binds.append(writable_folder(path, uid, owned))
    binds.sort(key=lambda bind: bind.target)  # a folder before those below it; of one path, the writable one on top
    if policy.filesystem.state:
        policy = policy.model_copy(update={"filesystem": policy.filesystem.model_copy(update={"state": 0})})
    return CageSpec(
        name="run",
        run=run,
        uid=uid,
        gid=uid,
        user="cage",
        policy=policy,
        paths=paths,
        argv=argv,
        env={
            "PATH": f"{PATH}:/usr/sbin:/sbin",
            "HOME": "/tmp", "LANG": os.environ.get("LANG", "C.UTF-8"), "TMPDIR": "/tmp",
            "TZ": time_zone(),
            **({"TERM": os.environ["TERM"]} if "TERM" in os.environ else {}),
            **policy.env,
            **env,
        },
        cwd=cwd,
        binds=binds,
        mounts={} if terminal is None else {"/dev/pts": terminal.mount},
        terminal=terminal is not None,
        to_group=True,
    )  # fmt: skip
