"""Digests of sample policies and hosts, pinned.

They are in the audit trail of every start (``policy_sha256``, ``config_sha256``), where one is compared with another
across versions of Isolator: equal settings must keep equal digests, however the models are declared.
"""

from __future__ import annotations

import hashlib
import json

import pytest

from isolator.policy.host import HostConfig
from isolator.policy.meet.effective import meet, policy_alone
from isolator.policy.meet.single_run import policy_for_run
from isolator.policy.model import EffectivePolicy
from isolator.policy.parse.host_file import parse_host_config
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
        "d74392fe3434aa760aa92767c063a0333414b77478f92ce68cf68ac4e9090ae3",
    ),
    "default grant": (
        meet(manifest(), None, DEFAULT).effective,
        "8c1c57900b3e6a4054d22a6006865ddc83d2fcc29f3892abd7e1eac17d5a017c",
    ),
    "policy of the design": (
        meet(manifest(), policy(), DEFAULT).effective,
        "45c1e528407b336406d96e89045936213f72171ca3160dca3e285a84b38031b1",
    ),
    "wide request, wide grant": (
        meet(WIDE, GRANT, OPEN).effective,
        "1613bb4e210a1fee6a6e725121d959f96f5ae5edd886ab7d0a33474f6ca04bba",
    ),
    "wide request, strict host": (
        meet(WIDE, GRANT, STRICT).effective,
        "96e9e3f74d556922ac9d2799475bc4af9fd6d09b21e40726cfe6a1b1db3426ef",
    ),
    "single binary": (
        meet(synthesised(), GRANT, OPEN).effective,
        "90a933570919eaf812ab05d05c94f0a061a075e93c9f6e49e15d5fbbe6172d6e",
    ),
    "grant alone": (
        policy_alone(GRANT, OPEN, "p").effective,
        "4671203109f1d3b7641ac93e117f3704bf0ebe7c3327f90878f869fafafabddd",
    ),
    "single run": (
        policy_for_run(STRICT, memory="64M", egress=["a.com:443"]),
        "63f9ea39af76fa44fc2735e50737ff911917722a9f6c6fdf7b435c8cb89e6379",
    ),
}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_effective_policy_keeps_its_digest(name: str) -> None:
    effective, digest = EFFECTIVE[name]
    assert effective.digest() == digest, effective.canonical()


@pytest.mark.parametrize(
    ("host", "digest"),
    [
        (HostConfig(), "4d3352c540be090a6d2c07f5b7abaadd2c0bf82107e6ede08cea2709863c9af7"),
        (OPEN, "c0d22876032ea64c916d427b0dd31b6b7282aff1cd5f06df05867a680245863b"),
        (STRICT, "2d514b81775830e910b929b116ce58055cc49a946f88dd21f10148791579fde9"),
    ],
    ids=["default", "open", "strict"],
)
def test_host_settings_keep_their_digest(host: HostConfig, digest: str) -> None:
    assert host.digest() == digest, host.model_dump_json()


def test_explanation_and_written_policy_keep_their_text() -> None:
    proposals = [meet(WIDE, grant, host) for grant in (None, policy(), GRANT) for host in (DEFAULT, OPEN, STRICT)]
    shown = [[*map(vars, proposal.lines), proposal.policy_text] for proposal in proposals]
    text = json.dumps(shown, sort_keys=True)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "7d173155126c30ac91e3324975b476795a364a6396399ecfeb2614f07e020ab3"
    ), text
