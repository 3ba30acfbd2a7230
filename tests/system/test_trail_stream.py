"""The trail over the control socket: complete, byte for byte, resumable, and nobody's burden."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host import PluginHost
from host.client.client import Client
from host.control.follow import BLOCK
from isolator.audit import files
from isolator.errors import IsolatorError, UsageError
from tests.support.timeouts import seconds
from tests.system.daemon import EVENT, Daemon, daemon, wait_for

VIEWER, STRANGER = 61998, 61997
HOST_TOML = f'[roles]\nviewer = [{VIEWER}]\n[audit]\nrotate_size = "100K"\n'


@pytest.fixture(scope="module")
def d() -> Iterator[Daemon]:
    with daemon(host_toml=HOST_TOML) as running:
        yield running


def emit(d: Daemon, count: int) -> None:
    """So many events, each of which is a record."""

    async def work() -> None:
        async with PluginHost.connect(d.root) as host:
            payloads = [EVENT | {"deployment_id": f"d{n}", "branch": "b" * 200} for n in range(count)]
            await asyncio.gather(*(host.emit("deploy.completed", payload) for payload in payloads))

    asyncio.run(work())


def written(d: Daemon) -> list[str]:
    """Every line of the trail, with what happened just now: that is committed some milliseconds later."""
    time.sleep(seconds(0.02))
    paths = files.trail(d.root / "var/log/isolator/audit")
    return [line for path in paths for line in path.read_text("ascii").splitlines()]


def follow(d: Daemon, upto: int, **where: int) -> list[str]:
    """The lines that the library hands out, up to record ``upto``."""

    async def work() -> list[str]:
        lines = []
        async with PluginHost.connect(d.root) as host:
            async for recorded in host.audit(**where):
                lines.append(recorded.line)
                if recorded.record.seq >= upto:
                    return lines
        raise AssertionError("it ended")

    return asyncio.run(asyncio.wait_for(work(), seconds(60)))


def test_every_line_as_it_is_written_over_rotations(d: Daemon, tmp_path: Path) -> None:
    first = len(written(d))

    async def work() -> list[str]:
        lines: list[str] = []
        async with PluginHost.connect(d.root) as host:
            ends = asyncio.Event()

            async def read() -> None:
                async for recorded in host.audit(after=first):
                    lines.append(recorded.line)
                    if "the-last-one" in recorded.line:
                        ends.set()

            reading = asyncio.create_task(read())
            for number in range(1200):
                await host.emit("deploy.completed", EVENT | {"deployment_id": f"s{number}"})
            await host.emit("deploy.completed", EVENT | {"project_id": "the-last-one"})
            await ends.wait()
            reading.cancel()
        return lines

    rotated = len(files.rotated(d.root / "var/log/isolator/audit"))
    lines = asyncio.run(asyncio.wait_for(work(), seconds(90)))
    assert len(files.rotated(d.root / "var/log/isolator/audit")) > rotated + 1
    assert lines == written(d)[first : first + len(lines)]
    assert len(lines) > 1200
    # What another machine has kept verifies there, and so does what completes it.
    copy, key = tmp_path / "copy.jsonl", d.root / "var/log/isolator/audit/public.pem"
    copy.write_text("".join(f"{line}\n" for line in lines))
    completed = d.cli("audit", "tail", "--after", str(first + len(lines)), "--json").stdout
    with copy.open("a") as file:
        file.write(completed)
    verdict = d.json("audit", "verify", str(copy), "--key", str(key))
    assert verdict["records"] >= len(lines) and verdict["first"] == first + 1 and verdict["seals"]
    d.cli("audit", "verify", str(copy), "--key", str(key), "--anchor", f"{verdict['seal']}:{verdict['seal_hash']}")
    script = Path(__file__).resolve().parents[2] / "docs/verify.pl"
    if shutil.which("perl"):
        command = ["perl", str(script), str(key), str(copy)]
        before = {**os.environ, "PREV": json.loads(lines[0])["prev"]}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=before)


def test_it_begins_where_it_is_asked_to(d: Daemon) -> None:
    emit(d, 300)
    everything = written(d)
    assert follow(d, 200, after=0) == everything[:200]
    assert follow(d, 200, after=150) == everything[150:200]
    begin = json.loads(follow(d, 0, lines=40)[0])["seq"]
    assert begin > len(everything) - 40
    with Client(d.root) as client:
        answer = client.call("audit.follow", lines=3)
        assert answer["last"] == answer["after"] + 3
        with pytest.raises(UsageError, match="already"):
            client.call("audit.follow")
    with pytest.raises(IsolatorError, match="it was cut"):
        follow(d, 0, after=10**9)


def tail(d: Daemon, uid: int, *words: str) -> subprocess.Popen[str]:
    """``isolator audit tail`` as somebody else."""
    return subprocess.Popen(
        ["isolator", "--root", str(d.root), "audit", "tail", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, user=uid, group=uid, extra_groups=[],
    )  # fmt: skip


def test_a_viewer_follows_without_access_to_the_files_and_is_recorded(d: Daemon) -> None:
    with tail(d, VIEWER, "-f", "-n", "5", "--json") as viewer:
        assert viewer.stdout is not None
        seqs = [json.loads(viewer.stdout.readline())["seq"] for _ in range(5)]
        emit(d, 20)
        while len(seqs) < 25:
            seqs.append(json.loads(viewer.stdout.readline())["seq"])
        assert seqs == list(range(seqs[0], seqs[0] + 25))
        # Whoever reads its output goes away: so does it, though nothing is written.
        viewer.stdout.close()
        viewer.wait(seconds(30))
    with tail(d, STRANGER, "-f") as stranger:
        out, err = stranger.communicate(timeout=seconds(30))
        assert (stranger.returncode, out) == (4, "") and "needs viewer" in err
    with tail(d, VIEWER, "-n", "7", "--json") as newest:
        out, err = newest.communicate(timeout=seconds(30))
        assert (newest.returncode, err, len(out.splitlines())) == (0, "", 7)
    called = [json.loads(line)["data"] for line in written(d) if '"type":"control.called"' in line]
    verdicts = [(c["uid"], c["verdict"]) for c in called if c["verb"] == "audit.follow"]
    assert (VIEWER, "ok") in verdicts and (STRANGER, "denied") in verdicts


def trail_files_of(pid: int) -> list[str]:
    held = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            held.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return [name for name in held if "/log/isolator/audit" in name]


def raw(d: Daemon, **params: int) -> socket.socket:
    """A connection that asked to follow and reads nothing."""
    sock = socket.socket(socket.AF_UNIX)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(str(d.root / "run/isolator/control.sock"))
    request = {"jsonrpc": "2.0", "id": 1, "method": "audit.follow", "params": params}
    sock.sendall(json.dumps(request).encode() + b"\n")
    return sock


def test_who_reads_nothing_costs_no_memory_no_file_and_nobody_else_time(d: Daemon) -> None:
    emit(d, 3000)
    host = d.service_pid("host.service")
    before = resident(host)
    stalled = [raw(d, after=0) for _ in range(20)]
    wait_for(lambda: len([s for s in stalled if len(s.recv(64, socket.MSG_PEEK)) == 64]) == 20)
    # With its buffers full, a stream lets go of the file; nothing else here follows the trail.
    wait_for(lambda: not trail_files_of(host), what=lambda: trail_files_of(host))
    emit(d, 3000)
    assert resident(host) - before < 20 * 4 * BLOCK + (16 << 20)
    assert not trail_files_of(host)
    # Others follow meanwhile; and who begins to read again gets it all.
    upto = len(written(d))
    assert len(follow(d, upto, after=upto - 100)) == 100
    chain = reader_lines(stalled[0], upto)
    assert chain == written(d)[: len(chain)]
    for sock in stalled:
        sock.close()
    wait_for(lambda: not trail_files_of(host), what="a stream outlived its connection")


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def reader_lines(sock: socket.socket, upto: int) -> list[str]:
    """Everything that waits in a connection, up to record ``upto``."""
    lines: list[str] = []
    with sock.makefile("rb") as arriving:
        for data in arriving:
            message: dict[str, Any] = json.loads(data)
            lines += message.get("params", {}).get("lines", ())
            if lines and json.loads(lines[-1])["seq"] >= upto:
                return lines
    raise AssertionError("it ended")


def test_more_followers_than_there_may_be_are_refused(d: Daemon) -> None:
    held = [raw(d) for _ in range(40)]
    answers = [json.loads(sock.makefile().readline()) for sock in held]
    assert sum("result" in answer for answer in answers) == 32
    refused = [answer["error"]["message"] for answer in answers if "error" in answer]
    assert len(refused) == 8 and "32 callers follow" in refused[0]
    for sock in held:
        sock.close()
    wait_for(lambda: follow(d, 1, after=0) != [], what="the slots did not become free")


def test_followers_go_on_over_a_restart_of_the_daemon_and_miss_nothing() -> None:
    with daemon() as d:
        code = (
            "import asyncio, sys\nfrom host import PluginHost\n"
            "async def main():\n"
            "    async with PluginHost.connect(sys.argv[1]) as host:\n"
            "        async for recorded in host.audit(after=0):\n"
            "            print(recorded.line, flush=True)\n"
            "asyncio.run(main())\n"
        )
        library = subprocess.Popen([sys.executable, "-c", code, str(d.root)], stdout=subprocess.PIPE, text=True)
        command = ["isolator", "--root", str(d.root), "audit", "tail", "-f", "--after", "0", "--json"]
        tailing = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert library.stdout is not None and tailing.stdout is not None
            assert '"seq":1,' in library.stdout.readline() and '"seq":1,' in tailing.stdout.readline()
            d.stop()
            d.start()
            d.kill()
            d.start()
            emit(d, 1)
            # Of the daemon that was killed, and not of the one that was stopped, something may be missing.
            wait_for(lambda: [line for line in written(d) if '"type":"audit.gap"' in line])
            gaps = [json.loads(line)["data"] for line in written(d) if '"type":"audit.gap"' in line]
            assert [(gap["count"], "did not end by itself" in gap["why"]) for gap in gaps] == [(None, True)]
            last = len(written(d))
            for process in (library, tailing):
                seqs = [1]
                while seqs[-1] < last:
                    assert process.stdout is not None
                    seqs.append(json.loads(process.stdout.readline())["seq"])
                assert seqs == list(range(1, last + 1))
        finally:
            for process in (library, tailing):
                process.send_signal(signal.SIGKILL)
                process.communicate()
