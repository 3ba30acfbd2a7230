"""Plugins as ``isolator new`` writes them, built."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from host.authoring.languages import MODES
from tests.support.go import go_cache

NEEDS = {
    "python": "/usr/bin/python3", "node": "node", "typescript": "npm", "go": "go", "rust": "rustc", "sh": "perl",
}  # fmt: skip
KINDS = [(mode, language) for mode, languages in MODES.items() for language in languages]


def need(language: str) -> None:
    """Skip the test where a language is not there."""
    if shutil.which(NEEDS[language]) is None:
        pytest.skip(f"{NEEDS[language]} is not installed")


def environment(folder: Path) -> dict[str, str]:
    """The environment of builds and tests."""
    return {**os.environ, "GOCACHE": go_cache(folder)}


def new_plugin(folder: Path, mode: str, language: str) -> Path:
    """Write a plugin into a new folder."""
    need(language)
    words = ["isolator", "new", str(folder), "--lang", language, "--mode", mode]
    subprocess.run(words, check=True, capture_output=True)
    return folder


def build(folder: Path) -> None:
    """Build a plugin, if it is to be built."""
    if (folder / "Makefile").exists():
        subprocess.run(["make", "-s", "-C", str(folder)], check=True, env=environment(folder.parent))
