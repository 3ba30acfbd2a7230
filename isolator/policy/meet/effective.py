"""The meet: effective = ceiling ∩ (grant, else default) ∩ (request, else default), field by field.

Each side is turned into ``Bounds`` (``sides.py``), the three are met (``bounds.py``) and the result is written as an
effective policy (``compose.py``); no field is decided anywhere else. ``lines.py`` explains line by line what an author
asked for and did not get. Without a policy file, the default grant is worked out: the requested numbers within the
default posture, and exactly the names that are requested; an operator has to approve it.
"""

from __future__ import annotations

from isolator.base.structs import replace
from isolator.policy import names
from isolator.policy.grant import PluginPolicy
from isolator.policy.host import HostConfig
from isolator.policy.keys import LIMITS, SWITCHES
from isolator.policy.meet.bounds import Egress, egress_within
from isolator.policy.meet.bounds import meet as meet_bounds
from isolator.policy.meet.compose import compose
from isolator.policy.meet.lines import explain_lines
from isolator.policy.meet.proposal import DEFAULT_GRANT, Proposal
from isolator.policy.meet.render import render_policy
from isolator.policy.meet.sides import ceiling_bounds, grant_bounds, request_bounds, requested_egress
from isolator.policy.model import EffectivePolicy, ListenRule
from isolator.policy.request import UNWRITTEN, ManifestCore


def meet(core: ManifestCore, grant: PluginPolicy | None, host: HostConfig) -> Proposal:
    """The effective policy of a plugin, explained. ``grant`` None: that of the default grant, which needs approval."""
    in_force = grant if grant is not None else default_grant(core)
    effective = effective_policy(core, in_force, host)
    proposal = Proposal(
        effective=effective,
        lines=explain_lines(core, in_force, host, effective),
        needs_approval=grant is None,
        policy_file=grant.source if grant is not None else None,
        mode=core.mode,
        port=core.port,
    )
    if grant is not None:
        return proposal
    return replace(proposal, policy_text=render_policy(core, proposal))


def policy_alone(grant: PluginPolicy, host: HostConfig, name: str) -> Proposal:
    """The most that a policy file allows, whatever a manifest may request; for ``policy explain``."""
    core = ManifestCore(
        name=name,
        version=UNWRITTEN,
        api_version="1",
        binary="./any",
        hooks=("*",) if grant.hooks is None else grant.hooks,
        permissions=grant.permissions or (),
    )
    proposal = meet(core, grant, host)
    return replace(proposal, lines=tuple(replace(line, requested=None) for line in proposal.lines))


def effective_policy(core: ManifestCore, grant: PluginPolicy, host: HostConfig) -> EffectivePolicy:
    """The meet alone, without the explanation."""
    granted = grant_bounds(grant, host, unwritten=core.synthesised)
    request = request_bounds(core, host, unwritten=core.synthesised)
    bounds = meet_bounds(meet_bounds(ceiling_bounds(host), granted), request)
    return compose(core.name, bounds, grant, host, _listen(core, grant, host))


def default_grant(core: ManifestCore) -> PluginPolicy:
    """The grant of an operator who agrees without writing a policy: the requested names, the default posture.

    Folders of the host, forwarded ports and TLS without a name are never part of it.
    """
    egress = requested_egress(core)
    return PluginPolicy(
        source=DEFAULT_GRANT,
        hooks=core.hooks,
        permissions=core.permissions,
        egress=egress.rules,
        egress_public=egress.public,
        read=(),
    )


def _listen(core: ManifestCore, grant: PluginPolicy, host: HostConfig) -> tuple[ListenRule, ...]:
    wanted = _ports(core)
    rules = (rule for rule in grant.listen or () if wanted is None or rule.cage_port in wanted)
    forwarded = (rule for rule in rules if host.inbound.allows(rule.address, rule.port))
    return tuple(sorted(forwarded, key=lambda rule: (rule.port, rule.address, rule.cage_port)))


def asks_more(old: ManifestCore, new: ManifestCore, host: HostConfig) -> tuple[str, ...]:
    """Requests of ``new`` beyond those of ``old``, one phrase each; an update with any waits for the operator."""
    before, after = request_bounds(old, host, unwritten=False), request_bounds(new, host, unwritten=False)
    more = [f"event {hook}" for hook in after.hooks if not any(names.covers_hook(h, hook) for h in before.hooks)]
    more += [f"permission {name}" for name in after.permissions if name not in before.permissions]
    if after.egress.public and not before.egress.public:
        more.append("connections to any public address")
    for rule in after.egress.rules:
        if not egress_within(Egress(rules=(rule,)), before.egress):
            more.append(f"connections to {names.format_egress(rule)}")
    for limit in LIMITS:
        then, now = getattr(before.limits, limit.name), getattr(after.limits, limit.name)
        if now > then:
            more.append(f"{limit.key} {limit.show(now)} instead of {limit.show(then)}")
    known = old.sandbox.read or ()
    for path in new.sandbox.read or ():
        if not any(names.path_covers(outer, path) for outer in known):
            more.append(f"reading {path}")
    # Silence leaves the choice to the policy, which may grant more than the version before has requested.
    if new.sandbox.read is None and old.sandbox.read is not None:
        more.append("reading every folder that its policy grants")
    ports, former = _ports(new), _ports(old)
    more += [f"listening on port {port}" for port in sorted((ports or set()) - (former or set()))]
    if ports is None and former is not None:
        more.append("listening on every port that its policy forwards")
    more += [switch.phrase for switch in SWITCHES if switch.name in after.switches - before.switches]
    if before.strict and not after.strict:
        more.append('the syscall profile "default" instead of "strict"')
    return tuple(more)


def _ports(core: ManifestCore) -> set[int] | None:
    """The requested ports; None: the manifest is silent."""
    network = core.sandbox.network
    return None if network is None or network.listen is None else {entry.port for entry in network.listen}
