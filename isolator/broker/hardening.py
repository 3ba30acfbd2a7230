"""Drop the broker's rights before it reads the first byte: it is the one process that parses the network input of
plugins, so it must be worth nothing to whoever breaks it.

It is started without capabilities, groups and any way to gain privileges. Here it also loses: new programs and
processes (threads stay), Unix sockets (the control socket, other services, the system's own), every call that the
plugins' own profile refuses, and, where the kernel has Landlock, each right on files but reading and, from ABI 6,
signals to anybody else. It keeps INET sockets, routing netlink to know the host's addresses, and reading
``/etc/resolv.conf`` again when that changes.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

import prctl

from isolator.layers.seccomp import profiles as syscalls
from isolator.layers.seccomp.bpf import Equal
from isolator.layers.seccomp.layer import compiled_rules
from isolator.linux import landlock, seccomp
from isolator.linux.coredump import start_no_handler
from isolator.linux.descriptors import allow_many_files

THREADS = 64
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_CLONE_THREAD = 0x10000
_OWN = frozenset({"socket", "socketpair", "clone", "fork", "vfork", "execve", "execveat"})


BROKER, CONSOLE = "broker", "console"
FAMILIES = {BROKER: (_AF_INET, _AF_INET6, _AF_NETLINK), CONSOLE: (_AF_UNIX,)}
"""Families of the sockets that each process may make; the console's listeners are handed to it."""


def filter_file(cache: Path, service: str = BROKER) -> int:
    """A descriptor of the compiled filter, for the process to inherit: it could not load the compiler any more."""
    program = compiled_rules(service, rules(FAMILIES[service]), cache)
    fd = os.memfd_create(f"{service}.bpf", os.MFD_CLOEXEC)
    os.write(fd, program)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def harden(program: bytes, readable: Iterable[str] = ("/",)) -> None:
    """Drop every right that the process does not need, for good, while there is one thread. Raises OSError.

    Of files it keeps reading what is below the paths ``readable``.
    """
    start_no_handler()
    resource.setrlimit(resource.RLIMIT_NPROC, (THREADS, THREADS))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    allow_many_files()  # two for each flow of each cage
    prctl.set_no_new_privs(True)
    # Neither core dumps nor a debugger of the same uid.
    prctl.set_dumpable(False)
    landlock.read_only_below(readable)
    seccomp.load_filter(program, listener=False)


def rules(families: Iterable[int] = FAMILIES[BROKER]) -> Iterator[syscalls.Rule]:
    """The plugins' default profile without the calls that start a program; refusals go to no notifier."""
    for name, action, conditions in syscalls.rules("default"):
        if name not in _OWN:
            yield name, syscalls.REFUSE if action == syscalls.DENY else action, conditions
    for family in families:
        yield "socket", syscalls.ALLOW, (Equal(0, syscalls.WORD, family),)
    yield "socket", syscalls.REFUSE, ()
    # The event loop wakes itself by a pair, which leads nowhere else.
    yield "socketpair", syscalls.ALLOW, (Equal(0, syscalls.WORD, _AF_UNIX),)
    yield "clone", syscalls.REFUSE, (Equal(0, _CLONE_THREAD, 0),)
    yield "clone", syscalls.ALLOW, ()
    for name in ("fork", "vfork", "execve", "execveat"):
        yield name, syscalls.REFUSE, ()
