"""Many command lines at once, and a daemon killed in the middle of one: a plugin is there whole or not at all."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest

from tests.system.daemon import daemon
from tests.system.updates.plugins import make, version_that_answers, whole


def test_many_command_lines_at_once(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    name = "contended"
    folder = make(tmp_path / name, "1.0.0")
    second = make(tmp_path / "second" / name, "1.1.0")
    verbs = [
        ("plugin", "add", str(folder), "--yes"), ("plugin", "start", name), ("plugin", "remove", name, "--yes"),
        ("plugin", "update", name, str(second)), ("plugin", "restart", name),
    ]  # fmt: skip
    with daemon() as d:
        with ThreadPoolExecutor(20) as pool:
            results = list(pool.map(lambda i: d.cli(*verbs[i % len(verbs)], code=None), range(40)))
        for result in results:
            assert result.returncode in (0, 1, 2, 3), (result.args, result.stderr)
            assert "Traceback" not in result.stderr and result.stderr.count("\n") <= 1, result.stderr
        assert [r for r in results if r.returncode == 0]
        whole(d, name)
        d.cli("plugin", "remove", name, "--yes", code=None)
        whole(d, name)
        d.cli("plugin", "add", str(folder), "--yes")
        assert version_that_answers(d, name, "x") == "1.0.0"
        d.cli("audit", "verify")


@pytest.mark.wide
@pytest.mark.slow
def test_killed_in_the_middle_of_anything(tmp_path: Path) -> None:
    """The supervisor is killed at some moment of add, update and remove: what it finds at its start is whole."""
    name = "victim"
    folder = make(tmp_path / name, "1.0.0")
    with daemon() as d:
        for attempt in range(0, 8, 2):
            for words in (("add", str(folder), "--yes"), ("update", name, "--yes"), ("remove", name, "--yes")):
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
                whole(d, name)
                assert not list((d.root / "var/lib/isolator/plugins").glob(".staging-*"))
        assert d.stop() == 0
