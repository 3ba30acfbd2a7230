"""S → W: the supervisor to the console."""

from __future__ import annotations

from isolator.ipc.body import Json, Request, omitted


class ConsoleHello(Request[None], op="hello", fds=range(3)):
    """The first message to the console (W); answered when it serves.

    Descriptors, unless they are in the state: the listener of its socket, and that of its port if there is one
    """

    root: str
    config: Json
    """JSON of `HostConfig`"""
    secrets: dict[str, tuple[str, ...]]
    """those of each ingress, by its name"""
    parts: int = omitted(default=0)
    """how many `state.part` have come: W takes the place of another"""
