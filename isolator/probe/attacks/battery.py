"""Battery: makes the attempts that its arguments name, each in a process of its own; prints one JSON line for each.

    python3 -I -c 'import sys; sys.path.insert(0, "/run/isolator"); from probe.battery import main; main()' JSON

JSON is ``{"promise": {...}, "numbers": {...}, "names": [...], "inline": false}``. Inline, for cages that may start no
process, the attempts are made by this very process: one a cage, as whatever kills the attempt ends it.

An attempt that outlives its time limit is killed with its children and reported as broken, as is one that fails in a
way that nobody foresaw: neither counts as held.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import Any

# Before the imports below, which may open something: what is open now, the cage was given.
_START = [int(name) for name in os.listdir("/proc/self/fd")] if os.path.isdir("/proc/self/fd") else []

from . import bombs, files, kernel, network, processes, reach  # noqa: E402, F401  # each declares its attempts
from .kit import ATTEMPTS, NUMBERS, Attempt, Held, Promise  # noqa: E402


def main() -> None:
    task = json.loads(sys.argv[1])
    NUMBERS.update(task["numbers"])
    descriptors = [fd for fd in _START if _is_open(fd)]
    promise = Promise(**task["promise"], init=os.getppid(), descriptors=descriptors)
    for name in task["names"]:
        make = _inline if task["inline"] else _result
        print(json.dumps(make(ATTEMPTS[name], promise)), flush=True)


def _is_open(fd: int) -> bool:
    """The listing itself had one that is closed by now."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _result(attempt: Attempt, promise: Promise) -> dict[str, Any]:
    found = _blank(attempt)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _make(attempt, promise, write)
    os.close(write)
    answer = _read(read, attempt.seconds)
    os.close(read)
    timed_out = answer is None
    _kill(child)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if answer:
        found |= json.loads(answer)
    elif timed_out:
        found |= {"outcome": "broken", "detail": f"no result in {attempt.seconds:g} s"}
    elif status == -signal.SIGSYS:
        found |= {"outcome": "held", "detail": "killed at once (SIGSYS)"}
    else:
        if attempt.alone and status == -signal.SIGKILL:
            time.sleep(attempt.seconds)  # for want of memory the cage is about to end, which tells more
        found |= {"outcome": "broken", "detail": f"it ended with {status}"}
    return found


def _inline(attempt: Attempt, promise: Promise) -> dict[str, Any]:
    signal.alarm(int(attempt.seconds) + 1)  # ends this process, which is reported as broken
    found = _blank(attempt) | _outcome(attempt, promise)
    signal.alarm(0)
    return found


def _blank(attempt: Attempt) -> dict[str, Any]:
    return {"name": attempt.name, "layer": attempt.layer, "title": attempt.title, "errno": None, "detail": ""}


def _make(attempt: Attempt, promise: Promise, write: int) -> None:
    """Make the attempt in the child, report, and end without Python's own clean-up."""
    os.setpgid(0, 0)
    os.write(write, json.dumps(_outcome(attempt, promise)).encode())
    os._exit(0)


def _outcome(attempt: Attempt, promise: Promise) -> dict[str, Any]:
    try:
        return {"outcome": "through", "detail": attempt.run(promise)}
    except Held as held:
        return {"outcome": "held", "detail": str(held)}
    except OSError as error:
        if error.errno is None:
            return {"outcome": "broken", "detail": f"{type(error).__name__}: {error}"}
        return {"outcome": "held", "detail": os.strerror(error.errno), "errno": error.errno}
    except BaseException as error:  # whatever it is, it must be told and must not pass for held
        return {"outcome": "broken", "detail": f"{type(error).__name__}: {error}"}


def _read(fd: int, seconds: float) -> bytes | None:
    """The child's answer; empty when it ended without one, None when the time is up."""
    deadline = time.monotonic() + seconds
    answer = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return None
        part = os.read(fd, 65536)
        if not part:
            return answer
        answer += part
        if answer.endswith(b"}"):
            return answer


def _kill(child: int) -> None:
    """The child with everything that it started."""
    for kill, target in ((os.killpg, child), (os.kill, child)):
        try:
            kill(target, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except PermissionError:  # it has become somebody else, and ends by itself
            pass
