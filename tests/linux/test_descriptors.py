"""Owners of descriptors: what is owned is closed exactly once, what was given up stays open."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from isolator.linux.descriptors import FdSet, check_open, close_all


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_descriptors_of_a_set_are_closed_when_the_block_is_left_by_an_error() -> None:
    with pytest.raises(RuntimeError), FdSet() as owned:
        fds = [owned.add(fd) for fd in os.pipe()]
        raise RuntimeError
    assert not any(map(is_open, fds))


def test_released_descriptors_stay_open() -> None:
    with FdSet(os.pipe()) as owned:
        reading, writing = owned.release_all()
        assert len(owned) == 0
    assert is_open(reading) and is_open(writing)
    with FdSet([reading, writing]) as owned:
        assert owned.release(writing) == writing
    assert not is_open(reading) and is_open(writing)
    os.close(writing)


def test_close_all_empties_a_list_and_passes_over_what_is_closed() -> None:
    fds = list(os.pipe())
    os.close(fds[0])
    still = fds[1]
    close_all(fds)
    assert fds == [] and not is_open(still)


@pytest.mark.parametrize("number", [-1, 1 << 30, 1 << 40])
def test_number_of_no_open_descriptor_is_told_and_is_nothing_to_close(number: int) -> None:
    check_open([0])
    with pytest.raises((OSError, OverflowError, ValueError)):
        check_open([0, number])
    close_all([number])


def test_descriptors_before_one_that_cannot_be_made_are_closed() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        made.append(os.open("/dev/null", os.O_RDONLY))
        yield made[0]
        raise OSError(errno.EMFILE, "the table is full")

    with pytest.raises(OSError, match="the table is full"):
        FdSet(make())
    assert not is_open(made[0])
