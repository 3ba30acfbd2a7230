"""Entry point of the command line.

The time in which ``isolator run`` starts counts, and importing click would be a tenth of it: a line that is in order is
read by ``isolator.standalone.options``. A line of ``isolator serve`` is read here, for click would stay in the daemon's
memory. Everything else, ``run --help`` and mistakes too, is ``host.cli.root``'s.
"""

from __future__ import annotations

import gc
import sys

from isolator.linux.descriptors import open_standard_streams
from isolator.standalone.options import read_plainly

TYPE_CHECKING = False  # typing, which has it too, takes longer to import than all else here; mypy goes by the name
if TYPE_CHECKING:
    from typing import Any


def read_serve(arguments: list[str]) -> dict[str, Any] | None:
    """The options of ``[--root DIR] serve [OPTIONS]``; None unless the line is in order, for click to read."""
    values: dict[str, Any] = {"root": None}
    if arguments[:1] == ["--root"]:
        values["root"], arguments = "".join(arguments[1:2]), arguments[2:]
    if arguments[:1] != ["serve"]:
        return None
    options = iter(arguments[1:])
    for option in options:
        if option == "--certifying":
            values["certifying"] = True
            continue
        value = next(options, "")
        if not value or option not in ("--config", "--adopt", "--check-handover"):
            return None
        if option != "--config" and not value.isdecimal():
            return None
        values[option[2:].replace("-", "_")] = value if option == "--config" else int(value)
    return values


def main() -> None:
    """Run the command line; never returns."""
    open_standard_streams()
    options = read_plainly(sys.argv[1:])
    if options is not None:
        gc.disable()  # until the cage runs: what is imported is no garbage, and each collection goes over it
        try:
            from isolator.standalone.command import run_and_exit

            run_and_exit(options)
        except BaseException as error:
            from host.cli.root import report

            report(error)
    if sys.flags.no_site:  # as the program is written: what it calls below takes its packages from there
        import site

        site.main()
    values = read_serve(sys.argv[1:])
    if values is not None:
        from isolator.base.lean import import_asyncio

        import_asyncio(without=("ssl", "_hashlib"))
        try:
            from isolator.cli.daemon import run_daemon

            run_daemon(**values)
        except BaseException as error:
            from host.cli.root import report

            report(error)
        sys.exit(0)
    from host.cli.root import call

    call()
