"""Formats of a state that a process of one version hands to a process of another.

A version reads its own format and the one before, and writes both: the newest that the other side reads. That is what
makes a step back to the version before possible. Whoever changes a state's type, or a type within it, in whatever way,
makes the next format of it, with the steps between that one and this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from isolator.ipc.body import Body, Json

B = TypeVar("B", bound=Body)

TABLES = 4
"""Version of the tables in the host's database (``host.database.schema``), which SQLite keeps as ``user_version``.

It is here for a reload's trial: no version takes over tables that a newer one has changed."""


@dataclass(frozen=True)
class Formats(Generic[B]):
    """The formats of one state that this version reads and writes."""

    kind: type[B]
    present: int
    up: Callable[[Json], Json] | None = None
    """Makes a body of the format before one of the present; None: that format is not read."""
    down: Callable[[Json], Json] | None = None
    """The other way; None: that format is not written."""

    @property
    def read(self) -> tuple[int, ...]:
        """The formats that this version reads, the newest first."""
        return (self.present, self.present - 1) if self.up is not None else (self.present,)

    def newest_common(self, others: Iterable[int]) -> int | None:
        """The newest of these formats that this version writes; None if it writes none of them."""
        written = {self.present, self.present - 1} if self.down is not None else {self.present}
        return max(written & {*others}, default=None)

    def body(self, state: B, number: int) -> Json:
        """The JSON object of a state in a format that this version writes."""
        body = state.to_json()
        return body if number == self.present or self.down is None else self.down(body)

    def state(self, number: object, body: Json, where: str) -> B:
        """The state of an object in a format that this version reads; raises UsageError, named ``where``."""
        return self.kind.from_json(body if number == self.present or self.up is None else self.up(body), where)
