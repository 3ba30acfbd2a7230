"""Options that ``isolator plugin test`` and ``isolator dev`` share, and the plan that they make."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from host.cli import arguments
from host.cli.options import CONFIG, F, declaring
from isolator.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from host.authoring.recorder.recorder import Recorder
    from host.authoring.trial import Plan

_OPTIONS = declaring(
    click.argument("folder", metavar="DIR"),
    click.option("--payload", metavar="JSON", help="JSON, @FILE or -, for one --event (default: an example)."),
    CONFIG,
    click.option("--policy", metavar="FILE", help="Grant this and no more (default: what the manifest asks for)."),
    click.option(
        "--schema", "schemas", metavar="NAME=FILE", multiple=True, help="An event of your platform, by its schema."
    ),
    click.option(
        "--recording", metavar="FILE", help="Record what granted names answer into FILE; if it is there, replay it."
    ),
    click.option(
        "--timeout", default=60.0, show_default=True, type=click.FloatRange(0.1, 3600), help="Seconds a reply."
    ),
)


def of_a_plugin(command: F) -> F:
    """Declare the options about a folder and its surroundings; with ``events`` they make the command's ``plan``."""

    @functools.wraps(command)
    def planned(
        *, folder: str, events: tuple[str, ...], payload: str | None, config: tuple[str, ...], policy: str | None,
        schemas: tuple[str, ...], timeout: float, **others: Any,
    ) -> Any:  # fmt: skip
        return command(plan=plan_of(folder, events, payload, config, policy, schemas, timeout), **others)

    return cast(F, _OPTIONS(planned))


def plan_of(
    folder: str, events: Sequence[str], payload: str | None, config: tuple[str, ...], policy: str | None,
    schemas: tuple[str, ...], timeout: float,
) -> Plan:  # fmt: skip
    """The plan that a command line means; raises UsageError or NotFoundError."""
    from host.authoring.trial import Plan

    if payload is not None and len(events) != 1:
        raise UsageError("--payload", "is for one event", "name it with --event")
    given = arguments.json_object(payload) if payload is not None else None
    if policy is not None and not Path(policy).is_file():
        raise NotFoundError(policy, "no such file")
    return Plan(
        arguments.absolute(folder),
        dict.fromkeys(events, given),
        arguments.config_values(config)[0],
        Path(policy) if policy is not None else None,
        dict(map(_schema, schemas)),
        timeout,
    )


def recorder_of(
    recording: str | None, report: Callable[[str], None],
    exchanged: Callable[[Mapping[str, Any]], None] = lambda exchange: None,
) -> Recorder | None:  # fmt: skip
    """The recorder that a command line means."""
    if recording is None:
        return None
    from host.authoring.recorder.recorder import Recorder

    recorder = Recorder(Path(recording), report, exchanged)
    report(recorder.in_words)
    return recorder


def _schema(text: str) -> tuple[str, dict[str, Any]]:
    name, separator, file = text.partition("=")
    if not separator:
        raise UsageError(f"--schema {text}", "is not NAME=FILE", "write --schema backup.failed=backup.schema.json")
    return name, arguments.json_object(f"@{file}")
