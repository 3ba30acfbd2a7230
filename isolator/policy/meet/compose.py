"""Bounds written as an effective policy, section by section."""

from __future__ import annotations

from typing import Any, Literal

from isolator.policy import model
from isolator.policy.destinations import never_reachable
from isolator.policy.frozen import Frozen
from isolator.policy.grant import PluginPolicy
from isolator.policy.host import HostConfig
from isolator.policy.keys import SWITCHES
from isolator.policy.meet.bounds import Bounds


def compose(
    plugin: str, bounds: Bounds, grant: PluginPolicy, host: HostConfig, listen: tuple[model.ListenRule, ...]
) -> model.EffectivePolicy:
    """The effective policy that allows what ``bounds`` allow; ``listen``: the ports that are forwarded."""
    rules = tuple(rule for rule in bounds.egress.rules if never_reachable(rule, host.exceptions, host.virtual) is None)
    mode: Literal["none", "listed", "public"] = "public" if bounds.egress.public else "listed" if rules else "none"
    values = dict(bounds.limits)
    # Each inode takes 256 bytes of the image itself: more than one for each block would eat what was granted.
    values["state_inodes"] = min(values["state_inodes"], max(64, values["state"] // 4096))
    for switch in SWITCHES:
        values[switch.name] = switch.name in bounds.switches and (mode != "none" or not switch.needs_network)

    reaching: dict[str, Any] = {}
    if mode != "none":
        reaching |= {"exceptions": host.exceptions, "resolvers": host.resolvers, "virtual": host.virtual}
        reaching |= {"proxy": host.proxy, "proxy_resolves": host.proxy_resolves}

    def declared(section: type[Frozen]) -> dict[str, Any]:
        return {name: values[name] for name in section.model_fields if name in values}

    return model.EffectivePolicy(
        plugin=plugin,
        hooks=bounds.hooks,
        permissions=bounds.permissions,
        network=model.NetworkPolicy(
            mode=mode, egress=rules, listen=listen, **reaching, **declared(model.NetworkPolicy)
        ),
        resources=model.ResourcePolicy(memory_high=values["memory"] * 7 // 8, **declared(model.ResourcePolicy)),
        filesystem=model.FilesystemPolicy(read=bounds.read, **declared(model.FilesystemPolicy)),
        syscalls="strict" if bounds.strict else "default",
        restart=model.RestartPolicy(**(host.restart.model_dump() | grant.restart | declared(model.RestartPolicy))),
        env=grant.env,
        filters=bounds.filters,
        tools=grant.tools,
        callers=grant.callers,
        **declared(model.EffectivePolicy),
    )
