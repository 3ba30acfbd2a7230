"""The disk fails in every way that can be arranged; acknowledged records stay, and the writer recovers by itself."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isolator.audit import files
from isolator.audit.client import AuditClient
from tests.audit.any_record import any_record
from tests.audit.conftest import UID, Daemon
from tests.audit.storage_faults import FAULTS
from tests.audit.test_service import check, durable
from tests.support.timeouts import seconds

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("fault", FAULTS)
def test_disk_fault(fault: str, code: Path) -> None:
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.audit.storage_faults"]
    done = subprocess.run(
        [*command, fault, str(code)], cwd=REPOSITORY, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


async def fill(daemon: Daemon, count: int) -> None:
    host = await daemon.source("host")
    for number in range(count):
        host.record(any_record("event.accepted", number=number, filler="x" * 200))
    await durable(host)


async def test_every_full_file_verifies_alone_and_ends_with_a_seal(daemon: Daemon) -> None:
    await daemon.start(rotate_size=65536)
    await fill(daemon, 1000)
    await daemon.stop()
    full = files.rotated(daemon.paths.audit_log)
    assert len(full) > 4
    for path in full:
        line = files.last_line(path)
        assert line is not None and b'"type":"audit.seal"' in line
        assert files.first_of(path) == files.seq_of(files.first_line(path))
    assert not check(daemon).misfits


async def test_retention_removes_files_under_seal(daemon: Daemon) -> None:
    await daemon.start(rotate_size=65536, keep_files=3)
    for _ in range(5):
        await fill(daemon, 400)
    await daemon.stop()
    assert len(files.rotated(daemon.paths.audit_log)) == 3
    report = check(daemon)
    assert not report.misfits
    assert report.first > 1 and report.retired == report.first - 1
    # Removing one more by hand is not explained by any record.
    files.rotated(daemon.paths.audit_log)[0].unlink()
    assert "no sealed retention record" in check(daemon).misfits[0].why


async def test_an_old_file_is_rotated_whatever_its_size(daemon: Daemon) -> None:
    await daemon.start(rotate_age=0.2)
    await fill(daemon, 10)
    await asyncio.sleep(0.3)
    await fill(daemon, 10)
    await daemon.stop()
    assert len(files.rotated(daemon.paths.audit_log)) >= 1
    assert not check(daemon).misfits


@pytest.mark.parametrize("how", ["removed", "replaced", "symlink"])
async def test_the_live_file_is_restored_when_somebody_takes_its_name(daemon: Daemon, how: str) -> None:
    victim = daemon.paths.root / "victim"
    victim.write_text("of somebody else\n")
    victim.chmod(0o666)
    await daemon.start()
    await fill(daemon, 50)
    live = daemon.paths.audit_file
    if how == "removed":
        live.unlink()
    elif how == "replaced":
        live.rename(live.with_name("old"))
        live.write_text("something else\n")
    else:
        live.rename(live.with_name("old"))
        live.symlink_to(victim)
    await fill(daemon, 50)
    await daemon.stop()
    assert victim.read_text() == "of somebody else\n"
    assert live.is_file() and not live.is_symlink()
    assert len(daemon.of_type("event.accepted")) == 100
    assert "restored" in daemon.of_type("audit.gap")[0]["data"]["why"]
    assert not check(daemon).misfits


WHILE_DOWN = {
    "deleted": "cut or changed",
    "emptied": "cut or changed",
    "older": "cut or changed",
    "symlink": "was not a regular file",
    "folder": "was not a regular file",
    "fifo": "was not a regular file",
    "mode": "",
    "owner": "",
    "no head": "note of its last record was missing",
    "bad head": "note of its last record was missing",
    "head symlink": "note of its last record was missing",
    "public key": "was not the writer's",
    "key owner": "the signing key belonged to uid 0",
    "key folder": "the signing key was not a regular file",
    "key fifo": "the signing key was not a regular file",
    "public folder": "",
    "own public fifo": "",
    "head folder": "note of its last record was missing",
    "head fifo": "note of its last record was missing",
    "long head": "note of its last record was missing",
    "full folder": "",
    "full fifo": "",
}
"""Changes of the files while nobody writes them, and the text of the record of each."""
PLACES = {
    "key folder": "var/lib/isolator/audit/seal.key",
    "key fifo": "var/lib/isolator/audit/seal.key",
    "public folder": "var/log/isolator/audit/public.pem",
    "own public fifo": "var/lib/isolator/audit/public.pem",
    "head folder": "var/lib/isolator/audit/head.json",
    "head fifo": "var/lib/isolator/audit/head.json",
    "full folder": "var/log/isolator/audit/audit.000000000001.jsonl",
    "full fifo": "var/log/isolator/audit/audit.000000000001.jsonl",
}
"""What has another thing in its place."""


@pytest.mark.parametrize("how", WHILE_DOWN)
async def test_change_of_the_files_while_nobody_wrote_them_is_recorded(daemon: Daemon, how: str) -> None:
    await daemon.start()
    await fill(daemon, 20)
    await daemon.stop()
    live, head = daemon.paths.audit_file, daemon.paths.audit_lib / "head.json"
    older = live.read_bytes()
    await daemon.start()
    await fill(daemon, 20)
    await daemon.stop()
    victim = daemon.paths.root / "victim"
    victim.write_text("of somebody else\n")
    victim.chmod(0o666)
    match how:
        case "deleted":
            live.unlink()
        case "emptied":
            os.truncate(live, 0)
        case "older":
            live.write_bytes(older)
        case "symlink":
            live.rename(live.with_name("elsewhere"))
            live.symlink_to(victim)
        case "folder":
            live.unlink()
            live.mkdir()
        case "fifo":
            live.unlink()
            os.mkfifo(live)
        case "mode":
            live.chmod(0o666)
        case "owner":
            os.chown(live, 0, 0)
            live.chmod(0o600)
        case "no head":
            head.unlink()
        case "bad head":
            head.write_bytes(b'{"seq": "x"')
        case "head symlink":
            head.unlink()
            head.symlink_to(victim)
        case "public key":
            (daemon.paths.audit_log / "public.pem").write_text("of somebody else\n")
        case _ if how in PLACES:
            place = daemon.paths.root / PLACES[how]
            place.unlink(missing_ok=True)
            if how.endswith("folder"):
                place.mkdir()
            else:
                os.mkfifo(place)
        case "long head":
            head.write_bytes(b"[" * (1 << 20))
        case "key owner":
            os.chown(daemon.paths.audit_lib / "seal.key", 0, 0)
            (daemon.paths.audit_lib / "seal.key").chmod(0o644)
    await daemon.start()
    if how == "owner":
        # Not its file any more: the fault is reported, and the writer goes on without a restart once that is mended.
        assert "Permission denied" in daemon.hello["blocked"]
        os.chown(live, UID, UID)
    host = await daemon.source("host")
    await until_writable(host)
    for number in range(5):
        host.record(any_record("event.accepted", number=number))
    await durable(host)
    await daemon.stop()
    if how.startswith("full "):  # in nobody's way, but in that of the test
        place.rmdir() if how == "full folder" else place.unlink()
    assert victim.read_text() == "of somebody else\n"
    assert live.is_file() and not live.is_symlink() and live.stat().st_mode & 0o777 == 0o640
    reasons = [gap["data"]["why"] for gap in daemon.of_type("audit.gap")]
    assert any(WHILE_DOWN[how] in why for why in reasons) if WHILE_DOWN[how] else reasons == [], reasons
    lost = how in ("deleted", "emptied", "older", "symlink", "folder", "fifo")
    report = check(daemon)
    assert bool(report.misfits) == lost
    assert report.last == 42 + 5 + 1 + len(reasons)


async def until_writable(client: AuditClient) -> None:
    async with asyncio.timeout(seconds(20)):
        await client.writable()


async def test_bytes_of_somebody_else_are_cut_off(daemon: Daemon) -> None:
    await daemon.start()
    await fill(daemon, 5)
    with daemon.paths.audit_file.open("ab") as file:
        file.write(b'{"seq":6,"type":"forged"}\n')
    await fill(daemon, 5)
    await daemon.stop()
    assert daemon.of_type("audit.gap")[0]["data"]["text"].startswith('{"seq":6')
    assert not check(daemon).misfits


async def test_a_file_that_is_cut_while_in_use_is_named(daemon: Daemon) -> None:
    await daemon.start()
    await fill(daemon, 20)
    lines = daemon.paths.audit_file.read_bytes().splitlines(keepends=True)
    os.truncate(daemon.paths.audit_file, len(b"".join(lines[:12])))
    await fill(daemon, 5)
    await daemon.stop()
    assert daemon.of_type("audit.gap")[0]["data"]["count"] == 8
    assert "records 13 to 20 are missing" in check(daemon).misfits[0].why


async def test_a_trail_cut_at_any_byte_of_its_last_records_starts_again(daemon: Daemon) -> None:
    """Power cut: whatever length of the last, never acknowledged write reached the disk."""
    await daemon.start()
    await fill(daemon, 3)
    await daemon.kill()
    whole = daemon.paths.audit_file.read_bytes()
    head = daemon.paths.audit_lib / "head.json"
    lines = whole.splitlines(keepends=True)
    # The state before the last two records had been committed.
    from isolator.audit.files import hash_of
    from isolator.audit.log import Limits, Trail

    keep = len(lines[0])
    for length in range(keep, len(whole) + 1):
        daemon.paths.audit_file.write_bytes(whole[:length])
        head.write_text(f'{{"seq":1,"hash":"{hash_of(lines[0][:-1])}"}}')
        trail = Trail(daemon.paths.audit_log, daemon.paths.audit_lib, Limits())
        os.chown(daemon.paths.audit_lib / "seal.key", 0, 0)
        state, _ = trail.open()
        trail.close()
        expected = sum(1 for i in range(len(lines)) if len(b"".join(lines[: i + 1])) <= length)
        assert state.seq == expected
        assert [note.why[:16] for note in trail.notes] == (["torn last record"] if length > state.size else [])
        assert daemon.paths.audit_file.read_bytes() == b"".join(lines[:expected])
