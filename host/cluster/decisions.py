"""Decisions of this host on their way into the log: numbered within a session, sent again until they are read back.

Each message ends with a beat. One is in flight at a time, so that nothing that is sent later can stand before it, and
its bytes stay the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from host.cluster.entries import MAX_MESSAGE, Entry, Message, Number, encode, subject
from host.cluster.fold import Applied
from host.cluster.lease import BEAT, HOLD, Fence
from host.cluster.log import LogUnavailableError

if TYPE_CHECKING:
    from host.cluster.parts import Parts

AGAIN: Final = 1.0
"""Seconds after which what was not read back is sent again."""
SOON: Final = 0.2
"""Seconds that a change may wait for others."""
FILL: Final = MAX_MESSAGE // 2
"""Bytes of the decisions in one message; the beat has the rest."""


class Decisions:
    """Entries that this host writes to its ``ctl``. ``rest``: the claims of the moment, and the beat, the last.

    ``due``: the first time after another at which there may be more to claim.
    """

    def __init__(
        self, parts: Parts, fence: Fence, rest: Callable[[], Sequence[Entry]], due: Callable[[float], float]
    ) -> None:
        self._host, self._log, self._clock, self._troubles = parts.host, parts.log, parts.clock, parts.troubles
        self._fence, self._rest, self._due = fence, rest, due
        self.session = 0
        """The session of this life; 0 before it has begun."""
        self._number = 0
        self._flying: dict[Number, Entry] = {}
        self._waiting: deque[tuple[Entry, int, asyncio.Future[Applied]]] = deque()
        self._futures: dict[Number, asyncio.Future[Applied]] = {}
        self._work, self._back, self._urgent = asyncio.Event(), asyncio.Event(), False

    async def write(self, entry: Entry) -> Applied:
        """The fate of a decision; raises LogUnavailableError after ``HOLD`` seconds, ValueError for one too large."""
        size = len(encode(Message(self._host, "ctl", Number(self.session, 1), (entry,))))
        if size > FILL:
            raise ValueError(f"a decision of {size} bytes is too large for the cluster, which takes {FILL}")
        future: asyncio.Future[Applied] = asyncio.get_running_loop().create_future()
        self._waiting.append((entry, size, future))
        self._urgent = True
        self._work.set()
        try:
            async with self._clock.limit(HOLD):
                return await future
        except TimeoutError:
            raise LogUnavailableError("the cluster's log did not take the decision in time") from None

    def is_flying(self, entry: Entry) -> bool:
        """Whether a decision was sent and may count yet."""
        return entry in self._flying.values()

    def changed(self) -> None:
        """Have a beat sent soon."""
        self._work.set()

    def begin(self, session: int) -> None:
        """Begin a session; ``run`` may be called now."""
        self.session, self._number = session, 0

    def applied(self, one: Applied) -> bool:
        """Take an entry of this session as it was read back; False if this host did not send it."""
        number = Number(one.ref.series, one.ref.number)
        if self._flying.get(number) != one.entry:
            return False
        del self._flying[number]
        future = self._futures.pop(number, None)
        if future is not None and not future.done():
            future.set_result(one)
        if not self._flying:
            self._back.set()
        return True

    def end(self, why: str) -> None:
        """Decide nothing more in this session; those who wait get LogUnavailableError."""
        for future in [*self._futures.values(), *(future for *_, future in self._waiting)]:
            if not future.done():
                future.set_exception(LogUnavailableError(why))
        self._futures.clear()
        self._waiting.clear()
        self._flying.clear()
        self.session = 0

    async def run(self) -> None:
        """Write until it is cancelled: at once what somebody waits for, soon what has changed, else a beat in time."""
        clock, sent = self._clock, -BEAT
        while True:
            until = min(sent + BEAT, self._due(sent))
            while not self._urgent and (left := until - clock.now()) > 0:
                if await clock.event(self._work, left):
                    until = min(until, max(clock.now(), sent) + SOON)
            self._work.clear()
            sent = clock.now()
            await self._send()

    async def _send(self) -> None:
        entries: list[Entry] = []
        futures, size = [], 0
        while self._waiting and size + self._waiting[0][1] <= FILL:
            entry, its_size, future = self._waiting.popleft()
            if not future.done():
                entries.append(entry)
                futures.append(future)
                size += its_size
        self._urgent = bool(self._waiting)
        entries += self._rest()
        message = Message(self._host, "ctl", Number(self.session, self._number + 1), tuple(entries))
        numbers = [Number(self.session, self._number + 1 + offset) for offset in range(len(entries))]
        self._flying = dict(zip(numbers, entries, strict=True))
        self._futures = dict(zip(numbers, futures, strict=False))
        self._number += len(entries)
        body = encode(message)
        self._back.clear()
        self._fence.sending(numbers[-1], self._clock.now())
        while self._flying:
            try:
                await self._log.append(subject(self._host, "ctl"), body)
                self._troubles.writes(None)
            except LogUnavailableError as error:
                self._troubles.writes(error)
            if self._flying:
                await self._clock.event(self._back, AGAIN)
