"""S → A: the supervisor to the audit process."""

from __future__ import annotations

from isolator.ipc.body import Body, Json, Request, omitted


class AuditReady(Body):
    """State of the trail as it was found."""

    blocked: str | None
    """why nothing can be written"""
    ended: bool
    """whether the trail tells of the stop of the daemon before"""
    runs: dict[str, str]
    """by run that has no end in the trail, its plugin: S records the end of those it did not start"""


class AuditHello(Request[AuditReady], op="hello"):
    """The first message."""

    root: str
    config: Json
    """JSON of `HostConfig`"""
    parts: int = omitted(default=0)
    """how many `state.part` have come: A takes the place of another, and goes on with that one's state"""


class RecordSource(Request[None], op="source", fds=range(1, 2)):
    """Read records from another process.

    Descriptors: a SOCK_SEQPACKET end
    """

    name: str
    """`supervisor`, `broker` or `host`"""


class Flush(Request[None], op="flush"):
    """Answered when everything received so far is on disk."""


class ServeMetrics(Request[None], op="metrics", fds=range(1, 65)):
    """Serve Prometheus figures.

    Descriptors: listening sockets (Unix, TCP)
    """
