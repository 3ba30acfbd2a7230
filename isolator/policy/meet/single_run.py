"""The policy of one ``isolator run``. It imports no more than that command needs, whose start-up time counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from isolator.errors import UsageError
from isolator.policy import names
from isolator.policy.grant import PluginPolicy
from isolator.policy.host import HostConfig
from isolator.policy.keys import BY_NAME
from isolator.policy.meet.bounds import meet
from isolator.policy.meet.compose import compose
from isolator.policy.meet.sides import ceiling_bounds, grant_bounds
from isolator.policy.model import EffectivePolicy
from isolator.policy.parse.load import check_ceiling, load_plugin_policy


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
    check_ceiling(PluginPolicy(source="the command line", egress=rules, read=paths, limits=flags), host)
    grant = grant.model_copy(
        update={
            "hooks": (),
            "permissions": (),
            "limits": grant.limits | flags,
            "egress": (*(grant.egress or ()), *rules),
            "read": (*(grant.read or ()), *paths),
        }
    )
    bounds = meet(ceiling_bounds(host), grant_bounds(grant, host, unwritten=True))
    if "state" not in grant.limits:
        bounds = replace(bounds, limits=bounds.limits.model_copy(update={"state": 0}))
    return compose("run", bounds, grant, host, grant.listen or ())
