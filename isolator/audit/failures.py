"""Failures that no policy decided: the other side of a connection, or the host's DNS, did not answer.

A refusal is a line of a policy; a failure is somebody else's trouble, and no line of a policy mends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isolator.audit.schema import NetConnect, NetQuery
from isolator.policy.denial import DenialRule

_REASONS = {
    "econnrefused": "refused by the other side: nothing listens there, or a firewall answers so",
    "etimedout": "timed out: the other side does not answer at all",
    "ehostunreach": "unreachable: no way leads to that host",
    "enetunreach": "unreachable: this host has no route to that network",
    "eaddrnotavail": "unreachable: this host has no address to connect from",
    "econnreset": "broken off by the other side",
    "no-address": "its name has no address any more",
}


def failure(type: str, data: Mapping[str, Any]) -> str | None:
    """Why a connection or a lookup that was allowed came to nothing; None for any other record."""
    if data.get("verdict") != "failed":
        return None
    if type == NetQuery.TYPE:
        return _rule(str(data.get("rule")))
    if type == NetConnect.TYPE:
        error = str(data.get("error"))
        return _REASONS.get(error) or _rule(error)
    return None


def _rule(code: str) -> str:
    rule = DenialRule.of(code)
    return code if rule is None else rule.explanation
