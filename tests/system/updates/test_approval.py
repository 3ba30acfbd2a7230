"""What asks for more than before, or was changed, waits for an operator."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest

from host.client.client import Client
from isolator.errors import UsageError
from tests.system.daemon import Daemon, daemon
from tests.system.updates.plugins import BROKEN, add, answers, make, of_type, shown, version_that_answers

MORE = {"sandbox": {"network": {"egress": [{"host": "api.example.com", "ports": [443]}]}}}
LESS: dict[str, Any] = {"sandbox": {"network": {"egress": []}}}


def test_a_version_that_asks_for_more_waits(tmp_path: Path) -> None:
    with daemon() as d:
        name = "waiter"
        add(d, make(tmp_path / name, "1.0.0", **LESS))
        before = shown(d, name)
        more = make(tmp_path / "more" / name, "2.0.0", **MORE)
        result = d.cli("plugin", "update", name, str(more), code=5)
        assert "connections to api.example.com:443" in result.stdout
        assert result.stderr.count("\n") == 1 and f"isolator plugin approve {name}" in result.stderr
        now = shown(d, name)
        assert (now["version"], now["run"]) == ("1.0.0", before["run"])
        assert now["pending"]["version"] == "2.0.0"
        assert now["pending"]["differences"] == ["connections to api.example.com:443"]
        assert "asks for more" in d.cli("plugin", "list").stdout
        answer = d.json("plugin", "update", name, str(more), code=5)
        assert answer["pending"] is True and answer["differences"]
        would = f"2.0.0 waits for approval; this is what 'isolator plugin approve {name}' would grant it:"
        assert would in d.cli("plugin", "explain", name).stdout

        shutil.rmtree(more)  # what was staged is in the store
        assert d.stop() == 0
        d.start()
        now = shown(d, name)
        assert (now["version"], now["pending"]["version"]) == ("1.0.0", "2.0.0")
        assert version_that_answers(d, name, "old") == "1.0.0"
        d.cli("plugin", "approve", name, code=5)  # nobody is there to agree
        result = d.cli("plugin", "approve", name, "--yes")
        assert "api.example.com" in result.stdout
        now = shown(d, name)
        assert (now["version"], now["state"], now["pending"]) == ("2.0.0", "running", None)
        policy = (d.root / f"etc/isolator/policies/{name}.toml").read_text()
        assert "api.example.com:443" in policy  # nobody had edited it, so to approve is to grant
        rules = d.json("plugin", "explain", name)["effective"]["network"]["egress"]
        assert [rule["host"] for rule in rules] == ["api.example.com"]
        assert of_type(d, name, "plugin.pending") and of_type(d, name, "plugin.approved")
        result = d.cli("plugin", "approve", name, "--yes", code=2)
        assert "nothing waits" in result.stderr and not result.stdout


def test_version_is_approved_only_as_it_was_shown(running: Daemon, tmp_path: Path, name: str) -> None:
    add(running, make(tmp_path / name, "1.0.0", **LESS), start=False)
    running.cli("plugin", "update", name, str(make(tmp_path / "more" / name, "2.0.0", **MORE)), code=5)
    seen = shown(running, name)["pending"]["digest"]
    running.cli("plugin", "update", name, str(make(tmp_path / "other" / name, "2.0.1", **MORE)), code=5)
    with Client(str(running.root)) as client, pytest.raises(UsageError, match="something else waits"):
        client.call("plugin.approve", name=name, digest=seen)
    now = shown(running, name)
    assert (now["version"], now["pending"]["version"]) == ("1.0.0", "2.0.1")


def test_version_that_is_rejected_is_not_kept_and_the_history_tells_of_it(
    running: Daemon, tmp_path: Path, name: str
) -> None:
    add(running, make(tmp_path / name, "1.0.0", **LESS), start=False)
    assert "no version waits" in running.cli("plugin", "reject", name, code=2).stderr
    running.cli("plugin", "update", name, str(make(tmp_path / "more" / name, "2.0.0", **MORE)), code=5)
    refused = shown(running, name)["pending"]["digest"]
    assert f"rejected {name} 2.0.0; 1.0.0 stays in use" in running.cli("plugin", "reject", name).stdout
    now = shown(running, name)
    assert (now["version"], now["pending"]) == ("1.0.0", None)
    assert not (running.root / f"var/lib/isolator/plugins/{name}/{refused}").exists()
    assert "nothing waits" in running.cli("plugin", "approve", name, "--yes", code=2).stderr
    (declined,) = of_type(running, name, "plugin.declined")
    assert declined["data"] == {"new": refused, "version": "2.0.0", "who": "uid:0"}
    told = running.json("plugin", "history", name)
    assert [entry["type"] for entry in told] == ["plugin.added", "plugin.pending", "plugin.declined"]
    rows = running.cli("plugin", "history", name).stdout.splitlines()
    assert rows[0].split() == ["time", "what", "version", "digest", "by", "why"] and " declined " in rows[3]


def test_approving_adds_to_an_edited_policy_only_what_was_approved(running: Daemon, tmp_path: Path, name: str) -> None:
    # The operator withholds an event from version 1.0.0, and approves one destination after the other.
    hooks = ["deploy.completed", "deploy.failed"]
    add(running, make(tmp_path / name, "1.0.0", hooks=hooks, **LESS), start=False)
    policy = running.root / f"etc/isolator/policies/{name}.toml"
    mine = """\
# mine
[grant]
hooks = ["deploy.completed"]  # no more
egress = [
    # none yet
]
[limits]
memory="96M"
"""
    policy.write_text(mine)
    for number, host in ((2, "api.example.com"), (3, "www.example.com")):
        version = make(
            tmp_path / str(number) / name, f"{number}.0.0", hooks=hooks,
            sandbox={"network": {"egress": ["api.example.com:443", "www.example.com:443"][: number - 1]}},
        )  # fmt: skip
        running.cli("plugin", "update", name, str(version), code=5)
        result = running.cli("plugin", "approve", name, "--yes")
        assert f'+    "{host}:443"' in result.stdout and "- hooks deploy.failed" in result.stdout
        assert shown(running, name)["version"] == f"{number}.0.0"
    after = policy.read_text()
    assert [line for line in after.splitlines() if "example.com" not in line] == mine.splitlines()
    hosts = [rule["host"] for rule in running.json("plugin", "explain", name)["effective"]["network"]["egress"]]
    assert hosts == ["api.example.com", "www.example.com"]


def test_failure_of_an_approved_version_leaves_an_edited_policy_as_it_was(
    running: Daemon, tmp_path: Path, name: str
) -> None:
    add(running, make(tmp_path / name, "1.0.0", **LESS))
    policy = running.root / f"etc/isolator/policies/{name}.toml"
    mine = "# mine\n" + policy.read_text()
    policy.write_text(mine)
    running.cli("plugin", "update", name, str(make(tmp_path / "x" / name, "2.0.0", BROKEN, **MORE)), "--yes", code=1)
    assert policy.read_text() == mine and shown(running, name)["version"] == "1.0.0"


def test_yes_approves_at_once_and_a_failure_takes_the_grant_back(running: Daemon, tmp_path: Path, name: str) -> None:
    add(running, make(tmp_path / name, "1.0.0", **LESS))
    policy = running.root / f"etc/isolator/policies/{name}.toml"
    before = policy.read_text()
    broken = make(tmp_path / "broken" / name, "2.0.0", BROKEN, **MORE)
    result = running.cli("plugin", "update", name, str(broken), "--yes", code=1)
    assert "exit code 7" in result.stderr
    now = shown(running, name)
    assert (now["version"], now["state"], now["pending"]) == ("1.0.0", "running", None)
    assert policy.read_text() == before
    running.cli("plugin", "update", name, str(make(tmp_path / "more" / name, "2.0.1", **MORE)), "--yes")
    assert shown(running, name)["version"] == "2.0.1" and "api.example.com" in policy.read_text()
    running.cli("plugin", "rollback", name)
    now = shown(running, name)
    assert (now["version"], now["state"]) == ("1.0.0", "running")
    assert running.json("plugin", "explain", name)["effective"]["network"]["egress"] == []


def test_a_binary_that_was_changed_runs_only_after_approval(
    running: Daemon, tmp_path: Path, name: str, shared_dir: Path
) -> None:
    binary = shared_dir / "tool"
    binary.write_text(textwrap.dedent(answers("one")))
    binary.chmod(0o755)
    running.root.chmod(0o755)
    place = Path("/usr/local/lib/isolator-test-binary")
    place.mkdir()
    try:
        binary = shutil.move(binary, place / "tool")
        running.cli("plugin", "add", "--name", name, "--binary", str(binary), "--hooks", "deploy.completed", "--yes")
        assert version_that_answers(running, name, "1") == "one"
        running.cli("plugin", "stop", name)
        binary.write_text(textwrap.dedent(answers("two")))
        result = running.cli("plugin", "start", name, code=1)
        assert "has changed since it was approved" in result.stderr
        now = shown(running, name)
        assert now["state"] == "failed" and "has changed since it was approved" in now["error"]
        assert len(of_type(running, name, "plugin.failed")) == len(of_type(running, name, "plugin.crashed")) == 1
        assert "another file" in running.cli("plugin", "approve", name, "--yes").stdout
        assert version_that_answers(running, name, "2") == "two"
        result = running.cli("plugin", "rollback", name, code=2)
        assert "is not the earlier file" in result.stderr
        binary.write_text(textwrap.dedent(answers("three")))
        running.cli("plugin", "update", name)
        assert version_that_answers(running, name, "3") == "three"
    finally:
        shutil.rmtree(place)
