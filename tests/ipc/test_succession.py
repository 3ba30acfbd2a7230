"""State that one process hands to the next: whole, in parts of bounded size, refused if it is another version's."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from isolator.errors import IsolatorError, UsageError
from isolator.ipc.body import Body, by_op
from isolator.ipc.channel import Channel, pair
from isolator.ipc.formats import Formats
from isolator.ipc.messages import ReadFormats, StatePart, WriteFormat
from isolator.ipc.succession import PART_FDS, Departure, Passage, Succession, to_bytes, to_text
from tests.support.descriptors import open_descriptors


class Sample(Body):
    numbers: tuple[int, ...]
    text: str


class Newer(Body):
    numbers: tuple[int, ...]
    letters: str


SAMPLE = Formats(Sample, 3)
NEWER = Formats(
    Newer, 4,
    up=lambda body: {"numbers": body["numbers"], "letters": body["text"]},
    down=lambda body: {"numbers": body["numbers"], "text": body["letters"]},
)  # fmt: skip
LATEST = Formats(Newer, 5, up=lambda body: body, down=lambda body: body)


class Way:
    """Old process, supervisor and new process, each with its end of a channel."""

    def __init__(self, reads: Formats[Any] = SAMPLE, writes: Formats[Any] = SAMPLE) -> None:
        old, supervisor_old = pair()
        supervisor_new, new = pair()
        self.arrival, self.leaving = Succession(reads), Succession(writes)
        self.new = Channel(new, self.arrival.handlers(), name="supervisor")
        self.to_new = Channel(supervisor_new, name="new")
        self.passage = Passage(self.to_new)
        self.to_old = Channel(supervisor_old, by_op(StatePart.on_fds(self.passage.part)), name="old")
        self.old = Channel(old, self.leaving.handlers(), name="supervisor")

    def close(self) -> None:
        for channel in (self.old, self.to_old, self.to_new, self.new):
            channel.close()


async def _hand_over(way: Way, count: int, kind: type[Body] = Sample) -> int:
    departure = Departure()
    numbers = []
    for number in range(count):
        fd = os.memfd_create(f"n{number}")
        os.write(fd, str(number).encode())
        numbers.append(departure.add(fd))
    assert numbers == list(range(count))
    text = "text" if kind is Sample else "letters"
    state = kind(numbers=tuple(numbers), **{text: to_text(b"\0\xff")})
    return await way.leaving.send(state, departure, way.old)


@pytest.mark.parametrize("count", [0, 1, PART_FDS - 1, PART_FDS, 5 * PART_FDS + 1])
async def test_state_arrives_whole_with_its_descriptors_in_their_order(count: int) -> None:
    before = len(open_descriptors())
    way = Way()
    parts = await _hand_over(way, count)
    assert parts == way.passage.parts == (count + 1 + PART_FDS - 1) // PART_FDS
    state, descriptors = way.arrival.unpack(parts)
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
    assert len(open_descriptors()) == before


@pytest.mark.parametrize(
    ("more", "reads", "why"),
    [(0, LATEST, "is of the format 3, and this version reads 5 or 4"), (1, SAMPLE, "came in 1 parts instead of 2")],
)
async def test_state_of_another_format_or_not_whole_is_refused_and_closed(
    more: int, reads: Formats[Any], why: str
) -> None:
    before = len(open_descriptors())
    way = Way(reads)
    parts = await _hand_over(way, 2)
    with pytest.raises(IsolatorError, match=why):
        way.arrival.unpack(parts + more)
    way.close()
    await asyncio.sleep(0)
    assert len(open_descriptors()) == before


async def test_old_process_hears_that_the_new_one_has_died() -> None:
    way = Way()
    way.new.close()
    with pytest.raises(IsolatorError):
        await _hand_over(way, 3)
    way.close()


@pytest.mark.parametrize(("reads", "writes"), [(NEWER, SAMPLE), (SAMPLE, NEWER), (NEWER, NEWER), (LATEST, NEWER)])
async def test_state_goes_one_version_up_and_one_down(reads: Formats[Any], writes: Formats[Any]) -> None:
    way = Way(reads, writes)
    readable = await way.to_new.ask(ReadFormats())
    way.to_old.tell(WriteFormat(formats=readable.formats))
    await way.to_old.call("alive")
    state, descriptors = way.arrival.unpack(await _hand_over(way, 1, writes.kind))
    with descriptors:
        assert type(state) is reads.kind
        assert to_bytes(state.text if isinstance(state, Sample) else state.letters) == b"\0\xff"
    way.close()
