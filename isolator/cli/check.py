"""The ledger of this host as ``isolator check`` shows it."""

from __future__ import annotations

import os
import platform
import shutil
import textwrap
from collections.abc import Sequence

import click

from isolator.cli.output import print_json
from isolator.layers.base import Control

_WIDTH = 80


def show(alarms: Sequence[str], notes: Sequence[str] = (), *, as_json: bool) -> None:
    """Print the ledger, ``notes`` of host.toml, and a running daemon's complaints; exits 1 when nothing could start."""
    from isolator.layers.ledger import ledger, missing
    from isolator.volume import volume

    controls = ledger(volume.check)
    lacking = missing()
    ready = not lacking and not alarms
    if as_json:
        body = {"kernel": platform.release(), "ready": ready, "controls": [c.to_json() for c in controls]}
        print_json({**body, "alarms": list(alarms), "notes": list(notes)})
    else:
        click.echo(f"Linux {platform.release()} on {platform.machine()}\n")
        click.echo("\n".join(render(controls)))
        click.echo()
        for note in notes:
            click.echo(textwrap.fill(f"Note: {note}", _WIDTH))
        click.echo(_verdict(lacking))
    if not ready:
        raise SystemExit(1)


def render(controls: tuple[Control, ...]) -> list[str]:
    """The ledger as lines: state, control, the kernel's reason, and the remedy of a gap.

    They are as wide as the terminal, and at most 100 columns; longer only where a word is.
    """
    width = min(shutil.get_terminal_size((_WIDTH, 24)).columns, 100)
    label = max(len(control.name) for control in controls)
    lines = []
    for control in controls:
        head = f"{control.state:<11}  {control.name:<{label}}  "
        indent = " " * len(head)
        lines += _wrap(control.reason, width, head, indent) or [head]
        if control.state != "enforced" and control.remedy:
            lines += _wrap(f"-> {control.remedy}", width, indent, f"{indent}   ")
    return lines


def _wrap(text: str, width: int, first: str, others: str) -> list[str]:
    """The lines of a text; a word is never broken, since a person may copy it."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _verdict(lacking: list[Control]) -> str:
    if lacking:
        text = f"Not ready: {len(lacking)} mandatory control(s) unavailable; no plugin starts on this host."
        return text if os.geteuid() == 0 else "Not all of it can be told by this user: run it with sudo."
    return "Ready: every mandatory control can be enforced on this host."
