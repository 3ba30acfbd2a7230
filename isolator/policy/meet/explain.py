"""An effective policy in plain words, one sentence per layer, and a proposal as JSON.

The sentences say what the policy *promises*; whether this host can keep each promise is the ledger's to say.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from isolator.policy import names
from isolator.policy.meet.proposal import Proposal
from isolator.policy.model import EffectivePolicy, NetworkPolicy, ResourcePolicy
from isolator.policy.units import NO_CAP, format_cpu, format_duration, format_size

LAYERS = (
    "user",
    "cgroup",
    "namespaces",
    "filesystem",
    "network",
    "capabilities",
    "landlock",
    "seccomp",
    "rlimits",
    "events",
)


def sentences(policy: EffectivePolicy) -> dict[str, str]:
    """One plain sentence for each layer, in the order of ``LAYERS``."""
    resources, files = policy.resources, policy.filesystem
    state = f"/state up to {format_size(files.state)}" if files.state else "no persistent folder"
    more = f", and read-only {_and(files.read)}" if files.read else ""
    no_fork = "; no new process after the first exec, no writable-executable memory"
    return {
        "user": "Runs as a system user of its own, with no groups, no shell and no way to become another user.",
        "cgroup": (
            f"May use {format_size(resources.memory)} of memory{_slowed(resources)}, {_swap(resources.swap)}, "
            f"{format_cpu(resources.cpu)} of one core and {_count(resources.tasks, 'task')}; beyond its memory the "
            f"whole plugin is ended and leaves nothing.{_disks(resources)}"
        ),
        "namespaces": "Sees only its own processes, mounts, host name, IPC objects and network interfaces.",
        "filesystem": (
            f"Sees its own files and /usr read-only{more}; may write {state}, /tmp up to {format_size(files.tmp)} and "
            f"/dev/shm up to {format_size(files.shm)}; nothing else of this host is there."
        ),
        "network": _network(policy.network),
        "capabilities": "Holds no capability and can never gain one, by no file and no program it runs.",
        "landlock": "A second wall behind the file view: what is not listed cannot be opened even if it were seen.",
        "seccomp": (
            f'System calls of the profile "{policy.syscalls}": those of ordinary programs only'
            f"{no_fork if policy.syscalls == 'strict' else ''}; every other call fails and is recorded."
        ),
        "rlimits": f"May have {_count(resources.nofile, 'open file')}; no core dumps, 64K of locked memory.",
        "events": _events(policy),
    }


def proposal_json(proposal: Proposal, *, policy_file: str | None = None) -> dict[str, Any]:
    """A proposal as it crosses process borders (``docs/internals.md``); ``policy_file``: where it will be written."""
    return {
        "lines": [asdict(line) for line in proposal.lines],
        "policy_text": proposal.policy_text,
        "policy_file": proposal.policy_file or policy_file,
        "needs_approval": proposal.needs_approval,
        "sentences": sentences(proposal.effective),
        "effective": proposal.effective.model_dump(mode="json"),
        "effective_digest": proposal.effective.digest(),
    }


def _events(policy: EffectivePolicy) -> str:
    hooks = _and(policy.hooks) if policy.hooks else "no events"
    permissions = _and(policy.permissions) if policy.permissions else "nothing"
    crashes = _count(policy.restart.crashes, "crash", "crashes")
    return (
        f"Receives {hooks}; may ask the host for {permissions}; answers within "
        f"{format_duration(policy.delivery_timeout)}, {_count(policy.delivery_attempts, 'attempt')}; after {crashes} "
        f"in {format_duration(policy.restart.window)} it is not started again."
    )


def _network(network: NetworkPolicy) -> str:
    inbound = ""
    if network.listen:
        ports = _and(f"{names.format_listen(r).rpartition(':')[0]} to its port {r.cage_port}" for r in network.listen)
        inbound = f" This host forwards {ports}."
    if network.mode == "none":
        return "Has no network at all." + inbound
    listed = [f"{rule.host} (TCP {_and(map(str, rule.ports))})" for rule in network.egress]
    never = "never private, local or metadata addresses"
    if network.exceptions:
        never += ", but for the exceptions of host.toml"
    sni = " TLS without a server name is let through." if network.allow_no_sni else ""
    if network.mode == "public":
        besides = f", besides {_and(listed)}" if listed else ""
        return (
            f"May connect to any public address, TCP 80 and 443{besides}; {never}; names it asks for leave this host."
            f"{sni}{inbound}"
        )
    return f"May connect to {_and(listed)} and to nothing else; {never}.{sni}{inbound}"


def _and(items: Any) -> str:
    words = list(items)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _slowed(resources: ResourcePolicy) -> str:
    """``memory.high`` is set only where there is swap to make room with."""
    return f" (slowed down above {format_size(resources.memory_high)})" if resources.swap else ""


def _disks(resources: ResourcePolicy) -> str:
    caps = [
        f"{verb} at most {format_size(rate)} a second"
        for verb, rate in (("reads", resources.io_read), ("writes", resources.io_write))
        if rate < NO_CAP
    ]
    return f" It {_and(caps)} of each disk." if caps else ""


def _swap(size: int) -> str:
    return f"{format_size(size)} of swap" if size else "no swap"
