"""Streams of the trail that cannot be tried on a whole daemon: callers that read nothing for long, or end early."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from host.cli.audit import _from_daemon, _Shown
from host.control import follow as trail
from host.control.follow import TrailStreams
from host.control.server import ControlServer
from isolator.audit import files
from isolator.audit.client import AuditClient
from isolator.audit.log import Limits
from isolator.errors import UnavailableError
from isolator.ipc import channel as ipc
from isolator.paths import Paths
from tests.audit.test_verify import Written
from tests.support.timeouts import seconds


@pytest.fixture
async def streams(tmp_path: Path) -> AsyncIterator[TrailStreams]:
    """A control socket beside a trail of some megabytes."""
    written = Written(tmp_path, 8000, Limits())
    ours, theirs = ipc.pair()
    audit = AuditClient(theirs)
    made = TrailStreams(written.log, audit)
    listener = socket.socket(socket.AF_UNIX)
    place = Paths.of(tmp_path).control_socket
    place.parent.mkdir(parents=True)
    listener.bind(str(place))
    listener.listen()
    server = ControlServer(made.endpoints(), lambda uid: "viewer", lambda *_, **__: None)
    await server.start(listener)
    yield made
    await server.close()
    made.close()
    audit.close()
    ours.close()


async def following(place: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection that follows the whole trail and reads only as much as it must."""
    reader, writer = await asyncio.open_unix_connection(str(Paths.of(place).control_socket), limit=4096)
    writer.write(b'{"jsonrpc":"2.0","id":1,"method":"audit.follow","params":{"after":0}}\n')
    return reader, writer


def open_files(place: Path) -> list[str]:
    """List the files of the trail, and its watches, that this process has open."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return [name for name in names if name.startswith(str(place / "log")) or "inotify" in name]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition of which no event tells."""
    end = asyncio.get_running_loop().time() + seconds(20)
    while not condition() and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110 # see above
        await asyncio.sleep(0.01)
    assert condition()


async def test_a_caller_that_reads_nothing_for_long_is_cut_off(
    streams: TrailStreams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trail, "STALLED", 0.2)
    reader, writer = await following(tmp_path)
    assert json.loads(await reader.readline())["result"]["after"] == 0
    await until(lambda: not streams._streams)
    with contextlib.suppress(ConnectionError):
        rest = await reader.read(-1)
        assert rest and b'"seq\\":8000' not in rest
    writer.close()


async def test_a_caller_that_ends_leaves_nothing_open(streams: TrailStreams, tmp_path: Path) -> None:
    connections = [await following(tmp_path) for _ in range(10)]
    await until(lambda: len(streams._streams) == 10)
    for _, writer in connections:
        writer.transport.abort()
    await until(lambda: not streams._streams and not open_files(tmp_path))


async def test_a_place_that_is_no_number_is_refused(streams: TrailStreams, tmp_path: Path) -> None:
    for params in ({"after": -1}, {"after": "x"}, {"lines": 1.5e9}, {"after": None}):
        reader, writer = await asyncio.open_unix_connection(str(Paths.of(tmp_path).control_socket))
        request = {"jsonrpc": "2.0", "id": 1, "method": "audit.follow", "params": params}
        writer.write(json.dumps(request).encode() + b"\n")
        assert json.loads(await reader.readline())["error"]["data"]["code"] == "usage"
        writer.close()
    assert not streams._streams


async def test_stream_that_fails_is_reported_and_its_caller_cut_off(
    streams: TrailStreams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["message"]))

    def fail(_: object) -> list[bytes]:
        raise ValueError("a fault")

    monkeypatch.setattr(trail._Stream, "_read", fail)
    reader, writer = await following(tmp_path)
    with contextlib.suppress(ConnectionError):
        await asyncio.wait_for(reader.read(-1), seconds(20))
    await until(lambda: not streams._streams)
    assert reported == ["a stream of the trail has failed"]
    writer.close()


async def test_stream_that_begins_while_nothing_can_be_written_sends_what_is_there_and_lets_go_of_it(
    streams: TrailStreams, tmp_path: Path
) -> None:
    streams._audit._set_blocked("No space left on device")
    await tailed(tmp_path, 5)
    reader, writer = await following(tmp_path)
    async with asyncio.timeout(seconds(20)):
        while b'"seq\\":8000,' not in await reader.readuntil(b"}"):
            pass
    await until(lambda: bool(streams._streams) and not open_files(tmp_path))
    writer.close()


async def tailed(place: Path, count: int) -> None:
    """The last records, as ``tail`` without ``-f`` shows them to a viewer."""
    async with asyncio.timeout(seconds(20)):
        await asyncio.to_thread(_from_daemon, str(place), _Shown(None, as_json=True), count, None, follow=False)


async def test_tail_ends_with_a_last_record_that_was_changed(
    streams: TrailStreams, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    live = streams._directory / files.LIVE
    written = live.read_bytes()
    last = written.splitlines(keepends=True)[-1]
    live.write_bytes(written.removesuffix(last) + last.replace(b'"origin":"audit"', b'"origin":"other"'))
    await tailed(tmp_path, 5)
    shown = capfd.readouterr()
    assert len(shown.out.splitlines()) == 5 and '"other"' in shown.out
    assert "was changed after it was written" in shown.err


async def test_tail_that_the_daemon_breaks_off_is_an_error(
    streams: TrailStreams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def break_off(stream: trail._Stream, _: list[bytes]) -> None:
        stream._caller.cut()

    monkeypatch.setattr(trail._Stream, "_send", break_off)
    with pytest.raises(UnavailableError, match="before the end"):
        await tailed(tmp_path, 5)
