"""The command ``isolator run``, from its options to its exit code. Its start counts: see ``host.cli.main``.

Who is not root has it done by the daemon: ``client.py``. For root this process does it itself, daemon or not.
A fork of this process becomes the launcher before anything else is loaded, and builds the cages' view of files and the
first parked process while asyncio and the policy's modules are imported here.
"""

from __future__ import annotations

import os
import sys

from isolator.errors import IsolatorError

TYPE_CHECKING = False  # typing, which has it too, takes longer to import than all else here; mypy goes by the name
if TYPE_CHECKING:
    from typing import NoReturn

    from isolator.standalone.options import RunOptions

_OPENSSL = ("ssl", "_hashlib")


def run_and_exit(options: RunOptions) -> NoReturn:
    """``run``, and end this process without taking every module of Python apart first."""
    code = run(options)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 1
    os._exit(code)


def run(options: RunOptions) -> int:
    """Run the command; returns the exit code, after at most one line about an error on standard error."""
    try:
        if os.geteuid() != 0:
            from isolator.standalone.client import run_through_daemon

            return run_through_daemon(options)
        from isolator.standalone.launcher import fork_launcher

        launcher = fork_launcher()
        try:
            from isolator.base.lean import import_asyncio, import_hashlib, put_off_for_a_command

            put_off_for_a_command()
            import_hashlib(without=_OPENSSL)
            from isolator.paths import Paths
            from isolator.standalone.beginning import Beginning

            with Beginning(Paths.of(options.root), launcher) as beginning:
                import_asyncio(without=_OPENSSL)
                from isolator.standalone.single import run_once

                return run_once(options, beginning)
        finally:
            launcher.close()
    except IsolatorError as error:
        code, shown = 2 if error.exit_code == 2 else 125, f"isolator: {error}"
        if options.json:
            import json

            shown = json.dumps({"error": {**error.to_json(), "exit_code": code}})
        print(shown, file=sys.stderr)
        return code
