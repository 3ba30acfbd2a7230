"""The reading ends of its log pipes that pid 1 of a cage keeps for the supervisor."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from isolator.linux.descriptors import close_all
from isolator.supervisor import reach
from tests.support.cage_fixture import cage
from tests.support.timeouts import seconds

LOOK = """
ls -l /proc/1/fd
for number in $(seq 0 64); do head -c 6 < /proc/1/fd/$number; done
ls /proc/self/fd
echo end
"""


async def test_programs_of_a_cage_reach_no_log_by_its_first_process(shared_dir: Path) -> None:
    """They have its user, and would read there what is meant for the log; more than one layer keeps them from it."""
    pipes = [os.pipe(), os.pipe()]
    for _, writer in pipes:
        os.write(writer, b"secret")
    try:
        async with cage(shared_dir, ["sh", "-c", f"{LOOK}\nsleep 300"], logs=[reader for reader, _ in pipes]) as one:
            for reader, _ in pipes:
                assert reach.find_pipe(one.cage.pid, os.fstat(reader).st_ino)
            async with asyncio.timeout(seconds(60)):
                while "end" not in one.text():  # noqa: ASYNC110 # it writes to a file
                    await asyncio.sleep(0.01)
            said = one.text()
            assert "secret" not in said and "cannot open" in said, said
            for reader, _ in pipes:
                opened = reach.open_pipe(one.cage.pid, os.fstat(reader).st_ino)
                assert os.read(opened, 100) == b"secret"
                os.close(opened)
    finally:
        close_all(fd for pair in pipes for fd in pair)
