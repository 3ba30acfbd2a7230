"""``isolator top`` with a whole daemon: its figures, how it draws what plugins wrote, and the terminal afterwards."""

from __future__ import annotations

import ast
import io
import json
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import host
import isolator
from host.cli.top import table
from host.cli.top.figures import Machine, Moment, Row
from tests.support.terminal import Terminal, terminal
from tests.system.daemon import ECHO, Daemon, daemon, event, kill_9, wait_for, write_plugin

VIEWER = 61170
BUSY = ECHO.replace(
    "    while True:",
    """\
    import threading, time
    def compute():
        while True:
            sum(range(20_000))
            time.sleep(0.01)
    threading.Thread(target=compute, daemon=True).start()
    while True:""",
)
"""Computes now and then, whether there is an event or not."""
HOSTILE = ECHO.replace(
    "        reply = ",
    "        from ctypes import CDLL\n        CDLL(None).ptrace(0, 0, 0, 0)\n        reply = ",
).replace('"status": "ok"', '"status": "rejected", "message": "\\x1b]0;owned\\x07[red]\\u202e" + "x" * 3000')
"""Asks for what nobody may, and steers terminals."""
RUNS = """\
#!/usr/bin/python3
import json, os, sys, time
asked = json.load(sys.stdin)["error_code"]
if asked == "computes":
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
while asked == "holds" and not os.path.exists(os.environ["PLUGIN_STATE_DIR"] + "/go-on"):
    time.sleep(0.02)
"""
"""Runs once for each event."""
STATES = {"busy": "ok", "echo": "ok", "hostile": "dead"}


@pytest.fixture(scope="module")
def d(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("plugins")
    with daemon(host_toml=f"[roles]\nviewer = [{VIEWER}]\n") as one:
        for name, script in (("echo", ECHO), ("busy", BUSY), ("hostile", HOSTILE)):
            one.cli("plugin", "add", str(write_plugin(folder / name, script)), "--yes")
        words = {"binary": "./main", "transport": {"mode": "exec"}, "delivery": {"timeout": "60s"}}
        made = write_plugin(
            folder / "runs", RUNS, hooks=["deploy.failed"], sandbox={"filesystem": {"state": "8M"}}, **words
        )
        one.cli("plugin", "add", str(made), "--yes")
        emitted = one.json("event", "emit", "deploy.completed", event(0), "--wait", "--timeout", "80", code=1)
        assert {d["plugin"]: d["state"] for d in emitted["deliveries"]} == STATES, emitted
        wait_for(lambda: any(record["type"] == "syscall.denied" for record in one.records()))
        yield one


def look(d: Daemon, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = d.json("top", "--once", "--interval", "0.5", *words)
    return found


def plugins(moment: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in moment["plugins"]}


def top(d: Daemon, *words: str) -> list[str]:
    return ["isolator", "--root", str(d.root), "top", *words]


def test_figures_are_those_of_the_plugins_daemon_and_host(d: Daemon) -> None:
    moment = look(d, "--sort", "name")
    assert [row["name"] for row in moment["plugins"]] == ["busy", "echo", "hostile", "runs"]
    rows = plugins(moment)
    assert {name: row["mode"] for name, row in rows.items()} == {**dict.fromkeys(STATES, "oneshot"), "runs": "exec"}
    idle = rows.pop("runs")
    assert (idle["invocations"], idle["cpu"], idle["memory"], idle["tasks"], idle["egress_per_s"]) == (0, 0, 0, 0, 0)
    for row in rows.values():
        assert row["state"] == "running" and row["queue"] == 0 and not row["paused"]
        assert 0 < row["memory"] <= row["memory_cap"] and 0 < row["tasks"] <= row["tasks_cap"]
        assert row["latency_p99_us"] > 0 and row["events_per_s"] == 0 and row["egress_per_s"] is not None
    assert rows["busy"]["cpu"] > rows["echo"]["cpu"] >= 0 and rows["busy"]["cpu_cap"] > 0
    assert (rows["hostile"]["denials"], rows["echo"]["denials"]) == (1, 0)
    assert rows["hostile"]["notes"][0].startswith("failing for ")
    assert {one["name"] for one in moment["processes"]} == {"supervisor", "audit", "broker", "host"}
    assert all(one["memory"] > 1 << 20 for one in moment["processes"])
    machine = moment["host"]
    assert 0 < machine["memory"] < machine["memory_total"] and machine["cores"] >= 1 and len(machine["load"]) == 3


def test_most_comes_first_by_each_key(d: Daemon) -> None:
    assert look(d)["plugins"][0]["name"] == "busy"  # by cpu
    assert look(d, "--sort", "denials")["plugins"][0]["name"] == "hostile"
    refused = d.cli("top", "--once", "--sort", "size", code=2).stderr
    assert "'size' is not one of" in refused


def failed(does: str) -> str:
    at = "2026-01-02T03:04:05Z"
    return json.dumps({"project_id": "p1", "deployment_id": does, "error_code": does, "finished_at": at})


def test_invocation_is_seen_while_it_runs(d: Daemon) -> None:
    emitted = d.json("event", "emit", "deploy.failed", failed("holds"))
    wait_for(lambda: any(r["type"] == "exec.started" and emitted["id"] == r["event_id"] for r in d.records()))
    row = plugins(look(d))["runs"]
    assert row["invocations"] == 1 and row["memory"] > 0 and row["tasks"] >= 1 and row["memory"] < row["memory_cap"]
    assert re.search(r"runs +exec 1 ", d.cli("top", "--interval", "0.2").stdout)
    (d.state_of("runs") / "go-on").touch()
    wait_for(lambda: plugins(look(d))["runs"]["invocations"] == 0)


def test_invocation_counts_that_began_and_ended_between_two_looks(d: Daemon) -> None:
    with subprocess.Popen(top(d, "--json", "--interval", "0.2"), stdout=subprocess.PIPE, text=True) as follows:
        assert follows.stdout is not None
        try:
            follows.stdout.readline()
            d.cli("event", "emit", "deploy.failed", failed("computes"), "--wait")
            used = 0.0
            while used < 0.4:  # of half a second
                moment = json.loads(follows.stdout.readline())
                used += plugins(moment)["runs"]["cpu"] * moment["seconds"]
        finally:
            follows.terminate()


def test_viewer_sees_the_same(d: Daemon) -> None:
    words = ["setpriv", f"--reuid={VIEWER}", f"--regid={VIEWER}", "--clear-groups", *top(d, "--once", "--json")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = plugins(json.loads(done.stdout))["busy"]
    assert row["cpu"] > 0 and row["memory"] > 0 and row["tasks"] > 0


def test_without_a_terminal_it_is_one_plain_look_of_80_columns(d: Daemon) -> None:
    shown = d.cli("top", "--interval", "0.2").stdout
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80 and "\x1b" not in shown and "\u202e" not in shown, shown
    assert any(line.split()[:2] == ["busy", "running"] for line in lines)
    (note,) = [line for line in lines if line.startswith("hostile: ")]
    assert "]0;owned" in note and "[red]" in note


def shown_on(one: Terminal) -> None:
    """Wait for a whole screen."""
    one.shows("busy")
    one.shows("q quit")


@pytest.mark.parametrize(("keys", "code"), [("q", 0), ("\x03", 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_terminal_is_as_before_after_every_end(d: Daemon, keys: str | signal.Signals, code: int) -> None:
    with terminal(top(d, "--interval", "0.2"), TERM="xterm-256color") as one:
        before = one.settings()
        shown_on(one)
        assert not one.settings()[3] & termios.ECHO
        one.press(keys) if isinstance(keys, str) else one.process.send_signal(keys)
        assert one.end() == code
        one.rest()
        assert one.settings() == before
        assert one.seen.rindex(b"\x1b[?1049l") > one.seen.rindex(b"\x1b[?1049h")
        assert one.seen.rindex(b"\x1b[?25h") > one.seen.rindex(b"\x1b[?25l")


def test_keys_sort_and_nothing_that_a_plugin_wrote_steers_the_terminal(d: Daemon) -> None:
    with terminal(top(d, "--interval", "0.2"), TERM="xterm-256color", NO_COLOR="1") as one:
        shown_on(one)
        one.press("d")
        first = re.compile(r"NET/S.*?(\w+)\s+(?:running|failed)", re.S)
        while (found := first.search(plain(one.shows("q quit")))) is None or found[1] != "hostile":
            pass
        one.press("r")
        while (found := first.search(plain(one.shows("q quit")))) is None or found[1] == "hostile":
            pass
        one.press("jjq")
        assert one.end() == 0
        one.rest()
        assert b"]0;owned" in one.seen
        assert not re.search(rb"\x1b\]|\xe2\x80\xae", one.seen)
        assert not re.search(rb"\x1b\[[0-9;]*3[0-7][;m]", one.seen)  # no colour


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_rates_follow_the_events_and_outlive_the_host_process(d: Daemon) -> None:
    with subprocess.Popen(top(d, "--json", "--interval", "0.2"), stdout=subprocess.PIPE, text=True) as follows:
        assert follows.stdout is not None
        try:
            first = json.loads(follows.stdout.readline())
            d.cli("event", "emit", "deploy.completed", event(1), "--wait", code=1)
            while not plugins(json.loads(follows.stdout.readline()))["echo"]["events_per_s"]:
                pass
            before = {one["name"]: one["pid"] for one in first["processes"]}
            kill_9(before["host"])
            while True:
                found = {one["name"]: one["pid"] for one in json.loads(follows.stdout.readline())["processes"]}
                if found.get("host") not in (None, before["host"]):
                    break
        finally:
            follows.terminate()


def test_drawing_makes_every_text_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\x1b]0;owned\x07[red]\u202e"
    row = Row(text, text, False, None, None, None, None, None, None, None, 0, None, None, None, (text,))
    machine = Machine(0.0, 1, (0.0, 0.0, 0.0), 0, 1)
    moment = Moment(0.0, 1.0, text, 0.0, machine, (), (text,), (row,))

    def drawn() -> str:
        console = Console(file=io.StringIO(), width=200, force_terminal=True, no_color=True)
        console.print(table.drawn(moment, "name", 200))
        return console.file.getvalue()  # type: ignore[attr-defined]

    assert "\x1b]" not in drawn() and "\u202e" not in drawn() and drawn().count("[red]") >= 4
    monkeypatch.setattr(table, "safe", str)
    assert drawn().count("\x1b]0;owned") >= 4


def test_nothing_but_top_loads_rich_and_psutil() -> None:
    program = (
        "import sys, host.cli.root, host.cli.top.command, host.cli.status, isolator.cli.daemon, host.service\n"
        "sys.exit(', '.join({'rich', 'psutil'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for package in (host, isolator):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            names = {name.split(".")[0] for name in _imported(path)}
            assert not names & {"rich", "psutil"} or "cli/top/" in str(path), path


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
