"""Requests of the host to the supervisor (docs/internals.md, "H → S"), each with its time."""

from __future__ import annotations

from isolator.ipc import messages
from isolator.ipc.body import R, Request, WithFds
from isolator.ipc.channel import Channel

_TIMEOUT = 120.0
_EXCHANGE_TIMEOUT = 220.0
"""Seconds for one version to be stopped and another to take its place, besides the starts of both."""
_EXCHANGES = {
    messages.UpdatePlugin, messages.ApprovePlugin, messages.RollBackPlugin, messages.EnablePlugin,
    messages.DisablePlugin,
}  # fmt: skip
_STATUS_TIMEOUT = 5.0
_STATUS = {messages.ListPlugins, messages.ListServices}


class SupervisorLink:
    """The supervisor, as plugins and their runs are changed through it; ``start_timeout``: the host's ceiling.

    ``ask`` and ``stage`` raise the error that the supervisor raised, and UnavailableError when it is away or does not
    answer in time.
    """

    def __init__(self, channel: Channel, start_timeout: float) -> None:
        self._channel = channel
        self.exchange_timeout = _EXCHANGE_TIMEOUT + 2 * start_timeout
        """Seconds for one version to be stopped, another to be watched, and the first to come back."""

    async def ask(self, request: Request[R]) -> R:
        """Send a request, and wait for the reply as long as it may take."""
        kind = type(request)
        timeout = self.exchange_timeout if kind in _EXCHANGES else _STATUS_TIMEOUT if kind in _STATUS else _TIMEOUT
        return await self._channel.ask(request, timeout=timeout)

    async def stage(self, request: messages.StagePlugin) -> WithFds[messages.Staged]:
        """Stage a plugin; its manifest comes as a descriptor, which is the caller's."""
        return await self._channel.ask_fds(request, timeout=_TIMEOUT)

    def discard(self, token: str) -> None:
        """Forget a staged plugin."""
        self._channel.tell(messages.DiscardPlugin(token=token))
