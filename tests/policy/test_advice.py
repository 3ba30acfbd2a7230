"""The line that would grant a denial: it does, when it is put into a policy; and where there is none, a reason."""

from __future__ import annotations

import tomllib
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolator.policy.destinations import Rules
from isolator.policy.meet.advice import Advice, advise
from isolator.policy.model import AddressException, EffectivePolicy, NetworkPolicy
from isolator.policy.names import parse_egress
from tests.broker.conftest import listed


def policy(*rules: str) -> EffectivePolicy:
    return EffectivePolicy(plugin="p", network=listed(*rules))


def with_line(advice: Advice) -> NetworkPolicy:
    """The network policy that the advised ``egress`` line makes."""
    assert advice.line is not None and (advice.file, advice.table) == ("policy", "grant")
    texts = tomllib.loads(advice.line)["egress"]
    return NetworkPolicy(mode="listed", egress=tuple(parse_egress(text) for text in texts))


@pytest.mark.parametrize("rule", ["not-granted", "port", "no-network"])
@pytest.mark.parametrize("name", ["api.example.com", "hooks.example.com"])
def test_line_grants_exactly_the_denied_destination_and_keeps_the_rest(rule: str, name: str) -> None:
    data = {"name": name, "address": "198.18.0.9", "port": 8443, "rule": rule}
    granted = Rules(with_line(advise("net.denied", data, policy("hooks.example.com:443"))))
    assert granted.name(name, 8443).allowed
    assert granted.name("hooks.example.com", 443).allowed
    assert not granted.name("other.example.com", 8443).allowed


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::34"])
def test_line_grants_an_address_as_such(address: str) -> None:
    data = {"name": None, "address": address, "port": 53, "rule": "not-granted"}
    assert Rules(with_line(advise("net.denied", data, policy()))).literal(ip_address(address), 53).allowed


def test_port_of_a_lookup_is_a_guess_and_called_one() -> None:
    advice = advise("net.query", {"name": "api.example.com", "type": "A", "rule": "not-granted"}, policy())
    assert Rules(with_line(advice)).name("api.example.com", 443).allowed
    assert "guess" in advice.why


def test_destination_missing_in_the_manifest_is_pointed_out() -> None:
    data = {"name": "api.example.com", "port": 443, "rule": "not-granted"}
    assert "manifest" in advise("net.denied", data, policy(), ["hooks.example.com:443"]).why
    assert "manifest" not in advise("net.denied", data, policy(), ["api.example.com:443"]).why
    assert "manifest" not in advise("net.denied", data, policy(), None).why


@pytest.mark.parametrize("rule", ["blocked-address", "host-address", "gateway"])
@pytest.mark.parametrize("address", ["10.9.9.9", "fd00::1"])
def test_inside_address_has_an_exception_of_the_host_alone(rule: str, address: str) -> None:
    advice = advise("net.denied", {"name": "a.com", "address": address, "port": 80, "rule": rule}, policy())
    assert advice.file == "host.toml" and advice.table == "network" and "no policy can" in advice.why
    (text,) = tomllib.loads(advice.line or "")["exceptions"]
    parsed = parse_egress(text)
    exception = AddressException(cidr=parsed.host, port=parsed.ports[0])
    rules = Rules(NetworkPolicy(mode="public", exceptions=(exception,)))
    assert rules.literal(ip_address(address), 80).allowed
    assert advise("net.query", {"name": "a.com", "rule": rule}, policy()).line is None


@pytest.mark.parametrize(("rule", "key"), [("rate", "connects_per_second"), ("too-many-open", "connects_open")])
def test_limit_is_raised_by_its_key(rule: str, key: str) -> None:
    advice = advise("net.denied", {"rule": rule, "port": 443}, policy())
    assert advice.table == "limits"
    assert tomllib.loads(advice.line or "")[key] > getattr(policy().network, key)


def test_unreadable_server_name_has_a_switch_and_a_wrong_one_has_none() -> None:
    for rule in ("no-sni", "not-tls", "not-http", "no-host"):
        assert advise("net.denied", {"rule": rule}, policy()).line == "allow_no_sni = true"
    assert advise("net.denied", {"rule": "encrypted-hello"}, policy()).line == "allow_ech = true"
    for rule in ("sni-mismatch", "host-mismatch", "malformed", "incomplete", "silent", "unallocated", "protocol-udp"):
        advice = advise("net.denied", {"rule": rule, "name": "a.com", "port": 443}, policy())
        assert advice.line is None and len(advice.why) > 10


def test_denial_of_another_kind_has_advice() -> None:
    assert advise("syscall.denied", {"call": "mount"}, policy()).line is None
    advice = advise("api.called", {"method": "deployments.get", "permission": "read:deployments"}, policy())
    assert tomllib.loads(advice.line or "") == {"permissions": ["read:deployments"]}


hostile: st.SearchStrategy[Any] = st.one_of(st.none(), st.text(), st.integers(), st.booleans(), st.lists(st.text()))


rules = st.one_of(hostile, st.sampled_from(["not-granted", "blocked-address", "port", "rate", "no-sni"]))
ports = st.one_of(st.none(), st.integers(1, 65535))
fields = {"name": hostile, "address": hostile, "port": ports, "direction": hostile}


@given(st.fixed_dictionaries({"rule": rules}, optional=fields))
def test_line_is_one_line_of_toml_whatever_the_record_holds(data: dict[str, Any]) -> None:
    advice = advise("net.denied", data, policy("hooks.example.com:443"))
    if advice.line is not None:
        assert "\n" not in advice.line
        tomllib.loads(advice.line)


def test_refused_watch_on_the_use_of_files_says_what_to_watch_instead() -> None:
    found = advise("syscall.denied", {"call": "inotify_add_watch"}, EffectivePolicy(plugin="p"))
    assert found.line is None
    assert "event_filter=[FileModifiedEvent, ...]" in found.why


def test_permission_missing_in_the_manifest_is_pointed_out() -> None:
    data = {"method": "projects.get", "verdict": "denied", "permission": "read:projects"}
    assert "manifest" in advise("api.called", data, policy(), None, []).why
    assert "manifest" not in advise("api.called", data, policy(), None, ["read:projects"]).why
    assert "manifest" not in advise("api.called", data, policy()).why


def test_line_of_exceptions_keeps_those_that_are_there_and_names_the_grant_that_is_missing() -> None:
    exceptions = (AddressException(cidr="10.0.0.0/8", port=5432), AddressException(cidr="fd00::1/128", port=80))
    listed_with = listed("db.example.com:5433").model_copy(update={"exceptions": exceptions})
    now = EffectivePolicy(plugin="p", network=listed_with)
    data = {"name": "db.example.com", "address": "10.1.2.3", "port": 5433, "rule": "blocked-address"}
    advice = advise("net.denied", data, now)
    assert advice.line == 'exceptions = ["10.0.0.0/8:5432", "[fd00::1]:80", "10.1.2.3:5433"]'
    assert tomllib.loads(advice.line) and "grant it as well" not in advice.why
    assert "grant it as well" in advise("net.denied", data | {"port": 5434}, now).why
    for text in tomllib.loads(advice.line)["exceptions"]:
        parse_egress(text)
