"""Small line charts as SVG, of numbers alone; colours and sizes are the style sheet's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from isolator.errors import printable

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH, HEIGHT = 240, 48

USED = ("cpu_us", "memory", "tasks")
"""Fields of a ``resources`` record that are drawn."""
Points = Sequence[tuple[float, Mapping[str, Any]]]
"""Unix time and figures."""


def seconds_of(moment: str) -> float:
    """Unix time of a record's time."""
    return datetime.fromisoformat(moment).timestamp()


def by_invocation(data: Mapping[str, Any], cpu_before: float) -> dict[str, Any]:
    """An ``exec.ended`` record as a point: what all invocations have used so far, and the most memory of this one."""
    cpu = data.get("cpu_us")
    return {"cpu_us": cpu_before + (cpu if isinstance(cpu, int) else 0), "memory": data.get("memory_peak")}


def values(points: Points, field: str) -> list[tuple[float, float]]:
    """Time and value of one field; of ``cpu_us`` its growth, in cores on average since the point before."""
    found = [(at, float(data[field])) for at, data in points if isinstance(data.get(field), (int, float))]
    if field != "cpu_us":
        return found
    grown = []
    for (before, old), (now, new) in itertools.pairwise(found):
        if now > before and new >= old:  # it counts from the start of each run
            grown.append((now, (new - old) / 1e6 / (now - before)))
    return grown


def line(series: Sequence[tuple[float, float]], cap: float | None, label: str) -> Markup:
    """A chart of the series with a line at ``cap``; ``label`` describes it for those who do not see it."""
    from markupsafe import Markup

    top = max([cap or 0.0, *(value for _, value in series)]) * 1.1 or 1.0
    begin, end = (series[0][0], series[-1][0]) if series else (0.0, 1.0)
    span = end - begin or 1.0

    def place(at: float, value: float) -> str:
        return f"{(at - begin) / span * WIDTH:.1f},{HEIGHT - value / top * HEIGHT:.1f}"

    label = printable(label)
    parts = [
        Markup('<svg class="chart" role="img" viewBox="0 0 {} {}" preserveAspectRatio="none"><title>{}</title>').format(
            WIDTH, HEIGHT, label
        )
    ]
    if cap:
        y = f"{HEIGHT - cap / top * HEIGHT:.1f}"
        parts.append(Markup('<line class="cap" x1="0" x2="{}" y1="{}" y2="{}"/>').format(WIDTH, y, y))
    if series:
        path = " ".join(place(*one) for one in series)
        parts.append(Markup('<polyline class="line" points="{}"/>').format(path))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)
