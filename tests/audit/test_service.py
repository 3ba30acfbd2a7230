"""The writer process, from outside: acknowledged records are on disk, in order, tagged, each of its own source."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import time
from typing import Any

import pytest

from isolator.audit import files
from isolator.audit.client import AuditClient, utc_now
from isolator.audit.recover import HEAD_NAME
from isolator.audit.seal import load_public
from isolator.audit.source import Source
from isolator.audit.verify import Report, verify
from isolator.ipc.packet import pair
from tests.audit.any_record import any_record
from tests.audit.conftest import UID, Daemon

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to start a process under another user")


def check(daemon: Daemon) -> Report:
    return verify(files.trail(daemon.paths.audit_log), load_public(daemon.paths.audit_log / "public.pem"))


async def durable(client: AuditClient) -> None:
    async with asyncio.timeout(20):
        await client.durable()


async def test_acknowledged_records_are_on_disk_and_fit(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    for number in range(2500):
        host.record(any_record("event.accepted", bytes=number), event_id=f"e{number}")
    await durable(host)
    # Acknowledged means written: before any stop or flush.
    assert [r["data"]["bytes"] for r in daemon.of_type("event.accepted")] == list(range(2500))
    assert await daemon.stop() == 0
    report = check(daemon)
    assert not report.misfits
    assert report.seals == 3  # two for the thousands, one at the stop
    assert report.unsealed == 0
    assert [r["seq"] for r in daemon.records()] == list(range(1, 2504))


async def test_records_that_trickle_in_share_commits(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    acknowledged, began = {0}, time.monotonic()
    for number in range(200):
        host.record(any_record("event.accepted"), event_id=str(number), urgent=True)
        await asyncio.sleep(0.001)
        acknowledged.add(host.acked)
    commits = len(acknowledged) - 1
    assert 0 < commits <= (time.monotonic() - began) / 0.005 + 2
    await durable(host)
    assert [r["event_id"] for r in daemon.of_type("event.accepted")] == [str(number) for number in range(200)]


async def test_the_files_belong_to_the_writer_and_the_key_to_it_alone(daemon: Daemon) -> None:
    await daemon.start()
    await daemon.stop()
    key = (daemon.paths.audit_lib / "seal.key").stat()
    assert (key.st_uid, key.st_mode & 0o777) == (UID, 0o600)
    assert daemon.paths.audit_file.stat().st_mode & 0o777 == 0o640
    assert (daemon.paths.audit_log / "public.pem").stat().st_mode & 0o777 == 0o644


SUPERVISORS = [
    *(f"plugin.{what}" for what in ("added", "approved", "removed", "started", "stopped", "crashed", "failed")),
    "host.started", "host.stopped", "resources", "syscall.denied", "fs.denied", "audit.seal",
]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "own", "foreign"),
    [
        ("broker", "net.query", [*SUPERVISORS, "event.response", "api.called", "control.called", "plugin.health"]),
        ("host", "event.accepted", [*SUPERVISORS, "net.connect", "net.denied", "plugin.health.x"]),
        ("supervisor", "plugin.started", ["audit.seal", "audit.other"]),
    ],
)
async def test_source_writes_only_its_own_record_types(
    daemon: Daemon, source: str, own: str, foreign: list[str]
) -> None:
    """Whatever a source claims: the writer fills in its name, and a refused record leaves a gap."""
    await daemon.start()
    client = await daemon.source(source)
    client.record(any_record(own, origin="supervisor:00000000:1"), plugin="a")
    for type in foreign:
        client.record(any_record(type, pid=1, origin="supervisor:00000000:1", signature="00"), plugin="a")
    await durable(client)
    await daemon.stop()
    records = daemon.records()
    assert [r["type"] for r in records] == [own, *["audit.gap"] * len(foreign), "audit.seal"]
    assert [g["data"]["why"] for g in daemon.of_type("audit.gap")] == [
        f"refused: the {source} may not send {type}" for type in foreign
    ]
    assert {r["origin"].partition(":")[0] for r in records} == {source, "audit"}
    assert not check(daemon).misfits


async def test_record_that_is_too_long_leaves_a_gap(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    host.record(any_record("event.response", response="short"), plugin="n" * 300_000, run="r")
    await durable(host)  # what is sent in its place is short, or the sender would lose its writer
    (gap,) = daemon.of_type("audit.gap")
    assert (gap["plugin"], gap["run"]) == ("n" * 256, "r") and "too long for a record" in gap["data"]["why"]
    host.record(any_record("event.response", response="x" * (1 << 20)), plugin="p")
    host.record(any_record("event.response", response="x" * 100_000), plugin="p")
    await durable(host)
    await daemon.stop()
    _, gap = daemon.of_type("audit.gap")
    assert gap["data"]["count"] == 1 and "too long for a record" in gap["data"]["why"]
    (kept,) = daemon.of_type("event.response")
    assert kept["cut"]["data.response"]["bytes"] == 100_000


async def test_lines_that_are_no_records_are_counted_and_the_source_goes_on(daemon: Daemon) -> None:
    await daemon.start()
    assert daemon.channel is not None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            await daemon.channel.call("source", name="host", fds=[theirs.fileno()], timeout=5)
        good = json.dumps({"time": utc_now(), "type": "api.called", "data": {"ok": True}}).encode()
        bad = [
            b"",
            b"\xff\xfe",
            b"[]",
            b"{}",
            b'{"type":"api.called"}',
            good.replace(b"true", b"NaN"),
            good.replace(b"true", b"[" * 5000 + b"]" * 5000),
            good.replace(b"true", b"[" * 40 + b"]" * 40),
            good.replace(b"true", b"1" * 5000),
            good.replace(b"api.called", b"api.called\\n"),
            good.replace(b'"type"', b'"run": 7, "type"'),
        ]
        ours.send(b"\n".join([good, *bad, good]))
        await daemon.flush()
    await daemon.stop()
    assert len(daemon.of_type("api.called")) == 2
    assert sum(g["data"]["count"] for g in daemon.of_type("audit.gap")) == len(bad)
    assert not check(daemon).misfits


async def test_text_of_plugins_is_capped_escaped_and_one_string(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    nasty = '\x1b[2J\x7f\u202e\u200b\ud800"\n{"seq":99,"hash":"0"}\r\u2028é'
    host.record(any_record("plugin.health", text=nasty, long="ü" * 5000, inner=["x" * 5000]), plugin="p")
    await durable(host)
    await daemon.stop()
    raw = daemon.paths.audit_file.read_bytes()
    assert all(32 <= byte < 127 or byte == 10 for byte in raw)
    assert raw.count(b"\n") == 2
    record = daemon.of_type("plugin.health")[0]
    assert record["data"]["text"] == nasty.replace("\ud800", "\ufffd")
    assert len(record["data"]["long"].encode()) <= 4096
    assert record["cut"]["data.long"]["bytes"] == 10000
    assert record["cut"]["data.inner.0"]["bytes"] == 5000
    assert not check(daemon).misfits


async def test_identifier_of_any_length_is_on_record(daemon: Daemon) -> None:
    """A refused caller may name a plugin as it likes; its refusal is recorded, not turned into a gap."""
    await daemon.start()
    host = await daemon.source("host")
    names = ["n" * 256, "n" * 257, "\u00fc" * 5_000]
    for name in names:
        refused = any_record("control.called", verb="plugin.stop", uid=1, pid=1, role=None, verdict="denied")
        host.record(refused, plugin=name, run=name, event_id=name, delivery_id=name)
    await durable(host)
    await daemon.stop()
    assert not daemon.of_type("audit.gap")
    records = daemon.of_type("control.called")
    for key in ("plugin", "run", "event_id", "delivery_id"):
        assert [r[key] for r in records] == [name[:256] for name in names]
        cut = [r.get("cut", {}).get(key) for r in records]
        assert cut[0] is None
        for name, note in zip(names[1:], cut[1:], strict=True):
            raw = name.encode()
            assert note == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert not check(daemon).misfits


async def test_the_event_in_flight_is_found_in_whatever_order_the_sockets_are_read(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    broker = await daemon.source("broker")
    assert daemon.process is not None
    # The writer is stopped, so that all of this waits in its sockets and only its own order decides.
    daemon.process.send_signal(signal.SIGSTOP)
    broker.record(any_record("net.query", name="before"), plugin="p", run="r", urgent=True)
    host.record(any_record("event.dispatched"), plugin="p", run="r", event_id="e1", delivery_id="d1", urgent=True)
    broker.record(any_record("net.connect", name="first", flow="f1"), plugin="p", run="r", urgent=True)
    broker.record(any_record("net.connect", name="other plugin"), plugin="q", run="r2", urgent=True)
    host.record(any_record("event.dispatched"), plugin="p", run="r", event_id="e2", delivery_id="d2", urgent=True)
    broker.record(any_record("net.denied", name="both"), plugin="p", run="r", urgent=True)
    host.record(
        any_record("event.response", outcome="ok"), plugin="p", run="r", event_id="e1", delivery_id="d1", urgent=True
    )
    broker.record(any_record("net.denied", name="second"), plugin="p", run="r", urgent=True)
    host.record(
        any_record("event.response", outcome="ok"), plugin="p", run="r", event_id="e2", delivery_id="d2", urgent=True
    )
    broker.record(any_record("net.closed", name="first", flow="f1"), plugin="p", run="r", urgent=True)
    broker.record(any_record("net.denied", name="after"), plugin="p", run="r", urgent=True)
    daemon.process.send_signal(signal.SIGCONT)
    await durable(host)
    await durable(broker)
    found = {
        (r["type"], r["data"]["name"]): (r["event_id"], r["delivery_id"], r["data"].get("event_ids"))
        for r in daemon.records()
        if r["type"].startswith("net.")
    }
    assert found == {
        ("net.query", "before"): (None, None, None),
        ("net.connect", "first"): ("e1", "d1", None),
        ("net.connect", "other plugin"): (None, None, None),
        ("net.denied", "both"): (None, None, ["e1", "e2"]),
        ("net.denied", "second"): ("e2", "d2", None),
        ("net.closed", "first"): ("e1", "d1", None),
        ("net.denied", "after"): (None, None, None),
    }


async def test_a_new_writer_goes_on_with_the_chain_and_the_deliveries_in_flight(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    host.record(any_record("event.dispatched"), plugin="p", run="r", event_id="e1", delivery_id="d1")
    await durable(host)
    await daemon.kill()
    host.record(any_record("event.accepted"), event_id="e2")
    await daemon.start()
    broker = await daemon.source("broker")
    broker.record(any_record("net.connect", name="x"), plugin="p", run="r")
    await daemon.source("host", host)
    await durable(host)
    await durable(broker)
    await daemon.stop()
    assert daemon.of_type("net.connect")[0]["event_id"] == "e1"
    assert len(daemon.of_type("event.accepted")) == 1
    assert not check(daemon).misfits
    assert not daemon.of_type("audit.gap")


async def test_records_of_a_killed_sender_have_passed_once_the_next_one_is_acknowledged(daemon: Daemon) -> None:
    await daemon.start()
    before = await daemon.source("host")
    for number in range(3000):
        before.record(any_record("event.accepted", bytes=number))
        if number % 100 == 0:
            before.flush()
            await asyncio.sleep(0)
    before.flush()
    before.close()
    after = await daemon.source("host")
    async with asyncio.timeout(20):
        await after.passed()
    assert len(daemon.of_type("event.accepted")) == before.sent > 1000
    assert not after.unacknowledged and not daemon.of_type("audit.gap")
    await daemon.stop()


async def test_writer_killed_at_random_loses_and_repeats_no_acknowledged_record(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    sent = 0
    for round in range(8):
        end = time.monotonic() + 0.05 + 0.02 * round
        while time.monotonic() < end:
            for _ in range(50):
                host.record(any_record("event.accepted", number=sent, filler="x" * 300), event_id=f"e{sent}")
                sent += 1
            await asyncio.sleep(0)
            if sent - host.acked > 5000:
                await host.durable(within=2500)
        await daemon.kill()
        await daemon.start()
        await daemon.source("host", host)
    await durable(host)
    await daemon.stop()
    assert [r["data"]["number"] for r in daemon.of_type("event.accepted")] == list(range(sent))
    report = check(daemon)
    assert not report.misfits
    assert all("torn" in g["why"] for g in report.gaps)


@pytest.mark.parametrize("keep", [1, 40, 200, -2])
async def test_a_torn_last_line_is_cut_off_and_recorded(daemon: Daemon, keep: int) -> None:
    await daemon.start()
    host = await daemon.source("host")
    host.record(any_record("event.accepted"), event_id="e1")
    await durable(host)
    await daemon.kill()
    line = daemon.paths.audit_file.read_bytes().splitlines()[0]
    with daemon.paths.audit_file.open("ab") as file:
        file.write(line.replace(b'"seq":1', b'"seq":2')[:keep])  # a write that did not get to its end
    await daemon.start()
    await daemon.stop()
    gap = daemon.of_type("audit.gap")
    assert [g["data"]["why"] for g in gap] == ["torn last record: its writer died in the middle of writing it"]
    assert not check(daemon).misfits


async def test_records_removed_while_nobody_wrote_are_named_for_ever(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    for number in range(10):
        host.record(any_record("event.accepted"), event_id=f"e{number}")
    await durable(host)
    await daemon.kill()
    lines = daemon.paths.audit_file.read_bytes().splitlines(keepends=True)
    daemon.paths.audit_file.write_bytes(b"".join(lines[:6]))
    await daemon.start()
    await daemon.source("host", host)
    host.record(any_record("event.accepted"), event_id="later")
    await durable(host)
    await daemon.stop()
    gap = daemon.of_type("audit.gap")[0]
    assert (gap["seq"], gap["data"]["count"]) == (11, 4)
    report = check(daemon)
    assert report.misfits[0].seq == 11
    assert "records 7 to 10 are missing" in report.misfits[0].why


async def test_a_forged_end_is_not_built_upon(daemon: Daemon) -> None:
    """Somebody without the key rewrites the last, not yet sealed records, hashes and all, while the writer is down."""
    await daemon.start()
    host = await daemon.source("host")
    for number in range(5):
        host.record(any_record("event.accepted"), event_id=f"e{number}")
    await durable(host)
    await daemon.kill()
    from tests.audit.tamper import rechain

    lines = daemon.paths.audit_file.read_bytes().splitlines()
    lines[2] = lines[2].replace(b'"e2"', b'"xx"')
    daemon.paths.audit_file.write_bytes(b"".join(line + b"\n" for line in rechain(lines)))
    await daemon.start()
    await daemon.stop()
    assert "rewritten" in daemon.of_type("audit.gap")[0]["data"]["why"]
    assert check(daemon).misfits[0].seq == 6


@pytest.mark.parametrize(
    "mark", [{"type": "audit.seal", "origin": "audit"}, {"x": {"type": "audit.seal", "origin": "audit"}}]
)
async def test_record_that_holds_the_mark_of_a_seal_is_taken_for_none(daemon: Daemon, mark: dict[str, Any]) -> None:
    """A nested object spells the very bytes with which a seal begins; the next writer goes on after the record."""
    await daemon.start(seal_records=8)
    host = await daemon.source("host")
    for number in range(10):
        host.record(any_record("event.accepted", number=number, extra=mark if number == 9 else None))
    await durable(host)
    await daemon.kill()
    await daemon.start(seal_records=8)
    await daemon.source("host", host)
    host.record(any_record("event.accepted", number=10))
    await durable(host)
    await daemon.stop()
    assert [r["data"]["number"] for r in daemon.of_type("event.accepted")] == list(range(11))
    assert not check(daemon).misfits
    assert not daemon.of_type("audit.gap")


async def test_head_is_readable_only_for_the_writer(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    host.record(any_record("event.accepted"), event_id="e")
    await durable(host)
    head = json.loads((daemon.paths.audit_lib / HEAD_NAME).read_text())
    assert head["hash"] == daemon.records()[0]["hash"]
    assert (daemon.paths.audit_lib / HEAD_NAME).stat().st_mode & 0o077 == 0


async def test_signals_to_the_whole_group_do_not_end_it_before_the_others(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    daemon.process.send_signal(signal.SIGINT)
    host.record(any_record("event.accepted"), event_id="last")
    await durable(host)
    assert await daemon.stop() == 0
    assert len(daemon.of_type("event.accepted")) == 1


async def test_records_in_the_sockets_are_written_before_the_end(daemon: Daemon) -> None:
    await daemon.start()
    host = await daemon.source("host")
    assert daemon.process is not None and daemon.channel is not None
    daemon.process.send_signal(signal.SIGSTOP)
    for number in range(100):
        host.record(any_record("event.accepted", number=number), urgent=True)
    daemon.channel.close()
    daemon.process.send_signal(signal.SIGCONT)
    assert await daemon.wait() == 0
    assert len(daemon.of_type("event.accepted")) == 100


@pytest.mark.parametrize("fault", ["mode", "garbage", "missing", "symlink"])
async def test_a_key_that_cannot_be_trusted_is_replaced_and_both_verify(daemon: Daemon, fault: str) -> None:
    await daemon.start()
    await daemon.stop()
    await daemon.start()
    host = await daemon.source("host")
    host.record(any_record("event.accepted"), event_id="1")
    await durable(host)
    await daemon.stop()
    key = daemon.paths.audit_lib / "seal.key"
    if fault == "mode":
        key.chmod(0o644)
    elif fault == "garbage":
        key.write_bytes(b"no key")
    elif fault == "missing":
        key.unlink()
    else:
        key.rename(key.with_name("elsewhere"))
        key.symlink_to("elsewhere")
    await daemon.start()
    await daemon.stop()
    assert "the signing key" in daemon.of_type("audit.gap")[0]["data"]["why"]
    report = check(daemon)
    assert not report.misfits
    assert len(report.keys) == 2


async def test_a_source_that_does_not_read_its_answers_gets_the_last_one(daemon: Daemon) -> None:
    await daemon.start()
    assert daemon.channel is not None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            await daemon.channel.call("source", name="host", fds=[theirs.fileno()], timeout=5)
        line = json.dumps({"time": utc_now(), "type": "api.called"}).encode()
        for _ in range(1000):  # far more answers than the socket holds
            ours.send(line)
            await daemon.flush()
        ours.setblocking(False)
        last = 0
        async with asyncio.timeout(10):
            while last < 1000:
                try:
                    last = max(last, json.loads(ours.recv(4096)).get("acked", 0))
                except BlockingIOError:
                    await asyncio.sleep(0.01)


@pytest.mark.parametrize("records_after", [0, 20, 3000])
async def test_the_next_writer_knows_which_runs_have_no_end(daemon: Daemon, records_after: int) -> None:
    """From the records after the last seal, from the seal itself, and from that of a full file."""
    await daemon.start(seal_records=16, rotate_size=65536)
    supervisor = await daemon.source("supervisor")
    for run, plugin in (("r1", "one"), ("r2", "two"), ("r3", "three")):
        supervisor.record(any_record("plugin.started"), plugin=plugin, run=run)
    supervisor.record(any_record("plugin.stopped"), plugin="two", run="r2")
    supervisor.record(any_record("plugin.crashed"), plugin="three", run="r3")
    for number in range(records_after):
        supervisor.record(any_record("resources", number=number), plugin="one", run="r1")
    await durable(supervisor)
    await daemon.kill()
    assert (len(files.rotated(daemon.paths.audit_log)) > 2) == (records_after > 100)
    await daemon.start()
    assert daemon.hello["runs"] == {"r1": "one"}
    assert not check(daemon).misfits


async def test_records_of_a_sender_that_ends_before_it_has_read_all_answers_are_taken() -> None:
    """The kernel tells of the answers that it has not read ahead of the records that it has sent."""
    ours, theirs = pair()
    ours.setblocking(False)
    source = Source("host", ours)
    source.report(acked=1, blocked=None, alarm=None)
    for packet in (b"2", b"3"):
        theirs.send(packet)
    theirs.close()
    assert [source.receive() for _ in range(3)] == [b"2", b"3", None] and not source.open
    source.close()
