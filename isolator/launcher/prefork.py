"""Prefork: a parked process waits to become a cage; the work that no plan changes is done before a start asks for it.

The launcher clones the parked process with mount, ipc and uts namespaces of its own, and the sections of its layers
apply their fixed part (``Section.enter_ahead``). On a hybrid host it then puts itself into the v1 groups of the cage to
come, whatever their limits will be: it is the one that can do so without a wait (``Leaf.open_v1``), and the cage is
born in them. If it is made ahead it says ``parked``. Then it waits for two packets on its link. With the first it sets
its clocks to those of the cage. With the second it clones the cage's pid 1 (into the v2 leaf, as a child of the
supervisor, in all of its own namespaces and groups), and ends; pid 1 goes on in its memory
(``isolator.linux.successor``). Pid 1 answers with its pid and a pidfd, and does what no plan changes but needs its pid
namespace (``Section.enter_born``) while the supervisor makes the plan, the next message there.

When the supervisor goes away, so does the link, and the parked process ends; nothing of a plugin ever ran in it.
Standard library and ``isolator.linux`` only.
"""

from __future__ import annotations

import contextlib
import os
import socket
from types import FunctionType
from typing import NoReturn

from isolator.ipc import packet as ipc
from isolator.ipc.packet import receive_packet, send_packet
from isolator.launcher import enter, init
from isolator.layers.filesystem import AttachMount, FilesystemSection, FillFolder, ResizeTmpfs, SealMount
from isolator.layers.namespaces import AT_BIRTH, BEFORE_THE_PLAN, enter_clocks
from isolator.layers.plan import ParkOrder, Plan, Section
from isolator.layers.seccomp.layer import SeccompSection
from isolator.layers.user import UserSection
from isolator.linux import _libc, capability, landlock, mount, namespaces, seccomp
from isolator.linux.descriptors import close_all
from isolator.linux.files import close_all_but
from isolator.linux.namespaces import CLONE_PARENT, NAMESPACE_FILES
from isolator.linux.successor import become


class Way:
    """An order's way to its cage. A launcher finds it out once: whatever a parked process reads, it copies."""

    def __init__(self, order: ParkOrder) -> None:
        """Begin it in the calling process, the launcher; raises OSError."""
        self.order = order
        kinds = [kind for kind in enter.STEPS if kind.kind in order.layers]
        for kind in kinds:
            kind.enter_launcher(order)
        self.ahead = [kind.enter_ahead for kind in kinds if kind.enter_ahead is not Section.enter_ahead]
        self.born = [(kind.kind, kind.enter_born) for kind in kinds if kind.enter_born is not Section.enter_born]
        self.to_be_parked, self.to_be_born = (
            CLONE_PARENT | sum(NAMESPACE_FILES[kind] for kind in new if "namespaces" in order.layers)
            for new in (BEFORE_THE_PLAN, AT_BIRTH)
        )
        """Flags of the two clones."""


def park(way: Way, sock: socket.socket, link: int, status: int, others: list[int]) -> NoReturn:
    """Wait for the order on ``link`` and become a cage; never returns.

    ``sock``: the launcher's, in whose place the link is put: to make another takes as long as several system calls.
    ``status``: the pipe for pid 1's report. ``others``: the figures, if the cage has the layer proc, and ``tasks`` of
    each v1 group to be in.
    """
    os.dup2(link, sock.fileno(), False)
    try:
        init.guard()
        os.setpgid(0, 0)  # a clone that ends before it has told its pid is found by it
        close_all_but({0, 1, 2, sock.fileno(), status, *others})
        order = way.order
        if "proc" in order.layers and others:
            order.figures = others.pop(0)
        for enter_ahead in way.ahead:
            enter_ahead(order)
        if not order.hurried:
            _rehearse()
        for group in others:
            os.write(group, b"0")  # the writing thread, of which there is only one
            os.close(group)
        if not order.hurried:
            send_packet(sock, b'{"step": "parked"}')
        packet, fds = receive_packet(sock)
        if packet:
            _set_clocks(packet, fds)
            packet, fds = receive_packet(sock)
        if packet:
            _become(way, fds, sock, status)
    except Exception as error:
        enter.fail(sock, "parked", error)
    finally:
        os._exit(0)  # whatever happened: nothing may escape into the launcher's loop, which this process is a copy of


def _rehearse() -> None:
    """Take the page faults of reading a plan now: a page shared with the launcher is copied at its first write."""
    plan = Plan("", ["x"], {"x": "x"})
    attach = tuple(AttachMount("x", f"mount{number}", is_folder=True) for number in range(8))
    fill = FillFolder("x", {"x": "x" * 1024}, 0, 0, 0, 0)
    plan.add(FilesystemSection(own_root=False, operations=(ResizeTmpfs("x", "x", executable=True), fill, *attach)))
    plan.add(SeccompSection(b"x" * 4096))
    plan.add(UserSection(0, 0))
    Plan.unpack(plan.pack()[0], [])
    _touch()


def _touch() -> None:
    """Take page faults of a cage's way to its exec now: reading an object counts a reference, a write to its page.

    Read is what the functions on that way name; to read more costs each cage memory that nothing writes to.
    """
    kinds = (*enter.STEPS, SeccompSection, ResizeTmpfs, FillFolder, AttachMount, SealMount)
    modules = (enter, init, ipc, _libc, capability, landlock, mount, namespaces, seccomp)
    for place in (*kinds, *modules):
        for function in vars(place).values():
            if isinstance(function, FunctionType):
                code = function.__code__
                for names in (function.__globals__, vars(os)):
                    _ = (*code.co_consts, *map(names.get, code.co_names))


def _set_clocks(packet: bytes, fds: list[int]) -> None:
    for folder in fds:
        with contextlib.suppress(OSError):  # the layer's ``confirm`` finds the host's clocks
            enter_clocks(folder, packet)
        os.close(folder)


def _become(way: Way, group: list[int], sock: socket.socket, status: int) -> None:
    try:
        pid, pidfd = become(way.to_be_born, *group)
    except OSError as error:
        enter.fail(sock, "clone3", error)
    send_packet(sock, b'{"pid": %d}' % pid, [pidfd])
    os.close(pidfd)
    close_all(group)
    enter.be_born(way.born, way.order, sock, status)
