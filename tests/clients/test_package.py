"""The published client as a package: on its own, permissive, small, and of one mind with the control socket."""

from __future__ import annotations

import email
import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

import isolator_client
from host.control.verbs import listing, result_keys, verbs
from isolator.cli import environment
from isolator_client import calls
from isolator_client.protocol import TICKETED
from tests.support import wheels
from tests.support.wheels import REPO, SYSTEM_PYTHON

PACKAGE = REPO / "clients/python"

# Imports every module and every public name, and prints the packages that this has loaded.
ALONE = """
import importlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
import isolator_client
for file in pathlib.Path(isolator_client.__file__).parent.glob("*.py"):
    importlib.import_module(f"isolator_client.{file.stem}".removesuffix(".__init__"))
for name in isolator_client.__all__:
    getattr(isolator_client, name)
print(sorted({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names - {"__main__"}))
"""


def _python(*arguments: str) -> str:
    return subprocess.run([SYSTEM_PYTHON, "-I", *arguments], check=True, capture_output=True, text=True).stdout


def test_it_needs_the_standard_library_alone() -> None:
    assert _python("-S", "-c", ALONE, str(PACKAGE)) == "['isolator_client']\n"


def test_waiting_needs_neither_asyncio_nor_anything_heavy() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from isolator_client import Client, UsageError;"
        "print({'asyncio', 'threading', 'logging', 'dataclasses', 'hashlib', 'ssl'} & set(sys.modules))"
    )
    assert _python("-S", "-c", code, str(PACKAGE)) == "set()\n"


def test_no_such_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = isolator_client.Nothing


def test_every_file_names_its_licence() -> None:
    sources = [*(PACKAGE / "isolator_client").glob("*.py"), PACKAGE / "pyproject.toml"]
    assert len(sources) > 8
    for path in sources:
        assert "# SPDX-License-Identifier: Apache-2.0\n" in path.read_text()[:200], path
    assert "Apache License" in (PACKAGE / "LICENSE").read_text()[:200]


# Of one mind with the daemon


class _Noted(dict[str, Any]):
    """Answer that notes the keys that are read."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)


STAGED = calls.Staged("token", "x", "1", "0", False, False, {}, (), (), ())
CALLS = {
    "emit": calls.emit("deploy.completed", {}, "key", 60.0, "00-1-2-03", "alice"),
    "wait": calls.wait("ev_1", 1.0),
    "register_event": calls.register_event("backup.failed", {"type": "object"}, "volume", 1, breaking=True),
    "unregister_event": calls.unregister_event("backup.failed"),
    "serve": calls.register_method("a.get", "read:a"),
    "unserve": calls.unregister_method("a.get"),
    "health": calls.health("slack"),
    "stage": calls.stage({"path": "/x"}, name="x", hooks=["a.b"], update="x", config={"a": "b"}),
    "commit": calls.commit(STAGED, {"a": "b"}),
    "update": calls.update(STAGED, {"a": "b"}, True),
    "discard": calls.discard(STAGED),
    "plugins": calls.plugins(),
    "audit": calls.follow({"after": 1}),
    "audit with lines": calls.follow({"lines": 1}),
    "answer": calls.Call("api.answer", {"call": 1, "result": {}}, dict),
    "refusal": calls.Call("api.answer", {"call": 1, "error": {"code": 1, "message": "x"}}, dict),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_control_socket_offers_each_verb_and_takes_its_parameters(name: str) -> None:
    call = CALLS[name]
    request = verbs()[call.method]
    given = json.loads(json.dumps(call.params))
    assert set(given) <= set(listing()[call.method]["params"])
    request.parse(given)


@pytest.mark.parametrize("name", CALLS)
def test_the_client_reads_keys_that_the_answer_has(name: str) -> None:
    call = CALLS[name]
    keys = result_keys(verbs()[call.method].spec.result)
    answer = _Noted({key: [] for key in keys})
    call.read(answer)
    assert answer.seen <= keys.keys()


def test_the_readme_tells_the_role_of_each_call() -> None:
    rows = re.findall(r"^\| `(\w+)\(.*\| (\w*) *\|$", (PACKAGE / "README.md").read_text(), re.MULTILINE)
    told = {name: role for name, role in rows if name in CALLS}
    assert told == {name: listing()[call.method]["role"] for name, call in CALLS.items() if name in told}
    assert set(told) == {
        *("emit", "wait", "register_event", "unregister_event", "serve", "unserve", "audit", "plugins", "health"),
        *("stage", "commit", "update", "discard"),
    }


def test_the_guide_tells_the_words_of_each_ticket() -> None:
    section = (PACKAGE.parents[1] / "docs/embedding.md").read_text().partition("## Tickets")[2].partition("\n## ")[0]
    told = {}
    for row in re.findall(r"^   \| (`plugin\..*) \|$", section, re.MULTILINE):
        named, words = row.split(" | ")
        for verb in re.findall(r"`(plugin\.\w+)`", named):
            told[verb] = tuple(word.split()[0].strip("`") for word in words.split(", ")[1:])
    assert told == {verb: words for verb, words in TICKETED.items() if verb != "plugin.stage"}


def test_the_readme_tells_each_error() -> None:
    rows = re.findall(r"^\| `(\w+Error)` \| `(\w+)`", (PACKAGE / "README.md").read_text(), re.MULTILINE)
    assert {code: name for name, code in rows} == {
        code: kind.__name__ for code, kind in isolator_client.errors.CLASSES.items()
    }


# The two wheels


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both wheels, built from a copy of the tree by the distribution's tools and without a network."""
    wheels.need_builder()
    place = tmp_path_factory.mktemp("wheels")
    return wheels.build(wheels.copy_tree(place / "clone"), place / "out")


def _metadata(wheel: Path) -> tuple[set[str], Any]:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (found,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        return names, email.message_from_bytes(archive.read(found))


def test_the_clients_wheel_holds_the_client_and_nothing_else(wheelhouse: Path) -> None:
    (wheel,) = wheelhouse.glob("isolator_client-*-py3-none-any.whl")
    names, metadata = _metadata(wheel)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"isolator_client"}
    assert {"isolator_client/py.typed", "isolator_client/blocking.py", "isolator_client/aio.py"} <= names
    assert any(name.endswith("LICENSE") for name in names)
    assert (metadata["License"], metadata.get_all("Requires-Dist")) == ("Apache-2.0", None)
    assert metadata["Version"] == isolator_client.__version__


def test_the_main_wheel_depends_on_it_and_a_wheelhouse_brings_both(wheelhouse: Path, tmp_path: Path) -> None:
    (wheel,) = wheelhouse.glob("isolator-*.whl")
    names, metadata = _metadata(wheel)
    assert not any(name.startswith(("isolator_client", "clients")) for name in names)
    assert any(line.startswith("isolator-client") for line in metadata.get_all("Requires-Dist"))
    # Installed in an environment that has every other dependency, and no index to ask.
    packages = wheels.install(wheelhouse, tmp_path)
    assert {path.name for path in packages.glob("isolator*")} >= {"isolator", "isolator_client"}
    _runs(tmp_path)
    unit = subprocess.run([tmp_path / "bin/isolator", "install", "--print-unit"], check=True, capture_output=True)
    assert f"ExecStart={environment.CURRENT}/bin/isolator" in unit.stdout.decode()


def test_an_environment_made_from_a_clone_brings_both(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "BASE", shared_dir / "opt")
    monkeypatch.setattr(environment, "CURRENT", shared_dir / "opt/current")
    environment.make_stable()
    _runs(shared_dir / "opt/current")


def test_service_of_a_virtual_environment_runs_from_a_copy_that_pip_never_writes_over(
    wheelhouse: Path, shared_dir: Path
) -> None:
    virtual, base = shared_dir / "virtual", shared_dir / "opt"
    wheels.install(wheelhouse, virtual)
    code = f"""
from pathlib import Path
from isolator.cli import environment
environment.BASE = Path({str(base)!r})
environment.CURRENT = environment.BASE / "current"
environment.make_stable()
print(environment.program())
"""
    made = subprocess.run([virtual / "bin/python3", "-I", "-c", code], capture_output=True, text=True, check=True)
    assert Path(made.stdout.strip()) == base / "current/bin/isolator"
    shutil.rmtree(virtual)
    _runs(base / "current")
    assert (base / "current/share/isolator/policies/host.toml").exists()


def _runs(prefix: Path) -> None:
    """Whether the command line of this environment runs on its own client, and a platform can import PluginHost."""
    command = [prefix / "bin/isolator", "--root", "/nonexistent", "plugin", "list"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, "the daemon is not running" in ran.stderr) == (1, True), ran.stderr
    code = "import isolator_client; from host import PluginHost; print(isolator_client.__file__)"
    script = [prefix / "bin/python3", "-I", "-c", code]
    found = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(prefix)
