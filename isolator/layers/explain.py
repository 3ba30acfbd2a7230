"""An effective policy in plain words, one sentence per layer, and a proposal as JSON.

The sentences are the layers' own (``Layer.describe``): the *promise* of a policy. Whether this host can keep each
promise is the ledger's business.
"""

from __future__ import annotations

from typing import Any

from isolator.layers.base import Layer
from isolator.layers.capabilities import Capabilities
from isolator.layers.cgroup.layer import Cgroup
from isolator.layers.filesystem import Filesystem
from isolator.layers.landlock import Landlock
from isolator.layers.namespaces import Namespaces
from isolator.layers.network.layer import Network
from isolator.layers.no_new_privs import NoNewPrivs
from isolator.layers.phrases import count, listing
from isolator.layers.proc.layer import Proc
from isolator.layers.rlimits import Rlimits
from isolator.layers.seccomp.layer import Seccomp
from isolator.layers.user import User
from isolator.policy.meet.proposal import Proposal
from isolator.policy.model import EffectivePolicy
from isolator.policy.units import format_duration

ORDER: tuple[type[Layer], ...] = (
    User, Cgroup, Namespaces, Filesystem, Proc, Network, Capabilities, NoNewPrivs, Landlock, Seccomp, Rlimits,
)  # fmt: skip
"""Every layer, in the order of their sentences; the events follow."""


def sentences(policy: EffectivePolicy) -> dict[str, str]:
    """One plain sentence for each layer, by its name, and one about events."""
    return {layer.name: layer.describe(policy) for layer in ORDER} | {"events": _events(policy)}


def mode_sentence(proposal: Proposal) -> dict[str, str]:
    """One more sentence, about the way in which events reach a plugin, where that is a special one."""
    if proposal.mode == "exec":
        but = ", but for /state" if proposal.effective.filesystem.state else ""
        return {
            "mode": "Runs once for each event, in a cage of its own: nothing stays from one event to the next"
            f"{but}; a run that fails is a failed attempt and no crash."
        }
    if proposal.mode == "http":
        place = f"port {proposal.port} of its own loopback" if proposal.port is not None else "its socket"
        return {"mode": f"Serves HTTP to the host alone, on {place}; a redirect is never followed."}
    if proposal.mode == "mcp":
        return {
            "mode": "Speaks MCP with the host alone, which makes calls of its tools out of events and of what callers "
            "ask; a tool that has changed is blocked for them until it is approved."
        }
    return {}


def proposal_json(proposal: Proposal, *, policy_file: str | None = None) -> dict[str, Any]:
    """A proposal as it crosses process borders (``docs/internals.md``); ``policy_file``: where it will be written."""
    return {
        "lines": [dict(vars(line)) for line in proposal.lines],
        "policy_text": proposal.policy_text,
        "policy_file": proposal.policy_file or policy_file,
        "needs_approval": proposal.needs_approval,
        "sentences": sentences(proposal.effective) | mode_sentence(proposal),
        "effective": proposal.effective.model_dump(mode="json"),
        "effective_digest": proposal.effective.digest(),
    }


def _events(policy: EffectivePolicy) -> str:
    hooks = listing(policy.hooks) if policy.hooks else "no events"
    permissions = listing(policy.permissions) if policy.permissions else "nothing"
    crashes = count(policy.restart.crashes, "crash", "crashes")
    return (
        f"Receives {hooks}; may ask the host for {permissions}; answers within "
        f"{format_duration(policy.delivery_timeout)}, {count(policy.delivery_attempts, 'attempt')}; after {crashes} "
        f"in {format_duration(policy.restart.window)} it is not started again."
    )
