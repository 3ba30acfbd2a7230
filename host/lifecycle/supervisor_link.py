"""Requests of the host to the supervisor: one method per op (docs/internals.md, "H → S")."""

from __future__ import annotations

from isolator.ipc import messages
from isolator.ipc.body import R, Request, WithFds
from isolator.ipc.channel import Channel

SUPERVISOR_TIMEOUT = 120.0
_EXCHANGE_TIMEOUT = 220.0
"""Seconds for one version to be stopped and another to take its place, besides the starts of both."""
_STATUS_TIMEOUT = 5.0


class SupervisorLink:
    """The supervisor, as plugins and their runs are changed through it; ``start_timeout``: the host's ceiling.

    Each method raises the error that the supervisor raised, and UnavailableError when it is away or does not answer in
    time.
    """

    def __init__(self, channel: Channel, start_timeout: float) -> None:
        self._channel = channel
        self.exchange_timeout = _EXCHANGE_TIMEOUT + 2 * start_timeout
        """Seconds for one version to be stopped, another to be watched, and the first to come back."""

    async def ensure_run(self, name: str, reason: str) -> messages.Running:
        """Start a plugin unless it runs, and wait until it does."""
        return await self._ask(messages.EnsureRun(name=name, reason=reason))

    async def stop_run(self, name: str, reason: str) -> None:
        """Stop a plugin."""
        await self._ask(messages.StopRun(name=name, reason=reason))

    async def restart_run(self, name: str, reason: str) -> messages.Running:
        """Stop a plugin and start it again."""
        return await self._ask(messages.RestartRun(name=name, reason=reason))

    async def stage(self, request: messages.StagePlugin) -> WithFds[messages.Staged]:
        """Stage a plugin; its manifest comes as a descriptor, which is the caller's."""
        return await self._channel.ask_fds(request, timeout=SUPERVISOR_TIMEOUT)

    def discard(self, token: str) -> None:
        """Forget a staged plugin."""
        self._channel.tell(messages.DiscardPlugin(token=token))

    async def commit(self, token: str, ticket: str | None) -> messages.OnePlugin:
        """Register a staged plugin."""
        return await self._ask(messages.CommitPlugin(token=token, ticket=ticket))

    async def update(self, token: str, ticket: str | None, *, approve: bool) -> messages.UpdatedPlugin:
        """Exchange the version in use for a staged one."""
        request = messages.UpdatePlugin(token=token, ticket=ticket, approve=approve)
        return await self._ask(request, timeout=self.exchange_timeout)

    async def approve(self, name: str, ticket: str | None, digest: str | None) -> messages.OnePlugin:
        """Take a pending version into use."""
        return await self._ask(
            messages.ApprovePlugin(name=name, ticket=ticket, digest=digest), timeout=self.exchange_timeout
        )

    async def reject(self, name: str, ticket: str | None) -> messages.OnePlugin:
        """Refuse a pending version."""
        return await self._ask(messages.RejectPlugin(name=name, ticket=ticket))

    async def roll_back(self, name: str, ticket: str | None, to: str | None) -> messages.OnePlugin:
        """Take the version before into use."""
        return await self._ask(messages.RollBackPlugin(name=name, ticket=ticket, to=to), timeout=self.exchange_timeout)

    async def enable(self, name: str, ticket: str | None = None) -> messages.OnePlugin:
        """Let a plugin run again; one that is disabled takes a ticket."""
        return await self._ask(messages.EnablePlugin(name=name, ticket=ticket), timeout=self.exchange_timeout)

    async def disable(self, name: str) -> messages.OnePlugin:
        """Stop a plugin and keep it stopped."""
        return await self._ask(messages.DisablePlugin(name=name), timeout=self.exchange_timeout)

    async def remove(self, name: str, ticket: str | None) -> None:
        """Remove a plugin."""
        await self._ask(messages.RemovePlugin(name=name, ticket=ticket))

    async def entries(self) -> tuple[messages.PluginEntry, ...]:
        """Every plugin with live figures, without ``manifest`` and ``effective``."""
        return (await self._ask(messages.ListPlugins(), timeout=_STATUS_TIMEOUT)).plugins

    async def explain(self, name: str) -> messages.Proposal:
        """Explain a plugin's policy."""
        return await self._ask(messages.ExplainPolicy(name=name))

    async def services(self) -> messages.Services:
        """List the daemon's processes."""
        return await self._ask(messages.ListServices(), timeout=_STATUS_TIMEOUT)

    async def ledger(self) -> messages.Ledger:
        """List this host's controls."""
        return await self._ask(messages.GetLedger())

    async def reload(self) -> messages.Reloading:
        """Have the daemon reloaded."""
        return await self._ask(messages.ReloadDaemon())

    async def generation(self) -> messages.Generation:
        """The supervisor's version, and how often it was reloaded."""
        return await self._ask(messages.GetGeneration())

    async def outdated(self) -> messages.OutdatedServices:
        """The services that the last reload has not exchanged, or not yet."""
        return await self._ask(messages.ListOutdated())

    async def _ask(self, request: Request[R], *, timeout: float = SUPERVISOR_TIMEOUT) -> R:
        return await self._channel.ask(request, timeout=timeout)
