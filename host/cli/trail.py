"""The trail for commands: from its files where this user may read them, else from the daemon, which searches for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from host.client.client import Client, ask
from isolator.audit import files, reader
from isolator.audit.reader import Query
from isolator.audit.record import Record, parse
from isolator.errors import IsolatorError, UnavailableError
from isolator.paths import Paths

Found = tuple[bytes, Record]


def search(root: str | None, wanted: Query, *, limit: int | None = None) -> Iterator[Found]:
    """Every record that matches, oldest first; with ``limit`` only the newest."""
    return _parsed(lines(root, wanted, limit=limit))


def lines(root: str | None, wanted: Query, *, limit: int | None = None) -> Iterator[bytes]:
    """The lines of ``search``."""
    if not asks_daemon(root):
        found = reader.lines(Paths.of(root).audit_log, wanted)
        if limit is None:
            return found
        from collections import deque

        return iter(deque(found, limit))
    asked: dict[str, Any] = {
        "plugin": wanted.plugin, "types": list(wanted.types) or None, "event": wanted.event,
        "since": wanted.since, "until": wanted.until, "limit": limit or 0,
    }  # fmt: skip
    return _from_daemon(root, asked)


def _parsed(lines: Iterable[bytes]) -> Iterator[Found]:
    return ((line, record) for line in lines if (record := parse(line)) is not None)


def story(root: str | None, event_id: str) -> list[Found]:
    """Everything that the event caused whose id begins so; empty when there is none. Raises UsageError for several."""
    if asks_daemon(root):
        return list(_parsed(_from_daemon(root, {"story": event_id})))
    from isolator.audit.search import found

    return list(_parsed(found(Paths.of(root).audit_log, {"story": event_id})))


def standing(root: str | None, event_id: str) -> dict[str, Any] | None:
    """The event as the daemon knows it, wherever its deliveries are; None if it cannot be asked, or knows of none."""
    with contextlib.suppress(IsolatorError), Client(root) as client:
        return client.call("event.show", id=event_id)
    return None


def newest(root: str | None) -> int:
    """Number of the newest record; 0 when there is none."""
    if asks_daemon(root):
        return int(ask(root, "status")["trail"]["last"] or 0)
    lines = reader.tail(Paths.of(root).audit_log, 1)
    return (files.seq_of(lines[-1]) or 0) if lines else 0


def asks_daemon(root: str | None) -> bool:
    """Whether this user may not read the files, and takes the records from the daemon."""
    paths = Paths.of(root)
    return os.geteuid() != 0 and not os.access(paths.audit_file, os.R_OK)


def _from_daemon(root: str | None, wanted: dict[str, Any]) -> Iterator[bytes]:
    try:
        client = Client(root)
    except UnavailableError as error:
        why = f"this user may not read its files, and the daemon does not answer: {error.why}"
        raise UnavailableError("audit trail", why, "start the daemon, or use sudo") from None
    with client:
        client.call("audit.search", **{key: value for key, value in wanted.items() if value is not None})
        for answer in client.notifications():
            yield from (line.encode("ascii", "backslashreplace") for line in answer["lines"])
            if not answer["more"]:
                if answer["error"] is not None:
                    raise IsolatorError.from_json(answer["error"])
                return
        raise UnavailableError("audit trail", "the daemon closed the connection before the end", "try again")
