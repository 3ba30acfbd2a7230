"""A package of a registry, in one exact version, and what is known of it once it is resolved."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from isolator.errors import UsageError

KINDS = ("npm", "pypi")
_NPM = re.compile(r"(?P<name>(?:@[a-z0-9~-][a-z0-9._~-]*/)?[a-z0-9~-][a-z0-9._~-]*)@(?P<version>[^@]*)")
_PYPI = re.compile(r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[^=]*)")
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+!_-]{0,63}")
_NUMBERS = re.compile(r"(?:\d+!)?(\d+(?:\.\d+){0,2})(.*)")
_SEMANTIC = re.compile(r"\d+\.\d+\.\d+(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?")
_LONGEST_NAME = 63


@dataclass(frozen=True)
class Package:
    """A package; ``kind`` is that of its registry."""

    kind: str
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}{'==' if self.kind == 'pypi' else '@'}{self.version}"

    @property
    def plugin_name(self) -> str:
        """A name for the plugin, made of the package's."""
        bare = re.sub("[^a-z0-9]+", "-", self.name.rpartition("/")[2].lower()).strip("-")
        return re.sub("^[^a-z]+", "", bare)[:_LONGEST_NAME] or "server"

    @property
    def plugin_version(self) -> str:
        """Its version as a semantic one: the registry of Python has others, too."""
        if _SEMANTIC.fullmatch(self.version):
            return self.version
        found = _NUMBERS.fullmatch(self.version)
        numbers, rest = found.groups() if found else ("0", self.version)
        parts = [str(int(part)) for part in numbers.split(".")]
        suffix = re.sub("[^0-9A-Za-z]+", ".", rest).strip(".")
        return ".".join(parts + ["0"] * (3 - len(parts))) + (f"-{suffix}" if suffix else "")


@dataclass
class Resolved:
    """A registry's answer for a package, as the resolver in the cage reports it."""

    programs: dict[str, str]
    """Entries of programs, by name: the path of a script, or ``MODULE:FUNCTION``."""
    hashes: dict[str, str] = field(default_factory=dict)
    """Hashes that were compared with the registry's, by ``NAME@VERSION`` of everything that came along."""
    description: str = ""
    files: int = 0


class Wishes(NamedTuple):
    """Wishes about a package: which program of it, arguments for that, and destinations that it asks to reach."""

    program: str | None = None
    args: tuple[str, ...] = ()
    egress: tuple[str, ...] = ()


def parse(text: str) -> Package:
    """Parse ``npm:NAME@VERSION`` or ``pypi:NAME==VERSION``; raises UsageError."""
    kind, colon, rest = text.partition(":")
    found = {"npm": _NPM, "pypi": _PYPI}[kind].fullmatch(rest) if colon and kind in KINDS else None
    if found is None or not _VERSION.fullmatch(found["version"]):
        why = "names no package in one exact version"
        raise UsageError(f"--mcp {text}", why, "write npm:@scope/server@1.2.3 or pypi:server==1.2.3")
    return Package(kind, found["name"], found["version"])


def read_resolved(value: Any) -> Resolved:
    """The resolver's report, which is no more to be believed than the cage that it comes from; raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    programs, hashes, description = value.get("programs"), value.get("hashes"), value.get("description")
    for texts in (programs, hashes):
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError("programs and hashes are no texts by name")
    assert isinstance(programs, dict) and isinstance(hashes, dict)
    if not hashes or not all(hashes.values()):
        raise ValueError("a package came without a hash")
    return Resolved(programs, hashes, description[:200] if isinstance(description, str) else "")
