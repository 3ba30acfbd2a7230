"""Requests of the host, from messages to the operations of ``plugins.py`` and ``updates.py`` and back.

A request that changes something runs to its end even if the host, which sent it, dies meanwhile.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import isolator
from isolator.errors import IsolatorError, UsageError
from isolator.ipc import messages
from isolator.ipc.body import Handler, WithFds, by_op
from isolator.ipc.packet import MAX_FDS
from isolator.layers.ledger import ledger
from isolator.linux.descriptors import FdSet
from isolator.registration.staging import Source
from isolator.supervisor.fences import Fences
from isolator.supervisor.lifecycle.plugin import Plugin
from isolator.supervisor.plugins import PluginTable
from isolator.supervisor.reloads import Reloads
from isolator.supervisor.run import Run
from isolator.supervisor.services import Services
from isolator.supervisor.updates import Updates
from isolator.volume import volume

Q = TypeVar("Q")
T = TypeVar("T")


class Handlers:
    """Handlers of everything that the host may ask."""

    def __init__(
        self, table: PluginTable, updates: Updates, services: Services, reloads: Reloads, fences: Fences
    ) -> None:
        self._table, self._updates, self._services, self._reloads = table, updates, services, reloads
        self._fences = fences

    def all(self) -> dict[str, Handler]:
        """Every handler by operation."""
        table, updates, services, reloads = self._table, self._updates, self._services, self._reloads
        whole, one = self._to_the_end, self._one
        return by_op(
            messages.EnsureRun.on(lambda asked: _running(table.ensure(asked.name, asked.reason))),
            messages.ConnectRun.on(self._connect),
            messages.ConnectRuns.on(self._connect_many),
            messages.LendSocket.on(self._lend_socket),
            messages.StartInvocation.on_fds(self._start_invocation),
            messages.RunReady.on_now(lambda asked: table.find(asked.name).note_ready(asked.run)),
            messages.StopRun.on(whole(lambda asked: table.stop(asked.name, asked.reason))),
            messages.RestartRun.on(whole(lambda asked: _running(table.restart(asked.name, asked.reason)))),
            messages.HoldPlugin.on_now(lambda asked: self._fences.hold(self._known(asked.name), asked.until)),
            messages.FreePlugin.on_now(lambda asked: self._fences.free(self._known(asked.name))),
            messages.LosePlugin.on_now(lambda asked: self._fences.lost(self._known(asked.name))),
            messages.StagePlugin.on(self._stage),
            messages.DiscardPlugin.on_now(lambda asked: table.registrar.discard(asked.token)),
            messages.CommitPlugin.on(whole(lambda asked: one(updates.commit(asked.token, asked.ticket)))),
            messages.UpdatePlugin.on(whole(self._update)),
            messages.RejectPlugin.on(whole(lambda asked: one(updates.reject(asked.name, asked.ticket)))),
            messages.RollBackPlugin.on(whole(lambda asked: one(updates.roll_back(asked.name, asked.ticket, asked.to)))),
            messages.ApprovePlugin.on(
                whole(lambda asked: one(updates.approve(asked.name, asked.ticket, asked.digest)))
            ),
            messages.RemovePlugin.on(whole(lambda asked: updates.remove(asked.name, asked.ticket))),
            messages.EnablePlugin.on(whole(lambda asked: one(updates.enable(asked.name, asked.ticket)))),
            messages.DisablePlugin.on(whole(lambda asked: one(updates.disable(asked.name)))),
            messages.ListPlugins.on_now(self._list),
            messages.ExplainPolicy.on(self._explain),
            messages.ListServices.on_now(lambda _: messages.Services(services=services.entries())),
            messages.GetLedger.on_now(
                lambda _: messages.Ledger(ledger=tuple(control.to_json() for control in ledger(volume.check)))
            ),
            messages.ReloadDaemon.on_now(lambda _: messages.Reloading(generation=reloads.ask())),
            messages.GetGeneration.on_now(
                lambda _: messages.Generation(
                    version=isolator.__version__, generation=reloads.generation, refused=reloads.refused
                )
            ),
            messages.ListOutdated.on_now(lambda _: messages.OutdatedServices(services=services.outdated())),
        )

    def _to_the_end(self, handler: Callable[[Q], Coroutine[Any, Any, T]]) -> Callable[[Q], Coroutine[Any, Any, T]]:
        """The handler, not cancelled when the host dies."""

        async def run(request: Q) -> T:
            return await asyncio.shield(self._table.own(handler(request)))

        return run

    # --- runs ------------------------------------------------------------------------------------------------

    async def _connect(self, request: messages.ConnectRun) -> WithFds[None]:
        connections = await self._table.find(request.name).connect(request.run, request.deadline)
        return WithFds(None, [connection.detach() for connection in connections])

    async def _connect_many(self, request: messages.ConnectRuns) -> WithFds[messages.Connected]:
        if len(request.runs) > MAX_FDS:
            raise UsageError(request.op, f"{len(request.runs)} runs at a time are too many")
        answers: list[Any] = []
        with FdSet() as made:
            for one in request.runs:
                try:
                    connection = self._table.find(one.name).connect_at_once(one.run)
                except IsolatorError as error:
                    answers.append(error.to_json())
                    continue
                answers.append(connection is not None)
                if connection is not None:
                    made.add(connection.detach())
            return WithFds(messages.Connected(answers=tuple(answers)), made.release_all())

    async def _lend_socket(self, request: messages.LendSocket) -> WithFds[messages.LentSocket]:
        gid = self._services.host.process.spec.gid
        fd, changed = await self._table.find(request.name).lend_socket(request.run, gid)
        return WithFds(messages.LentSocket(changed_ns=changed), [fd])

    async def _start_invocation(
        self, request: messages.StartInvocation, fds: list[int]
    ) -> WithFds[messages.InvocationStarted]:
        work = self._table.own(self._begin_invocation(request, fds.pop()))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:  # the host leaves; the one that takes its place is told
            work.add_done_callback(lambda work: self._tell_begun(request, work))
            raise

    async def _begin_invocation(
        self, request: messages.StartInvocation, stdin: int
    ) -> WithFds[messages.InvocationStarted]:
        with FdSet([stdin]):
            invocation = await self._table.begin_invocation(request, stdin)
        started = await asyncio.shield(invocation.begun)
        return WithFds(started, invocation.fds.release_all())

    def _tell_begun(
        self, request: messages.StartInvocation, work: asyncio.Task[WithFds[messages.InvocationStarted]]
    ) -> None:
        if work.cancelled():
            return
        try:
            answer = work.result()
            failed, refused, fds = answer.body.failed, "", answer.fds
        except Exception as error:  # whatever it was, the attempt has to be concluded
            failed, refused, fds = "", str(error), []
        with FdSet(fds):
            begun = messages.InvocationBegun(name=request.name, run=request.run, failed=failed, refused=refused)
            self._services.host.invocation_begun(begun, fds)

    def _known(self, name: str) -> str:
        """The name of a plugin that there is; raises NotFoundError."""
        self._table.find(name)
        return name

    # --- registrations ---------------------------------------------------------------------------------------

    async def _stage(self, request: messages.StagePlugin) -> WithFds[messages.Staged]:
        source = Source(
            path=request.path, name=request.name, binary=request.binary, hooks=request.hooks, files=request.files
        )
        candidate = await self._updates.stage(source, request.update or None, request.ticket)
        staged, now = candidate.staged, self._table.plugins.get(candidate.staged.name)
        shown = messages.Staged(
            token=staged.token,
            name=staged.name,
            digest=staged.digest,
            synthesised=staged.synthesised,
            proposal=self._table.registrar.shown(candidate),
            registered=now is not None,
            differences=candidate.more,
            unchanged=now is not None and now.registration.release == candidate.release,
            files=staged.files,
            size=staged.size,
            faults=candidate.faults,
            signer=candidate.release.signer,
        )
        with FdSet() as owned:
            manifest = owned.add(os.memfd_create("plugin.json", os.MFD_CLOEXEC))
            os.write(manifest, staged.manifest)
            os.lseek(manifest, 0, os.SEEK_SET)
            return WithFds(shown, owned.release_all())

    async def _update(self, request: messages.UpdatePlugin) -> messages.UpdatedPlugin:
        done = await self._updates.update(request.token, request.ticket, approve=request.approve)
        return messages.UpdatedPlugin(
            plugin=self._table.entry(done.plugin), unchanged=done.unchanged, pending=done.pending,
            differences=done.differences,
        )  # fmt: skip

    def _list(self, _: messages.ListPlugins) -> messages.Plugins:
        # Without what is large and what the host has from ``plugin.changed``: this is asked for every listing.
        return messages.Plugins(plugins=tuple(self._table.entries(whole=False)))

    async def _explain(self, request: messages.ExplainPolicy) -> messages.Proposal:
        return messages.Proposal(proposal=await self._updates.explain(request.name))

    async def _one(self, changing: Awaitable[Plugin]) -> messages.OnePlugin:
        return messages.OnePlugin(plugin=self._table.entry(await changing))


async def _running(starting: Awaitable[Run]) -> messages.Running:
    run = await starting
    return messages.Running(run=run.id, pid=run.cage.pid)
