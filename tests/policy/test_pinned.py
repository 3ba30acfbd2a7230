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
        "cee8f91066aa9d40f3e2f9e8b2f821a713e4e512b71f5454780bbda30401f066",
    ),
    "default grant": (
        meet(manifest(), None, DEFAULT).effective,
        "5437528a8f99314e23115ce462e78caa249b2a720bfc2c87f18a705e67158928",
    ),
    "policy of the design": (
        meet(manifest(), policy(), DEFAULT).effective,
        "6ac57f72b42fe0f37ddb2aedf2455fc29645e9186aba8b05ad5f4bca1d89d135",
    ),
    "wide request, wide grant": (
        meet(WIDE, GRANT, OPEN).effective,
        "e36b61c9c50dd45a824a35f8490243afd00fddd9ef50954774b096eecebd881c",
    ),
    "wide request, strict host": (
        meet(WIDE, GRANT, STRICT).effective,
        "3721fe44fb5b16c6a0b4c1eb3798659e7a20eed62a2c5e50fc9b4d61aeab3d39",
    ),
    "single binary": (
        meet(synthesised(), GRANT, OPEN).effective,
        "2ec5cc3589103755f8d871d6ca29245c764200eba033ffba49caf5820ceceacb",
    ),
    "grant alone": (
        policy_alone(GRANT, OPEN, "p").effective,
        "885a89bed1462e80442e7e3074363270a53988d515cf48a15ba0cb6f601f5947",
    ),
    "single run": (
        policy_for_run(STRICT, memory="64M", egress=["a.com:443"]),
        "42b5671b60999a22610333befaeca5732010567581b550b7de67ae146e3088bb",
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
