"""Types of records: fields, who may write one, what is counted instead of written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, dataclass_transform

AUDIT, BROKER, HOST, SUPERVISOR = "audit", "broker", "host", "supervisor"
"""The processes that write records, by the first part of ``origin``."""
SENDERS = (HOST, SUPERVISOR, BROKER)
"""Processes that send records to the writer, in the order in which it reads simultaneous ones."""

ApiVerdict = Literal["granted", "denied", "failed", "unknown", "limited"]

IDENTIFIERS = ("plugin", "run", "event_id", "delivery_id")
"""The keys of a record, beside those of ``data``, that its sender fills in; text or null."""
MAX_ID = 256
"""Longest identifier kept whole, in characters."""

ABSENT: Any = object()
"""Default of a field that a record may lack, and its value as an attribute of such a record."""


def _name_in_data(attribute: str) -> str:
    """The name of a field on disk: ``from`` is a keyword of Python's, its field is declared as ``from_``."""
    return attribute.rstrip("_")


class Field:
    """One field of a record: reads its value from ``data``."""

    def __init__(self, name: str, *, required: bool) -> None:
        self.name, self.required = name, required

    def __get__(self, record: RecordData | None, owner: type[RecordData]) -> Any:
        return self if record is None else record.data.get(self.name, ABSENT)


def _every(data: dict[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Summed:
    """Records of a type that the writer counts, beyond the budget of their cause, instead of writing each.

    For what a plugin or a caller can repeat at will; never for what changes a plugin, its config or the daemon.
    """

    which: str
    """Clause of the documents: which records of the type."""
    by: str = ""
    """Field of ``data`` by whose values they are counted apart."""
    covers: Callable[[dict[str, Any]], bool] = _every
    by_caller: bool = False
    """Whether their cause is the ``uid`` in ``data``, and not the plugin."""


@dataclass_transform(eq_default=False, kw_only_default=True, frozen_default=True)
class RecordData:
    """Type and ``data`` of one record; base of all record types."""

    TYPE: ClassVar[str]
    SOURCES: ClassVar[tuple[str, ...]]
    """The processes that may write it."""
    CAUSED: ClassVar[bool] = False
    """Whether the writer adds the event in flight: ``event_id``, or, of several, ``event_ids`` in ``data``."""
    SUMMED: ClassVar[Summed | None] = None

    __slots__ = ("data",)

    def __init_subclass__(
        cls, *, type: str = "", sources: tuple[str, ...] = (), caused: bool = False, summed: Summed | None = None
    ) -> None:
        """Declare the type, or a base of several; whatever is not named here is as in the base."""
        for constant, value in (("TYPE", type), ("SOURCES", sources), ("CAUSED", caused), ("SUMMED", summed)):
            if value:
                setattr(cls, constant, value)
        for name in vars(cls).get("__annotations__", {}):
            setattr(cls, name, Field(_name_in_data(name), required=name not in cls.__dict__))

    def __init__(self, /, **data: Any) -> None:
        self.data = data

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data})"


class RangeData(RecordData):
    def __init__(self, /, **data: Any) -> None:
        super().__init__(**{_name_in_data(name): value for name, value in data.items()})
