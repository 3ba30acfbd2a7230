"""The child's way into its cage, in order, from clone3 to the start of the sidecar. Standard library only.

The child is born in its cgroups, has mount, ipc, uts and pid namespaces of its own, and inherits the work that layers
did ahead in the parked process (isolator.launcher.prefork). Order matters, and each place has its reason:

 0. proc         /proc and its covers, which need the pid namespace alone; meanwhile the supervisor makes the plan
 1. filesystem   fill the view, whose places were made ahead; meanwhile the supervisor loads the cage's network rules
    proc         the groups, in that view; report ``viewed``: the supervisor reads the mounts back meanwhile
 2. rlimits      once the mounts' descriptors are closed, which may be more than the limit; most are set ahead
 3. namespaces   cgroup namespace, own session, host name
 4. network      enter the network namespace
 5. user         no groups, then gid, then uid
 6. capabilities every set to zero, ambient cleared; the bounding set was emptied ahead
 7. no_new_privs before Landlock and seccomp, which need it
 8. landlock     after the view exists, before seccomp forbids its calls
 9. guard        end with the supervisor: a change of ids would have taken that back
10. seccomp      last layer; the listener goes to the supervisor
11. report ``caged``: the supervisor reads everything back, the network's rules too
12. close every inherited descriptor but those of the own output that are kept for the supervisor: last of all, or
    listeners of other cages leak in; then wait for ``x``
13. become pid 1 (isolator.launcher.init), which starts the sidecar
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Callable, Sequence
from typing import NoReturn

from isolator.ipc.packet import receive_message, send_packet
from isolator.launcher import init
from isolator.layers.capabilities import CapabilitiesSection
from isolator.layers.filesystem import FilesystemSection
from isolator.layers.landlock import LandlockSection
from isolator.layers.namespaces import NamespacesSection
from isolator.layers.network.layer import NetworkSection
from isolator.layers.no_new_privs import NoNewPrivsSection
from isolator.layers.plan import LOGS, ParkOrder, Plan, Section
from isolator.layers.proc.layer import ProcSection
from isolator.layers.rlimits import RlimitsSection
from isolator.layers.seccomp.layer import LISTENER, SeccompSection
from isolator.layers.stopwatch import Stopwatch
from isolator.layers.user import UserSection
from isolator.linux.files import close_all_but

STEPS: tuple[type[Section], ...] = (
    FilesystemSection, ProcSection, RlimitsSection, NamespacesSection, NetworkSection, UserSection, CapabilitiesSection,
    NoNewPrivsSection, LandlockSection,
)  # fmt: skip
"""The sections that a process enters, in the order of the module's text; seccomp follows after the other steps."""
_LAST_OF_VIEW = ProcSection


def be_born(
    born: Sequence[tuple[str, Callable[[ParkOrder], None]]], order: ParkOrder, link: socket.socket, status: int
) -> NoReturn:
    """Begin as the cage that a process was parked for, and enter it once its plan is there; never returns.

    ``born``: what layers do at birth, by their names.
    """
    step = "start"
    took: dict[str, float] = {}
    try:
        mark = Stopwatch(took)
        for name, enter_born in born:
            step = name
            enter_born(order)
        mark("born")
        step = "plan"
        packet, fds = receive_message(link)
        if not packet:
            os._exit(125)  # the supervisor gave up on this cage
        mark("wait")
        plan = Plan.unpack(packet, fds)
        mark("plan")
    except BaseException as error:  # nothing may escape into the launcher's loop, which this process is a copy of
        fail(link, step, error)
    enter_cage(plan, link, status, took)


def enter_cage(plan: Plan, link: socket.socket, status: int, took: dict[str, float] | None = None) -> NoReturn:
    """Turn the calling process, a fresh clone, into the cage that ``plan`` describes; never returns.

    ``took``: milliseconds by step so far.
    """
    step = "start"
    took = {} if took is None else took
    try:
        mark = Stopwatch(took)
        for kind in STEPS:
            step = kind.kind
            if section := plan.section(kind):
                section.enter(plan.fds)
                mark(step)
            if kind is _LAST_OF_VIEW:
                send_packet(link, b'{"step": "viewed"}')
        os.umask(plan.umask)
        step = "working directory"
        os.chdir(plan.cwd)
        step = "standard streams"
        _set_stdio(plan)
        init.guard()
        step = "seccomp"
        if seccomp := plan.section(SeccompSection):
            seccomp.enter(plan.fds)
        mark(step)
        times = ", ".join([f'"{name}": {milliseconds}' for name, milliseconds in took.items()])
        listener = [plan.fds[LISTENER]] if LISTENER in plan.fds else []
        send_packet(link, f'{{"step": "caged", "took": {{{times}}}}}'.encode(), listener)
        step = "descriptors"
        kept = {0, 1, 2, link.fileno(), status}
        for name in LOGS:
            if name in plan.fds:
                kept.add(plan.fds[name])
        close_all_but(kept)
        step = "exec"
        init.run(plan, link, status)
    except BaseException as error:  # nothing may escape into the launcher's loop, which this process is a copy of
        fail(link, step, error)


def fail(link: socket.socket, step: str, error: BaseException) -> NoReturn:
    """Report a step that failed to the supervisor, unless it went away, and end."""
    number, detail = 0, f"{type(error).__name__}: {error}"
    if isinstance(error, OSError):
        number = error.errno or 0
        detail = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    with contextlib.suppress(OSError):
        send_packet(link, json.dumps({"step": step, "errno": number, "detail": detail}).encode())
    os._exit(125)


def _set_stdio(plan: Plan) -> None:
    # The launcher has descriptors of its own at 0 to 2, so that no dup2 overwrites one that is still needed.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        fd = plan.fds[name]
        # A descriptor of a folder leads to everything around it, and one that is no more than a path to its file.
        if stat.S_ISDIR(os.fstat(fd).st_mode) or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
            raise OSError(errno.EINVAL, "is no stream but a folder or a path", name)
        os.dup2(fd, number)
