"""The policy of one ``isolator run``. It imports no more than that command needs, whose start-up time counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from isolator.base.structs import replace
from isolator.errors import UsageError, translated
from isolator.policy import names
from isolator.policy.grant import PluginPolicy
from isolator.policy.host import HostConfig
from isolator.policy.keys import BY_NAME, DeliveryLimits, RunLimits
from isolator.policy.meet.bounds import meet
from isolator.policy.meet.compose import compose
from isolator.policy.meet.sides import ceiling_bounds, grant_bounds
from isolator.policy.model import EffectivePolicy
from isolator.policy.parse.load import check_ceiling, load_plugin_policy

Net = Literal["none", "names", "public"]

_NO_EFFECT = (*DeliveryLimits.model_fields, *RunLimits.model_fields)
"""Numbers of a policy file that mean nothing without a daemon."""


def policy_for_run(
    host: HostConfig,
    policy_file: Path | PluginPolicy | None = None,
    *,
    memory: str | None = None,
    cpu: str | None = None,
    tasks: int | None = None,
    nofile: int | None = None,
    tmp: str | None = None,
    net: Net | None = None,
    egress: Iterable[str] = (),
    read: Iterable[str] = (),
    write: Iterable[str] = (),
    also_owner: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> EffectivePolicy:
    """The policy of one ``isolator run``: there is no manifest, so the file and the flags are the grant.

    A flag replaces the file's number and adds to the file's lists; ``net`` overrules the file about the network. No
    destination named anywhere: no network. No ``state`` in the file: no persistent folder. Anything over the ceiling is
    refused, never lowered in silence; ``note`` gets a line about each part of the file that a single run cannot honour.
    ``write``: folders that the cage may change; here they are only checked, as what a cage sees is.
    """
    if policy_file is None:
        grant = PluginPolicy(source="the command line")
    elif isinstance(policy_file, PluginPolicy):
        grant = policy_file
        check_ceiling(grant, host)
    else:
        grant = load_plugin_policy(policy_file, host, also_owner=also_owner)
    flags: dict[str, float] = {}
    for name, value in (("memory", memory), ("cpu", cpu), ("tasks", tasks), ("nofile", nofile), ("tmp", tmp)):
        if value is not None:
            with translated(ValueError, UsageError, f"--{name}"):
                flags[name] = BY_NAME[name].check(value)
    with translated(ValueError, UsageError, "--egress"):
        rules = tuple(names.parse_egress(text) for text in egress)
    paths, changed = _paths("--read", read), _paths("--write", write)
    # What the flags alone grant is checked first, so that the error names them and not the file.
    flagged = PluginPolicy(
        source="the command line", egress=rules, egress_public=net == "public", read=(*paths, *changed), limits=flags
    )
    check_ceiling(flagged, host)
    for text in _without_effect(grant):
        note(f"{grant.source}: {text}")
    rules = (*(grant.egress or ()), *rules)
    if net == "none" and egress:
        raise UsageError("--net none", "--egress names a destination", "leave one of them out")
    if net == "names" and not rules:
        raise UsageError("--net names", "no destination is named", "name each with --egress HOST:PORT")
    grant = grant.model_copy(
        update={
            "hooks": (),
            "permissions": (),
            "limits": grant.limits | flags,
            "egress": () if net == "none" else rules,
            "egress_public": net == "public" or (net is None and grant.egress_public),
            "listen": () if net == "none" else grant.listen,
            "read": (*(grant.read or ()), *paths),
        }
    )
    bounds = meet(ceiling_bounds(host), grant_bounds(grant, host, unwritten=True))
    if "state" not in grant.limits:
        bounds = replace(bounds, limits=bounds.limits.model_copy(update={"state": 0}))
    return compose("run", bounds, grant, host, grant.listen or ())


def _paths(option: str, texts: Iterable[str]) -> tuple[str, ...]:
    with translated(ValueError, UsageError, option):
        return tuple(names.parse_read_path(text) for text in texts)


def _without_effect(grant: PluginPolicy) -> Iterator[str]:
    """The parts of a policy file that a single run does not honour, and why."""
    if grant.limits.get("state"):
        yield "filesystem.state has no effect: a single run keeps nothing; --write DIR shows a folder to write to"
    if grant.certified:
        yield "require.certified has no effect: a command is no plugin, and nobody certifies it"
    keys = [f"grant.{name}" for name in ("hooks", "permissions", "filters") if getattr(grant, name)]
    keys += [BY_NAME[name].policy for name in _NO_EFFECT if name in grant.limits]
    keys += ["restart"] if grant.restart else []
    if keys:
        yield f"no effect of {', '.join(keys)}: a single run has no events and no restarts"
