"""Verbs and notifications about the audit trail."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from host.control.parameters import ListOf, Request, Whole
from host.control.terms import LARGEST, Nothing, OptionalText

MAX_RECORDS = 10_000
"""Records that ``audit.follow`` may begin with."""


class FollowedTrail(TypedDict):
    """``after``: the record before the first that is sent; ``last``: the newest record at this moment."""

    after: int
    last: int


class AuditFollow(Request, verb="audit.follow", role="viewer", recorded=True, result=FollowedTrail):
    """Follow the trail after record ``after``, or from its last ``lines`` records on, as ``audit.records``."""

    after: Annotated[int | None, Whole(LARGEST)] = None
    lines: Annotated[int, Whole(MAX_RECORDS)] = 0


class AuditSearch(Request, verb="audit.search", role="viewer", recorded=True, result=Nothing):
    """Search the trail: what is found follows as ``audit.found``, the last of which has ``more`` false.

    Times are as in the trail; a type may end in ``.*``; ``event`` is the beginning of an id; ``limit`` keeps the newest
    (0: all). ``story`` is the beginning of an event's id, and finds everything that the event caused; it stands alone.
    """

    plugin: OptionalText = None
    types: Annotated[list[str] | None, ListOf(str)] = None
    event: OptionalText = None
    since: OptionalText = None
    until: OptionalText = None
    limit: Annotated[int, Whole(100_000)] = 0
    story: OptionalText = None

    def wanted(self) -> dict[str, Any]:
        """The parameters as plain data."""
        return dict(self.__dict__)


class AuditRecords(TypedDict):
    """Lines of the trail, byte for byte."""

    lines: list[str]


class AuditFound(TypedDict):
    """Lines of the trail that a search found, byte for byte; ``error``, in the last, why it did not come to its end."""

    lines: list[str]
    more: bool
    error: dict[str, Any] | None
