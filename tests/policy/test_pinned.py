"""Digests of sample policies and hosts, pinned.

They are in the audit trail of every start (``policy_sha256``, ``config_sha256``), where one is compared with another
across versions of Isolator: equal settings must keep equal digests, however the models are declared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import pytest

from isolator.policy.host import HostConfig
from isolator.policy.meet.effective import meet, policy_alone
from isolator.policy.meet.single_run import policy_for_run
from isolator.policy.model import EffectivePolicy
from isolator.policy.parse.load import parse_host_config
from tests.policy.samples import DEFAULT, OPEN, asking, manifest, policy, synthesised

STRICT = parse_host_config(
    b"may_degrade = ['landlock']\n[ceiling]\nmemory = '128M'\nallow_no_sni = false\nstop_grace = '2s'\n"
    b"[defaults]\nio_write = '20M'\ntasks = 3\nsyscalls = 'strict'\n[restart]\ncrashes = 2",
    source="host.toml",
)
WIDE = asking(
    network={"egress": ["b.com:8443", "8.8.8.0/24:53", "10.0.0.5:5432"], "listen": [8005], "allow_no_sni": True},
    filesystem={"state": "1G", "tmp": "64M", "read": ["/srv/data"]},
    resources={"memory": "1G", "cpu": "12.5%", "tasks": 100, "nofile": 2000, "io_read": "20M"},
)
GRANT = policy(
    "[grant]\nhooks = ['*']\npermissions = ['read:*']\negress = ['public', 'b.com:8443', '10.0.0.5:5432']\n"
    "listen = ['8005']\nallow_no_sni = true\n[limits]\nmemory = '512M'\nio_read = '50M'\nconnects_open = 7\n"
    "[filesystem]\nread = ['/srv']\nstate = '2G'\nshm = '1M'\ntmp_inodes = 99\nstate_inodes = 77\n"
    "[delivery]\ntimeout = '2m'\nattempts = 3\n[restart]\nstop_grace = '1s'\ncrashes = 9"
)

EFFECTIVE = {
    "no choice at all": (
        EffectivePolicy(plugin="p"),
        "e98725b3f6bb81e446bd98521844fc2f75958963be83a3af620db38fdfa5ec97",
    ),
    "default grant": (
        meet(manifest(), None, DEFAULT).effective,
        "eb8de377e8c0d3789b0030f87e8378afabcb77c93df2896512fa5ef8b6451fa4",
    ),
    "policy of the design": (
        meet(manifest(), policy(), DEFAULT).effective,
        "0a2fb00aed1a3e2424bbc88c2bfef0d7d81da7d09a59663956222e87bde94714",
    ),
    "wide request, wide grant": (
        meet(WIDE, GRANT, OPEN).effective,
        "4797cadd8d57002166035ad4322f62d8937fe89ea2aba77e396054bc4844cfc9",
    ),
    "wide request, strict host": (
        meet(WIDE, GRANT, STRICT).effective,
        "2b67d95c56a97584797680a34f1b529e62e6e3ea07341dc6de6d61cc92470df9",
    ),
    "single binary": (
        meet(synthesised(), GRANT, OPEN).effective,
        "bb47143ad1173967f629d1259bd0f6ec864897fa2dbcf204aec1da40265a57f6",
    ),
    "grant alone": (
        policy_alone(GRANT, OPEN, "p").effective,
        "227c6766d7715ae8c150433b9c531e59c71e098f4a0baf906d6aa5862e1ae69c",
    ),
    "single run": (
        policy_for_run(STRICT, memory="64M", egress=["a.com:443"]),
        "95dcae358f4eafe06d5dacef3c9d20bd6ae8b9787256779a48ba625951b25cef",
    ),
}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_effective_policy_keeps_its_digest(name: str) -> None:
    effective, digest = EFFECTIVE[name]
    assert effective.digest() == digest, effective.canonical()


@pytest.mark.parametrize(
    ("host", "digest"),
    [
        (HostConfig(), "7b50e7c18f62b8ce3b782c91dba88ec37cab9aa5bbf8df9cac668e203f32b420"),
        (OPEN, "976b4d25436f9625851b30d205611b2597d327101073b9761933c3bc990120ae"),
        (STRICT, "87c6721bb10f447995dd3cd8d905bc08aaa288b32a50de2ba81ed372174a0b67"),
    ],
    ids=["default", "open", "strict"],
)
def test_host_settings_keep_their_digest(host: HostConfig, digest: str) -> None:
    assert host.digest() == digest, host.model_dump_json()


def test_explanation_and_written_policy_keep_their_text() -> None:
    proposals = [meet(WIDE, grant, host) for grant in (None, policy(), GRANT) for host in (DEFAULT, OPEN, STRICT)]
    shown = [[*map(asdict, proposal.lines), proposal.policy_text] for proposal in proposals]
    text = json.dumps(shown, sort_keys=True)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "e376f520e28d8d716393266e9005c516e2b841882bf079bf3e14b037b1a550f4"
    ), text
