"""``./dev``: an option that a command does not know is refused before anything is done."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", ["demo", "setup", "shell"])
def test_unknown_option_is_refused_at_once(command: str) -> None:
    ran = subprocess.run(["sh", REPO / "dev", command, "--nonsense"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert f"{command}: takes no options, and got: --nonsense" in ran.stderr
