"""Each mutation of the catalogue is noticed: in a copy of the tree that has it, a test that it names fails.

Not part of the default suite: ``sudo ./dev test --mutations`` (about a quarter of an hour).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mutations.catalogue import MUTATIONS, Mutation
from tests.support.leftovers import nothing_left
from tests.support.timeouts import seconds

TREE = Path(__file__).parents[2]
_LONGEST = 900
PASSED, FAILED = 0, 1
"""Exit codes of pytest."""


@dataclass
class Copy:
    """A copy of the generation that ``./dev`` made of the clone: tree, interpreter and command."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Copy:
        """Copy the running one; every user can read it."""
        running = TREE.parent
        shutil.copytree(running, folder, symlinks=True)  # with its times: what is compiled stays valid
        for file in (*folder.glob("lib/*/site-packages/*.pth"), folder / "bin/isolator"):
            file.write_text(file.read_text().replace(str(running), str(folder)))
        return cls(folder)

    def run(self, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        """Run tests of the copy until one fails, and remove what they leave on the host."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment["PATH"] = f"{self.folder}/bin:{environment['PATH']}"
        command = [
            f"{self.folder}/bin/{Path(sys.executable).name}", "-I", "-m", "pytest", "-x", "-q", "--leaks=off",
            "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests),
        ]  # fmt: skip
        with nothing_left(self.folder / "bin") as variables:
            return subprocess.run(
                command, cwd=self.folder / "src", env=environment | variables, capture_output=True, text=True,
                check=False, timeout=seconds(_LONGEST),
            )  # fmt: skip

    def noticed(self, mutation: Mutation) -> subprocess.CompletedProcess[str]:
        """Run the tests of a mutation in the tree with it; the tree is whole again afterwards."""
        path = self.folder / "src" / mutation.file
        whole, status = path.read_bytes(), path.stat()
        try:
            path.write_text(whole.decode().replace(mutation.old, mutation.new))
            return self.run(mutation.tests)
        finally:
            path.write_bytes(whole)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture(scope="module")
def copy() -> Iterator[Copy]:
    with tempfile.TemporaryDirectory(prefix="isolator-mutations-") as parent:
        Path(parent).chmod(0o755)
        yield Copy.make(Path(parent) / "copy")


@pytest.mark.timeout(seconds(_LONGEST))
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_noticed(copy: Copy, mutation: Mutation) -> None:
    result = copy.noticed(mutation)
    assert result.returncode == FAILED, f"it survived ({result.returncode})\n{result.stdout}{result.stderr}"


@pytest.mark.timeout(4 * seconds(_LONGEST))
def test_unchanged_copy_passes(copy: Copy) -> None:
    """A test that fails for another reason would notice nothing."""
    named = sorted({test for mutation in MUTATIONS for test in mutation.tests})
    result = copy.run(tuple(named))
    assert result.returncode == PASSED, result.stdout + result.stderr
