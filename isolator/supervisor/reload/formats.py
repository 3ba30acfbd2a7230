"""Formats of the state that crosses an exec: a sealed file in memory, one JSON object with the number of its format.

Beside the state lies the text of ``host.toml`` that was tried with it; a version before this one takes no note of that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from isolator.errors import IsolatorError
from isolator.ipc.formats import Formats
from isolator.ipc.handover import DaemonState
from isolator.linux.memfd import make_sealed, read_sealed

_MOST = 512 << 20


WITHOUT_CAGES = 4
"""From this format on a daemon without a cage to come has neither a launcher nor a broker; others hold both."""
FORMATS = Formats(DaemonState, 4, up=lambda body: body, down=lambda body: body)


def newest_common(others: Iterable[int]) -> int:
    """The newest format that this version writes and the other one reads; raises IsolatorError."""
    others = sorted(others)
    common = FORMATS.newest_common(others)
    if common is None:
        theirs = ", ".join(map(str, others)) or "none"
        why = f"the new version takes over states of format {theirs}, this one hands over {FORMATS.present}"
        raise IsolatorError("reload", why, "go over a version between them, or restart the daemon")
    return common


def write(state: DaemonState, number: int | None = None, host_toml: str = "") -> int:
    """A descriptor of a sealed file with the state, in the present format or in that of this number."""
    number = number or FORMATS.present
    found = {"format": number, "state": FORMATS.body(state, number), "host_toml": host_toml}
    return make_sealed(json.dumps(found, separators=(",", ":")).encode())


def read(fd: int) -> tuple[DaemonState, str | None]:
    """The state of a file that ``write`` has made, and the text of host.toml, None if it is of a version without that.

    Raises IsolatorError for any other file, and for other formats.
    """
    where = "state of the daemon before"
    try:
        found = json.loads(read_sealed(fd, _MOST))
        number, body, host_toml = found["format"], found["state"], found.get("host_toml")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IsolatorError(where, f"cannot be read: {error}", "restart the daemon") from None
    if number not in FORMATS.read:
        reads = ", ".join(map(str, FORMATS.read))
        raise IsolatorError(where, f"is of format {number}, and this version reads {reads}", "restart the daemon")
    return FORMATS.state(number, body, where), str(host_toml) if host_toml is not None else None
