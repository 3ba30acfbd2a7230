"""A whole daemon and its plugins live through everything there is to record; each record has the fields of its type.

Text of plugins is made to look like something else: it comes out of the files and of every command as text, on a line
of its own record.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from docs.generate.schemas import fields
from host.client.client import Client as Caller
from isolator.audit.budget import BURST
from isolator.audit.schema import RECORDS
from isolator.errors import printable
from isolator.linux.boottime import boottime
from tests.mcp.client import Client
from tests.support.internet_servers import OTHER, WEB
from tests.support.json_schema import violations
from tests.support.mcp_servers import server
from tests.support.pretend_internet import pretend_internet
from tests.system.daemon import ECHO, Daemon, daemon, event, kill_9, wait_for, write_plugin
from tests.system.taken_over import TakenOver
from tests.system.test_control_flood import flood_as

SCHEMAS = Path(__file__).resolve().parents[2] / "docs/schemas"

RARE = {
    "resources": "swap pressure_cpu pressure_memory pressure_io memory_peak user_us system_us throttled oom_kills "
    "anonymous cached tasks_peak",
    "plugin.crashed": "reason",
    "plugin.rejected": "folder",
    "plugin.pending": "folder",
    "plugin.started": "signer",
    "exec.started": "signer",
    "exec.ended": "reason network_bytes io_read io_written",
    "net.query": "various count",
    "net.connect": "various count error direction cage_port via",
    "net.closed": "direction cage_port",
    "net.denied": "various count detail asked why direction cage_port",
    "event.dispatched": "busy",
    "api.called": "uid count",
    "control.called": "on_behalf_of",
    "event.accepted": "on_behalf_of",
    "audit.summary": "total",
    "database.damaged": "missing last",
    "config.changed": "rotated lost why waits",
    "audit.gap": "bytes sha256 text kept found written from to hash files",
}
"""By type, fields that need another kernel, a fault or a publisher to appear."""

SECRET = "s3cr3t-and-long-enough"
NASTY = '\x1b[2J\x1b]0;x\x07\r\n{"seq":1,"type":"plugin.stopped","hash":"0"}\u202egnp.exe\u2066\u200b\u3164\x9b\x7f'

VIEWER, RUNNER, STRANGER = 64009, 64011, 64013
HOST_TOML = f"""\
[roles]
viewer = [{VIEWER}]
runner = [{RUNNER}]
[network]
resolvers = ["{WEB}"]
[restart]
backoff_min = "0.1s"
crashes = 4
[audit]
snapshot_interval = "1s"
seal_interval = "1s"
"""
POLICY = """\
[grant]
hooks = ["deploy.*"]
egress = ["hooks.example.com:7"]
"""
ACTOR = ECHO.replace(
    "    server.listen(1)\n",
    """\
    server.listen(1)
    import ctypes, sys, time
    NASTY = @NASTY@
    def talk(address):
        with socket.create_connection((address, 7), 5) as s:
            s.sendall(b"x")
            s.recv(1)
    def attempt(action, *arguments):
        try:
            return action(*arguments)
        except OSError as error:
            return error
    def ask(method, **params):
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(os.environ["PLUGIN_HOST_SOCKET"])
            s.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode() + b"\\n")
            s.recv(65536)
    def act(what):
        if what == "net":
            talk(socket.gethostbyname("hooks.example.com"))
            attempt(socket.gethostbyname, "evil" + "x" * 40 + ".example.com")
            attempt(talk, "@OTHER@")
        elif what == "call":
            ctypes.CDLL(None).ptrace(0, 0, 0, 0)
        elif what == "api":
            ask("kv.set", key="k", value=NASTY)
            ask("projects.get", id=NASTY)
            ask("log.write", level="info", message=NASTY * 3000)
        elif what == "die":
            print("goodbye " + os.environ["TOKEN"], NASTY, file=sys.stderr, flush=True)
            os.kill(os.getpid(), 9)
        elif what == "swap":
            os.unlink(path)
            os.symlink("/etc/passwd", path)
        elif what == "refuse":
            return {"status": "rejected", "reason": NASTY}
        elif what == "lie":
            return {"status": "ok", "text": NASTY * 100, "token": os.environ["TOKEN"]}
        return {"status": "ok"}
""",
).replace('"result": {"status": "ok", "echo": params["deployment_id"]}', '"result": act(params["branch"])')
FAILING = f"""
def call(id, name, arguments, meta):
    send(id=id, result=text({NASTY!a}, isError=True))
"""
ACTOR = ACTOR.replace("@NASTY@", ascii(NASTY)).replace("@OTHER@", OTHER)


def add(d: Daemon, folder: Path, *words: str) -> None:
    d.cli("plugin", "add", str(folder), "--yes", *words)


def emit(d: Daemon, what: str, *, wait: bool = True) -> str:
    words = ["--wait"] if wait else []
    # What was rejected or died has its own exit code; the record is what counts here.
    emitted = json.loads(
        d.cli("event", "emit", "deploy.completed", event(what, branch=what), *words, "--json", code=None).stdout
    )
    return str(emitted["id"])


def live(d: TakenOver, place: Path) -> dict[str, str]:
    """Everything that can happen; the events by what they made the plugin do."""
    policies = d.root / "etc/isolator/policies"
    policies.mkdir(parents=True, exist_ok=True)
    (policies / "actor.toml").write_text(POLICY)
    manifest: dict[str, Any] = {
        "config": {"token": {"type": "string", "required": True, "secret": True, "env": "TOKEN"}},
        "sandbox": {"network": {"egress": [{"host": "hooks.example.com", "ports": [7]}]}},
        "permissions": ["read:projects"],
    }
    write_plugin(place / "actor", ACTOR, **manifest)
    add(d, place / "actor", "--config", f"token={SECRET}")
    audit = d.service_pid("isolator.audit.service")
    d.cli("reload")  # before the rest: histograms of the metrics begin anew with the audit process
    wait_for(lambda: d.service_pid("isolator.audit.service", missing_ok=True) not in (audit, 0, None))
    events = {what: emit(d, what) for what in ("net", "call", "api", "lie", "refuse")}
    d.cli("event", "replay", events["refuse"])
    wait_for(lambda: len(of(d, "event.response", events["refuse"])) == 2)
    events["die"] = emit(d, "die")  # until it is quarantined
    events["swap"] = emit(d, "swap")
    events["after"] = emit(d, "after", wait=False)
    wait_for(lambda: of(d, "fs.denied"))
    d.cli("plugin", "restart", "actor")
    wait_for(lambda: of(d, "event.response", events["after"]))
    d.cli("plugin", "pause", "actor")
    held = [emit(d, what, wait=False) for what in ("skipped", "cancelled")]
    d.cli("event", "retry", held[0])
    d.cli("event", "skip", held[0], "--plugin", "actor")
    d.cli("event", "cancel", held[1])
    d.cli("plugin", "resume", "actor")

    for program in ("/usr/bin/true", "/no/such/program"):
        subprocess.run(run_by_user(d, program), check=False, user=RUNNER, group=RUNNER, extra_groups=[], cwd="/")
    wait_for(lambda: len(of(d, "run.ended")) == 2)

    health = {"ping": True, "interval": "0.2s", "timeout": "0.1s", "misses": 2}
    write_plugin(place / "deaf", ECHO.replace("reply = ", "time.sleep(9); reply = ").replace("json,", "json, time,"),
                 hooks=["deploy.failed"], health=health)  # fmt: skip
    add(d, place / "deaf")
    d.cli("plugin", "start", "deaf", "--no-wait")
    wait_for(lambda: [r for r in of(d, "plugin.health") if r["plugin"] == "deaf"])
    d.cli("plugin", "remove", "deaf", "--yes")

    script = "#!/bin/sh\ncat >/dev/null\n"
    write_plugin(place / "script", script, hooks=["project.created"], transport={"mode": "exec"})
    add(d, place / "script")
    d.cli("event", "emit", "project.created", '{"project_id": "p1", "name": "Shop"}', "--wait")
    d.cli("plugin", "remove", "script", "--yes")

    write_plugin(place / "broken", "#!/bin/sh\nexit 7\n", hooks=["deploy.failed"])
    add(d, place / "broken")
    d.cli("plugin", "start", "broken", code=None)
    wait_for(lambda: of(d, "plugin.failed"))
    d.cli("plugin", "remove", "broken", "--yes")

    (policies / "tools.toml").write_text('[grant]\ntools = ["fail"]\ncallers = [0]\n')
    folder = write_plugin(place / "tools", server(FAILING), hooks=[], transport={"mode": "mcp"})
    with Caller(d.root) as caller:
        package = {"package": "npm:tools@1.0.0", "hashes": {"tools@1.0.0": NASTY}}
        staged = caller.call("plugin.stage", path=str(folder), resolved=package)
        caller.call("plugin.commit", token=staged["token"])
    d.cli("mcp", "approve", "tools", "--yes")
    with Client(d, "tools") as client:
        client.initialize()
        client.call("fail")
    for verb, type in (("hold", "plugin.frozen"), ("hold", "plugin.thawed"), ("lost", "plugin.lost")):
        until = [] if verb == "lost" else [boottime() + (600 if of(d, "plugin.frozen") else 0)]
        d.fence(verb, "tools", *until)
        wait_for(lambda type=type: of(d, type))

    old = write_plugin(place / "old/changing", ECHO, hooks=["deploy.failed"])
    new = write_plugin(place / "new/changing", ECHO, hooks=["deploy.failed"], version="2.0.0")
    more = write_plugin(place / "more/changing", ECHO, hooks=["deploy.failed", "deploy.started"], version="3.0.0")
    add(d, old)
    d.cli("plugin", "update", "changing", str(new), "--yes")
    d.cli("plugin", "rollback", "changing")
    d.cli("plugin", "update", "changing", str(more), code=5)
    d.cli("plugin", "reject", "changing")
    d.cli("plugin", "update", "changing", str(more), code=5)
    d.cli("plugin", "approve", "changing", "--yes")
    (policies / "changing.toml").write_text('[grant]\nhooks = ["deploy.*"]\n[limits]\nmemory = "200M"\n')
    wait_for(lambda: [r for r in of(d, "config.changed") if r["data"]["names"] == ["policy"]])
    (policies / "changing.toml").write_text("[grant]\nnonsense = true\n")
    wait_for(lambda: of(d, "plugin.rejected"))
    wait_for(lambda: 'isolator_queue_depth{plugin="actor"} 0.0\n' in scrape(d))
    (d.root / METRICS).write_text(scrape(d))
    kill_9(d.service_pid("isolator.broker.service"))
    wait_for(lambda: [r for r in of(d, "audit.gap") if r["data"].get("source") == "broker"])
    (d.root / "var/lib/isolator/host/host.db-wal").unlink()
    d.cli("event", "emit", "deploy.completed", event("unanswered", branch="after"), code=None)
    wait_for(lambda: of(d, "database.damaged"))
    wait_for(lambda: d.cli("check", code=None).returncode == 1, what="the alarm is not shown")
    command = [sys.executable, "-I", "-c", REFUSED, str(d.root / "run/isolator/control.sock"), str(int(BURST) + 200)]
    subprocess.run(command, check=True, user=VIEWER, group=VIEWER, extra_groups=[], cwd="/")
    wait_for(lambda: of(d, "audit.summary"))
    flood_as(d, STRANGER)
    wait_for(lambda: of(d, "control.shut"))
    return events


def run_by_user(d: Daemon, program: str) -> list[str]:
    words = ["-I", "-c", "from host.cli.main import main; main()", "--root", str(d.root), "run", "--", program]
    return [sys.executable, *words]


REFUSED = """\
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
answers = sock.makefile()
for _ in range(int(sys.argv[2]) // 100):
    sock.sendall(b'{"jsonrpc":"2.0","id":1,"method":"plugin.stop"}\\n' * 100)
    for _ in range(100):
        assert "denied" in answers.readline()
"""
"""A viewer who is refused again and again; who has no role at all is let ask seldom."""
METRICS = "metrics.txt"


def scrape(d: Daemon) -> str:
    """The metrics as Prometheus gets them."""
    command = ["curl", "-s", "--unix-socket", str(d.root / "run/isolator/metrics.sock"), "http://isolator/metrics"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def of(d: Daemon, type: str, event_id: str | None = None) -> list[dict[str, Any]]:
    return [r for r in d.records() if r["type"] == type and event_id in (None, r["event_id"])]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, dict[str, str]]]:
    with pretend_internet() as pretend, daemon(host_toml=HOST_TOML, network=pretend.host_fd, kind=TakenOver) as d:
        assert isinstance(d, TakenOver)
        events = live(d, tmp_path_factory.mktemp("plugins"))
        (passphrase := d.root / "passphrase").write_text("a passphrase for tests")
        passphrase.chmod(0o600)
        place = Path(tempfile.mkdtemp(prefix="isolator-backup-"))
        secret = ["--passphrase-file", str(passphrase)]
        try:
            d.cli("backup", str(place / "running"), *secret)
            d.stop()
            d.cli("backup", str(place / "stopped"), *secret)
            d.cli("restore", str(place / "stopped"), *secret, "--replace")
            with (d.root / "etc/isolator/host.toml").open("a") as file:
                file.write('[cluster]\nname = "one"\nservers = ["127.0.0.1:1"]\ntls = false\n')
            d.start()
        finally:
            shutil.rmtree(place)
        wait_for(lambda: of(d, "cluster.problem"))
        d.stop()
        # A host that was away until the log was trimmed, and was stopped before it could tell.
        path = d.root / "var/lib/isolator/host/host.db"
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as store:
            store.execute("INSERT INTO cluster_losses VALUES ('echo', 'two', 7, 3, 9, 'it was trimmed')")
        d.start()
        wait_for(lambda: of(d, "event.lost"))
        d.stop()
        yield d, events


Lived = tuple[Daemon, dict[str, str]]


def test_every_record_type_is_written_by_its_source_with_its_fields(lived: Lived) -> None:
    by_type: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in lived[0].records():
        by_type[record["type"]].append(record)
    assert by_type.keys() == RECORDS.keys()
    for type, kind in RECORDS.items():
        declared = {field.name for _, field in fields(kind)}
        seen = {name for record in by_type[type] for name in record["data"]}
        assert declared - seen <= set(RARE.get(type, "").split()), type
        sources = {record["origin"].partition(":")[0] for record in by_type[type]}
        assert sources <= set(kind.SOURCES), type
        assert sources == set(kind.SOURCES) or type in ("audit.gap", "net.denied"), type
        if type.startswith(("plugin.", "run.", "net.", "syscall.", "fs.", "resources")):
            assert all(record["plugin"] for record in by_type[type]), type


def test_every_record_follows_its_published_schema(lived: Lived) -> None:
    schemas = {path.stem: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
    assert schemas.keys() == RECORDS.keys()
    wrong = [
        f"{record['type']}: {violation}"
        for record in lived[0].records()
        for violation in violations(record, schemas[record["type"]])
    ]
    assert not wrong


def test_refusals_of_a_caller_are_on_record_or_counted(lived: Lived) -> None:
    d, _ = lived
    refused = [r for r in of(d, "control.called") if r["data"]["uid"] == VIEWER]
    counted = [r["data"] for r in of(d, "audit.summary") if r["data"].get("uid") == VIEWER]
    assert len(refused) >= BURST and counted
    assert len(refused) + sum(data["count"] for data in counted) == int(BURST) + 200


def test_each_start_has_its_end_and_its_stderr_tail(lived: Lived) -> None:
    d, _ = lived
    starts = [r["run"] for r in of(d, "plugin.started")]
    ends = [r["run"] for t in ("plugin.stopped", "plugin.crashed") for r in of(d, t) if "uptime" in r["data"]]
    assert sorted(starts) == sorted(ends)
    died = [r["data"] for r in of(d, "plugin.crashed") if r["data"].get("signal") == 9]
    assert died
    for data in died:
        (words,) = [line for line in data["stderr"] if "goodbye" in line]
        assert SECRET not in words and words.startswith("goodbye [")
    last = [r for r in d.records() if r["type"] in ("resources", "plugin.stopped") and r["plugin"] == "actor"][-2:]
    assert [r["type"] for r in last] == ["resources", "plugin.stopped"]
    assert last[0]["data"]["open_files"] > 2 and last[0]["data"]["threads"] >= 1


def test_an_event_has_its_story(lived: Lived) -> None:
    d, events = lived

    def types(what: str) -> set[str]:
        return {r["type"] for r in d.json("audit", "story", events[what])["records"]}

    delivered = {"event.accepted", "event.dispatched", "event.response"}
    assert types("net") >= delivered | {"plugin.started", "net.query", "net.connect", "net.closed", "net.denied"}
    assert types("call") >= delivered | {"syscall.denied"}
    assert types("api") >= delivered | {"api.called"}
    assert types("die") >= delivered | {"plugin.crashed", "plugin.started", "event.quarantined"}
    assert types("refuse") >= delivered | {"event.dead", "event.replayed"}


def test_metrics_count_the_records(lived: Lived) -> None:
    found = re.findall(r"^isolator_(\S+) (\S+)$", (lived[0].root / METRICS).read_text(), re.MULTILINE)
    figures = {name: float(value) for name, value in found}
    for name, least in {
        'plugin_total{plugin="actor",what="started"}': 3,
        'plugin_total{plugin="actor",what="crashed"}': 2,
        'plugin_restarts_total{plugin="actor"}': 2,
        'plugin_running{plugin="actor"}': 1,
        'events_accepted_total{event="deploy.completed"}': 7,
        'deliveries_total{outcome="ok",plugin="actor"}': 5,
        'deliveries_total{outcome="rejected",plugin="actor"}': 2,
        'deliveries_total{outcome="unknown",plugin="actor"}': 2,
        'delivery_seconds_bucket{le="10.0",plugin="actor"}': 9,
        'queued_seconds_count{plugin="actor"}': 9,
        'dead_letters_total{plugin="actor"}': 2,
        'denied_total{plugin="actor",what="network"}': 1,
        'denied_total{plugin="actor",what="syscall"}': 1,
        'denied_total{plugin="actor",what="fs"}': 1,
        'denied_total{plugin="actor",what="api"}': 1,
        'network_total{plugin="actor",what="connect"}': 1,
        'network_bytes_total{direction="out",plugin="actor"}': 1,
        'network_bytes_total{direction="in",plugin="actor"}': 1,
        'plugin_memory_bytes{plugin="actor"}': 1 << 20,
        'plugin_memory_peak_bytes{plugin="actor"}': 1 << 20,
        'plugin_cpu_microseconds{plugin="actor"}': 1,
        'plugin_tasks{plugin="actor"}': 1,
        'plugin_open_files{plugin="actor"}': 1,
        "audit_seq": 100,
        "audit_commit_seconds_count": 10,
    }.items():
        assert figures.get(name, -1) >= least, name
    assert figures["audit_blocked"] == figures["audit_lost_records_total"] == 0


def test_secrets_are_in_no_record(lived: Lived) -> None:
    d, _ = lived
    logs = [path for path in (d.root / "var/log").rglob("*") if path.is_file()]
    assert logs and not [path for path in logs if SECRET in path.read_text("latin-1")]


def test_text_of_plugins_stays_text_in_files_and_on_terminals(lived: Lived) -> None:
    d, events = lived
    raw = (d.root / "var/log/isolator/audit/audit.jsonl").read_bytes()
    assert all(32 <= byte < 127 or byte == 10 for byte in raw)
    count = len(d.records())
    assert raw.count(b"\n") == count
    (lie,) = of(d, "event.response", events["lie"])
    assert "gnp.exe" in lie["data"]["response"]
    for words in (["tail", "-n", "100000"], ["query"]):
        shown = d.cli("audit", *words).stdout.splitlines()
        assert len(shown) == count, words
        assert all(printable(line) == line for line in shown)
        assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} +\d+ [a-z]", line) for line in shown)
    for what in events:
        shown = d.cli("audit", "story", events[what]).stdout.splitlines()
        assert all(printable(line) == line and len(line) <= 80 for line in shown)
        assert not [line for line in shown if line.startswith('{"seq"')]


def test_trail_verifies_here_and_elsewhere(lived: Lived) -> None:
    d, _ = lived
    assert "fits together" in d.cli("audit", "verify").stdout
    if not shutil.which("perl"):
        pytest.skip("perl is not installed")
    log = d.root / "var/log/isolator/audit"
    script = Path(__file__).resolve().parents[2] / "docs/verify.pl"
    command = ["perl", str(script), str(log / "public.pem"), str(log / "audit.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
