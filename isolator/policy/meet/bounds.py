"""Bounds, the common form of ceiling, grant and request, and the meet of two of them.

Each source of authority becomes one ``Bounds``; the effective policy is the meet of all. ``meet`` keeps only what both
sides allow, field by field, so it is commutative in what it allows, idempotent, and can only narrow: whatever it
allows, each side allows. That is the property the whole policy rests on, and the tests state it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from isolator.base.structs import struct_class
from isolator.policy import names
from isolator.policy.destinations import PUBLIC_PORTS, Network, parse_host
from isolator.policy.host import Ceiling
from isolator.policy.keys import CEILING, SWITCHES, Limits
from isolator.policy.model import EgressRule


@struct_class(frozen=True)
class Egress:
    """A set of destinations: ``everything``, or any public address (``public``), and the rules."""

    everything: bool = False
    public: bool = False
    rules: tuple[EgressRule, ...] = ()


@struct_class(frozen=True)
class Bounds:
    """The most that one source of authority allows. The defaults allow everything."""

    limits: Limits
    hooks: tuple[str, ...] = ("*",)
    permissions: tuple[str, ...] = ("*",)
    egress: Egress = Egress(everything=True)
    switches: frozenset[str] = frozenset(switch.name for switch in SWITCHES)
    """The names of those that may be yes."""
    read: tuple[str, ...] = ("/",)
    strict: bool = False
    filters: tuple[str, ...] = ()
    """Events have to pass all of them."""


def meet(a: Bounds, b: Bounds) -> Bounds:
    """Bounds that allow exactly what both allow. Where two spellings of a name mean the same, ``b``'s stays."""
    return Bounds(
        limits=meet_limits(a.limits, b.limits),
        hooks=_meet_patterns(a.hooks, b.hooks, names.covers_hook),
        permissions=_meet_patterns(a.permissions, b.permissions, names.covers_permission),
        egress=meet_egress(a.egress, b.egress),
        switches=a.switches & b.switches,
        read=_meet_patterns(a.read, b.read, names.path_covers),
        strict=a.strict or b.strict,
        filters=tuple(sorted({*a.filters, *b.filters})),
    )


def meet_limits(a: Limits, b: Limits) -> Limits:
    """The smaller of each pair of numbers."""
    return Limits(**{name: min(getattr(a, name), getattr(b, name)) for name in Limits.model_fields})


def _meet_patterns(a: Iterable[str], b: Iterable[str], covers: Callable[[str, str], bool]) -> tuple[str, ...]:
    """Patterns of these kinds are nested or disjoint, so the meet of two of them is the narrower one, or nothing."""
    a, b = tuple(a), tuple(b)
    both = [y for y in b if any(covers(x, y) for x in a)] + [x for x in a if any(covers(y, x) for y in b)]
    kept: list[str] = []
    for index, name in enumerate(both):
        others = kept + both[index + 1 :]
        # Of two spellings of one name the first is kept; of a wider and a narrower pattern, the wider.
        if not any(covers(o, name) and (o in kept or not covers(name, o)) for o in others):
            kept.append(name)
    return tuple(sorted(kept))


def meet_egress(a: Egress, b: Egress) -> Egress:
    """The destinations in both sets."""
    if a.everything or b.everything:
        return normal_egress(b if a.everything else a)
    rules = [rule for x in a.rules for y in b.rules if (rule := _meet_rules(x, y))]
    for public, listed in ((a, b), (b, a)):
        if public.public:
            rules += [rule for x in listed.rules if (rule := _with_ports(x, PUBLIC_PORTS))]
    return normal_egress(Egress(public=a.public and b.public, rules=tuple(rules)))


def normal_egress(egress: Egress) -> Egress:
    """One spelling for one set: ports of a host together, nothing that a wider rule covers already, sorted."""
    ports: dict[str, set[int]] = {}
    for rule in egress.rules:
        ports.setdefault(rule.host, set()).update(rule.ports)
    hosts = {text: parse_host(text) for text in ports}
    kept = []
    for host in sorted(ports):
        wider = (other for other in ports if other != host and hosts[other].covers(hosts[host]))
        left = ports[host].difference(*(ports[other] for other in wider))
        # A name at a public port says nothing new beside "public"; an address might be an exception of the host.
        if egress.public and not isinstance(hosts[host], Network):
            left -= PUBLIC_PORTS
        if left:
            kept.append(EgressRule(host=host, ports=names.sorted_ports(left)))
    return Egress(everything=egress.everything, public=egress.public, rules=tuple(kept))


def ceiling_egress(ceiling: Ceiling) -> Egress:
    """Destinations that the ceiling leaves open; the always-blocked list is applied on top of the result."""
    if ceiling.egress is None:
        return Egress(everything=True)
    return normal_egress(Egress(public=ceiling.egress_public, rules=ceiling.egress))


def egress_within(inner: Egress, outer: Egress) -> bool:
    """Whether ``outer`` allows all that ``inner`` allows."""
    return meet_egress(outer, inner) == normal_egress(inner)


def _meet_rules(a: EgressRule, b: EgressRule) -> EgressRule | None:
    one, other = parse_host(a.host), parse_host(b.host)
    if one.covers(other):
        return _with_ports(b, a.ports)
    return _with_ports(a, b.ports) if other.covers(one) else None


def _with_ports(rule: EgressRule, ports: Iterable[int]) -> EgressRule | None:
    common = set(rule.ports) & set(ports)
    return EgressRule(host=rule.host, ports=names.sorted_ports(common)) if common else None


UNBOUNDED = Limits(**{name: max(getattr(CEILING, name), 1 << 52) for name in Limits.model_fields})
"""Numbers that bound nothing: the part of a layer that does not speak of them."""
