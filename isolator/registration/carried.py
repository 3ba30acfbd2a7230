"""Staged plugins over an exec of the daemon: an operator who is looking at one may still agree to it.

Their copies stay where they are; manifest and proposal are made of them again. What would be shown otherwise by now,
because ``host.toml`` or the policy has changed, has expired.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from isolator.ipc.handover import StagedState
from isolator.registration.staging import MANIFEST, Source, Staged

if TYPE_CHECKING:
    from isolator.registration.registrar import Candidate


def hand_over(candidate: Candidate) -> StagedState:
    """The state of a staged plugin before an exec."""
    staged = asdict(candidate.staged) | {"folder": str(candidate.staged.folder)}
    del staged["manifest"]
    return StagedState(
        staged=staged, source=asdict(candidate.source), update=candidate.update, by=candidate.by,
        faults=candidate.faults, shown=shown(candidate),
    )  # fmt: skip


def staged_of(state: StagedState) -> tuple[Staged, Source]:
    """The copy of a staged plugin, whose manifest is empty if it cannot be read, and its origin."""
    folder, manifest = Path(str(state.staged["folder"])), b""
    with contextlib.suppress(OSError):
        manifest = (folder / MANIFEST).read_bytes()
    signatures = tuple(map(str, state.staged.get("signatures", ())))
    staged = Staged(**state.staged | {"folder": folder, "manifest": manifest, "signatures": signatures})
    return staged, Source(**state.source | {"hooks": tuple(state.source["hooks"])})


def shown(candidate: Candidate) -> str:
    """Digest of what an operator agrees to."""
    proposal, signer = candidate.proposal, candidate.release.signer
    agreed = [proposal.needs_approval, proposal.effective.digest(), proposal.policy_text, *([signer] if signer else ())]
    text = json.dumps(agreed)
    return hashlib.sha256(text.encode()).hexdigest()
