"""How request, grant and ceiling meet, line by line, and in which words it is said."""

from __future__ import annotations

from typing import Any

import pytest

from isolator.layers.explain import sentences
from isolator.policy.meet.effective import asks_more, meet
from isolator.policy.meet.proposal import Line, Proposal
from isolator.policy.meet.single_run import policy_for_run
from isolator.policy.model import EffectivePolicy
from isolator.policy.parse.host_file import parse_host_config
from isolator.policy.parse.load import check_ceiling
from isolator.policy.units import format_rate, parse_size
from tests.policy.samples import DEFAULT, OPEN, asking, manifest, policy, synthesised


def line(proposal: Proposal, field: str, requested: str | None = None) -> Line:
    """The one line about ``field`` (and what was requested, where there are several)."""
    found = [one for one in proposal.lines if one.field == field and requested in (None, one.requested)]
    assert len(found) == 1, found
    return found[0]


def test_example_of_the_design_is_granted_as_requested() -> None:
    proposal = meet(manifest(), policy(), DEFAULT)
    effective = proposal.effective
    assert effective.hooks == ("deploy.completed", "deploy.failed", "deploy.started")
    assert effective.permissions == ("read:deployments", "read:projects")
    assert effective.network.mode == "listed"
    assert [(rule.host, rule.ports) for rule in effective.network.egress] == [("hooks.slack.com", (443,))]
    assert (effective.resources.memory, effective.resources.memory_high) == (256 << 20, 224 << 20)
    assert effective.filesystem.read == ("/etc/ssl/certs",)
    assert not proposal.pending
    assert not proposal.needs_approval
    assert line(proposal, "memory").source == "policies/p.toml:8"
    assert line(proposal, "egress").source == "policies/p.toml:5"


def test_silence_everywhere_is_the_default_posture() -> None:
    effective = meet(manifest(sandbox=None, delivery=None), None, DEFAULT).effective
    silent = EffectivePolicy(plugin="slack-deploy-notifier", hooks=effective.hooks, permissions=effective.permissions)
    assert effective == silent
    assert effective.network.mode == "public"


@pytest.mark.parametrize(
    ("asked", "granted", "usual", "effective"),
    [
        (None, None, "none", "none"),
        ("20M", None, "none", "20M"),
        (None, "30M", "none", "30M"),
        ("20M", "30M", "none", "20M"),
        ("50M", None, "40M", "40M"),
        (None, "none", "40M", "40M"),
        (None, None, "40M", "40M"),
    ],
)
def test_disk_rates_have_no_cap_unless_somebody_sets_one(
    asked: str | None, granted: str | None, usual: str, effective: str
) -> None:
    grant = policy(f'[limits]\nio_write = "{granted}"' if granted else "")
    host = parse_host_config(f'[defaults]\nio_write = "{usual}"'.encode(), source="host.toml")
    proposal = meet(asking(resources={"io_write": asked} if asked else {}), grant, host)
    assert format_rate(proposal.effective.resources.io_write) == effective
    said = sentences(proposal.effective)["cgroup"]
    assert (f"writes at most {effective} a second of each disk" in said) == (effective != "none")
    shown = [line.effective for line in proposal.lines if line.field == "io_write"]
    assert shown == ([effective] if asked or granted or effective != "none" else [])


@pytest.mark.parametrize(
    ("asked", "granted", "effective", "verdict"),
    [
        ("128M", "256M", "128M", "granted"),
        ("512M", "256M", "256M", "pending"),
        ("512M", "1G", "512M", "granted"),
        ("512M", None, "256M", "pending"),
        ("128M", None, "128M", "granted"),
        ("4G", "1G", "1G", "refused"),
        ("4G", "2G", "2G", "refused"),
        (None, "64M", "64M", "granted"),
        (None, "1G", "256M", "granted"),
    ],
)
def test_numbers_are_the_least_of_the_three(
    asked: str | None, granted: str | None, effective: str, verdict: str
) -> None:
    grant = policy(f'[limits]\nmemory = "{granted}"' if granted else "")
    proposal = meet(asking(resources={"memory": asked} if asked else {}), grant, DEFAULT)
    found = line(proposal, "memory")
    assert (found.effective, found.verdict) == (effective, verdict)
    assert proposal.effective.resources.memory == parse_size(effective)
    assert found.add == ('memory = "512M"' if verdict == "pending" else "")
    if verdict == "pending":
        assert (found.section, found.at) == ("limits", "policies/p.toml:2" if granted else "policies/p.toml")


def test_without_an_author_the_operators_number_counts() -> None:
    assert meet(synthesised(), policy('[limits]\nmemory = "1G"'), DEFAULT).effective.resources.memory == 1 << 30
    assert meet(synthesised(), policy("[grant]\negress = ['a.com:8443']"), DEFAULT).effective.network.mode == "listed"


@pytest.mark.parametrize(("state", "inodes"), [("64M", 16384), ("4M", 1024), ("1M", 256), ("1G", 16384)])
def test_a_small_state_folder_has_room_for_more_than_its_own_inodes(state: str, inodes: int) -> None:
    core = asking(filesystem={"state": state})
    assert meet(core, policy('[filesystem]\nstate = "1G"'), DEFAULT).effective.filesystem.state_inodes == inodes


def test_delivery_timeout_is_the_authors_unless_the_operator_sets_one() -> None:
    said = policy('[delivery]\ntimeout = "2m"')
    assert meet(manifest(delivery={"timeout": "5m"}), None, DEFAULT).effective.delivery_timeout == 300
    assert meet(manifest(delivery={"timeout": "5m"}), said, DEFAULT).effective.delivery_timeout == 120
    assert meet(manifest(delivery={"timeout": "1h"}), None, DEFAULT).effective.delivery_timeout == 900
    assert meet(synthesised(), said, DEFAULT).effective.delivery_timeout == 120
    assert meet(synthesised(), None, DEFAULT).effective.delivery_timeout == 10


NONE, PUBLIC = "none", "public"


@pytest.mark.parametrize(
    ("asked", "granted", "effective"),
    [
        (None, None, PUBLIC),
        (None, [], NONE),
        (None, ["a.com:443"], ["a.com:443"]),
        (None, ["a.com:8443"], NONE),  # silence asks for 80 and 443 only
        (None, "public", PUBLIC),
        ([], None, NONE),
        ([], ["a.com:443"], NONE),
        ([], "public", NONE),
        (["a.com:443"], None, ["a.com:443"]),
        (["a.com:8443"], None, NONE),
        (["a.com:443"], [], NONE),
        (["a.com:443"], "public", ["a.com:443"]),
        (["x.a.com:443,8443", "b.com:443"], ["*.a.com:443"], ["x.a.com:443"]),
        (["*.a.com:443"], ["x.a.com:443"], ["x.a.com:443"]),
        (["*.a.com:443"], ["*.x.a.com:443"], ["*.x.a.com:443"]),
        (["evila.com:443"], ["*.a.com:443"], NONE),
        (["8.8.8.0/24:443"], ["8.8.8.8:443", "8.8.4.4:443"], ["8.8.8.8:443"]),
        (["8.8.8.8:443"], ["8.0.0.0/8:443"], ["8.8.8.8:443"]),
        (["8.8.8.8:443"], ["a.com:443"], NONE),
        (["169.254.169.254:80"], "public", NONE),
        (["10.0.0.5:5432"], ["10.0.0.0/8:5432"], NONE),
    ],
)
def test_egress_is_narrowed(asked: list[str] | None, granted: Any, effective: Any) -> None:
    sandbox = {} if asked is None else {"network": {"egress": asked}}
    grant = policy("" if granted is None else f"[grant]\negress = {granted!r}")
    network = meet(asking(**sandbox), grant, DEFAULT).effective.network
    shown = [f"{rule.host}:{','.join(map(str, rule.ports))}" for rule in network.egress]
    assert (network.mode if network.mode != "listed" else shown) == effective
    assert network.mode == "listed" or shown == []


def test_an_exception_of_the_host_opens_exactly_itself() -> None:
    grant = policy("[grant]\negress = ['10.0.0.5:5432', '10.0.0.6:5432']")
    proposal = meet(asking(network={"egress": ["10.0.0.5:5432", "10.0.0.6:5432"]}), grant, OPEN)
    assert [rule.host for rule in proposal.effective.network.egress] == ["10.0.0.5"]
    assert line(proposal, "egress", "10.0.0.6:5432").verdict == "refused"
    assert proposal.effective.network.exceptions == OPEN.exceptions


def test_pending_lines_name_the_line_to_write_and_its_place() -> None:
    grant = policy("[grant]\nhooks = ['deploy.*']\npermissions = []\negress = ['a.com:443']")
    core = manifest(
        hooks=["deploy.started", "domain.added"],
        sandbox={
            "network": {"egress": [{"host": "b.com", "reason": "to look"}], "listen": [8005]},
            "syscalls": "default",
        },
    )
    proposal = meet(core, grant, OPEN)
    assert [(one.field, one.requested) for one in proposal.pending] == [
        ("hooks", "domain.added"),
        ("permissions", "read:deployments"),
        ("permissions", "read:projects"),
        ("egress", "b.com:443"),
        ("listen", "port 8005"),
    ]
    found = line(proposal, "egress")
    assert (found.add, found.section, found.at) == ('egress = ["a.com:443", "b.com:443"]', "grant", "policies/p.toml:4")
    assert found.reason == "to look"
    assert line(proposal, "hooks", "domain.added").add == 'hooks = ["deploy.*", "domain.added"]'
    assert line(proposal, "listen").add == 'listen = ["127.0.0.1:8005:8005"]'


def test_every_pending_line_grants_its_request_when_written() -> None:
    core = manifest(
        hooks=["deploy.started", "domain.added"],
        sandbox={
            "network": {"egress": ["b.com:8443", "8.8.8.8:53"], "listen": [8005, 22], "allow_no_sni": True},
            "filesystem": {"state": "1G", "tmp": "64M", "read": ["/srv/data", "/opt/x"]},
            "resources": {"memory": "1G", "cpu": "100%", "tasks": 100, "nofile": 2000},
            "syscalls": "default",
        },
    )
    text = "[grant]\nhooks = []\n\n[limits]\n[filesystem]\n[syscalls]\nprofile = 'strict'\n"
    for _ in range(30):
        proposal = meet(core, policy(text), OPEN)
        if not proposal.pending:
            break
        one = proposal.pending[0]
        rows = text.splitlines()
        if ":" in one.at:
            del rows[int(one.at.rpartition(":")[2]) - 1]
        rows.insert(rows.index(f"[{one.section}]") + 1, one.add)
        text = "\n".join(rows) + "\n"
        check_ceiling(policy(text), OPEN)
    assert not proposal.pending
    assert {one.verdict for one in proposal.lines} == {"granted"}
    effective = proposal.effective
    assert (effective.resources.memory, effective.syscalls, effective.network.allow_no_sni) == (
        1 << 30,
        "default",
        True,
    )
    assert effective.filesystem.read == ("/opt/x", "/srv/data")
    assert {rule.cage_port for rule in effective.network.listen} == {8005, 22}


def test_folders_and_ports_are_never_part_of_the_default_grant() -> None:
    core = asking(filesystem={"read": ["/srv/data"]}, network={"listen": [8005], "allow_no_sni": True})
    proposal = meet(core, None, OPEN)
    assert proposal.needs_approval
    assert proposal.effective.filesystem.read == ()
    assert proposal.effective.network.listen == ()
    assert not proposal.effective.network.allow_no_sni
    assert {one.field for one in proposal.pending} == {"read", "listen", "allow_no_sni"}


def test_a_silent_policy_grants_no_permission() -> None:
    proposal = meet(manifest(), policy("[limits]\ntasks = 10"), DEFAULT)
    assert proposal.effective.permissions == ()
    assert proposal.effective.hooks == ("deploy.completed", "deploy.failed", "deploy.started")


def test_the_stricter_profile_wins() -> None:
    strict = policy("[syscalls]\nprofile = 'strict'")
    assert meet(asking(), strict, DEFAULT).effective.syscalls == "strict"
    assert meet(asking(syscalls="strict"), policy(), DEFAULT).effective.syscalls == "strict"
    ceiling = parse_host_config(b"[ceiling]\nsyscalls = 'strict'", source="host.toml")
    proposal = meet(asking(syscalls="default"), policy(""), ceiling)
    assert proposal.effective.syscalls == "strict"
    assert line(proposal, "syscalls").verdict == "refused"


def test_the_ceiling_holds_even_over_defaults_and_old_policies() -> None:
    low = parse_host_config(
        b"[ceiling]\nmemory = '100M'\ntasks = 8\npermissions = ['read:projects']\negress = ['*.slack.com:443']",
        source="host.toml",
    )
    proposal = meet(manifest(), policy(), low)
    assert (proposal.effective.resources.memory, proposal.effective.resources.tasks) == (100 << 20, 8)
    assert proposal.effective.permissions == ("read:projects",)
    assert line(proposal, "permissions", "read:deployments").source == "host.toml:4"
    assert line(proposal, "memory").source == "host.toml:2"
    assert meet(manifest(sandbox=None), policy("[grant]\negress='public'"), low).effective.network.egress[0].ports == (
        443,
    )


def test_update_lists_its_requests_beyond_the_old_version() -> None:
    old = asking(network={"egress": ["*.a.com:443"]}, resources={"memory": "64M"}, syscalls="strict")
    less = asking(network={"egress": ["x.a.com:443"]}, resources={"memory": "32M"}, syscalls="strict")
    assert asks_more(old, less, DEFAULT) == ()
    more = asks_more(
        old,
        manifest(
            hooks=["deploy.started", "deploy.completed", "deploy.failed", "domain.added"],
            sandbox={"network": {"egress": ["a.com:443"], "listen": [80]}, "filesystem": {"read": ["/srv"]}},
        ),
        DEFAULT,
    )
    assert more == (
        "event domain.added",
        "connections to a.com:443",
        "memory 256M instead of 64M",
        "reading /srv",
        "listening on port 80",
        'the syscall profile "default" instead of "strict"',
    )
    assert "connections to any public address" in asks_more(old, manifest(sandbox=None), DEFAULT)


def test_update_that_falls_silent_asks_for_all_that_its_policy_grants() -> None:
    narrow = asking(network={"egress": [], "listen": [3000]}, filesystem={"read": ["/srv/public"]})
    none = asking(network={"egress": [], "listen": []}, filesystem={"read": []})
    silent = asking(network={"egress": []})
    for old in (narrow, none):
        assert asks_more(old, silent, DEFAULT) == (
            "reading every folder that its policy grants",
            "listening on every port that its policy forwards",
        )
    assert asks_more(silent, silent, DEFAULT) == asks_more(narrow, none, DEFAULT) == ()


def test_sentences_are_plain() -> None:
    found = sentences(meet(manifest(), policy(), DEFAULT).effective)
    assert found["network"].startswith("May connect to hooks.slack.com (TCP 443) and to nothing else")
    assert "256M of memory" in found["cgroup"]
    assert "64 tasks" in found["cgroup"]
    nothing = sentences(policy_for_run(DEFAULT))
    assert nothing["network"] == "Has no network but a loopback of its own."
    assert "no persistent folder" in nothing["filesystem"]
