"""The environment that the service runs from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from isolator.cli import environment

# No guard of __main__, as the command itself has none, and workers that import their main module anew, as those of
# Python 3.13 and later are.
PROGRAM = """
import multiprocessing, sys
from pathlib import Path
multiprocessing.set_start_method("forkserver", force=True)
from isolator.cli.environment import compile_all
compile_all(Path(sys.argv[1]))
print("done")
"""


def test_bytecode_is_written_whatever_starts_the_workers_of_python(tmp_path: Path) -> None:
    modules = [tmp_path / "packages" / name for name in ("one.py", "inner/two.py", "no_python.py")]
    for module in modules:
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text("x = 1\n")
    modules[2].write_text("no python\n")
    program = tmp_path / "program"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-I", str(program), str(tmp_path / "packages")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    found = {path.name.split(".")[0] for path in tmp_path.rglob("*.pyc")}
    assert found == {"one", "two"}


def test_environment_stays_as_long_as_a_process_runs_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "BASE", tmp_path)
    monkeypatch.setattr(environment, "CURRENT", tmp_path / "current")
    old, current = tmp_path / "env.old", tmp_path / "env.new"
    for folder in (old, current):
        folder.mkdir()
    environment.CURRENT.symlink_to(current.name)
    command = [sys.executable, "-c", "print(flush=True); input()", old / "bin/isolator"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()  # it has its arguments
        environment.remove_old()
        assert old.exists() and current.exists()
        process.communicate(b"\n")
    environment.remove_old()
    assert current.exists() and not old.exists()
