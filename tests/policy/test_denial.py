"""Denial rules: the codes that stand in trails, and an explanation or a remedy for each of them."""

from __future__ import annotations

import json

import pytest

from isolator.policy.denial import DenialRule, Remedy, protocol_rule, table
from isolator.policy.meet.advice import advise
from isolator.policy.model import EffectivePolicy

CODES = """
not-granted no-network port blocked-address host-address gateway neighbour unallocated broker-port rate too-many-open
protocol sni-mismatch host-mismatch no-sni encrypted-hello not-tls no-host not-http http2 malformed incomplete silent
name-form record-type dns-form dns-rate dns-busy too-many-names upstream audit-unavailable records-lost
ruleset-changed
""".split()
"""Written out: trails on disk and the programs that read them rely on these."""


def test_codes_are_those_of_existing_trails() -> None:
    assert [str(rule) for rule in DenialRule] == CODES
    assert json.dumps({"rule": DenialRule.NO_SNI}) == '{"rule": "no-sni"}'


@pytest.mark.parametrize("rule", DenialRule)
def test_rule_is_found_by_its_code_and_explained(rule: DenialRule) -> None:
    code = protocol_rule("udp") if rule is DenialRule.PROTOCOL else str(rule)
    assert DenialRule.of(code) is rule
    data = {"rule": code, "name": "a.com", "address": "10.0.0.1", "port": 8443}
    advice = advise("net.denied", data, EffectivePolicy(plugin="p"))
    assert (advice.line is None) is (rule.remedy is Remedy.NONE)
    if rule.remedy in {Remedy.NONE, Remedy.EXCEPTION}:
        assert advice.why.startswith(rule.explanation)


@pytest.mark.parametrize("code", ["", "hooks.example.com:443", "public", "listen 127.0.0.1:80:80", "None"])
def test_grant_is_no_denial_rule(code: str) -> None:
    assert DenialRule.of(code) is None


def test_table_has_one_row_for_each_rule() -> None:
    rows = table().splitlines()[2:]
    assert len(rows) == len(DenialRule)
    assert all(row.count(" | ") == 2 and str(rule) in row for rule, row in zip(DenialRule, rows, strict=True))
