"""The policy of ``isolator run``: from its flags, from a file, from both."""

from __future__ import annotations

from typing import Any

import pytest

from isolator.errors import UsageError
from isolator.policy.meet.single_run import policy_for_run
from tests.policy.samples import DEFAULT, POLICY


def test_a_run_without_flags_has_no_network_and_no_state() -> None:
    effective = policy_for_run(DEFAULT)
    assert (effective.network.mode, effective.filesystem.state, effective.hooks) == ("none", 0, ())
    assert effective.resources.memory == 256 << 20


def test_flags_of_a_run_become_its_policy() -> None:
    effective = policy_for_run(
        DEFAULT, memory="64M", cpu="50%", tasks=7, egress=["example.com:443", "b.org:80"], read=["/srv/x/"]
    )
    assert effective.network.mode == "listed"
    assert [rule.host for rule in effective.network.egress] == ["b.org", "example.com"]
    resources = effective.resources
    assert (resources.memory, resources.memory_high, resources.cpu, resources.tasks) == (64 << 20, 56 << 20, 500, 7)
    assert effective.filesystem.read == ("/srv/x",)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"memory": "3G"}, "over the ceiling, 2G"),
        ({"memory": "lots"}, "--memory"),
        ({"cpu": "500%"}, "over the ceiling, 400%"),
        ({"tasks": 0}, "--tasks"),
        ({"egress": ["example.com"]}, "--egress"),
        ({"egress": ["10.0.0.1:80"]}, "never reachable"),
        ({"read": ["relative"]}, "--read"),
        ({"read": ["/run/docker.sock"]}, "never made visible"),
        ({"tmp": "1G"}, "over the ceiling, 256M"),
        ({"nofile": 3}, "--nofile"),
        ({"net": "none", "egress": ["a.com:443"]}, "--net none"),
        ({"net": "names"}, "name each with --egress"),
        ({"write": ["/etc"]}, "--write"),
    ],
)
def test_wrong_flags_of_a_run_are_refused(flags: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError) as caught:
        policy_for_run(DEFAULT, **flags)
    assert why in str(caught.value)


def test_flags_replace_numbers_and_add_to_lists_of_the_policy_file(tmp_path: Any) -> None:
    path = tmp_path / "p.toml"
    path.write_text(POLICY)
    alone = policy_for_run(DEFAULT, path)
    assert (alone.filesystem.state, alone.filesystem.read) == (64 << 20, ("/etc/ssl/certs",))
    assert [rule.host for rule in alone.network.egress] == ["hooks.slack.com"]
    both = policy_for_run(DEFAULT, path, memory="512M", egress=["b.org:443"])
    assert both.resources.memory == 512 << 20
    assert [rule.host for rule in both.network.egress] == ["b.org", "hooks.slack.com"]


def test_the_network_of_a_run_is_named_by_one_option(tmp_path: Any) -> None:
    path = tmp_path / "p.toml"
    path.write_text('[grant]\negress = ["public", "a.com:8443"]\n')
    modes = {net: policy_for_run(DEFAULT, path, net=net).network for net in ("none", "names", "public", None)}
    assert {net: (found.mode, len(found.egress)) for net, found in modes.items()} == {
        "none": ("none", 0), "names": ("listed", 1), "public": ("public", 1), None: ("public", 1),
    }  # fmt: skip


def test_what_a_run_cannot_honour_is_said(tmp_path: Any) -> None:
    path = tmp_path / "p.toml"
    path.write_text(POLICY)
    notes: list[str] = []
    policy_for_run(DEFAULT, path, note=notes.append)
    assert any("filesystem.state has no effect" in note for note in notes)
    assert any("grant.hooks" in note and "no events" in note for note in notes)
    path.write_text('[limits]\nmemory = "64M"\n[filesystem]\ntmp = "1M"\nstate = 0\n[grant]\negress = []\n')
    notes.clear()
    policy_for_run(DEFAULT, path, note=notes.append)
    assert notes == []
