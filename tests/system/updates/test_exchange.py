"""A version is exchanged for another: the new one proves itself, or the old one comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.daemon import Daemon, event, wait_for
from tests.system.updates.plugins import BROKEN, SILENT, add, make, of_type, shown, version_that_answers


def store(d: Daemon, name: str) -> set[str]:
    return {path.name for path in (d.root / "var/lib/isolator/plugins" / name).iterdir() if path.is_dir()}


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


@pytest.mark.parametrize(("script", "why"), [(BROKEN, "exit code 7"), (SILENT, "no socket in 3 s")])
def test_a_version_that_does_not_come_up_is_rolled_back(
    running: Daemon, tmp_path: Path, name: str, script: str, why: str
) -> None:
    add(running, make(tmp_path / name, "1.0.0"))
    before = shown(running, name)
    files = store(running, name)
    second = make(tmp_path / "second" / name, "2.0.0", script, restart={"start_timeout": "3s"})
    result = running.cli("plugin", "update", name, str(second), code=1)
    assert result.stderr.startswith("isolator: ") and result.stderr.count("\n") == 1, result.stderr
    assert why in result.stderr and "1.0.0 is in use again" in result.stderr
    after = shown(running, name)
    assert (after["version"], after["digest"], after["state"]) == ("1.0.0", before["digest"], "running")
    assert after["previous"] == [] and store(running, name) == files
    assert version_that_answers(running, name, "x") == "1.0.0"
    (record,) = of_type(running, name, "plugin.rolled_back")
    assert why in record["data"]["reason"] and record["data"]["new"] == before["digest"]
    assert not of_type(running, name, "plugin.updated")


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
    wait_for(lambda: {*running.noted(name)} >= wanted, what="an event was lost")


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


def test_rollback_can_name_any_kept_version(running: Daemon, tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / name, "1.0.0")
    add(running, folder, start=False)
    first = shown(running, name)["digest"]
    for version in ("1.1.0", "1.2.0"):
        make(folder, version)
        running.cli("plugin", "update", name)
    assert "1.0.0 is in use now" in running.cli("plugin", "rollback", name, "--to", first[:8]).stdout
    assert "1.1.0 is in use now" in running.cli("plugin", "rollback", name, "--to", "1.1.0").stdout
    missing = running.cli("plugin", "rollback", name, "--to", "9.9", code=3).stderr
    assert "is not kept; there are 1.0.0 (" in missing and "1.2.0 (" in missing
    assert len(shown(running, name)["previous"]) == 2


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
