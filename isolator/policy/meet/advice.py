"""Advice on a denial for operators: the exact line that would grant it, or why no line can.

Pure: a record's data and the present grant go in, text comes out. An advice suggests and never decides: a denied
attempt is something that untrusted code *tried*, so a line here is a question to the operator, not a recommendation.
The explanations are those of ``DenialRule``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

from isolator.policy.addresses import bracketed, parse_address
from isolator.policy.denial import INSTEAD, DenialRule, Remedy
from isolator.policy.destinations import normal_name
from isolator.policy.keys import BY_NAME
from isolator.policy.meet.bounds import Egress, egress_within
from isolator.policy.meet.lines import toml_list
from isolator.policy.model import AddressException, EffectivePolicy, EgressRule
from isolator.policy.names import format_egress

ASSUMED_PORT = 443
_LIMITS = {Remedy.RATE: "connects_per_second", Remedy.OPEN: "connects_open"}


@dataclass(frozen=True)
class Advice:
    """``line`` belongs into ``table`` of ``file`` (``policy``, ``host.toml``); without one, ``why`` says it all."""

    why: str
    line: str | None = None
    table: str = ""
    file: str = "policy"


def advise(
    type: str,
    data: Mapping[str, Any],
    policy: EffectivePolicy,
    requested: Sequence[str] | None = None,
    permissions: Sequence[str] | None = None,
) -> Advice:
    """Advise on one ``net.denied`` or ``net.query`` (or another denial) of a plugin with this policy.

    ``requested``: the ``NAME:PORT`` rules of its manifest, None where the manifest lists none; ``permissions``: those
    that it asks for, None where that is not known.
    """
    if type not in {"net.denied", "net.query"}:
        return _other(type, data, policy, permissions)
    code = str(data.get("rule"))
    rule = DenialRule.of(code)
    remedy = rule.remedy if rule is not None else Remedy.NONE
    if data.get("various"):
        return Advice("many different destinations in a short time; the trail does not list them one by one")
    if remedy in _LIMITS:
        key = _LIMITS[remedy]
        now: int = getattr(policy.network, key)
        return Advice(f"it is allowed {now}", f"{key} = {now * 2}", "limits")
    if rule is None or (data.get("direction") == "in" and remedy is not Remedy.NONE):
        return Advice(f"refused: {code}")
    if rule is DenialRule.PROTOCOL:
        protocol = code.removeprefix(f"{rule}-").upper()
        return Advice(f"{rule.explanation}; {protocol} cannot be granted")
    match remedy:
        case Remedy.EGRESS:
            return _destination(data, policy, requested)
        case Remedy.EXCEPTION:
            return _inside(rule, data, policy)
        case Remedy.ECH:
            why = "it hides a server name beside the one in the clear, or pretends to, as browsers do"
            return Advice(why, "allow_ech = true", "grant")
        case Remedy.NO_SNI:
            return Advice("it did not say readably which server it meant", "allow_no_sni = true", "grant")
    return Advice(rule.explanation)


def raise_limit(name: str, policy: EffectivePolicy, requested: Any, line: Mapping[str, Any] | None = None) -> Advice:
    """Advise on a number of the policy that a plugin has run into; ``name`` is its field's (``keys.py``).

    ``requested``: the manifest's number, None where it is silent; ``line``: the one of ``explain``, which knows of the
    ceiling.
    """
    limit = BY_NAME[name]
    now = policy.value(limit)
    wanted = None if requested is None else limit.check(requested)
    more = max(now * 2, 1) if wanted is None or wanted <= now else min(now * 2, wanted)
    why = f"it has {limit.show(now)}"
    if limit.manifest and (wanted is None or wanted <= now):
        asked = "its manifest asks for no number" if wanted is None else f"its manifest asks for {limit.show(wanted)}"
        why += f"; {asked}, and has to ask for more as well ({limit.manifest})"
    elif wanted is not None:
        why += f"; its manifest asks for {limit.show(wanted)}"
    if line is not None and "ceiling" in f"{line.get('source')} {line.get('reason')}":
        why += f"; the host's ceiling ({limit.name} in [ceiling] of host.toml) has to be raised first"
    return Advice(why, limit.toml(more), limit.section)


def _destination(data: Mapping[str, Any], policy: EffectivePolicy, requested: Sequence[str] | None) -> Advice:
    name, port = normal_name(str(data.get("name") or "")), data.get("port")
    host = name or _address(data.get("address"))
    if host is None:
        return Advice("that is no host name or address")
    asked = f"{host}:{port or ASSUMED_PORT}"
    present = ["public"] if policy.network.mode == "public" else []
    present += [format_egress(rule) for rule in policy.network.egress]
    why = "its policy does not grant it" if port else f"its policy does not grant it; port {ASSUMED_PORT} is a guess"
    if requested is not None and asked not in requested:
        why += ", and its manifest does not ask for it, which it has to as well"
    return Advice(why, toml_list("egress", list(dict.fromkeys([*present, asked]))), "grant")


def _inside(rule: DenialRule, data: Mapping[str, Any], policy: EffectivePolicy) -> Advice:
    address, port = _address(data.get("address")), data.get("port")
    by_address = rule is DenialRule.NEIGHBOUR
    why = f"{rule.explanation}, which {'a policy grants by its address alone' if by_address else 'no policy can grant'}"
    if address is None or not port:
        return Advice(why)
    why += "; the host's owner can except it, and then 'isolator reload'"
    host = normal_name(str(data.get("name") or "")) or address.strip("[]")
    granted = Egress(public=policy.network.mode == "public", rules=policy.network.egress)
    if not egress_within(Egress(rules=(EgressRule(host=host, ports=(int(port),)),)), granted):
        why += "; its policy has to grant it as well, and its manifest to ask for it"
    present = [_exception(item) for item in policy.network.exceptions]
    line = toml_list("exceptions", list(dict.fromkeys([*present, f"{address}:{port}"])))
    return Advice(why, line, "network", "host.toml")


def _exception(item: AddressException) -> str:
    """An exception as it stands in host.toml; a whole address without its length."""
    network = ip_network(item.cidr)
    return f"{bracketed(network if network.num_addresses > 1 else network.network_address)}:{item.port}"


def _address(text: Any) -> str | None:
    address = parse_address(str(text))
    return None if address is None else bracketed(address)


def _other(type: str, data: Mapping[str, Any], policy: EffectivePolicy, permissions: Sequence[str] | None) -> Advice:
    permission = data.get("permission")
    if type == "api.called" and isinstance(permission, str) and permission:
        if permission in policy.permissions:
            return Advice("its policy grants the permission; the call was refused for another reason")
        line = toml_list("permissions", [*policy.permissions, permission])
        why = "its policy does not grant the permission"
        if permissions is not None and permission not in permissions:
            why += ", and its manifest does not ask for it, which it has to as well"
        return Advice(why, line, "grant")
    if type == "syscall.denied":
        return Advice(INSTEAD.get(str(data.get("call")), "no policy grants system calls beyond the default profile"))
    return Advice("no policy grants this")
