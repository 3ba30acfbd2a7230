"""The three sides of a meet as bounds: the host's ceiling, the operator's grant, the author's request.

Silence of the manifest means: numbers, the defaults; the network, public addresses; folders to read and ports to
forward, that the author leaves them to the operator. Nobody wrote a synthesised manifest, so there the operator's
policy alone decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from isolator.policy.grant import PluginPolicy
from isolator.policy.host import HostConfig
from isolator.policy.keys import LIMITS, SWITCHES, Limits
from isolator.policy.meet.bounds import UNBOUNDED, Bounds, Egress, ceiling_egress, normal_egress
from isolator.policy.model import EgressRule

if TYPE_CHECKING:  # for its start-up time: ``isolator run`` has no manifest
    from isolator.policy.request import ManifestCore


def ceiling_bounds(host: HostConfig) -> Bounds:
    """Bounds that nobody exceeds on this host."""
    ceiling = host.ceiling
    return Bounds(
        limits=ceiling.limits,
        hooks=ceiling.hooks,
        permissions=ceiling.permissions,
        egress=ceiling_egress(ceiling),
        switches=frozenset(switch.name for switch in SWITCHES if getattr(ceiling, switch.name)),
        read=ceiling.read,
        strict=ceiling.syscalls == "strict",
    )


def grant_bounds(grant: PluginPolicy, host: HostConfig, *, unwritten: bool) -> Bounds:
    """Bounds of the operator's grant; the default posture where the policy file is silent."""
    usual = host.defaults
    if not unwritten:
        free = [limit.name for limit in LIMITS if limit.left_to_author]
        usual = usual.model_copy(update={name: getattr(host.ceiling.limits, name) for name in free})
    silent = grant.egress is None
    return Bounds(
        limits=usual.model_copy(update=grant.limits),
        hooks=("*",) if grant.hooks is None else grant.hooks,
        permissions=grant.permissions or (),
        egress=normal_egress(Egress(public=silent or grant.egress_public, rules=grant.egress or ())),
        switches=frozenset(name for name, yes in grant.switches.items() if yes),
        read=grant.read or (),
        strict=(grant.syscalls or host.default_syscalls) == "strict",
        filters=grant.filters or (),
    )


def request_bounds(core: ManifestCore, host: HostConfig, *, unwritten: bool) -> Bounds:
    """Bounds of the author's request, silence as in the module's text. ``unwritten``: there is no author."""
    sandbox = core.sandbox
    silent = UNBOUNDED if unwritten else host.defaults
    numbers = {limit.name: getattr(silent if limit.manifest else UNBOUNDED, limit.name) for limit in LIMITS}
    return Bounds(
        limits=Limits.model_validate(numbers | core.limits),
        hooks=core.hooks,
        permissions=core.permissions,
        egress=requested_egress(core, unwritten=unwritten),
        switches=frozenset(s.name for s in SWITCHES if unwritten or not s.manifest or core.switches.get(s.name)),
        read=("/",) if sandbox.read is None else sandbox.read,
        strict=sandbox.syscalls == "strict",
    )


def requested_egress(core: ManifestCore, *, unwritten: bool = False) -> Egress:
    """Silence asks for public addresses; with no author there is no request that could narrow a grant."""
    network = core.sandbox.network
    if network is not None and network.egress is not None:
        rules = tuple(EgressRule(host=entry.host, ports=entry.ports) for entry in network.egress)
        return normal_egress(Egress(rules=rules))
    return Egress(everything=True) if unwritten else Egress(public=True)
