"""tail, query, follow and the command line, on trails that the real writer made."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from host.cli.output import safe
from host.cli.root import cli
from isolator.audit import files, reader
from isolator.audit.log import Limits
from isolator.audit.record import Incoming, parse
from isolator.audit.story import collect
from isolator.errors import IsolatorError, NotFoundError, UsageError, printable
from tests.audit.any_record import any_record
from tests.audit.conftest import Daemon
from tests.audit.test_service import check, durable
from tests.audit.test_verify import TIME, Written

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to start a process under another user")
REPOSITORY = Path(__file__).resolve().parents[2]


def run(daemon: Daemon, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["--root", str(daemon.paths.root), "audit", *arguments])


async def filled(daemon: Daemon, count: int, **limits: int) -> None:
    await daemon.start(**limits)
    host = await daemon.source("host")
    for number in range(count):
        host.record(
            any_record("event.accepted", number=number, filler="x" * 100),
            plugin=f"p{number % 3}",
            event_id=f"e{number}",
        )
    await durable(host)


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("when", ["before", "behind"])
async def test_what_is_read_backwards_comes_once_though_its_file_becomes_full_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, call: int
) -> None:
    names = [files.rotated_name(1), files.LIVE]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(f"{2 * number + 1}\n{2 * number + 2}\n".encode())
    listed, calls = files.rotated, itertools.count(1)

    def rotated(directory: Path) -> list[Path]:
        found = listed(directory) if when == "behind" else []
        if next(calls) == call:
            (directory / files.LIVE).rename(directory / files.rotated_name(3))
            (directory / files.LIVE).write_bytes(b"5\n")
        return found or listed(directory)

    monkeypatch.setattr(files, "rotated", rotated)
    assert [*reader.backwards(tmp_path)][-4:] == [b"4", b"3", b"2", b"1"]


async def test_tail_shows_the_last_ones_over_several_files(daemon: Daemon) -> None:
    await filled(daemon, 400, rotate_size=20_000)
    await daemon.stop()
    assert len(files.rotated(daemon.paths.audit_log)) > 3
    total = len(daemon.records())
    found = [json.loads(line)["seq"] for line in run(daemon, "tail", "-n", "250", "--json").output.splitlines()]
    assert found == list(range(total - 249, total + 1))
    assert len(run(daemon, "tail", "-n", "9999").output.splitlines()) == total
    assert run(daemon, "tail", "-n", "0").output == ""


async def test_a_follower_sees_every_record_once_over_rotations_and_restarts(daemon: Daemon) -> None:
    await filled(daemon, 10, rotate_size=20_000)
    code = "import sys; from host.cli.main import main; main()"
    command = [sys.executable, "-c", code, "--root", str(daemon.paths.root), "audit", "tail", "-f", "-n", "5", "--json"]
    follower = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert follower.stdout is not None
    try:
        seen = [json.loads(await follower.stdout.readline())["seq"] for _ in range(5)]
        assert daemon.process is not None
        client = await daemon.source("host")
        for part in range(4):
            for number in range(200):
                client.record(any_record("event.accepted", number=number, filler="x" * 100))
            await durable(client)
            if part == 1:
                await daemon.kill()
                await daemon.start(rotate_size=20_000)
                await daemon.source("host", client)
        await daemon.stop()
        last = daemon.records()[-1]["seq"]
        while seen[-1] < last:
            seen.append(json.loads(await asyncio.wait_for(follower.stdout.readline(), 60))["seq"])
        assert seen == list(range(6, last + 1))
        # A reader that goes away ends it although nothing is written any more.
        follower._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
        await asyncio.wait_for(follower.wait(), 60)
    finally:
        if follower.returncode is None:
            follower.kill()
            await follower.wait()


async def test_a_follower_that_stands_still_holds_nobody_up(daemon: Daemon) -> None:
    await filled(daemon, 1, rotate_size=100_000)
    follower = reader.Follower(daemon.paths.audit_log, 0)
    host = await daemon.source("host")
    for number in range(5000):
        host.record(any_record("event.accepted", number=number, filler="x" * 100))
    await durable(host)
    await daemon.stop()
    seen = []
    while lines := follower.available():
        seen += [files.seq_of(line) for line in lines]
    follower.close()
    assert seen == list(range(1, daemon.records()[-1]["seq"] + 1))


class Overtaken(reader.Follower):
    """A follower that stands still, once, between choosing a file and opening it; ``meanwhile`` happens then."""

    meanwhile: Callable[[], None] | None = None

    def _choose(self) -> Path:
        chosen = super()._choose()
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return chosen


@pytest.mark.parametrize("after", [0, 7])
@pytest.mark.parametrize("rotations", [1, 2])
def test_a_rotation_between_choosing_a_file_and_opening_it_loses_nothing(
    tmp_path: Path, after: int, rotations: int
) -> None:
    written = Written(tmp_path, 10, Limits(seal_records=1000, rotate_size=20_000))
    directory = written.log
    assert not files.rotated(directory)

    def rotate() -> None:
        for number in range(1, rotations + 1):
            while len(files.rotated(directory)) < number:
                written.write(10)

    follower = Overtaken(directory, after)
    follower.meanwhile = rotate
    seen = []
    while lines := follower.available():
        seen += [files.seq_of(line) for line in lines]
    follower.close()
    assert follower.meanwhile is None and len(files.rotated(directory)) == rotations
    assert seen == list(range(after + 1, written.head[0] + 1))


def test_a_follower_goes_on_after_any_record(tmp_path: Path) -> None:
    written = Written(tmp_path, 1400, Limits())
    with written.live.open("ab") as file:
        file.write(b"x" * 100_000 + b"\n" + b"not finished")  # of somebody who may write there
    for after in range(0, 1400, 17):
        follower = reader.Follower(written.log, after)
        seen = [files.seq_of(line) for line in follower.available(10**6)]
        follower.close()
        assert seen == list(range(after + 1, written.head[0] + 1))


@pytest.mark.parametrize("torn", [b'{"seq":', b'{"seq":11,"time":"2026-01-01T00:00:00', bytes(200)])
def test_a_follower_of_a_file_whose_torn_end_was_written_anew_gets_every_record(tmp_path: Path, torn: bytes) -> None:
    """It was cut off and is longer than before by the time the follower looks again."""
    written = Written(tmp_path, 10, Limits())
    size = written.live.stat().st_size
    with written.live.open("ab") as file:
        file.write(torn)
    follower = reader.Follower(written.log, 0)
    seen = follower.available(10**6)
    os.truncate(written.live, size)
    written.write(20)
    seen += follower.available(10**6)
    follower.close()
    assert seen == b"".join(path.read_bytes() for path in files.trail(written.log)).splitlines()


def test_a_follower_of_a_file_that_lost_records_and_has_others_gets_every_one(tmp_path: Path) -> None:
    """A disk that died has lost what the follower had read; what took its place is shorter."""
    written = Written(tmp_path, 20, Limits(seal_records=1000))
    lines = written.live.read_bytes().splitlines(keepends=True)
    written.live.write_bytes(b"".join(lines[:10]))
    follower = reader.Follower(written.log, 0)
    seen = follower.available(10**6)
    others = [line.replace(b'"type":"event.accepted"', b'"type":"a.b"') for line in lines[8:]]
    written.live.write_bytes(b"".join((*lines[:8], *others)))
    seen += follower.available(10**6)
    follower.close()
    assert [files.seq_of(line) for line in seen] == list(range(1, len(lines) + 1))
    assert b"".join(line + b"\n" for line in seen[10:]) == b"".join(others[2:])


def test_line_that_breaks_the_chain_is_reported(tmp_path: Path) -> None:
    lines = Written(tmp_path, 30, Limits()).lines()
    other = Written(tmp_path / "other", 30, Limits(), start=1).lines()
    changed = lines[3].replace(b'"number":3', b'"number":9')
    for arriving, expected in (
        (lines, []),
        (lines[5:], []),
        ([lines[0], *lines[4:]], ["records 2 to 4 are missing"]),
        ([*lines[:5], lines[2]], ["record 3 stands after record 5"]),
        ([*lines[:3], *other[3:4]], ["record 4 does not continue"]),
        ([*lines[:3], changed], ["was changed after it was written"]),
    ):
        chain = reader.Continuity()
        found = [why for line in arriving if (why := chain.check(line))]
        assert len(found) == len(expected) and all(want in why for want, why in zip(expected, found, strict=True)), (
            found
        )
    assert "records 7 to 9" in str(reader.Continuity(6).check(lines[9]))


@pytest.mark.parametrize("block", [100, 1000, 1 << 20])
def test_search_finds_what_a_look_at_each_record_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(reader, "_SEARCHED", block)
    written = Written(tmp_path, 50, Limits(rotate_size=8000))
    spelled = {"seq": 1, "time": TIME, "type": "net.denied", "origin": "host", "plugin": "p"}
    for number, plugin in enumerate(("p", "p.q", None, 'a"b\\', "\u00fc", "p\x7f", "p")):
        for kind, data in (("net.denied", spelled), ("net.closed", {"event_ids": ["e1", "e2"]}), ("network.x", {})):
            time = TIME.replace("03:04", f"03:1{number}")
            written.append(Incoming(time, kind, plugin, event_id="e1" if number == 3 else None, data=data))
    with written.live.open("ab") as file:
        file.write(written.lines()[-1].replace(b'"plugin":null', b'"plugin":"p"')[:-80] + b"\n" + b'{"seq":9,"time":')
    every = [record for path in files.trail(written.log) for line in path.open("rb") if (record := parse(line))]
    moment = TIME.replace("03:04", "03:13")
    for plugin, types, event, since, until in itertools.product(
        ("p", 'a"b\\', "\u00fc", "p\x7f", "other", None),
        ((), ("net.denied",), ("net.*",), ("net.closed", "audit.*"), ("net.none",)),
        ("e1", "e7", "none", None),
        (moment, None),
        (moment, None),
    ):
        wanted = reader.Query(plugin, types, event, since, until)
        found = [record.seq for _, record in reader.query(written.log, wanted)]
        assert found == [record.seq for record in every if wanted.matches(record)], wanted


async def test_query_finds_by_plugin_type_event_time_and_number(daemon: Daemon) -> None:
    await daemon.start(rotate_size=20_000)
    host = await daemon.source("host")
    broker = await daemon.source("broker")
    for number in range(100):
        host.record(any_record("event.accepted", filler="x" * 200), plugin=f"p{number % 2}", event_id=f"e{number:03}")
    await durable(host)
    middle = daemon.records()[-1]["time"]
    broker.record(any_record("net.denied", name="net.connect"), plugin="p0", run="r", event_id="e007")
    broker.record(any_record("net.connect", event_ids=["e007", "e008"]), plugin="p1", run="r")
    await durable(broker)
    await daemon.stop()

    def found(*arguments: str) -> list[dict[str, object]]:
        result = run(daemon, "query", "--json", *arguments)
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.output.splitlines()]

    assert len(found("--plugin", "p0")) == 51
    assert [r["type"] for r in found("--type", "net.*")] == ["net.denied", "net.connect"]
    assert [r["type"] for r in found("--type", "net.connect")] == ["net.connect"]
    assert [r["type"] for r in found("--event", "e007")] == ["event.accepted", "net.denied", "net.connect"]
    assert len(found("--event", "e00")) == 12
    assert [r["event_id"] for r in found("--type", "event.accepted", "--limit", "2")] == ["e098", "e099"]
    assert len(found("--until", middle, "--type", "event.*")) == 100
    assert {r["type"] for r in found("--since", middle)} >= {"net.denied", "net.connect", "audit.seal"}
    assert len(found("--since", "1h", "--plugin", "p1")) == 51
    assert found("--until", "2020-01-01") == []
    mistyped = run(daemon, "query", "--type", "net.denie").exception
    assert isinstance(mistyped, UsageError) and mistyped.remedy == "did you mean net.denied?"
    assert isinstance(run(daemon, "query", "--type", "nets.*").exception, UsageError)
    nothing = run(daemon, "query", "--until", "2020-01-01")
    assert (nothing.stdout, nothing.stderr) == ("", "no record matches\n")
    for words in (("query", "--plugin", "p3"), ("query", "--event", "e2"), ("tail", "--plugin", "p3")):
        unknown = run(daemon, *words).exception
        assert isinstance(unknown, NotFoundError) and "the trail has no record of it" in str(unknown), words


async def test_story_takes_the_beginning_of_an_id(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    for name in ("ev_01a", "ev_02a", "ev_02b"):
        host.record(any_record("event.accepted", event="deploy.completed", plugins=[]), event_id=name)
    await durable(host)
    await daemon.stop()
    assert run(daemon, "story", "ev_01").output.splitlines()[0].startswith("ev_01a")
    several = run(daemon, "story", "ev_02").exception
    assert isinstance(several, UsageError) and "several ids begin so: ev_02a, ev_02b" in str(several)
    assert isinstance(run(daemon, "story", "ev_03").exception, NotFoundError)


async def test_verify_on_the_command_line(daemon: Daemon) -> None:
    await filled(daemon, 400, rotate_size=20_000)
    await daemon.stop()
    good = run(daemon, "verify")
    assert good.exit_code == 0
    assert "The trail fits together" in good.output
    assert "nothing is after it" in good.output
    report = json.loads(run(daemon, "verify", "--json").output)
    assert report["ok"] and report["records"] == len(daemon.records())
    one = files.rotated(daemon.paths.audit_log)[1]
    assert run(daemon, "verify", str(one)).exit_code == 0
    assert run(daemon, "verify", "--anchor", f"{report['seal']}:{report['seal_hash']}").exit_code == 0
    wrong = run(daemon, "verify", "--anchor", "5:" + "0" * 64)
    assert isinstance(wrong.exception, IsolatorError)
    assert "record 5" in str(wrong.exception)
    # A file in the middle is taken away.
    one.rename(daemon.paths.root / "gone")
    missing = run(daemon, "verify")
    assert isinstance(missing.exception, IsolatorError) and missing.exception.exit_code == 1
    assert "missing before it" in str(missing.exception)
    assert run(daemon, "verify", "--json").exit_code == 1


async def test_verify_notices_an_older_copy_put_in_place(daemon: Daemon) -> None:
    await filled(daemon, 10)
    await daemon.stop()
    old = daemon.paths.audit_file.read_bytes()
    await filled(daemon, 10)
    await daemon.stop()
    assert run(daemon, "verify").exit_code == 0
    for key, says in (("/nowhere", "there is no /nowhere"), ("/", "/ is a folder")):
        assert says in str(run(daemon, "verify", "--key", key).exception)
    daemon.paths.audit_file.write_bytes(old)
    assert "older copy" in str(run(daemon, "verify").exception)
    assert not check(daemon).misfits  # which the file alone could not tell


async def test_missing_trail_is_an_error(daemon: Daemon) -> None:
    for command in ("tail", "verify", "query"):
        assert isinstance(run(daemon, command).exception, NotFoundError)


async def test_a_terminal_gets_nothing_but_visible_characters(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    nasty = "\x1b]0;x\x07\x1b[31m\u202etxt.exe\u2066\u200b\u3164\x9b2J\r\nforged seq=1 type=\u05d0\x7f"
    host.record(any_record("plugin.health", text=nasty, **{nasty: [nasty, {"a": nasty}]}), plugin=nasty, event_id=nasty)
    await durable(host)
    await daemon.stop()
    for command in (["tail"], ["query"], ["story", nasty]):
        result = run(daemon, *command)
        assert result.exit_code == 0
        assert all(printable(line) == line for line in result.output.splitlines())
        assert all(c.isascii() for c in result.output)
    assert len(run(daemon, "tail").output.splitlines()) == 2
    assert printable("déjà vu 日本語 ok") == "déjà vu 日本語 ok"


@pytest.mark.parametrize("shown", [safe, lambda text: str(IsolatorError(text)), printable])
@pytest.mark.parametrize(
    "text", ["\x1b]0;x\x07", "\u202e", "\u05d0", "\u0645", "a\u0301", "\u3164", "\u200b", "\x9b2J", "\n"]
)
def test_nobodys_text_reorders_or_steers_a_line(shown: Callable[[str], str], text: str) -> None:
    assert shown(text).isascii() and shown(text).isprintable()
    assert shown("Grüße, 日本") == "Grüße, 日本"


def test_story_with_a_time_holds_nothing_from_long_before(tmp_path: Path) -> None:
    written = Written(tmp_path, 100, Limits(rotate_size=20_000))
    accepted = datetime.now(UTC)
    moment = accepted.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    written._add([Incoming(moment, "event.accepted", event_id="e0", data={})])
    assert len(reader.trail_files(written.log)) == 2
    assert len(collect(written.log, "e0")) == 2
    assert len(collect(written.log, "e0", since=accepted.timestamp() + 60)) == 1  # the clock was set meanwhile


async def test_line_of_an_emission_gives_each_of_its_values_a_name_of_its_own(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    host.record(any_record("event.accepted", event="deploy.completed"), event_id="ev_1")
    await durable(host)
    await daemon.stop()
    line = next(line for line in run(daemon, "tail").output.splitlines() if "ev_1" in line)
    names = [word.partition("=")[0] for word in line.split() if "=" in word]
    assert names == ["event_id", "event"]


def test_trail_or_key_in_a_folder_that_the_caller_may_not_enter_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    hidden = str(tmp_path / "hidden")
    program = "import os; os.setuid(65534); from host.cli.main import main; main()"
    for words in ((hidden,), ("/dev/null", "--key", hidden)):
        command = [sys.executable, "-c", program, "audit", "verify", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (1, f"isolator: audit trail: {hidden} may not be read; run as root\n")
