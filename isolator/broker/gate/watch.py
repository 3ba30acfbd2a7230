"""Watch over the bytes of a protocol behind its first hello: the terms that TLS and HTTP/1 share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from isolator.broker.sniff import Hello

Judge = Callable[[Hello], None]
"""Raises Denied for a hello that does not fit the granted name."""


class Watch(Protocol):
    """The protocol of a connection behind its first hello. Both methods may raise Malformed and Denied."""

    done: bool
    """Whether everything passes."""
    waiting: bool
    """Whether nothing passes before the server has answered."""
    listening: bool
    """Whether the server's bytes matter."""
    held: bytearray

    def feed(self, data: bytes) -> bytes:
        """The bytes that may pass now."""

    def answered(self, data: bytes) -> None:
        """Take note of the server's bytes, none at their end."""
