"""A stranger's manifest costs nobody anything: not when it is patterned to, and not when its reader has a flaw."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, alive, daemon, event, wait_for, write_plugin

READER = "tests.reader.slow"


class Flawed(Daemon):
    """A daemon whose reader never gets done with some manifests."""

    def command(self) -> list[str]:
        program = (
            f"import sys; import isolator.registration.reading as reading; reading._MODULE = {READER!r};"
            " from host.cli.main import main; sys.exit(main())"
        )
        return [sys.executable, "-I", "-c", program, "--root", str(self.root), "serve"]


@pytest.fixture
def plugin_dir(shared_dir: Path) -> Path:
    folder = shared_dir / "offered"
    folder.mkdir()
    return folder


@pytest.fixture
def running(plugin_dir: Path) -> Iterator[Daemon]:
    with daemon(host_toml=f'plugin_dirs = ["{plugin_dir}"]\n', kind=Flawed) as d:
        state = {"filesystem": {"state": "1M"}}
        d.cli("plugin", "add", str(write_plugin(plugin_dir.parent / "good", sandbox=state)), "--yes")
        d.cli("event", "emit", "deploy.completed", event("warm"), "--wait")
        yield d


@contextlib.contextmanager
def reader_held(d: Daemon) -> Iterator[int]:
    """The next reader, stopped in the middle of a manifest, and what it can still do is spend its processor time."""

    def found() -> int:
        # Only once it is behind its preparations: a reader that reads is in the filter.
        pid = d.service_pid(READER, missing_ok=True)
        with contextlib.suppress(OSError):
            if pid and "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text():
                return pid
        return 0

    pid = wait_for(found, what="no reader was started")
    os.kill(pid, signal.SIGSTOP)
    yield pid
    os.kill(pid, signal.SIGCONT)


def delivered(d: Daemon, number: str) -> None:
    d.cli("event", "emit", "deploy.completed", event(number), "--wait")


def rejected(d: Daemon, folder: Path) -> str:
    found = [p for p in d.json("plugin", "list") if p.get("found") == str(folder) and p["state"] == "rejected"]
    return found[0]["error"] if found else ""


def test_event_is_delivered_while_the_manifest_of_a_command_is_being_read(running: Daemon, tmp_path: Path) -> None:
    hostile = write_plugin(tmp_path / "hostile", description="spin")
    command = ["isolator", "--root", str(running.root), "plugin", "add", str(hostile), "--yes"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as adding:
        with reader_held(running) as pid:
            delivered(running, "beside")
            assert alive(pid) and adding.poll() is None
        _, error = adding.communicate(timeout=seconds(120))
    assert adding.returncode == 2 and "takes too much processor time or memory to read" in error
    assert not alive(pid)
    delivered(running, "after")


def test_event_is_delivered_while_an_offered_manifest_is_being_read(running: Daemon, plugin_dir: Path) -> None:
    write_plugin(plugin_dir / "fine")
    hostile = write_plugin(plugin_dir.parent / "spinner", description="spin")
    hostile.rename(plugin_dir / "spinner")
    with reader_held(running) as pid:
        delivered(running, "beside")
        assert alive(pid)
        assert not rejected(running, plugin_dir / "spinner")
    reason = wait_for(lambda: rejected(running, plugin_dir / "spinner"), seconds(120))
    assert "takes too much processor time or memory to read" in reason
    wait_for(lambda: any(p["name"] == "fine" for p in running.json("plugin", "list")), seconds(60))
    delivered(running, "after")


def test_patterned_manifests_are_refused_one_by_one_and_their_neighbour_is_found(plugin_dir: Path) -> None:
    texts = {
        "quotes": b'{"a": "' + b'\\"' * 130_000,
        "backslashes": b'"\\' * 130_000,
        "brackets": b"[" * 260_000,
        "digits": b'{"a": [' + (b"1" * 299 + b",") * 800 + b"1]}",
        "values": b'{"a": [' + b"0," * 130_000 + b"0]}",
    }
    for name, text in texts.items():
        (plugin_dir / name).mkdir()
        (plugin_dir / name / "plugin.json").write_bytes(text)
    write_plugin(plugin_dir / "fine")
    with daemon(host_toml=f'plugin_dirs = ["{plugin_dir}"]\n') as d:
        states = {p["name"]: p["state"] for p in d.json("plugin", "list")}
    assert states == dict.fromkeys(texts, "rejected") | {"fine": "pending"}


def test_folder_that_takes_the_name_of_its_nameless_neighbour_keeps_nobody_busy(plugin_dir: Path) -> None:
    nameless = plugin_dir / "Not A Name"
    nameless.mkdir()
    (nameless / "plugin.json").write_text("{")
    with daemon(host_toml=f'plugin_dirs = ["{plugin_dir}"]\n') as d:
        (name,) = (p["name"] for p in d.json("plugin", "list"))
        assert name.startswith("found-")
        thief = write_plugin(plugin_dir.parent / name)
        thief.rename(plugin_dir / name)

        def both() -> dict[str, str]:
            found = {p["name"]: p["found"] for p in d.json("plugin", "list")}
            return found if len(found) == 2 else {}

        found = wait_for(both)
        assert found[name] == str(plugin_dir / name)
        assert sorted(found.values()) == sorted([str(nameless), str(plugin_dir / name)])
