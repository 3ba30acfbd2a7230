"""``./dev bench [NAME...]``: run benchmarks, print a table each, write Markdown, JSON with all samples, SVG."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Protocol, cast

from bench.frame import Report, host, table, write

# Each is a module of this package with `measure(rounds) -> Report`.
BENCHMARKS = {
    "cage_start": "starting a cage: /bin/true, confined, waited for",
    "run_start": "one command in a cage: isolator run, by root and through the daemon, bubblewrap, firejail",
    "many": "200 cages started at once, and the daemon's memory for each idle plugin",
    "delivery": "delivering an event: to a sidecar in its cage and back, durable and audited",
    "exec": "running a program once for each event, in a cage of its own: the mode exec",
    "mcp": "calling a tool of an MCP server: over pipes, and in its cage through isolator mcp serve",
    "packages": "verifying a package of 10 MB",
    "save": "isolator dev: from a save to the answer of the new version",
    "audit": "recording facts until all are durable",
    "bad_neighbours": "a good plugin beside bad ones: delivery, DNS, connect, host API, command",
    "egress": "carrying a plugin's traffic, beside a direct connection",
}
LONG = {
    "soak": "200 000 events: memory",
    "reload": "a daemon that is reloaded under load: pauses, losses",
    "registered": "1 000 plugins registered, 200 running: start of the daemon, listing, memory, work at rest",
    "console": "the console before 200 plugins and a million records: first page, a denial until it is seen, memory",
}
"""Run only when they are named."""
OUT = Path("/var/cache/isolator-dev/bench")


class Benchmark(Protocol):
    def measure(self, rounds: int) -> Report: ...


def parser() -> argparse.ArgumentParser:
    """Its options stand in ``dev``, too, which refuses others before it installs anything."""
    listing = "\n".join(f"  {name}: {what}" for name, what in (BENCHMARKS | LONG).items())
    made = argparse.ArgumentParser(
        prog="./dev bench",
        description="Run benchmarks side by side with peers.",
        epilog=f"benchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("names", nargs="*", metavar="NAME", help=f"which (all but {', '.join(LONG)})")
    made.add_argument("--rounds", type=int, default=100, metavar="N", help="rounds of each (100)")
    made.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"where results go ({OUT})")
    made.add_argument("--quick", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # ./dev says where
    made.add_argument("--commit", default="this tree", help=argparse.SUPPRESS)
    return made


def main() -> int:
    reading = parser()
    options = reading.parse_args()
    unknown = set(options.names) - set(BENCHMARKS | LONG)
    if unknown:
        reading.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    if options.quick is not None:
        from bench.quick import run

        run(options.quick, options.commit)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    print("host: " + ", ".join(f"{key} {value}" for key, value in host().items()) + "\n", flush=True)
    for name in options.names or BENCHMARKS:
        benchmark = cast(Benchmark, importlib.import_module(f"bench.{name}"))
        report = benchmark.measure(options.rounds)
        write(report, options.out)
        print(table(report), flush=True)
    print(f"tables, samples and plots: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
