"""Check of a policy that a reader without privilege has parsed: whether the parser could have made it."""

from __future__ import annotations

import math
import re

from isolator.policy import names
from isolator.policy.filters import read_filter
from isolator.policy.grant import PluginPolicy
from isolator.policy.keys import BY_NAME, SWITCHES
from isolator.policy.model import CrashPolicy
from isolator.policy.parse.load import MAX_ENVIRONMENT, MAX_VARIABLES

_MOST = 256
_PLACE = re.compile(r":[0-9]{1,6}")


def check(policy: PluginPolicy) -> None:
    """Raise ValueError for anything that ``parse_plugin_policy`` with an empty source does not make."""
    names_and_rules = (policy.hooks, policy.permissions, policy.filters, policy.egress, policy.listen, policy.read)
    lists = (*names_and_rules, policy.env, policy.where, policy.tools, policy.callers)
    if any(len(one or ()) > 8 * _MOST for one in lists) or policy.source:
        raise ValueError("too many")
    for hook in policy.hooks or ():
        _same(names.parse_hook_grant(hook), hook)
    for permission in policy.permissions or ():
        _same(names.parse_permission_grant(permission), permission)
    for text in policy.filters or ():
        _same(read_filter(text), text)
    for rule in policy.egress or ():
        _same(names.parse_egress(names.format_egress(rule)), rule)
    for listen in policy.listen or ():
        _same(names.parse_listen(names.format_listen(listen)), listen)
    for tool in policy.tools:
        _same(names.parse_tool(tool), tool)
    for uid in policy.callers:
        _same(names.parse_uid(uid), uid)
    for path in policy.read or ():
        _same(names.parse_read_path(path), path)
    for name, value in policy.env.items():
        _same(names.parse_variable(name, value), value)
    if len(policy.env) > MAX_VARIABLES or sum(map(len, policy.env.values())) > MAX_ENVIRONMENT:
        raise ValueError("too many variables")
    if not policy.switches.keys() <= {switch.name for switch in SWITCHES}:
        raise ValueError("no such switch")
    for key, number in policy.limits.items():
        if not math.isfinite(number) or not (number == 0 or BY_NAME[key].least <= number < 2**63):
            raise ValueError("no such number")
    if not policy.restart.keys() <= {*CrashPolicy.model_fields} or not all(map(math.isfinite, policy.restart.values())):
        raise ValueError("no such restart")
    for key, place in policy.where.items():
        if not key.isprintable() or len(key) > _MOST or not _PLACE.fullmatch(place):
            raise ValueError("no place")


def _same(parsed: object, value: object) -> None:
    if parsed != value:
        raise ValueError("another spelling")
