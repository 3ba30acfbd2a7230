"""From one version to the next: exchanged, held back, rolled back, and always one whole version in use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sidecars import oneshot
from tests.system.daemon import ECHO, Daemon, daemon, event, wait_for, write_plugin

BROKEN = "#!/bin/sh\nexit 7\n"
SILENT = "#!/bin/sh\nsleep 1000\n"


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon() as d:
        yield d


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def name(running: Daemon, request: pytest.FixtureRequest) -> Iterator[str]:
    """A name of the test's own; the plugin is removed in the end."""
    made = f"u-{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}"
    yield made
    running.cli("plugin", "remove", made, code=None)


def answers(version: str) -> str:
    """A plugin that says which version it is."""
    return ECHO.replace('"status": "ok"', f'"status": "ok", "version": "{version}"')


def make(folder: Path, version: str, script: str | None = None, **manifest: Any) -> Path:
    return write_plugin(folder, answers(version) if script is None else script, version=version, **manifest)


def add(d: Daemon, folder: Path, *, start: bool = True) -> None:
    d.cli("plugin", "add", str(folder), "--yes")
    if start:
        d.cli("plugin", "start", folder.name)


def shown(d: Daemon, name: str) -> dict[str, Any]:
    found: dict[str, Any] = d.json("plugin", "show", name)
    return found


def version_that_answers(d: Daemon, name: str, number: str) -> str:
    """Deliver an event, and say which version replied."""
    emitted = d.json("event", "emit", "deploy.completed", event(f"{name}-{number}"), "--wait")
    (reply,) = [
        r["data"]["response"]
        for r in d.records()
        if r["type"] == "event.response" and r["plugin"] == name and r["event_id"] == emitted["id"]
    ]
    return str(json.loads(reply)["result"]["version"])


def of_type(d: Daemon, name: str, kind: str) -> list[dict[str, Any]]:
    return [r for r in d.records() if r["type"] == kind and r["plugin"] == name]


def store(d: Daemon, name: str) -> set[str]:
    return {path.name for path in (d.root / "var/lib/isolator/plugins" / name).iterdir() if path.is_dir()}


# --- exchange ------------------------------------------------------------------------------------------------------


def test_update_exchanges_a_running_version(running: Daemon, tmp_path: Path, name: str) -> None:
    first, second = make(tmp_path / name, "1.0.0"), make(tmp_path / "second" / name, "1.1.0")
    add(running, first)
    old = shown(running, name)
    result = running.cli("plugin", "update", name, str(second))
    assert "1.1.0 is in use now" in result.stdout
    now = shown(running, name)
    assert (now["version"], now["state"]) == ("1.1.0", "running") and now["run"] != old["run"]
    assert now["previous"] == [old["digest"]]
    assert version_that_answers(running, name, "x") == "1.1.0"
    (record,) = of_type(running, name, "plugin.updated")
    assert (record["data"]["old"], record["data"]["new"]) == (old["digest"], now["digest"])

    # Without a folder: from where the last version came from; and the same content again changes nothing.
    make(second, "1.2.0")
    running.cli("plugin", "update", name)
    run = shown(running, name)["run"]
    assert shown(running, name)["version"] == "1.2.0"
    assert "in use already" in running.cli("plugin", "update", name).stdout
    assert shown(running, name)["run"] == run

    running.cli("plugin", "rollback", name)
    assert (shown(running, name)["version"], shown(running, name)["state"]) == ("1.1.0", "running")
    assert version_that_answers(running, name, "y") == "1.1.0"


def test_update_of_a_stopped_plugin_starts_nothing(running: Daemon, tmp_path: Path, name: str) -> None:
    add(running, make(tmp_path / name, "1.0.0"), start=False)
    running.cli("plugin", "update", name, str(make(tmp_path / "second" / name, "2.0.0")))
    assert shown(running, name)["state"] == "stopped" and not of_type(running, name, "plugin.started")
    assert version_that_answers(running, name, "x") == "2.0.0"


def test_update_must_be_of_the_same_plugin(running: Daemon, tmp_path: Path, name: str) -> None:
    add(running, make(tmp_path / name, "1.0.0"), start=False)
    result = running.cli("plugin", "update", name, str(make(tmp_path / "another-one", "1.0.0")), code=2)
    assert "holds another-one" in result.stderr
    assert "is already registered" in running.cli("plugin", "add", str(tmp_path / name), "--yes", code=2).stderr


@pytest.mark.parametrize(("script", "why"), [(BROKEN, "exit code 7"), (SILENT, "no socket in 10 s")])
def test_a_version_that_does_not_come_up_is_rolled_back(
    running: Daemon, tmp_path: Path, name: str, script: str, why: str
) -> None:
    add(running, make(tmp_path / name, "1.0.0"))
    before = shown(running, name)
    files = store(running, name)
    started = time.monotonic()
    result = running.cli("plugin", "update", name, str(make(tmp_path / "second" / name, "2.0.0", script)), code=1)
    assert result.stderr.startswith("isolator: ") and result.stderr.count("\n") == 1, result.stderr
    assert why in result.stderr and "1.0.0 is in use again" in result.stderr
    after = shown(running, name)
    assert (after["version"], after["digest"], after["state"]) == ("1.0.0", before["digest"], "running")
    assert after["previous"] == [] and store(running, name) == files
    assert version_that_answers(running, name, "x") == "1.0.0"
    (record,) = of_type(running, name, "plugin.rolled_back")
    assert why in record["data"]["reason"] and record["data"]["new"] == before["digest"]
    assert not of_type(running, name, "plugin.updated")
    assert time.monotonic() - started < 60


def test_what_cannot_be_a_version_is_refused_while_the_old_one_runs(running: Daemon, tmp_path: Path, name: str) -> None:
    add(running, make(tmp_path / name, "1.0.0"))
    run = shown(running, name)["run"]
    bad = make(tmp_path / "second" / name, "2.0.0")
    (bad / "main").chmod(0o644)
    assert "chmod +x" in running.cli("plugin", "update", name, str(bad), code=2).stderr
    assert shown(running, name)["run"] == run
    assert not list((running.root / "var/lib/isolator/plugins").glob(".staging-*"))


def test_events_are_not_lost_while_versions_change(running: Daemon, tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / name, "1.0.0")
    add(running, folder)
    wanted = set()
    for number in range(1, 4):
        for part in range(4):
            running.cli("event", "emit", "deploy.completed", event(f"{number}-{part}"))
            wanted.add(f"d{number}-{part}")
        running.cli("plugin", "update", name, str(make(folder, f"1.{number}.0")))
    seen = running.root / f"var/lib/isolator/state/{name}/mnt/state/seen"
    wait_for(lambda: set(seen.read_text().split()) >= wanted, what="an event was lost")


def test_five_earlier_versions_are_kept(running: Daemon, tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / name, "1.0.0")
    add(running, folder, start=False)
    digests = [shown(running, name)["digest"]]
    for number in range(1, 8):
        make(folder, f"1.{number}.0")
        running.cli("plugin", "update", name)
        digests.append(shown(running, name)["digest"])
    assert shown(running, name)["previous"] == digests[-2:-7:-1]
    assert store(running, name) == set(digests[-6:])


def test_rollback_to_a_version_that_does_not_come_up_changes_nothing(
    running: Daemon, tmp_path: Path, name: str
) -> None:
    add(running, make(tmp_path / name, "1.0.0", BROKEN), start=False)
    running.cli("plugin", "update", name, str(make(tmp_path / "second" / name, "1.1.0")))
    running.cli("plugin", "start", name)
    result = running.cli("plugin", "rollback", name, code=1)
    assert "exit code 7" in result.stderr and "1.1.0 is in use again" in result.stderr
    assert (shown(running, name)["version"], shown(running, name)["state"]) == ("1.1.0", "running")
    assert len(shown(running, name)["previous"]) == 1


def test_rollback_without_an_earlier_version(running: Daemon, tmp_path: Path, name: str) -> None:
    add(running, make(tmp_path / name, "1.0.0"), start=False)
    assert "no earlier version" in running.cli("plugin", "rollback", name, code=3).stderr


# --- approval ------------------------------------------------------------------------------------------------------

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
        assert "nothing waits" in d.cli("plugin", "approve", name, "--yes", code=2).stderr


def test_approving_does_not_touch_an_edited_policy(running: Daemon, tmp_path: Path, name: str) -> None:
    add(running, make(tmp_path / name, "1.0.0", **LESS), start=False)
    policy = running.root / f"etc/isolator/policies/{name}.toml"
    mine = "# mine\n" + policy.read_text()
    policy.write_text(mine)
    running.cli("plugin", "update", name, str(make(tmp_path / "more" / name, "2.0.0", **MORE)), code=5)
    result = running.cli("plugin", "approve", name, "--yes")
    assert "egress = [" in result.stdout  # the line that would grant it
    assert policy.read_text() == mine and shown(running, name)["version"] == "2.0.0"
    assert running.json("plugin", "explain", name)["effective"]["network"]["egress"] == []


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
        running.cli("plugin", "stop", name)
        assert "another file" in running.cli("plugin", "approve", name, "--yes").stdout
        assert version_that_answers(running, name, "2") == "two"
        result = running.cli("plugin", "rollback", name, code=2)
        assert "is not the earlier file" in result.stderr
        binary.write_text(textwrap.dedent(answers("three")))
        running.cli("plugin", "update", name)
        assert version_that_answers(running, name, "3") == "three"
    finally:
        shutil.rmtree(place)


# --- policy files --------------------------------------------------------------------------------------------------


def test_policy_is_read_again_when_it_is_edited(running: Daemon, tmp_path: Path, name: str) -> None:
    add(running, make(tmp_path / name, "1.0.0"))
    policy = running.root / f"etc/isolator/policies/{name}.toml"
    good, before = policy.read_text(), shown(running, name)

    policy.write_text(good + "\n# a remark\n")
    policy.write_text(good.replace('memory = "256M"', 'memory = "128M"'))
    now = wait_for(lambda: (e := shown(running, name))["state"] == "running" and e["run"] != before["run"] and e)
    cage = Path(of_type(running, name, "plugin.started")[-1]["data"]["cgroup"])
    limits = [*cage.glob("memory.max"), *Path("/sys/fs/cgroup/memory").rglob(f"{cage.name}/memory.limit_in_bytes")]
    assert [int(path.read_text()) for path in limits] == [128 << 20]
    (record,) = of_type(running, name, "config.changed")
    assert record["data"]["old_policy_sha256"] == before["effective_digest"]
    assert record["data"]["policy_sha256"] == now["effective_digest"]

    # The same policy in other words: nothing happens. The next change, a mistake, comes after it in order.
    policy.write_text(policy.read_text() + "\n# a remark\n")
    policy.write_text(policy.read_text().replace("128M", "129 apples"))
    broken = wait_for(lambda: (e := shown(running, name))["error"] and e)
    assert f"{name}.toml:" in broken["error"] and "last good policy" in broken["error"]
    assert (broken["state"], broken["run"], broken["effective_digest"]) == (
        "running", now["run"], now["effective_digest"],
    )  # fmt: skip
    assert of_type(running, name, "plugin.rejected")[0]["data"]["what"] == "policy"
    running.cli("plugin", "restart", name)
    assert shown(running, name)["effective_digest"] == now["effective_digest"]
    assert "apples" in running.cli("plugin", "list").stdout

    # A newer version is not taken under a policy that cannot be read.
    running.cli("plugin", "update", name, str(make(tmp_path / "second" / name, "1.1.0")), code=2)
    assert shown(running, name)["version"] == "1.0.0"

    policy.write_text(good)
    wait_for(lambda: not (e := shown(running, name))["error"] and e["effective_digest"] == before["effective_digest"])


FILLER = oneshot("""
fd = os.open("/state/full", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
try:
    while True:
        os.write(fd, bytes(16384))
        os.fsync(fd)
except OSError as error:
    reason = error.errno
stored = os.fstat(fd).st_size
os.close(fd)
return {"status": "ok", "stored": stored, "errno": reason}
""")


def test_the_state_folder_follows_the_policy(running: Daemon, tmp_path: Path, name: str) -> None:
    """What is granted is what the plugin can store, after a change too; and it is never made to fit by force."""

    def stored() -> int:
        emitted = running.json("event", "emit", "deploy.completed", event(f"fill-{time.monotonic_ns()}"), "--wait")
        (reply,) = [
            json.loads(r["data"]["response"])["result"]
            for r in running.records()
            if r["type"] == "event.response" and r["plugin"] == name and r["event_id"] == emitted["id"]
        ]
        assert reply["errno"] == 28, reply
        return int(reply["stored"])

    def restarted_after(change: str, to: str) -> None:
        digest = shown(running, name)["effective_digest"]
        policy.write_text(policy.read_text().replace(change, to))
        wait_for(lambda: shown(running, name)["effective_digest"] != digest)

    add(running, make(tmp_path / name, "1.0.0", FILLER, sandbox={"filesystem": {"state": "16M"}}))
    policy = running.root / f"etc/isolator/policies/{name}.toml"
    restarted_after('state = "16M"', 'state = "1M"')
    assert 0.9 * (1 << 20) < stored() <= 1 << 20
    restarted_after('state = "1M"', 'state = "4M"')
    assert 0.97 * (4 << 20) < stored() <= 4 << 20
    restarted_after('state = "4M"', 'state = "2M"')
    failing = wait_for(lambda: (e := shown(running, name))["error"] and e)
    assert "KiB are stored, 2048 KiB are granted now" in failing["error"]
    restarted_after('state = "2M"', 'state = "8M"')
    running.cli("plugin", "start", name)
    assert 0.97 * (8 << 20) < stored() <= 8 << 20


def test_a_policy_that_others_can_write_is_not_believed(running: Daemon, tmp_path: Path, name: str) -> None:
    add(running, make(tmp_path / name, "1.0.0"))
    policy = running.root / f"etc/isolator/policies/{name}.toml"
    policy.chmod(0o666)
    broken = wait_for(lambda: (e := shown(running, name))["error"] and e)
    assert "others can write it" in broken["error"] and broken["state"] == "running"
    policy.chmod(0o644)
    wait_for(lambda: not shown(running, name)["error"])


def test_a_policy_file_that_is_gone(tmp_path: Path) -> None:
    with daemon() as d:
        name = "orphan"
        add(d, make(tmp_path / name, "1.0.0"))
        policy = d.root / f"etc/isolator/policies/{name}.toml"
        policy.unlink()
        gone = wait_for(lambda: (e := shown(d, name))["error"] and e)
        assert gone["state"] == "running" and "the file is gone" in gone["error"]
        d.cli("plugin", "restart", name)
        d.stop()
        d.start()
        assert shown(d, name)["state"] == "rejected"
        assert "the file is gone" in d.cli("plugin", "start", name, code=4).stderr
        d.cli("plugin", "approve", name, "--yes")
        assert policy.exists()
        d.cli("plugin", "start", name)
        # A file of the operator's own does as well.
        policy.unlink()
        d.stop()
        d.start()
        policy.write_text('[grant]\nhooks = ["deploy.completed"]\n')
        wait_for(lambda: shown(d, name)["state"] == "stopped")
        d.cli("plugin", "start", name)


def test_host_toml_is_read_at_the_start_only(running: Daemon) -> None:
    (running.root / "etc/isolator/host.toml").write_text("nonsense\n")
    try:
        wait_for(lambda: "takes effect when the daemon is started again" in running.log.read_text())
        running.cli("plugin", "list")
    finally:
        (running.root / "etc/isolator/host.toml").unlink()


# --- plugin_dirs ---------------------------------------------------------------------------------------------------


def states(d: Daemon) -> dict[str, str]:
    return {entry["name"]: entry["state"] for entry in d.json("plugin", "list")}


def test_found_plugins_wait_for_approval(tmp_path: Path) -> None:
    place, later = tmp_path / "place", tmp_path / "later"
    make(place / "found-one", "1.0.0")
    broken = make(place / "broken", "1.0.0")
    (broken / "plugin.json").write_text('{"name": 7')
    (place / "nothing").mkdir()
    (place / "a-file").write_text("")
    with daemon(host_toml=f'plugin_dirs = ["{place}", "{later}"]\n') as d:
        assert states(d) == {"found-one": "pending", "broken": "rejected"}
        listing = d.cli("plugin", "list").stdout
        assert "isolator plugin approve found-one" in listing and "plugin.json" in listing
        (rejected,) = [r for r in d.records() if r["type"] == "plugin.rejected"]
        assert rejected["plugin"] == "broken"

        # Events of before the approval are not its own, and it does not start by any means.
        d.cli("event", "emit", "deploy.completed", event("before"))
        assert "isolator plugin approve found-one" in d.cli("plugin", "start", "found-one", code=5).stderr
        d.cli("plugin", "enable", "found-one", code=5)
        d.cli("plugin", "approve", "found-one", code=5)
        assert "deploy.completed" in d.cli("plugin", "explain", "found-one").stdout
        assert not [r for r in d.records() if r["type"] == "plugin.started"]
        assert not (d.root / "var/lib/isolator/plugins/found-one").exists()
        assert states(d)["found-one"] == "pending"

        d.cli("plugin", "approve", "found-one", "--yes")
        d.cli("event", "emit", "deploy.completed", event("after"), "--wait")
        assert states(d) == {"found-one": "running", "broken": "rejected"}
        (added,) = [r for r in d.records() if r["type"] == "plugin.added"]
        assert added["plugin"] == "found-one"

        # What comes, changes and goes while it runs.
        make(later / "late-comer", "3.0.0")
        wait_for(lambda: states(d).get("late-comer") == "pending")
        write_plugin(later / "double", version="9.9.9")
        manifest = json.loads((later / "double/plugin.json").read_text()) | {"name": "found-one"}
        (later / "double/plugin.json").write_text(json.dumps(manifest))
        wait_for(lambda: states(d).get("double") == "rejected")
        assert 'the name "found-one" is taken' in d.cli("plugin", "list").stdout
        assert states(d)["found-one"] == "running"
        make(place / "broken", "1.0.1")
        wait_for(lambda: states(d).get("broken") == "pending")
        shutil.rmtree(later / "late-comer")
        wait_for(lambda: "late-comer" not in states(d))
        d.cli("plugin", "show", "late-comer", code=3)

        # Removed from the registered ones it is found again, and still not run.
        d.cli("plugin", "remove", "found-one")
        wait_for(lambda: states(d).get("found-one") == "rejected" or states(d).get("found-one") == "pending")
        d.stop()
        d.start()
        assert states(d)["found-one"] == "pending"


def test_found_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    import os

    place = tmp_path / "place"
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"name": "stolen"}))
    for hostile in ("pipe", "link", "folder"):
        (place / hostile).mkdir(parents=True)
    os.mkfifo(place / "pipe/plugin.json")
    (place / "link/plugin.json").symlink_to(secret)
    (place / "folder/plugin.json").mkdir()
    make(tmp_path / "elsewhere/linked", "1.0.0")
    (place / "linked").symlink_to(tmp_path / "elsewhere/linked")
    make(place / "good-one", "1.0.0")
    with daemon(host_toml=f'plugin_dirs = ["{place}"]\n') as d:
        assert states(d) == {"pipe": "rejected", "link": "rejected", "folder": "rejected", "good-one": "pending"}


# --- enable, disable, start, stop, remove --------------------------------------------------------------------------


def test_disabled_is_kept_stopped_and_its_events_wait(running: Daemon, tmp_path: Path, name: str) -> None:
    add(running, make(tmp_path / name, "1.0.0"))
    running.cli("plugin", "disable", name)
    running.cli("plugin", "disable", name)
    assert shown(running, name)["state"] == "disabled" and shown(running, name)["pid"] is None
    emitted = running.json("event", "emit", "deploy.completed", event("waits"))
    assert f"isolator plugin enable {name}" in running.cli("plugin", "start", name, code=4).stderr
    running.cli("plugin", "update", name, str(make(tmp_path / "second" / name, "1.1.0")))
    assert shown(running, name)["state"] == "disabled"
    running.cli("plugin", "enable", name)
    wait_for(
        lambda: (
            {d["plugin"]: d["state"] for d in running.json("event", "show", emitted["id"])["deliveries"]}[name] == "ok"
        )
    )
    run = shown(running, name)["run"]
    running.cli("plugin", "enable", name)
    running.cli("plugin", "start", name)
    assert shown(running, name)["run"] == run, "what runs already was started again"
    running.cli("plugin", "stop", name)
    running.cli("plugin", "stop", name)
    running.cli("plugin", "restart", name)
    assert shown(running, name)["state"] == "running"


@pytest.mark.parametrize("verb", ["start", "stop", "restart", "enable", "disable", "remove", "rollback", "approve"])
def test_unknown_names(running: Daemon, verb: str) -> None:
    result = running.cli("plugin", verb, "nobody", code=3)
    assert result.stderr.count("\n") == 1 and "nobody" in result.stderr


def test_two_crashes_on_one_event_quarantine_it(tmp_path: Path) -> None:
    script = ECHO.replace("params = ", 'params = {} if "poison" not in str(request) else os._exit(9) or {}; params |= ')
    with daemon(host_toml='[restart]\nbackoff_min = "0.1s"\n') as d:
        name = "fragile"
        add(d, make(tmp_path / name, "1.0.0", script))
        poison = d.json("event", "emit", "deploy.completed", event("poison", project_id="p-bad"))
        good = d.json("event", "emit", "deploy.completed", event("fine", project_id="p-good"))

        def delivery(emitted: dict[str, Any]) -> str:
            (found,) = d.json("event", "show", emitted["id"])["deliveries"]
            return str(found["state"])

        wait_for(lambda: delivery(poison) == "quarantined", 60, "it was never quarantined")
        wait_for(lambda: delivery(good) == "ok", 60, "the plugin did not go on")
        crashes = of_type(d, name, "plugin.crashed")
        assert [r["data"]["exit_code"] for r in crashes] == [9, 9]
        (record,) = of_type(d, name, "event.quarantined")
        assert "crashed 2 times" in record["data"]["reason"]
        wait_for(lambda: shown(d, name)["state"] == "running")


# --- at once, and cut short ----------------------------------------------------------------------------------------


def test_many_command_lines_at_once(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    name = "contended"
    folder = make(tmp_path / name, "1.0.0")
    second = make(tmp_path / "second" / name, "1.1.0")
    verbs = [
        ("plugin", "add", str(folder), "--yes"), ("plugin", "start", name), ("plugin", "remove", name),
        ("plugin", "update", name, str(second)), ("plugin", "restart", name),
    ]  # fmt: skip
    with daemon() as d:
        with ThreadPoolExecutor(20) as pool:
            results = list(pool.map(lambda i: d.cli(*verbs[i % len(verbs)], code=None), range(40)))
        for result in results:
            assert result.returncode in (0, 1, 2, 3), (result.args, result.stderr)
            assert "Traceback" not in result.stderr and result.stderr.count("\n") <= 1, result.stderr
        assert [r for r in results if r.returncode == 0]
        _whole(d, name)
        d.cli("plugin", "remove", name, code=None)
        _whole(d, name)
        d.cli("plugin", "add", str(folder), "--yes")
        assert version_that_answers(d, name, "x") == "1.0.0"
        d.cli("audit", "verify")


def _whole(d: Daemon, name: str) -> None:
    """The plugin is there with all of its parts, or nothing of it is."""
    import pwd

    from isolator.paths import Paths

    listed = name in states(d)
    parts = {
        "files": (d.root / f"var/lib/isolator/plugins/{name}/plugin.state").exists(),
        "policy": (d.root / f"etc/isolator/policies/{name}.toml").exists(),
        "user": f"plugin-{name}-{Paths.of(d.root).instance}" in {entry.pw_name for entry in pwd.getpwall()},
    }
    assert set(parts.values()) == {listed}, (listed, parts)
    if not listed:
        assert not (d.root / f"var/lib/isolator/plugins/{name}").exists()
        assert not (d.root / f"var/lib/isolator/state/{name}").exists()


@pytest.mark.slow
def test_killed_in_the_middle_of_anything(tmp_path: Path) -> None:
    """The supervisor is killed at some moment of add, update and remove: what it finds at its start is whole."""
    name = "victim"
    folder = make(tmp_path / name, "1.0.0")
    with daemon() as d:
        for attempt in range(0, 8, 2):
            for words in (("add", str(folder), "--yes"), ("update", name, "--yes"), ("remove", name)):
                make(folder, f"1.{attempt}.{len(words)}")
                command = subprocess.Popen(
                    ["isolator", "--root", str(d.root), "plugin", *words], stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
                )  # fmt: skip
                with contextlib.suppress(subprocess.TimeoutExpired):
                    command.wait(0.2 + 0.05 * attempt)
                d.kill()
                command.wait(30)
                d.start()
                _whole(d, name)
                assert not list((d.root / "var/lib/isolator/plugins").glob(".staging-*"))
        assert d.stop() == 0
