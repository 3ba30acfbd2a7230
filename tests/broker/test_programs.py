"""Unmodified programs in real cages, on a pretend internet: they reach the granted name, and nothing else.

The same script for everybody: fetch each URL with whatever the language ships, print what came. Nothing is set but
the pretend authority's certificate, in the variable that each of them reads anyway.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.internet_servers import METADATA, OTHER, WEB
from tests.support.pretend_internet import PretendInternet
from tests.system.daemon import ECHO, daemon, event, wait_for, write_plugin

HOST_TOML = f'[network]\nresolvers = ["{WEB}"]\n'
GRANTED = "https://hooks.example.com/"
REFUSED = (
    "https://other.example.com/",
    "http://hooks.example.com/",
    f"http://{METADATA}/latest/meta-data/",
    f"https://{OTHER}/",
    "http://metadata.example.com/",
    "http://127.0.0.1:5432/",
    "http://45.0.0.2/",
    "http://rebind.example.com/",
)
EGRESS = ("hooks.example.com:443", "rebind.example.com:80", "metadata.example.com:80")
PYTHON = """\
import sys, urllib.request
for url in sys.argv[1:]:
    try:
        print(url, urllib.request.urlopen(url, timeout=10).read().decode())
    except OSError as error:
        print(url, "failed", type(error).__name__)
"""
SHELL = """\
for url; do
    if body=$(curl -s --max-time 10 "$url"); then echo "$url $body"; else echo "$url failed $?"; fi
done
"""
NODE = """\
(async () => {
    for (const url of process.argv.slice(1)) {
        try {
            console.log(url, await (await fetch(url, { signal: AbortSignal.timeout(10000) })).text());
        } catch (error) {
            console.log(url, "failed", String(error.cause && error.cause.code));
        }
    }
})();
"""
GO = """\
package main

import ("fmt"; "io"; "net/http"; "os"; "time")

func main() {
    client := http.Client{Timeout: 10 * time.Second}
    for _, url := range os.Args[1:] {
        response, err := client.Get(url)
        if err != nil {
            fmt.Println(url, "failed")
            continue
        }
        body, _ := io.ReadAll(response.Body)
        fmt.Println(url, string(body))
    }
}
"""


@pytest.fixture
def rebinding(pretend: PretendInternet) -> Iterator[None]:
    """A name server that tells a public address to who asks, and a private one to who connects."""
    answers = itertools.cycle([[WEB], [WEB], [METADATA], [METADATA]])
    pretend.internet.dns.records["rebind.example.com"] = lambda: next(answers)
    pretend.internet.dns.ttl = 0
    yield
    pretend.internet.dns.ttl = 60


@pytest.fixture(scope="module")
def shown(pretend: PretendInternet) -> Iterator[Path]:
    """A root-owned folder that cages may read: the certificate, and the compiled client."""
    folder = Path(f"/srv/isolator-shown-{os.getpid()}")
    folder.mkdir(mode=0o755)
    shutil.copy(pretend.directory / "ca.pem", folder)
    yield folder
    shutil.rmtree(folder)


def client(kind: str, folder: Path) -> list[str]:
    """The command of one kind of client, without its URLs; skips with the reason where its language is missing."""
    program = {"python": "python3", "curl": "curl", "node": "node", "go": "go"}[kind]
    found = shutil.which(program, path="/usr/bin:/usr/local/bin:/usr/local/go/bin")
    if found is None:
        pytest.skip(f"{program} is not installed")
    if kind == "go":
        (folder / "main.go").write_text(GO)
        cache = folder / "cache"
        subprocess.run(
            [found, "build", "-o", folder / "client", folder / "main.go"], check=True, cwd=folder,
            env={"GOCACHE": str(cache), "GOPATH": str(cache), "GOFLAGS": "-mod=mod", "HOME": str(folder),
                 "CGO_ENABLED": "0", "GOPROXY": "off", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        shutil.rmtree(cache)
        return [str(folder / "client")]
    if kind == "node":
        return [found, "-e", NODE, "--"]
    return [found, "-c", PYTHON] if kind == "python" else ["/bin/sh", "-c", SHELL, "sh"]


@pytest.mark.parametrize("kind", ["python", "curl", "node", pytest.param("go", marks=pytest.mark.wide)])
def test_program_under_isolator_run_reaches_the_granted_name_only(
    pretend: PretendInternet, shown: Path, rebinding: None, kind: str, tmp_path: Path
) -> None:
    command = client(kind, shown)
    root = tmp_path / "root"
    (root / "etc/isolator").mkdir(parents=True)
    (root / "etc/isolator/host.toml").write_text(HOST_TOML)
    variables = [f"{name}={shown}/ca.pem" for name in ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")]
    records = tmp_path / "records"
    pretend.internet.dns.queries.clear()
    result = subprocess.run(
        ["nsenter", f"--net=/proc/{os.getpid()}/fd/{pretend.host_fd}", "isolator", "--root", str(root), "run",
         *(word for rule in EGRESS for word in ("--egress", rule)), "--read", str(shown), "--audit", str(records),
         "--memory", "1G", "--cpu", "200%", "--", "env", *variables, *command, GRANTED, *REFUSED],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    check(result.stdout.splitlines())
    trail = [json.loads(line) for line in records.read_text().splitlines()]
    check_trail(pretend, trail)


def check(lines: list[str]) -> None:
    """One line for each URL: the granted one was answered, the others not."""
    assert lines[0] == f"{GRANTED} host=hooks.example.com from=45.0.0.2"
    assert len(lines) == 1 + len(REFUSED), lines
    for url, line in zip(REFUSED, lines[1:], strict=True):
        assert line.startswith(f"{url} failed"), line


def check_trail(pretend: PretendInternet, trail: list[dict[str, object]]) -> None:
    """Only the granted destination was let out, and every attempt that left the cage's loopback is on record."""
    connects = [r["data"] for r in trail if r["type"] == "net.connect"]
    assert {(c["name"], c["address"], c["port"]) for c in connects} == {("hooks.example.com", WEB, 443)}  # type: ignore[index]
    denied = json.dumps([r["data"] for r in trail if r["type"] in ("net.denied", "net.query")])
    for word in ("other.example.com", METADATA, OTHER, "metadata.example.com", "rebind.example.com", "45.0.0.2"):
        assert word in denied, word
    assert "other.example.com" not in pretend.internet.dns.queries


def test_plugin_of_a_daemon_reaches_the_granted_name_only(
    pretend: PretendInternet, shown: Path, rebinding: None, tmp_path: Path
) -> None:
    fetch = textwrap.indent(PYTHON.replace("sys.argv[1:]", repr((GRANTED, *REFUSED))), " " * 4)
    fetch = fetch.replace("print(", "print(file=out, *(").replace("decode())", "decode()))").replace("__)", "__))")
    script = ECHO.replace(
        '        with open(os.environ["PLUGIN_STATE_DIR"] + "/seen", "a") as seen:\n',
        '        out = open(os.environ["PLUGIN_STATE_DIR"] + "/fetched", "w")\n'
        + textwrap.indent(fetch, "    ")
        + '        out.close()\n        with open(os.environ["PLUGIN_STATE_DIR"] + "/seen", "a") as seen:\n',
    )
    script = script.replace(
        "import json, os, socket\n", "import json, os, socket\n    os.environ['SSL_CERT_FILE'] = CA\n"
    )
    script = script.replace("= CA", f"= {str(shown / 'ca.pem')!r}")
    pairs = [rule.partition(":") for rule in EGRESS]
    folder = write_plugin(
        tmp_path / "shown", script,
        sandbox={"network": {"egress": [{"host": name, "ports": [int(port)]} for name, _, port in pairs]}},
    )  # fmt: skip
    pretend.internet.dns.queries.clear()
    with daemon(host_toml=HOST_TOML, network=pretend.host_fd) as d:
        policies = d.root / "etc/isolator/policies"
        policies.mkdir(parents=True, exist_ok=True)
        (policies / "shown.toml").write_text(
            f'[grant]\nhooks = ["deploy.*"]\negress = {json.dumps(EGRESS)}\n[filesystem]\nread = ["{shown}"]\n'
        )
        d.cli("plugin", "add", str(folder), "--yes")
        emitted = d.json("event", "emit", "deploy.completed", event(1), "--wait")
        fetched = d.state_of("shown") / "fetched"
        wait_for(lambda: fetched.exists() and fetched.read_text().count("\n") == 1 + len(REFUSED), what=d.log.read_text)
        check(fetched.read_text().splitlines())
        wait_for(lambda: [r for r in d.records() if r["type"] == "net.closed"])
        trail = d.records()
        check_trail(pretend, trail)
        (connect,) = [r for r in trail if r["type"] == "net.connect"]
        assert connect["event_id"] == (emitted.get("event_id") or emitted["id"]), "the connection names no event"
        d.cli("audit", "verify")
        denied = d.json("plugin", "denials", "shown")
        assert len({json.dumps([one["type"], one["data"]], sort_keys=True) for one in denied}) == len(denied)
        by_rule = {(one["data"].get("name") or one["data"].get("address"), one["data"]["rule"]): one for one in denied}
        grant = by_rule["other.example.com", "not-granted"]["grant"]
        rules = [f"{name}:{port}" for name, _, port in pairs]
        assert grant["table"] == "grant"
        assert set(json.loads(grant["line"].removeprefix("egress = "))) == {*rules, "other.example.com:443"}
        assert by_rule[METADATA, "blocked-address"]["grant"]["file"] == "host.toml"
        text = d.cli("plugin", "denials", "shown").stdout
        assert f"in [grant] of policies/shown.toml:  {grant['line']}" in text
