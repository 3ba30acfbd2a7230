"""Secrets of a plugin that does everything wrong with them: afterwards they are found nowhere.

Planted are a value typed on standard input, one from a file, and a whole file. The plugin prints them, answers with
them, logs them through the host API, dies of an exception that shows them, and crashes where a core dump would be
made. Then every file below the root, every listing, and what other users of the machine can read is searched.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, alive, daemon, event, wait_for, write_plugin

TOKEN = "tok-7f3a/SECRET+value=1"
PASSWORD = "pass word \u00e9\u00e8 0451"
CERTIFICATE = (
    "-----BEGIN KEY-----\nMIIplanted+in/a/file0123456789\nsecondline+of/the/file9876543210\n-----END KEY-----\n"
)
PLANTED = {
    form
    for secret in (TOKEN, PASSWORD, *CERTIFICATE.splitlines()[1:3])
    for form in (
        secret,
        json.dumps(secret)[1:-1],
        urllib.parse.quote(secret, safe=""),
        base64.b64encode(secret.encode()).decode().rstrip("="),
    )
}

LEAKY = """\
    #!/usr/bin/python3
    import base64, json, os, socket, sys, urllib.parse
    token, password = os.environ["TOKEN"], os.environ["PASSWORD"]
    certificate = open(os.environ["CERTIFICATE"]).read()
    everything = f"{token} {password} {certificate}"
    host = socket.socket(socket.AF_UNIX)
    host.connect(os.environ["PLUGIN_HOST_SOCKET"])
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    while True:
        connection, _ = server.accept()
        request = json.loads(connection.recv(4096))
        kind = request["params"]["deployment_id"]
        print(everything, json.dumps(everything), urllib.parse.quote(everything, safe=""), flush=True)
        for secret in (token, password, *certificate.splitlines()):
            print(base64.b64encode(secret.encode()).decode(), urllib.parse.quote(secret, safe=""), file=sys.stderr)
        line = {"jsonrpc": "2.0", "id": 1, "method": "log.write", "params": {"level": "info", "message": everything}}
        host.sendall(json.dumps(line).encode() + b"\\n")
        if kind == "dcrash":
            os.abort()
        if kind == "dtraceback":
            raise ValueError(everything)
        if kind == "dgarbage":
            connection.sendall(everything.encode())
        elif kind == "derror":
            error = {"code": -31001, "message": everything, "data": everything}
            connection.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "error": error}).encode() + b"\\n")
        else:
            result = {"status": "ok", "message": everything, token: password}
            connection.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "result": result}).encode() + b"\\n")
        connection.close()
"""
SCHEMA = {
    "token": {"type": "string", "secret": True, "required": True},
    "password": {"type": "string", "secret": True},
    "certificate": {"type": "file", "secret": True},
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon after everything has gone wrong."""
    folder = tmp_path_factory.mktemp("planted")
    plugin = write_plugin(
        folder / "leaky", LEAKY, config_schema=SCHEMA, permissions=["log"], delivery={"attempts": 1}
    )  # fmt: skip
    (folder / "password").write_text(PASSWORD + "\n")
    (folder / "certificate").write_text(CERTIFICATE)
    with daemon(host_toml='[restart]\nbackoff_min = "0.1s"\ncrashes = 20\n') as d:
        given = ("token=-", f"password=@{folder / 'password'}", f"certificate=@{folder / 'certificate'}")
        words = [word for value in given for word in ("--config", value)]
        d.cli("plugin", "add", str(plugin), "--yes", *words, stdin=TOKEN + "\n")
        for kind in ("fine", "garbage", "error", "traceback", "crash"):
            emitted = d.json("event", "emit", "deploy.completed", event(kind))["id"]
            wait_for(
                lambda emitted=emitted: (
                    d.json("event", "show", emitted)["deliveries"][0]["state"] in ("ok", "dead", "quarantined")
                )
            )
        d.cli("config", "rotate-key")
        d.cli("plugin", "restart", "leaky")
        yield d


def test_no_file_holds_them(planted: Daemon) -> None:
    searched = []
    for path in planted.root.rglob("*"):
        # The plugin's own folder belongs to it: what it writes there is its own.
        if path.is_file() and not path.is_symlink() and "state/leaky" not in str(path):
            data = path.read_bytes()
            found = [form for form in PLANTED if form.encode() in data]
            assert not found, (path, found)
            searched.append(path.name)
    assert {"host.db", "audit.jsonl", "leaky.log", "serve.log"} <= set(searched)
    log = (planted.root / "var/log/isolator/plugins/leaky.log").read_text()
    assert log.count("[redacted]") > 20, "the plugin did not print them at all"


@pytest.mark.parametrize(
    "words",
    [
        ("plugin", "list"),
        ("plugin", "show", "leaky"),
        ("plugin", "explain", "leaky"),
        ("plugin", "config", "leaky"),
        ("plugin", "config", "leaky", "get", "token"),
        ("plugin", "logs", "leaky"),
        ("plugin", "denials", "leaky"),
        ("event", "list"),
        ("event", "dead"),
        ("audit", "query"),
        ("plugin", "config", "leaky", "set", "nonsense=1"),
    ],
    ids=" ".join,
)
def test_no_listing_shows_them(planted: Daemon, words: tuple[str, ...]) -> None:
    for more in ((), ("--json",)):
        result = planted.cli(*words, *more, code=None)
        found = [form for form in PLANTED if form in result.stdout + result.stderr]
        assert not found, (words, found)


def test_other_users_see_nothing_of_them(planted: Daemon) -> None:
    pid = planted.json("plugin", "show", "leaky")["pid"]
    script = (
        f"cat /proc/[0-9]*/cmdline; cat /proc/[0-9]*/environ; cat {planted.root}/var/lib/isolator/host/*; ps auxeww"
    )
    seen = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", "sh", "-c", script],
        capture_output=True, check=False,
    )  # fmt: skip
    assert b"serve" in seen.stdout
    assert not [form for form in PLANTED if form.encode() in seen.stdout + seen.stderr]
    # Root does find them where they have to be: the search itself is not blind.
    environments = b"".join(
        (Path(f"/proc/{process}") / "environ").read_bytes() for process in _group_of(pid) if alive(process)
    )
    assert TOKEN.encode() in environments


def test_no_dump_holds_them(planted: Daemon) -> None:
    """Neither of the sidecar that aborted nor of the host, which knows them all."""
    host = planted.service_pid("host.service")
    for pid in (*_group_of(planted.json("plugin", "show", "leaky")["pid"]), host, planted.process.pid):  # type: ignore[union-attr]
        assert int(Path(f"/proc/{pid}/coredump_filter").read_text(), 16) == 0, pid
    for pid in _group_of(planted.json("plugin", "show", "leaky")["pid"]):
        (line,) = [row for row in Path(f"/proc/{pid}/limits").read_text().splitlines() if row.startswith("Max core")]
        assert line.split()[4:6] == ["1", "1"], "neither a file nor a start of the host's core handler (layers/rlimits)"
    assert Path(f"/proc/{host}/mem").stat().st_uid == 0, "the host can be read by other processes of its user"
    os.kill(host, signal.SIGABRT)
    wait_for(lambda: not alive(host))
    wait_for(lambda: planted.service_pid("host.service", missing_ok=True) not in (0, host), seconds(30))
    assert not [path for path in planted.root.rglob("core*") if path.is_file()]
    assert not list(Path("/").glob("core*"))


def _group_of(pid: int) -> list[int]:
    """The processes of a sidecar's cgroup: its init and what it started."""
    line = Path(f"/proc/{pid}/cgroup").read_text().splitlines()[-1].rpartition(":")[2]
    (mount,) = [m for m in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup") if Path(f"{m}/cgroup.procs").exists()][:1]
    return [int(word) for word in Path(f"{mount}{line}/cgroup.procs").read_text().split()]
