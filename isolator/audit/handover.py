"""State of an audit process on its way to another that takes its place.

Whoever changes the type, or one of those in it, in whatever way, makes the next format of it.
"""

from __future__ import annotations

from isolator.audit.writer import WriterState
from isolator.ipc.body import Body, Json
from isolator.ipc.formats import Formats


class AuditState(Body):
    """Everything that an audit process knows and the trail does not tell."""

    writer: WriterState
    metrics: tuple[int, ...]
    """listening sockets"""


def _without_histograms(body: Json) -> Json:
    """Format 1."""
    metrics = [one for one in body["writer"]["metrics"] if "buckets" not in one]
    return {**body, "writer": {**body["writer"], "metrics": metrics}}


FORMATS = Formats(AuditState, 2, up=lambda body: body, down=_without_histograms)
