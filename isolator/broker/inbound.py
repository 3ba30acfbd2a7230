"""Connections that come in: a host port, granted by ``listen``, forwarded to a port on the cage's loopback.

The supervisor binds the host's listeners and hands them over with the cage's own sockets. What the broker connects
with on the other side is made inside the cage's network, which it cannot enter: it asks the supervisor for a few
sockets at a time (``cage.sockets``) and connects them itself. So nothing is routed into a cage, and the listener is
gone with the broker or the run: while the plugin does not run, its port refuses.

What the far end sends is only carried, never looked at. The plugin sees connections from its own loopback.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv6Address

from isolator.broker.flow import Flow
from isolator.broker.rate import Write
from isolator.broker.relay import Scratch, reset
from isolator.errors import IsolatorError
from isolator.policy.addresses import parse_address
from isolator.policy.model import ListenRule
from isolator.policy.names import format_listen

BATCH = 8
"""Sockets asked for at a time; asked again when half are used."""
CONNECT = 5.0
"""Seconds that the plugin's listener may take to accept; a full backlog is what takes long."""

Fetch = Callable[[int, int], Awaitable[list[socket.socket]]]
"""Called with a count and an IP version: unconnected sockets of the cage's network; raises IsolatorError."""


class Inbound:
    """The listeners of one run. Owns them; ``close`` ends them and everything that came in by them."""

    def __init__(
        self,
        listeners: Sequence[tuple[socket.socket, ListenRule]],
        fetch: Fetch,
        write: Write,
        scratch: Scratch,
        *,
        limit: int,
        refusal: Callable[[], str | None],
    ) -> None:
        self.flows: dict[asyncio.Task[None], Flow] = {}
        self._listeners = list(listeners)
        self._fetch, self._write, self._scratch = fetch, write, scratch
        self._limit, self._refusal = limit, refusal
        self._loop = asyncio.get_running_loop()
        self._stock: deque[socket.socket] = deque()
        self._filling: asyncio.Task[None] | None = None
        for listener, rule in self._listeners:
            listener.setblocking(False)
            self._loop.add_reader(listener, self._accept, listener, rule)

    async def close(self) -> None:
        """Close the listeners and end every connection; all records are handed over when it returns."""
        for listener, _ in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.gather(self._filling, return_exceptions=True)
        for task, flow in list(self.flows.items()):
            flow.reason = "cage ended"
            task.cancel()
        await asyncio.gather(*self.flows, return_exceptions=True)
        while self._stock:
            self._stock.popleft().close()

    def _accept(self, listener: socket.socket, rule: ListenRule) -> None:
        for _ in range(64):
            try:
                client, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}:
                    # The listener stays readable: wait for descriptors instead of spinning.
                    self._loop.remove_reader(listener)
                    self._loop.call_later(0.2, self._resume, listener, rule)
                    return
                continue
            client.setblocking(False)
            address = parse_address(str(peer[0]).partition("%")[0]) or IPv4Address(0)
            flow = Flow(client, address, rule.port, self._loop.time(), inward=rule.cage_port)
            flow.rule = f"listen {format_listen(rule)}"
            refused = "too-many-open" if self._full() else self._refusal()
            if refused is not None:
                self._write(flow.denied(refused))
                reset(client)
                continue
            task = self._loop.create_task(self._carry(flow))
            self.flows[task] = flow
            task.add_done_callback(self._ended)

    def _full(self) -> bool:
        return len(self.flows) >= self._limit

    def _resume(self, listener: socket.socket, rule: ListenRule) -> None:
        if any(listener is one for one, _ in self._listeners):
            self._loop.add_reader(listener, self._accept, listener, rule)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.flows.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            self._loop.call_exception_handler({"message": "a forwarded flow failed", "exception": task.exception()})

    async def _carry(self, flow: Flow) -> None:
        orderly = False
        try:
            flow.server = await self._connect(flow)
            flow.recorded = True
            self._write(flow.opened(), happened_ns=flow.began)
            for sock in (flow.client, flow.server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for pipe in flow.join(self._scratch):
                pipe.start()
            orderly = await flow.relay()
        except OSError as error:
            flow.failed(error)
            self._write(flow.unreachable())
        finally:
            for pipe in flow.pipes:
                pipe.stop()
            for ended in (flow.client, flow.server):
                if ended is not None:
                    ended.close() if orderly else reset(ended)
            if flow.recorded:
                self._write(flow.closed(self._loop.time()))

    async def _connect(self, flow: Flow) -> socket.socket:
        """A connection to the cage's port, on 127.0.0.1 or, where only that answers, ::1; raises OSError."""
        assert flow.inward is not None
        try:
            return await self._dial(await self._take(), str(IPv4Address("127.0.0.1")), flow.inward)
        except ConnectionRefusedError as refused:
            try:
                (sock,) = await self._ask(1, 6)
            except OSError:
                raise refused from None
            return await self._dial(sock, str(IPv6Address("::1")), flow.inward)

    async def _dial(self, sock: socket.socket, address: str, port: int) -> socket.socket:
        try:
            sock.setblocking(False)
            async with asyncio.timeout(CONNECT):
                await self._loop.sock_connect(sock, (address, port))
        except TimeoutError as late:
            sock.close()
            raise OSError(errno.ETIMEDOUT, "the plugin does not accept") from late
        except BaseException:  # cancelled too: the socket has no other owner yet
            sock.close()
            raise
        return sock

    async def _take(self) -> socket.socket:
        while not self._stock:
            await asyncio.shield(self._fill())
        if len(self._stock) <= BATCH // 2:
            self._fill()
        return self._stock.popleft()

    def _fill(self) -> asyncio.Task[None]:
        if self._filling is None or self._filling.done():
            self._filling = self._loop.create_task(self._refill())
            # Whoever waits for it sees the error; one that was started ahead may fail unseen, the next tells.
            self._filling.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._filling

    async def _refill(self) -> None:
        self._stock.extend(await self._ask(BATCH, 4))

    async def _ask(self, count: int, version: int) -> list[socket.socket]:
        try:
            return await self._fetch(count, version)
        except IsolatorError as error:
            raise OSError(errno.ENETUNREACH, str(error)) from error
