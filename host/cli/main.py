"""Entry point of the command line.

The time in which ``isolator run`` starts counts, and importing click would be a tenth of it: a line that is in order is
read by ``isolator.standalone.options``. Everything else, ``run --help`` and mistakes too, is ``host.cli.root``'s.
"""

from __future__ import annotations

import gc
import sys

from isolator.linux.descriptors import open_standard_streams
from isolator.standalone.options import read_plainly


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
    from host.cli.root import call

    call()
