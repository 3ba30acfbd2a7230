"""Plugins with the mode ``exec`` in a whole daemon: one program run, in a cage of its own, for each event."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.examples.conftest import EXAMPLES
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin

PROGRAM = r"""#!/usr/bin/python3
import json, os, signal, socket, sys, time
params = json.load(sys.stdin)
state = os.environ["PLUGIN_STATE_DIR"]
with open(state + "/seen", "a") as seen:
    seen.write(json.dumps({
        "params": params, "pid": os.getpid(), "memory": os.path.exists("/tmp/memory"),
        "env": {key: os.environ["PLUGIN_EVENT_" + key] for key in ("ID", "TYPE", "ATTEMPT")},
    }) + "\n")
open("/tmp/memory", "w").close()
does, attempt = params.get("error_code") or params["url"].partition("//")[2].strip("/"), params["_meta"]["attempt"]
if does == "result":
    print("work is done")
    print(json.dumps({"status": "posted", "message": "sent", "to": params["deployment_id"]}))
elif does == "later" and attempt == 1:
    sys.exit(75)
elif does == "never":
    print("this is of no use", file=sys.stderr)
    sys.exit(65)
elif does == "fails" and attempt == 1:
    sys.exit(1)
elif does == "dies" and attempt == 1:
    os.kill(os.getpid(), signal.SIGSEGV)
elif does == "hangs" and attempt == 1:
    time.sleep(3600)
elif does == "holds":
    while not os.path.exists(state + "/go-on"):
        time.sleep(0.02)
    print('{"status": "held"}')
elif does == "floods":
    for _ in range(200):
        sys.stdout.write("x" * 65535 + "\n")
    print('{"status": "flooded"}')
elif does == "long":
    print('{"status": "' + "x" * 70000 + '"}')
elif does == "endless" and attempt == 1:
    while True:
        os.write(1, b"x" * (1 << 20))
elif does == "daemonizes":
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with open(state + "/left", "w") as left:
                left.write(str(os.getpid()))
            time.sleep(3600)
        os._exit(0)
    while not os.path.exists(state + "/left"):
        time.sleep(0.02)
    print('{"status": "left"}')
elif does == "forks" and attempt == 1:
    while True:
        if os.fork() == 0:
            time.sleep(3600)
elif does == "closes":
    for fd in (0, 1, 2):
        os.close(fd)
    os._exit(0)
elif does == "goes-on-in-silence":
    for fd in (0, 1, 2):
        os.close(fd)
    with open(state + "/silent", "w") as file:
        file.write(params["_meta"]["id"])
    os._exit(0)
elif does == "connects":
    with socket.socket() as sock:
        sock.connect_ex(("192.0.2.1", 443))
elif does == "calls":
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.environ["PLUGIN_HOST_SOCKET"])
        sock.sendall(b'{"jsonrpc":"2.0","id":1,"method":"whoami"}\n')
        print(sock.makefile().readline())
"""
MANIFEST: dict[str, Any] = {
    "binary": "./main",
    "transport": {"mode": "exec"},
    "sandbox": {"filesystem": {"state": "8M"}},
    "delivery": {"timeout": "5s", "attempts": 3},
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a plugin for one kind of event, and one for another with four invocations at a time."""
    folder = tmp_path_factory.mktemp("exec")
    with daemon() as made:
        made.cli("plugin", "add", str(write_plugin(folder / "linter", PROGRAM, **MANIFEST)), "--yes")
        wide = {"hooks": ["deploy.failed"], "delivery": {"timeout": "60s", "concurrency": 4}}
        made.cli("plugin", "add", str(write_plugin(folder / "wide", PROGRAM, **(MANIFEST | wide))), "--yes")
        yield made


def seen(running: Daemon, plugin: str = "linter") -> list[dict[str, Any]]:
    """What the program has noted of its runs."""
    return [json.loads(line) for line in running.noted(plugin)]


def seen_of(running: Daemon, event_id: str, plugin: str = "linter") -> list[dict[str, Any]]:
    return [one for one in seen(running, plugin) if one["params"]["_meta"]["id"] == event_id]


def deliver(running: Daemon, does: str, number: str, **more: Any) -> dict[str, Any]:
    """Emit an event that makes the program do something; returns its delivery when that is final, and its id."""
    payload = event(number, url=f"https://{does}", **more)
    done = running.json("event", "emit", "deploy.completed", payload, "--wait", code=None)
    return {"id": done["id"], **next(one for one in done["deliveries"] if one["plugin"] == "linter")}


def of(running: Daemon, event_id: str, *types: str) -> list[dict[str, Any]]:
    """The records of these types that belong to an event."""
    return [one for one in running.records() if one.get("event_id") == event_id and one["type"] in types]


def hold(running: Daemon, number: str, project: str = "p1") -> str:
    """Emit an event at whose invocation the program stays until ``let_go``; returns its id once the invocation runs."""
    payload = json.dumps({"project_id": project, "deployment_id": number, "error_code": "holds"})
    emitted = running.json("event", "emit", "deploy.failed", payload)["id"]
    wait_for(lambda: seen_of(running, emitted, "wide"), what=running.log.read_text)
    return emitted


def let_go(running: Daemon) -> None:
    (running.state_of("wide") / "go-on").touch()


def outcome_of_held(running: Daemon, event_id: str) -> dict[str, Any]:
    """The final delivery of an event that was held."""

    def final() -> Any:
        delivery = running.json("event", "show", event_id)["deliveries"][0]
        return delivery if delivery["state"] in ("ok", "dead") else None

    return wait_for(final, what=running.log.read_text)


@pytest.fixture
def held(running: Daemon) -> Iterator[Daemon]:
    """The daemon while nothing lets held invocations go."""
    state = running.state_of("wide")
    if state.exists():  # from the first invocation on
        (state / "go-on").unlink(missing_ok=True)
    yield running
    let_go(running)


def test_each_event_runs_the_program_in_a_fresh_cage_and_the_last_line_is_the_result(running: Daemon) -> None:
    first, second = deliver(running, "result", "1"), deliver(running, "result", "2")
    assert (first["state"], first["status"], first["detail"]) == ("ok", "posted", "sent")
    assert json.loads(first["reply"])["to"] == "d1"
    runs = [*seen_of(running, first["id"]), *seen_of(running, second["id"])]
    assert [one["params"]["deployment_id"] for one in runs] == ["d1", "d2"]
    assert not any(one["memory"] for one in runs), "something of one event was there for the next"
    assert runs[0]["env"] == {"ID": first["id"], "TYPE": "deploy.completed", "ATTEMPT": "1"}
    assert runs[0]["params"]["_meta"]["attempt"] == 1
    started, ended = of(running, first["id"], "exec.started", "exec.ended")
    assert (started["type"], ended["type"], ended["data"]["exit_code"]) == ("exec.started", "exec.ended", 0)
    assert ended["data"]["cpu_us"] > 0 and ended["data"]["memory_peak"] > 0
    assert "plugin.started" not in {one["type"] for one in running.records()}


@pytest.mark.parametrize(
    ("does", "state", "attempts", "words"),
    [
        ("later", "ok", 2, ""), ("fails", "ok", 2, ""), ("dies", "ok", 2, ""),
        ("never", "dead", 1, "exit code 65: this is of no use"),
    ],
)  # fmt: skip
def test_exit_code_decides_about_the_event(running: Daemon, does: str, state: str, attempts: int, words: str) -> None:
    done = deliver(running, does, does)
    assert (done["state"], done["attempts"]) == (state, attempts)
    assert [one["params"]["_meta"]["attempt"] for one in seen_of(running, done["id"])] == [*range(1, attempts + 1)]
    assert words in (done["detail"] or "")
    entry = running.json("plugin", "show", "linter")
    assert entry["restarts"] == 0 and entry["state"] == "stopped", "a failed attempt is no crash"


def test_program_that_does_not_end_in_time_is_ended_and_the_event_is_repeated(running: Daemon) -> None:
    done = deliver(running, "hangs", "hangs")
    assert (done["state"], done["attempts"]) == ("ok", 2)
    causes = [one["data"]["cause"] for one in of(running, done["id"], "exec.ended")]
    assert causes == ["no end in 5 s", "exit"]


def test_update_is_in_use_at_once_and_comes_back_by_a_rollback_alone(running: Daemon, tmp_path: Path) -> None:
    folder, manifest = tmp_path / "updated", {"hooks": ["project.created"], "delivery": {"attempts": 1}}
    write_plugin(folder, '#!/bin/sh\necho \'{"status": "first"}\'\n', **(MANIFEST | manifest))
    running.cli("plugin", "add", str(folder), "--yes")
    write_plugin(folder, "#!/bin/sh\nexit 1\n", version="2.0.0", **(MANIFEST | manifest))
    running.cli("plugin", "update", "updated", str(folder))
    assert running.json("plugin", "show", "updated")["version"] == "2.0.0"
    emitted = running.json(
        "event", "emit", "project.created", '{"project_id": "p1", "name": "Shop"}', "--wait", code=None
    )
    assert [(one["state"], one["attempts"]) for one in emitted["deliveries"]] == [("dead", 1)]
    assert running.json("plugin", "show", "updated")["version"] == "2.0.0"
    running.cli("plugin", "rollback", "updated")
    running.cli("event", "replay", emitted["id"], "--plugin", "updated")
    wait_for(lambda: running.json("event", "show", emitted["id"])["deliveries"][0]["status"] == "first")
    running.cli("plugin", "remove", "updated", "--yes")


def test_output_without_bound_harms_nobody_and_a_line_too_long_is_no_result(running: Daemon) -> None:
    flooded, long = deliver(running, "floods", "floods"), deliver(running, "long", "long")
    assert (flooded["state"], long["state"]) == ("ok", "ok")
    assert flooded["status"] == "flooded"  # also beyond what is kept of its log in a second
    assert long["reply"] is None and long["status"] == "ok"


@pytest.mark.parametrize(
    ("does", "status", "attempts"),
    [
        ("daemonizes", "left", 1), ("closes", "ok", 1), ("forks", "ok", 2), ("goes-on-in-silence", "ok", 1),
        pytest.param("endless", "ok", 2, marks=pytest.mark.wide),
    ],
)  # fmt: skip
def test_hostile_program_ends_and_leaves_nothing(running: Daemon, does: str, status: str, attempts: int) -> None:
    host = running.service_pid("host.service")
    done = deliver(running, does, does)
    assert (done["state"], done["status"], done["attempts"]) == ("ok", status, attempts)
    (run,) = (one["run"] for one in of(running, done["id"], "exec.ended")[:1])
    assert not list(Path("/sys/fs/cgroup").rglob(f"linter.{run}"))
    assert int(Path(f"/proc/{host}/statm").read_text().split()[1]) * 4096 < 200 << 20
    assert deliver(running, "result", f"after-{does}")["attempts"] == 1


def test_event_too_large_for_one_shot_reaches_the_program_whole(running: Daemon) -> None:
    text = "\u00fc" * 2000
    done = deliver(running, "result", "large", commit_message=text)
    assert done["state"] == "ok"
    assert seen_of(running, done["id"])[0]["params"]["commit_message"] == text


def test_connection_and_call_of_an_invocation_are_on_record_with_their_one_event(running: Daemon) -> None:
    connects, calls = deliver(running, "connects", "connects"), deliver(running, "calls", "calls")
    assert json.loads(calls["reply"])["result"]["name"] == "linter"
    wait_for(lambda: of(running, connects["id"], "net.denied"), what="the refused connection is not on record")
    assert of(running, calls["id"], "api.called")
    assert not list((running.root / "run/isolator/hostapi").glob("linter.*"))


def test_invocations_of_different_keys_run_together_and_of_one_key_in_their_order(held: Daemon) -> None:
    keys = [hold(held, f"k{number}", f"p{number}") for number in range(3)]
    behind = held.json(
        "event", "emit", "deploy.failed",
        json.dumps({"project_id": "p0", "deployment_id": "behind", "error_code": "result"}),
    )["id"]  # fmt: skip
    assert not seen_of(held, behind, "wide")
    let_go(held)
    assert {outcome_of_held(held, one)["state"] for one in (*keys, behind)} == {"ok"}
    order = [one["params"]["deployment_id"] for one in seen(held, "wide")]
    assert order.index("k0") < order.index("behind")


def test_reload_and_an_exchange_of_the_host_lose_and_repeat_no_invocation(held: Daemon) -> None:
    before = [hold(held, f"r{number}", f"r{number}") for number in range(2)]
    held.cli("reload")
    during = hold(held, "during", "during")
    let_go(held)
    for one in (*before, during):
        done = outcome_of_held(held, one)
        assert (done["state"], done["status"], done["attempts"]) == ("ok", "held", 1)
        assert len(seen_of(held, one, "wide")) == 1


@pytest.mark.wide
def test_reloads_under_load_lose_and_repeat_no_event(running: Daemon) -> None:
    state = running.state_of("wide")
    if state.exists():
        (state / "go-on").touch()
    emitted: list[str] = []
    for batch in range(3):
        for number in range(12):
            payload = json.dumps(
                {"project_id": f"l{number % 6}", "deployment_id": f"{batch}.{number}", "error_code": "result"}
            )
            emitted.append(running.json("event", "emit", "deploy.failed", payload)["id"])
        running.cli("reload")
    for one in emitted:
        done = outcome_of_held(running, one)
        assert (done["state"], done["status"], done["attempts"]) == ("ok", "posted", 1), done
        assert len(seen_of(running, one, "wide")) == 1


def test_invocation_ends_before_its_plugin_is_stopped_and_none_begins_meanwhile(held: Daemon) -> None:
    one = hold(held, "stopped", "stopped")
    stopping = held.begin("plugin", "disable", "wide")
    let_go(held)
    assert stopping.wait(60) == 0, stopping.communicate()
    assert outcome_of_held(held, one)["attempts"] == 1
    queued = held.json(
        "event", "emit", "deploy.failed",
        json.dumps({"project_id": "q", "deployment_id": "q", "error_code": "result"}),
    )["id"]  # fmt: skip
    held.cli("plugin", "enable", "wide")
    done = outcome_of_held(held, queued)
    assert (done["state"], done["attempts"]) == ("ok", 1)


def test_invocation_of_a_killed_host_is_ended_and_its_event_delivered_again(held: Daemon) -> None:
    one = hold(held, "killed", "killed")
    os.kill(held.service_pid("host.service"), signal.SIGKILL)
    wait_for(lambda: len(seen_of(held, one, "wide")) == 2, what=held.log.read_text)
    (ended,) = of(held, one, "exec.ended")
    assert ended["data"]["cause"] == "the host has ended"
    let_go(held)
    done = outcome_of_held(held, one)
    assert (done["state"], done["attempts"]) == ("ok", 2)


def test_mode_exec_refuses_settings_of_a_resident_process(running: Daemon, tmp_path: Path) -> None:
    eager = write_plugin(tmp_path / "eager", PROGRAM, **MANIFEST, activation={"start": "eager"})
    refused = running.cli("plugin", "add", str(eager), "--yes", code=2)
    assert "nothing for the mode exec" in refused.stderr
    assert "each event starts its program" in running.cli("plugin", "start", "linter", code=2).stderr


@pytest.mark.parametrize("language", ["python", "sh"])
def test_a_new_plugin_of_the_mode_works_as_written(running: Daemon, tmp_path: Path, language: str) -> None:
    folder = tmp_path / f"my-{language}"
    running.cli("new", str(folder), "--lang", language, "--mode", "exec", "--hooks", "project.created")
    running.cli("plugin", "add", str(folder), "--yes")
    done = running.json("event", "emit", "project.created", '{"project_id": "p1", "name": "Shop"}', "--wait")
    assert [(one["state"], one["reply"]) for one in done["deliveries"]] == [("ok", done["deliveries"][0]["reply"])]
    assert json.loads(done["deliveries"][0]["reply"]) == {"status": "ok"}
    assert "project.created" in running.cli("plugin", "logs", folder.name).stdout
    running.cli("plugin", "remove", folder.name, "--yes")


def test_example_lints_each_deployment(running: Daemon) -> None:
    running.cli("plugin", "add", str(EXAMPLES / "exec-lint"), "--yes")
    done = running.json(
        "event", "emit", "deploy.started",
        json.dumps({"project_id": "p1", "deployment_id": "d1", "commit_message": "WIP: try it."}), "--wait",
    )  # fmt: skip
    (delivery,) = done["deliveries"]
    assert delivery["status"] == "faults"
    assert json.loads(delivery["reply"])["faults"] == [
        "the subject ends with a full stop",
        "the commit is not finished",
    ]
    running.cli("plugin", "remove", "exec-lint", "--yes")


@pytest.mark.wide
def test_prove_attacks_a_cage_like_the_plugins(running: Daemon) -> None:
    findings = running.json("prove", "linter")["findings"]
    assert len(findings) > 50 and not [one["name"] for one in findings if one["succeeded"]]
