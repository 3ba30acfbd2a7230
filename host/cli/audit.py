"""``isolator audit tail``: the last records, and those that are written from now on.

The daemon sends them while it runs, so that a ``viewer`` needs no access to the files; else, and when it ends, they
are followed in the files. Either way a record that does not continue the one before is reported on stderr.
"""

from __future__ import annotations

import os
import select
import sys
import time
from pathlib import Path

import click

from host.client.client import Client
from isolator.audit import files, reader
from isolator.cli.audit import AS_JSON, audit, print_lines, readable
from isolator.errors import DeniedError, IsolatorError, NotFoundError, UnavailableError
from isolator.paths import Paths

_RETRY = 1.0
"""Seconds between two attempts to reach a daemon that has ended."""


@audit.command(
    epilog="\b\nExamples:\n  isolator audit tail -f\n"
    "  isolator audit tail -f -n 0 --json | ssh other-host 'cat >> copy.jsonl'\n"
    "  isolator audit tail -f --after 12001 --json >> copy.jsonl"
)
@click.option("-f", "--follow", is_flag=True, help="Go on with new records as they are written.")
@click.option("-n", "--lines", default=20, show_default=True, type=click.IntRange(0), help="How many to begin with.")
@click.option("--after", metavar="SEQ", type=click.IntRange(0), help="Begin after this record, to complete a copy.")
@AS_JSON
@click.pass_obj
def tail(root: str | None, follow: bool, lines: int, after: int | None, as_json: bool) -> None:
    """Show the last records."""
    shown = _Shown(after, as_json=as_json)
    directory = Paths.of(root).audit_log
    try:
        if follow and _from_daemon(root, shown, lines, after):
            _outlive_daemon(root, directory, shown)
        elif not follow or not _output_closed():
            _from_files(directory, shown, lines, after, follow=follow)
    except KeyboardInterrupt:
        return


class _Shown:
    """The printed records; each must continue the one before."""

    def __init__(self, after: int | None, *, as_json: bool) -> None:
        self._as_json = as_json
        self._chain = reader.Continuity(after or 0)

    @property
    def seq(self) -> int:
        return self._chain.seq

    def show(self, lines: list[bytes]) -> None:
        wrong = [why for line in lines if (why := self._chain.check(line)) is not None]
        print_lines(lines, self._as_json)
        for why in wrong:
            click.secho(f"isolator: audit trail: {why}", fg="red", err=True)


def _from_daemon(root: str | None, shown: _Shown, lines: int, after: int | None) -> bool:
    """Print the records that the daemon sends until it ends; False when it refuses."""
    try:
        client = Client(root)
    except (UnavailableError, DeniedError):
        return False
    with client:
        try:
            client.call("audit.follow", **({"after": after} if after is not None else {"lines": min(lines, 10_000)}))
        except (UnavailableError, DeniedError):
            if os.access(Paths.of(root).audit_file, os.R_OK):
                return False
            raise
        for sent in client.notifications(watched=sys.stdout.fileno()):
            shown.show([line.encode("ascii", "backslashreplace") for line in sent.get("lines", ())])
    return True


def _outlive_daemon(root: str | None, directory: Path, shown: _Shown) -> None:
    """Go on after the daemon's end: read the files, or wait for the next daemon."""
    while not _output_closed():
        if os.access(directory / files.LIVE, os.R_OK):
            return _from_files(directory, shown, 0, shown.seq, follow=True)
        time.sleep(_RETRY)
        _from_daemon(root, shown, 0, shown.seq)


def _from_files(directory: Path, shown: _Shown, lines: int, after: int | None, *, follow: bool) -> None:
    try:
        found = readable(lambda: reader.tail(directory, max(lines, 1)))
    except NotFoundError:
        # The daemon makes the folder before it writes its first record; a follower may come in between.
        if not follow or not directory.is_dir():
            raise
        found = []
    last = (files.seq_of(found[-1]) or 0) if found else 0
    if after is None:
        shown.show(found if lines else [])
        if not follow:
            return
    elif after > last:
        raise IsolatorError("audit trail", f"ends at record {last}: it was cut, or {after} is of another one")
    follower = reader.Follower(directory, last if after is None else after)
    try:
        while True:
            while fresh := readable(follower.available):
                shown.show(fresh)
            # The end of our own reader (``| head``) ends us even when nothing is written any more.
            if not follow or follower.wait(None, sys.stdout.fileno()):
                return
    finally:
        follower.close()


def _output_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLERR | select.POLLHUP)
    return bool(poll.poll(0))
