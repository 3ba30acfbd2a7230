"""``plugin add --mcp``: packages of a pretend registry, fetched in a cage; registries and packages that are hostile."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from host.cli.packages.fetch import unpack
from tests.mcp.client import Client, text
from tests.support.mcp_servers import server
from tests.support.pretend_internet import pretend_internet
from tests.support.registry import HOST_TOML, Registry, link, tarball, wheel
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon

REPORT, END = b'{"programs": {}, "hashes": {"a@1": "sha256-x"}}\n', b'{"end": true}\n'
PYTHON = {"time_server/__init__.py": "def main():\n    from . import server\n"}
NODE = """#!/usr/bin/env node
const lines = require("readline").createInterface({input: process.stdin});
const say = (id, body) => console.log(JSON.stringify({jsonrpc: "2.0", id, ...body}));
lines.on("line", (line) => {
  const {id, method, params} = JSON.parse(line);
  if (id === undefined) return;
  if (method === "initialize") say(id, {result: {protocolVersion: params.protocolVersion, capabilities: {tools: {}},
    serverInfo: {name: "n", version: "1"}}});
  else if (method === "tools/list") say(id, {result: {tools: [{name: "echo", inputSchema: {type: "object"}}]}});
  else if (method === "tools/call") say(id, {result: {content: [{type: "text", text: require("@scope/needed")}]}});
  else say(id, {error: {code: -32601, message: "unknown"}});
});
"""
RAN = {"postinstall": "touch ran", "preinstall": "touch ran", "install": "touch ran", "prepare": "touch ran"}
needs_npm = pytest.mark.skipif(shutil.which("npm", path="/usr/local/bin:/usr/bin:/bin") is None, reason="needs npm")


class Packaged:
    """A daemon whose command line fetches packages in the pretend host's network."""

    def __init__(self, made: Daemon, registry: Registry, enter: list[str]) -> None:
        self.daemon, self.registry, self._enter = made, registry, enter

    def add(self, package: str, *words: str, code: int = 0) -> str:
        """``plugin add --mcp``; returns what it writes."""
        command = [
            *self._enter,
            "isolator",
            "--root",
            str(self.daemon.root),
            "plugin",
            "add",
            "--mcp",
            package,
            "--yes",
        ]
        ran = subprocess.run(
            [*command, *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            timeout=seconds(180),
        )  # fmt: skip
        assert ran.returncode == code, (ran.returncode, ran.stdout, ran.stderr)
        return ran.stdout + ran.stderr

    def folder(self, name: str) -> Path:
        """The registered files of a plugin."""
        (found,) = (self.daemon.root / "var/lib/isolator/plugins" / name).rglob("resolved.json")
        return found.parent


@pytest.fixture(scope="module")
def packaged() -> Iterator[Packaged]:
    with pretend_internet() as pretend:
        registry = Registry(pretend.internet, pretend.directory)
        toml = HOST_TOML.replace("CA", str(pretend.directory / "ca.pem")).replace("TIMEOUT", f"{seconds(60):.0f}s")
        with daemon(host_toml=toml, network=pretend.host_fd) as made:
            yield Packaged(made, registry, ["nsenter", f"--net=/proc/{os.getpid()}/fd/{pretend.host_fd}"])
        registry.closed.set()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not list(Path("/var/tmp").glob("isolator-package-*"))


def test_python_server_is_fetched_with_what_it_needs_and_used(packaged: Packaged) -> None:
    registry, d = packaged.registry, packaged.daemon
    needed = registry.pypi("needed", "2.0", {"needed.py": "X = 1\n"})
    script = "import needed\n" + server(eras="(NEW,)")
    own = registry.pypi(
        "time-server",
        "1.2",
        {**PYTHON, "time_server/server.py": script},
        requires=("needed",),
        script="time_server:main",
    )
    packaged.add("pypi:time-server==1.2", "--egress", "api.example.com:443")
    shown = d.json("plugin", "show", "time-server")
    assert (shown["version"], shown["manifest"]["transport"]["era"]) == ("1.2.0", "2026-07-28")
    assert shown["manifest"]["sandbox"]["network"]["egress"] == ["api.example.com:443"]
    (record,) = (one["data"] for one in d.records() if one["type"] == "package.resolved")
    assert record["hashes"] == {"needed@2.0": needed, "time-server@1.2": own} and record["by"] == "uid:0"
    assert record["digest"] == shown["digest"]
    d.cli("plugin", "grant", "time-server", "tool", "ec*")
    d.cli("plugin", "grant", "time-server", "caller", "root")
    d.cli("mcp", "approve", "time-server", "--yes")
    with Client(d, "time-server") as client:
        client.initialize()
        assert client.tools() == ["echo"] and text(client.call("echo", a=1)) == '{"a": 1}'
    d.cli("plugin", "revoke", "time-server", "caller", "0")
    with Client(d, "time-server") as client:
        assert "does not name uid 0" in client.initialize()["error"]["message"]


@needs_npm
@pytest.mark.wide
def test_node_server_is_fetched_and_no_script_of_a_package_runs(packaged: Packaged) -> None:
    registry, d = packaged.registry, packaged.daemon
    needed = registry.npm("@scope/needed", "1.0.0", {"index.js": 'module.exports = "needed"'}, scripts=RAN)
    own = registry.npm(
        "@scope/node-server", "3.1.4", {"dist/index.js": NODE}, scripts=RAN, bin="dist/index.js",
        dependencies={"@scope/needed": "^1.0.0"},
    )  # fmt: skip
    packaged.add("npm:@scope/node-server@3.1.4", "--name", "node")
    shown = d.json("plugin", "show", "node")
    assert shown["manifest"]["transport"]["era"] == "2025-11-25"
    (record,) = (one["data"] for one in d.records() if one["type"] == "package.resolved" and one["plugin"] == "node")
    assert record["hashes"] == {"@scope/needed@1.0.0": needed, "@scope/node-server@3.1.4": own}
    assert not list(packaged.folder("node").rglob("ran"))
    d.cli("plugin", "grant", "node", "tool", "echo")
    d.cli("plugin", "grant", "node", "caller", "0")
    d.cli("mcp", "approve", "node", "--yes")
    with Client(d, "node") as client:
        client.initialize()
        assert text(client.call("echo")) == "needed"


def _wrong_hash(registry: Registry) -> str:
    registry.pypi("bad", "1.0", PYTHON, script="time_server:main", sha256="0" * 64)
    return "pypi:bad==1.0"


def _huge(registry: Registry) -> str:
    registry.pypi("bad", "1.0", PYTHON, script="time_server:main")
    registry.files["/bad-1.0-py3-none-any.whl"] = 4 << 30
    return "pypi:bad==1.0"


def _climbing_wheel(registry: Registry) -> str:
    archive = wheel("bad", "1.0", PYTHON, script="time_server:main", raw={"../../../../climbed": "x"})
    registry.pypi("bad", "1.0", {}, archive=archive)
    return "pypi:bad==1.0"


def _source_alone(registry: Registry) -> str:
    setup = "open('/tmp/package/ran', 'w')\nfrom setuptools import setup\nsetup(name='bad', version='1.0')\n"
    registry.pypi("bad", "1.0", {}, archive=tarball({"setup.py": setup}), file="bad-1.0.tar.gz")
    return "pypi:bad==1.0"


def _other_package(registry: Registry) -> str:
    registry.pypi("bad", "1.0", {}, archive=wheel("other", "1.0", PYTHON, script="time_server:main"))
    return "pypi:bad==1.0"


def _npm_wrong_hash(registry: Registry) -> str:
    registry.npm("bad", "1.0.0", {"index.js": NODE}, bin="index.js", integrity=f"sha512-{'A' * 86}==")
    return "npm:bad@1.0.0"


def _npm_elsewhere(registry: Registry) -> str:
    registry.npm("bad", "1.0.0", {"index.js": NODE}, bin="index.js",
                 dependencies={"x": "https://other.example.com/x.tgz"})  # fmt: skip
    return "npm:bad@1.0.0"


def _npm_climbing(registry: Registry) -> str:
    """npm leaves links and names that climb out; then the program, a link, is not there."""
    body = '{"name": "bad", "version": "1.0.0", "bin": "passwd"}'
    climbing = tarfile.TarInfo("package/../../../climbed")
    archive = tarball({"package.json": body}, more=(link("package/passwd", "/etc/passwd"), climbing))
    registry.npm("bad", "1.0.0", {}, archive=archive, bin="passwd")
    return "npm:bad@1.0.0"


@pytest.mark.parametrize(
    ("package", "why"),
    [
        (_wrong_hash, "Expected sha256"),
        pytest.param(_huge, "No space left", marks=pytest.mark.wide),
        pytest.param(_climbing_wheel, "outside the target directory", marks=pytest.mark.wide),
        pytest.param(_source_alone, "No matching distribution", marks=pytest.mark.wide),
        pytest.param(_other_package, "", marks=pytest.mark.wide),
        pytest.param(_npm_wrong_hash, "EINTEGRITY", marks=[pytest.mark.wide, needs_npm]),
        pytest.param(_npm_elsewhere, "", marks=[pytest.mark.wide, needs_npm]),
        pytest.param(_npm_climbing, "is not there", marks=[pytest.mark.wide, needs_npm]),
    ],
)
def test_hostile_registry_gets_nothing_staged(packaged: Packaged, package: Callable[[Registry], str], why: str) -> None:
    written = packaged.add(package(packaged.registry), code=2 if package is _npm_climbing else 1)
    assert why in written, written
    assert "bad" not in [one["name"] for one in packaged.daemon.json("plugin", "list")]


@pytest.mark.wide
def test_slow_registry_is_given_up(packaged: Packaged) -> None:
    registry, toml = packaged.registry, packaged.daemon.root / "etc/isolator/host.toml"
    registry.pypi("bad", "1.0", PYTHON, script="time_server:main")
    registry.slow.add("/bad-1.0-py3-none-any.whl")
    before = toml.read_text()
    toml.write_text(before.replace(f'timeout = "{seconds(60):.0f}s"', 'timeout = "8s"'))
    try:
        assert "is not done in the time that it has" in packaged.add("pypi:bad==1.0", code=1)
    finally:
        toml.write_text(before)


def test_package_without_an_exact_version_is_refused(packaged: Packaged) -> None:
    for text_ in ("npm:server", "npm:server@latest", "pypi:server>=1", "pypi:server==", "gem:server@1", "server"):
        assert "names no package in one exact version" in packaged.add(text_, code=2)
    assert "HOST:PORT" in packaged.add("npm:server@1.0.0", "--egress", "nowhere", code=2)


@pytest.mark.parametrize(
    "output",
    [
        b"", b"{}\n", b"[]\n", b'{"programs": {}, "hashes": {}}\n', b'{"programs": {}, "hashes": {"a@1": ""}}\n',
        *(
            REPORT + json.dumps({"path": path, "size": 1, "executable": True}).encode() + b"\nx" + END
            for path in ("../x", "/x", "a//x", "a/../../x", "", ".", "start", "plugin.json/x", "a\0b", "x" * 300)
        ),
        REPORT + b'{"path": "a", "size": -1}\n' + END,
        REPORT + b'{"path": "a", "size": 1e99}\n' + END,
        REPORT + b'{"path": "a", "size": 5}\nx',
        REPORT + b'{"path": "a", "size": 1}\nx{"path": "a/b", "size": 1}\nx' + END,
        REPORT + b'{"path": "a", "size": 1}\nx{"path": "a", "size": 1}\nx' + END,
        REPORT + b"[" * 100_000 + b"\n",
    ],
)  # fmt: skip
def test_output_of_a_resolver_that_was_taken_over_leads_nowhere(tmp_path: Path, output: bytes) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises((ValueError, OSError)):
        unpack(io.BytesIO(output), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_output_of_a_resolver_becomes_plain_files(tmp_path: Path) -> None:
    line = b'{"path": "a/b", "size": 2, "executable": true}\nxy'
    resolved = unpack(io.BytesIO(REPORT + line + END), tmp_path)
    assert (resolved.files, (tmp_path / "a/b").read_bytes()) == (1, b"xy")
    assert (tmp_path / "a/b").stat().st_mode & 0o7777 == 0o755
