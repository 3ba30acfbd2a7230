"""``isolator serve``, for ``--help`` and for lines that ``host.cli.main`` does not read by itself."""

from __future__ import annotations

import click


@click.command(epilog="\b\nExamples:\n  isolator serve\n  isolator --root /tmp/try serve")
@click.option("--config", metavar="FILE", help="Read FILE instead of /etc/isolator/host.toml.")
@click.option("--certifying", is_flag=True, hidden=True)
@click.option("--adopt", metavar="FD", type=int, hidden=True)
@click.option("--check-handover", metavar="FD", type=int, hidden=True)
@click.pass_obj
def serve(
    root: str | None, config: str | None, certifying: bool, adopt: int | None, check_handover: int | None
) -> None:  # fmt: skip
    """Run the daemon in the foreground.

    Prints 'isolator: ready' on stdout when it accepts commands (and tells systemd). SIGTERM or ^C stops it and
    every plugin cleanly, and so does the end of the terminal that it was started from. Without a terminal, SIGHUP
    reloads it, as 'isolator reload' does.
    """
    from isolator.cli.daemon import run_daemon

    run_daemon(root, config, certifying, adopt, check_handover)
