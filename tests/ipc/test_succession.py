"""State that one process hands to the next: whole, in parts of bounded size, refused if it is another version's."""

from __future__ import annotations

import asyncio
import os

import pytest

from isolator.errors import IsolatorError, UsageError
from isolator.ipc.body import Body, by_op
from isolator.ipc.channel import Channel, pair
from isolator.ipc.messages import StatePart
from isolator.ipc.succession import PART_FDS, Arrival, Departure, Passage, to_bytes, to_text


class Sample(Body):
    version: int = 3
    numbers: tuple[int, ...]
    text: str


class Way:
    """Old process, supervisor and new process, each with its end of a channel."""

    def __init__(self) -> None:
        old, supervisor_old = pair()
        supervisor_new, new = pair()
        self.arrival = Arrival()
        self.new = Channel(new, by_op(StatePart.on_fds(self.arrival.part)), name="supervisor")
        self.to_new = Channel(supervisor_new, name="new")
        self.passage = Passage(self.to_new)
        self.to_old = Channel(supervisor_old, by_op(StatePart.on_fds(self.passage.part)), name="old")
        self.old = Channel(old, name="supervisor")

    def close(self) -> None:
        for channel in (self.old, self.to_old, self.to_new, self.new):
            channel.close()


async def _hand_over(way: Way, count: int) -> int:
    departure = Departure()
    numbers = []
    for number in range(count):
        fd = os.memfd_create(f"n{number}")
        os.write(fd, str(number).encode())
        numbers.append(departure.add(fd))
    assert numbers == list(range(count))
    return await departure.send(Sample(numbers=tuple(numbers), text=to_text(b"\0\xff")), way.old)


@pytest.mark.parametrize("count", [0, 1, PART_FDS - 1, PART_FDS, 5 * PART_FDS + 1])
async def test_state_arrives_whole_with_its_descriptors_in_their_order(count: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    way = Way()
    parts = await _hand_over(way, count)
    assert parts == way.passage.parts == (count + 1 + PART_FDS - 1) // PART_FDS
    state, descriptors = way.arrival.unpack(parts, Sample, 3)
    with descriptors:
        assert to_bytes(state.text) == b"\0\xff"
        for number in state.numbers[: count // 2]:  # nobody takes the others
            fd = descriptors.take(number)
            assert os.pread(fd, 10, 0) == str(number).encode()
            os.close(fd)
        with pytest.raises(UsageError, match=f"has no descriptor {count}"):
            descriptors.take(count)
    way.close()
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("more", "version", "why"), [(0, 4, "not of the version 4"), (1, 3, "came in 1 parts instead of 2")]
)
async def test_state_of_another_version_or_not_whole_is_refused_and_closed(more: int, version: int, why: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    way = Way()
    parts = await _hand_over(way, 2)
    with pytest.raises(IsolatorError, match=why):
        way.arrival.unpack(parts + more, Sample, version)
    way.close()
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_old_process_hears_that_the_new_one_has_died() -> None:
    way = Way()
    way.new.close()
    with pytest.raises(IsolatorError):
        await _hand_over(way, 3)
    way.close()
