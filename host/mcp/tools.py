"""Tools of a server: those that an operator has approved, and those that it offers now.

A tool is a text that a model obeys, so each is pinned with everything that it says. A digest covers all fields of a
tool (or the server's ``instructions``); one that differs in a single letter is another tool. Clients are shown approved
tools alone, as they were approved and in that order, and can call those alone.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from isolator.policy.model import canonical_json

MAX_TOOLS = 512
INSTRUCTIONS = ""
"""The name under which ``instructions`` are pinned, which no tool can have."""
State = Literal["approved", "new", "changed", "missing"]


@dataclass(frozen=True, slots=True)
class Item:
    """A tool as its server describes it, or the server's ``instructions``."""

    name: str
    body: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of every field, as hex."""
        return hashlib.sha256(canonical_json(dict(self.body)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Compared:
    """An item and whether it is approved; ``renamed`` is the name under which it seems to have been approved."""

    item: Item
    state: State
    renamed: str = ""


def offered(instructions: str, tools: Iterable[Any]) -> tuple[Item, ...]:
    """What a server offers, its instructions first; raises ValueError for what is no list of tools."""
    found = [Item(INSTRUCTIONS, {"instructions": instructions})] if instructions else []
    names: set[str] = set()
    for tool in tools:
        name = tool.get("name") if isinstance(tool, dict) else None
        if not isinstance(name, str) or not name or len(name) > 128 or not name.isprintable():
            raise ValueError("a tool has no name of 1 to 128 printable characters")
        if name in names:
            raise ValueError(f"two tools have the name {name!r}")
        names.add(name)
        found.append(Item(name, tool))
    if len(names) > MAX_TOOLS:
        raise ValueError(f"{len(names)} tools; at most {MAX_TOOLS}")
    return tuple(found)


def compare(approved: Iterable[Item], now: Iterable[Item]) -> tuple[Compared, ...]:
    """Compare what is approved with what is offered now: the approved in their order, then what is new."""
    before, after = {item.name: item for item in approved}, {item.name: item for item in now}
    found = []
    for name, item in before.items():
        there = after.get(name)
        if there is None:
            found.append(Compared(item, "missing"))
        else:
            found.append(Compared(there, "approved" if there.digest == item.digest else "changed"))
    gone = [item for name, item in before.items() if name not in after and name != INSTRUCTIONS]
    for name, item in after.items():
        if name not in before:
            alike = next((old.name for old in gone if name != INSTRUCTIONS and _alike(old, item)), "")
            found.append(Compared(item, "new", alike))
    return tuple(found)


def _alike(old: Item, new: Item) -> bool:
    """Whether a tool seems to be another one with a new name: the same description, or the same schema of input."""
    without = [{key: value for key, value in item.body.items() if key not in ("name", "title")} for item in (old, new)]
    if without[0] == without[1]:
        return True
    described = [one.get("description") for one in without]
    schemas = [one.get("inputSchema") for one in without]
    has_fields = isinstance(schemas[0], dict) and bool(schemas[0].get("properties"))
    return (bool(described[0]) and described[0] == described[1]) or (has_fields and schemas[0] == schemas[1])


def digest_of(items: Iterable[Item]) -> str:
    """SHA-256 over everything that is offered, by which an approval names what was shown."""
    text = canonical_json([[item.name, item.digest] for item in items])
    return hashlib.sha256(text.encode()).hexdigest()


def permits(granted: Iterable[str], tool: str) -> bool:
    """Whether ``[grant] tools`` of a policy names the tool; ``*`` stands for any characters."""
    return any(fnmatch.fnmatchcase(tool, pattern.replace("[", "[[]")) for pattern in granted)
