"""Operations on deliveries with a whole daemon: they hold over reloads and restarts, and plugins hear of the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.daemon import ECHO, Daemon, daemon, event, wait_for, write_plugin

OURS = ["isolator.plugin.failed", "isolator.delivery.dead", "isolator.denied", "isolator.update.pending"]
NOTIFIER = ECHO.replace('seen.write(params["deployment_id"]', 'seen.write(json.dumps([request["method"], params])')
NOTIFIER = NOTIFIER.replace('"echo": params["deployment_id"]', '"echo": 1')
NOISY = ECHO.replace(
    "        reply = ",
    """\
        from ctypes import CDLL
        print(CDLL(None).ptrace(0, 0, 0, 0), "a-line-of-the-log", flush=True)
        reply = """,
).replace('"status": "ok"', '"status": "rejected", "message": "a-reply"')
"""Asks for what nobody may, says something, and refuses its event."""


@pytest.fixture(scope="module")
def d() -> Iterator[Daemon]:
    with daemon() as one:
        yield one


def seen(d: Daemon, name: str) -> str:
    return "\n".join(d.noted(name))


def test_pause_holds_over_a_reload_and_a_restart_of_the_daemon(d: Daemon, tmp_path: Path) -> None:
    d.cli("plugin", "add", str(write_plugin(tmp_path / "echo")), "--yes")
    d.cli("event", "emit", "deploy.completed", event(0), "--wait")
    pid = d.json("plugin", "show", "echo")["pid"]
    d.cli("plugin", "pause", "echo")
    d.cli("event", "emit", "deploy.completed", event(1))
    d.cli("reload")
    d.cli("event", "emit", "deploy.completed", event(2))
    shown = d.json("plugin", "show", "echo")
    assert (shown["pid"], shown["queue"], shown["paused"]["by"]) == (pid, 2, "uid:0")
    assert d.stop() == 0
    d.start()
    shown = d.json("plugin", "show", "echo")
    assert (shown["pid"], shown["queue"], shown["paused"]["by"]) == (None, 2, "uid:0")
    d.cli("plugin", "resume", "echo")
    wait_for(lambda: d.json("plugin", "show", "echo")["queue"] == 0)
    assert seen(d, "echo").split() == ["d0", "d1", "d2"]
    assert [r["type"] for r in d.records() if r["type"] in ("plugin.paused", "plugin.resumed")] == [
        "plugin.paused", "plugin.resumed",
    ]  # fmt: skip


def test_plugin_that_is_granted_them_hears_of_the_others_and_no_other_does(d: Daemon, tmp_path: Path) -> None:
    policies = d.root / "etc/isolator/policies"
    policies.mkdir(parents=True, exist_ok=True)
    (policies / "ungranted.toml").write_text('[grant]\nhooks = ["deploy.*"]\n')
    for name in ("notifier", "ungranted"):
        d.cli("plugin", "add", str(write_plugin(tmp_path / name, NOTIFIER, hooks=OURS)), "--yes")
    noisy = write_plugin(tmp_path / "noisy", NOISY, hooks=["deploy.failed", *OURS])
    d.cli("plugin", "add", str(noisy), "--yes")
    failed = '{"project_id": "p", "deployment_id": "a-payload", "error_code": "e"}'
    d.cli("event", "emit", "deploy.failed", failed, "--wait", code=1)
    for _ in range(2):
        wait_for(lambda: '"isolator.delivery.dead"' in seen(d, "notifier") and '"call"' in seen(d, "notifier"))
        d.cli("event", "emit", "deploy.failed", failed, "--wait", code=1)
        host = d.service_pid("host.service")
        d.cli("reload")  # what stands already is no news after it, either
        wait_for(lambda host=host: d.service_pid("host.service", missing_ok=True) not in (host, 0, None))
    more = write_plugin(
        tmp_path / "more/noisy", NOISY, hooks=["deploy.failed", "deploy.started", *OURS], version="2.0.0"
    )
    d.cli("plugin", "update", "noisy", str(more), code=5)
    wait_for(lambda: '"isolator.update.pending"' in seen(d, "notifier"))
    told = seen(d, "notifier")
    assert told.count('["isolator.delivery.dead"') == told.count('["isolator.denied"') == 1, told
    assert not [word for word in ("a-payload", "a-line-of-the-log", "a-reply") if word in told], told
    assert '"plugin": "noisy"' not in seen(d, "noisy")
    assert seen(d, "ungranted") == ""


SEEKER = ECHO.replace(
    "        connection.sendall(",
    """\
        with socket.socket(socket.AF_UNIX) as host, open(os.environ["PLUGIN_STATE_DIR"] + "/asked", "a") as asked:
            host.connect(os.environ["PLUGIN_HOST_SOCKET"])
            lines = host.makefile("rw")
            for method in ("event.show", "event.list", "event.replay", "audit.follow", "plugin.show", "events.get"):
                for id in [line.strip() for line in open(os.environ["PLUGIN_STATE_DIR"] + "/ids")]:
                    ask = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"id": id, "name": id}}
                    lines.write(json.dumps(ask) + "\\n")
                    lines.flush()
                    asked.write(lines.readline())
        connection.sendall(""",
)
"""At each event, asks the host API in every way for the events whose ids it has somehow come by."""


def emit(d: Daemon, project: str, deployment: str) -> str:
    payload = event(0, project_id=project, deployment_id=deployment)
    return str(json.loads(d.cli("event", "emit", "deploy.completed", payload, "--json").stdout)["id"])


def test_plugin_sees_no_event_outside_the_filter_of_its_grant_by_any_road(d: Daemon, tmp_path: Path) -> None:
    policy = d.root / "etc/isolator/policies/seeker.toml"
    policy.parent.mkdir(parents=True, exist_ok=True)
    granted = '[grant]\nhooks = ["deploy.*"]\n'
    only = granted + 'filters = [{exact = {project_id = "shop"}}]\n'
    policy.write_text(only)
    d.cli("plugin", "add", str(write_plugin(tmp_path / "seeker", SEEKER)), "--yes")
    shown = [line["effective"] for line in d.json("plugin", "explain", "seeker")["lines"] if line["field"] == "filters"]
    assert shown == ['only project_id is "shop"']
    d.cli("plugin", "start", "seeker")
    state = d.state_of("seeker")
    secret = emit(d, "bank", "secret-1")
    (state / "ids").write_text(f"{secret}\n")
    mine = emit(d, "shop", "mine-1")
    rows = {row["id"]: [x["plugin"] for x in row["deliveries"]] for row in d.json("event", "list")}
    assert "seeker" in rows[mine] and "seeker" not in rows[secret]
    assert d.cli("event", "replay", secret, "--plugin", "seeker", code=2).stderr
    wait_for(lambda: d.json("plugin", "show", "seeker")["queue"] == 0)

    # What was accepted under a wider grant is left out once the grant is narrower, waiting or replayed.
    policy.write_text(granted)
    wait_for(lambda: not d.json("plugin", "show", "seeker")["effective"]["filters"])
    seen_before = emit(d, "bank", "was-granted")
    wait_for(lambda: "was-granted" in seen(d, "seeker"), what="without the filter it sees everything")
    d.cli("plugin", "pause", "seeker")
    waiting = emit(d, "bank", "secret-2")
    policy.write_text(only)
    wait_for(lambda: d.json("plugin", "show", "seeker")["effective"]["filters"])
    d.cli("event", "replay", seen_before, "--plugin", "seeker")
    d.cli("plugin", "resume", "seeker")
    for one in (waiting, seen_before):
        wait_for(lambda one=one: _of(d, one, "seeker")["state"] == "dead")
        assert "filters" in _of(d, one, "seeker")["detail"]
    emit(d, "shop", "mine-2")
    wait_for(lambda: "mine-2" in seen(d, "seeker"))
    assert seen(d, "seeker").split() == ["mine-1", "was-granted", "mine-2"]
    asked = (state / "asked").read_text()
    assert asked.count('"error"') == len(asked.splitlines()) >= 6, asked
    assert "secret" not in asked and "bank" not in asked


def _of(d: Daemon, event_id: str, plugin: str) -> dict[str, Any]:
    return next(x for x in d.json("event", "show", event_id)["deliveries"] if x["plugin"] == plugin)
