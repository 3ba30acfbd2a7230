"""The algebra that everything rests on: a meet allows exactly what both sides allow, and never more."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.policy import names
from isolator.policy.destinations import parse_host
from isolator.policy.keys import SWITCHES, Limits
from isolator.policy.meet.bounds import Bounds, Egress, egress_within, meet, meet_egress, normal_egress
from isolator.policy.model import EgressRule

PORTS = (22, 80, 443)
NAMES = ("a.com", "x.a.com", "y.x.a.com", "xn--c-7tb.com", "nota.com", "com", "b.org")
ADDRESSES = ("1.1.1.1", "1.1.1.2", "8.8.8.8", "2606::1", "2606:0:0:1::1")

NAMED = ["a.com", "x.a.com", "*.a.com", "*.x.a.com", "b.org"]
NUMBERED = ["1.1.1.1", "1.1.1.0/24", "1.0.0.0/8", "8.8.8.8", "0.0.0.0/0", "2606::/32", "2606::1", "::/0"]
EVENTS = ["*", "deploy.*", "deploy.started", "on_deploy_start", "deploy.completed", "domain.*", "domain.added"]


def _rule(host: str, ports: set[int]) -> EgressRule:
    return EgressRule(host=host, ports=tuple(sorted(ports)))


rules = st.builds(_rule, st.sampled_from(NAMED + NUMBERED), st.sets(st.sampled_from(PORTS), min_size=1))
egresses = st.just(Egress(everything=True)) | st.builds(
    Egress, public=st.booleans(), rules=st.lists(rules, max_size=4).map(tuple)
)
hooks = st.lists(st.sampled_from(EVENTS), max_size=4).map(tuple)
permissions = st.lists(st.sampled_from(["*", "read:*", "read:a", "read:b", "write:a", "kv"]), max_size=4).map(tuple)
paths = st.lists(st.sampled_from(["/", "/srv", "/srv/a", "/srv/a/b", "/srvx", "/opt"]), max_size=3).map(tuple)
limits = st.builds(Limits, **{name: st.integers(1, 8) for name in Limits.model_fields})
bounds = st.builds(
    Bounds,
    limits=limits,
    hooks=hooks,
    permissions=permissions,
    egress=egresses,
    switches=st.sets(st.sampled_from([switch.name for switch in SWITCHES])).map(frozenset),
    read=paths,
    strict=st.booleans(),
)

ATOMS = {
    "hooks": ("deploy.started", "on_deploy_start", "deploy.completed", "domain.added", "domain.removed", "other"),
    "permissions": ("read:a", "read:b", "read:c", "write:a", "kv"),
    "read": ("/srv", "/srv/a", "/srv/a/b", "/srv/a/b/c", "/srvx", "/opt/x", "/etc"),
}
COVERS = {"hooks": names.covers_hook, "permissions": names.covers_permission, "read": names.path_covers}


def reaches(egress: Egress, host: str, port: int) -> bool:
    """Independent of the code under test: is this one destination in the set?"""
    if egress.everything or (egress.public and port in (80, 443)):
        return True
    for rule in egress.rules:
        if port not in rule.ports:
            continue
        if host == rule.host:
            return True
        if rule.host.startswith("*.") and host.endswith("." + rule.host[2:]):
            return True
        try:
            if ip_address(host) in ip_network(rule.host):
                return True
        except ValueError:
            continue
    return False


def allows(bound: Bounds) -> dict[str, object]:
    """Everything observable about a bound, by asking it about every atom there is."""
    answers: dict[str, object] = {
        f"{field} {atom}": any(COVERS[field](pattern, atom) for pattern in getattr(bound, field))
        for field, atoms in ATOMS.items()
        for atom in atoms
    }
    answers |= {f"to {h}:{p}": reaches(bound.egress, h, p) for h in (*NAMES, *ADDRESSES) for p in PORTS}
    answers |= {f"switch {switch.name}": switch.name in bound.switches for switch in SWITCHES}
    return answers


@settings(max_examples=400, deadline=None)
@given(bounds, bounds)
def test_meet_allows_exactly_what_both_sides_allow(a: Bounds, b: Bounds) -> None:
    both, left, right = allows(meet(a, b)), allows(a), allows(b)
    for question in left:
        assert both[question] == (left[question] and right[question]), question
    result = meet(a, b)
    assert result.strict == (a.strict or b.strict)
    for name in Limits.model_fields:
        assert getattr(result.limits, name) == min(getattr(a.limits, name), getattr(b.limits, name))


@settings(max_examples=200, deadline=None)
@given(st.lists(bounds, min_size=1, max_size=4), bounds)
def test_adding_any_layer_never_widens_any_field(layers: list[Bounds], more: Bounds) -> None:
    before = layers[0]
    for layer in layers[1:]:
        before = meet(before, layer)
    after = meet(before, more)
    was, now = allows(before), allows(after)
    assert [question for question, yes in now.items() if yes and not was.get(question)] == []
    assert all(getattr(after.limits, n) <= getattr(before.limits, n) for n in Limits.model_fields)
    assert after.strict or not before.strict


@settings(max_examples=200, deadline=None)
@given(egresses, egresses)
def test_set_of_destinations_has_one_spelling(a: Egress, b: Egress) -> None:
    assert normal_egress(normal_egress(a)) == normal_egress(a)
    assert meet_egress(a, b) == meet_egress(b, a) or a.everything or b.everything
    assert normal_egress(meet_egress(a, a)) == normal_egress(a)
    assert egress_within(meet_egress(a, b), a)
    assert egress_within(meet_egress(a, b), b)


@pytest.mark.parametrize(
    ("outer", "inner", "covered"),
    [
        ("*.slack.com", "hooks.slack.com", True),
        ("*.slack.com", "a.b.slack.com", True),
        ("*.slack.com", "slack.com", False),
        ("*.slack.com", "evilslack.com", False),
        ("*.slack.com", "*.hooks.slack.com", True),
        ("hooks.slack.com", "*.slack.com", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "10.0.0.0/7", False),
        ("10.0.0.0/8", "2606::/32", False),
        ("*.example.com", "10.0.0.1", False),
        ("0.0.0.0/0", "slack.com", False),
    ],
)
def test_host_of_a_rule_covers_whole_labels_and_networks(outer: str, inner: str, covered: bool) -> None:
    assert parse_host(outer).covers(parse_host(inner)) is covered


def test_older_spelling_of_an_event_stays_as_the_plugin_wrote_it() -> None:
    granted = Bounds(limits=Limits(), hooks=("deploy.*",))
    asked = Bounds(limits=Limits(), hooks=("on_deploy_complete", "domain.added"))
    assert meet(granted, asked).hooks == ("on_deploy_complete",)
