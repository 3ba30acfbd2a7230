"""``isolator new`` for each language: what its README says is run as it stands, in a whole daemon."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.events import BUILT_IN, OPERATIONAL
from tests.host.test_new import EACH, SOURCES, WITHOUT_BUILDS
from tests.support.go import go_cache
from tests.support.new_plugins import need
from tests.system.daemon import Daemon, daemon, wait_for

AGREE = re.compile(r"^(isolator plugin add .*)$", re.MULTILINE)


def _new(parent: Path, language: str) -> Path:
    need(language)
    folder = parent / f"my-{language}"
    subprocess.run(["isolator", "new", str(folder), "--lang", language], check=True, capture_output=True)
    return folder


def _run(script: str, folder: Path, **environment: str) -> str:
    ran = subprocess.run(
        ["sh", "-eu", "-c", script], cwd=folder, check=False, timeout=280, capture_output=True, text=True,
        env={**os.environ, "GOCACHE": go_cache(folder.parent), **environment}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert ran.returncode == 0, (script, ran.stdout, ran.stderr)
    return ran.stdout


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon() as d:
        yield d


@pytest.mark.parametrize("language", EACH)
def test_what_the_readme_says_works_as_written(running: Daemon, tmp_path: Path, language: str) -> None:
    folder = _new(tmp_path, language)
    name, root = folder.name, str(running.root)
    trial, first, second, publish = re.findall(
        r"^```\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert "{{" not in trial + first + second
    # Run by tests/authoring/test_dev.py and test_trial.py.
    assert {"sudo isolator dev .", "sudo isolator plugin test ."} <= {
        line.partition("  ")[0] for line in trial.split("\n")
    }
    try:
        # Nobody is at a terminal to agree; everything else is as it stands.
        shown = _run(AGREE.sub(r"\1 --yes", first), folder, ISOLATOR_ROOT=root)
        assert f"added {name} 0.1.0" in shown
        row = running.json("event", "list", "--limit", "1")[0]
        (delivery,) = row["deliveries"]
        assert (delivery["plugin"], delivery["state"]) == (name, "ok"), (
            row,
            running.cli("plugin", "logs", name).stdout,
        )
        wait_for(lambda: "deploy.completed project-1" in running.cli("plugin", "logs", name).stdout)

        source = folder / SOURCES[language].format(name=name)
        manifest = json.loads((folder / "plugin.json").read_text())
        (folder / "plugin.json").write_text(json.dumps(manifest | {"version": "0.2.0"}))
        source.write_text(source.read_text() + ("# " if language in ("python", "sh") else "// ") + "changed\n")
        assert f"{name} 0.2.0 is in use now" in _run(second, folder, ISOLATOR_ROOT=root)
        example = running.cli("event", "types", "deploy.completed", "--example").stdout
        emitted = running.json("event", "emit", "deploy.completed", example, "--wait")
        assert [d["state"] for d in emitted["deliveries"]] == ["ok"]

        *publishing, certifying = publish.splitlines()
        assert certifying.startswith("sudo isolator certify ")  # tests/authoring/test_certify.py does, of each kind
        assert f"signed {name} 0.2.0" in _run("\n".join(publishing), folder)
        package = tmp_path / f"{name}-0.1.0.isolator"
        assert f"{name} 0.2.0 is in use" in running.cli("plugin", "update", name, str(package)).stdout
    finally:
        running.cli("plugin", "remove", name, "--yes", code=None)


@pytest.mark.parametrize("event", [kind.name for kind in BUILT_IN if not kind.name.startswith(OPERATIONAL)])
def test_example_of_every_event_is_a_payload_that_is_accepted(running: Daemon, event: str) -> None:
    running.cli("event", "emit", event, running.cli("event", "types", event, "--example").stdout)


@pytest.mark.parametrize("language", WITHOUT_BUILDS)
def test_a_reply_ends_the_connection(tmp_path: Path, language: str) -> None:
    """Hosts that read to end of file get there, for each of several events in a row."""
    folder = _new(tmp_path, language)
    if (folder / "Makefile").exists():
        _run("make -s", folder)
    path = str(tmp_path / "s")
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [str(folder / folder.name)], cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        env={"PLUGIN_SOCKET": path, "PATH": os.environ["PATH"]},
    )  # fmt: skip
    try:
        for number in (1, 2):
            answer = _ask(path, number)
            assert json.loads(answer) == {"jsonrpc": "2.0", "id": number, "result": {"status": "ok"}}
    finally:
        process.kill()
        process.wait()
        log.close()


def _ask(path: str, number: int) -> bytes:
    params = {"project_id": "shop", "_meta": {"id": "ev_1"}}
    request = {"jsonrpc": "2.0", "method": "deploy.completed", "params": params, "id": number}
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(10)
        wait_for(lambda: _connected(host, path))
        host.sendall(json.dumps(request, separators=(",", ":")).encode() + b"\n")
        answer = b""
        while chunk := host.recv(4096):
            answer += chunk
        return answer


def _connected(host: socket.socket, path: str) -> bool:
    try:
        host.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True
