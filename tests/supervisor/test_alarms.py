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
        alarms.adopt({"file": "is missing", "other": "stands"}, {})
        alarms.settle("file", 0.0)
        assert alarms.lines == ("stands",)
        alarms.close()

    asyncio.run(run())


def test_alarm_of_before_an_exec_ends_when_it_would_have_ended() -> None:
    async def run() -> None:
        loop, before = asyncio.get_running_loop(), Alarms()
        for key in ("over", "settled"):
            before.raise_(key, key)
        before.raise_("stands", "stands")
        before.settle("over", 0.001)
        before.settle("settled", 1000.0)
        lines, ends = before.hand_over(), before.ends
        assert set(ends) == {"over", "settled"} and ends["over"] < loop.time() + 1
        before.close()
        ended = asyncio.Event()
        alarms = Alarms(lambda _: ended.set())
        alarms.adopt(lines, ends)
        await ended.wait()
        assert alarms.lines == ("settled", "stands")
        assert alarms.ends["settled"] == ends["settled"]
        alarms.settle("settled")  # no later than that
        assert alarms.ends["settled"] == ends["settled"]
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
