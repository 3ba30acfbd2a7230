"""Denials as ``plugin denials`` lists them, of records and a plugin's entry."""

from __future__ import annotations

from typing import Any

import pytest

from host.cli.denials import collect, lines
from isolator.audit.record import GENESIS, Record


def _record(type: str, data: dict[str, Any]) -> Record:
    return Record(1, "2026-01-02T03:04:05.000006Z", type, "broker:1", "p", None, None, None, data, GENESIS, GENESIS, {})


@pytest.mark.parametrize("egress", [
    ["hooks.example.com:443,8443"],
    [{"host": "Hooks.example.com", "ports": [443, 8443]}],
    ["hooks.example.com:8443", {"host": "hooks.example.com"}],
])  # fmt: skip
def test_destination_that_the_manifest_asks_for_in_any_form_is_recognised(egress: list[Any]) -> None:
    entry = {"name": "p", "manifest": {"sandbox": {"network": {"egress": egress}}}}
    data = {"name": "hooks.example.com", "address": "198.18.0.9", "port": 8443, "rule": "not-granted"}
    (asked,) = collect([_record("net.denied", data)], entry)
    assert "manifest" not in asked.advice.why
    (other,) = collect([_record("net.denied", data | {"name": "other.example.com"})], entry)
    assert "its manifest does not ask for it" in other.advice.why


def test_permission_that_the_manifest_does_not_ask_for_is_pointed_out() -> None:
    data = {"method": "projects.get", "verdict": "denied", "permission": "read:projects"}
    (denial,) = collect([_record("api.called", data)], {"name": "p", "manifest": {"permissions": []}})
    assert "its manifest does not ask for it" in denial.advice.why
    entry = {"name": "p", "manifest": {"permissions": ["read:projects"]}}
    (denial,) = collect([_record("api.called", data)], entry)
    assert "manifest" not in denial.advice.why


def test_message_that_breaks_the_protocol_is_a_failure_and_a_missed_ping_none() -> None:
    breach = _record("plugin.health", {"ok": False, "detail": "protocol: a message is neither request nor reply"})
    found = collect(
        [breach, breach, _record("plugin.health", {"ok": False, "misses": 1, "detail": "timeout"})], {"name": "p"}
    )
    ((row, why),) = [tuple(lines([one], "p")) for one in found]
    assert (found[0].kind, found[0].count) == ("failure", 2)
    assert "2 ×  protocol: a message is neither request nor reply  (last " in row and "see docs/host-api.md" in why
