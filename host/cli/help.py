"""What every ``--help`` and every man page ends with: exit codes and variables, which all commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

EXIT_CODES = "0 done, 1 failed, 2 usage, 3 not found, 4 denied, 5 needs approval."
EXIT_CODES_OF_RUN = "that of the command; 125 if its cage could not be built."
VARIABLES = {"ISOLATOR_ROOT": "is the default of --root", "NO_COLOR": "turns colours off"}
_RUN = ["run"]


def exit_codes(path: str) -> str:
    """The exit codes of a command, by the words that call it, the program's name first."""
    return EXIT_CODES_OF_RUN if path.split()[1:] == _RUN else EXIT_CODES


class HelpFormatter(click.HelpFormatter):
    """The formatter of every command's help."""

    _path, _has_options = "", False

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """Write the first line, which a mistake has as well."""
        super().write_usage(prog, args, prefix)
        self._path = prog

    def write_dl(self, rows: Sequence[tuple[str, str]], *args: Any, **kwargs: Any) -> None:
        """Write a list, as every help has one."""
        super().write_dl(rows, *args, **kwargs)
        self._has_options = True

    def getvalue(self) -> str:
        """The whole text."""
        variables = "; ".join(f"{name} {meaning}" for name, meaning in VARIABLES.items())
        end = f"\nExit codes: {exit_codes(self._path)}\nEnvironment: {variables}.\n"
        return super().getvalue() + (end if self._has_options else "")


def use_formatter() -> None:
    """Have every command's help made by it."""
    click.Context.formatter_class = HelpFormatter
