"""``isolator audit``: check the trail. Needs read access to the files, not the daemon.

``tail``, ``query`` and ``story`` are in ``host.cli.audit``: they can ask the daemon.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from isolator.cli.output import Group, here, print_json, styled
from isolator.cli.progress import Progress
from isolator.errors import IsolatorError, NotFoundError, UsageError, nearest, printable, translated
from isolator.paths import Paths

if TYPE_CHECKING:
    from collections.abc import Callable

    from isolator.audit.verify import Report

T = TypeVar("T")

_AGO = re.compile(r"(\d+)\s*([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_BAD = (".denied", ".crashed", ".failed", ".dead", ".quarantined", ".rejected", ".gap")


@click.group(
    cls=Group,
    epilog="\b\nExamples:\n  isolator audit tail -f\n  isolator audit query --plugin slack --since 2h\n"
    "  isolator audit story ev_01a2\n  isolator audit verify",
)
def audit() -> None:
    """Read and verify the audit trail."""


@audit.command(
    epilog="\b\nExamples:\n  isolator audit verify\n  isolator audit verify --anchor 12001:9f86d081884c7d65\n"
    "  isolator audit verify copy/audit.jsonl --key public.pem"
)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--key", metavar="FILE", type=click.Path(path_type=Path), help="Default: public.pem beside it.")
@click.option("--anchor", "anchors", metavar="SEQ:HASH", multiple=True, help="A hash noted elsewhere; repeatable.")
@here
def verify(root: str | None, file: Path | None, key: Path | None, anchors: tuple[str, ...], as_json: bool) -> None:
    """Check that nothing was changed, removed, inserted or moved.

    FILE is one file of a trail or a folder with all of them; without it, this
    host's trail.
    """
    from isolator.audit import reader
    from isolator.audit.files import LIVE
    from isolator.audit.recover import HEAD_NAME, read_head
    from isolator.audit.seal import PUBLIC_NAME, load_public
    from isolator.audit.verify import anchors_of, verify

    paths = Paths.of(root)
    place = file or paths.audit_log
    if not readable(place.exists):
        remedy = "name a file or folder that is there" if file else "start the daemon, or check --root"
        raise NotFoundError("audit trail", f"there is none at {place}", remedy)
    directory = place if place.is_dir() else place.parent
    with translated(ValueError, UsageError, "--anchor"):
        known = anchors_of(list(anchors))
    if directory.resolve() == paths.audit_log and (place.is_dir() or place.name == LIVE):
        try:
            head = read_head(paths.audit_lib / HEAD_NAME)
        except PermissionError:
            head = None  # only root and the writer see it
        if head is not None and head.seq:
            known.setdefault(head.seq, head.hash)
    found = readable(lambda: reader.trail_files(place)) if place.is_dir() else [place]
    key = key or directory / PUBLIC_NAME
    try:
        keys = readable(lambda: load_public(key))
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError("public key", f"there is no {key}", "name it with --key") from None
    except IsADirectoryError:
        raise UsageError("public key", f"{key} is a folder", "name the file with --key") from None
    except ValueError as error:
        raise UsageError("public key", str(error)) from None
    size = readable(lambda: sum(path.stat().st_size for path in found))
    with Progress("verifying the trail", size, quiet=as_json) as progress:
        report = readable(lambda: verify(found, keys, known, whole=place.is_dir(), advance=progress.advance))
    if as_json:
        print_json(_as_json(report))
    elif not report.misfits:
        for paragraph in _good(report).splitlines():
            click.echo(textwrap.fill(paragraph, width(), break_long_words=False, break_on_hyphens=False))
    if report.misfits:
        if as_json:
            sys.exit(1)
        more = f" (and {report.misfit_count - 1} more places; --json lists them)" if report.misfit_count > 1 else ""
        raise IsolatorError("audit trail", f"does not fit together at {report.misfits[0]}{more}")


def check_types(types: tuple[str, ...]) -> None:
    """Raise UsageError for a type, or a family, that no record has."""
    from isolator.audit.schema import RECORDS

    families = {f"{name.partition('.')[0]}.*" for name in RECORDS}
    for wanted in types:
        known = families if wanted.endswith(".*") else set(RECORDS)
        if wanted not in known:
            near = nearest(wanted, sorted(known))
            remedy = f"did you mean {near}?" if near else "docs/audit.md lists them"
            raise UsageError(f"--type {wanted}", "no record has that type", remedy)


def width() -> int:
    """The terminal's columns (or those of COLUMNS), at most 80."""
    return max(40, min(80, shutil.get_terminal_size().columns))


def _good(report: Report) -> str:
    """The verdict on a good trail, in one paragraph."""
    files = _plural(report.files, "file")
    if not report.records:
        return f"The trail is empty ({files})."
    text = (
        f"The trail fits together: {_plural(report.records, 'record')} in {files}, from {report.first} "
        f"({report.first_time[:19]}Z) to {report.last} ({report.last_time[:19]}Z), {_plural(report.seals, 'seal')}."
    )
    if report.retired:
        text += f" Records 1 to {report.retired} were retired by retention, under seal."
    if report.lost or report.gaps:
        text += f" It tells of {_plural(len(report.gaps), 'gap')} itself; {_plural(report.lost, 'record')} lost"
        text += f", and what a process that died had not sent ({report.uncounted} times)." if report.uncounted else "."
    if not report.seal:
        text += " Nothing is sealed yet, so whoever can write the file could have rewritten all of it."
    else:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(report.seal_time)).total_seconds()
        text += f" Newest seal: record {report.seal}, {_ago(seconds)} ago"
        text += f"; the {report.unsealed} after it are not sealed yet." if report.unsealed else "; nothing is after it."
    if report.torn:
        text += (
            f" The last line is unfinished ({report.torn} bytes): it is being written, or its writer was killed;"
            " then the next start records it."
        )
    if report.seal:
        text += f"\nTo hold it against this host's own root, note elsewhere: {report.seal}:{report.seal_hash}"
    return text


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _as_json(report: Report) -> dict[str, Any]:
    from dataclasses import asdict

    return {"ok": not report.misfits, **asdict(report), "unsealed": report.unsealed}


def _ago(seconds: float) -> str:
    for limit, unit in ((120, "s"), (7200, "min"), (172800, "h")):
        if seconds < limit:
            return f"{max(0, seconds) / {'s': 1, 'min': 60, 'h': 3600}[unit]:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def print_lines(lines: list[bytes], as_json: bool) -> None:
    """Lines of the trail on stdout, each as a line of text or as it is."""
    from isolator.audit.record import parse
    from isolator.audit.text import record_text

    texts = []
    for line in lines:
        if as_json:
            # What the writer wrote is printable ASCII; anything else was put there by somebody.
            texts.append(printable(line.decode("ascii", "backslashreplace")))
        elif (record := parse(line)) is not None:
            colour = "red" if record.type.endswith(_BAD) else None
            texts.append(styled(record_text(record), colour) if colour else record_text(record))
        else:
            texts.append(f"(no record) {printable(line.decode('utf-8', 'replace'))}")
    if texts:
        click.echo("\n".join(texts))


def readable(read: Callable[[], T]) -> T:
    """Return ``read()``; raises IsolatorError with a remedy when the files may not be read."""
    try:
        return read()
    except PermissionError as error:
        raise IsolatorError("audit trail", f"{error.filename} may not be read", "run as root") from None


def moment(text: str | None) -> str | None:
    """A time as the trail spells it, from ``2h`` (ago) or an ISO time, UTC unless it says otherwise."""
    if text is None:
        return None
    try:
        if match := _AGO.fullmatch(text):
            when = datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: int(match[1])})
        else:
            when = datetime.fromisoformat(text)
            when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    except (ValueError, OverflowError):
        why = f"{text[:80]!r} is neither like 2h nor like 2026-01-31T12:00, or too long ago"
        raise UsageError("time", why) from None
    return f"{when.replace(tzinfo=None).isoformat(timespec='microseconds')}Z"
