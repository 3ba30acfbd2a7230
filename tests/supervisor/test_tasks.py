"""A loop of the daemon that fails, or that ends, is noticed and begun anew."""

from __future__ import annotations

import asyncio
import logging

import pytest

from isolator.supervisor import tasks


async def test_loop_that_fails_is_named_and_begun_again(caplog: pytest.LogCaptureFixture) -> None:
    begun, owner, third = 0, tasks.Tasks(), asyncio.Event()

    async def loop() -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            raise ValueError("for once")
        if begun == 3:
            third.set()
            await asyncio.Event().wait()

    with caplog.at_level(logging.CRITICAL):
        owner.keep("snapshots", loop)
        await asyncio.wait_for(third.wait(), 30)
    assert "snapshots has failed and is begun again: ValueError: for once" in caplog.text
    assert "snapshots has ended; it is begun again" in caplog.text
    await owner.close()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "snapshots"]
