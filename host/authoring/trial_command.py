"""``isolator plugin test``: events into a plugin in the real cage, without an installed daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from host.cli import arguments
from host.cli.output import AS_JSON, SETTINGS, print_json
from isolator.errors import IsolatorError, NotFoundError, UsageError

if TYPE_CHECKING:
    from host.authoring.trial import Plan

_MOST_FOLDERS = 2000
"""Folders that are watched; changes in those beyond are not noticed."""


@click.command(
    context_settings=SETTINGS,
    epilog="\b\nExamples:\n  sudo isolator plugin test ./deploy-bell\n"
    "  sudo isolator plugin test . --event deploy.failed --payload @failed.json --watch\n"
    "  sudo isolator plugin test . --policy prod.toml --junit report.xml\n\n"
    "In CI the exit code says it: 0 every event was handled, 1 one was not, others as usual.",
)
@click.argument("folder", metavar="DIR")
@click.option("--event", "events", metavar="NAME", multiple=True, help="Send this event (default: one of each hook).")
@click.option("--payload", metavar="JSON", help="JSON, @FILE or -, for one --event (default: an example).")
@click.option("--config", metavar="K=V", multiple=True, help="K=V, K=@FILE or K=-; repeatable.")
@click.option("--policy", metavar="FILE", help="Grant this and no more (default: what the manifest asks for).")
@click.option(
    "--schema", "schemas", metavar="NAME=FILE", multiple=True, help="An event of your platform, by its schema."
)
@click.option("--timeout", default=60.0, show_default=True, type=click.FloatRange(0.1, 3600), help="Seconds a reply.")
@click.option("--watch", is_flag=True, help="Repeat it whenever a file in DIR changes.")
@click.option("--junit", metavar="FILE", help="Write a report for CI.")
@AS_JSON
@click.pass_obj
def test(
    root: str | None,
    folder: str,
    events: tuple[str, ...],
    payload: str | None,
    config: tuple[str, ...],
    policy: str | None,
    schemas: tuple[str, ...],
    timeout: float,
    watch: bool,
    junit: str | None,
    as_json: bool,
) -> int:
    """Send events to a plugin in its cage, and show replies, log, and what it was refused.

    A daemon of this command's own does it, below a root of its own, which is gone afterwards: none needs to run, and
    the one that runs is left alone. Needs root. Ceiling, defaults and network are those of this host's host.toml. It
    has what its policy grants: with the network it was granted, it reaches the real other side.
    """
    from host.authoring import trial_report
    from host.authoring.private_daemon import PrivateDaemon
    from host.authoring.trial import Trials

    if payload is not None and len(events) != 1:
        raise UsageError("--payload", "is for one event", "name it with --event")
    plan = plan_of(folder, events, payload, config, policy, schemas, timeout)

    with ending_cleanly(), PrivateDaemon("plugin test", root) as daemon:
        trials = Trials(daemon, plan)

        def work() -> int:
            trial = trials.round()
            if as_json:
                print_json(trial_report.to_json(trial))
            else:
                trial_report.show(trial)
            if junit is not None:
                _write(lambda: trial_report.write_junit(trial, Path(junit)), junit)
            return 0 if trial.ok else 1

        return asyncio.run(_repeat(plan.folder, work)) if watch else work()


def plan_of(
    folder: str, events: Iterable[str], payload: str | None, config: tuple[str, ...], policy: str | None,
    schemas: tuple[str, ...], timeout: float,
) -> Plan:  # fmt: skip
    """The plan that options of a command are; raises IsolatorError."""
    from host.authoring.trial import Plan

    given = arguments.json_object(payload) if payload is not None else None
    return Plan(
        arguments.absolute(folder),
        dict.fromkeys(events, given),
        arguments.config_values(config)[0],
        _file(policy) if policy is not None else None,
        dict(map(_schema, schemas)),
        timeout,
    )


async def _repeat(folder: str, work: Callable[[], int]) -> int:
    """Work now, and again after every change below a folder; errors are shown. Ends with ^C."""
    from isolator.linux.folder_watch import FolderWatch

    changed = asyncio.Event()
    watching = FolderWatch(lambda _: changed.set())
    with contextlib.closing(watching):
        while True:
            watching.set(_folders(folder))
            changed.clear()
            try:
                await asyncio.to_thread(work)
            except IsolatorError as error:
                click.echo(f"isolator: {error}", err=True)
            click.echo("\nwaiting for a change; ^C ends it", err=True)
            await changed.wait()


def _folders(folder: str) -> list[str]:
    """A folder and those below it, but for hidden ones."""
    found: list[str] = []
    for path, inner, _ in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found.append(path)
        if len(found) >= _MOST_FOLDERS:
            break
    return found


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this command as ^C does: what it has made is removed."""

    def end(number: int, _: Any) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _file(name: str) -> Path:
    if not Path(name).is_file():
        raise NotFoundError(name, "no such file")
    return Path(name)


def _schema(text: str) -> tuple[str, dict[str, Any]]:
    name, separator, file = text.partition("=")
    if not separator:
        raise UsageError(f"--schema {text}", "is not NAME=FILE", "write --schema backup.failed=backup.schema.json")
    return name, arguments.json_object(f"@{file}")


def _write(write: Callable[[], None], name: str) -> None:
    try:
        write()
    except OSError as error:
        raise UsageError(f"--junit {name}", error.strerror or "cannot be written", "name another file") from None
