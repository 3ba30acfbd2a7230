"""Lines of the journal: each of its priority, first denials only, and no plugin fills it."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from isolator.audit.notable import BURST, Notable
from isolator.audit.record import Incoming


@pytest.fixture
def notable(caplog: pytest.LogCaptureFixture) -> Notable:
    caplog.set_level(logging.DEBUG)
    return Notable(logging.getLogger("tests.notable"))


def _record(type: str, plugin: str | None = "web", **data: Any) -> Incoming:
    return Incoming("2026-01-01T00:00:00.000000Z", type, plugin, data=data)


@pytest.mark.parametrize(
    ("record", "level", "text"),
    [
        (_record("plugin.crashed", cause="signal", signal=11), "WARNING", "plugin web: ended: signal"),
        (_record("plugin.failed", reason="5 crashes"), "ERROR", "plugin web: failed: 5 crashes; isolator plugin start"),
        (_record("plugin.pending", version="2.0"), "WARNING", "plugin web: 2.0 waits; isolator plugin approve"),
        (
            _record("event.quarantined", reason="it crashed", attempts=2),
            "ERROR",
            "plugin web: event set aside: it crashed; isolator event dead",
        ),
        (
            _record("net.denied", rule="not-granted", verdict="denied"),
            "INFO",
            "plugin web: first refused connection (not-granted); isolator plugin denials",
        ),
        (
            _record("net.connect", verdict="failed", error="etimedout", name="a.example"),
            "INFO",
            "plugin web: first connection or lookup that failed (a.example): timed out: the other side does not answer "
            "at all; isolator plugin denials",
        ),
    ],
)
def test_record_has_its_line_and_priority(
    notable: Notable, caplog: pytest.LogCaptureFixture, record: Incoming, level: str, text: str
) -> None:
    notable.note(record)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [(level, text)]


def test_denial_is_shown_once_for_each_kind_and_what_is_granted_never(
    notable: Notable, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        notable.note(_record("syscall.denied", call="ptrace", count=1))
    notable.note(_record("syscall.denied", call="bpf", count=1))
    notable.note(_record("syscall.denied", "other", call="bpf", count=1))
    for verdict in ("allowed", "granted"):
        notable.note(_record("net.query", rule="x", verdict=verdict))
    notable.note(_record("event.response", outcome="ok"))
    notable.note(_record("plugin.crashed", None, cause="exit"))
    assert [r.getMessage().split(";")[0] for r in caplog.records] == [
        "plugin web: first refused system call (ptrace)",
        "plugin web: first refused system call (bpf)",
        "plugin other: first refused system call (bpf)",
    ]


def test_plugin_that_crashes_all_the_time_has_its_share_and_takes_nobody_elses(
    notable: Notable, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(1000):
        notable.note(_record("plugin.crashed", cause="exit"))
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == BURST + 1
    assert lines[-1] == "plugin web: further lines only in the trail: isolator audit query --plugin"
    notable.note(_record("plugin.crashed", "quiet", cause="exit"))
    assert caplog.records[-1].getMessage() == "plugin quiet: ended: exit"
