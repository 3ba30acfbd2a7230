"""Processes that hang are noticed; those that are slow, and those that wait while this one sleeps, are not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from isolator.errors import UnavailableError
from isolator.supervisor import alive
from tests.support.timeouts import seconds


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "TICK", seconds(0.05))
    monkeypatch.setattr(alive, "EVERY", seconds(0.05))


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that works: it uses CPU time without end."""
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


async def test_stopped_process_hangs(other: subprocess.Popen[bytes]) -> None:
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(UnavailableError, match="other: does not answer, and has done nothing for "):
        await alive.answered(asyncio.Event().wait(), other.pid, "other")


async def test_busy_process_has_more_time_and_not_without_end(other: subprocess.Popen[bytes]) -> None:
    answer = asyncio.Event()

    async def late() -> str:
        await answer.wait()
        return "at last"

    ticks = 8 * alive.STILL_TICKS
    waiting = asyncio.create_task(alive.answered(late(), other.pid, "other", ticks=ticks))
    await asyncio.wait({waiting}, timeout=2 * alive.STILL_TICKS * alive.TICK)
    assert not waiting.done(), "a process at work was given up"
    answer.set()
    assert await waiting == "at last"
    with pytest.raises(UnavailableError, match="is busy and does not answer"):
        await alive.answered(asyncio.Event().wait(), other.pid, "other", ticks=3)


async def test_answer_that_came_while_this_process_slept_counts(other: subprocess.Popen[bytes]) -> None:
    """All that the other could do had been done; the clock alone says that it took for ever."""
    read, write = os.pipe()
    waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_reader(read, lambda: waiting.done() or waiting.set_result(None))
    other.send_signal(signal.SIGSTOP)
    done = asyncio.create_task(alive.answered(waiting, other.pid, "other"))
    await asyncio.sleep(0)
    wake = subprocess.Popen(["sh", "-c", f"sleep {2 * alive.STILL_TICKS * alive.TICK}; kill -CONT {os.getpid()}"])
    os.write(write, b"x")
    os.kill(os.getpid(), signal.SIGSTOP)
    await done
    wake.wait()
    asyncio.get_running_loop().remove_reader(read)
    os.close(read)
    os.close(write)


async def test_process_that_answers_is_asked_until_it_is_gone(other: subprocess.Popen[bytes]) -> None:
    closed, asked = asyncio.Event(), 0

    async def ask() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            closed.set()
            raise UnavailableError("other", "went away")

    assert await alive.until_silent(closed, ask, other.pid, "other") is None
    assert asked == 3


async def test_silent_process_is_reported(other: subprocess.Popen[bytes]) -> None:
    other.send_signal(signal.SIGSTOP)
    silent = await alive.until_silent(asyncio.Event(), asyncio.Event().wait, other.pid, "other")
    assert silent is not None and "does not answer" in silent.why


def test_process_of_which_any_thread_has_run_a_little_makes_progress() -> None:
    program = """if True:
        import sys, threading
        def echo():
            for line in sys.stdin:
                print(line, end="", flush=True)
        thread = threading.Thread(target=echo)
        thread.start()
        thread.join()
    """
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        seen = []
        for _ in range(3):
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.stdout.readline()
            seen.append(alive._progress(other.pid))
        assert sorted({*seen}) == seen
        other.stdin.close()
    assert alive._progress(other.pid) == -1
