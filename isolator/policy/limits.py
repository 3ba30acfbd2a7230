"""The numbers of a policy: how each is called, written, read back and found in a manifest.

One table, used by the loader (what a file may say), the meet (minimum of all layers), ``explain`` and the writer
of policy files, so that a new limit is one new line here and one field in the models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from isolator.policy.host import SMALLEST, SMALLEST_STATE
from isolator.policy.units import (
    format_cpu,
    format_duration,
    format_rate,
    format_size,
    parse_cpu,
    parse_duration,
    parse_rate,
    parse_size,
)


@dataclass(frozen=True)
class Number:
    """One limit. ``name`` is its field in ``Limits`` and its key in ``[ceiling]`` and ``[defaults]``."""

    name: str
    section: str
    key: str
    kind: str
    asked: tuple[str, ...] = ()
    """Attributes that lead to it from a ``ManifestCore``; empty where an author has no say."""

    @property
    def parse(self) -> Callable[[Any], float]:
        """Value of TOML to the number of the model; raises ValueError."""
        return _PARSERS[self.kind]

    def check(self, value: Any) -> float:
        """``parse`` and refuse what is too small to make sense."""
        number = self.parse(value)
        if number < SMALLEST[self.name]:
            raise ValueError(f"{self.show(number)} is less than the least that works, {self.show(SMALLEST[self.name])}")
        if self.name == "state" and 0 < number < SMALLEST_STATE:
            raise ValueError(f"{self.show(number)} cannot hold a file system; at least 1M, or 0 for none")
        return number

    def show(self, number: float) -> str:
        """The number as people write it."""
        return _FORMATTERS[self.kind](number)

    def toml(self, number: float) -> str:
        """``key = value`` as it stands in a policy file."""
        shown = self.show(number)
        return f"{self.key} = {shown}" if shown.isdigit() else f'{self.key} = "{shown}"'


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("must be a whole number")
    if value < 0:
        raise ValueError(f"{value} is negative")
    if value > 2**31 - 1:
        raise ValueError(f"{value} is too large")
    return value


_PARSERS: dict[str, Callable[[Any], float]] = {
    "size": parse_size,
    "rate": parse_rate,
    "cpu": parse_cpu,
    "count": _count,
    "time": parse_duration,
}
_FORMATTERS: dict[str, Callable[[Any], str]] = {
    "size": format_size,
    "rate": format_rate,
    "cpu": format_cpu,
    "count": str,
    "time": format_duration,
}

NUMBERS: tuple[Number, ...] = (
    Number("memory", "limits", "memory", "size", ("sandbox", "resources", "memory")),
    Number("cpu", "limits", "cpu", "cpu", ("sandbox", "resources", "cpu")),
    Number("tasks", "limits", "tasks", "count", ("sandbox", "resources", "tasks")),
    Number("nofile", "limits", "nofile", "count", ("sandbox", "resources", "nofile")),
    Number("io_read", "limits", "io_read", "rate", ("sandbox", "resources", "io_read")),
    Number("io_write", "limits", "io_write", "rate", ("sandbox", "resources", "io_write")),
    Number("connects_per_second", "limits", "connects_per_second", "count"),
    Number("connect_burst", "limits", "connect_burst", "count"),
    Number("connects_open", "limits", "connects_open", "count"),
    Number("state", "filesystem", "state", "size", ("sandbox", "filesystem", "state")),
    Number("tmp", "filesystem", "tmp", "size", ("sandbox", "filesystem", "tmp")),
    Number("shm", "filesystem", "shm", "size"),
    Number("state_inodes", "filesystem", "state_inodes", "count"),
    Number("tmp_inodes", "filesystem", "tmp_inodes", "count"),
    Number("delivery_timeout", "delivery", "timeout", "time", ("delivery_timeout",)),
    Number("delivery_attempts", "delivery", "attempts", "count", ("delivery_attempts",)),
    Number("stop_grace", "restart", "stop_grace", "time"),
)
BY_NAME = {number.name: number for number in NUMBERS}


def asked(core: Any, number: Number) -> float | None:
    """What a ``ManifestCore`` asks for, or None when it is silent."""
    value: Any = core if number.asked else None
    for attribute in number.asked:
        value = getattr(value, attribute)
    return value  # type: ignore[no-any-return]  # the table names only attributes of that type
