"""Prefork: a parked process waits to become a cage; the work that no plan changes is done before a start asks for it.

The launcher clones the parked process with mount, ipc and uts namespaces of its own, and the sections of its layers
apply their fixed part (``Section.enter_ahead``). On a hybrid host it then puts itself into the v1 groups of the
cage to come, whatever their limits will be, and says ``parked``: it is the one that can do so without a wait
(``Leaf.open_v1``), and the cage is born in them. Then it waits for the plan on its link. When that comes, it
clones the cage's pid 1 (into the v2 leaf, as a child of the supervisor, in all of its own namespaces and groups),
answers with the pid and the pidfd, and ends: pid 1 keeps the link.

When the supervisor goes away, so does the link, and the parked process ends; nothing of a plugin ever ran in it.
Standard library and ``isolator.linux`` only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import NoReturn

from isolator.ipc.packet import receive_message, send_packet
from isolator.launcher import enter, init
from isolator.layers.filesystem import AttachMount, FilesystemSection, FillFolder, ResizeTmpfs
from isolator.layers.namespaces import NamespacesSection
from isolator.layers.plan import ParkOrder, Plan
from isolator.layers.seccomp.layer import SeccompSection
from isolator.layers.user import UserSection
from isolator.linux.files import close_all_but
from isolator.linux.namespaces import CLONE_PARENT, clone3


def park(order: ParkOrder, link: int, status: int, groups: list[int]) -> NoReturn:
    """Wait for the plan on ``link`` and become its cage; never returns.

    ``status``: the pipe for pid 1's report. ``groups``: ``tasks`` of each v1 group to be in.
    """
    init.guard()
    close_all_but({0, 1, 2, link, status, *groups})
    sock = socket.socket(fileno=link)
    try:
        for section in enter.STEPS:
            if section.kind in order.layers:
                section.enter_ahead(order)
        if not order.hurried:
            _rehearse()
        if groups:
            _join(groups)
            send_packet(sock, b'{"step": "parked"}')
        packet, fds = receive_message(sock)
        if packet:
            _clone(Plan.unpack(packet, fds), sock, status)
    except Exception as error:
        _fail(sock, "parked", error)
    finally:
        os._exit(0)  # whatever happened: nothing may escape into the launcher's loop, which this process is a copy of


def _join(groups: list[int]) -> None:
    for group in groups:
        os.write(group, b"0")  # the writing thread, of which there is only one
        os.close(group)


def _rehearse() -> None:
    """Take the page faults of reading a plan now: a page shared with the launcher is copied at its first write."""
    plan = Plan("", ["x"], {"x": "x"})
    attach = tuple(AttachMount("x", f"mount{number}", is_folder=True) for number in range(8))
    fill = FillFolder("x", {"x": "x" * 1024}, 0, 0, 0, 0)
    plan.add(FilesystemSection(own_root=False, operations=(ResizeTmpfs("x", "x", executable=True), fill, *attach)))
    plan.add(SeccompSection(b"x" * 4096))
    plan.add(UserSection(0, 0))
    Plan.unpack(plan.pack()[0], [])


def _clone(plan: Plan, sock: socket.socket, status: int) -> None:
    if namespaces := plan.section(NamespacesSection):
        namespaces.set_clocks(plan.fds)
    try:
        pid, pidfd = clone3(plan.clone_flags | CLONE_PARENT, cgroup_fd=plan.fds.pop("cgroup", -1))
    except OSError as error:
        _fail(sock, "clone3", error)
        return
    if pid == 0:
        enter.enter_cage(plan, sock, status)
    send_packet(sock, json.dumps({"pid": pid}).encode(), [pidfd])


def _fail(sock: socket.socket, step: str, error: Exception) -> None:
    with contextlib.suppress(OSError):  # the supervisor went away
        send_packet(sock, json.dumps(enter.failure(step, error)).encode())
