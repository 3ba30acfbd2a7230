"""Packets of the inner sockets: each arrives whole with its descriptors, or is refused as truncated."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from isolator.ipc.packet import MAX_PACKET, TruncatedPacketError, drop_packet, pair, receive_packet, send_packet
from isolator.linux.descriptors import close_all
from tests.support.timeouts import seconds


@pytest.mark.parametrize("size", [1, 4096, MAX_PACKET])
@pytest.mark.parametrize("peek", [False, True], ids=["taken", "looked at"])
def test_a_packet_of_any_size_arrives_whole(size: int, peek: bool) -> None:
    here, there = pair()
    with here, there:
        sent = os.urandom(size)
        send_packet(here, sent, [0, 1])
        for _ in range(1 + peek):
            payload, fds = receive_packet(there, peek=peek)
            assert (payload, len(fds)) == (sent, 2)
            close_all(fds)


def test_a_packet_that_is_too_large_is_refused_and_the_next_one_arrives() -> None:
    here, there = pair()
    with here, there:
        send_packet(here, bytes(MAX_PACKET + 1))
        send_packet(here, b"next")
        with pytest.raises(TruncatedPacketError):
            receive_packet(there)
        assert receive_packet(there) == (b"next", [])


def test_a_peer_that_has_gone_is_an_empty_packet() -> None:
    here, there = pair()
    with there:
        send_packet(here, b"last")
        here.close()
        assert [receive_packet(there), receive_packet(there)] == [(b"last", []), (b"", [])]
        there.setblocking(False)
        assert receive_packet(there) == (b"", [])


@pytest.mark.parametrize("peek", [False, True])
def test_last_packets_of_a_peer_that_ends_before_it_has_read_everything_arrive(peek: bool) -> None:
    """The kernel tells of what the peer has not read ahead of what it has sent."""
    ours, theirs = pair()
    ours.send(b"unread")
    for packet in (b"1", b"2"):
        theirs.send(packet)
    theirs.close()
    for packet in (b"1", b"2", b""):
        assert receive_packet(ours, peek=peek) == (packet, [])
        if peek and packet:
            drop_packet(ours)
    ours.close()


def test_nothing_to_receive_does_not_block() -> None:
    here, there = pair()
    with here, there:
        there.setblocking(False)
        with pytest.raises(BlockingIOError):
            receive_packet(there)


FAULTS = """
import resource
from isolator.ipc.packet import pair, receive_packet, send_packet
here, there = pair()
def pass_on(packets):
    for _ in range(packets):
        send_packet(here, b"small")
        receive_packet(there)
pass_on(10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
pass_on(1000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_small_packets_take_no_memory_anew() -> None:
    """In a fresh process: memory that is mapped for each packet shows as a page fault for each."""
    done = subprocess.run([sys.executable, "-I", "-c", FAULTS], capture_output=True, check=True, timeout=seconds(60))
    assert int(done.stdout) < 500


def test_the_size_is_that_of_the_first_packet_alone() -> None:
    here, there = pair()
    with here, there:
        for payload in (b"a", b"bb" * 5000, b"c"):
            send_packet(here, payload)
        assert [receive_packet(there)[0] for _ in range(3)] == [b"a", b"bb" * 5000, b"c"]
