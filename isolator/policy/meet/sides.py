"""The three sides of a meet as bounds: the host's ceiling, the operator's grant, the author's request.

Silence of the manifest means: numbers, the defaults; the network, public addresses; folders to read and ports to
forward, that the author leaves them to the operator. Nobody wrote a synthesised manifest, so there the operator's
policy alone decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from isolator.policy.grant import PluginPolicy
from isolator.policy.host import HostConfig, Limits
from isolator.policy.limits import NUMBERS, asked
from isolator.policy.meet.bounds import UNBOUNDED, Bounds, Egress, ceiling_egress, normal_egress
from isolator.policy.model import EgressRule

if TYPE_CHECKING:
    from isolator.policy.request import ManifestCore


def ceiling_bounds(host: HostConfig) -> Bounds:
    """What nobody exceeds on this host."""
    ceiling = host.ceiling
    return Bounds(
        limits=ceiling.limits,
        hooks=ceiling.hooks,
        permissions=ceiling.permissions,
        egress=ceiling_egress(ceiling),
        allow_no_sni=ceiling.allow_no_sni,
        read=ceiling.read,
        strict=ceiling.syscalls == "strict",
    )


def grant_bounds(grant: PluginPolicy, host: HostConfig, *, unwritten: bool) -> Bounds:
    """What the operator allows this plugin; the default posture where the policy file does not say."""
    usual = host.defaults
    if not unwritten:
        # How long one delivery may take confines nobody: unless the operator says otherwise, the author chooses.
        free = ("delivery_timeout", "delivery_attempts")
        usual = usual.model_copy(update={name: getattr(host.ceiling.limits, name) for name in free})
    said = {name: value for name, value in grant.limits if value is not None}
    silent = grant.egress is None
    return Bounds(
        limits=usual.model_copy(update=said),
        hooks=("*",) if grant.hooks is None else grant.hooks,
        permissions=grant.permissions or (),
        egress=normal_egress(Egress(public=silent or grant.egress_public, rules=grant.egress or ())),
        allow_no_sni=bool(grant.allow_no_sni),
        read=grant.read or (),
        strict=(grant.syscalls or host.default_syscalls) == "strict",
    )


def request_bounds(core: ManifestCore, host: HostConfig, *, unwritten: bool) -> Bounds:
    """What the author asks for; see the module's text for what silence means. ``unwritten``: there is no author."""
    sandbox = core.sandbox
    silent = UNBOUNDED if unwritten else host.defaults
    numbers: dict[str, float] = {}
    for number in NUMBERS:
        value = asked(core, number)
        base = silent if number.asked else UNBOUNDED
        numbers[number.name] = getattr(base, number.name) if value is None else value
    return Bounds(
        limits=Limits.model_validate(numbers),
        hooks=core.hooks,
        permissions=core.permissions,
        egress=requested_egress(core, unwritten=unwritten),
        allow_no_sni=unwritten or bool(sandbox.network and sandbox.network.allow_no_sni),
        read=("/",) if sandbox.filesystem.read is None else sandbox.filesystem.read,
        strict=sandbox.syscalls == "strict",
    )


def requested_egress(core: ManifestCore, *, unwritten: bool = False) -> Egress:
    """Silence asks for public addresses; with no author there is no request that could narrow a grant."""
    network = core.sandbox.network
    if network is not None and network.egress is not None:
        rules = tuple(EgressRule(host=entry.host, ports=entry.ports) for entry in network.egress)
        return normal_egress(Egress(rules=rules))
    return Egress(everything=True) if unwritten else Egress(public=True)
