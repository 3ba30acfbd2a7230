"""``isolator plugin logs``: what plugins write, of one, of several, or of all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from host.cli.complete import plugin_names
from host.cli.options import SINCE
from host.cli.output import newest, safe
from host.client.client import Client
from isolator.cli.audit import moment
from isolator.cli.output import here
from isolator.errors import NotFoundError, UnavailableError

_USUAL, _MOST = 100, 10_000
"""Lines that are shown unless somebody says otherwise, and that the daemon gives of one log at once."""


@click.command(
    epilog="\b\nExamples:\n  isolator plugin logs slack -f\n  isolator plugin logs --since 10m\n"
    "  isolator plugin logs slack indexer -n 1000 --json",
)
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=plugin_names)
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines as they are written.")
@newest("lines", None, _MOST, 0, shown=f"{_USUAL}; with --since all")
@SINCE
@here
def logs(
    root: str | None, names: tuple[str, ...], follow: bool, lines: int | None, since: str | None, as_json: bool
) -> None:
    """Show what plugins wrote to stdout and stderr: those named, or all.

    A line says where another run begins.
    """
    begin = moment(since)
    most = lines if lines is not None else _USUAL if begin is None else _MOST * max(1, len(names))
    with Client(root) as client:
        wanted = list(dict.fromkeys(names)) or [entry["name"] for entry in client.call("plugin.list")["plugins"]]
        shown = _Shown(wanted, as_json=as_json)
        found: list[dict[str, Any]] = []
        for name in wanted:
            answer = client.call("plugin.logs", name=name, lines=_MOST if begin else max(most, 1), follow=follow)
            found += [line for line in answer["lines"] if begin is None or line["time"] >= begin]
            shown.begin(name, answer["lines"])
        found.sort(key=lambda line: str(line["time"]))
        for line in found[-most:] if most else []:
            shown.show(line)
        if not follow:
            if not found and not as_json:
                when = f" since {since}" if begin else " so far"
                click.echo(f"{', '.join(wanted) or 'no plugin'} has written nothing{when}", err=True)
            return
        with contextlib.suppress(KeyboardInterrupt):
            for line in client.notifications():
                shown.show(line)
            while _go_on(root, wanted, shown):
                pass


def _go_on(root: str | None, names: Sequence[str], shown: _Shown) -> bool:
    """Follow the daemon's next host process, from where the one before has left; False when there is no daemon."""
    try:
        client = Client(root)
    except UnavailableError:
        return False
    with client:
        missed: list[Mapping[str, Any]] = []
        for name in names:
            with contextlib.suppress(NotFoundError):  # it was removed
                missed += shown.missed(name, client.call("plugin.logs", name=name, lines=_MOST, follow=True)["lines"])
        for line in sorted(missed, key=lambda line: str(line["time"])):
            shown.show(line)
        for line in client.notifications():
            shown.show(line)
    return True


class _Shown:
    """Lines as they are printed, with the plugin's name if there are several."""

    def __init__(self, names: Sequence[str], *, as_json: bool) -> None:
        self._width = max(map(len, names)) if len(names) > 1 else 0
        self._as_json = as_json
        self._runs: dict[str, str] = {}
        self._newest: dict[str, Mapping[str, Any]] = {}
        """The newest line of each plugin, shown or from before what is shown."""

    def begin(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Take note of the lines that a plugin had written before it is followed."""
        if lines:
            self._newest[name] = lines[-1]

    def missed(self, name: str, lines: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return the lines of a plugin that are not shown yet."""
        newest = self._newest.get(name)
        if newest is None:
            return lines
        at = next((at for at in range(len(lines), 0, -1) if lines[at - 1] == newest), None)
        return lines[at:] if at is not None else [line for line in lines if line["time"] > newest["time"]]

    def show(self, line: Mapping[str, Any]) -> None:
        self._newest[line["plugin"]] = line
        if self._as_json:
            click.echo(json.dumps(line))
            return
        name, run = line["plugin"], line["run"]
        whose = f"{name:{self._width}} " if self._width else ""
        if run is not None and self._runs.setdefault(name, run) != run:
            self._runs[name] = run
            click.echo(f"--- {whose.rstrip()}{' ' if whose else ''}run {run}")
        mark = {"stdout": " ", "stderr": "!"}.get(line["stream"], "#")
        click.echo(f"{line['time'][:23]}Z {whose}{mark} {safe(line['line']) if line['line'] else ''}")
