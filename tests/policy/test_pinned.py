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
        "e0ffc8de73d9d01bba2961456c1af4442820f12c1c0e0077b151962a3f29de04",
    ),
    "default grant": (
        meet(manifest(), None, DEFAULT).effective,
        "fdf8452a4452df0756c39f5e2372c22972b515b6def0e1137f1024c0d5550a30",
    ),
    "policy of the design": (
        meet(manifest(), policy(), DEFAULT).effective,
        "1e6eec2ab5f4d09b88b276f23f9ba68fd7ad0be5b2ac4811ceb70788d8dc6deb",
    ),
    "wide request, wide grant": (
        meet(WIDE, GRANT, OPEN).effective,
        "e05a7737249774967e4d4d1a33af51199f23c9bcc9bf77325e63c3671681dd0a",
    ),
    "wide request, strict host": (
        meet(WIDE, GRANT, STRICT).effective,
        "388394e70da61802992b31c263411e7d9fce1653547a107d18601de66f47cd19",
    ),
    "single binary": (
        meet(synthesised(), GRANT, OPEN).effective,
        "35d8bf50177d1f95c12a1a9983cb769265c525b65ff2e84279cb511cb9b12ba7",
    ),
    "grant alone": (
        policy_alone(GRANT, OPEN, "p").effective,
        "4823cdb65b850d88dc7e65673ec9d42b731e94e391b2078491468d210c7b9fa9",
    ),
    "single run": (
        policy_for_run(STRICT, memory="64M", egress=["a.com:443"]),
        "3f167a9629e4c333ab08947f832eb60832fb7efa62ee70aaa493732b8ccd6eb9",
    ),
}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_effective_policy_keeps_its_digest(name: str) -> None:
    effective, digest = EFFECTIVE[name]
    assert effective.digest() == digest, effective.canonical()


@pytest.mark.parametrize(
    ("host", "digest"),
    [
        (HostConfig(), "32920b36a8ed7300a5133a6fe4cb4f22471571c47b2872fb86967a92ca0031db"),
        (OPEN, "0ebbda7803f24450001f2ce79c28a6e2a13c4be73a9ab0b4fcd1be470bc55f7f"),
        (STRICT, "cfcedd4dfda6c0925a85e7eb4e2301e1492f83c6efd9b17a5db0359a7f90a8a2"),
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
