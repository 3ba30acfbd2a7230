"""Every kind of figure in under two minutes, to compare commit with commit: ``./dev bench --quick``.

Each row has a figure and its ratio to a peer that was measured in turns with it: on another machine, or a busier one,
the ratio is what stays. Few rounds: a change below a tenth says nothing. ``bench/results/quick.json`` keeps the rows of
this commit and of the last one that was measured.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import isolator_side
from bench.audit import BATCH, Writer
from bench.audit import plain as json_lines
from bench.delivery import one_at_a_time
from bench.delivery_subjects import HOST_TOML
from bench.frame import Contender, Series, host, interleave
from bench.many import processes_of, pss, spent
from bench.peers import BUBBLEWRAP, TRUE, bubblewrap, find
from host.client.client import Client
from isolator.layers.seccomp.layer import compiled
from tests.system.daemon import daemon

CAGES, COMMANDS, STARTS, EVENTS, BATCHES = 25, 12, 4, 60, 6
"""Rounds of each."""
REST_SECONDS, IDLE_SECONDS = 2.0, 5.0


@dataclass(frozen=True)
class Row:
    """One figure, and how many times that of a peer it is."""

    name: str
    value: float
    unit: str
    ratio: float | None = None
    beside: str = ""


def rows() -> Iterator[Row]:
    """Measure everything."""
    with tempfile.TemporaryDirectory(prefix="isolator-bench-") as folder:
        work = Path(folder)
        work.chmod(0o755)
        yield from _cages(work)
        yield from _commands(work)
        yield from _trail(work)
    yield from _daemon()


def _beside(name: str, series: Sequence[Series], ours: str, peer: str) -> Row:
    by_name = {one.name: one for one in series}
    mine, other = by_name[ours], by_name[peer]
    return Row(name, mine.median, mine.unit, mine.ratio_to(other), peer)


def _cages(work: Path) -> Iterator[Row]:
    program = work / "filter.bpf"
    program.write_bytes(compiled("default", work))
    with isolator_side.cages(work) as (isolator, _):
        series = interleave([bubblewrap(work, program), *isolator], CAGES)
    titles = {
        isolator_side.NAME: "cage",
        isolator_side.COLD: "cage, nothing made ahead",
        isolator_side.TOLD: "cage, until its exit code is known",
    }
    for name, title in titles.items():
        yield _beside(title, series, name, BUBBLEWRAP)


def _commands(work: Path) -> Iterator[Row]:
    program = os.path.join(os.path.dirname(sys.executable), "isolator")
    commands = {
        "plain Python": [sys.executable, "-I", "-c", ""],
        "bubblewrap": [find("bwrap"), "--ro-bind", "/", "/", TRUE],
        "isolator run": [program, "--root", str(work / "root"), "run", "--", TRUE],
    }
    spent: dict[str, list[float]] = {name: [] for name in commands}

    def contender(name: str) -> Contender:
        return Contender(name, "", lambda: spent[name].append(_processor_ms(commands[name])))

    series = interleave([contender(name) for name in commands], COMMANDS)
    yield _beside("isolator run, no daemon", series, "isolator run", "bubblewrap")
    used = [Series(name, "", "ms", tuple(samples[-COMMANDS:])) for name, samples in spent.items()]
    yield _beside("isolator run, no daemon: processor time", used, "isolator run", "plain Python")


def _processor_ms(argv: list[str]) -> float:
    """Run a command; returns the user and system time of it and of all that it waited for."""
    pid = os.posix_spawn(argv[0], argv, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    _, status, usage = os.wait4(pid, 0)
    if status != 0:
        raise RuntimeError(f"{argv}: it returned {os.waitstatus_to_exitcode(status)}")
    return (usage.ru_utime + usage.ru_stime) * 1e3


def _trail(work: Path) -> Iterator[Row]:
    writer = Writer(work / "trail")
    try:
        series = interleave(
            [
                Contender("JSON lines, one fsync", "", lambda: json_lines(work / "lines", BATCH, every=False)),
                Contender("isolator", "", writer.send),
            ],
            BATCHES,
            warmup=1,
        )
    finally:
        writer.stop()
    yield _beside(f"{BATCH} records, durable", series, "isolator", "JSON lines, one fsync")


def _daemon() -> Iterator[Row]:
    python = [sys.executable, "-I", "-c", ""]
    walls, used, memory, anonymous = [], [], [], []
    with daemon(host_toml=HOST_TOML, start=False) as running:
        for number in range(STARTS):
            if number:
                running.stop()
            bare = statistics.median(_processor_ms(python) for _ in range(5))
            began = time.perf_counter()
            running.start()
            walls.append((time.perf_counter() - began) * 1e3)
            used.append((spent(running), bare))
            time.sleep(REST_SECONDS)
            memory.append(sum(map(pss, processes_of(running))) / 1024)
            anonymous.append(sum(pss(pid, "Pss_Anon") for pid in processes_of(running)) / 1024)
        yield Row("daemon: start to ready", statistics.median(walls), "ms")
        ratio = statistics.median(mine / other for mine, other in used)
        yield Row(
            "daemon: processor time to ready", statistics.median(mine for mine, _ in used), "ms", ratio, "plain Python"
        )
        # Pages of the interpreter and the libraries are shared with every other Python process of this machine.
        yield Row("daemon: memory (PSS), no plugin", statistics.median(memory), "MiB")
        yield Row("daemon: of it no file's pages", statistics.median(anonymous), "MiB")
        before = spent(running)
        time.sleep(IDLE_SECONDS)  # the length of what is measured
        yield Row("daemon: processor time at rest", (spent(running) - before) / IDLE_SECONDS / 10, "% of one")
        with Client(running.root) as client:
            samples, _, _, _ = one_at_a_time(running, client, EVENTS)
    series = {name: Series(name, "", "µs", tuple(taken)) for name, taken in samples.items()}
    plain = next(name for name in series if "no durability" in name)
    for mode in ("oneshot", "stream"):
        for figure in ("dispatch", "round trip"):
            yield _beside(f"{mode}: {figure}", list(series.values()), f"isolator {mode}: {figure}", plain)
    yield _beside("emit", list(series.values()), "isolator: emit", "one sync")


def table(now: dict[str, Any], last: dict[str, Any] | None) -> str:
    """The rows, beside those of the last commit."""
    before = {row["name"]: row for row in last["rows"]} if last else {}
    lines = [f"| | {now['commit']} | × | {last['commit'] if last else ''} | × | |", "|---|--:|--:|--:|--:|---|"]
    for row in now["rows"]:
        cells = []
        for one in (row, before.get(row["name"])):
            ratio = one.get("ratio") if one else None
            cells.append(f"{one['value']:.4g} {one['unit']}" if one else "")
            cells.append(f"{ratio:.2f}" if ratio is not None else "")
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['beside']} |")
    return "\n".join(lines)


def run(results: Path, commit: str) -> None:
    """Measure, print the table, and keep the rows in ``results`` in the place of what was measured of this commit."""
    began = time.monotonic()
    kept = json.loads(results.read_text()) if results.exists() else []
    others = [one for one in kept if one["commit"] != commit]
    now = {"commit": commit, "host": host(), "rows": [asdict(row) for row in rows()]}
    last = others[-1] if others else None
    print(table(now, last), flush=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps([*([last] if last else []), now], indent=1) + "\n")
    print(f"\n{time.monotonic() - began:.0f} s; kept in {results}")
