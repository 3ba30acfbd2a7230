"""What an operator could do about a denial: the exact line that would grant it, or why no line can.

Pure: a record's data and what the policy grants at present go in, words come out. It suggests, it never decides: a
denied attempt is what untrusted code *tried*, so a line here is a question to the operator, not a recommendation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from isolator.policy.destinations import normal_name
from isolator.policy.meet.lines import toml_list
from isolator.policy.model import EffectivePolicy
from isolator.policy.names import format_egress

ASSUMED_PORT = 443

_NEVER = {
    "broker-port": "that port belongs to the cage itself",
    "unallocated": "the address stands for no name in this cage; the program kept one from earlier or made it up",
    "sni-mismatch": "the connection was to one name and asked for another inside (TLS server name)",
    "host-mismatch": "the connection was to one name and asked for another inside (HTTP Host)",
    "malformed": "what it sent first breaks the rules of TLS or HTTP, so nobody can tell whom it is for",
    "incomplete": "it stopped in the middle of saying whom the connection is for",
    "silent": "it connected and then did not say whom the connection is for",
    "name-form": "that is no host name",
    "record-type": "only addresses are answered; other records can carry data out",
    "dns-rate": "it asked for names faster than a cage may",
    "dns-busy": "too many of its lookups were under way",
    "too-many-names": "it used more names than a cage may",
    "upstream": "the host's resolver gave no answer",
    "audit-unavailable": "nothing is let out while the audit trail cannot be written",
    "records-lost": "there were more refusals than could be read one by one",
    "ruleset-changed": "somebody changed the rules of its network from outside",
}
_UNREADABLE = frozenset({"no-sni", "encrypted-hello", "not-tls", "not-http", "no-host"})
_INSIDE = {"blocked-address": "the address is private or reserved", "host-address": "that is the host itself",
           "gateway": "that is the host's gateway"}  # fmt: skip
_LIMITS = {"rate": "connects_per_second", "too-many-open": "connects_open"}


@dataclass(frozen=True)
class Advice:
    """``line`` belongs into ``table`` of ``file`` (``policy``, ``host.toml``); without one, ``why`` says it all."""

    why: str
    line: str | None = None
    table: str = ""
    file: str = "policy"


def advise(
    type: str, data: Mapping[str, Any], policy: EffectivePolicy, requested: Sequence[str] | None = None
) -> Advice:
    """What would allow one ``net.denied`` or ``net.query`` (or another denial) of a plugin with this policy.

    ``requested``: the ``NAME:PORT`` rules of its manifest, None where the manifest lists none.
    """
    if type not in {"net.denied", "net.query"}:
        return _other(type, data, policy)
    rule = str(data.get("rule"))
    if data.get("various"):
        return Advice("many different destinations in a short time; the trail does not list them one by one")
    if data.get("direction") == "in" and rule not in _LIMITS:
        return Advice(_NEVER.get(rule, f"refused: {rule}"))
    if rule in {"not-granted", "port", "no-network"}:
        return _destination(data, policy, requested)
    if rule in _INSIDE:
        return _inside(rule, data)
    if rule in _LIMITS:
        key = _LIMITS[rule]
        now: int = getattr(policy.network, key)
        return Advice(f"it is allowed {now}", f"{key} = {now * 2}", "limits")
    if rule in _UNREADABLE:
        return Advice("it did not say readably which server it meant", "allow_no_sni = true", "grant")
    if rule.startswith("protocol-"):
        return Advice(f"only TCP leaves a cage; {rule.removeprefix('protocol-').upper()} cannot be granted")
    return Advice(_NEVER.get(rule, f"refused: {rule}"))


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


def _inside(rule: str, data: Mapping[str, Any]) -> Advice:
    address, port = _address(data.get("address")), data.get("port")
    why = f"{_INSIDE[rule]}, which no policy can grant"
    if address is None or not port:
        return Advice(why)
    return Advice(
        f"{why}; the host's owner can except it", f'exceptions = ["{address}:{port}"]', "network", "host.toml"
    )


def _address(text: Any) -> str | None:
    try:
        address = ip_address(str(text))
    except ValueError:
        return None
    return f"[{address}]" if address.version == 6 else str(address)


def _other(type: str, data: Mapping[str, Any], policy: EffectivePolicy) -> Advice:
    permission = data.get("permission")
    if type == "api.called" and isinstance(permission, str) and permission:
        if permission in policy.permissions:
            return Advice("its policy grants the permission; the call was refused for another reason")
        line = toml_list("permissions", [*policy.permissions, permission])
        return Advice("its policy does not grant the permission", line, "grant")
    if type == "syscall.denied":
        return Advice("no policy grants system calls beyond the default profile")
    return Advice("no policy grants this")
