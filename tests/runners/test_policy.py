"""``isolator run --policy`` of users without privilege: a stranger's file, read without any right, within bounds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from isolator.policy.grant import PluginPolicy
from isolator.policy.grant_check import check
from isolator.policy.parse.load import parse_plugin_policy
from tests.runners.conftest import ALICE, run_as
from tests.system.taken_over import TakenOver

WHOLE = b"""
[grant]
hooks = ["deploy.*"]
permissions = ["read:*"]
egress = ["public", "a.com:443,8443", "*.b.com:1", "[2606::/32]:443"]
listen = ["8080:80", "[::1]:9000:1"]
allow_no_sni = true
[limits]
memory = "64M"
cpu = "12.5%"
[filesystem]
read = ["/srv"]
state = 0
[syscalls]
profile = "strict"
[restart]
crashes = 3
backoff_min = "1s"
[env]
TZ = "Asia/Tokyo"
"""


def file(home: Path, text: str) -> str:
    path = home / "policy.toml"
    path.write_text(text)
    os.chown(path, ALICE, ALICE)
    path.chmod(0o600)
    return str(path)


def test_file_of_the_callers_is_in_force(daemon: TakenOver, home: Path) -> None:
    text = '[limits]\ntasks = 7\n[env]\nTZ = "Asia/Tokyo"\nA = "of file"\nB = "b"\n[grant]\nhooks = ["*"]\n'
    script = "cat /sys/fs/cgroup/pids.max 2>/dev/null; echo $TZ,$A,$B"
    own = {"PATH": os.environ["PATH"], "TZ": "Europe/Berlin"}
    flags = ["--policy", file(home, text), "--env", "A=of line"]
    result = run_as(daemon, ALICE, *flags, "--", "sh", "-c", script, env=own)
    assert result.stdout.splitlines()[-1] == "Asia/Tokyo,of line,b", result.stderr
    assert "isolator: note: " in result.stderr
    assert "no effect of grant.hooks" in result.stderr
    many = "for i in 1 2 3 4 5 6 7 8 9; do sleep 1 & done; wait"
    assert "task limit" in run_as(daemon, ALICE, *flags, "--", "bash", "-c", f"{many}; exit 1").stderr


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[limits]\nmemory = '1G'\n", "policy.toml:2: limits.memory: 1G is over the ceiling, 512M; lower it"),
        ("[limits]\n\nmemroy = '1M'\n", 'policy.toml:3: limits.memroy: unknown key; did you mean "memory"?'),
        ("[limits\n", "policy.toml:1: not TOML"),
        ("[grant]\negress = ['other.example:443']\n", "policy.toml:2: grant.egress[0]: other.example:443 is over"),
        ("[grant]\nlisten = ['8005']\n", "policy.toml:2: a user's run gets no port of the host"),
        (
            "[filesystem]\nread = ['/srv']\n",
            "policy.toml:2: the daemon opens no path for a user; name",
        ),
        ("a = " + "[" * 3000, "policy.toml"),
    ],
)
def test_file_that_asks_for_too_much_or_is_wrong_is_refused_at_its_line(
    daemon: TakenOver, home: Path, text: str, complaint: str
) -> None:
    result = run_as(daemon, ALICE, "--policy", file(home, text), "--", "true")
    assert result.returncode in (2, 125), result.stderr
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_file_that_the_caller_cannot_read_is_not_read_for_it(daemon: TakenOver) -> None:
    result = run_as(daemon, ALICE, "--policy", "/etc/shadow", "--", "true")
    assert "--policy /etc/shadow: Permission denied; name what you may read yourself" in result.stderr


def test_check_lets_everything_pass_that_the_parser_makes() -> None:
    check(parse_plugin_policy(b"", source=""))
    check(parse_plugin_policy(WHOLE, source=""))


@pytest.mark.parametrize(
    "lie",
    [
        {"source": "/etc/host.toml"},
        {"read": ("/proc",)},
        {"read": ("/srv/../etc",)},
        {"hooks": ("deploy started",)},
        {"env": {"LD PRELOAD": "x"}},
        {"env": {"PATH": "/x"}},
        {"env": {"A": "\0"}},
        {"limits": {"no_such": 1}},
        {"limits": {"memory": float("nan")}},
        {"limits": {"memory": -1}},
        {"limits": {"memory": 1}},
        {"limits": {"memory": 2**70}},
        {"switches": {"no_such": True}},
        {"restart": {"no_such": 1}},
        {"restart": {"crashes": float("inf")}},
        {"where": {"a": "/etc/shadow:1"}},
        {"where": {"a\x1b[2J": ":1"}},
        {"where": {str(number): ":1" for number in range(9000)}},
    ],
    ids=range(18),
)
def test_check_refuses_what_a_broken_reader_may_claim(lie: dict[str, object]) -> None:
    with pytest.raises((ValueError, KeyError)):
        check(PluginPolicy.model_validate({"source": ""} | lie))


@pytest.mark.parametrize(
    "rule", [("A.com", (443,)), ("a.com", (443, 80)), ("a.com", ()), ("a.com", (0,)), ("x y", (1,))]
)
def test_check_refuses_destinations_that_the_parser_does_not_make(rule: tuple[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError):
        check(PluginPolicy.model_validate({"source": "", "egress": [{"host": rule[0], "ports": list(rule[1])}]}))
