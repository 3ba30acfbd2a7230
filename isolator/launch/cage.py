"""What the child does with itself, in order, between clone3 and pid 1's fork. Standard library only.

Order matters, and each place has its reason:

 1. rlimits      before the uid changes, while hard limits can still be set
 2. filesystem   fill the view; meanwhile the supervisor puts this pid into its v1 groups (hybrid hosts) and makes
                 the network namespace
 3. wait for ``a``, which brings the network namespace
 4. namespaces   cgroup namespace only now, or the leaf's name would leak; own session; host name
 5. network      enter the network namespace
 6. capabilities securebits locked and the bounding set emptied while CAP_SETPCAP is still there
 7. user         no groups, then gid, then uid
 8. capabilities every set to zero, ambient cleared
 9. no_new_privs before Landlock and seccomp, which need it
10. landlock     after the view exists, before seccomp forbids its calls
11. guard        end with the supervisor: a change of ids would have taken that back
12. seccomp      last layer; the listener goes to the supervisor
13. report ``caged`` and wait for ``x``: the supervisor reads everything back first
14. close every inherited descriptor: last of all, or listeners of other cages leak in
15. become pid 1 (isolator.launch.init), which forks and execs the sidecar
"""

from __future__ import annotations

import array
import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any, NoReturn

from isolator.ipc_packet import receive_packet
from isolator.launch import init
from isolator.launch.plan import Plan
from isolator.layers import capabilities, filesystem, landlock, namespaces, netns, no_new_privs, rlimits, user
from isolator.layers import seccomp as seccomp_layer
from isolator.linux.files import close_all_but

Enter = Callable[[dict[str, Any], dict[str, int]], None]

STEPS: tuple[tuple[str, str, Enter], ...] = (
    ("rlimits", "rlimits", rlimits.Rlimits.enter),
    ("filesystem", "filesystem", filesystem.Filesystem.enter),
    ("namespaces", "namespaces", namespaces.Namespaces.enter),
    ("network", "network", netns.Network.enter),
    ("bounding set", "capabilities", capabilities.enter_bounding_set),
    ("user", "user", user.User.enter),
    ("capabilities", "capabilities", capabilities.Capabilities.enter),
    ("no_new_privs", "no_new_privs", no_new_privs.NoNewPrivs.enter),
    ("landlock", "landlock", landlock.Landlock.enter),
)
"""(step, the plan's section, what applies it), in the order of the module's text; seccomp follows by itself."""


class SetUpFailed(Exception):
    """A step failed; carries what the supervisor shows."""


def become(plan: Plan) -> NoReturn:
    """Turn the calling process, a fresh clone, into the cage that ``plan`` describes; never returns."""
    report = socket.socket(fileno=plan.fds["report"])
    report.setblocking(True)
    step = "start"
    took: dict[str, float] = {}
    try:
        mark = time.perf_counter()
        for step, section, enter in STEPS:
            if step == "namespaces":
                plan.fds |= _wait_for(plan.fds["go"], b"a")
                mark = time.perf_counter()
            if section in plan.sections:
                enter(plan.sections[section], plan.fds)
                now = time.perf_counter()
                took[step], mark = round((now - mark) * 1000, 3), now
        os.umask(plan.umask)
        step = "working directory"
        os.chdir(plan.cwd)
        step = "standard streams"
        _set_stdio(plan)
        init.guard()
        step = "seccomp"
        listener = seccomp_layer.load(plan.sections["seccomp"]) if "seccomp" in plan.sections else -1
        took[step] = round((time.perf_counter() - mark) * 1000, 3)
        _send(report, {"step": "caged", "took": took}, [listener] if listener >= 0 else [])
        _wait_for(plan.fds["go"], b"x")
        step = "descriptors"
        close_all_but({0, 1, 2, report.fileno(), plan.fds["status"]})
        step = "exec"
        init.run(plan, report, plan.fds["status"])
    except OSError as error:
        detail = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        _send(report, {"step": step, "errno": error.errno or 0, "detail": detail}, [])
    except BaseException as error:  # nothing may escape into the launcher's loop, which this process is a copy of
        _send(report, {"step": step, "errno": 0, "detail": f"{type(error).__name__}: {error}"}, [])
    os._exit(125)


def _wait_for(go: int, word: bytes) -> dict[str, int]:
    """Wait for a word from the supervisor; the network namespace comes with the first."""
    sock = socket.socket(fileno=os.dup(go))
    packet, fds = receive_packet(sock)
    sock.close()
    if packet != word:
        os._exit(125)  # the supervisor gave up on this cage
    return {"netns": fds[0]} if fds else {}


def _set_stdio(plan: Plan) -> None:
    # High numbers first, so that no dup2 overwrites a descriptor that is still needed.
    spare = [os.dup(plan.fds[name]) for name in ("stdin", "stdout", "stderr")]
    for number, fd in enumerate(spare):
        os.dup2(fd, number, inheritable=True)


def _send(report: socket.socket, message: dict[str, Any], fds: list[int]) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    report.sendmsg([json.dumps(message).encode()], ancillary, socket.MSG_NOSIGNAL)
