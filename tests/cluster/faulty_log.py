"""A log in memory whose network loses, delays and repeats what is sent, and clocks of hosts that stop."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from host.cluster.log import LogUnavailableError
from tests.cluster.log_in_memory import MemoryLog, Servers
from tests.cluster.stepped_clock import SteppedClock, View, _Call

LATEST = 30.0
"""Seconds after which a message that is late arrives at the latest."""


@dataclass
class Faults:
    """How likely what is, each time a host writes."""

    lost: float = 0.0
    unacknowledged: float = 0.0
    late: float = 0.0
    doubled: float = 0.0


class StoppableView(View):
    """The clock of a host that may be stopped: what is due meanwhile comes when it goes on."""

    def __init__(self, clock: SteppedClock, offset: float) -> None:
        super().__init__(clock, offset)
        self.stopped_until = 0.0

    @property
    def is_stopped(self) -> bool:
        return self.stopped_until > self._clock.time

    def call_later(self, seconds: float, callback: Callable[[], object]) -> _Call:
        def due() -> None:
            if self.is_stopped:
                self._clock.call_later(self.stopped_until - self._clock.time, lambda: call.callback and due())
            else:
                callback()

        call = super().call_later(seconds, due)
        return call


class FaultyLog(MemoryLog):
    """The log as one host reaches it, over a bad network."""

    def __init__(
        self, servers: Servers, clock: StoppableView, faults: tuple[Faults, ...], chance: random.Random
    ) -> None:
        super().__init__(servers, clock)
        self._faults, self._chance = faults, chance

    async def append(self, subject: str, body: bytes) -> None:
        await self.clock.sleep(0.005)
        await self._reach()
        if self._happens("lost"):
            await self._no_answer()
        if self._happens("late"):
            self._later(subject, body)
            await self._no_answer()
        await super().append(subject, body)
        if self._happens("doubled"):
            self._later(subject, body)
        if self._happens("unacknowledged"):
            raise LogUnavailableError("no answer")

    def _happens(self, fault: str) -> bool:
        return self._chance.random() < max(getattr(faults, fault) for faults in self._faults)

    def _later(self, subject: str, body: bytes) -> None:
        seconds = self._chance.uniform(0, LATEST)
        self.servers.clock.call_later(seconds, lambda: self.servers.put(subject, body))
