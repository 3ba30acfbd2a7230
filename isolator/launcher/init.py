"""Pid 1 of the cage: spawns the sidecar by name, reaps, forwards signals, reports the raw status.

Pid 1 never execs. Having changed its uid it is not dumpable, so the plugin, which has the same uid, can neither
trace it nor write its memory; an exec'd init would be dumpable and would have to encode a signal as 128+n. Pid 1 is
under the same seccomp filter as everything else in the cage. Its report is still labelled "as reported": deaths by
memory and denied calls are taken from the kernel's own counters.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import struct
from collections.abc import Callable
from typing import NoReturn

from isolator.layers.plan import Plan
from isolator.layers.seccomp.layer import SeccompSection
from isolator.linux._libc import libc

FORWARDED = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
    signal.SIGTSTP,
    signal.SIGCONT,
}
_IGNORED = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
"""Signals that may be ignored here and must not be in the sidecar: Python ignores some, the launcher the terminal's,
and the program that started the daemon any at all (nohup, a shell's job)."""
_TERMINAL = "/dev/pts/0"
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4


def guard() -> None:
    """Become untraceable, and end with the supervisor, the parent of this process; after the last change of ids.

    The launcher kills the cages of a supervisor that dies. When both are killed at once nobody is left to do that
    but the kernel: it kills pid 1, and with it every process of the cage.
    """
    libc.prctl(ctypes.c_int(_PR_SET_DUMPABLE), ctypes.c_ulong(0))
    libc.prctl(ctypes.c_int(_PR_SET_PDEATHSIG), ctypes.c_ulong(signal.SIGKILL))


def run(plan: Plan, report: socket.socket, status: int) -> NoReturn:
    """Start the sidecar at the supervisor's word; reap, forward signals and report its status, until it ends."""
    watched = FORWARDED | {signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    seccomp = plan.section(SeccompSection)
    if report.recv(1) != b"x":
        os._exit(125)  # the supervisor gave up on this cage
    try:
        sidecar = _fork(plan, seccomp, report) if seccomp and seccomp.sealing else _spawn(plan)
    except OSError as error:
        _report(report, "exec", plan, error)
        os._exit(127)
    report.close()
    for fd in (0, 1, 2):
        os.close(fd)  # the end of the sidecar's output must be visible while pid 1 still lives
    while True:
        received = signal.sigwaitinfo(watched).si_signo
        if received != signal.SIGCHLD:
            _forward(sidecar, received, to_group=plan.to_group)
            continue
        while True:
            try:
                pid, raw = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == sidecar:
                os.write(status, struct.pack("=i", raw))
                os._exit(0)


def _forward(sidecar: int, number: int, *, to_group: bool) -> None:
    """Send a signal to the sidecar, which leads a process group from its start, or to that group."""
    try:
        os.kill(-sidecar if to_group else sidecar, number)
    except ProcessLookupError:  # it has joined another group
        os.kill(sidecar, number)


def _spawn(plan: Plan) -> int:
    """Exec the sidecar in a new process. posix_spawn shares our memory until the exec: no page table is copied.

    Every descriptor but 0 to 2 is close-on-exec. Python ignores SIGPIPE and SIGXFSZ, and the launcher the terminal's
    signals; an ignored signal would stay ignored.
    """

    def spawn(path: str) -> int:
        return os.posix_spawn(path, plan.argv, plan.env, setpgroup=0, setsigmask=(), setsigdef=_IGNORED)

    def spawn_on_terminal(path: str) -> int:
        # The first terminal that the leader of a session opens becomes the session's.
        first = ((os.POSIX_SPAWN_OPEN, 0, _TERMINAL, os.O_RDWR, 0),)
        return os.posix_spawn(
            path, plan.argv, plan.env, file_actions=first, setsid=True, setsigmask=(), setsigdef=_IGNORED
        )

    if plan.terminal:
        return _first(plan, spawn_on_terminal)
    return _first(plan, spawn)


def _fork(plan: Plan, seccomp: SeccompSection, report: socket.socket) -> int:
    """Exec the sidecar in a forked process that first loads the second filter of its profile: a spawned one cannot."""
    sidecar = os.fork()
    if sidecar:
        return sidecar
    if plan.terminal:
        os.setsid()
        os.dup2(os.open(_TERMINAL, os.O_RDWR), 0)
    else:
        os.setpgid(0, 0)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    step = "seccomp"
    try:
        seccomp.seal()
        step = "exec"
        _first(plan, lambda path: os.execve(path, plan.argv, plan.env))
    except OSError as error:
        _report(report, step, plan, error)
    os._exit(127)


def _report(report: socket.socket, step: str, plan: Plan, error: OSError) -> None:
    message = {"step": step, "errno": error.errno or 0, "detail": f"{plan.argv[0]}: {error.strerror}"}
    report.send(json.dumps(message).encode())


def _first(plan: Plan, start: Callable[[str], int]) -> int:
    """Start the program from the first folder on the PATH that has it; raises the OSError of execvp(3)."""
    program = plan.argv[0]
    candidates = [program] if "/" in program else [f"{f}/{program}" for f in plan.env.get("PATH", "/bin").split(":")]
    denied: OSError | None = None
    for path in candidates:
        try:
            return start(path)
        except FileNotFoundError as error:
            missing = error
        except PermissionError as error:
            denied = denied or error
    raise denied or missing
