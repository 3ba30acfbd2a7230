"""The control socket for the command line: ``isolator_client`` with the errors of ``isolator.errors``.

Imports nothing heavy, so that a command that only asks the daemon something answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from host.client.terms import our_errors
from isolator_client import blocking


class Client:
    """One connection to the daemon; a context manager."""

    def __init__(self, root: str | os.PathLike[str] | None = None, *, timeout: float | None = 150.0) -> None:
        with our_errors():
            self._client = blocking.Client(root=root, timeout=timeout)
        self.path = Path(self._client.path)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, method: str, /, **params: Any) -> dict[str, Any]:
        """Ask and wait; raises the error the daemon raised."""
        with our_errors():
            return self._client.call(method, **params)

    def notifications(self, *, watched: int | None = None) -> Iterator[dict[str, Any]]:
        """Parameters of the notifications that arrive, until the daemon closes; waits for as long as it takes.

        Ends also when ``watched``, a descriptor that is written to, has lost its reader.
        """
        with our_errors():
            for notification in self._client.notifications(watched=watched):
                yield notification.params

    def close(self) -> None:
        self._client.close()


def ask(root: str | os.PathLike[str] | None, method: str, /, **params: Any) -> dict[str, Any]:
    """Ask the daemon of ``root`` one thing, on a connection for that alone; raises as ``Client.call``."""
    with Client(root) as client:
        return client.call(method, **params)
