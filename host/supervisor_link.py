"""Requests of the host to the supervisor: one method per op (docs/internals.md, "S ↔ H")."""

from __future__ import annotations

from typing import Any

from isolator.ipc.channel import Channel, Message

SUPERVISOR_TIMEOUT = 120.0
MAX_EXCHANGE = 240.0
"""Seconds for one version to be stopped, another to be watched, and the first to come back."""
_STATUS_TIMEOUT = 5.0

Fields = dict[str, Any]


class SupervisorLink:
    """The supervisor, as plugins and their runs are changed through it.

    Methods return the fields of the answer. Each raises the error that the supervisor raised, and UnavailableError when
    it is away or does not answer in time.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def ensure_run(self, name: str, reason: str) -> Fields:
        """Start a plugin unless it runs, and wait until it does: ``run``, ``pid``."""
        return await self._ask("run.ensure", name=name, reason=reason)

    async def stop_run(self, name: str, reason: str) -> Fields:
        """Stop a plugin."""
        return await self._ask("run.stop", name=name, reason=reason)

    async def restart_run(self, name: str, reason: str) -> Fields:
        """Stop a plugin and start it again: ``run``, ``pid``."""
        return await self._ask("run.restart", name=name, reason=reason)

    async def stage(self, fields: Fields) -> Message:
        """Stage a plugin: ``token``, ``name``, ``digest``, ``proposal``, ...; its manifest comes as a descriptor."""
        return await self._channel.call("plugin.stage", timeout=SUPERVISOR_TIMEOUT, **fields)

    def discard(self, token: str) -> None:
        """Forget a staged plugin."""
        self._channel.notify("plugin.discard", token=token)

    async def commit(self, token: str, by: str) -> Fields:
        """Register a staged plugin: ``plugin``."""
        return await self._ask("plugin.commit", token=token, by=by)

    async def update(self, token: str, by: str, *, approve: bool) -> Fields:
        """Exchange the version in use for a staged one: ``plugin``; ``unchanged``, or ``pending``, ``differences``."""
        return await self._ask("plugin.update", timeout=MAX_EXCHANGE, token=token, by=by, approve=approve)

    async def approve(self, name: str, by: str, digest: str | None) -> Fields:
        """Take a pending version into use: ``plugin``."""
        shown = {"digest": digest} if digest is not None else {}
        return await self._ask("plugin.approve", timeout=MAX_EXCHANGE, name=name, by=by, **shown)

    async def roll_back(self, name: str, by: str) -> Fields:
        """Take the version before into use: ``plugin``."""
        return await self._ask("plugin.rollback", timeout=MAX_EXCHANGE, name=name, by=by)

    async def enable(self, name: str) -> Fields:
        """Let a plugin run again: ``plugin``."""
        return await self._ask("plugin.enable", timeout=MAX_EXCHANGE, name=name)

    async def disable(self, name: str) -> Fields:
        """Stop a plugin and keep it stopped: ``plugin``."""
        return await self._ask("plugin.disable", timeout=MAX_EXCHANGE, name=name)

    async def remove(self, name: str, by: str) -> Fields:
        """Remove a plugin."""
        return await self._ask("plugin.remove", name=name, by=by)

    async def entries(self) -> list[Fields]:
        """Every plugin with live figures, without ``manifest`` and ``effective``."""
        return list((await self._ask("plugin.status", timeout=_STATUS_TIMEOUT)).get("plugins", ()))

    async def explain(self, name: str) -> Fields:
        """Explain a plugin's policy: ``proposal``."""
        return await self._ask("policy.explain", name=name)

    async def ledger(self) -> Fields:
        """List this host's controls: ``ledger``."""
        return await self._ask("ledger")

    async def _ask(self, op: str, *, timeout: float = SUPERVISOR_TIMEOUT, **fields: Any) -> Fields:
        return (await self._channel.call(op, timeout=timeout, **fields)).fields
