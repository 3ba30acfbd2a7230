"""``isolator gc``: what earlier runs left behind."""

from __future__ import annotations

import json

import click

from isolator.errors import IsolatorError
from isolator.paths import Paths


@click.command(epilog="\b\nExamples:\n  sudo isolator gc --dry-run\n  sudo isolator gc")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def gc(root: str | None, dry_run: bool, as_json: bool) -> None:
    """Remove what earlier runs left behind: processes, control groups, mounts.

    Refused while a daemon runs on the same root: it looks after its own.
    """
    from isolator import recovery
    from isolator.journal import Journal

    paths = Paths.of(root)
    if not paths.run.exists() and not recovery.subtree_exists(paths):
        found = []
    else:
        try:
            journal = Journal(paths.journal)
        except PermissionError as error:
            raise IsolatorError("gc", error.strerror or "", "run it with sudo") from None
        try:
            found = recovery.find(paths, journal) if dry_run else recovery.clear(paths, journal)
            if not dry_run:
                recovery.remove_subtree(paths)
        finally:
            journal.close()
    if as_json:
        click.echo(json.dumps([{"kind": f.kind, "name": f.name, "detail": f.detail} for f in found], indent=2))
        return
    for left in found:
        click.echo(f"{'would remove' if dry_run else 'removed'}: {left.kind} {left.name} {left.detail}".rstrip())
    if not found:
        click.echo("Nothing was left behind.")
