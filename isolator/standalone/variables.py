"""Environment of the command of ``isolator run``: variables named on the command line or in files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from isolator.errors import UsageError, translated


def variables(options: Iterable[str], files: Iterable[Path]) -> dict[str, str]:
    """Variables of ``--env`` and ``--env-file``, ``NAME=VALUE`` each, or ``NAME``: the caller's own value.

    An option wins over a file, and the later over the earlier. A file has one on each line; empty lines and those that
    begin with ``#`` are passed over, quotes mean nothing. No error quotes a value.
    """
    found: dict[str, str] = {}
    for file in files:
        with translated(OSError, UsageError, f"--env-file {file}", "", "name a file that can be read"):
            lines = file.read_text(errors="surrogateescape").split("\n")
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.startswith("#"):
                found.update([_variable(line, f"{file}:{number}")])
    found.update(_variable(option, "--env") for option in options)
    return found


def _variable(text: str, where: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not name.isprintable() or " " in name or "\0" in value:
        raise UsageError(where, "is no NAME=VALUE", "write NAME=VALUE, or NAME for the caller's own value")
    if equals:
        return name, value
    if name not in os.environ:
        raise UsageError(f"{where} {name}", "is not set here", "sudo drops variables: sudo NAME=VALUE isolator run ...")
    return name, os.environ[name]
