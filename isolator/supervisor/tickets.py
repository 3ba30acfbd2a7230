"""Tickets: the kernel's word for who asks, and what the caller hands over, past the host process.

The host process tells the supervisor what is wanted, and may have been taken over. So whoever wants a change connects
to a socket of the supervisor's own as well, over which no byte is parsed: the kernel names the caller, the answer is a
ticket, and the request that goes to the host process names it. What the caller has sent along stays in the connection
until the ticket is used: descriptors, which a collector with the caller's rights takes out, or the *purpose* of the
ticket, 32 bytes that are compared with those of the request. So a ticket that was stolen does what its caller wanted,
or nothing.

Nobody can connect but root and the uids with the role ``operator``; a ticket is used once, and soon.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import socket
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from isolator.errors import DeniedError, IsolatorError, UnavailableError
from isolator.ipc.accept_loop import AcceptLoop
from isolator.linux.peer import allow_only, peer_ids
from isolator.policy.host import HostConfig
from isolator.registration.collecting import Offer, close_apart
from isolator.supervisor.listener import listen

if TYPE_CHECKING:
    from isolator.ipc.handover import TicketsState

logger = logging.getLogger(__name__)

SECONDS = 60.0
"""Life of a ticket."""
SHARE = 32
"""Most tickets of one uid at a time."""
MOST = 4 * SHARE
"""Most tickets of all uids but root's."""
_BACKLOG = 128
TICKETS = "use the command line, or the isolator_client of this release (docs/embedding.md, Tickets)"
"""Remedy for requests without a ticket of their own."""


def purpose(verb: str, *words: str) -> bytes:
    """The purpose of a ticket as its caller sends it: the SHA-256 of the verb and its words, with NUL between them."""
    return hashlib.sha256("\0".join((verb, *words)).encode("utf-8", "surrogatepass")).digest()


@dataclass(eq=False)
class Ticket:
    """One caller's connection; ``close`` ends it."""

    uid: int
    connection: socket.socket

    def close(self) -> None:
        """Drop what was handed over."""
        close_apart(self.connection)


class Tickets:
    """The tickets of one daemon. Nothing listens before ``start``."""

    def __init__(self, path: Path, config: HostConfig) -> None:
        self._path, self._config = path, config
        self._open: dict[str, Ticket] = {}
        self._of_uid: Counter[int] = Counter()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._accept: AcceptLoop | None = None
        self._listener = -1

    def start(self) -> None:
        """Listen; only for root if the file system of the socket has no access lists."""
        listener = listen(self._path, mode=0o600, owner=0, backlog=_BACKLOG)
        try:
            allow_only(self._path, self._config.roles.operator)
        except OSError as error:
            logger.error("%s: only root can add and change plugins: %s", self._path, error.strerror)
        self._listen(listener)

    def _listen(self, listener: socket.socket) -> None:
        self._listener = listener.fileno()
        self._accept = AcceptLoop(listener, lambda connection, _: self._accepted(connection))

    def hand_over(self) -> TicketsState:
        """The state before an exec: callers notice nothing of it."""
        from isolator.ipc.handover import TicketsState, TicketState

        return TicketsState(
            listener=self._listener,
            open=tuple(
                TicketState(
                    token=token, uid=ticket.uid, connection=ticket.connection.fileno(), until=self._timers[token].when()
                )
                for token, ticket in self._open.items()
            ),
        )

    def adopt(self, before: TicketsState) -> None:
        """Go on from the state before this process's exec, in place of ``start``."""
        for one in before.open:
            with contextlib.suppress(OSError):  # of that caller alone
                self._keep(one.token, Ticket(one.uid, socket.socket(fileno=one.connection)), one.until)
        try:
            listener = socket.socket(fileno=before.listener)
        except OSError as error:
            logger.error("%s: listens anew: %s", self._path, error.strerror)
            self.start()
        else:
            self._listen(listener)

    def close(self) -> None:
        """Stop listening and drop every ticket."""
        if self._accept is not None:
            self._accept.close()
        for token in list(self._open):
            self._expire(token)
        self._path.unlink(missing_ok=True)

    def take(self, token: str) -> Ticket:
        """Use a ticket up; the caller closes it. Raises DeniedError when there is none."""
        timer = self._timers.pop(token, None)
        if timer is None:
            raise DeniedError("ticket", "is unknown, was used or has expired", "run the command again")
        timer.cancel()
        return self._forget(token)

    def offer(self, token: str) -> Offer:
        """Use a ticket up for what was handed over with it."""
        ticket = self.take(token)
        try:
            return Offer.of_peer(ticket.connection)
        except BaseException:
            ticket.close()
            raise

    def who(self, token: str | None, subject: str, *purposes: bytes) -> str:
        """Use a ticket up that was fetched for one of these purposes; returns its caller's name in the trail.

        Raises DeniedError, about ``subject``, without a ticket, or for one with another purpose.
        """
        if not token:
            raise DeniedError(subject, "nobody agrees to it with a ticket", TICKETS)
        with contextlib.closing(self.take(token)) as ticket:
            wanted = b""
            with contextlib.suppress(BlockingIOError):
                wanted = ticket.connection.recv(len(purposes[0]), socket.MSG_DONTWAIT)
            import hmac  # brings OpenSSL along

            if not any(hmac.compare_digest(wanted, purpose) for purpose in purposes):
                raise DeniedError(subject, "the ticket was fetched for something else", TICKETS)
            return by_uid(ticket.uid)

    def _accepted(self, connection: socket.socket) -> None:
        _, uid, _ = peer_ids(connection)
        token, ticket = os.urandom(16).hex(), Ticket(uid, connection)
        try:
            self._check(uid)
        except IsolatorError as error:
            _send(connection, {"error": error.to_json()})
            ticket.close()
            return
        self._keep(token, ticket)
        _send(connection, {"ticket": token})

    def _keep(self, token: str, ticket: Ticket, until: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        self._open[token] = ticket
        self._of_uid[ticket.uid] += 1
        self._timers[token] = loop.call_at(loop.time() + SECONDS if until is None else until, self._expire, token)

    def _check(self, uid: int) -> None:
        if self._config.role_of(uid) != "operator":
            remedy = "add it to [roles] operator in host.toml, then 'isolator reload'; or use sudo"
            raise DeniedError("ticket", f"uid {uid} is no operator", remedy)
        others = len(self._open) - self._of_uid[0]
        if self._of_uid[uid] >= SHARE or (uid != 0 and others >= MOST):
            raise UnavailableError("ticket", "too many are open", "try again")

    def _expire(self, token: str) -> None:
        timer = self._timers.pop(token, None)
        if timer is not None:
            timer.cancel()
            self._forget(token).close()

    def _forget(self, token: str) -> Ticket:
        ticket = self._open.pop(token)
        self._of_uid[ticket.uid] -= 1
        if not self._of_uid[ticket.uid]:
            del self._of_uid[ticket.uid]
        return ticket


def by_uid(uid: int) -> str:
    """A caller's name in the trail."""
    return f"uid:{uid}"


def _send(connection: socket.socket, answer: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # a fresh connection has room for it, unless the caller has left
        connection.send(json.dumps(answer).encode() + b"\n")
        connection.shutdown(socket.SHUT_WR)
