"""The report: one file that holds everything and acts no more than a page of the console."""

from __future__ import annotations

import re
from pathlib import Path

from host.console.charts import values
from host.console.report import POINTS, ROWS, Summary, render
from isolator.audit.record import Record
from tests.console.payloads import PAYLOADS
from tests.console.support import Console
from tests.system.daemon import ECHO, event, write_plugin


def record(seq: int, type: str, data: dict[str, object], plugin: str | None = "hostile") -> Record:
    time = f"2026-01-02T03:{seq // 60 % 60:02}:{seq % 60:02}.000000Z"
    return Record(seq, time, type, "host:0:1", plugin, None, None, None, data, "0" * 64, "1" * 64, {})


def test_report_of_a_daemon_names_its_plugins_and_the_seal(console: Console, tmp_path: Path) -> None:
    d = console.daemon
    d.cli("plugin", "add", str(write_plugin(tmp_path / "echo", ECHO)), "--yes")
    d.cli("event", "emit", "deploy.completed", event(1), "--wait")
    d.cli("report", "-o", str(tmp_path / "report.html"))
    text = (tmp_path / "report.html").read_text()
    assert (tmp_path / "report.html").stat().st_mode & 0o777 == 0o600  # as the trail, it is not everybody's
    assert "<h2>echo</h2>" in text and "1 ok" in text and "plugin.commit" in text and "uid:0" in text
    assert "<script" not in text and "http" not in re.sub(r"http-equiv", "", text)
    assert d.cli("report", "--since", "never", "-o", "-", code=2).stderr.startswith("isolator: ")
    assert d.cli("report", "-o", "/proc/none/x", code=1).stderr.startswith("isolator: /proc/none/x")


def test_nothing_that_a_plugin_wrote_is_markup_in_it() -> None:
    summary, records = Summary(), []
    for number, text in enumerate(PAYLOADS):
        records += [
            record(4 * number + 1, "net.denied", {"name": text, "port": 443, "rule": text}),
            record(4 * number + 2, "net.connect", {"name": text, "port": 443}),
            record(4 * number + 3, "event.response", {"outcome": text}),
            record(4 * number + 4, "control.called", {"verb": text, "uid": 7, "verdict": text}, text),
        ]
    summary.add(records)
    page = render(summary, "2026-01-01T00:00:00.000000Z", Path("/"))
    body = page[page.index("</style>") :]
    tags = set(re.findall(r"<\s*/?\s*([a-zA-Z!]+)", body))
    allowed = (
        "style head body main html h small dl dt dd code table thead tbody tr th td section div figure figcaption svg "
        "title line polyline p b span footer"
    )
    assert tags <= set(allowed.split()), tags
    assert not re.search("[\u202e\u200b\x1b\x00\u05d0]", body)


def test_no_destination_is_hidden_behind_many_others() -> None:
    summary = Summary()
    summary.add(record(n, "net.connect", {"name": f"decoy-{n}.example"}) for n in range(1, ROWS + 1))
    summary.add([record(1000, "net.closed", {"name": "theft.example", "sent": 4321, "received": 7})])
    page = render(summary, "2026-01-01T00:00:00.000000Z", Path("/"))
    assert f"{ROWS}+ destinations" in page and "all others" in page and "4321" in page


def test_invocations_and_tools_are_in_it() -> None:
    summary = Summary()
    summary.add(
        record(n, "exec.ended", {"cause": "exit", "cpu_us": 500_000, "memory_peak": n << 20}) for n in range(1, 5)
    )
    summary.add(
        [record(5, "tool.called", {"outcome": "ok"}), record(6, "tool.called", {"outcome": "denied", "count": 3})]
    )
    usage = summary.plugins["hostile"].usage
    assert [point["cpu_us"] for _, point in usage] == [500_000, 1_000_000, 1_500_000, 2_000_000]
    assert [value for _, value in values(usage, "cpu_us")] == [0.5, 0.5, 0.5]
    page = render(summary, "2026-01-01T00:00:00.000000Z", Path("/"))
    assert "calls of tools: 3 denied, 1 ok" in page


def test_charts_stay_small_however_long_the_time_was() -> None:
    summary = Summary()
    summary.add(record(n, "resources", {"cpu_us": n * 1000, "memory": n, "tasks": 1}) for n in range(1, 20 * POINTS))
    usage = summary.plugins["hostile"].usage
    assert POINTS / 2 <= len(usage) <= POINTS and usage[0][1]["memory"] < usage[-1][1]["memory"]
