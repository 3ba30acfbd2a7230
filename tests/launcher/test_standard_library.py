"""The launcher, and with it every cage's pid 1, holds the standard library and light modules alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from isolator.launcher import client

LOADED = """
import importlib, json, sys
before = set(sys.modules)
sys.path[:0] = sys.argv[2:]
importlib.import_module(sys.argv[1])
print(json.dumps({name: getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - before}))
"""
LAUNCHERS: dict[str, set[str]] = {"isolator.launcher.server": set(), "isolator.standalone.launcher": {"standalone"}}
"""The launcher of a daemon, and the one that ``isolator run`` forks after this import; with their own packages."""


def _loaded(module: str) -> dict[str, str | None]:
    command = [sys.executable, "-I", "-S", "-c", LOADED, module, client._IMPORT_PATH]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("module", LAUNCHERS)
def test_the_launcher_imports_the_standard_library_and_light_modules_alone(module: str) -> None:
    loaded = {name.partition(".")[0] for name in _loaded(module)}
    assert loaded - set(sys.stdlib_module_names) == {"isolator"}
    assert not loaded & {"pathlib", "urllib", "ipaddress", "dataclasses", "asyncio"}, (
        "a sixth of its memory, for a path"
    )


@pytest.mark.parametrize(("module", "besides"), LAUNCHERS.items())
def test_the_launcher_imports_no_policy_and_no_other_process(module: str, besides: set[str]) -> None:
    own = {name.split(".")[1] for name in _loaded(module) if name.startswith("isolator.")}
    assert own == {"base", "errors", "ipc", "launcher", "layers", "linux"} | besides
