"""The zygote's process: ``python3 -I -m isolator.zygote.service --socket-fd N ...``, started by the supervisor as root.

It imports what several services need, and waits; for each order it forks a copy, which drops every privilege and goes
on as ``python3 -I -m MODULE`` would, without importing that again, and on the same pages of memory. It is a program of
its own, for nothing of the supervisor's memory or layout may be in a service, and lasts for one start or one exchange
of services: the next one is the program as it is installed then. It reads nothing but orders and code.

A packet is ``{"module", "uid", "gid", "descriptors": [NAME...], "environment", "nice"}`` with these descriptors; it is
answered by ``{"pid": N}``, a child of the supervisor's, or by ``{"problem": TEXT}``. The end of the socket ends the
zygote.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import sys
from importlib import import_module
from typing import Any

from isolator.base.core import write_no_rare_types
from isolator.base.lean import import_asyncio
from isolator.ipc.packet import receive_packet, send_packet
from isolator.linux.arguments import overwrite_arguments
from isolator.linux.descriptors import close_all, open_standard_streams
from isolator.linux.priority import go_as_far_forward_as
from isolator.linux.sibling import fork_sibling
from isolator.linux.unprivileged import drop_privileges, inherited, module_command

_SHARED = (
    "concurrent.futures.thread",
    "isolator.audit.client",
    "isolator.audit.files",
    "isolator.audit.service",
    "isolator.broker.service",
    "isolator.ipc.accept_loop",
    "isolator.ipc.messages",
    "isolator.ipc.succession",
    "isolator.linux.daemon_log",
    "isolator.policy.destinations",
    "isolator.policy.host",
)
"""Modules that services share, and those of this package: as root they are imported, and nothing of them is called."""

_FIRST = ("AuditHello", "AuditReady", "RecordSource", "ServeMetrics", "NewAuditSocket", "BrokerHello", "HostHello")
"""Messages of every start, whose types are worked out here."""


class Service:
    """An order, on its way to being carried out in a process of its own."""

    def __init__(self, order: dict[str, Any], fds: list[int]) -> None:
        self._module: str = order["module"]
        self._uid, self._gid = int(order["uid"]), int(order["gid"])
        self._environment: dict[str, str] = order["environment"]
        self._nice: int = order.get("nice", 0)  # a daemon of before an upgrade sends none
        self._descriptors = dict(zip(order["descriptors"], fds, strict=True))

    def run(self) -> None:
        """Become the service; returns when its ``main`` does. Raises OSError before anything of it is imported."""
        os.setsid()
        go_as_far_forward_as(self._nice)
        drop_privileges(self._uid, self._gid)
        command = module_command(self._module, self._descriptors)
        overwrite_arguments("\0".join(command))
        os.environ.update(self._environment)
        sys.argv[:] = [self._module, *command[4:]]
        import_module(self._module).main()


def serve(sock: socket.socket) -> Service | None:
    """Fork for each order; returns None once nobody can send one, and in each copy what it is to become."""
    while True:
        packet, fds = receive_packet(sock)
        if not packet:
            return None
        try:
            order = Service(json.loads(packet), fds)
            pid = fork_sibling()
        except OSError as error:
            send_packet(sock, json.dumps({"problem": error.strerror}).encode())
        else:
            if pid == 0:
                sock.close()
                return order
            send_packet(sock, json.dumps({"pid": pid}).encode())
        close_all(fds)


def _work_out_types() -> None:
    from isolator.ipc import messages  # not before import_asyncio
    from isolator.ipc.body import make_ready

    make_ready(*(getattr(messages, name) for name in _FIRST))


def main() -> None:
    open_standard_streams()
    sock = socket.socket(fileno=inherited()["socket"])  # behind it is room for the longer command line of a service
    gc.disable()
    import_asyncio()
    for name in _SHARED:
        import_module(name)
    write_no_rare_types()
    _work_out_types()
    gc.enable()
    gc.freeze()  # a collection in a copy would write to every object, and so own its page
    service = None
    with contextlib.suppress(ConnectionError):  # the daemon has ended meanwhile, and says itself why
        send_packet(sock, b'{"ready": true}')
        service = serve(sock)
    if service is None:
        os._exit(0)  # nothing here is to be seen to; taking every module apart takes longer than a fork
    service.run()


if __name__ == "__main__":
    main()
