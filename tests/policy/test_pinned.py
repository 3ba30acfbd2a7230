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
        "156cfe25c77a9c00ffc1ceb54233a1582766a7a7fb77759478d02814658cdb80",
    ),
    "default grant": (
        meet(manifest(), None, DEFAULT).effective,
        "d7fcad8e6f1082a90292365bb5fbd75daed2f1dc5498a8d8ddf3d0d25e63c31c",
    ),
    "policy of the design": (
        meet(manifest(), policy(), DEFAULT).effective,
        "de31d8df73f9a3d6490b6e7977b49c2242f26b66d58c3d52c0d0f5a254cecec0",
    ),
    "wide request, wide grant": (
        meet(WIDE, GRANT, OPEN).effective,
        "2b7b7664f9c2adf995ed9729a719ad2abdb59b5313ea6c46e72cfbaf5de875c5",
    ),
    "wide request, strict host": (
        meet(WIDE, GRANT, STRICT).effective,
        "c8852a76c7dfa7faa55b1ec71a2790d220ce25ea630d6a797bf8322184c65f8f",
    ),
    "single binary": (
        meet(synthesised(), GRANT, OPEN).effective,
        "6fe62fe1350bb382f6fd40fcecf98c419ddf7932420fd69710a2819cc92a5688",
    ),
    "grant alone": (
        policy_alone(GRANT, OPEN, "p").effective,
        "1110a3eaa67a17645ebabfe2277777a9efd57d31ad21c38dd8c0ed3a0a462176",
    ),
    "single run": (
        policy_for_run(STRICT, memory="64M", egress=["a.com:443"]),
        "66dabf6d7df33c76e64b5ff616e659e51837362c4b0e36213514c36dea43dad4",
    ),
}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_effective_policy_keeps_its_digest(name: str) -> None:
    effective, digest = EFFECTIVE[name]
    assert effective.digest() == digest, effective.canonical()


@pytest.mark.parametrize(
    ("host", "digest"),
    [
        (HostConfig(), "777d4df41275f382373cd75da414d6682f8db08c373009ca423df32869e558b8"),
        (OPEN, "ed798974b5208052a8d916fdf82f20342393a0bf81cabccf3f1f5ab18b9f6015"),
        (STRICT, "a44fc79327efbac1c9e80ae0ce74863d803875996ba76e697c172378468f59c7"),
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
