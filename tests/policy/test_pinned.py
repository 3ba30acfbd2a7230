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
        "6dd6b17ea59123742ecc95a450b4ba458d3fc84d0b25ea0a70fbe91c3648e379",
    ),
    "default grant": (
        meet(manifest(), None, DEFAULT).effective,
        "b2e2df7db531145265057176428c866e0ba0bd8e31f9f74ec2847a8e68836949",
    ),
    "policy of the design": (
        meet(manifest(), policy(), DEFAULT).effective,
        "661aa3d30196059ddfbd659c65321f60d2ee27245bd08832a010a47e6f1ebfbd",
    ),
    "wide request, wide grant": (
        meet(WIDE, GRANT, OPEN).effective,
        "c7f3ae4dbf3a6ae5dfb428f49f1cc76aeb26707181a836c6e0cc9db07c166784",
    ),
    "wide request, strict host": (
        meet(WIDE, GRANT, STRICT).effective,
        "409ff86c710f7bb2b2cd856bc6557bc8390f4e944bfbb595ed2f74b74233481a",
    ),
    "single binary": (
        meet(synthesised(), GRANT, OPEN).effective,
        "f0e53842f16dc1d947cfbef2b1f8191aa045a7b167bfed0b5febd0d80f251e8e",
    ),
    "grant alone": (
        policy_alone(GRANT, OPEN, "p").effective,
        "214d60d4b1ec5659cec00dde3c6712dc5809d3e2db0d70b06e238735a02b9699",
    ),
    "single run": (
        policy_for_run(STRICT, memory="64M", egress=["a.com:443"]),
        "eb0cf835f9b419d60347f7ea574adf0db24bc09a4947a45675806710e39ccec4",
    ),
}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_effective_policy_keeps_its_digest(name: str) -> None:
    effective, digest = EFFECTIVE[name]
    assert effective.digest() == digest, effective.canonical()


@pytest.mark.parametrize(
    ("host", "digest"),
    [
        (HostConfig(), "a32db6f7bccbf4cbf6bc9b968de506c841a0c7f43d25e42388f8dfc3780e5889"),
        (OPEN, "c29cdc9349ad736a31115a9a221ac9bd24d696ea031f5b06a60378de06f0037a"),
        (STRICT, "2aa72aa16e7ce0242d2f06d90a79b3155c449ce77efd97d2be06801de1009d2d"),
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
        hashlib.sha256(text.encode()).hexdigest() == "7d173155126c30ac91e3324975b476795a364a6396399ecfeb2614f07e020ab3"
    ), text
