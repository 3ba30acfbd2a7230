"""The outcome of a meet: the effective policy, and one line for each thing that was asked for or granted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from isolator.policy.model import EffectivePolicy

DEFAULT_GRANT = "default grant"
"""What ``Line.source`` says where no policy file exists yet."""


Verdict = Literal["granted", "pending", "refused"]


@dataclass(frozen=True)
class Line:
    """One thing that was asked for or granted, and what became of it."""

    field: str
    requested: str | None
    granted: str | None
    effective: str
    verdict: Verdict
    source: str
    """Where the effective value comes from: ``FILE:LINE``, ``plugin.json``, or a default."""
    add: str = ""
    """For a pending line: the TOML line that grants it, in place of the key's present line if there is one."""
    section: str = ""
    """The table of the policy file that ``add`` belongs to."""
    at: str = ""
    """Where ``add`` goes: ``FILE:LINE`` of the line it replaces, or the file."""
    reason: str = ""
    """The author's reason, or why it was refused."""


@dataclass(frozen=True)
class Proposal:
    """The outcome of a meet. ``needs_approval``: no operator has agreed to anything yet."""

    effective: EffectivePolicy
    lines: tuple[Line, ...]
    needs_approval: bool
    policy_file: str | None = None
    policy_text: str | None = None
    """What ``plugin add`` will write; None when a policy file is there."""

    @property
    def pending(self) -> tuple[Line, ...]:
        """What is asked for and not granted."""
        return tuple(line for line in self.lines if line.verdict == "pending")
