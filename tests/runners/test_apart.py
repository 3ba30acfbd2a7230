"""Threads that close descriptors of strangers: one for each user, and who sends too many is let in no more."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from isolator.supervisor.runners.apart import MOST, Closers
from tests.runners.conftest import ALICE, BOB
from tests.runners.test_hostile import lingering
from tests.support.hanging_file import file_that_does_not_close


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


async def test_user_with_too_much_to_close_is_let_in_again_when_it_is_closed() -> None:
    changes: list[frozenset[int]] = []
    closers = Closers(lambda: changes.append(closers.exhausted))
    null = os.open("/dev/null", os.O_RDONLY)
    with lingering() as hanging:
        many = [hanging, *(os.dup(null) for _ in range(MOST + 1))]
        closing = asyncio.create_task(closers.close(ALICE, many))
        await closers.close(BOB, [null])
        assert closers.exhausted == {ALICE} and not closing.done()
    await closing
    assert changes == [frozenset({ALICE}), frozenset()]


async def test_paused_threads_close_nothing_and_what_waits_is_known() -> None:
    closers = Closers()
    with lingering() as hanging:
        closing = asyncio.ensure_future(closers.close(ALICE, [hanging]))
        null = os.open("/dev/null", os.O_RDONLY)
        assert await closers.pause() == frozenset(), "a signal ends the wait for a connection"
        waiting = asyncio.ensure_future(closers.close(BOB, [null]))
        await asyncio.sleep(0)
        assert null in closers.unclosed and is_open(null)
        closers.go_on()
        await waiting
        assert not is_open(null)
    await closing


async def test_file_that_does_not_close_keeps_a_pause_waiting_for_a_moment_alone(tmp_path: Path) -> None:
    closers = Closers()
    with file_that_does_not_close(tmp_path / "file", os.getpid()) as file:
        closing = asyncio.ensure_future(closers.close(ALICE, [os.dup(file.fd)]))
        await asyncio.to_thread(file.hangs)
        assert await closers.pause() == {ALICE}
        closers.go_on()
    await closing
    assert await closers.pause() == frozenset()
