"""A service that does nothing until its channel ends."""

from __future__ import annotations

import socket

from isolator.linux.unprivileged import inherited


def main() -> None:
    """Entry point."""
    with socket.socket(fileno=inherited()["channel"]) as channel:
        channel.settimeout(None)
        while channel.recv(1 << 16):
            pass
