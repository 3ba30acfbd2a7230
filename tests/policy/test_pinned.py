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
        "e772bc6399e03b63bebb0b33d0901fb301ef2bdddedf394d2fd35727f861ab3b",
    ),
    "default grant": (
        meet(manifest(), None, DEFAULT).effective,
        "cbe66b63747c9d6c32d6f35e09189d185926ef513b9fe4dc3b79dffaf1c7e06d",
    ),
    "policy of the design": (
        meet(manifest(), policy(), DEFAULT).effective,
        "f5ae025fe97e3163052f84d6794c0bc957ea67a2057716a97b3b5130203cd89a",
    ),
    "wide request, wide grant": (
        meet(WIDE, GRANT, OPEN).effective,
        "0c02dc8237f7cf992434c3ee5451b793cfd6606ca696c1909a7fc1ba516641ff",
    ),
    "wide request, strict host": (
        meet(WIDE, GRANT, STRICT).effective,
        "e0a7391d6814b951307d43d75980e5e00080b254ba01f8ccd6f808a6384ccf9d",
    ),
    "single binary": (
        meet(synthesised(), GRANT, OPEN).effective,
        "7021824894cd8b9e28eaae0f8dc46b5bbc363f2bf1b3e6c2cbc66b0514bbe42f",
    ),
    "grant alone": (
        policy_alone(GRANT, OPEN, "p").effective,
        "e63977c5b2d732af9a52b24cd496d5239cbae6817592215a9d0349e262cceaf1",
    ),
    "single run": (
        policy_for_run(STRICT, memory="64M", egress=["a.com:443"]),
        "78bf0f7bc3b9b5e3e9f3e0a6bb7f3d4856626ba3738b5a9e1928cc08d92f098a",
    ),
}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_effective_policy_keeps_its_digest(name: str) -> None:
    effective, digest = EFFECTIVE[name]
    assert effective.digest() == digest, effective.canonical()


@pytest.mark.parametrize(
    ("host", "digest"),
    [
        (HostConfig(), "5f3dffbe36cec2829a880880a84832e9555c65aecf787ee8c1d652e6e7baa4f4"),
        (OPEN, "dee4720069a3f57f8672546cb1f085246b27222b34fcbae96defd5f7559c7ae4"),
        (STRICT, "d3677d35b66902672067522330748ef2c34ab6fb768fc73b0132f7e2ce24a48d"),
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
