"""Recording of what libnftables sends the kernel for a ruleset, so that other namespaces can be sent it again.

For a text that begins with ``flush ruleset`` libnftables asks for the ruleset's generation, and then sends one batch of
messages that depends on nothing but the text (nfnetlink, linux/netfilter/nfnetlink.h). To record it, the library's
socket is replaced by one end of a pair, at whose other end the kernel's own answer waits.
"""

from __future__ import annotations

import contextlib
import os
import socket

from isolator.linux.netlink import generation_answer
from isolator.linux.nftables import OWN_SOCKET, Nftables, NftablesError

_ROOM = 1 << 20
_ADDRESS_LENGTH = 12
"""Of a netlink socket (``struct sockaddr_nl``): libmnl takes nothing from a sender whose address has another one."""


def record(text: str) -> bytes:
    """The batch that libnftables sends for ``text``, which begins with ``flush ruleset``; the kernel gets none of it.

    Only for a thread that ends right after, and is not the main one: its table of descriptors becomes its own. Raises
    OSError where the library works in another way than the module's text says.
    """
    with Nftables() as library, contextlib.ExitStack() as both:
        its, ours = map(both.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        for end in (its, ours):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
        ours.bind(b"\0" + os.urandom(_ADDRESS_LENGTH - 3))
        ours.send(generation_answer())
        with socket.socket(fileno=os.dup(OWN_SOCKET)) as replaced:
            if replaced.family != socket.AF_NETLINK:
                raise NftablesError("libnftables has its socket somewhere else")
        os.dup2(its.fileno(), OWN_SOCKET, inheritable=False)
        library.run(text)
        return _last_of(ours)


def _last_of(sock: socket.socket) -> bytes:
    """The second of the two packets that wait at ``sock``."""
    packets: list[bytes] = []
    with contextlib.suppress(BlockingIOError):
        while packet := sock.recv(_ROOM):
            packets.append(packet)
    if len(packets) != 2:
        raise NftablesError(f"libnftables sends a ruleset in {len(packets)} packets")
    return packets[1]
