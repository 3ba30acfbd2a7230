"""``isolator gc``: what earlier runs left behind."""

from __future__ import annotations

import contextlib

import click

from isolator.cli.output import here, need_root, print_json
from isolator.errors import IsolatorError, translated
from isolator.paths import Paths


@click.command(epilog="\b\nExamples:\n  sudo isolator gc --dry-run\n  sudo isolator gc")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@here
def gc(root: str | None, dry_run: bool, as_json: bool) -> None:
    """Remove what earlier runs left behind: processes, control groups, mounts.

    That is what a killed daemon left, unless one runs on the same root (it looks after its own), and what a killed
    'isolator run' or 'plugin test' left. What runs is never touched: whatever made it holds a lock.
    """
    from isolator.cli import private_root
    from isolator.recovery import daemon as recovery
    from isolator.recovery import standalone as abandoned
    from isolator.recovery.journal import read_unlocked

    paths = Paths.of(root)
    with translated(PermissionError, IsolatorError, "gc", "", "run it with sudo"):
        entries = read_unlocked(paths.journal)
        found = recovery.find(paths, entries) if entries is not None else []
        found += abandoned.find(paths)
        if not paths.instance:
            found += private_root.find()
        if found and not dry_run:
            need_root("gc", "what was left belongs to root")
            if entries is not None:
                _clear_after_daemon(paths)
            abandoned.clear(paths)
            if not paths.instance:
                private_root.clear()
            with contextlib.suppress(OSError):
                paths.run.rmdir()
    if as_json:
        print_json([{"kind": f.kind, "name": f.name, "detail": f.detail} for f in found])
        return
    for left in found:
        click.echo(f"{'would remove' if dry_run else 'removed'}: {left.kind} {left.name} {left.detail}".rstrip())
    if not found:
        click.echo("Nothing was left behind.")


def _clear_after_daemon(paths: Paths) -> None:
    from isolator.recovery import daemon as recovery
    from isolator.recovery.journal import Journal

    with contextlib.closing(Journal(paths.journal)) as journal:
        recovery.clear(paths, journal)
        recovery.remove_subtree(paths)
