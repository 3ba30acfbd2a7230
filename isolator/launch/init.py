"""Pid 1 of the cage: forks and execs the sidecar by name, reaps, forwards signals, reports the raw status.

It never execs. Having changed its uid it is not dumpable, so the plugin, which has the same uid, can neither
trace it nor write its memory; an exec'd init would be dumpable and would have to encode a signal as 128+n. It is
under the same seccomp filter as everything else in the cage. What it reports is still labelled "as reported":
deaths by memory and denied calls are taken from the kernel's own counters.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import struct
from typing import NoReturn

from isolator.launch.plan import Plan
from isolator.layers import seccomp
from isolator.linux._libc import libc

FORWARDED = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
    signal.SIGCONT,
}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4


def guard() -> None:
    """Become untraceable, and end with the supervisor, whose child this process is; after the last change of ids.

    The launcher kills the cages of a supervisor that dies. When both are killed at once nobody is left to do that
    but the kernel: it kills pid 1, and with it every process of the cage.
    """
    libc.prctl(ctypes.c_int(_PR_SET_DUMPABLE), ctypes.c_ulong(0))
    libc.prctl(ctypes.c_int(_PR_SET_PDEATHSIG), ctypes.c_ulong(signal.SIGKILL))


def run(plan: Plan, report: socket.socket, status: int) -> NoReturn:
    """Start the sidecar and look after the cage's processes until it ends."""
    watched = FORWARDED | {signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    sidecar = os.fork()
    if sidecar == 0:
        _exec(plan, report, status)
    report.close()
    for fd in (0, 1, 2):
        os.close(fd)  # the end of the sidecar's output must be visible while pid 1 still lives
    while True:
        received = signal.sigwaitinfo(watched).si_signo
        if received != signal.SIGCHLD:
            os.kill(sidecar, received)
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


def _exec(plan: Plan, report: socket.socket, status: int) -> NoReturn:
    os.close(status)
    os.setpgid(0, 0)
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP) and not 32 <= number < signal.SIGRTMIN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    step = "seccomp"
    try:
        seccomp.seal(plan.sections.get("seccomp", {}))
        step = "exec"
        if "/" in plan.argv[0]:
            os.execve(plan.argv[0], plan.argv, plan.env)
        os.execvpe(plan.argv[0], plan.argv, plan.env)
    except OSError as error:
        message = {"step": step, "errno": error.errno or 0, "detail": f"{plan.argv[0]}: {error.strerror}"}
        report.send(json.dumps(message).encode())
    os._exit(127)
