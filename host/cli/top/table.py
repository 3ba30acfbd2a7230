"""A moment as ``rich`` draws it. Every text is made ``safe`` and is no markup: plugins wrote some of them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from host.cli.notes import BAD_STATES
from host.cli.output import ago, safe
from host.cli.top.figures import EXEC, Moment, Row
from host.cli.top.order import ASCENDING, ordered

HOT = 0.9
"""Part of a cap from which on its figure is marked."""
NOTES = 6
"""Lines of notes below the table."""
_DASH = "-"
_NAME = 12
"""Columns of a name at least."""


@dataclass(frozen=True)
class Column:
    """A column: its key of ``--sort``, the letter that sorts by it, its heading and its cell."""

    key: str
    letter: str
    heading: str
    cell: Callable[[Row], Text]


def size(number: float | None) -> str:
    """Bytes in at most four characters: ``812``, ``1.2K``, ``45M``."""
    if number is None:
        return _DASH
    for unit in ("", "K", "M", "G", "T"):
        if number < 1000 or unit == "T":
            break
        number /= 1024
    return f"{number:.1f}{unit}" if unit and number < 10 else f"{number:.0f}{unit}"


def rate(number: float | None) -> str:
    """A number in a second in at most four characters."""
    if number is None:
        return _DASH
    if number >= 1000:
        return f"{number / 1000:.1f}k" if number < 10_000 else f"{number / 1000:.0f}k"
    return f"{number:.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def span(microseconds: int | None) -> str:
    """A latency in at most five characters: ``812µs``, ``13ms``, ``2.4s``."""
    if microseconds is None:
        return _DASH
    if microseconds < 1000:
        return f"{microseconds}µs"
    milliseconds = microseconds / 1000
    if milliseconds < 1000:
        return f"{milliseconds:.1f}ms" if milliseconds < 10 else f"{milliseconds:.0f}ms"
    return f"{milliseconds / 1000:.1f}s" if milliseconds < 100_000 else f"{milliseconds / 1000:.0f}s"


def _percent(cores: float | None) -> str:
    return _DASH if cores is None else f"{cores * 100:.0f}"


def _state(row: Row) -> Text:
    state = "paused" if row.paused and row.state in ("running", "stopped") else row.state
    if state == "stopped" and row.mode == EXEC:
        state = f"exec {row.invocations}" if row.invocations else EXEC
    running = state == "running" or row.invocations
    style = "red" if state in BAD_STATES else "yellow" if row.paused else "green" if running else "dim"
    return Text(safe(state), style)


def _share(used: float | None, cap: float | None, form: Callable[[float | None], str], unit: str = "") -> Text:
    """A figure, and its cap in ``unit`` where there is one."""
    hot = used is not None and cap is not None and used >= HOT * cap
    text = Text(form(used), "bold red" if hot else "")
    return text.append(f"/{form(cap)}{unit}", "dim") if cap is not None else text


COLUMNS = (
    Column("name", "n", "NAME", lambda row: Text(safe(row.name))),
    Column("state", "s", "STATE", _state),
    Column("cpu", "c", "CPU", lambda row: _share(row.cpu, row.cpu_cap, _percent, "%")),
    Column("memory", "m", "MEMORY", lambda row: _share(row.memory, row.memory_cap, size)),
    Column("tasks", "t", "TASKS", lambda row: _share(row.tasks, row.tasks_cap, rate)),
    Column("events", "e", "EV/S", lambda row: Text(rate(row.events_per_s))),
    Column("queue", "w", "QUEUE", lambda row: Text(rate(row.queue))),
    Column("latency", "l", "P99", lambda row: Text(span(row.latency_p99_us))),
    Column("denials", "d", "DENIED", lambda row: Text(rate(row.denials), "yellow" if row.denials else "")),
    Column("egress", "b", "NET/S", lambda row: Text(size(row.egress_per_s))),
)
BY_LETTER = {column.letter: column for column in COLUMNS}


def line(text: str, style: str = "") -> Text:
    """A line of text that cannot steer the terminal, cut at its edge."""
    return Text(safe(text), style, no_wrap=True, overflow="ellipsis")


def head(moment: Moment) -> list[Text]:
    """The daemon and the host, a line each; alarms in red below them."""
    host, plugins = moment.host, moment.plugins
    bad = sum(row.state in BAD_STATES for row in plugins)
    running = sum(row.state == "running" for row in plugins)
    invocations = sum(row.invocations for row in plugins)
    failed = (f", invocations {invocations}" if invocations else "") + (f", {bad} failed" if bad else "")
    queue = sum(row.queue for row in plugins)
    cpu = sum(one.cpu or 0.0 for one in moment.processes)
    memory = sum(one.memory or 0 for one in moment.processes)
    daemon = f"isolator {moment.version}, up {ago(moment.started_at)}"
    machine = f"cpu {host.cpu / host.cores:.0%} of {host.cores} cores, load {host.load[0]:.2f}"
    return [
        line(f"{daemon}: plugins {len(plugins)}, running {running}{failed}; queue {queue}"),
        line(f"host    {machine}, memory {size(host.memory)} of {size(host.memory_total)}"),
        line(f"daemon  cpu {_percent(cpu)}%, memory {size(memory)} in {len(moment.processes)} processes"),
        *(line(f"ALARM: {one}", "bold red") for one in moment.alarms),
    ]


def drawn(
    moment: Moment, sort: str, width: int, *, reverse: bool = False, first: int = 0, most: int | None = None
) -> Group:
    """The whole of a moment; of the plugins those from ``first`` on, at most so many.

    Columns that do not fit ``width`` are left out, the last ones first; a name is cut before that.
    """
    rows = ordered(moment.plugins, sort, reverse=reverse)
    shown = rows[first:] if most is None else rows[first : first + most]
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    cells = [[column.cell(row) for row in shown] for column in COLUMNS]
    widths = [
        max([len(column.heading), *(one.cell_len for one in of)]) for column, of in zip(COLUMNS, cells, strict=True)
    ]
    name, widths[0] = widths[0], min(widths[0], _NAME)
    ends = list(itertools.accumulate(one + 1 for one in widths))
    fitting = max(1, bisect.bisect_right(ends, width + 1))
    widths[0] = min(name, widths[0] + max(0, width + 1 - ends[fitting - 1]))
    for column, columns in zip(COLUMNS[:fitting], widths, strict=False):
        table.add_column(
            Text(column.heading, "reverse" if column.key == sort else ""), no_wrap=True, overflow="ellipsis",
            justify="left" if column.key in ASCENDING else "right", width=columns,
        )  # fmt: skip
    for row in zip(*cells[:fitting], strict=True):
        table.add_row(*row)
    parts: list[RenderableType] = [*head(moment), Text(), table]
    if len(shown) < len(rows):
        parts.append(line(f"{len(rows) - len(shown)} more", "dim"))
    return Group(*parts, *notes(rows))


def notes(rows: Iterable[Row]) -> list[Text]:
    """An empty line, and a line for each of the first plugins that need something of an operator."""
    found = [line(f"{row.name}: {'; '.join(row.notes)}", "yellow") for row in rows if row.notes][:NOTES]
    return [Text(), *found] if found else []
