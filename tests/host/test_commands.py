"""A command that the tests fork does what a started one does: otherwise they would prove something else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import commands
from tests.support.timeouts import seconds


def both(
    monkeypatch: pytest.MonkeyPatch, *words: str, stdin: str | None = None
) -> list[subprocess.CompletedProcess[str]]:
    forked = commands.run(words, stdin=stdin, timeout=seconds(60))
    with monkeypatch.context() as changed:
        changed.setenv(commands.EXECUTE, "1")
        return [forked, commands.run(words, stdin=stdin, timeout=seconds(60))]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["plugin", "--help"], 0),
        (["nonsense"], 2),
        (["plugin", "show"], 2),
        (["--root", "/nonexistent", "plugin", "list", "--json"], 1),
        (["event", "types", "--json"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_forked_command_answers_as_a_started_one(monkeypatch: pytest.MonkeyPatch, words: list[str], code: int) -> None:
    monkeypatch.setenv("ISOLATOR_ROOT", "/nonexistent/other")
    forked, started = both(monkeypatch, *words)
    assert (forked.returncode, forked.stdout, forked.stderr) == (started.returncode, started.stdout, started.stderr)
    assert forked.returncode == code


def test_forked_command_has_the_input_folder_and_variables_of_its_caller(
    monkeypatch: pytest.MonkeyPatch, shared_dir: Path
) -> None:
    (shared_dir / "policy.toml").write_text("[limits]\nmemory = 'much'\n")
    monkeypatch.chdir(shared_dir)
    monkeypatch.setenv("ISOLATOR_ROOT", str(shared_dir))
    forked, started = both(monkeypatch, "policy", "check", "policy.toml")
    assert (forked.returncode, forked.stderr) == (started.returncode, started.stderr)
    assert "policy.toml:2" in forked.stdout + forked.stderr


def test_command_in_another_namespace_is_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    commands.run(["--version"], stdin=None, timeout=seconds(60))
    monkeypatch.setattr(commands, "_view", lambda: ("elsewhere",))
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(FileNotFoundError):
        commands.run(["--version"], stdin=None, timeout=seconds(60))
