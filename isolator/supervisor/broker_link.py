"""The broker process, which gets the listeners of every cage that runs, and again whenever it is started again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from isolator.errors import IsolatorError, NotFoundError
from isolator.ipc.body import Handler, WithFds, by_op
from isolator.ipc.channel import Channel
from isolator.ipc.messages import AttachCage, BrokerHello, CageSockets, DetachCage, FencePlugin
from isolator.ipc.tasks import opened_in_thread
from isolator.layers.network import namespace as network_layer
from isolator.linux.descriptors import FdSet
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.policy.model import NetworkPolicy
from isolator.supervisor.service import ChildProcess

logger = logging.getLogger(__name__)

MAX_CONNECTORS = 16
"""Sockets of a cage's network that the broker gets at a time."""


@dataclass(frozen=True)
class _Attached:
    """Network of a run that the broker serves."""

    plugin: str
    network: network_layer.CageNetwork
    policy: NetworkPolicy
    terminate: Callable[[str], None]
    """End the run, for a reason: its network cannot be served any more."""


class BrokerLink:
    """The broker process and the runs whose networks it serves."""

    def __init__(self, process: ChildProcess, paths: Paths, config: HostConfig) -> None:
        self.process = process
        self._root, self._config = str(paths.root), config.model_dump(mode="json")
        self._attached: dict[str, _Attached] = {}
        self.deadlines: Callable[[], dict[str, float]] = dict
        """Returns those of plugins that are bound to one."""

    def handlers(self) -> dict[str, Handler]:
        """Requests of the broker."""
        return by_op(CageSockets.on(self._cage_sockets))

    def need(self) -> None:
        """Have a broker for the cages that come: without one nobody needs it, and it takes memory."""
        self.process.need()

    async def needed(self) -> Channel:
        """The broker's channel, once it is up; raises UnavailableError."""
        self.need()
        return await self.process.wait_up()

    async def hello(self, channel: Channel) -> None:
        """Say hello to a new broker."""
        await self.process.first_answer(self.succeed(channel, 0))

    async def succeed(self, channel: Channel, parts: int) -> None:
        """Say hello to a broker that takes the place of another, to which that many parts of its state have gone."""
        await channel.ask(BrokerHello(root=self._root, config=self._config, parts=parts, fences=self.deadlines()))

    def fence(self, plugin: str, until: float | None) -> None:
        """Have a plugin's bytes relayed until that time only; None: at any."""
        self.process.tell(FencePlugin(plugin=plugin, until=until))

    async def attach_again(self, channel: Channel) -> None:
        """Make the sockets of every running cage anew and hand them to a new broker."""
        for run, attached in list(self._attached.items()):
            try:
                sockets = await opened_in_thread(partial(network_layer.reopen, attached.network))
                await self._hand_over(channel, run, attached, sockets)
            except IsolatorError as error:
                if channel.closed.is_set():
                    raise
                if self._attached.get(run) is attached:
                    # A port was taken while the broker was away, or the cage is just ending: the others go on.
                    logger.error("plugin %s: %s", attached.plugin, error)
                    attached.terminate(str(error))
            if self._attached.get(run) is not attached:
                channel.tell(DetachCage(run=run))  # it has ended meanwhile, and the broker may have heard that first

    async def attach(
        self, run: str, plugin: str, network: network_layer.CageNetwork, policy: NetworkPolicy,
        terminate: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Hand a cage's sockets to the broker; ``terminate`` ends the run when a later broker cannot get them."""
        channel = await self.needed()
        attached = self._attached[run] = _Attached(plugin, network, policy, terminate)
        sockets, network.sockets = network.sockets, []
        try:
            await self._hand_over(channel, run, attached, sockets)
        except BaseException:
            self._attached.pop(run, None)
            channel.tell(DetachCage(run=run))  # it may have taken it over and only answered too late
            raise

    def adopt(
        self, run: str, plugin: str, network: network_layer.CageNetwork, policy: NetworkPolicy,
        terminate: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Know of a cage whose sockets the broker has since before this process's exec."""
        self._attached[run] = _Attached(plugin, network, policy, terminate)

    def forget(self, run: str) -> None:
        """Have the broker close what it has of a cage from before this process's exec that is ended."""
        self._attached.pop(run, None)
        self.process.tell(DetachCage(run=run))

    async def detach(self, run: str) -> None:
        """Let the broker close a cage's listeners and flows; harmless when it is not attached."""
        if self._attached.pop(run, None) is not None:
            channel = await self.process.present()
            if channel is not None:
                await channel.ask(DetachCage(run=run), timeout=10)

    async def _hand_over(self, channel: Channel, run: str, attached: _Attached, sockets: list[int]) -> None:
        """Give the broker a cage's sockets and the host's listeners for it; ours are closed, whatever happens.

        A kept copy would let connects hang, instead of being refused, when the broker dies.
        """
        with FdSet(sockets) as owned:
            listeners = [owned.add(fd) for fd in network_layer.host_listeners(attached.policy)]
            policy = attached.policy.model_dump(mode="json")
            request = AttachCage(run=run, plugin=attached.plugin, policy=policy)
            await channel.ask(request, fds=[*sockets, *listeners], timeout=10)

    async def _cage_sockets(self, request: CageSockets) -> WithFds[None]:
        """Sockets for connections that come in from outside; only for cages whose policy has any."""
        attached = self._attached.get(request.run)
        if attached is None or not attached.policy.listen:
            raise NotFoundError(request.op, "no such run, or nothing may be forwarded into it")
        count, version = min(max(request.count, 1), MAX_CONNECTORS), 6 if request.version == 6 else 4
        connectors = partial(network_layer.connectors, attached.network, count, version=version)
        return WithFds(None, await opened_in_thread(connectors))
