"""The host: everything that serves the platform, composed, and its half of the conversation with the supervisor.

Order at start: database (recovered before anything else), registry, secrets, queue, dispatch, control socket; the
answer to ``hello`` means that commands and events are accepted. The host owns no privilege and no process: when it
dies its supervisor starts another, the sidecars go on running, and what was accepted is still in the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

from host.control.follow import TrailStreams
from host.control.server import ControlServer
from host.control.verbs import MAX_EXCHANGE, Methods
from host.database import Store
from host.delivery.attempts import Attempts
from host.delivery.dispatch import Dispatcher
from host.delivery.health import Watches
from host.delivery.worker import Shared
from host.events import Catalogue, from_schema
from host.host_api import HostApi
from host.plugins.logs import Logs
from host.plugins.registry import Plugin, Registry, load_event_types
from host.plugins.secrets import ConfigStore
from host.queue.interface import DEFAULT_TTL, Accepted, Delivery, NewEvent
from host.queue.sqlite import Answer, SqliteQueue
from isolator.audit.client import AuditClient
from isolator.audit.schema import ConfigChanged, EventAccepted, EventDead, SecretInjected
from isolator.errors import IsolatorError, UsageError
from isolator.ipc.channel import Channel, Message
from isolator.paths import Paths
from isolator.policy.host import HostConfig, without_trail

AUDIT_AHEAD = 8000
"""Records not yet written beyond which accepting waits for the trail."""


QUEUE_BEAT = 2.0
"""Seconds between two looks at the queues' lengths for the metrics."""


class Host:
    """One running host process."""

    def __init__(self, channel: Channel, audit: AuditClient) -> None:
        self.supervisor = channel
        self.audit = audit
        self.catalogue = Catalogue()
        self._told_queues: dict[str, int] | None = None
        self.started = asyncio.Event()
        self._starts: set[asyncio.Task[None]] = set()
        for op, handler in {
            "hello": self._hello,
            "plugin.changed": self._plugin_changed,
            "run.environment": self._run_environment,
            "run.started": self._run_started,
            "run.stopping": self._run_stopping,
            "run.ended": self._run_ended,
            "run.last_words": self._run_last_words,
            "audit.source": self._audit_source,
        }.items():
            channel.handle(op, handler)

    def emit(
        self,
        name: str,
        payload: Mapping[str, Any],
        done: Answer,
        *,
        by: str | None = None,
        dedupe_key: str | None = None,
        ttl: float | None = None,
        trace: str | None = None,
    ) -> None:
        """Validate and accept one event; ``done(accepted, error)`` when it and its deliveries are safe."""
        checked = self.catalogue.validate(name, payload)
        subscribers = self.registry.subscribers(checked.type, checked.fields)
        subject = str(checked.fields.get(checked.type.order_by or "project_id", ""))
        lifetime = DEFAULT_TTL if ttl is None else ttl
        event = NewEvent(checked.type.name, checked.json, subject, dedupe_key, lifetime, trace, by)
        self.queue.submit(event, subscribers, done)

    async def room_in_the_trail(self) -> None:
        """Return once accepting more would not run too far ahead of the trail."""
        await self.audit.durable(within=AUDIT_AHEAD // 2, or_blocked=self._may_continue)

    def trail_is_far_behind(self) -> bool:
        """Whether accepting should wait for the trail."""
        if self._may_continue and self.audit.blocked is not None:
            return False
        return self.audit.sent - self.audit.acked > AUDIT_AHEAD

    def alarms(self) -> list[str]:
        """What keeps the daemon from its work until a person mends it, one line each."""
        found = []
        if self.audit.blocked is not None:
            found.append(f"{self.audit.blocked}; {without_trail(self.settings.audit.disk_full)}")
        if self.store.blocked is not None:
            found.append(f"the database cannot be written: {self.store.blocked}; nothing is accepted or dispatched")
        return found

    async def removed(self, name: str) -> None:
        """Forget a removed plugin wholly; safe to repeat."""
        await self.watches.forget(name)
        await self.dispatcher.plugin_removed(name)
        self.api.forget(name)
        dropped = self.queue.unfinished(name)
        await self.queue.purge(name)
        await self.config.forget(name)
        await self.store.run(lambda db: db.execute("DELETE FROM kv WHERE plugin=?", (name,)))
        self.logs.remove(name)
        self.registry.remove(name)
        for event_id, attempts in dropped:
            self._record_dead(name, event_id, "the plugin was removed", attempts)
            if self.audit.unacknowledged > AUDIT_AHEAD:
                await self.audit.durable(within=AUDIT_AHEAD // 2, or_blocked=True)

    async def put(self, entry: Mapping[str, Any]) -> Plugin:
        """Take over one plugin entry of the supervisor."""
        plugin = self.registry.put(entry)
        if not entry.get("on_trial"):
            self.config.settle(plugin.name, plugin.digest)
        self.dispatcher.plugin_changed(plugin)
        await self.watches.update(plugin, self.dispatcher.workers[plugin.name])
        return plugin

    def start_if_eager(self, plugin: Plugin) -> None:
        """Start a plugin that does not wait for its first event, unless it runs or cannot; failures show with it."""
        manifest = plugin.manifest
        if manifest is None or manifest.activation.start != "eager" or plugin.state != "stopped":
            return
        if not self.config.missing(plugin.name, manifest, plugin.digest):
            task = asyncio.get_running_loop().create_task(self._start(plugin.name), name=f"start {plugin.name}")
            self._starts.add(task)
            task.add_done_callback(self._starts.discard)

    async def _start(self, name: str) -> None:
        with contextlib.suppress(IsolatorError):
            await self.supervisor.call("run.ensure", name=name, reason="eager")

    async def close(self) -> None:
        """Stop serving; what is accepted stays in the queue."""
        if not self.started.is_set():
            return
        self._queues.cancel()
        for task in self._starts:
            task.cancel()
        await self.control.close()
        self.trail.close()
        await self.watches.close()
        await self.dispatcher.close()
        await self.attempts.close()
        self.api.close()
        self.logs.close()
        await self.store.close()

    def _drop_unsettled(self) -> None:
        """Forget values of versions that failed while this process was not there to hear of it.

        Not at once: an update that an earlier process asked for may still be carried out.
        """
        for name, digest in self.config.unsettled():
            asyncio.get_running_loop().call_later(MAX_EXCHANGE, self._drop_if_unsettled, name, digest)

    def _drop_if_unsettled(self, name: str, digest: str) -> None:
        plugin = self.registry.get(name)
        if plugin is None or digest not in plugin.versions:
            self.config.drop_next(name, digest)

    # What the supervisor says

    async def _hello(self, message: Message) -> dict[str, Any]:
        if self.started.is_set():
            raise UsageError("hello", "was already said")
        self.paths = Paths.of(message.fields["root"])
        self.settings = HostConfig.model_validate(_as_object(message.fields.get("config")))
        for folder in (self.paths.host_lib, self.paths.plugin_log):
            if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                raise IsolatorError(str(folder), "is not a folder this process can write", "restart the daemon as root")
        database, key = self.paths.host_lib / "host.db", self.paths.host_lib / "key"
        lost = key.exists() and not database.exists()
        self.store = Store(database)
        self.config = ConfigStore(self.store, key)
        if lost:
            self._warn(f"{database} is gone, a new one was made: queued events, config and stored values are lost")
            self.audit.record(ConfigChanged(names=[], lost=True, why=f"{database} is gone"))
        if self.config.problem is not None:
            self._warn(self.config.problem)
        for name, schema, order_by, version in load_event_types(self.store):
            self.catalogue.register(from_schema(name, schema, order_by, version))
        self.registry = Registry(self.catalogue, self.store)
        self.queue = SqliteQueue(self.store)
        self.queue.on_accepted = self._record_accepted
        self.queue.on_expired = self._record_expired
        self.logs = Logs(self.paths.plugin_log, self.config.redactor)
        self.api = HostApi(self.registry, self.audit, self.store, self.logs)
        self.watches = Watches(self.registry, self.supervisor, self.audit)
        self._may_continue = self.settings.audit.disk_full == "continue"
        self.attempts = Attempts(self.queue, self.audit, wait_for_trail=not self._may_continue)
        self.queue.on_ready = self.attempts.soon
        self.dispatcher = Dispatcher(
            Shared(
                supervisor=self.supervisor,
                queue=self.queue,
                attempts=self.attempts,
                registry=self.registry,
                catalogue=self.catalogue,
                audit=self.audit,
                redactor=self.config.redactor,
                api=self.api.call,
                halt_without_audit=not self._may_continue,
            )
        )
        for entry in _plugins(message):
            await self.put(entry)
        self._drop_unsettled()
        self.methods = Methods(self)
        self.trail = TrailStreams(self.paths.audit_log, self.audit)
        verbs = {**self.methods.table(), **self.trail.table()}
        self.control = ControlServer(verbs, self.settings.role_of, self.audit.record)
        if message.fds:
            await self.control.start(socket.socket(fileno=message.fds.pop(0)))
        self._queues = asyncio.get_running_loop().create_task(self._tell_queues(), name="queue figures")
        self.started.set()
        if message.fields.get("fresh"):
            for plugin in self.registry:
                self.start_if_eager(plugin)
        return {}

    @staticmethod
    def _warn(what: str) -> None:
        print(f"isolator: {what}", file=sys.stderr, flush=True)

    async def _plugin_changed(self, message: Message) -> None:
        removed = message.fields.get("removed")
        if removed is not None:
            await self.removed(str(removed))
        else:
            await self.put(message.fields["plugin"])

    async def _run_environment(self, message: Message) -> dict[str, Any]:
        name = str(message.fields["name"])
        plugin = self.registry.get(name)
        environment = (
            self.config.environment(name, plugin.manifest, plugin.digest)
            if plugin is not None
            else self.config.environment(name, None)
        )
        if environment.secrets:
            self.audit.record(SecretInjected(names=list(environment.secrets)), plugin=name)
        return {"env": environment.env, "files": environment.files, "secrets": list(environment.secrets)}

    async def _run_started(self, message: Message) -> None:
        name, run = str(message.fields["name"]), str(message.fields["run"])
        if len(message.fds) >= 2:
            stdout, stderr = message.fds.pop(0), message.fds.pop(0)
            self.logs.attach(name, run, stdout, stderr)
        if message.fds:
            self.api.serve(name, run, socket.socket(fileno=message.fds.pop(0)))
        self.registry.note_run(name, run=run, pid=message.fields.get("pid"), state="running")
        self.dispatcher.run_started(name, run)

    async def _run_stopping(self, message: Message) -> dict[str, Any]:
        f = message.fields
        await self.dispatcher.take_leave(str(f["name"]), str(f["run"]), str(f.get("reason", "")))
        return {}

    async def _run_ended(self, message: Message) -> None:
        fields = message.fields
        name, run = str(fields["name"]), str(fields["run"])
        plugin = self.registry.get(name)
        if plugin is not None and plugin.run in (run, None):
            self.registry.note_run(name, run=None, pid=None, state=str(fields.get("state", "stopped")))
        self.dispatcher.run_ended(name, run, expected=bool(fields.get("expected")))

    async def _run_last_words(self, message: Message) -> dict[str, Any]:
        return {"stderr": await self.logs.last_words(str(message.fields["name"]), str(message.fields["run"]))}

    async def _audit_source(self, message: Message) -> None:
        if message.fds:
            self.audit.reconnect(socket.socket(fileno=message.fds.pop(0)))
            self._told_queues = None

    # What the trail and the metrics are told of the queue

    async def _tell_queues(self) -> None:
        while True:
            depths = self.queue.depths()
            if depths != self._told_queues:
                self.audit.gauges(queue=depths)
                self._told_queues = depths
            await asyncio.sleep(QUEUE_BEAT)

    def _record_accepted(self, asked: NewEvent, accepted: Accepted) -> None:
        event = accepted.event
        data = event.payload.encode()
        self.audit.record(
            EventAccepted(
                event=event.name,
                subject=event.subject,
                bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                plugins=list(accepted.plugins),
                by=asked.by,
            ),
            event_id=event.id,
        )
        for name in accepted.overflowed:
            self._record_dead(name, event.id, "queue_full", 0)

    def _record_expired(self, delivery: Delivery) -> None:
        event_id = delivery.event.id if delivery.event is not None else None
        self._record_dead(delivery.plugin, event_id, "expired", delivery.attempts)

    def _record_dead(self, plugin: str, event_id: str | None, reason: str, attempts: int) -> None:
        delivery_id = f"{event_id}.{plugin}" if event_id else None
        dead = EventDead(reason=reason, attempts=attempts)
        self.audit.record(dead, plugin=plugin, event_id=event_id, delivery_id=delivery_id)


def _plugins(message: Message) -> list[dict[str, Any]]:
    """The plugin entries of a ``hello``; many of them come as a file behind the listener."""
    entries = message.fields.get("plugins", ())
    if entries is None and len(message.fds) > 1:
        with os.fdopen(message.fds.pop(1), "rb") as file:
            file.seek(0)
            entries = json.load(file)
    return list(entries or ())


def _as_object(config: Any) -> dict[str, Any]:
    if isinstance(config, str):
        config = HostConfig.model_validate_json(config).model_dump()
    return dict(config or {})
