"""Lines of the client of ``isolator mcp serve``, whatever its standard input is."""

from __future__ import annotations

import asyncio
import os
import pty
import socket
from pathlib import Path

import pytest

from host.cli.mcp.source import Source
from host.wire.mcp import MAX_LINE

LONG = b"x" * (2 * MAX_LINE)
SENT = b"one\n\n  \r\ntwo\r\n" + LONG + b"\nthree\n" + b"y" * (MAX_LINE + 1) + b"\nlast"
SEEN = [b"one", b"two\r", LONG[: MAX_LINE + 1], b"three", b"y" * (MAX_LINE + 1), b"last"]


async def read_all(fd: int) -> list[bytes]:
    source, found = Source(fd), []
    while line := await source.line():
        found.append(line)
    return found


@pytest.mark.parametrize("kind", ["pipe", "socket", "file"])
async def test_lines_come_from_whatever_standard_input_is(tmp_path: Path, kind: str) -> None:
    if kind == "file":
        (tmp_path / "in").write_bytes(SENT)
        reading = os.open(tmp_path / "in", os.O_RDONLY)
        assert await read_all(reading) == SEEN
    else:
        ends = os.pipe() if kind == "pipe" else tuple(end.detach() for end in socket.socketpair())
        reading = ends[0]
        assert os.get_blocking(reading)
        sending = asyncio.create_task(asyncio.to_thread(_send, ends[1]))
        assert await read_all(reading) == SEEN
        await sending
        assert os.get_blocking(reading), "whoever shares it finds other flags"
    os.close(reading)


def _send(fd: int) -> None:
    with os.fdopen(fd, "wb") as out:
        out.write(SENT)


async def test_terminal_is_read_line_by_line() -> None:
    ours, its = pty.openpty()
    source = Source(its)
    for typed in (b"one", b"two"):
        os.write(ours, typed + b"\n")
        assert await source.line() == typed
    os.close(ours)
    assert await source.line() == b""
    os.close(its)
