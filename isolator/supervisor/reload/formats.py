"""Formats of the state that crosses an exec: a sealed file in memory, one JSON object with the number of its format.

A version reads its own format and the one before, and writes both: the newest that the other side reads. That is what
makes a step back to the version before possible.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping

from isolator.errors import IsolatorError, UnavailableError
from isolator.ipc.body import Json
from isolator.ipc.handover import DaemonState
from isolator.linux.memfd import make_sealed, read_sealed

FORMAT = 2
"""The present format. With the next one, ``UP`` and ``DOWN`` each get the function that changes between it and this."""
_MOST = 512 << 20


def _without_users_own(body: Json) -> Json:
    """Format 1: runs of users and deadlines cannot be handed over, and what was staged has expired."""
    if bound := [plugin["name"] for plugin in body["plugins"] if "fence" in plugin]:
        why = f"the installed version knows no leases, and these plugins have one: {', '.join(bound)}"
        raise UnavailableError("reload", why, "install a version that does, or restart the daemon")
    if runs := (body.get("runners") or {}).get("runs"):
        named = ", ".join(f"run {run['id']} of uid {run['uid']}" for run in runs)
        why = f"the installed version does not take over what users run, and these go on: {named}"
        raise UnavailableError("reload", why, "ask again when they have ended")
    return {key: value for key, value in body.items() if key not in ("staged", "runners")}


UP: Mapping[int, Callable[[Json], Json]] = {2: lambda body: body}
"""By format, how the state of the one before becomes one of it."""
DOWN: Mapping[int, Callable[[Json], Json]] = {2: _without_users_own}
"""By format, how a state of it becomes one of the format before."""


def readable() -> tuple[int, ...]:
    """The formats that this version reads, the newest first."""
    return (FORMAT, *(number - 1 for number in (FORMAT,) if number in UP))


def newest_common(others: Iterable[int]) -> int:
    """The newest format that this version writes and the other one reads; raises IsolatorError."""
    written = {FORMAT, *(number - 1 for number in (FORMAT,) if number in DOWN)}
    common = written & {*others}
    if not common:
        theirs = ", ".join(map(str, sorted(others))) or "none"
        raise IsolatorError(
            "reload", f"the new version takes over states of format {theirs}, this one hands over {FORMAT}",
            "go over a version between them, or restart the daemon",
        )  # fmt: skip
    return max(common)


def write(state: DaemonState, number: int = FORMAT) -> int:
    """A descriptor of a sealed file with the state, in the format ``number``."""
    body = state.to_json()
    for step in range(FORMAT, number, -1):
        body = DOWN[step](body)
    return make_sealed(json.dumps({"format": number, "state": body}, separators=(",", ":")).encode())


def read(fd: int) -> DaemonState:
    """The state of a file that ``write`` has made; raises IsolatorError for any other, and for other formats."""
    where = "state of the daemon before"
    try:
        found = json.loads(read_sealed(fd, _MOST))
        number, body = found["format"], found["state"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IsolatorError(where, f"cannot be read: {error}", "restart the daemon") from None
    if number not in readable():
        reads = ", ".join(map(str, readable()))
        raise IsolatorError(where, f"is of format {number}, and this version reads {reads}", "restart the daemon")
    if number != FORMAT:
        body = UP[FORMAT](body)
    return DaemonState.from_json(body, where)
