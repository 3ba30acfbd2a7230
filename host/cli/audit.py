"""``isolator audit tail``, ``query`` and ``story``: the trail's records, old ones and those written from now on.

The daemon sends them while it runs, so that a ``viewer`` needs no access to the files; else, and when it ends, they
are read in the files. A record that follows another and does not continue it is reported on stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from host.cli.options import SINCE, of_plugin
from host.cli.output import newest, safe
from host.client.client import Client
from isolator.audit import files, reader
from isolator.audit.record import parse
from isolator.cli.audit import audit, check_types, moment, print_lines, readable, width
from isolator.cli.output import here, print_json, styled
from isolator.errors import DeniedError, IsolatorError, NotFoundError, UnavailableError
from isolator.paths import Paths

_RETRY = 1.0
"""Seconds between two attempts to reach a daemon that has ended."""


_PLUGIN = of_plugin("Only this plugin's.")
_TYPES = click.option(
    "--type", "types", metavar="TYPE", multiple=True, help="This type, or a family like net.*; repeatable."
)


@audit.command(
    epilog="\b\nExamples:\n  isolator audit query --plugin slack --type net.* --since 2h\n"
    "  isolator audit query --type net.denied --json"
)
@_PLUGIN
@_TYPES
@click.option("--event", metavar="ID", help="Only what belongs to this event; the beginning of its id will do.")
@SINCE
@click.option("--until", metavar="TIME", help="Up to this time.")
@newest("limit", None, 100_000)
@here
def query(
    root: str | None,
    plugin: str | None,
    types: tuple[str, ...],
    event: str | None,
    since: str | None,
    until: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Find records by plugin, type, event and time."""
    from itertools import islice

    from host.cli import trail

    check_types(types)
    wanted = reader.Query(plugin, types, event, moment(since), moment(until))
    found = trail.lines(root, wanted, limit=limit)
    shown = 0
    while batch := list(islice(found, 1000)):
        print_lines(batch, as_json)
        shown += len(batch)
    if not shown:
        _check_names(root, plugin, event)
        if not as_json:
            click.echo("no record matches", err=True)


@audit.command(epilog="\b\nExamples:\n  isolator audit story ev_01a2\n  isolator audit story ev_01a2 --json")
@click.argument("event_id")
@here
def story(root: str | None, event_id: str, as_json: bool) -> None:
    """Tell everything that one event caused, in order; the beginning of its id will do."""
    from host.cli import trail
    from isolator.audit.story import story_lines

    found = trail.story(root, event_id)
    if not found:
        raise _without_records(event_id, trail.standing(root, event_id))
    event_id = next(one for _, record in found for one in record.events if one.startswith(event_id))
    event = trail.standing(root, event_id)
    if as_json:
        records = [json.loads(line) for line, _ in found]
        shown = {"event_id": event_id, "records": records, "deliveries": event and event["deliveries"]}
        print_json(shown)
        return
    deliveries = event["deliveries"] if event is not None else None
    for line in story_lines(event_id, [record for _, record in found], width(), deliveries):
        click.echo(styled(line.text, "red") if line.bad else line.text)


def _without_records(event_id: str, event: Mapping[str, Any] | None) -> NotFoundError:
    """Why there is no story, and which hosts of a cluster have one."""
    hosts = sorted({one["host"] for one in event["deliveries"] if one["host"]}) if event is not None else []
    if event is None or not hosts:
        return NotFoundError(f"event {event_id}", "the trail has no record of it", "see 'isolator event list'")
    states = ", ".join(f"{safe(one['plugin'])}: {safe(one['state'])}" for one in event["deliveries"])
    why = f"the trail of this host has no record of it; {safe(', '.join(hosts))} has its deliveries ({states})"
    return NotFoundError(f"event {event['id']}", why, f"run isolator audit story {event['id']} there")


@audit.command(
    epilog="\b\nExamples:\n  isolator audit tail -f\n"
    "  isolator audit tail -f --plugin slack --type net.*\n"
    "  isolator audit tail -f -n 0 --json | ssh other-host 'cat >> copy.jsonl'\n"
    "  isolator audit tail -f --after 12001 --json >> copy.jsonl"
)
@click.option("-f", "--follow", is_flag=True, help="Go on with new records as they are written.")
@newest("lines", 20, 100_000, 0)
@click.option("--after", metavar="SEQ", type=click.IntRange(0), help="Begin after this record, to complete a copy.")
@_PLUGIN
@_TYPES
@SINCE
@here
def tail(
    root: str | None,
    follow: bool,
    lines: int,
    after: int | None,
    plugin: str | None,
    types: tuple[str, ...],
    since: str | None,
    as_json: bool,
) -> None:
    """Show the last records, or the last of those that match."""
    check_types(types)
    from host.cli import trail

    wanted = reader.Query(plugin, types, since=moment(since)) if plugin or types or since else None
    if wanted is not None and after is None:
        after = trail.newest(root)
        matching = trail.lines(root, wanted, limit=lines or 1)
        found = [line for line in matching if (seq := files.seq_of(line)) is not None and seq <= after]
        print_lines(found if lines else [], as_json)
        if not found:
            _check_names(root, plugin)
        if not follow:
            return
    shown = _Shown(after, wanted, as_json=as_json)
    directory = Paths.of(root).audit_log
    try:
        if (follow or trail.asks_daemon(root)) and _from_daemon(root, shown, lines, after, follow=follow):
            if follow:
                _outlive_daemon(root, directory, shown)
        elif not follow or not _output_closed():
            _from_files(directory, shown, lines, after, follow=follow)
    except KeyboardInterrupt:
        return


def _check_names(root: str | None, plugin: str | None, event: str | None = None) -> None:
    """Raise NotFoundError for a plugin or event that no record is about; a plugin may be registered, or a run."""
    from host.cli import trail

    def is_unknown(wanted: reader.Query) -> bool:
        return not list(trail.search(root, wanted, limit=1))

    if plugin is not None and plugin[:1] != "_" and is_unknown(reader.Query(plugin)):
        try:
            with Client(root) as client:
                client.call("plugin.show", name=plugin)
        except NotFoundError as error:
            raise NotFoundError(f"plugin {plugin}", "the trail has no record of it", error.remedy) from None
        except (UnavailableError, DeniedError):
            raise NotFoundError(f"plugin {plugin}", "the trail has no record of it") from None
    if event is not None and is_unknown(reader.Query(event=event)):
        raise NotFoundError(f"event {event}", "the trail has no record of it", "see 'isolator event list'")


class _Shown:
    """The records as they come, each of which must continue the one before; those that are ``wanted`` are printed."""

    def __init__(self, after: int | None, wanted: reader.Query | None = None, *, as_json: bool) -> None:
        self._wanted, self._as_json = wanted, as_json
        self._chain = reader.Continuity(after or 0)

    @property
    def seq(self) -> int:
        return self._chain.seq

    def show(self, lines: list[bytes]) -> None:
        wrong = [why for line in lines if (why := self._chain.check(line)) is not None]
        if self._wanted is not None:
            records = ((line, parse(line)) for line in lines)
            lines = [line for line, record in records if record is None or self._wanted.matches(record)]
        print_lines(lines, self._as_json)
        for why in wrong:
            click.echo(styled(f"isolator: audit trail: {why}", "red"), err=True)


def _from_daemon(root: str | None, shown: _Shown, lines: int, after: int | None, *, follow: bool = True) -> bool:
    """Print the records that the daemon sends until it ends, or those there are; False when it refuses."""
    try:
        client = Client(root)
    except (UnavailableError, DeniedError):
        return False
    with client:
        try:
            begin = {"after": after} if after is not None else {"lines": min(lines, 10_000)}
            there = client.call("audit.follow", **begin)
        except (UnavailableError, DeniedError):
            if os.access(Paths.of(root).audit_file, os.R_OK):
                return False
            raise
        if not follow and there["after"] >= there["last"]:
            return True
        for sent in client.notifications(watched=sys.stdout.fileno()):
            fresh = [line.encode("ascii", "backslashreplace") for line in sent.get("lines", ())]
            shown.show([line for line in fresh if follow or (files.seq_of(line) or 0) <= there["last"]])
            if not follow and fresh and (files.seq_of(fresh[-1]) or 0) >= there["last"]:
                return True
    if not follow and not _output_closed():
        raise UnavailableError("audit trail", "the daemon closed the connection before the end", "try again")
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
    with contextlib.closing(reader.Follower(directory, last if after is None else after)) as follower:
        while True:
            while fresh := readable(follower.available):
                shown.show(fresh)
            # The end of our own reader (``| head``) ends us even when nothing is written any more.
            if not follow or follower.wait(None, sys.stdout.fileno()):
                return


def _output_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLERR | select.POLLHUP)
    return bool(poll.poll(0))
