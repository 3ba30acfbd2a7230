"""What went wrong for a plugin is visible, and told apart: refused, failed, or a limit that it ran into.

And a viewer sees it without access to the trail's files, by searches that stand behind everything else.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from psutil import STATUS_STOPPED, NoSuchProcess, Process

from tests.support.internet_servers import OTHER, WEB, run_in
from tests.support.pretend_internet import pretend_internet
from tests.support.timeouts import seconds
from tests.system.daemon import ECHO, Daemon, daemon, event, wait_for, write_plugin

VIEWER, STRANGER = 61996, 61995
HOST_TOML = f"""\
[roles]
viewer = [{VIEWER}]
[network]
resolvers = ["{WEB}"]
[restart]
backoff_min = "0.1s"
[audit]
snapshot_interval = "1s"
"""
POLICY = """\
[grant]
hooks = ["deploy.*"]
egress = ["*.example.com:443,9999"]
[limits]
memory = "48M"
tasks = 16
[filesystem]
state = "1M"
tmp = "1M"
"""
WORK = """\
    import threading
    def attempt(host, port):
        try:
            socket.create_connection((host, port), 30).recv(1)
        except OSError:
            pass
    def network():
        places = [("hooks.example.com", 9999), ("other.example.com", 443), ("dead.example.com", 443)]
        places += [("loop.example.com", 443), ("hooks.example.com", 25)]
        threads = [threading.Thread(target=attempt, args=place) for place in places]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    def memory():
        held = [bytearray(1 << 20) for _ in range(200)]
    def tasks():
        for _ in range(40):
            if os.fork() == 0:
                time.sleep(60)
    def disk():
        with open(os.environ["PLUGIN_STATE_DIR"] + "/fill", "wb", buffering=0) as file:
            while file.write(bytes(4096)) == 4096:
                pass
    def tmp():
        with open("/tmp/fill", "wb", buffering=0) as file:
            while file.write(bytes(4096)) == 4096:
                pass
    def work(kind):
        {"network": network, "memory": memory, "tasks": tasks, "disk": disk, "tmp": tmp}.get(kind, str)()
"""
SCRIPT = (
    ECHO.replace("import json,", "import time, json,")
    .replace('    path = os.environ["PLUGIN_SOCKET"]\n', f'{WORK}    path = os.environ["PLUGIN_SOCKET"]\n')
    .replace(
        '        with open(os.environ["PLUGIN_STATE_DIR"] + "/seen", "a") as seen:\n'
        '            seen.write(params["deployment_id"] + "\\n")\n',
        '        try: work(params["project_id"])\n        except OSError as error: print(error, flush=True)\n',
    )
)


@pytest.fixture(scope="module")
def d(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose plugin has had all its troubles."""
    folder = write_plugin(
        tmp_path_factory.mktemp("plugins") / "unlucky", SCRIPT, delivery={"attempts": 1, "timeout": "60s"},
        sandbox={"network": {"egress": ["*.example.com:443,9999"]}, "resources": {"memory": "512M", "tasks": 16},
                 "filesystem": {"tmp": "4M"}},
    )  # fmt: skip
    with pretend_internet() as pretend:
        run_in(pretend.host_fd, "ip", "route", "add", "unreachable", f"{OTHER}/32")
        records = pretend.internet.dns.records
        records["loop.example.com"], records["pool.example.com"] = ["pool.example.com"], ["loop.example.com"]
        with daemon(host_toml=HOST_TOML, network=pretend.host_fd) as made:
            policies = made.root / "etc/isolator/policies"
            policies.mkdir(parents=True, exist_ok=True)
            (policies / "unlucky.toml").write_text(POLICY)
            made.cli("plugin", "add", str(folder), "--yes")
            for kind in ("network", "tasks", "disk", "tmp"):
                made.cli("event", "emit", "deploy.completed", event(1, project_id=kind), "--wait")
                if kind == "tmp":  # what is in it ends with the run: a snapshot has to see it
                    wait_for(lambda: [r for r in made.records() if 0 <= r["data"].get("tmp_free", -1) < 1 << 14])
                made.cli("plugin", "stop", "unlucky")
            made.cli("event", "emit", "deploy.completed", event(2, project_id="memory"), "--wait", code=None)
            wait_for(lambda: [r for r in made.records() if r["data"].get("oom_kills")])
            made.cli("plugin", "stop", "unlucky")  # no snapshot comes while its records are compared
            yield made


def rows(d: Daemon) -> dict[str, dict[str, Any]]:
    """The rows of ``denials`` by what they are about."""
    found = {}
    for row in d.json("plugin", "denials", "unlucky"):
        data = row["data"]
        found[f"{row['kind']} {data.get('limit') or data.get('error') or data.get('rule') or data.get('call')}"] = row
    return found


@pytest.mark.parametrize(
    ("key", "name", "why"),
    [
        ("failure econnrefused", "hooks.example.com", "refused by the other side"),
        ("failure ehostunreach", "other.example.com", "unreachable"),
        ("failure etimedout", "dead.example.com", "timed out"),
        ("failure upstream", "loop.example.com", "the host's resolver gave no answer"),
        ("refusal port", "hooks.example.com", "its policy does not grant it"),
    ],
)
def test_failure_of_the_network_is_told_apart_from_a_refusal(d: Daemon, key: str, name: str, why: str) -> None:
    row = rows(d)[key]
    assert row["data"]["name"] == name and why in row["why"]
    assert (row["grant"] is not None) is key.startswith("refusal")


@pytest.mark.parametrize(
    ("limit", "line", "why"),
    [
        ("memory", 'memory = "96M"', "it has 48M; its manifest asks for 512M"),
        ("tasks", "tasks = 32", "its manifest asks for 16, and has to ask for more as well"),
        ("state", 'state = "2M"', "its manifest asks for no number, and has to ask for more as well"),
        ("tmp", 'tmp = "2M"', "it has 1M; its manifest asks for 4M"),
    ],
)
def test_limit_that_was_reached_has_the_line_that_raises_it(d: Daemon, limit: str, line: str, why: str) -> None:
    row = rows(d)[f"limit {limit}"]
    assert row["count"] > 0 and row["grant"]["line"] == line and why in row["why"]
    table = {"state": "filesystem", "tmp": "filesystem"}.get(limit, "limits")
    assert (
        f"to allow it, in [{table}] of policies/unlucky.toml:  {line}" in d.cli("plugin", "denials", "unlucky").stdout
    )


def test_show_and_story_name_what_failed(d: Daemon) -> None:
    shown = d.cli("plugin", "show", "unlucky").stdout
    assert "connection to hooks.example.com port 9999: failed, econnrefused" in shown
    assert "killed for its memory" in shown and "not-granted" not in shown
    first = d.json("event", "list")[-1]["id"]
    told = " ".join(d.cli("audit", "story", first).stdout.split())
    assert "3 connections, 1 lookup failed" in told and "refused by the other side" in told


def as_user(d: Daemon, uid: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command as somebody else."""
    return subprocess.run(
        ["isolator", "--root", str(d.root), *words], capture_output=True, text=True, check=False, user=uid, group=uid,
        extra_groups=[], timeout=seconds(60), cwd="/",
    )  # fmt: skip


def test_viewer_searches_the_trail_without_access_to_its_files(d: Daemon) -> None:
    event_id = d.json("event", "list")[-1]["id"]
    for words in (
        ("audit", "story", event_id[:-2], "--json"),
        ("audit", "query", "--plugin", "unlucky", "--type", "net.*", "--json"),
        ("audit", "query", "--event", event_id[:-2], "--json"),
        ("plugin", "denials", "unlucky", "--json"),
        ("plugin", "history", "unlucky", "--json"),
        ("audit", "tail", "-n", "3", "--type", "plugin.*", "--json"),
    ):
        seen = as_user(d, VIEWER, *words)
        assert (seen.returncode, seen.stderr) == (0, "")
        assert seen.stdout and seen.stdout == d.cli(*words).stdout, words
    newest = as_user(d, VIEWER, "audit", "tail", "-n", "3", "--json")
    lines = newest.stdout.splitlines()
    seqs = [json.loads(line)["seq"] for line in lines]
    assert (newest.returncode, newest.stderr, len(seqs)) == (0, "", 3) and seqs[2] == seqs[1] + 1 == seqs[0] + 2
    further = as_user(d, VIEWER, "audit", "tail", "--after", str(seqs[0]), "--json")
    assert (further.returncode, further.stderr) == (0, "") and further.stdout.splitlines()[:2] == lines[1:]
    missing = as_user(d, VIEWER, "audit", "story", "ev_none")
    assert missing.returncode == 3 and "the trail has no record of it" in missing.stderr
    for command in ("query", "tail"):
        misspelt = as_user(d, VIEWER, "audit", command, "--plugin", "unlukcy")
        assert misspelt.returncode == 3 and "did you mean unlucky?" in misspelt.stderr
    refused = as_user(d, STRANGER, "audit", "query")
    assert refused.returncode == 4 and "needs viewer" in refused.stderr
    called = [r["data"] for r in d.records() if r["type"] == "control.called" and r["data"]["verb"] == "audit.search"]
    assert {(c["uid"], c["verdict"]) for c in called} == {(VIEWER, "ok"), (STRANGER, "denied")}


def frozen_search(d: Daemon) -> tuple[subprocess.Popen[str], Process]:
    """A viewer's search that is under way for ever: the caller, and the process that is stopped."""
    host = Process(d.service_pid("host.service"))
    while True:
        caller = subprocess.Popen(
            ["isolator", "--root", str(d.root), "audit", "query", "--json"], stdout=subprocess.PIPE, text=True,
            user=VIEWER, group=VIEWER, extra_groups=[], cwd="/",
        )  # fmt: skip
        while caller.poll() is None:
            for child in host.children():
                with contextlib.suppress(NoSuchProcess):
                    if "isolator.audit.search" in child.cmdline():
                        child.suspend()
                        return caller, child
        caller.communicate()  # it was quicker


def test_deliveries_go_on_beside_a_search_that_does_not(d: Daemon) -> None:
    caller, search = frozen_search(d)
    try:
        for number in range(10):
            row = d.json("event", "emit", "deploy.completed", event(number, project_id="nothing"), "--wait")
            assert [(one["state"], one["attempts"]) for one in row["deliveries"]] == [("ok", 1)]
        assert caller.poll() is None and search.status() == STATUS_STOPPED
        search.resume()
        found, _ = caller.communicate(timeout=seconds(60))
        assert caller.returncode == 0 and '"type":"event.response"' in found
    finally:
        caller.kill()
        caller.communicate()
