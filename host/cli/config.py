"""``isolator config``: the daemon's own keys."""

from __future__ import annotations

import click

from host.cli.output import AS_JSON, SETTINGS, print_json
from host.client.client import Client


@click.group(context_settings=SETTINGS, epilog="\b\nExample:\n  isolator config rotate-key")
def config() -> None:
    """Manage the daemon's keys."""


@config.command("rotate-key")
@AS_JSON
@click.pass_obj
def rotate_key(root: str | None, as_json: bool) -> None:
    """Encrypt every plugin's config with a new key; the old one is forgotten."""
    with Client(root) as client:
        answer = client.call("config.rotate_key")
    if as_json:
        print_json(answer)
    else:
        click.echo(f"re-encrypted {answer['values']} values with a new key")
