"""Handlers of the verbs that register, change and remove plugins."""

from __future__ import annotations

import asyncio
import functools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from host.control import plugin_types
from host.control.endpoints import Belonging, Caller, Verbs, serves
from host.control.terms import Nothing
from host.delivery.modes import check_mode
from host.events import Catalogue
from host.lifecycle.lifecycle import PluginLifecycle
from host.lifecycle.supervisor_link import SupervisorLink
from host.plugins import manifest as manifests
from host.plugins.manifest import Manifest
from host.plugins.registry import Plugin, Registry
from host.plugins.secrets import ConfigStore
from host.queue.owed import Debts
from isolator.audit.client import AuditClient
from isolator.audit.schema import PackageResolved
from isolator.base.structs import struct_class
from isolator.errors import IsolatorError, UsageError, nearest, translated
from isolator.ipc import messages
from isolator.ipc.body import Json, Request
from isolator.ipc.channel import MAX_PACKET
from isolator.ipc.succession import to_bytes, to_text
from isolator.linux.descriptors import close_all
from isolator.policy.request import MAX_BYTES


@struct_class(frozen=True)
class _Staged:
    """A plugin that was shown and is not registered yet."""

    manifest: Manifest
    digest: str
    text: bytes
    """The manifest as it was read, and where."""
    name: str


class RegistrationVerbs(Verbs):
    """Plugins as they change: staged, committed, exchanged, approved, enabled, removed."""

    def __init__(
        self,
        link: SupervisorLink,
        catalogue: Catalogue,
        registry: Registry,
        config: ConfigStore,
        lifecycle: PluginLifecycle,
        audit: AuditClient,
        debts: Debts,
    ) -> None:
        self._link, self._catalogue, self._registry = link, catalogue, registry
        self._config, self._lifecycle, self._audit, self._debts = config, lifecycle, audit, debts
        self._staged: dict[str, _Staged] = {}
        self._kept: dict[str, Callable[[], None]] = {}
        """Functions, by token, that have a connection keep no longer what was staged."""
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """Locks by name: the plugin that is registered and its config change together."""

    @serves(plugin_types.PluginStage)
    async def stage(self, request: plugin_types.PluginStage, caller: Caller) -> plugin_types.StagedPlugin:
        wanted = ("path", "name", "binary", "hooks", "files", "update", "ticket")
        given = {k: v for k in wanted if (v := getattr(request, k)) is not None}
        resolved = _resolved(request.resolved) if request.resolved is not None else None
        answer = await self._link.stage(messages.StagePlugin.from_json(given, "plugin.stage"))
        found = answer.body
        token = found.token
        try:
            where = os.path.join(request.path or os.path.dirname(request.binary or ""), "plugin.json")
            text = _read_all(answer.fds)
            manifest = manifests.parse(text, name=where)
            checked = manifests.check_values(manifest, request.config)
            self._check_hooks(manifest.core.hooks)
            self._check_calls(manifest)
            check_mode(manifest.transport.mode)
        except IsolatorError:
            self._link.discard(token)
            raise
        finally:
            close_all(answer.fds)
        self._keep(caller, token, _Staged(manifest, found.digest, text, where))
        if resolved is not None:
            record = PackageResolved(by=caller.by, digest=found.digest, **resolved)
            self._audit.record(record, plugin=manifest.core.name)
        shown = {
            **found.to_json(),
            "version": manifest.core.version,
            "description": manifest.core.description,
            "warnings": [*manifest.warnings, *_deaf(found.proposal)],
            "config": [f.model_dump() for f in manifest.config or ()],
            "missing": [key for key in manifest.required if key not in checked],
            "secrets_given": sorted(spec.key for spec, _ in checked.values() if spec.secret),
            "mode": manifest.transport.mode,
        }
        return cast(plugin_types.StagedPlugin, shown)

    def _keep(self, caller: Caller, token: str, staged: _Staged) -> None:
        """Keep what was staged as long as the caller's connection."""
        self._staged[token] = staged

        def belonging() -> Belonging:
            data = {"token": token, "digest": staged.digest, "text": to_text(staged.text), "name": staged.name}
            return Belonging(verb=plugin_types.PluginStage.spec.verb, data=data)

        self._kept[token] = caller.keep(lambda: self._abandon(token), belonging)

    def restore(self, caller: Caller, data: Json) -> None:
        """Take over what a caller has staged from the host whose place this one takes."""
        text, name = to_bytes(str(data["text"])), str(data["name"])
        manifest = manifests.parse(text, name=name)
        self._keep(caller, str(data["token"]), _Staged(manifest, str(data["digest"]), text, name))

    def _check_hooks(self, hooks: Sequence[str]) -> None:
        """Refuse a hook that no event has: a typing mistake, or the platform has not registered its event yet."""
        known = sorted({event.name for event in self._catalogue})
        for hook in hooks:
            if self._catalogue.get(self._catalogue.canonical(hook)) is None:
                near = nearest(hook, known)
                why = f"no such event; did you mean {near!r}?" if near else "no such event"
                raise UsageError(f"hook {hook!r}", why, f"known: {', '.join(known)}")

    def _check_calls(self, manifest: Manifest) -> None:
        """Refuse arguments of a tool that use a field which the event does not have."""
        if not manifest.transport.calls:
            return
        from host.mcp import template

        for hook, call in manifest.transport.calls.items():
            event_type = self._catalogue.get(self._catalogue.canonical(hook))
            known = list(event_type.shape.fields) if event_type is not None else []
            where = f"transport.calls.{hook}.arguments"
            with translated(ValueError, UsageError, where):
                template.check(call.arguments)
            for name in sorted(template.fields(call.arguments) - set(known)):
                near = nearest(name, known)
                why = f"{hook} has no field {name!r}" + (f"; did you mean {near!r}?" if near else "")
                raise UsageError(where, why, f"known: {', '.join(known)}")

    @serves(plugin_types.PluginCommit)
    async def commit(self, request: plugin_types.PluginCommit, caller: Caller) -> plugin_types.RegisteredPlugin:
        staged = self._staged.get(request.token)
        if staged is None:
            raise UsageError("plugin add", "nothing is staged under that token", "add it again")
        name = staged.manifest.core.name
        async with self._locks[name]:
            current = self._registry.get(name)
            if current is not None and not current.raw.get("found"):
                raise UsageError(f"plugin {name}", "is already registered", f"isolator plugin update {name} DIR")
            is_new = current is None
            if is_new and name in self._registry.known():
                # It was removed while this process was not running: nothing of it may reach its namesake.
                await self._lifecycle.forget(name)
            with self._debts.of_config(name, request.config, caller.by) as change:
                note = functools.partial(change.note, waits=False)
                await self._config.set(name, staged.manifest, request.config, replace=is_new, beside=note)
                try:
                    answer = await self._link.ask(messages.CommitPlugin(token=request.token, ticket=request.ticket))
                except IsolatorError:
                    if is_new:
                        await self._config.forget(name, beside=change.drop)
                    raise
            plugin = await self._adopted(request.token, answer)
            return await self._registered(staged.manifest, plugin, new=True)

    @serves(plugin_types.PluginUpdate)
    async def update(self, request: plugin_types.PluginUpdate, caller: Caller) -> plugin_types.UpdatedPlugin:
        staged = self._staged.get(request.token)
        if staged is None:
            raise UsageError("plugin update", "nothing is staged under that token", "run it again")
        manifest, name = staged.manifest, staged.manifest.core.name
        async with self._locks[name]:
            self._registry.need(name)
            asked = messages.UpdatePlugin(token=request.token, ticket=request.ticket, approve=request.approve)
            with self._debts.of_config(name, request.config, caller.by) as change:
                await self._config.set_next(name, staged.digest, manifest, request.config, beside=change.note)
                try:
                    answer = await self._link.ask(asked)
                except IsolatorError:
                    now = self._registry.get(name)
                    if now is None or staged.digest not in now.versions:
                        self._config.drop_next(name, staged.digest, beside=change.drop)
                    raise
                plugin = await self._adopted(request.token, answer)
                if request.config:
                    await change.restate(waits=answer.pending)
            updated = answer.to_json() | await self._registered(manifest, plugin)
            if request.config and updated.get("unchanged"):
                await self._lifecycle.restart_for_config(self._registry.need(name), sorted(request.config))
            return cast(plugin_types.UpdatedPlugin, updated)

    async def _adopted(self, token: str, answer: messages.OnePlugin) -> Plugin:
        """The plugin as an answer has it; to be called before anything is waited for, as newer news may come then."""
        self._take(token)
        return await self._lifecycle.adopt(answer.plugin)

    async def _registered(
        self, manifest: Manifest, plugin: Plugin, *, new: bool = False
    ) -> plugin_types.RegisteredPlugin:
        await self._lifecycle.registered(plugin, new=new)
        missing = self._config.missing(plugin.name, plugin.manifest or manifest)
        self._lifecycle.start_if_eager(plugin)
        return {"plugin": _shown(plugin), "missing": missing}

    @serves(plugin_types.PluginDiscard)
    async def discard(self, request: plugin_types.PluginDiscard, _: Caller) -> Nothing:
        self._abandon(request.token)
        return {}

    @serves(plugin_types.PluginApprove)
    async def approve(self, request: plugin_types.PluginApprove, caller: Caller) -> plugin_types.ApprovedPlugin:
        found = self._registry.need(request.name).raw.get("found")
        if found:
            staged = await self.stage(plugin_types.PluginStage(path=found), caller)
            if request.digest and request.digest != staged["digest"]:
                self._abandon(staged["token"])
                raise UsageError(f"plugin {request.name}", "something else is in its folder now", "look at it again")
            return cast(
                plugin_types.ApprovedPlugin,
                await self.commit(plugin_types.PluginCommit(token=staged["token"], ticket=request.ticket), caller),
            )
        asked = messages.ApprovePlugin(name=request.name, ticket=request.ticket, digest=request.digest)
        return cast(plugin_types.ApprovedPlugin, await self._change(request.name, asked))

    @serves(plugin_types.PluginReject)
    async def reject(self, request: plugin_types.PluginReject, _: Caller) -> plugin_types.ChangedPlugin:
        waiting = self._registry.need(request.name).raw.get("pending")
        answer = await self._change(request.name, messages.RejectPlugin(name=request.name, ticket=request.ticket))
        if waiting:
            self._config.drop_next(request.name, str(waiting["digest"]))
        return answer

    @serves(plugin_types.PluginRollback)
    async def roll_back(self, request: plugin_types.PluginRollback, _: Caller) -> plugin_types.ChangedPlugin:
        asked = messages.RollBackPlugin(name=request.name, to=request.to, ticket=request.ticket)
        return await self._change(request.name, asked)

    @serves(plugin_types.PluginEnable)
    async def enable(self, request: plugin_types.PluginEnable, _: Caller) -> plugin_types.ChangedPlugin:
        answer = await self._change(request.name, messages.EnablePlugin(name=request.name, ticket=request.ticket))
        self._lifecycle.start_if_eager(self._registry.need(request.name))
        return answer

    @serves(plugin_types.PluginDisable)
    async def disable(self, request: plugin_types.PluginDisable, _: Caller) -> plugin_types.ChangedPlugin:
        return await self._change(request.name, messages.DisablePlugin(name=request.name))

    @serves(plugin_types.PluginRemove)
    async def remove(self, request: plugin_types.PluginRemove, _: Caller) -> Nothing:
        if request.cluster:
            await self._lifecycle.end_in_cluster(request.name)
            if self._registry.get(request.name) is None:
                return {}
        name = self._registry.need(request.name).name
        async with self._locks[name]:
            self._registry.need(name)
            await self._link.ask(messages.RemovePlugin(name=name, ticket=request.ticket))
            now = self._registry.get(name)
            if now is None or not now.raw.get("found"):  # else forgotten already, and found in a folder
                await self._lifecycle.removed(name)
            return {}

    async def _change(self, name: str, change: Request[messages.OnePlugin]) -> plugin_types.ChangedPlugin:
        """Have the supervisor change a registered plugin, and take over its entry."""
        self._registry.need(name)
        async with self._locks[name]:
            self._registry.need(name)
            answer = await self._link.ask(change)
            plugin = await self._lifecycle.adopt(answer.plugin)
            await self._lifecycle.registered(plugin)
            return {"plugin": _shown(plugin)}

    def _abandon(self, token: str) -> None:
        if self._take(token) is not None:
            self._link.discard(token)

    def _take(self, token: str) -> _Staged | None:
        """What was staged under a token, which nobody keeps any more."""
        if (over := self._kept.pop(token, None)) is not None:
            over()
        return self._staged.pop(token, None)


def _resolved(value: Mapping[str, Any]) -> dict[str, Any]:
    """Resolution of a package by a caller's word, as a record has it; raises UsageError."""
    package, hashes = value.get("package"), value.get("hashes")
    if not isinstance(package, str) or len(package) > 300 or not isinstance(hashes, dict):
        raise UsageError("resolved", 'must be {"package": ..., "hashes": {...}}')
    if not all(isinstance(text, str) for text in hashes.values()) or len(json.dumps(hashes)) > MAX_PACKET // 2:
        raise UsageError("resolved", "its hashes must be text by name, and fit into a record of the trail")
    return {"package": package, "hashes": hashes}


def _deaf(proposal: Mapping[str, Any]) -> list[str]:
    """The warning of a plugin that can never receive an event."""
    if proposal["effective"]["hooks"]:
        return []
    asks = any(line["field"] == "hooks" for line in proposal["lines"])
    why = "its policy, or the host's ceiling, grants none of its hooks" if asks else "its manifest names no hook"
    return [f"it will never receive an event: {why}"]


def _shown(plugin: Plugin) -> plugin_types.PluginEntry:
    return cast(
        plugin_types.PluginEntry,
        {key: value for key, value in plugin.raw.items() if key not in ("manifest", "effective")},
    )


def _read_all(fds: list[int]) -> bytes:
    """The staged manifest, one byte more than it may have at most."""
    if not fds:
        raise IsolatorError("plugin add", "the supervisor sent no manifest", "this is a bug; please report it")
    data = b""
    while len(data) <= MAX_BYTES:
        chunk = os.pread(fds[0], MAX_BYTES + 1 - len(data), len(data))
        if not chunk:
            break
        data += chunk
    return data
