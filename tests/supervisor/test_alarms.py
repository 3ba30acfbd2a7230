"""Alarms of the supervisor: until when each is shown."""

from __future__ import annotations

import asyncio

from isolator.supervisor.alarms import Alarms


def test_alarm_that_is_known_to_be_over_ends_at_once() -> None:
    async def run() -> None:
        told: list[tuple[str, ...]] = []
        alarms = Alarms(told.append)
        alarms.raise_("file", "is missing")
        alarms.settle("file", 0.0)
        assert alarms.lines == () and told == [("is missing",), ()]
        alarms.close()

    asyncio.run(run())


def test_alarm_of_before_an_exec_ends_at_once_when_it_is_known_to_be_over() -> None:
    async def run() -> None:
        alarms = Alarms()
        alarms.adopt({"file": "is missing", "other": "stands"})
        alarms.settle("file", 0.0)
        assert alarms.lines == ("stands",)
        alarms.close()

    asyncio.run(run())


def test_alarm_that_is_about_to_end_does_not_stay_longer() -> None:
    async def run() -> None:
        ended = asyncio.Event()
        alarms = Alarms(lambda lines: None if lines else ended.set())
        alarms.raise_("file", "is missing")
        alarms.settle("file", 0.001)
        alarms.settle("file", 3600.0)
        await ended.wait()
        assert alarms.lines == ()

    asyncio.run(run())
