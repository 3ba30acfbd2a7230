"""Threads that close descriptors of strangers: one for each user, and who sends too many is let in no more."""

from __future__ import annotations

import asyncio
import os

from isolator.supervisor.runners.apart import MOST, Closers
from tests.runners.conftest import ALICE, BOB
from tests.runners.test_hostile import lingering


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
        closers.pause()
        waiting = asyncio.ensure_future(closers.close(BOB, [null]))
        await asyncio.sleep(0)
        assert null in closers.unclosed and is_open(null)
        closers.go_on()
        await waiting
        assert not is_open(null)
    await closing
