"""Recorded results: what ``./dev bench`` measured at one time on one host, kept so that text and plots are of it.

``bench/results/NAME.json`` is the file that ``./dev bench NAME`` writes, its samples without needless digits. The
tables of ``bench/README.md`` are generated from it (``docs/generate``), the plots in ``docs/figures`` by
``./dev bench --plots``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bench.frame import Report, Series, Skipped, table

RESULTS = Path(__file__).resolve().parent / "results"
QUICK = "quick.json"
"""Rows of ``./dev bench --quick``, in a form of their own."""


@dataclass(frozen=True)
class Recorded:
    """One result, with its host and time."""

    host: dict[str, str]
    report: Report

    @property
    def caption(self) -> str:
        """Date and host in one line."""
        host = self.host
        on = f"{host['cpu']}, {host['cpus']} processors, Linux {host['kernel'].partition('-')[0]}"
        return f"{host['time'][:10]}; {on}, cgroups {host['cgroups']}, Python {host['python']}"


def recorded() -> list[Recorded]:
    """Every result, by name."""
    return [_read(path) for path in sorted(RESULTS.glob("*.json")) if path.name != QUICK]


def tables() -> str:
    """Format every result as Markdown: its table, date and host."""
    parts = []
    for one in recorded():
        heading, _, rest = table(one.report).partition("\n")
        parts.append(f"#{heading}\n\n{one.caption}.{rest}")
    return "\n".join(parts)


def _read(path: Path) -> Recorded:
    data = json.loads(path.read_text())
    series = tuple(Series(s["name"], s["builds"], s["unit"], tuple(s["samples"])) for s in data["series"])
    skipped = tuple(Skipped(s["name"], s["why"]) for s in data["skipped"])
    report = Report(data["name"], data["title"], series, skipped, tuple(data["baselines"]), tuple(data["notes"]))
    return Recorded(data["host"], report)
