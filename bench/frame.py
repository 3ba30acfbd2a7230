"""Frame of all benchmarks: measurement and report.

On a small, shared, virtual machine a single figure means little: the speed drifts while one is measuring. So the
contenders of one benchmark take turns, once each per round, in an order that rotates; medians count, and the ratios
*within a round*, which drift leaves alone. A contender that cannot run on this host is listed with the reason, never
left out in silence.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

Once = Callable[[], None]


@dataclass(frozen=True)
class Contender:
    """Contender of a benchmark. ``once`` does the work one time and raises if it failed: a failure is never timed.

    ``before`` runs ahead of each, untimed: what a daemon at rest would have ready. ``after`` runs behind each, untimed
    too: what goes on once the caller has its answer, and would be on the bill of the next.
    """

    name: str
    builds: str
    once: Once
    before: Once = lambda: None
    after: Once = lambda: None


@dataclass(frozen=True)
class Skipped:
    """Contender that cannot run here, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Series:
    """Samples of one contender, in ``unit``, in the order of the rounds."""

    name: str
    builds: str
    unit: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, part: float) -> float:
        """Return the value below which ``part`` (0..1) of the samples lie."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))]

    def ratio_to(self, other: Series) -> float:
        """Return the median of the ratios round by round."""
        return statistics.median(a / b for a, b in zip(self.samples, other.samples, strict=True))


@dataclass(frozen=True)
class Report:
    """Outcome of a benchmark: series with a common unit and rounds, and the contenders that could not run."""

    name: str
    title: str
    series: tuple[Series, ...]
    skipped: tuple[Skipped, ...] = ()
    baselines: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def interleave(contenders: Sequence[Contender], rounds: int, warmup: int = 3) -> tuple[Series, ...]:
    """Time every contender once per round, ``warmup`` + ``rounds`` times; milliseconds of wall time."""
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    gc.collect()
    gc.disable()  # a collection would hit whoever is being timed at that moment
    try:
        for number in range(-warmup, rounds):
            turn = number % len(contenders)
            for contender in (*contenders[turn:], *contenders[:turn]):
                contender.before()
                began = time.perf_counter_ns()
                contender.once()
                took = time.perf_counter_ns() - began
                contender.after()
                if number >= 0:
                    samples[contender.name].append(took / 1e6)
    finally:
        gc.enable()
    return tuple(Series(one.name, one.builds, "ms", tuple(samples[one.name])) for one in contenders)


def table(report: Report) -> str:
    """Format the report as a Markdown table: median, spread, ratio to each baseline."""
    by_name = {series.name: series for series in report.series}
    bases = [by_name[name] for name in report.baselines if name in by_name]
    unit = report.series[0].unit if report.series else "ms"
    head = ["", unit, "p5 – p95", *(f"× {base.name}" for base in bases), "builds"]
    rows = [head, ["---", "--:", "---", *("--:" for _ in bases), "---"]]
    for series in report.series:
        spread = f"{series.quantile(0.05):.2f} – {series.quantile(0.95):.2f}"
        ratios = [f"{series.ratio_to(base):.2f}" for base in bases]
        rows.append([series.name, f"{series.median:.2f}", spread, *ratios, series.builds])
    lines = [f"## {report.title}", ""]
    if report.series:
        rounds = len(report.series[0].samples)
        lines += [f"Medians of {rounds} interleaved rounds; ratios are medians of the ratios round by round.", ""]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += [f"- not run: {skipped.name}: {skipped.why}" for skipped in report.skipped]
    lines += [f"- {note}" for note in report.notes]
    return "\n".join(lines) + "\n"


def to_json(report: Report) -> dict[str, object]:
    """Format the report with every sample as JSON."""
    bases = [series for series in report.series if series.name in report.baselines]
    summary = {
        series.name: {
            "median": series.median,
            "p95": series.quantile(0.95),
            "ratios": {base.name: series.ratio_to(base) for base in bases},
        }
        for series in report.series
    }
    return {**asdict(report), "summary": summary}


def host() -> dict[str, str]:
    """Describe the machine of the figures."""
    hierarchies = Path("/proc/self/cgroup").read_text()
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpu": models[0] if models else "unknown",
        "cpus": str(len(os.sched_getaffinity(0))),
        "cgroups": "v2" if hierarchies.startswith("0::") else "hybrid",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def plot(report: Report) -> str:
    """Draw the report as an SVG: a bar per contender up to its median, a line from its p5 to its p95."""
    left, width, height = 220, 620, 28
    longest = max((series.quantile(0.95) for series in report.series), default=1.0)
    scale = width / longest
    size = f'width="{left + width + 90}" height="{(len(report.series) + 2) * height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-weight="bold">{_escaped(report.title)}</text>',
    ]
    for row, series in enumerate(report.series, 1):
        top = row * height + 6
        middle = top + height // 2 - 4
        low, high = left + series.quantile(0.05) * scale, left + series.quantile(0.95) * scale
        colour = "#2b6cb0" if series.name.startswith("isolator") else "#a0aec0"
        parts += [
            f'<text x="{left - 8}" y="{middle + 5}" text-anchor="end">{_escaped(series.name)}</text>',
            f'<rect x="{left}" y="{top}" width="{series.median * scale:.1f}" height="{height - 8}" fill="{colour}"/>',
            f'<line x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}" stroke="black"/>',
            f'<text x="{high + 6:.1f}" y="{middle + 5}">{series.median:.2f} {series.unit}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def write(report: Report, folder: Path) -> None:
    """Write the table, every sample and the plot of a report into ``folder``."""
    (folder / f"{report.name}.md").write_text(table(report))
    (folder / f"{report.name}.json").write_text(json.dumps({"host": host(), **to_json(report)}, indent=1) + "\n")
    (folder / f"{report.name}.svg").write_text(plot(report))
