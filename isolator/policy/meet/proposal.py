"""The outcome of a meet: the effective policy, and one line for each thing that was requested or granted."""

from __future__ import annotations

from typing import Literal

from isolator.base.structs import struct_class
from isolator.policy.model import EffectivePolicy
from isolator.policy.request import MODES

DEFAULT_GRANT = "default grant"
"""``Line.source`` where no policy file exists yet."""


Verdict = Literal["granted", "pending", "refused"]


@struct_class(frozen=True)
class Line:
    """One thing that was requested or granted, and its effective value."""

    field: str
    requested: str | None
    granted: str | None
    effective: str
    verdict: Verdict
    source: str
    """Origin of the effective value: ``FILE:LINE``, ``plugin.json``, or a default."""
    add: str = ""
    """For a pending line: the TOML line that grants it, in place of the key's present line if there is one."""
    section: str = ""
    """The table of the policy file that ``add`` belongs to."""
    at: str = ""
    """Place of ``add``: ``FILE:LINE`` of the line it replaces, or the file."""
    reason: str = ""
    """The author's reason, or why it was refused."""


@struct_class(frozen=True)
class Proposal:
    """The outcome of a meet. ``needs_approval``: no operator has agreed to anything yet."""

    effective: EffectivePolicy
    lines: tuple[Line, ...]
    needs_approval: bool
    policy_file: str | None = None
    policy_text: str | None = None
    """The policy file that ``plugin add`` will write; None when there is one."""
    mode: str = MODES[0]
    """The manifest's ``transport.mode``."""
    port: int | None = None
    """Its ``transport.port``."""

    @property
    def pending(self) -> tuple[Line, ...]:
        """Lines of requests that are not granted."""
        return tuple(line for line in self.lines if line.verdict == "pending")
