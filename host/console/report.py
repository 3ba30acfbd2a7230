"""``isolator report``: what happened on this host in one HTML file, to send on; read from the trail alone.

The file refers to nothing outside itself and holds no script. What plugins wrote is escaped as on the pages.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from host.cli.denials import TYPES, Denial, attempt, collect, refused
from host.console.charts import USED, by_invocation, line, seconds_of, values
from isolator import __version__
from isolator.audit import schema
from isolator.audit.reader import Query, query
from isolator.audit.record import Record
from isolator.cli.audit import moment, readable
from isolator.errors import IsolatorError, UnavailableError, translated
from isolator.paths import Paths

POINTS = 240
"""Points of a chart; of more, every second one is dropped, and so on."""
ROWS = 200
"""Rows of a table; the number beyond is told."""
_ACTS = ("plugin.added", "plugin.approved", "plugin.declined", "plugin.updated", "plugin.rolled_back", "plugin.removed")


@dataclass
class _Plugin:
    """One plugin in the time of the report."""

    outcomes: Counter[str] = field(default_factory=Counter)
    denied: deque[Record] = field(default_factory=lambda: deque(maxlen=5000))
    denials: int = 0
    egress: dict[str, Counter[str]] = field(default_factory=dict)
    more_egress: Counter[str] = field(default_factory=Counter)
    """The same of all destinations beyond ``ROWS``."""
    calls: Counter[str] = field(default_factory=Counter)
    """Calls of its tools by outcome."""
    usage: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    _cpu: float = 0.0
    """Processor time of all invocations so far, in µs."""
    _step: int = 1
    _skipped: int = 0

    def used(self, record: Record) -> None:
        """Add a point of the charts, or leave it out where there are many."""
        data: Mapping[str, Any] = record.data
        if record.type == schema.ExecEnded.TYPE:
            data = by_invocation(data, self._cpu)
            self._cpu = data["cpu_us"]
        self._skipped += 1
        if self._skipped < self._step:
            return
        self._skipped = 0
        self.usage.append((seconds_of(record.time), {key: data.get(key) for key in USED}))
        if len(self.usage) > POINTS:
            self.usage, self._step = self.usage[::2], self._step * 2


class Summary:
    """The records of a time, summed up."""

    def __init__(self) -> None:
        self.plugins: dict[str, _Plugin] = {}
        self.acts: deque[Record] = deque(maxlen=ROWS)
        self.seal: Record | None = None
        self.first: Record | None = None
        self.last: Record | None = None
        self.records = self.acted = 0

    def add(self, records: Iterable[Record]) -> None:
        """Take records, oldest first."""
        for record in records:
            self.records += 1
            self.first, self.last = self.first or record, record
            if record.type == schema.AuditSeal.TYPE:
                self.seal = record
            elif record.type == schema.ControlCalled.TYPE or record.type in _ACTS:
                self.acts.append(record)
                self.acted += 1
            if record.plugin is not None:
                self._of(self.plugins.setdefault(record.plugin, _Plugin()), record)

    def _of(self, plugin: _Plugin, record: Record) -> None:
        if record.type == schema.EventResponse.TYPE:
            plugin.outcomes[str(record.data.get("outcome"))] += 1
        elif record.type == schema.EventDead.TYPE:
            plugin.outcomes["dead"] += 1
        elif record.type in (schema.NetConnect.TYPE, schema.NetClosed.TYPE):
            place = str(record.data.get("name") or record.data.get("address"))
            fits = place in plugin.egress or len(plugin.egress) < ROWS
            of_place = plugin.egress.setdefault(place, Counter()) if fits else plugin.more_egress
            of_place["connections"] += record.type == schema.NetConnect.TYPE
            for key in ("sent", "received"):
                value = record.data.get(key)
                of_place[key] += value if isinstance(value, int) else 0
        elif record.type == schema.ToolCalled.TYPE:
            plugin.calls[str(record.data.get("outcome"))] += _count(record)
        elif record.type in (schema.Resources.TYPE, schema.ExecEnded.TYPE):
            plugin.used(record)
        if record.type in TYPES and refused(record):
            plugin.denied.append(record)
            plugin.denials += _count(record)


def _count(record: Record) -> int:
    count = record.data.get("count", 1)
    return count if isinstance(count, int) else 1


def render(summary: Summary, since: str, root: Path) -> str:
    """The report as HTML."""
    from markupsafe import Markup

    from host.console.rendering import environment

    style = (Path(__file__).parent / "static/console.css").read_text()
    plugins = []
    for name, one in sorted(summary.plugins.items()):
        rows: list[Denial] = collect(one.denied, {"name": name})
        charts = [
            (title, line(values(one.usage, key), None, f"{title} of {name}"))
            for title, key in (("processor, cores", "cpu_us"), ("memory, bytes", "memory"), ("tasks", "tasks"))
        ]
        denials = [(row, attempt(row)) for row in reversed(rows[-ROWS:])]
        shown = sum(row.count for row, _ in denials)
        plugins.append({"name": name, "of": one, "denials": denials, "charts": charts, "shown": shown})
    return environment().get_template("report.html").render(
        summary=summary, plugins=plugins, style=Markup(style), since=since, root=str(root), version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"), machine=os.uname().nodename,
    )  # fmt: skip


@click.command(
    epilog="\b\nExamples:\n  isolator report -o report.html\n  isolator report --since 7d -o week.html\n"
    "  isolator report --since 2026-01-31 -o - > report.html"
)
@click.option(
    "--since", default="24h", show_default=True, metavar="TIME", help="2h, 7d, 2026-01-31, 2026-01-31T12:00 (UTC)."
)
@click.option("-o", "--output", required=True, metavar="FILE", help="The file to write; - is standard output.")
@click.pass_obj
def report(root: str | None, since: str, output: str) -> None:
    """Write one HTML file: who did what, denials, egress, resources.

    It is read from the trail; verify that first (isolator audit verify), and
    hold the report against the seal that it names.
    """
    if find_spec("jinja2") is None:
        raise UnavailableError("isolator report", "jinja2 is not installed", "pip install 'isolator[console]'")
    paths, begin = Paths.of(root), moment(since)
    summary = Summary()
    readable(lambda: summary.add(record for _, record in query(paths.audit_log, Query(since=begin))))
    text = render(summary, str(begin), paths.root)
    if output == "-":
        click.echo(text)
        return
    # As the trail, it is not for everybody: whoever makes the file decides who else reads it.
    with (
        translated(OSError, IsolatorError, output, "", "choose another file with -o"),
        open(output, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file,
    ):
        file.write(text)
    click.echo(f"{output}: records: {summary.records}, plugins: {len(summary.plugins)}", err=True)
