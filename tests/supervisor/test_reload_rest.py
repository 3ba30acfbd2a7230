"""Coming to rest before a reload."""

from __future__ import annotations

import asyncio
import threading

from isolator.supervisor.reload.reloader import end_threads


async def test_threads_of_the_loop_end_although_somebody_refers_to_their_executor() -> None:
    worker = await asyncio.to_thread(threading.current_thread)
    kept = vars(asyncio.get_running_loop())["_default_executor"]
    end_threads()
    await asyncio.to_thread(worker.join, 30)
    assert not worker.is_alive() and kept is not None
    assert await asyncio.to_thread(threading.current_thread) is not worker
