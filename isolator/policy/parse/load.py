"""Load ``policies/NAME.toml``: values, their lines, and whether the host allows them.

Every value keeps its ``FILE:LINE``; every error is one line that begins with it. Who may have written the files, and
how they are read, is ``trusted.py``.
"""

from __future__ import annotations

import functools
from pathlib import Path

from isolator.errors import UsageError
from isolator.policy import names
from isolator.policy.destinations import never_reachable
from isolator.policy.filters import MOST, parse_filter
from isolator.policy.grant import PluginPolicy
from isolator.policy.host import HostConfig
from isolator.policy.keys import LIMITS, SWITCHES
from isolator.policy.meet.bounds import Egress, ceiling_egress, egress_within
from isolator.policy.parse.strict import Table
from isolator.policy.parse.trusted import read_trusted

MAX_VARIABLES, MAX_ENVIRONMENT = 64, 16 * 1024
"""The number of variables in a policy, and the characters of all of them."""


def load_plugin_policy(
    path: Path | str, host: HostConfig | None = None, *, also_owner: int | None = None
) -> PluginPolicy:
    """One plugin's policy file. With ``host``, whatever exceeds its ceiling is refused with file and line.

    Raises NotFoundError when there is no such file, DeniedError when others can write it, UsageError for its content.
    """
    policy = parse_plugin_policy(read_trusted(path, also_owner=also_owner), source=str(path))
    if host is not None:
        check_ceiling(policy, host)
    return policy


def parse_plugin_policy(text: bytes, *, source: str) -> PluginPolicy:
    """A policy file's content; ``source`` is what errors and ``explain`` call it."""
    from isolator.policy.parse.toml_file import document

    return policy_of(document(text, source))


def policy_of(top: Table) -> PluginPolicy:
    """As ``parse_plugin_policy`` for the top table of the file."""
    from isolator.policy.parse.toml_file import declared_in, egress_of, restart_of, where_of

    source = top.name
    grant, limits, filesystem = top.table("grant"), top.table("limits"), top.table("filesystem")
    syscalls, restart, delivery = top.table("syscalls"), top.table("restart"), top.table("delivery")
    egress, public = egress_of(grant, "egress")
    env, require = top.table("env"), top.table("require")
    tables = (grant, limits, filesystem, syscalls, restart, delivery, env, require, top)
    numbers = declared_in(tables, LIMITS)
    policy = PluginPolicy(
        source=source,
        hooks=grant.strings("hooks", names.parse_hook_grant),
        permissions=grant.strings("permissions", names.parse_permission_grant),
        filters=grant.items("filters", parse_filter, limit=MOST),
        egress=egress,
        egress_public=public,
        listen=grant.strings("listen", names.parse_listen, limit=32),
        tools=grant.strings("tools", names.parse_tool, limit=256) or (),
        callers=grant.items("callers", names.parse_uid) or (),
        switches=declared_in(tables, SWITCHES),
        limits=numbers,
        restart=restart_of(restart),
        read=filesystem.strings("read", names.parse_read_path),
        syscalls=syscalls.choice("profile", ("default", "strict"), None),  # type: ignore[arg-type]  # choice() checks it
        certified=require.boolean("certified", False),
        env=_variables(env),
        where=where_of(top),
    )
    top.finish()
    return policy


def _variables(env: Table) -> dict[str, str]:
    if len(env.data) > MAX_VARIABLES:
        env.fail((), f"{len(env.data)} variables; at most {MAX_VARIABLES}")
    found = {name: env.parsed(name, functools.partial(names.parse_variable, name), "") for name in env.data}
    length = sum(len(name) + len(value) for name, value in found.items())
    if length > MAX_ENVIRONMENT:
        env.fail((), f"{length} characters; at most {MAX_ENVIRONMENT}")
    return found


def check_ceiling(policy: PluginPolicy, host: HostConfig) -> None:
    """Refuse a policy that grants more than the host allows at all, at the line that does so."""
    for fault in over_ceiling(policy, host):
        raise fault


def over_ceiling(policy: PluginPolicy, host: HostConfig) -> list[UsageError]:
    """Everything that a policy grants and the host does not allow at all, each at its line."""
    ceiling = host.ceiling
    edit = f"lower it, or raise the ceiling in {host.source or 'host.toml'}"
    found: list[UsageError] = []

    def refuse(key: str, why: str, remedy: str = edit) -> None:
        found.append(UsageError(policy.at(key), f"{key}: {why}", remedy))

    for limit in LIMITS:
        granted, most = policy.limits.get(limit.name), getattr(ceiling.limits, limit.name)
        if granted is not None and granted > most:
            refuse(limit.policy, f"{limit.show(granted)} is over the ceiling, {limit.show(most)}")
    if policy.syscalls == "default" and ceiling.syscalls == "strict":
        refuse("syscalls.profile", '"default" is over the ceiling, "strict"')
    for switch in SWITCHES:
        if policy.switches.get(switch.name) and not getattr(ceiling, switch.name):
            refuse(switch.policy, "the ceiling forbids it")
    for kind, covers in (("hooks", names.covers_hook), ("permissions", names.covers_permission)):
        allowed = getattr(ceiling, kind)
        for index, name in enumerate(getattr(policy, kind) or ()):
            if not any(covers(most, name) for most in allowed):
                refuse(f"grant.{kind}[{index}]", f"{name} is over the ceiling, {', '.join(allowed) or 'none'}")
    if policy.egress_public and not ceiling.egress_public:
        refuse("grant.egress", '"public" is over the ceiling')
    for index, rule in enumerate(policy.egress or ()):
        text = names.format_egress(rule)
        # Where "public" is in the list too, which is no rule, the places of the rules are not known.
        key = "grant.egress" if policy.egress_public else f"grant.egress[{index}]"
        if blocked := never_reachable(rule, host.exceptions, host.virtual):
            remedy = "to open it for this host, list it in [network] exceptions of host.toml"
            refuse(key, f"{text} is never reachable ({blocked})", remedy)
        elif not egress_within(Egress(rules=(rule,)), ceiling_egress(ceiling)):
            refuse(key, f"{text} is over the ceiling")
    for index, listen in enumerate(policy.listen or ()):
        if not host.inbound.allows(listen.address, listen.port):
            why = f"{listen.address} port {listen.port} is not open to plugins"
            refuse(f"grant.listen[{index}]", why, "allow it in [inbound] of host.toml")
    for index, path in enumerate(policy.read or ()):
        if not any(names.path_covers(most, path) for most in ceiling.read):
            refuse(f"filesystem.read[{index}]", f"{path} is outside what the ceiling lets plugins read")
    return found
