"""End of every ``--help`` and every man page: exit codes and variables, which all commands share."""

from __future__ import annotations

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

    _path, _is_help = "", False

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """Write the first line, which a mistake has as well."""
        super().write_usage(prog, args, prefix)
        self._path = prog

    def write_heading(self, heading: str) -> None:
        """Write a heading; every help has one, ``Options``."""
        super().write_heading(heading)
        self._is_help = True

    def getvalue(self) -> str:
        variables = "; ".join(f"{name} {meaning}" for name, meaning in VARIABLES.items())
        end = f"\nExit codes: {exit_codes(self._path)}\nEnvironment: {variables}.\n"
        return super().getvalue() + (end if self._is_help else "")


def use_formatter() -> None:
    """Have every command's help made by it."""
    click.Context.formatter_class = HelpFormatter
