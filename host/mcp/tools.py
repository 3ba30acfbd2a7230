"""Tools of a server: those that an operator has approved, and those that it offers now.

A tool is a text that a model obeys, so each is pinned with everything that it says. A digest covers all fields of a
tool (or the server's ``instructions``); one that differs in a single letter is another tool. Clients are shown approved
tools alone, as they were approved and in that order, and can call those alone.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from isolator.policy.model import canonical_json

MAX_TOOLS = 512
INSTRUCTIONS = ""
"""The name under which ``instructions`` are pinned, which no tool can have."""
State = Literal["approved", "new", "changed", "missing"]
_LITERAL = re.compile(r"[\[?]")
"""Characters with a meaning for fnmatch that they do not have in a policy."""


@dataclass(frozen=True)
class Item:
    """A tool as its server describes it, or the server's ``instructions``."""

    name: str
    body: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every field, as hex."""
        return _sha256(dict(self.body))


@dataclass(frozen=True, slots=True)
class Compared:
    """An item and whether it is approved; ``renamed`` is the name under which it seems to have been approved."""

    item: Item
    state: State
    renamed: str = ""


def offered(instructions: str, tools: Iterable[Any]) -> tuple[Item, ...]:
    """Items that a server offers, its instructions first; raises ValueError for what is no list of tools."""
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


def is_unchanged(approved: Item, now: Item | None) -> bool:
    """Whether a tool is offered just as it was approved."""
    return now is not None and now.digest == approved.digest


def compare(approved: Iterable[Item], now: Iterable[Item]) -> tuple[Compared, ...]:
    """Compare what is approved with what is offered now: the approved in their order, then what is new.

    A new tool that has the description or the input of one that is missing seems to be that one with a new name.
    """
    before, after = {item.name: item for item in approved}, {item.name: item for item in now}
    found = []
    for name, item in before.items():
        there = after.get(name)
        if there is None:
            found.append(Compared(item, "missing"))
        else:
            found.append(Compared(there, "approved" if is_unchanged(item, there) else "changed"))
    missing: dict[str, str] = {}
    for one in found:
        if one.state == "missing" and one.item.name != INSTRUCTIONS:
            for trait in _traits(one.item):
                missing.setdefault(trait, one.item.name)
    for name, item in after.items():
        if name not in before:
            alike = (missing[trait] for trait in _traits(item) if trait in missing) if missing else iter(())
            found.append(Compared(item, "new", next(alike, "")))
    return tuple(found)


def _traits(item: Item) -> Iterable[str]:
    """Digests of what a tool keeps when it gets another name: all the rest, its description, the schema of its input.

    Looked up and not compared one by one: of 512 tools all may be missing, and 512 be new.
    """
    yield _sha256({key: value for key, value in item.body.items() if key not in ("name", "title")})
    description, schema = item.body.get("description"), item.body.get("inputSchema")
    if description:
        yield _sha256(["description", description])
    if isinstance(schema, dict) and schema.get("properties"):
        yield _sha256(["inputSchema", schema])


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_of(items: Iterable[Item]) -> str:
    """SHA-256 over everything that is offered, by which an approval names what was shown."""
    return _sha256([[item.name, item.digest] for item in items])


def permits(granted: Iterable[str], tool: str) -> bool:
    """Whether ``[grant] tools`` of a policy names the tool; ``*`` stands for any characters."""
    return any(fnmatch.fnmatchcase(tool, _LITERAL.sub(r"[\g<0>]", pattern)) for pattern in granted)
