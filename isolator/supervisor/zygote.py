"""The supervisor's side of the zygote (isolator/zygote): start it, have it fork services, end it.

There is one while somebody starts a service, and all who do at that time share it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from isolator.errors import UnavailableError
from isolator.ipc.packet import pair, receive_packet, send_packet
from isolator.linux.child import Child, ended
from isolator.linux.readable import readable
from isolator.linux.unprivileged import module_command
from isolator.supervisor import alive

if TYPE_CHECKING:
    from isolator.supervisor.service import ServiceSpec

_MODULE = "isolator.zygote.service"
_ROOM = 256
"""Bytes that a service's command line has to fit in: it takes the place of the zygote's."""
_END_SECONDS = 5.0


class Zygote:
    """One zygote process."""

    def __init__(self) -> None:
        self.environment = _environment()
        mine, theirs = pair()
        command = module_command(_MODULE, {"socket": theirs.fileno()})
        self.process = subprocess.Popen(
            [*command, "." * _ROOM], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd="/",
            env=self.environment, start_new_session=True, umask=0o027,
        )  # fmt: skip
        theirs.close()
        self._sock = mine
        self._sock.setblocking(False)
        self._turn = asyncio.Lock()
        self._is_ready = False

    async def ready(self) -> None:
        """Return when it has imported everything; raises UnavailableError."""
        if not self._is_ready:
            self._is_ready = (await self._answer(alive.START_TICKS))["ready"]

    async def fork(self, spec: ServiceSpec, descriptors: Mapping[str, int]) -> Child:
        """A service's process, a child of this one; the descriptors stay the caller's. Raises UnavailableError.

        It goes as far forward on a contended processor as this process does.
        """
        order = {
            "module": spec.module, "uid": spec.uid, "gid": spec.gid, "descriptors": list(descriptors),
            "environment": self.environment, "nice": os.getpriority(os.PRIO_PROCESS, os.getpid()),
        }  # fmt: skip
        async with self._turn:
            try:
                send_packet(self._sock, json.dumps(order).encode(), list(descriptors.values()))
            except OSError as error:
                raise UnavailableError("zygote", f"takes no order: {error}", "see the daemon's log") from None
            return Child((await self._answer(alive.BUSY_TICKS))["pid"])

    async def end(self) -> None:
        """End it; one that hangs is killed after a moment."""
        self._sock.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await ended(self.process)
        self.process.kill()
        self.process.wait()

    async def _answer(self, ticks: int) -> dict[str, Any]:
        """Wait for an answer while it makes progress, else kill it: what comes late would be taken for the next one."""
        try:
            packet = await alive.answered(self._receive(), self.process.pid, "zygote", ticks=ticks)
        except BaseException:
            self.process.kill()
            raise
        answer: dict[str, Any] = json.loads(packet or b'{"problem": "it has ended"}')
        if "problem" in answer:
            raise UnavailableError("zygote", answer["problem"], "see the daemon's log")
        return answer

    async def _receive(self) -> bytes:
        while True:
            try:
                return receive_packet(self._sock)[0]
            except BlockingIOError:
                await readable(self._sock.fileno())
            except OSError as error:
                raise UnavailableError("zygote", f"does not answer: {error}", "see the daemon's log") from None


class Zygotes:
    """The zygote that there is, or none."""

    def __init__(self) -> None:
        self._zygote: Zygote | None = None
        self._users = 0
        self._starting = asyncio.Lock()

    def begin(self) -> None:
        """Begin to start one, for the first that needs it."""
        self._zygote = Zygote()

    @contextlib.asynccontextmanager
    async def ready(self) -> AsyncIterator[Zygote]:
        """A zygote that answers, which ends when the last who use it leave; raises UnavailableError."""
        self._users += 1
        try:
            async with self._starting:
                zygote = self._zygote = self._zygote or Zygote()
                await zygote.ready()
            yield zygote
        finally:
            self._users -= 1
            if not self._users and self._zygote is not None:
                zygote, self._zygote = self._zygote, None
                await zygote.end()


def _environment() -> dict[str, str]:
    """A service's environment; with it, its lines on standard error have priorities where the journal reads them."""
    journal = {key: value for key, value in os.environ.items() if key == "JOURNAL_STREAM"}
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **journal}
