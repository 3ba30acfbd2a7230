"""Changes of registrations: add, exchange one version for another, approve, enable, remove.

A version is exchanged like this: faults of the new one are found while the old one runs; the old one is stopped, the
new one put in its place, and started if the old one ran. If it is not up in time (``Plugin.try_version``) the old one
comes back by itself, and the caller gets the reason. A daemon that is killed meanwhile finds on disk that the version
is on trial, and judges it again when it starts. A version that asks for more than the one in use is kept in the store,
*pending*, until it is approved.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from isolator.audit import schema
from isolator.base.structs import struct_class
from isolator.errors import DeniedError, IsolatorError, UsageError
from isolator.ipc.messages import PluginState
from isolator.linux.descriptors import FdSet
from isolator.linux.files import openat2
from isolator.registration import policy_files
from isolator.registration.collecting import Offer
from isolator.registration.proposals import Loaded
from isolator.registration.registrar import Candidate
from isolator.registration.staging import Source
from isolator.registration.store import Registration, Release, Trial
from isolator.supervisor.cage_spec import host_api_folder
from isolator.supervisor.lifecycle.plugin import Plugin
from isolator.supervisor.plugins import PluginTable
from isolator.supervisor.run import RunContext
from isolator.supervisor.tickets import TICKETS, Tickets, by_uid, purpose

logger = logging.getLogger(__name__)

_COPIES = 2
"""Copies at a time for one uid: each holds a thread for as long as the caller's files take."""
RESUME_SECONDS = 10.0
"""Seconds that a version which is in use again has for its cage."""
_EXCHANGED: dict[str, type[schema.PluginUpdated | schema.PluginRolledBack]] = {
    kind.TYPE: kind for kind in (schema.PluginUpdated, schema.PluginRolledBack)
}


@struct_class(frozen=True)
class Updated:
    """Outcome of an update that did not fail."""

    plugin: Plugin
    unchanged: bool = False
    """The staged version is the one in use."""
    pending: bool = False
    """The staged version waits for approval."""
    differences: tuple[str, ...] = ()
    """Its demands beyond those of the version before."""


@struct_class(frozen=True)
class _Exchange:
    """Why a version is exchanged, for the trail."""

    reason: str
    record: str
    who: str | None = None


class Updates:
    """The operations on the registrations of one daemon; each raises IsolatorError when it is refused or fails.

    ``who`` names for the trail who asked. ``token`` is that of a staged plugin (``Registrar.stage``), ``ticket`` one
    that the supervisor itself gave to the caller (``tickets.py``).
    """

    def __init__(self, table: PluginTable, context: RunContext, tickets: Tickets) -> None:
        self._table, self._registrar, self._audit = table, table.registrar, context.audit
        self._paths, self._tickets = context.paths, tickets
        self._copying: defaultdict[int, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(_COPIES))

    async def stage(self, source: Source, update: str | None, ticket: str | None) -> Candidate:
        """Copy and read a plugin; ``update`` names the registered one that it is a newer version of.

        Nothing is read but what the caller has handed over with a ticket, or a folder that was found.
        """
        offer = self._tickets.offer(ticket) if ticket else await self._found(source, update)
        by = by_uid(offer.uid) if ticket else None
        try:
            if update is not None:
                self._table.find(update)
            async with self._copying[offer.uid]:
                return await asyncio.to_thread(self._registrar.stage, source, offer, update=update, by=by)
        finally:
            offer.close()

    async def _found(self, source: Source, update: str | None) -> Offer:
        """A new plugin of ``plugin_dirs``, with the rights of its owner; raises UsageError for any other path."""
        found = next((one for one in self._table.discovery.found.values() if one.folder == source.path), None)
        if found is not None and found.error:
            raise UsageError(f"plugin {found.name}", found.error, f"correct it in {found.folder}")
        if found is None or update is not None:
            why = "names files and hands nothing over: the daemon opens no path for a caller"
            raise UsageError("plugin.stage", why, TICKETS)
        return await asyncio.to_thread(_offer_found, source.path)

    def _agreed(self, candidate: Candidate, ticket: str | None, *purposes: bytes) -> str:
        """Name whoever agrees to a staged plugin, for the trail; raises DeniedError unless it has handed it over."""
        who = self._tickets.who(ticket, f"plugin {candidate.staged.name}", *purposes)
        if candidate.by is not None and who != candidate.by:
            why = f"{candidate.by} handed it over, and {who} agrees to it with a ticket"
            raise DeniedError(f"plugin {candidate.staged.name}", why, "run the command again")
        return who

    def _asked(self, ticket: str | None, verb: str, name: str, *more: str) -> str:
        """Name whoever asks for a change of a registered plugin, for the trail; raises DeniedError when nobody does."""
        self._table.find(name)
        return self._tickets.who(ticket, f"plugin {name}", purpose(verb, name, *more))

    async def commit(self, token: str, ticket: str | None) -> Plugin:
        """Register a staged plugin; one that was found is approved by its name."""
        candidate = self._registrar.candidate(token)
        name, purposes = candidate.staged.name, [purpose("plugin.commit", token)]
        if candidate.by is None:
            purposes += [purpose("plugin.approve", name, digest) for digest in (candidate.staged.digest, "")]
        who = self._agreed(candidate, ticket, *purposes)
        async with self._table.lock(name):
            await asyncio.to_thread(self._registrar.finish_removal, name, self._forget_state)
            registration = await asyncio.to_thread(self._registrar.add, token)
            plugin = self._table.add(await self._read(registration))
            self._table.expect_starts()
            added = schema.PluginAdded(
                new=registration.digest,
                version=registration.version,
                policy_sha256=plugin.effective.digest() if plugin.effective else None,
                who=who,
            )
            self._audit.record(added, plugin=name)
            self._table.announce(plugin)  # the host that gets the answer may not be the one that serves then
        self._table.discovery.rescan()
        return plugin

    async def update(self, token: str, ticket: str | None, *, approve: bool) -> Updated:
        """Exchange the version in use for a staged one; one that asks for more waits unless ``approve``."""
        candidate = self._registrar.candidate(token)
        who = self._agreed(candidate, ticket, purpose("plugin.update", token, "approve" if approve else ""))
        async with self._table.lock(candidate.staged.name):
            plugin = self._table.find(candidate.staged.name)
            now = plugin.registration
            if candidate.release == now.release and plugin.effective is not None:
                self._registrar.discard(token)
                return Updated(plugin, unchanged=True)
            if candidate.more:
                await self._hold(plugin, token, candidate.more, who)
                if not approve:
                    return Updated(plugin, pending=True, differences=candidate.more)
                await self._approve_pending(plugin, who)
                return Updated(plugin, differences=candidate.more)
            self._registrar.granted(candidate.core)
            release, source = await asyncio.to_thread(self._registrar.accept, token)
            change = _Exchange("update", schema.PluginUpdated.TYPE, who)
            await self._exchange(plugin, change, lambda: self._registrar.use(now, release, source=source))
            return Updated(plugin)

    async def reject(self, name: str, ticket: str | None) -> Plugin:
        """Refuse the version that waits for approval: nothing of it is kept."""
        who = self._asked(ticket, "plugin.reject", name)
        async with self._table.lock(name):
            plugin = self._table.find(name)
            pending = plugin.registration.pending
            if pending is None:
                raise UsageError(f"plugin {name}", "no version waits for approval", "see 'isolator plugin show'")
            plugin.registration = await asyncio.to_thread(self._registrar.decline, plugin.registration)
            await asyncio.to_thread(self._registrar.prune, plugin.registration)
            self._audit.record(schema.PluginDeclined(new=pending.digest, version=pending.version, who=who), plugin=name)
            self._table.announce(plugin)
            return plugin

    async def roll_back(self, name: str, ticket: str | None, to: str | None) -> Plugin:
        """Exchange the version in use for the one before, or for the kept one with the version or digest ``to``."""
        who = self._asked(ticket, "plugin.rollback", name, to or "")
        async with self._table.lock(name):
            plugin = self._table.find(name)
            now = plugin.registration
            release = await asyncio.to_thread(self._registrar.earlier, now, to)
            await self._check(now, release)
            change = _Exchange("rollback", schema.PluginRolledBack.TYPE, who)
            await self._exchange(plugin, change, lambda: self._registrar.roll_back(now, release))
            return plugin

    async def approve(self, name: str, ticket: str | None, digest: str | None) -> Plugin:
        """Take a pending version or a changed binary into use, or write a policy file that is missing.

        ``digest``: that of the version that was shown; refused when another one waits now.
        """
        who = self._asked(ticket, "plugin.approve", name, digest or "")
        async with self._table.lock(name):
            plugin = self._table.find(name)
            now = plugin.registration
            if digest and digest != (now.pending or now.release).digest:
                raise UsageError(f"plugin {name}", "something else waits for approval now", "look at it again")
            if now.pending is not None:
                await self._approve_pending(plugin, who)
            elif await asyncio.to_thread(self._registrar.binary_changed, now):
                candidate = await asyncio.to_thread(self._registrar.stage_again, now)
                self._record_approval(plugin, candidate.release, (), who)
                release, source = await asyncio.to_thread(self._registrar.accept, candidate.staged.token)
                change = _Exchange("approve", schema.PluginUpdated.TYPE, who)
                await self._exchange(plugin, change, lambda: self._registrar.use(now, release, source=source))
            elif self._registrar.policy_text(name) is None:
                running = plugin.wanted
                await plugin.stop("approved")
                registration = await asyncio.to_thread(self._registrar.grant, now)
                plugin.adopt(await self._read(registration))
                self._record_approval(plugin, now.release, (), who)
                if running and not plugin.fence.closed:
                    plugin.start("approve")
                self._table.announce(plugin)
            else:
                raise UsageError(f"plugin {name}", "nothing waits for approval", "see 'isolator plugin list'")
            return plugin

    async def remove(self, name: str, ticket: str | None) -> None:
        """Stop a plugin and delete everything of it."""
        who = self._asked(ticket, "plugin.remove", name)
        async with self._table.lock(name):
            plugin = self._table.find(name)
            await plugin.stop("removed")
            try:
                await asyncio.to_thread(self._registrar.remove, plugin.registration, self._forget_state)
            finally:
                if name not in self._registrar.names():
                    # If not all of it could be deleted, the rest is at the next start; it is no plugin any more.
                    self._table.drop(name)
                    self._audit.record(schema.PluginRemoved(old=plugin.registration.digest, who=who), plugin=name)
            folder = host_api_folder(self._paths, name)
            (folder / "host.sock").unlink(missing_ok=True)
            folder.rmdir()
        self._table.discovery.rescan()

    async def enable(self, name: str, ticket: str | None) -> Plugin:
        """Let a plugin run; clears ``failed`` too, which needs no ticket: nobody has decided that it shall not run."""
        self._table.find(name)
        async with self._table.lock(name):
            plugin = self._table.find(name)
            if ticket or not plugin.registration.enabled:
                self._asked(ticket, "plugin.enable", name)
            if not plugin.registration.enabled or plugin.state == PluginState.FAILED:
                plugin.set_enabled(await asyncio.to_thread(self._registrar.set_enabled, name, enabled=True))
            return plugin

    async def disable(self, name: str) -> Plugin:
        """Stop a plugin and keep it stopped."""
        async with self._table.lock(name):
            plugin = self._table.find(name)
            registration = await asyncio.to_thread(self._registrar.set_enabled, name, enabled=False)
            await plugin.stop("disabled")
            plugin.set_enabled(registration)
            return plugin

    async def explain(self, name: str) -> dict[str, Any]:
        """Return the proposal of a plugin, registered or found (docs/internals.md)."""
        found = self._table.discovery.found.get(name)
        if found is not None and name not in self._table.plugins:
            if found.core is None:
                raise UsageError(f"plugin {name}", found.error, f"correct it in {found.folder}")
            return await asyncio.to_thread(self._registrar.propose, found.core)
        self._table.find(name)
        return await asyncio.to_thread(self._registrar.explain, name)

    # --- trials that a killed daemon left ----------------------------------------------------------------------

    async def hold_trials(self) -> list[tuple[Plugin, Trial]]:
        """The versions that a killed daemon had not judged yet, locked: nobody does anything to them before that."""
        found = []
        for name, plugin in self._table.plugins.items():
            trial = self._registrar.store.trial(name)
            if trial is not None:
                await self._table.lock(name).acquire()
                plugin.on_trial = True
                found.append((plugin, trial))
        return found

    def judge_again(self, held: list[tuple[Plugin, Trial]]) -> None:
        """Start these versions and watch; takes over their locks."""
        for plugin, trial in held:
            self._table.own(self._judge_held(plugin, trial))

    async def _judge_held(self, plugin: Plugin, trial: Trial) -> None:
        try:
            await self._judge(plugin, trial, plugin.registration, running=plugin.registration.enabled)
        except IsolatorError as error:
            logger.error("%s", error)
        finally:
            self._table.lock(plugin.name).release()

    # --- steps ---------------------------------------------------------------------------------------------------

    async def _hold(self, plugin: Plugin, token: str, more: tuple[str, ...], who: str | None) -> None:
        registration = await asyncio.to_thread(self._registrar.hold, token)
        assert registration.pending is not None
        plugin.registration = registration
        self._registrar.prune(registration)
        pending = schema.PluginPending(
            old=registration.digest, new=registration.pending.digest, version=registration.pending.version,
            differences=list(more), who=who,
        )  # fmt: skip
        self._audit.record(pending, plugin=plugin.name)
        self._table.announce(plugin)

    async def _approve_pending(self, plugin: Plugin, who: str | None) -> None:
        now = plugin.registration
        assert now.pending is not None
        release, waiting = now.pending, self._table.pending(now)
        text = await asyncio.to_thread(self._registrar.proposed_policy, now)
        if text is None:
            await self._check(now, release)
        self._record_approval(plugin, release, waiting.differences if waiting is not None else (), who)
        change = _Exchange("approve", schema.PluginUpdated.TYPE, who)
        await self._exchange(plugin, change, lambda: self._registrar.use(now, release, policy_text=text))

    def _record_approval(self, plugin: Plugin, release: Release, more: tuple[str, ...], who: str | None) -> None:
        approved = schema.PluginApproved(
            old=plugin.registration.digest, new=release.digest, version=release.version,
            binary_sha256=release.binary_sha256 or None, differences=list(more), who=who,
        )  # fmt: skip
        self._audit.record(approved, plugin=plugin.name)

    async def _check(self, now: Registration, release: Release) -> None:
        """Raise the fault that would keep a version from being used, while the one in use still runs."""
        loaded = await self._read(replace(now, release=release))
        if loaded.error:
            raise UsageError(f"plugin {now.name} {release.version}", loaded.error, f"{now.version} stays in use")

    async def _exchange(self, plugin: Plugin, change: _Exchange, apply: Callable[[], Registration]) -> None:
        """Stop, exchange, start and watch if it ran; whatever goes wrong, the version before comes back."""
        before, running = plugin.registration, plugin.wanted
        trial = Trial(
            before, self._registrar.policy_text(plugin.name), change.reason, change.record, change.who,
            plugin.effective.digest() if plugin.effective else None,
        )  # fmt: skip
        await plugin.stop(change.reason)
        try:
            if running:
                await asyncio.to_thread(self._registrar.store.begin_trial, trial)
            after = await asyncio.to_thread(apply)
        except BaseException:
            await self._resume(plugin, before, running=running)
            raise
        await self._judge(plugin, trial, after, running=running)

    async def _judge(self, plugin: Plugin, trial: Trial, after: Registration, *, running: bool) -> None:
        before, failure = trial.before, ""
        try:
            loaded = await self._read(after)
            plugin.on_trial = running
            plugin.adopt(loaded)
            self._table.announce(plugin)
            failure = loaded.error
            if running and not failure:
                failure = await plugin.try_version(trial.reason)
        except (IsolatorError, OSError) as error:
            failure = str(error)
        plugin.on_trial = False
        if failure:
            await self._restore(plugin, trial, after, failure, running=running)
            why = f"{failure}; {before.version} is in use again"
            remedy = f"see 'isolator plugin logs {plugin.name}'"
            raise IsolatorError(f"plugin {plugin.name} {after.version}", why, remedy)
        self._registrar.store.end_trial(plugin.name)
        await asyncio.to_thread(self._registrar.prune, after)
        exchanged = _EXCHANGED.get(trial.record, schema.PluginUpdated)(
            old=before.digest, new=after.digest, version=after.version, reason=trial.reason, who=trial.who,
            old_policy_sha256=trial.old_policy_sha256,
            policy_sha256=plugin.effective.digest() if plugin.effective else None,
        )  # fmt: skip
        self._audit.record(exchanged, plugin=plugin.name)
        self._table.announce(plugin)
        self._table.discovery.rescan()

    async def _restore(self, plugin: Plugin, trial: Trial, after: Registration, failure: str, *, running: bool) -> None:
        """Put the version before in place of one that failed."""
        text = self._registrar.policy_text(plugin.name)
        ours = policy_files.written_here(text, after.policy_sha256)  # else an operator has edited it meanwhile
        restored = await asyncio.to_thread(
            self._registrar.put_back, trial.before, after, trial.policy if ours and text != trial.policy else None
        )
        self._registrar.store.end_trial(plugin.name)
        rolled_back = schema.PluginRolledBack(
            old=after.digest, new=restored.digest, version=restored.version, reason=failure, who="the daemon"
        )
        self._audit.record(rolled_back, plugin=plugin.name)
        await self._resume(plugin, restored, running=running)
        await asyncio.to_thread(self._registrar.prune, restored)

    async def _resume(self, plugin: Plugin, registration: Registration, *, running: bool) -> None:
        """Go on with a version that is in use again, and give it the time to come up."""
        plugin.adopt(await self._read(registration))
        self._table.announce(plugin)
        if running:
            with contextlib.suppress(IsolatorError, TimeoutError):
                async with asyncio.timeout(RESUME_SECONDS):
                    plugin.start("rollback")
                    await plugin.wait_running()

    async def _read(self, registration: Registration) -> Loaded:
        # In a thread: its manifest may be one that no reader has read yet.
        return await asyncio.to_thread(self._registrar.read, registration)

    def _forget_state(self, name: str) -> None:
        self._table.volume(name).remove()


def _offer_found(path: str) -> Offer:
    """An offer of a folder or package in one of ``plugin_dirs``; raises UsageError when it has gone."""
    with FdSet() as owned:
        try:
            above = owned.add(os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            folder = owned.add(openat2(above, os.path.basename(path), os.O_RDONLY | os.O_NONBLOCK))
        except OSError as error:
            raise UsageError(path, error.strerror or "cannot be opened", "see 'isolator plugin list'") from None
        return Offer.of_owner(folder)
