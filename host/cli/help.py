"""What every ``--help`` and every man page ends with: exit codes and variables, which all commands share."""

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

    _end = ""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """Write the first line of a help, and keep what comes last."""
        super().write_usage(prog, args, prefix)
        variables = "; ".join(f"{name} {meaning}" for name, meaning in VARIABLES.items())
        self._end = f"\nExit codes: {exit_codes(prog)}\nEnvironment: {variables}.\n"

    def getvalue(self) -> str:
        """The whole text."""
        return super().getvalue() + self._end


def use_formatter() -> None:
    """Have every command's help made by it."""
    click.Context.formatter_class = HelpFormatter
