"""The launcher, and with it every cage's pid 1, holds the standard library, python-prctl and light modules alone."""

from __future__ import annotations

import json
import subprocess
import sys

from isolator.launcher import client

LOADED = """
import json, sys
before = set(sys.modules)
sys.path[:0] = sys.argv[1:]
import isolator.launcher.server
print(json.dumps({name: getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - before}))
"""
FURTHER = {"prctl", "_prctl"}
"""python-prctl: the one dependency of the launcher."""


def _loaded() -> dict[str, str | None]:
    command = [sys.executable, "-I", "-S", "-c", LOADED, *client._import_paths()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def test_the_launcher_imports_the_standard_library_and_light_modules_alone() -> None:
    loaded = {name.partition(".")[0] for name in _loaded()}
    assert loaded - set(sys.stdlib_module_names) == FURTHER | {"isolator"}


def test_the_launcher_imports_no_policy_and_no_other_process() -> None:
    own = {name.split(".")[1] for name in _loaded() if name.startswith("isolator.")}
    assert own == {"errors", "ipc", "launcher", "layers", "linux"}
