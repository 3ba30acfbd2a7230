"""Options of ``isolator run``: each declared once, for the command line that click shows and for the one read plainly.

Nothing here is imported but what Python itself has loaded: reading a line has to cost nothing beside the cage.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing, which has it too, takes longer to import than all else here; mypy goes by the name
if TYPE_CHECKING:
    from typing import Any, Literal


class Option:
    """One option; without a ``metavar`` it takes no value."""

    def __init__(
        self,
        names: tuple[str, ...],
        help: str,
        metavar: str = "",
        *,
        repeated: bool = False,
        number: bool = False,
        choices: tuple[str, ...] = (),
    ) -> None:
        self.names, self.help, self.metavar = names, help, metavar
        self.repeated, self.number, self.choices = repeated, number, choices
        self.field = names[-1].lstrip("-").replace("-", "_")
        """Its name among the values: that of ``--env-file`` is ``env_file``."""


OPTIONS = (
    Option(("--policy",), "Take the grants of FILE.", "FILE"),
    Option(("--memory",), "Memory cap, e.g. 64M (default 256M).", "SIZE"),
    Option(("--cpu",), "Share of one core, e.g. 25% (the default) or 200%.", "SHARE"),
    Option(("--tasks",), "Processes and threads at once (default 64).", "N", number=True),
    Option(("--egress",), "Let it reach HOST:PORT; may be repeated.", "HOST:PORT", repeated=True),
    Option(("--read",), "Show PATH read-only at the same place; may be repeated.", "PATH", repeated=True),
    Option(("--write",), "Let it change DIR, at the same place; may be repeated.", "DIR", repeated=True),
    Option(
        ("--net",), "No network; what --egress names; any public address.", "HOW", choices=("none", "names", "public")
    ),
    Option(("--env",), "Set a variable, or let this one through; may be repeated.", "NAME[=VALUE]", repeated=True),
    Option(("--env-file",), "Set those of FILE, one a line.", "FILE", repeated=True),
    Option(("--cwd",), "Start in DIR, which --read or --write shows (default /).", "DIR"),
    Option(("--tmp",), "Size of /tmp, in memory (default 32M).", "SIZE"),
    Option(("--nofile",), "Open files at once (default 1024).", "N", number=True),
    Option(("-t", "--tty"), "Give it a terminal of its own, joined to this one."),
    Option(("--audit",), "Append its records to FILE.", "FILE"),
    Option(("--json",), "Print how it ended as JSON on stderr."),
)
"""In the order in which ``--help`` has them."""


class RunOptions:
    """The values of one command line: of each option by ``Option.field``, then what is to be run, and where."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    policy: str | None = None
    memory: str | None = None
    cpu: str | None = None
    tasks: int | None = None
    egress: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    net: Literal["none", "names", "public"] | None = None
    env: tuple[str, ...] = ()
    env_file: tuple[str, ...] = ()
    cwd: str | None = None
    tmp: str | None = None
    nofile: int | None = None
    tty: bool = False
    audit: str | None = None
    json: bool = False
    command: tuple[str, ...] = ()
    root: str | None = None


def read_plainly(arguments: list[str]) -> RunOptions | None:
    """The options of ``[--root DIR] run [OPTIONS] [--] COMMAND``; None unless the line is in order.

    None means that click reads it, which knows help and what to say about a mistake.
    """
    values: dict[str, Any] = {}
    if arguments[:1] == ["--root"]:
        values["root"], arguments = "".join(arguments[1:2]), arguments[2:]
    if arguments[:1] != ["run"]:
        return None
    place = 1
    while place < len(arguments):
        text = arguments[place]
        if not text.startswith("-") or text in ("-", "--"):
            place += text == "--"
            break
        name, equals, value = text.partition("=") if text.startswith("--") else (text, "", "")
        option = _BY_NAME.get(name)
        if option is None or (equals and not option.metavar):
            return None
        place += 1
        if not option.metavar:
            values[option.field] = True
            continue
        if not equals:
            if place == len(arguments):
                return None
            value, place = arguments[place], place + 1
        if (option.choices and value not in option.choices) or (option.number and not _is_number(value)):
            return None
        known = int(value) if option.number else value
        values[option.field] = (*values.get(option.field, ()), known) if option.repeated else known
    command = tuple(arguments[place:])
    return RunOptions(**values, command=command) if command else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 16


_BY_NAME = {name: option for option in OPTIONS for name in option.names}
