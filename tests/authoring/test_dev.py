"""``isolator dev``: a plugin in its cage that follows each save, what its author sees, and nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap
from pathlib import Path

import pytest

from host.authoring.watching import Watching
from isolator.cli.private_root import BASE
from tests.authoring.dev_process import DevProcess, answering
from tests.authoring.test_trial import MODES
from tests.support.timeouts import seconds
from tests.system.daemon import write_plugin

SHORT_LIVED = """#!/usr/bin/python3
import os, socket, time
server = socket.socket(socket.AF_UNIX)
server.bind(os.environ["PLUGIN_SOCKET"])
server.listen(1)
time.sleep(0.1)
raise SystemExit(3)
"""
"""Ends while it is on trial, though it was up."""
LOOKUP = """__import__("os").popen("getent hosts api.example.com; echo looked").read()"""


def test_each_save_is_in_use_and_its_author_sees_log_denials_and_faults(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "plugin", answering(LOOKUP), sandbox={"network": {"egress": []}})
    with DevProcess(folder) as dev:
        root = Path(dev.next("ready")["root"])
        assert root.parent == BASE and dev.next("loaded")["plugin"] == "plugin"

        dev.say("")  # the first hook, with an example
        answer = dev.next("answer")
        assert (answer["event"], answer["outcome"]) == ("deploy.completed", "ok") and "looked" in answer["reply"]
        dev.have("log", lambda line: line["line"] == "version 1")
        denial = dev.have("denial")["denial"]
        assert denial["data"]["name"] == "api.example.com" and denial["grant"]["line"]

        (folder / "main").write_text(textwrap.dedent(answering('"two"', 2)))
        dev.next("loaded")
        dev.say(
            'deploy.completed {"project_id": "p", "deployment_id": "d", "url": "https://a.example", "duration_ms": 1}'
        )
        answer = dev.next("answer")
        assert "two" in answer["reply"] and answer["payload"]["project_id"] == "p"

        for ends in ("#!/bin/sh\necho bad luck >&2\nexit 3\n", SHORT_LIVED):
            (folder / "main").write_text(ends)
            assert "in use again" in dev.next("error")["error"]["why"]
        dev.say("")  # the version before is there
        assert "two" in dev.next("answer")["reply"]

        manifest = (folder / "plugin.json").read_text()
        (folder / "plugin.json").write_text("{")
        assert "plugin.json:1" in str(dev.next("error")["error"])
        (folder / "main").write_text(textwrap.dedent(answering('"three"', 3)))
        dev.next("error")
        (folder / "plugin.json").write_text(manifest)
        dev.next("loaded")
        (folder / "plugin.json").write_text("{")
        dev.next("error")
        (folder / "plugin.json").write_text(manifest)
        assert "is what is in use already" in str(dev.next("note"))
        dev.say("no.such {}")
        assert "no.such" in str(dev.next("error")["error"])
        dev.say("deploy.complet")
        assert "did you mean 'deploy.completed'?" in dev.next("error")["error"]["remedy"]
        dev.say("events")
        assert '"project_id"' in dev.next("events")["events"]["deploy.completed"]
        dev.say("deploy.completed")
        assert "three" in dev.next("answer")["reply"]
        assert dev.end() == 0
    assert not root.exists()


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=pytest.mark.wide) for mode in MODES])
def test_mode_is_followed_as_it_runs(tmp_path: Path, mode: str) -> None:
    folder = write_plugin(tmp_path / "plugin", MODES[mode], transport={"mode": mode})
    with DevProcess(folder, "--event", "deploy.completed") as dev:
        assert dev.next("answer")["outcome"] == "ok"
        (folder / "main").write_text((folder / "main").read_text() + "# another\n")
        assert dev.next("loaded")["mode"] == mode
        assert dev.next("answer")["outcome"] == "ok"


@pytest.mark.wide
@pytest.mark.parametrize("mode", ["http", "mcp"])
def test_new_plugin_of_a_mode_with_a_library_is_followed(tmp_path: Path, mode: str) -> None:
    folder = tmp_path / f"new-{mode}"
    words = ["isolator", "new", str(folder), "--lang", "python", "--mode", mode]
    subprocess.run(words, check=True, capture_output=True)
    with DevProcess(folder, "--event", "deploy.completed") as dev:
        assert dev.next("answer")["outcome"] == "ok"
        (folder / folder.name).write_text((folder / folder.name).read_text() + "# another\n")
        dev.next("loaded")
        assert dev.next("answer")["outcome"] == "ok"


@pytest.mark.wide
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_it_with_nothing_left(tmp_path: Path, number: int) -> None:
    folder = write_plugin(tmp_path / "plugin", answering())
    with DevProcess(folder) as dev:
        root = Path(dev.next("ready")["root"])
        dev.next("loaded")
        assert dev.end(number) == 128 + number
    assert not root.exists()


def test_interrupt_that_comes_just_before_a_wait_ends_it(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "plugin", answering())
    with DevProcess(folder) as dev:
        root = Path(dev.next("ready")["root"])
        dev.next("loaded")
        dev.interrupt_another_thread()
        assert dev.ended() == 0
    assert not root.exists()


@pytest.mark.wide
def test_plugin_without_events_is_told_to_name_one(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "hookless", answering(), hooks=[])
    words = ["unshare", "-n", "isolator", "dev", str(folder)]
    ran = subprocess.run(words, input="\nquit\n", capture_output=True, text=True, check=True, timeout=seconds(120))
    assert "plugin hookless: asks for no event" in ran.stdout + ran.stderr


@pytest.mark.wide
def test_line_quit_ends_it_and_text_is_for_people(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "plugin", answering('"\\x1b[2J"'))
    words = ["unshare", "-n", "isolator", "dev", str(folder)]
    ran = subprocess.run(
        words, input="deploy.completed\nhelp\nquit\n", capture_output=True, text=True, check=True, timeout=seconds(120)
    )
    assert "plugin 1.0.0 (oneshot) is in use" in ran.stdout and "deploy.completed: ok" in ran.stdout
    assert "version 1" in ran.stdout and "\x1b" not in ran.stdout + ran.stderr


@pytest.mark.wide
def test_policy_of_the_author_is_followed_too(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "plugin", answering('__import__("os").environ.get("COLOUR", "none")'))
    policy = tmp_path / "any.toml"
    policy.write_text('[grant]\nhooks = ["deploy.*"]\n[env]\nCOLOUR = "red"\n')
    with DevProcess(folder, "--policy", str(policy), "--event", "deploy.completed") as dev:
        assert "red" in dev.next("answer")["reply"]
        policy.write_text('[grant]\nhooks = ["deploy.*"]\n[env]\nCOLOUR = "blue"\n')
        dev.next("answer", lambda answer: "blue" in str(answer["reply"]))


@pytest.mark.parametrize(
    ("name", "counts"),
    [("main", True), ("lib/part.py", True), ("any.toml", True), ("../other.toml", False), (".main.swp", False),
     ("main~", False), ("4913", False), ("main.tmp", False)],
)  # fmt: skip
def test_file_of_an_editor_is_no_save(tmp_path: Path, name: str, counts: bool) -> None:
    folder = tmp_path / "plugin"
    folder.mkdir()
    watching = Watching(str(folder), tmp_path / "any.toml", lambda: None)
    watching.close()
    place = tmp_path if name.endswith(".toml") else folder
    assert watching._counts(os.path.normpath(place / name)) is counts


def test_user_without_privilege_is_told_what_is_missing() -> None:
    words = ["setpriv", "--reuid=65534", "--clear-groups", "isolator", "dev", "/usr"]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert ran.returncode == 4 and "sudo isolator dev" in ran.stderr and ran.stderr.count("\n") == 1
