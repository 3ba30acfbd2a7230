"""The link to a cage that is being built: what its process says, and why it could not become one.

A parked process, the cage that it clones, and the cage's pid 1 until its exec have the same link, one after the other.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from isolator.cage.warm_pool import not_parked
from isolator.errors import ConfinementError, ExecError
from isolator.ipc.packet import TruncatedPacketError, receive_packet
from isolator.launcher.client import HOSTS_DOING, clone_remedy, exec_remedy
from isolator.linux.descriptors import close_all
from isolator.linux.readable import readable

if TYPE_CHECKING:
    import socket

_GOES_ON = ("viewed", "caged")
"""Steps whose report is no failure."""


class Link:
    """This end of the link, ``sock``, which stays the caller's, to the cage of ``name``."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._sock, self._name = sock, name
        self.lost = 0
        """Pid of a child whose pidfd found no room here, or 0."""

    async def receive(self) -> tuple[dict[str, Any], list[int]]:
        """Receive the next message; empty after exec (or death, which ``CageProcesses.wait`` tells apart)."""
        while True:
            try:
                return self._take()
            except BlockingIOError:
                await readable(self._sock.fileno())

    def told_failure(self) -> ConfinementError | None:
        """The failure that the process has told of, or that it has ended; None: it goes on."""
        with contextlib.suppress(BlockingIOError):
            while True:
                answer, fds = self._take()
                close_all(fds)
                if answer.get("step") not in _GOES_ON:
                    return self.failure(answer)
        return None

    def _take(self) -> tuple[dict[str, Any], list[int]]:
        try:
            packet, fds = receive_packet(self._sock)
        except TruncatedPacketError as error:
            self.lost = json.loads(error.payload or b"{}").get("pid", 0)
            raise
        return (json.loads(packet) if packet else {}), fds

    def failure(self, answer: dict[str, Any]) -> ConfinementError:
        """The error that a message tells of which is no step forward."""
        if not answer:
            return ConfinementError(f"cage of {self._name}", "it died while it was being built", "see the kernel log")
        step, detail = answer.get("step"), str(answer.get("detail"))
        if step == "clone3":
            number = answer.get("errno")
            remedy = clone_remedy(number if isinstance(number, int) else 0)
            return ConfinementError(f"clone of the cage of {self._name}", detail, remedy)
        if step == "exec" and answer.get("errno") in HOSTS_DOING:
            return ConfinementError(f"start of {self._name}", detail, "see the kernel log, and the plugin's caps")
        if step == "exec":
            return ExecError(f"start of {self._name}", detail, exec_remedy(answer.get("errno")))
        if step == "parked":
            return not_parked(detail)
        remedy = "see 'isolator check'"
        if step == "working directory":
            remedy = "only folders that the cage sees can be one: --read or --write shows it"
        return ConfinementError(f"cage of {self._name}", f"{step}: {detail}", remedy)
