"""What the control socket can do with plugins, config and the daemon, verb by verb.

Parameters are checked here; the work is done by those who own it. Events are in ``methods_events``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from host.control.event_verbs import EventMethods
from host.control.server import Caller, Method, number, text, values
from host.plugins import manifest as manifests
from host.plugins.logs import LAST_WORDS, UNREAD_LOG, bounded
from host.plugins.manifest import Manifest
from host.plugins.registry import Plugin
from isolator import __version__
from isolator.audit.schema import ConfigChanged
from isolator.errors import IsolatorError, UsageError
from isolator.ipc.channel import Message
from isolator.policy.request import MAX_BYTES

if TYPE_CHECKING:
    from host.host import Host

SUPERVISOR_TIMEOUT = 120.0
MAX_EXCHANGE = 240.0
"""Seconds for one version to be stopped, another to be watched, and the first to come back."""
_MANIFEST_LIMIT = MAX_BYTES


@dataclasses.dataclass(frozen=True)
class _Staged:
    """What was shown and is not registered yet."""

    manifest: Manifest
    digest: str


class Methods:
    """The verbs of one host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._staged: dict[str, _Staged] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """What is registered under a name and the config of that name change together."""

    def table(self) -> dict[str, Method]:
        """Every verb with the role it needs."""
        operator = {
            "plugin.stage": self.plugin_stage,
            "plugin.commit": self.plugin_commit,
            "plugin.update": self.plugin_update,
            "plugin.discard": self.plugin_discard,
            "plugin.start": self.plugin_start,
            "plugin.stop": self.plugin_stop,
            "plugin.restart": self.plugin_restart,
            "plugin.enable": self.plugin_enable,
            "plugin.disable": self.plugin_disable,
            "plugin.remove": self.plugin_remove,
            "plugin.rollback": self.plugin_rollback,
            "plugin.approve": self.plugin_approve,
            "config.set": self.config_set,
            "config.unset": self.config_unset,
            "config.rotate_key": self.config_rotate_key,
        }
        viewer = {
            "status": self.status,
            "ledger": self.ledger,
            "plugin.list": self.plugin_list,
            "plugin.show": self.plugin_show,
            "plugin.explain": self.plugin_explain,
            "plugin.logs": self.plugin_logs,
            "config.list": self.config_list,
        }
        return {
            **{name: Method("operator", handler, recorded=True) for name, handler in operator.items()},
            **{name: Method("viewer", handler) for name, handler in viewer.items()},
            **EventMethods(self._host).table(),
        }

    # Plugins

    async def plugin_stage(self, params: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Show what a plugin asks for and what it would be granted; nothing is registered yet.

        ``update`` names the registered plugin of which this is a newer version; without ``path`` it is taken from
        where the last one came from.
        """
        wanted = ("path", "name", "binary", "hooks", "files", "update")
        fields = {key: params[key] for key in wanted if params.get(key) is not None}
        answer = await self._ask("plugin.stage", **fields)
        token = str(answer.fields["token"])
        try:
            where = fields.get("path") or os.path.dirname(str(fields.get("binary", "")))
            manifest = manifests.parse(_read_all(answer), name=os.path.join(where, "plugin.json"))
            checked = self._host.config.check(manifest, values(params))
        except IsolatorError:
            self._host.supervisor.notify("plugin.discard", token=token)
            raise
        finally:
            answer.close()
        self._check_hooks(manifest.core.hooks, token)
        self._staged[token] = _Staged(manifest, str(answer.fields["digest"]))
        caller.on_close.append(lambda: self._abandon(token))
        missing = [f.key for f in manifest.config or () if f.required and f.default is None and f.key not in checked]
        return {
            **answer.fields,
            "version": manifest.core.version,
            "description": manifest.core.description,
            "warnings": list(manifest.warnings),
            "config": [f.model_dump() for f in manifest.config or ()],
            "missing": missing,
            "secrets_given": sorted(spec.key for spec, _ in checked.values() if spec.secret),
            "mode": manifest.transport.mode,
        }

    def _check_hooks(self, hooks: Sequence[str], token: str) -> None:
        """A hook that no event has would never be called: a typing mistake, or a platform that is not there yet."""
        known = sorted({event.name for event in self._host.catalogue})
        for hook in hooks:
            if self._host.catalogue.get(self._host.catalogue.canonical(hook)) is None:
                self._host.supervisor.notify("plugin.discard", token=token)
                near = difflib.get_close_matches(hook, known, 1)
                raise UsageError(
                    f"hook {hook!r}",
                    f"no such event; did you mean {near[0]!r}?" if near else "no such event",
                    f"known: {', '.join(known)}",
                )

    async def plugin_commit(self, params: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Register what was staged, with its config."""
        token = text(params, "token")
        staged = self._staged.get(token)
        if staged is None:
            raise UsageError("plugin add", "nothing is staged under that token", "add it again")
        manifest, name = staged.manifest, staged.manifest.core.name
        given = values(params)
        async with self._locks[name]:
            current = self._host.registry.get(name)
            if current is not None and not current.raw.get("found"):
                raise UsageError(f"plugin {name}", "is already registered", f"isolator plugin update {name} DIR")
            is_new = current is None
            if is_new and name in self._host.registry.known():
                # It was removed while this process was not running: nothing of it may reach its namesake.
                await self._host.removed(name)
            await self._host.config.set(name, manifest, given, replace=is_new)
            try:
                answer = await self._ask("plugin.commit", token=token, by=caller.by)
            except IsolatorError:
                if is_new:
                    await self._host.config.forget(name)
                raise
            return await self._registered(token, manifest, given, answer, caller)

    async def plugin_update(self, params: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Take over a staged newer version; one that asks for more waits, unless ``approve`` says that it may.

        Values given with it are the version's: they go with it when it fails, and wait with it.
        """
        token = text(params, "token")
        staged = self._staged.get(token)
        if staged is None:
            raise UsageError("plugin update", "nothing is staged under that token", "run it again")
        manifest, name, given = staged.manifest, staged.manifest.core.name, values(params)
        async with self._locks[name]:
            self._host.registry.need(name)
            await self._host.config.set_next(name, staged.digest, manifest, given)
            try:
                answer = await self._ask(
                    "plugin.update",
                    token=token,
                    by=caller.by,
                    approve=params.get("approve") is True,
                    timeout=MAX_EXCHANGE,
                )
            except IsolatorError:
                now = self._host.registry.get(name)
                if now is None or staged.digest not in now.versions:
                    self._host.config.drop_next(name, staged.digest)
                raise
            done = {**answer.fields, **await self._registered(token, manifest, given, answer, caller)}
            if given and done.get("unchanged"):
                await self._restart_for_config(self._host.registry.need(name), sorted(given))
            return done

    async def _registered(
        self, token: str, manifest: Manifest, given: Mapping[str, str], answer: Message, caller: Caller
    ) -> dict[str, Any]:
        name = manifest.core.name
        self._staged.pop(token, None)
        if given:
            waits = bool(answer.fields.get("pending"))
            changed = ConfigChanged(names=sorted(given), by=caller.by, waits=waits)
            self._host.audit.record(changed, plugin=name)
        plugin = await self._host.put(answer.fields["plugin"])
        missing = self._host.config.missing(name, plugin.manifest or manifest)
        self._host.start_if_eager(plugin)
        return {"plugin": _shown(plugin), "missing": missing}

    async def plugin_discard(self, params: Mapping[str, Any], _: Caller) -> dict[str, Any]:
        """Forget what was staged."""
        self._abandon(text(params, "token"))
        return {}

    async def plugin_list(self, _: Mapping[str, Any], __: Caller) -> dict[str, Any]:
        """Every plugin with its live figures."""
        entries = await self._entries()
        return {"plugins": [self._with_queue(entry) for entry in entries], "alarms": self._host.alarms()}

    async def plugin_show(self, params: Mapping[str, Any], _: Caller) -> dict[str, Any]:
        """Everything about one plugin."""
        plugin = self._need(params)
        entry = next((e for e in await self._entries() if e.get("name") == plugin.name), plugin.raw)
        manifest = plugin.manifest
        return {
            **self._with_queue(entry),
            "effective": plugin.raw.get("effective"),
            "manifest": plugin.raw.get("manifest"),
            "mode": plugin.mode,
            "hooks": sorted(plugin.hooks.values()),
            "config": [dataclasses.asdict(i) for i in self._host.config.listing(plugin.name, manifest)],
            "missing": self._host.config.missing(plugin.name, manifest) if manifest is not None else [],
            "stderr": [text for _, text in self._host.logs.of(plugin.name).last][-LAST_WORDS:],
            "log_bytes_dropped": self._host.logs.of(plugin.name).dropped,
        }

    async def plugin_explain(self, params: Mapping[str, Any], _: Caller) -> dict[str, Any]:
        """Request, grant and effect, line by line, with where each comes from."""
        plugin = self._need(params)
        return (await self._ask("policy.explain", name=plugin.name)).fields

    async def plugin_start(self, params: Mapping[str, Any], _: Caller) -> dict[str, Any]:
        """Start the sidecar and wait until it runs."""
        return (await self._ask("run.ensure", name=self._need(params).name, reason="operator")).fields

    async def plugin_stop(self, params: Mapping[str, Any], _: Caller) -> dict[str, Any]:
        """Stop the sidecar; the next event starts it again."""
        return (await self._ask("run.stop", name=self._need(params).name, reason="operator")).fields

    async def plugin_restart(self, params: Mapping[str, Any], _: Caller) -> dict[str, Any]:
        """Stop and start the sidecar."""
        return (await self._ask("run.restart", name=self._need(params).name, reason="restart")).fields

    async def plugin_enable(self, params: Mapping[str, Any], _: Caller) -> dict[str, Any]:
        """Let it run again; also clears ``failed``."""
        answer = await self._change("plugin.enable", params)
        self._host.start_if_eager(self._need(params))
        return answer

    async def plugin_disable(self, params: Mapping[str, Any], _: Caller) -> dict[str, Any]:
        """Stop it and keep it stopped; its events wait."""
        return await self._change("plugin.disable", params)

    async def plugin_remove(self, params: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Stop it and forget it, its config and its queue."""
        name = self._need(params).name
        async with self._locks[name]:
            self._need(params)
            answer = await self._ask("plugin.remove", name=name, by=caller.by)
            await self._host.removed(name)
            return answer.fields

    async def plugin_rollback(self, params: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Go back to the version before."""
        return await self._change("plugin.rollback", params, by=caller.by)

    async def plugin_approve(self, params: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Agree to what is pending; ``digest`` (from ``plugin.explain``) makes sure that it is what was shown."""
        plugin = self._need(params)
        if plugin.raw.get("found"):
            staged = await self.plugin_stage({"path": plugin.raw["found"]}, caller)
            return await self.plugin_commit({"token": staged["token"]}, caller)
        return await self._change("plugin.approve", params, by=caller.by, digest=params.get("digest"))

    async def plugin_logs(self, params: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """The last lines a sidecar wrote; with ``follow`` further ones come as ``log`` notifications."""
        plugin = self._need(params)
        log = self._host.logs.of(plugin.name)
        lines = log.read(number(params, "lines", 100, 10_000))
        if params.get("follow"):
            caller.narrow(UNREAD_LOG)
            caller.on_close.append(log.follow(bounded(caller)))
        return {"lines": [json.loads(entry) for entry in lines], "dropped": log.dropped}

    # Config

    async def config_list(self, params: Mapping[str, Any], _: Caller) -> dict[str, Any]:
        """Keys, types and values; never the value of a secret."""
        plugin = self._need(params)
        items = self._host.config.listing(plugin.name, plugin.manifest)
        return {"items": [dataclasses.asdict(item) for item in items]}

    async def config_set(self, params: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Set values and restart the sidecar if it runs."""
        plugin = self._need(params)
        if plugin.manifest is None:
            raise IsolatorError(f"plugin {plugin.name}", plugin.error or "its manifest cannot be read")
        given = values(params)
        await self._host.config.set(plugin.name, plugin.manifest, given)
        self._host.audit.record(ConfigChanged(names=sorted(given), by=caller.by), plugin=plugin.name)
        return await self._restart_for_config(plugin, sorted(given))

    async def config_unset(self, params: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Forget a value and restart the sidecar if it runs."""
        plugin = self._need(params)
        key = text(params, "key")
        await self._host.config.unset(plugin.name, key)
        self._host.audit.record(ConfigChanged(names=[key], by=caller.by), plugin=plugin.name)
        return await self._restart_for_config(plugin, [key])

    async def config_rotate_key(self, _: Mapping[str, Any], caller: Caller) -> dict[str, Any]:
        """Encrypt every value with a new key."""
        count = await self._host.config.rotate()
        self._host.audit.record(ConfigChanged(names=[], rotated=count, by=caller.by))
        return {"values": count}

    # The daemon

    async def status(self, _: Mapping[str, Any], __: Caller) -> dict[str, Any]:
        """Is everything well?"""
        host = self._host
        return {
            "version": __version__,
            "pid": os.getpid(),
            "plugins": sum(1 for _ in host.registry),
            "queue": host.queue.depths(),
            "alarms": host.alarms(),
            "audit_blocked": host.audit.blocked,
            "database_blocked": host.store.blocked,
            "records_pending": host.audit.sent - host.audit.acked,
        }

    async def ledger(self, _: Mapping[str, Any], __: Caller) -> dict[str, Any]:
        """This host's controls, as the supervisor sees them."""
        return (await self._ask("ledger")).fields

    # Helpers

    async def _ask(self, op: str, *, timeout: float = SUPERVISOR_TIMEOUT, **fields: Any) -> Message:
        return await self._host.supervisor.call(op, timeout=timeout, **fields)

    async def _change(self, op: str, params: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
        name = self._need(params).name
        given = {key: value for key, value in fields.items() if value is not None}
        async with self._locks[name]:
            self._need(params)
            answer = await self._ask(op, name=name, timeout=MAX_EXCHANGE, **given)
            if isinstance(answer.fields.get("plugin"), dict):
                answer.fields["plugin"] = _shown(await self._host.put(answer.fields["plugin"]))
            return answer.fields

    async def _entries(self) -> list[dict[str, Any]]:
        try:
            answer = await self._host.supervisor.call("plugin.status", timeout=5.0)
        except IsolatorError:
            return [plugin.raw for plugin in self._host.registry]
        return list(answer.fields.get("plugins", ()))

    async def _restart_for_config(self, plugin: Plugin, names: list[str]) -> dict[str, Any]:
        current = self._host.registry.need(plugin.name)
        if current.state == "failed":
            # What failed may well have failed for want of it.
            await self._host.put((await self._ask("plugin.enable", name=plugin.name)).fields["plugin"])
        self._host.dispatcher.plugin_news(plugin.name)
        if current.run is None:
            self._host.start_if_eager(self._host.registry.need(plugin.name))
            return {"restarted": False}
        # Names only: the values come with the environment of the next start.
        self._host.dispatcher.tell(plugin.name, "config.changed", {"keys": names})
        await self._ask("run.restart", name=plugin.name, reason="config")
        return {"restarted": True}

    def _with_queue(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        name = str(entry.get("name"))
        plugin = self._host.registry.get(name)
        shown = {key: value for key, value in entry.items() if key not in ("manifest", "effective")}
        error = entry.get("error") or (plugin.error if plugin is not None else None)
        if error and shown.get("state") == "pending":
            shown["state"] = "rejected"  # the parts of its manifest that only this process reads are wrong
        return {
            **shown,
            "error": error,
            "queue": self._host.queue.consumer(name).depth if plugin is not None else 0,
            **self._host.dispatcher.status(name),
        }

    def _need(self, params: Mapping[str, Any]) -> Plugin:
        return self._host.registry.need(text(params, "name"))

    def _abandon(self, token: str) -> None:
        if self._staged.pop(token, None) is not None:
            self._host.supervisor.notify("plugin.discard", token=token)


def _shown(plugin: Plugin) -> dict[str, Any]:
    return {key: value for key, value in plugin.raw.items() if key not in ("manifest", "effective")}


def _read_all(answer: Message) -> bytes:
    if not answer.fds:
        raise IsolatorError("plugin add", "the supervisor sent no manifest", "this is a bug; please report it")
    data = b""
    while len(data) <= _MANIFEST_LIMIT:
        chunk = os.pread(answer.fds[0], _MANIFEST_LIMIT + 1 - len(data), len(data))
        if not chunk:
            break
        data += chunk
    return data
