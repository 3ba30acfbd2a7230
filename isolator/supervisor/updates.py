"""What the host asks about registrations: add, exchange one version for another, approve, enable, remove.

A version is exchanged like this: what is wrong with the new one is found out while the old one runs; the old one is
stopped, the new one put in its place, and started if the old one ran. If it is not up in time (``Plugin.trial``) the
old one comes back by itself, and whoever asked is told why. A daemon that is killed meanwhile finds on disk that the
version is on trial, and judges it again when it starts. A version that asks for more than the one in use is kept in
the store, *pending*, until it is approved.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from isolator.audit.schema import (
    PluginAdded,
    PluginApproved,
    PluginPending,
    PluginRemoved,
    PluginRolledBack,
    PluginUpdated,
)
from isolator.errors import IsolatorError, UsageError
from isolator.ipc.channel import Handler, Message
from isolator.registration import policy_files
from isolator.registration.staging import Source
from isolator.registration.store import Registration, Release, Trial
from isolator.supervisor.cage_spec import host_api_folder
from isolator.supervisor.lifecycle import Plugin
from isolator.supervisor.plugins import PluginTable, name_in
from isolator.supervisor.run import SOCKET_SECONDS
from isolator.volume.volume import Volume

_EXCHANGED: dict[str, type[PluginUpdated | PluginRolledBack]] = {
    kind.TYPE: kind for kind in (PluginUpdated, PluginRolledBack)
}


@dataclass(frozen=True)
class _Exchange:
    """Why a version is exchanged, for the trail."""

    reason: str
    record: str
    who: str | None = None


class Updates:
    """The operations on the registrations of one daemon."""

    def __init__(self, registrations: PluginTable) -> None:
        self._all = registrations
        self._daemon, self._registrar = registrations.daemon, registrations.registrar

    def handlers(self) -> dict[str, Handler]:
        """What the host may ask; what changes something is not cut short when the host dies."""
        owned: dict[str, Callable[[Message], Coroutine[Any, Any, dict[str, Any]]]] = {
            "plugin.commit": self._on_commit,
            "plugin.update": self._on_update,
            "plugin.rollback": self._on_rollback,
            "plugin.approve": self._on_approve,
            "plugin.remove": self._on_remove,
            "plugin.enable": self._on_enable,
            "plugin.disable": self._on_disable,
        }
        return {
            "plugin.stage": self._on_stage,
            "plugin.discard": self._on_discard,
            "policy.explain": self._on_explain,
            **{op: self._all.to_the_end(handler) for op, handler in owned.items()},
        }

    async def _on_stage(self, message: Message) -> Message:
        f = message.fields
        update = str(f["update"]) if f.get("update") else None
        if update is not None:
            self._all.find(update)
        source = Source(
            path=str(f.get("path") or ""), name=str(f.get("name") or ""), binary=str(f.get("binary") or ""),
            hooks=tuple(map(str, f.get("hooks") or ())), files=str(f.get("files") or ""),
        )  # fmt: skip
        candidate = await asyncio.to_thread(self._registrar.stage, source, update=update)
        staged = candidate.staged
        manifest = os.memfd_create("plugin.json", os.MFD_CLOEXEC)
        os.write(manifest, staged.manifest)
        os.lseek(manifest, 0, os.SEEK_SET)
        now = self._all.plugins.get(staged.name)
        return Message(
            {
                "token": staged.token,
                "name": staged.name,
                "digest": staged.digest,
                "synthesised": staged.synthesised,
                "proposal": self._registrar.shown(candidate),
                "registered": now is not None,
                "differences": list(candidate.more),
                "unchanged": now is not None and now.registration.release == candidate.release,
            },
            [manifest],
        )

    async def _on_discard(self, message: Message) -> dict[str, Any]:
        self._registrar.discard(str(message.fields["token"]))
        return {}

    async def _on_commit(self, message: Message) -> dict[str, Any]:
        token = str(message.fields["token"])
        name = self._registrar.candidate(token).staged.name
        async with self._all.lock(name):
            await asyncio.to_thread(self._registrar.finish_removal, name, self.forget_state)
            registration = await asyncio.to_thread(self._registrar.add, token)
            plugin = self._all.plugins[name] = Plugin(self._daemon, self._registrar.read(registration))
            self._all.discovery.found.pop(name, None)
            added = PluginAdded(
                new=registration.digest,
                version=registration.version,
                policy_sha256=plugin.effective.digest() if plugin.effective else None,
                who=message.fields.get("by"),
            )
            self._daemon.audit.record(added, plugin=name)
        self._all.discovery.look_again()
        return {"plugin": self._all.entry(plugin)}

    async def _on_update(self, message: Message) -> dict[str, Any]:
        token, who = str(message.fields["token"]), message.fields.get("by")
        candidate = self._registrar.candidate(token)
        async with self._all.lock(candidate.staged.name):
            plugin = self._all.find(candidate.staged.name)
            now = plugin.registration
            if candidate.release == now.release and plugin.effective is not None:
                self._registrar.discard(token)
                return {"plugin": self._all.entry(plugin), "unchanged": True}
            if candidate.more:
                await self._hold(plugin, token, candidate.more, who)
                if not message.fields.get("approve"):
                    return {"plugin": self._all.entry(plugin), "pending": True, "differences": list(candidate.more)}
                await self._approve_pending(plugin, who)
                return {"plugin": self._all.entry(plugin), "differences": list(candidate.more)}
            self._registrar.granted(candidate.core)
            release, source = await asyncio.to_thread(self._registrar.accept, token)
            change = _Exchange("update", PluginUpdated.TYPE, who)
            await self._exchange(plugin, change, lambda: self._registrar.use(now, release, source=source))
            return {"plugin": self._all.entry(plugin)}

    async def _hold(self, plugin: Plugin, token: str, more: tuple[str, ...], who: str | None) -> None:
        registration = await asyncio.to_thread(self._registrar.hold, token)
        assert registration.pending is not None
        plugin.registration = registration
        self._registrar.prune(registration)
        pending = PluginPending(
            old=registration.digest, new=registration.pending.digest, version=registration.pending.version,
            differences=list(more), who=who,
        )  # fmt: skip
        self._daemon.audit.record(pending, plugin=plugin.name)
        self._daemon.changed(plugin)

    async def _on_rollback(self, message: Message) -> dict[str, Any]:
        async with self._all.lock(name_in(message)):
            plugin = self._all.find(name_in(message))
            now = plugin.registration
            self._check(now, await asyncio.to_thread(self._registrar.earlier, now))
            change = _Exchange("rollback", PluginRolledBack.TYPE, message.fields.get("by"))
            await self._exchange(plugin, change, lambda: self._registrar.roll_back(now))
            return {"plugin": self._all.entry(plugin)}

    async def _on_approve(self, message: Message) -> dict[str, Any]:
        name, who, digest = name_in(message), message.fields.get("by"), message.fields.get("digest")
        async with self._all.lock(name):
            plugin = self._all.find(name)
            now = plugin.registration
            if digest and digest != (now.pending or now.release).digest:
                raise UsageError(f"plugin {name}", "something else waits for approval now", "look at it again")
            if now.pending is not None:
                await self._approve_pending(plugin, who)
            elif await asyncio.to_thread(self._registrar.binary_changed, now):
                candidate = await asyncio.to_thread(self._registrar.stage, now.source, update=name)
                self._record_approval(plugin, candidate.release, (), who)
                release, source = await asyncio.to_thread(self._registrar.accept, candidate.staged.token)
                change = _Exchange("approve", PluginUpdated.TYPE, who)
                await self._exchange(plugin, change, lambda: self._registrar.use(now, release, source=source))
            elif self._registrar.policy_text(name) is None:
                running = plugin.wanted
                await plugin.stop("approved")
                registration = await asyncio.to_thread(self._registrar.grant, now)
                plugin.take(self._registrar.read(registration))
                self._record_approval(plugin, now.release, (), who)
                if running:
                    plugin.begin("approve")
                self._daemon.changed(plugin)
            else:
                raise UsageError(f"plugin {name}", "nothing waits for approval", "see 'isolator plugin list'")
            return {"plugin": self._all.entry(plugin)}

    async def _approve_pending(self, plugin: Plugin, who: str | None) -> None:
        now = plugin.registration
        assert now.pending is not None
        release, waiting = now.pending, self._all.pending(now) or {}
        text = await asyncio.to_thread(self._registrar.proposed_policy, now)
        if text is None:
            self._check(now, release)
        self._record_approval(plugin, release, waiting.get("differences", ()), who)
        change = _Exchange("approve", PluginUpdated.TYPE, who)
        await self._exchange(plugin, change, lambda: self._registrar.use(now, release, policy_text=text))

    def _record_approval(self, plugin: Plugin, release: Release, more: Any, who: str | None) -> None:
        approved = PluginApproved(
            old=plugin.registration.digest, new=release.digest, version=release.version,
            binary_sha256=release.binary_sha256 or None, differences=list(more), who=who,
        )  # fmt: skip
        self._daemon.audit.record(approved, plugin=plugin.name)

    def _check(self, now: Registration, release: Release) -> None:
        """Raise what would keep a version from being used while the one in use still runs."""
        loaded = self._registrar.read(replace(now, release=release))
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

    async def hold_trials(self) -> list[tuple[Plugin, Trial]]:
        """The versions that a killed daemon had not judged yet, locked: nobody does anything to them before that."""
        found = []
        for name, plugin in self._all.plugins.items():
            trial = self._registrar.store.trial(name)
            if trial is not None:
                await self._all.lock(name).acquire()
                plugin.on_trial = True
                found.append((plugin, trial))
        return found

    def judge_again(self, held: list[tuple[Plugin, Trial]]) -> None:
        """Start them and watch; takes over their locks."""
        for plugin, trial in held:
            self._all.own(self._judge_held(plugin, trial))

    async def _judge_held(self, plugin: Plugin, trial: Trial) -> None:
        try:
            await self._judge(plugin, trial, plugin.registration, running=plugin.registration.enabled)
        except IsolatorError as error:
            self._all.log(str(error))
        finally:
            self._all.lock(plugin.name).release()

    async def _judge(self, plugin: Plugin, trial: Trial, after: Registration, *, running: bool) -> None:
        before, failure = trial.before, ""
        try:
            loaded = self._registrar.read(after)
            plugin.on_trial = running
            plugin.take(loaded)
            self._daemon.changed(plugin)
            failure = loaded.error
            if running and not failure:
                failure = await plugin.trial(trial.reason)
        except (IsolatorError, OSError) as error:
            failure = str(error)
        plugin.on_trial = False
        if failure:
            await self._come_back(plugin, trial, after, failure, running=running)
            raise IsolatorError(
                f"plugin {plugin.name} {after.version}", f"{failure}; {before.version} is in use again",
                f"see 'isolator plugin logs {plugin.name}'",
            )  # fmt: skip
        self._registrar.store.end_trial(plugin.name)
        await asyncio.to_thread(self._registrar.prune, after)
        exchanged = _EXCHANGED.get(trial.record, PluginUpdated)(
            old=before.digest, new=after.digest, version=after.version, reason=trial.reason, who=trial.who,
            old_policy_sha256=trial.old_policy_sha256,
            policy_sha256=plugin.effective.digest() if plugin.effective else None,
        )  # fmt: skip
        self._daemon.audit.record(exchanged, plugin=plugin.name)
        self._daemon.changed(plugin)
        self._all.discovery.look_again()

    async def _come_back(
        self, plugin: Plugin, trial: Trial, after: Registration, failure: str, *, running: bool
    ) -> None:
        text = self._registrar.policy_text(plugin.name)
        ours = policy_files.digest(text) == after.policy_sha256  # else an operator has edited it meanwhile
        restored = await asyncio.to_thread(
            self._registrar.put_back, trial.before, after, trial.policy if ours and text != trial.policy else None
        )
        self._registrar.store.end_trial(plugin.name)
        rolled_back = PluginRolledBack(
            old=after.digest, new=restored.digest, version=restored.version, reason=failure, who="the daemon"
        )
        self._daemon.audit.record(rolled_back, plugin=plugin.name)
        await self._resume(plugin, restored, running=running)
        await asyncio.to_thread(self._registrar.prune, restored)

    async def _resume(self, plugin: Plugin, registration: Registration, *, running: bool) -> None:
        """Go on with a version that is in use again, and give it the time to come up."""
        plugin.take(self._registrar.read(registration))
        self._daemon.changed(plugin)
        if running:
            with contextlib.suppress(IsolatorError, TimeoutError):
                async with asyncio.timeout(SOCKET_SECONDS):
                    plugin.begin("rollback")
                    await plugin.up()

    async def _on_remove(self, message: Message) -> dict[str, Any]:
        name = name_in(message)
        async with self._all.lock(name):
            plugin = self._all.find(name)
            await plugin.stop("removed")
            try:
                await asyncio.to_thread(self._registrar.remove, plugin.registration, self.forget_state)
            finally:
                if name not in self._registrar.names():
                    # If not all of it could be deleted, the rest is at the next start; it is no plugin any more.
                    del self._all.plugins[name]
                    # A host that came back meanwhile was told at its start that there is such a plugin.
                    self._daemon.tell_host("plugin.changed", removed=name)
                    removed = PluginRemoved(old=plugin.registration.digest, who=message.fields.get("by"))
                    self._daemon.audit.record(removed, plugin=name)
            folder = host_api_folder(self._daemon.paths, name)
            (folder / "host.sock").unlink(missing_ok=True)
            folder.rmdir()
        self._all.discovery.look_again()
        return {}

    def forget_state(self, name: str) -> None:
        """Delete what a plugin has stored."""
        Volume(self._daemon.paths.state, name, self._daemon.runtime.journal).remove()

    async def _on_enable(self, message: Message) -> dict[str, Any]:
        async with self._all.lock(name_in(message)):
            plugin = self._all.find(name_in(message))
            if not plugin.registration.enabled or plugin.state == "failed":
                plugin.renew(await asyncio.to_thread(self._registrar.set_enabled, plugin.name, enabled=True))
            return {"plugin": self._all.entry(plugin)}

    async def _on_disable(self, message: Message) -> dict[str, Any]:
        async with self._all.lock(name_in(message)):
            plugin = self._all.find(name_in(message))
            registration = await asyncio.to_thread(self._registrar.set_enabled, plugin.name, enabled=False)
            await plugin.stop("disabled")
            plugin.renew(registration)
            return {"plugin": self._all.entry(plugin)}

    async def _on_explain(self, message: Message) -> dict[str, Any]:
        name = name_in(message)
        found = self._all.discovery.found.get(name)
        if found is not None and name not in self._all.plugins:
            if found.core is None:
                raise UsageError(f"plugin {name}", found.error, f"correct it in {found.folder}")
            return {"proposal": await asyncio.to_thread(self._registrar.propose, found.core)}
        self._all.find(name)
        return {"proposal": await asyncio.to_thread(self._registrar.explain, name)}
