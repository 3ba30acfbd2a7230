"""Requests of the host, from messages to the operations of ``plugins.py`` and ``updates.py`` and back.

A request that changes something runs to its end even if the host, which sent it, dies meanwhile.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import replace
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
        whole = self._to_the_end
        return by_op(
            messages.EnsureRun.on(self._ensure),
            messages.ConnectRun.on(self._connect),
            messages.ConnectRuns.on(self._connect_many),
            messages.LendSocket.on(self._lend_socket),
            messages.StartInvocation.on_fds(self._start_invocation),
            messages.RunReady.on(self._ready),
            messages.StopRun.on(whole(self._stop)),
            messages.RestartRun.on(whole(self._restart)),
            messages.HoldPlugin.on(self._hold),
            messages.FreePlugin.on(self._free),
            messages.LosePlugin.on(self._lose),
            messages.StagePlugin.on(self._stage),
            messages.DiscardPlugin.on(self._discard),
            messages.CommitPlugin.on(whole(self._commit)),
            messages.UpdatePlugin.on(whole(self._update)),
            messages.RejectPlugin.on(whole(self._reject)),
            messages.RollBackPlugin.on(whole(self._roll_back)),
            messages.ApprovePlugin.on(whole(self._approve)),
            messages.RemovePlugin.on(whole(self._remove)),
            messages.EnablePlugin.on(whole(self._enable)),
            messages.DisablePlugin.on(whole(self._disable)),
            messages.ListPlugins.on(self._list),
            messages.ExplainPolicy.on(self._explain),
            messages.ListServices.on(self._list_services),
            messages.GetLedger.on(self._ledger),
            messages.ReloadDaemon.on(self._reload),
            messages.GetGeneration.on(self._generation),
            messages.ListOutdated.on(self._outdated),
        )

    def _to_the_end(self, handler: Callable[[Q], Coroutine[Any, Any, T]]) -> Callable[[Q], Coroutine[Any, Any, T]]:
        """The handler, not cancelled when the host dies."""

        async def run(request: Q) -> T:
            return await asyncio.shield(self._table.own(handler(request)))

        return run

    # --- runs ------------------------------------------------------------------------------------------------

    async def _ensure(self, request: messages.EnsureRun) -> messages.Running:
        return _running(await self._table.ensure(request.name, request.reason))

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

    async def _ready(self, request: messages.RunReady) -> None:
        self._table.find(request.name).note_ready(request.run)

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

    async def _stop(self, request: messages.StopRun) -> None:
        await self._table.stop(request.name, request.reason)

    async def _restart(self, request: messages.RestartRun) -> messages.Running:
        return _running(await self._table.restart(request.name, request.reason))

    # --- fences ----------------------------------------------------------------------------------------------

    async def _hold(self, request: messages.HoldPlugin) -> None:
        self._table.find(request.name)
        self._fences.hold(request.name, request.until)

    async def _free(self, request: messages.FreePlugin) -> None:
        self._table.find(request.name)
        self._fences.free(request.name)

    async def _lose(self, request: messages.LosePlugin) -> None:
        self._table.find(request.name)
        self._fences.lost(request.name)

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

    async def _discard(self, request: messages.DiscardPlugin) -> None:
        self._table.registrar.discard(request.token)

    async def _commit(self, request: messages.CommitPlugin) -> messages.OnePlugin:
        return self._one(await self._updates.commit(request.token, request.ticket))

    async def _update(self, request: messages.UpdatePlugin) -> messages.UpdatedPlugin:
        done = await self._updates.update(request.token, request.ticket, approve=request.approve)
        return messages.UpdatedPlugin(
            plugin=self._table.entry(done.plugin), unchanged=done.unchanged, pending=done.pending,
            differences=done.differences,
        )  # fmt: skip

    async def _reject(self, request: messages.RejectPlugin) -> messages.OnePlugin:
        return self._one(await self._updates.reject(request.name, request.ticket))

    async def _roll_back(self, request: messages.RollBackPlugin) -> messages.OnePlugin:
        return self._one(await self._updates.roll_back(request.name, request.ticket, request.to))

    async def _approve(self, request: messages.ApprovePlugin) -> messages.OnePlugin:
        return self._one(await self._updates.approve(request.name, request.ticket, request.digest))

    async def _remove(self, request: messages.RemovePlugin) -> None:
        await self._updates.remove(request.name, request.ticket)

    async def _enable(self, request: messages.EnablePlugin) -> messages.OnePlugin:
        return self._one(await self._updates.enable(request.name, request.ticket))

    async def _disable(self, request: messages.DisablePlugin) -> messages.OnePlugin:
        return self._one(await self._updates.disable(request.name))

    async def _list(self, _: messages.ListPlugins) -> messages.Plugins:
        # Without what is large and what the host has from ``plugin.changed``: this is asked for every listing.
        small = (replace(entry, manifest=None, effective=None) for entry in self._table.entries())
        return messages.Plugins(plugins=tuple(small))

    async def _explain(self, request: messages.ExplainPolicy) -> messages.Proposal:
        return messages.Proposal(proposal=await self._updates.explain(request.name))

    async def _list_services(self, _: messages.ListServices) -> messages.Services:
        return messages.Services(services=self._services.entries())

    async def _ledger(self, _: messages.GetLedger) -> messages.Ledger:
        return messages.Ledger(ledger=tuple(control.to_json() for control in ledger(volume.check)))

    async def _reload(self, _: messages.ReloadDaemon) -> messages.Reloading:
        return messages.Reloading(generation=self._reloads.ask())

    async def _generation(self, _: messages.GetGeneration) -> messages.Generation:
        version, now = isolator.__version__, self._reloads
        return messages.Generation(version=version, generation=now.generation, refused=now.refused)

    async def _outdated(self, _: messages.ListOutdated) -> messages.OutdatedServices:
        return messages.OutdatedServices(services=self._services.outdated())

    def _one(self, plugin: Plugin) -> messages.OnePlugin:
        return messages.OnePlugin(plugin=self._table.entry(plugin))


def _running(run: Run) -> messages.Running:
    return messages.Running(run=run.id, pid=run.cage.pid)
