"""Logs of sidecars: bounded in every way, and never a reason for the host to wait or grow."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from pathlib import Path

import pytest

from host.plugins.logs import LINES_PER_TURN, MAX_LINE, RATE, Logs
from host.plugins.secrets import Redactor
from isolator.ipc.succession import Departure, Descriptors
from tests.host.fake_supervisor import Daemon
from tests.support import sidecars
from tests.support.timeouts import seconds

FLOOD = """
import os, threading, time
def flood(fd):
    block = (b"y" * 99 + b"\\n") * 600
    while True:
        os.write(fd, block)
for fd in (1, 2):
    threading.Thread(target=flood, args=(fd,), daemon=True).start()
"""


def _lines(daemon: Daemon, name: str) -> list[dict[str, str]]:
    files = sorted(daemon.paths.plugin_log.glob(f"{name}.log*"), reverse=True)
    texts = [path.read_text() for path in files]
    # A line that is being written at this moment has no end yet.
    return [json.loads(line) for text in texts for line in text[: text.rfind("\n") + 1].splitlines()]


def _notes(daemon: Daemon, name: str) -> list[str]:
    return [entry["line"] for entry in _lines(daemon, name) if entry["stream"] == "isolator"]


async def test_a_flood_is_dropped_and_counted_and_delivery_goes_on(daemon: Daemon) -> None:
    daemon.add("flooder", FLOOD + sidecars.OK)
    daemon.add("good", sidecars.OK)
    assert daemon.host is not None
    memory = Path(f"/proc/{daemon.host.pid}/statm")
    before = int(memory.read_text().split()[1])
    end = time.monotonic() + 3
    while time.monotonic() < end:
        row = await daemon.outcome(await daemon.emit())
        assert {d["plugin"]: d["state"] for d in row["deliveries"]} == {"flooder": "ok", "good": "ok"}
    assert int(memory.read_text().split()[1]) - before < 4000
    stored = sum(p.stat().st_size for p in daemon.paths.plugin_log.glob("flooder.log*"))
    assert stored < 16 << 20
    async with asyncio.timeout(seconds(60)):
        while (await daemon.ask("plugin.show", name="flooder"))["log_bytes_dropped"] <= 1 << 20:  # noqa: ASYNC110 # no event tells
            await asyncio.sleep(0.05)
    await daemon.poll(lambda: _notes(daemon, "flooder"))
    assert "bytes dropped" in _notes(daemon, "flooder")[0]


async def test_an_endless_line_is_cut(daemon: Daemon) -> None:
    script = 'import sys\nsys.stdout.write("z" * 200_000 + "\\nend\\n")\nsys.stdout.flush()\n' + sidecars.OK
    daemon.add("endless", script)
    await daemon.outcome(await daemon.emit())
    await daemon.poll(lambda: any(e["line"] == "end" for e in _lines(daemon, "endless")))
    lines = [e["line"] for e in _lines(daemon, "endless")]
    assert [len(line) for line in lines] == [65536, 65536, 65536, 200_000 - 3 * 65536, 3]


async def test_bytes_that_are_no_text_are_kept_readable(daemon: Daemon) -> None:
    daemon.add("binary", 'import os\nos.write(1, b"\\xff\\x00\\x1b[2J\\n")\n' + sidecars.OK)
    await daemon.outcome(await daemon.emit())
    await daemon.poll(lambda: _lines(daemon, "binary"))
    (entry,) = _lines(daemon, "binary")
    assert entry["line"] == "\ufffd\x00\x1b[2J"
    raw = (daemon.paths.plugin_log / "binary.log").read_bytes()
    assert b"\x1b" not in raw


async def test_stderr_tail_of_a_crash_is_shown(daemon: Daemon) -> None:
    sidecar = daemon.add("crasher", 'import sys\nprint("cannot find key.json", file=sys.stderr)\nsys.exit(1)\n')
    sidecar.give_up_after = 1
    emitted = await daemon.emit()
    await daemon.outcome(emitted, timeout=0.5)
    await daemon.poll(lambda: _lines(daemon, "crasher"))
    shown = await daemon.ask("plugin.show", name="crasher")
    assert shown["stderr"] == ["cannot find key.json"]


async def test_stderr_tail_is_that_of_the_run_and_waits_for_the_end_of_its_pipe(tmp_path: Path) -> None:
    logs = Logs(tmp_path, lambda _: Redactor(["secret"]))
    for run, output in (("r1", b"of another run\n"), ("r2", b"a secret\n" + b"b\n" * 9 + b"unfinished")):
        reading, writing = os.pipe()
        silent, done = os.pipe()
        os.close(done)
        logs.attach("p", run, silent, reading)
        tail = asyncio.create_task(logs.stderr_tail("p", run))
        await asyncio.sleep(0.01)
        assert not tail.done()
        os.write(writing, output)
        os.close(writing)
        assert await tail == (["of another run"] if run == "r1" else ["b"] * 4 + ["unfinished"])
    logs.close()


@pytest.mark.parametrize("ended", [True, False])
async def test_last_line_is_there_in_the_host_that_takes_over(tmp_path: Path, ended: bool) -> None:
    """Also of a program that has ended, whose end the host before was not told of any more."""
    before, after = (Logs(tmp_path, lambda _: Redactor([])) for _ in range(2))
    (out, its_out), (err, its_err) = os.pipe(), os.pipe()
    before.attach("linter", "run1", out, err, tail=True)
    os.write(its_out, b"first\nlast\n")
    if ended:
        os.close(its_out)
        await asyncio.wait_for(before._tails["run1"].ended.wait(), seconds(60))
    departure = Departure()
    states = before.pass_on(departure)
    with Descriptors(departure._fds.release_all()) as descriptors:
        after.take_over(states, descriptors)
    if not ended:
        os.close(its_out)
    os.close(its_err)
    assert await after.last_line("run1") == b"last"
    after.close()


async def test_follower_that_does_not_read_misses_lines_and_gets_their_number(daemon: Daemon) -> None:
    script = 'for n in range(int(params["branch"])):\n    print(n, "x" * 30000, flush=True)\nreturn {}'
    daemon.add("chatty", sidecars.oneshot(script))
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(daemon.paths.control_socket))
    sock.sendall(b'{"jsonrpc":"2.0","id":1,"method":"plugin.logs","params":{"name":"chatty","follow":true}}\n')
    for _ in range(2):  # a second apart, as no more than 1 MiB a second is kept
        assert (await daemon.outcome(await daemon.emit(branch="30")))["deliveries"][0]["state"] == "ok"
        await asyncio.sleep(1)
    reader, writer = await asyncio.open_unix_connection(sock=sock, limit=1 << 24)
    await reader.readline()  # the answer
    first = json.loads(await reader.readline())["params"]["line"]
    assert first.startswith("0 xxx")
    reading = asyncio.create_task(reader.readuntil(b"read too slowly]"))
    async with asyncio.timeout(seconds(30)):
        while not reading.done():
            await daemon.outcome(await daemon.emit(branch="1"))
    data = await reading
    lines = data.count(b"\n")
    assert lines < 55 and len(data) < 1 << 20
    writer.close()


TOKEN = "tok-0123456789abcdef"


def _piped(tmp_path: Path) -> tuple[Logs, int]:
    """Logs with one run of the plugin ``p``, which knows a secret, and the writing end of its stdout."""
    logs = Logs(tmp_path, lambda _: Redactor([TOKEN]))
    out, end = os.pipe()
    err, other = os.pipe()
    os.close(other)
    logs.attach("p", "r", out, err)
    return logs, end


async def _stored(logs: Logs, last: str) -> list[str]:
    """The lines of ``p`` once the last of them is there."""
    async with asyncio.timeout(seconds(20)):
        while True:
            lines = [json.loads(line)["line"] for line in logs.of("p").read(1000)]
            if lines and lines[-1] == last:
                return lines
            await asyncio.sleep(0.01)


def _shows_part(lines: list[str]) -> bool:
    return any(TOKEN[at : at + 4] in line for line in lines for at in range(len(TOKEN) - 3))


@pytest.mark.parametrize("before", [1, 10, len(TOKEN) - 1, len(TOKEN)])
@pytest.mark.parametrize("ending", [b"", b"z" * 70_000, b"\n"])
async def test_secret_across_a_cut_is_not_shown_in_halves(tmp_path: Path, before: int, ending: bytes) -> None:
    """The cut falls ``before`` characters after its beginning; also when the pipe brings it in two parts."""
    logs, end = _piped(tmp_path)
    text = b"z" * (MAX_LINE - before) + TOKEN.encode() + ending
    for part in (text[: MAX_LINE - 3], text[MAX_LINE - 3 :], b"\nend\n"):
        await asyncio.to_thread(os.write, end, part)
    lines = await _stored(logs, "end")
    os.close(end)
    logs.close()
    assert not _shows_part(lines)
    assert "".join(lines).count("[redacted]") == 1


async def test_rest_of_a_line_that_a_flood_tore_is_dropped(tmp_path: Path) -> None:
    logs, end = _piped(tmp_path)
    log = logs.of("p")
    log.budget()
    log.keep("r", "stdout", b"y" * RATE)
    os.write(end, b"begin " + TOKEN[:10].encode())
    async with asyncio.timeout(seconds(20)):
        while not any(b"bytes dropped" in line for line in log.read(10)):  # noqa: ASYNC110 # no event tells
            await asyncio.sleep(0.01)  # until there is a budget again
    os.write(end, TOKEN[10:].encode() + b" rest\nwhole\n")
    lines = await _stored(logs, "whole")
    os.close(end)
    logs.close()
    assert not _shows_part(lines)


async def test_blank_and_short_lines_take_many_turns_and_no_record_each(tmp_path: Path) -> None:
    logs = Logs(tmp_path, lambda _: Redactor())
    stored: list[str] = []
    in_turn: list[int] = []

    def count() -> None:
        in_turn.append(len(stored) - sum(in_turn))
        if "end" in stored:
            ended.set()
        else:
            loop.call_soon(count)

    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    logs.of("p").follow(lambda entry: stored.append(entry["line"]))
    out, err = os.pipe(), os.pipe()
    logs.attach("p", "run", out[0], err[0])
    os.write(out[1], b"\n" * 30_000 + b"a\n\n" * 2000 + b"end\n")
    loop.call_soon(count)
    async with asyncio.timeout(seconds(20)):
        await ended.wait()
    assert stored == ["a"] * 2000 + ["end"]
    assert max(in_turn) <= LINES_PER_TURN
    for fd in (out[1], err[1]):
        os.close(fd)
    logs.close()
