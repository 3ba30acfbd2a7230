"""Search of the trail in a process of its own (PROCESS Q): ``python3 -I -m isolator.audit.search DIR``.

The host starts one for each search of a caller that cannot read the files. It has the host's rights and none of its
memory. On a busy host the kernel gives it a tenth of the processor time of another process: a search of gigabytes
delays no delivery, and comes to an end all the same. Its processor time in all, and its memory, are limited.
One line of JSON on standard input is the search; what is found goes to standard
output as it stands in the trail. Exit code 3: the search found an error, which is one line of JSON on standard error.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import prctl

from isolator.audit.reader import Query, event_ids, lines
from isolator.audit.story import collect
from isolator.errors import IsolatorError, UsageError
from isolator.linux.priority import go_behind

NICE = 10
CPU_SECONDS = 60
MEMORY = 512 << 20
"""Bytes of address space."""
MOST = 100_000
"""Records that ``limit`` may keep, so that the newest of them fit into the memory."""
FAILED = 3


def found(directory: Path, wanted: dict[str, Any]) -> Iterable[bytes]:
    """The lines that a search finds, oldest first; of a ``story`` those of the one event whose id begins so."""
    story = wanted.get("story")
    if story is not None:
        return _story(directory, str(story))
    types = tuple(wanted.get("types") or ())
    search = Query(wanted.get("plugin"), types, wanted.get("event"), wanted.get("since"), wanted.get("until"))
    limit = wanted.get("limit")
    return deque(lines(directory, search), min(limit, MOST)) if limit else lines(directory, search)


def _story(directory: Path, event_id: str) -> Iterator[bytes]:
    records = collect(directory, event_id)
    if not records:
        candidates = event_ids(directory, event_id, 3)
        if len(candidates) > 1:
            raise UsageError(f"event {event_id}", f"several ids begin so: {', '.join(candidates)}", "write more of it")
        records = collect(directory, candidates[0]) if candidates else []
    return (line for line, _ in records)


def _confine(parent: int) -> None:
    """Take a small share of the processor and of the memory, and end with the host."""
    go_behind(NICE)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prctl.set_pdeathsig(signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


def main() -> None:
    """Entry point of the process."""
    _confine(int(sys.argv[2]))
    wanted = json.loads(sys.stdin.readline())
    try:
        for line in found(Path(sys.argv[1]), wanted):
            sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()
    except (IsolatorError, OSError) as error:
        shown = (
            error if isinstance(error, IsolatorError) else IsolatorError("audit trail", error.strerror or str(error))
        )
        print(json.dumps(shown.to_json()), file=sys.stderr)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
