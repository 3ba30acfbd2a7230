"""Modes of delivery beside one-shot and stream, which the worker knows itself.

A mode plugs in here: its class in ``_CLASSES``, its name in ``isolator.policy.request.MODES`` (the
supervisor starts some of them in ways of their own: ``Plugin.mode``). It is loaded and made for a plugin when its first
event comes, so one that no plugin has costs nothing. Many of a plugin's events may be on their
way at a time: ``deliver`` returns once an attempt has begun, and the attempt concludes by itself
(``Outcomes.conclude``).
"""

from __future__ import annotations

import importlib
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from host.delivery.outcome import Outcomes
from host.delivery.sidecar import SidecarLink
from host.events import Catalogue
from host.plugins.logs import Logs
from host.plugins.registry import Plugin
from host.plugins.secrets import ConfigStore
from host.queue.interface import Delivery
from isolator.base.structs import struct_class
from isolator.errors import IsolatorError
from isolator.ipc.body import Body
from isolator.ipc.channel import Channel
from isolator.ipc.messages import Environment, InvocationBegun, InvocationEnded
from isolator.ipc.succession import Departure, Descriptors

if TYPE_CHECKING:
    from host.mcp.servers import Servers

_CLASSES = {
    "exec": ("host.delivery.exec", "ExecDelivery"),
    "http": ("host.delivery.http", "HttpDelivery"),
    "mcp": ("host.delivery.mcp", "McpDelivery"),
}
"""Module and class by ``transport.mode``."""


@struct_class(frozen=True)
class Parts:
    """The parts of one plugin's delivery that a mode works with."""

    sidecar: SidecarLink
    outcomes: Outcomes
    catalogue: Catalogue
    supervisor: Channel
    redact: Callable[[str], str]
    logs: Logs
    source: str
    """The platform, as events name it where they have a source."""
    config: ConfigStore
    environment: Callable[[str], Environment | None]
    """The config of a plugin as a run gets it; None: it is too long to go along with another message."""
    serve_invocation: Callable[[str, str, socket.socket], None]
    """Answers the calls of an invocation (plugin, run) to the host API, which come by this listener."""
    end_invocation: Callable[[str, str], None]
    """Ends that."""
    servers: Callable[[], Servers]
    """The MCP servers, whose room is loaded with the first call."""


class Mode:
    """Delivers events to one plugin in one mode; what a subclass leaves out does nothing."""

    State: ClassVar[type[Body]]
    """The type of what ``pass_on`` returns."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    @property
    def busy(self) -> bool:
        """Whether a request is unanswered."""
        return False

    async def deliver(self, plugin: Plugin, hook: str, delivery: Delivery) -> None:
        """Begin an attempt, which concludes by itself; raises NotSentError or IsolatorError when none can begin."""
        raise NotImplementedError

    async def ping(self, plugin: Plugin, timeout: float) -> None:
        """See whether an idle sidecar answers; raises LostError, NotSentError, WireError or IsolatorError."""

    def run_ended(self, run: str) -> None:
        """Take note that a run is over."""

    def invocation_begun(self, begun: InvocationBegun, fds: list[int]) -> None:
        """Go on with an invocation for which another host has asked, if it is one of these; takes its descriptors."""

    def invocation_ended(self, ended: InvocationEnded) -> None:
        """Take note of how an invocation has ended."""

    def notify(self, method: str, params: Mapping[str, Any]) -> None:
        """Notify the sidecar, if it takes this notification."""

    async def shutdown(self, reason: str, seconds: float) -> None:
        """Have a drained sidecar finish within ``seconds``, before its SIGTERM; raises LostError, NotSentError."""

    def close(self) -> None:
        """Await no more replies; each attempt in flight has an unknown outcome at the next start."""

    # One host in the place of another

    def hold(self) -> None:
        """Begin and read nothing from now on."""

    @property
    def unsettled(self) -> bool:
        """Whether something is under way that cannot be handed on, and may soon be over."""
        return False

    @property
    def replied(self) -> bool:
        """Whether a reply is there that is not concluded yet; it will be in a turn of the event loop or two."""
        return False

    def pass_on(self, departure: Departure) -> Body | None:
        """Hand on every request that is in flight; returns a ``State``, or None when there is nothing to hand on."""
        return None

    @classmethod
    def in_flight(cls, state: Any) -> Sequence[int]:
        """The numbers of the events whose requests a ``State`` has."""
        return ()

    async def take_over(
        self, plugin: Plugin | None, deliveries: Mapping[int, Delivery], state: Any, descriptors: Descriptors
    ) -> None:
        """Go on with the requests of another host, which are of these deliveries, by event number."""


def check_mode(name: str) -> None:
    """Raise IsolatorError if a mode needs a package that is not installed."""
    if name in _CLASSES:
        mode_class(name)


def mode_class(name: str) -> type[Mode]:
    """The class of a mode, loaded when it is first needed."""
    module, kind = _CLASSES[name]
    try:
        found: type[Mode] = getattr(importlib.import_module(module), kind)
    except ImportError as error:
        remedy = f"install it, or all that this mode needs: isolator[{name}]"
        raise IsolatorError(f"the mode {name}", f"needs the Python package {error.name}", remedy) from None
    return found
