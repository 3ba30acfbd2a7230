"""``isolator config``: the daemon's own keys."""

from __future__ import annotations

import click

from host.client.client import ask
from isolator.cli.output import Group, here, print_result
from isolator.layers.phrases import count


@click.group(cls=Group, epilog="\b\nExample:\n  isolator config rotate-key")
def config() -> None:
    """Manage the daemon's keys."""


@config.command("rotate-key", epilog="\b\nExample:\n  sudo isolator config rotate-key")
@here
def rotate_key(root: str | None, as_json: bool) -> None:
    """Encrypt every plugin's config with a new key; the old one is forgotten."""
    answer = ask(root, "config.rotate_key")
    print_result(answer, f"re-encrypted {count(answer['values'], 'value')} with a new key", as_json=as_json)
