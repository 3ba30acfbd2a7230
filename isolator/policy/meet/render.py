"""The policy file that ``plugin add`` writes: exactly what was shown, as TOML that an operator can edit.

Loading it back gives the same effective policy, digest and all; the tests state that as a property. A request
that is not granted stands there as a comment with the line to uncomment.
"""

from __future__ import annotations

from isolator.policy.destinations import PUBLIC
from isolator.policy.keys import LIMITS
from isolator.policy.meet.bounds import Egress
from isolator.policy.meet.lines import egress_texts, toml_list
from isolator.policy.meet.proposal import Proposal
from isolator.policy.model import EffectivePolicy
from isolator.policy.request import ManifestCore


def render_policy(core: ManifestCore, proposal: Proposal) -> str:
    """The TOML text for a proposal that came of the default grant."""
    effective = proposal.effective
    sections: dict[str, list[str]] = {
        "grant": _grant(effective),
        "limits": [],
        "filesystem": [],
        "syscalls": [f'profile = "{effective.syscalls}"'],
    }
    for limit in LIMITS:
        if limit.written:
            sections[limit.section].append(limit.toml(effective.value(limit)))
    sections["filesystem"].append(toml_list("read", effective.filesystem.read))
    for line in proposal.lines:
        if line.verdict == "pending" and line.section in sections:
            why = f" ({line.reason})" if line.reason else ""
            sections[line.section] += [
                f"# asked for, not granted: {line.field} {line.requested}{why}; to grant it, write instead:",
                f"# {line.add}",
            ]
        elif line.verdict == "refused":
            sections["grant"].append(f"# refused: {line.field} {line.requested}: {line.reason or 'over the ceiling'}")
    text = [
        f"# What {core.name} may do; first written for version {core.version}.",
        "# After editing it: isolator policy check FILE",
    ]
    for section, lines in sections.items():
        text += ["", f"[{section}]", *lines]
    return "\n".join(text) + "\n"


def _grant(effective: EffectivePolicy) -> list[str]:
    network = effective.network
    public = network.mode == "public"
    egress = toml_list("egress", egress_texts(Egress(public=public, rules=network.egress)))
    if public:
        egress += f"  # {PUBLIC}"
    return [
        toml_list("hooks", effective.hooks),
        toml_list("permissions", effective.permissions),
        egress,
    ]
