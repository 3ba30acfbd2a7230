"""The meet: effective = ceiling ∩ (grant, else default) ∩ (request, else default), field by field.

Each side is turned into ``Bounds`` (``sides.py``) and the three are met; no field is decided anywhere else. What an
author asked and did not get is explained line by line in ``lines.py``. With no policy file yet, the default grant is
worked out: what is asked within the default posture, and exactly the names that are asked for; an operator has to
approve it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from isolator.errors import UsageError
from isolator.policy import names
from isolator.policy.destinations import never_reachable
from isolator.policy.grant import PluginPolicy
from isolator.policy.host import HostConfig
from isolator.policy.keys import (
    BY_NAME,
    LIMITS,
    SWITCHES,
    ConnectionLimits,
    DeliveryLimits,
    FileLimits,
    Frozen,
    NetworkSwitches,
    ResourceLimits,
    StopLimits,
)
from isolator.policy.meet.bounds import Bounds, Egress, egress_within
from isolator.policy.meet.bounds import meet as meet_bounds
from isolator.policy.meet.lines import explain_lines
from isolator.policy.meet.proposal import DEFAULT_GRANT, Proposal
from isolator.policy.meet.render import render_policy
from isolator.policy.meet.sides import ceiling_bounds, grant_bounds, request_bounds, requested_egress
from isolator.policy.model import (
    EffectivePolicy,
    FilesystemPolicy,
    ListenRule,
    NetworkPolicy,
    ResourcePolicy,
    RestartPolicy,
)
from isolator.policy.parse.load import check_ceiling, load_plugin_policy

if TYPE_CHECKING:
    from isolator.policy.request import ManifestCore


def meet(core: ManifestCore, grant: PluginPolicy | None, host: HostConfig) -> Proposal:
    """What this plugin may do, and why. ``grant`` None: work out the default grant, which needs approval."""
    given = grant if grant is not None else default_grant(core, host)
    effective = effective_policy(core, given, host)
    proposal = Proposal(
        effective=effective,
        lines=explain_lines(core, given, host, effective),
        needs_approval=grant is None,
        policy_file=grant.source if grant is not None else None,
    )
    if grant is not None:
        return proposal
    return replace(proposal, policy_text=render_policy(core, proposal))


def policy_alone(grant: PluginPolicy, host: HostConfig, name: str) -> Proposal:
    """What a policy file allows at most, whatever a manifest may ask for; for ``policy explain`` and ``prove``."""
    from isolator.policy.request import UNWRITTEN, ManifestCore

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
    return _compose(core.name, bounds, grant, host, _listen(core, grant, host))


def default_grant(core: ManifestCore, host: HostConfig) -> PluginPolicy:
    """What is granted when an operator agrees without writing a policy: the names asked for, the default posture.

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
    network = core.sandbox.network
    wanted = None if network is None or network.listen is None else {entry.port for entry in network.listen}
    return tuple(
        sorted(
            (
                rule
                for rule in grant.listen or ()
                if (wanted is None or rule.cage_port in wanted) and host.inbound.allows(rule.address, rule.port)
            ),
            key=lambda rule: (rule.port, rule.address, rule.cage_port),
        )
    )


def _compose(
    plugin: str, bounds: Bounds, grant: PluginPolicy, host: HostConfig, listen: tuple[ListenRule, ...]
) -> EffectivePolicy:
    limits = bounds.limits
    # Each inode takes 256 bytes of the image itself: more than one for each block would eat what was granted.
    inodes = min(limits.state_inodes, max(64, limits.state // 4096))
    limits = limits.model_copy(update={"state_inodes": inodes})
    rules = tuple(rule for rule in bounds.egress.rules if never_reachable(rule, host.exceptions) is None)
    mode: Literal["none", "listed", "public"] = "public" if bounds.egress.public else "listed" if rules else "none"
    network = NetworkPolicy(
        mode=mode,
        egress=rules,
        exceptions=host.exceptions if mode != "none" else (),
        listen=listen,
        resolvers=host.resolvers if mode != "none" else (),
        **limits.part(ConnectionLimits),
        **_switches(NetworkSwitches, bounds.switches, networked=mode != "none"),
    )
    return EffectivePolicy(
        plugin=plugin,
        hooks=bounds.hooks,
        permissions=bounds.permissions,
        network=network,
        resources=ResourcePolicy(memory_high=limits.memory * 7 // 8, **limits.part(ResourceLimits)),
        filesystem=FilesystemPolicy(read=bounds.read, **limits.part(FileLimits)),
        syscalls="strict" if bounds.strict else "default",
        restart=RestartPolicy(**(host.restart.model_dump() | grant.restart | limits.part(StopLimits))),
        **limits.part(DeliveryLimits),
    )


def _switches(section: type[Frozen], on: frozenset[str], *, networked: bool) -> dict[str, bool]:
    """The switches that ``section`` declares; one that needs a network is off without one."""
    return {
        switch.name: switch.name in on and (networked or not switch.needs_network)
        for switch in SWITCHES
        if switch.name in section.model_fields
    }


def policy_for_run(
    host: HostConfig,
    policy_file: Path | None = None,
    *,
    memory: str | None = None,
    cpu: str | None = None,
    tasks: int | None = None,
    egress: Iterable[str] = (),
    read: Iterable[str] = (),
    also_owner: int | None = None,
) -> EffectivePolicy:
    """The policy of one ``isolator run``: there is no manifest, so the file and the flags are the grant.

    A flag replaces the file's number and adds to the file's lists. No destination named anywhere: no network. No
    ``state`` in the file: no persistent folder. Anything over the ceiling is refused, never lowered in silence.
    """
    if policy_file is None:
        grant = PluginPolicy(source="the command line")
    else:
        grant = load_plugin_policy(policy_file, host, also_owner=also_owner)
    flags: dict[str, float] = {}
    for name, value in (("memory", memory), ("cpu", cpu), ("tasks", tasks)):
        if value is not None:
            try:
                flags[name] = BY_NAME[name].check(value)
            except ValueError as error:
                raise UsageError(f"--{name}", str(error)) from None
    try:
        rules = tuple(names.parse_egress(text) for text in egress)
    except ValueError as error:
        raise UsageError("--egress", str(error)) from None
    try:
        paths = tuple(names.parse_read_path(text) for text in read)
    except ValueError as error:
        raise UsageError("--read", str(error)) from None
    # What the flags alone grant is checked first, so that the error names them and not the file.
    check_ceiling(
        PluginPolicy(source="the command line", egress=rules, read=paths, limits=flags),
        host,
    )
    grant = grant.model_copy(
        update={
            "hooks": (),
            "permissions": (),
            "limits": grant.limits | flags,
            "egress": (*(grant.egress or ()), *rules),
            "read": (*(grant.read or ()), *paths),
        }
    )
    bounds = meet_bounds(ceiling_bounds(host), grant_bounds(grant, host, unwritten=True))
    if "state" not in grant.limits:
        bounds = Bounds(**(vars(bounds) | {"limits": bounds.limits.model_copy(update={"state": 0})}))
    return _compose("run", bounds, grant, host, grant.listen or ())


def asks_more(old: ManifestCore, new: ManifestCore, host: HostConfig) -> tuple[str, ...]:
    """What ``new`` asks for beyond ``old``, one phrase each; an update that does so waits for the operator."""
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
    more += [f"listening on port {port}" for port in sorted(_ports(new) - _ports(old))]
    more += [switch.phrase for switch in SWITCHES if switch.name in after.switches - before.switches]
    if before.strict and not after.strict:
        more.append('the syscall profile "default" instead of "strict"')
    return tuple(more)


def _ports(core: ManifestCore) -> set[int]:
    network = core.sandbox.network
    return {entry.port for entry in (network.listen or ())} if network is not None else set()
