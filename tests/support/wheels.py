"""Wheels of a tree, and environments in which one is installed; without a network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SYSTEM_PYTHON = "/usr/bin/python3"
_PARTS = ("isolator", "host", "clients", "policies", "pyproject.toml", "README.md")


def need_builder() -> None:
    """Skip the test where the distribution's builder of wheels is not installed."""
    if subprocess.run([SYSTEM_PYTHON, "-I", "-c", "import setuptools, pip, wheel"], check=False).returncode:
        pytest.skip("needs apt-get install python3-pip python3-setuptools python3-wheel")


def copy_tree(place: Path) -> Path:
    """Copy what the wheels are built from; returns ``place``."""
    for part in _PARTS:
        source = REPO / part
        if source.is_dir():
            shutil.copytree(source, place / part)
        else:
            shutil.copy(source, place / part)
    return place


def build(tree: Path, wheelhouse: Path) -> Path:
    """Build the client's wheel and the main one of a copied tree, by the distribution's tools; returns their folder."""
    arguments = "wheel --quiet --no-index --no-build-isolation --no-deps --wheel-dir".split()
    for source in (tree / "clients/python", tree):
        _spell_licence(source / "pyproject.toml")
        subprocess.run([SYSTEM_PYTHON, "-I", "-m", "pip", *arguments, str(wheelhouse), str(source)], check=True)
    return wheelhouse


def install(wheelhouse: Path, environment: Path) -> Path:
    """Install the main wheel and the client's into a new virtual environment, which has every other dependency."""
    deps = Path(sys.prefix) / "deps"
    subprocess.run([SYSTEM_PYTHON, "-I", "-m", "venv", "--without-pip", str(environment)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "deps.pth").write_text(f"{deps / packages.relative_to(environment)}\n")
    pip = [str(deps / "bin/python3"), "-I", "-m", "pip", "--quiet", "--python", str(environment / "bin/python")]
    subprocess.run([*pip, "install", "--no-index", "--find-links", str(wheelhouse), "isolator"], check=True)
    return packages


def _spell_licence(project: Path) -> None:
    """Spell the licence for the distribution's setuptools, which may be older (Debian 12) than SPDX expressions."""
    text = re.sub(r'^license = (".*")$', r"license = { text = \1 }", project.read_text(), flags=re.MULTILINE)
    project.write_text(re.sub(r"^license-files = .*\n", "", text, flags=re.MULTILINE))
