"""The Debian package, built from this tree with the libraries at hand: two versions of it, without a network."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.timeouts import seconds

BUILD = Path(__file__).resolve().parents[2] / "packaging/build.py"
NEWER = "9.9.9"


def build(folder: Path) -> tuple[Path, Path]:
    """A package of this version, and one of a newer one."""
    run(sys.executable, "-I", str(BUILD), str(folder), "--here", "--plain")
    (package,) = folder.glob("isolator_*.deb")
    tree = folder / "tree"
    run("dpkg-deb", "-R", str(package), str(tree))
    from isolator import __version__

    for path in (
        tree / "DEBIAN/control",
        next(tree.glob("usr/lib/isolator/dist/lib/*/site-packages/isolator/__init__.py")),
    ):
        path.write_text(path.read_text().replace(__version__, NEWER))
    newer = folder / "newer.deb"
    run("dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(newer))
    shutil.rmtree(tree)
    return package, newer


def run(*command: str) -> str:
    """Run a command that has to succeed; its output."""
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=seconds(300)
    )
    assert result.returncode == 0, (command, result.stdout, result.stderr)
    return result.stdout
