"""What operators see at a glance: status, lists and notes; names and ids as people type them."""

from __future__ import annotations

import json
import re
import time

from tests.host.fake_supervisor import Daemon
from tests.host.test_cli import isolator
from tests.support import sidecars

FAILS = sidecars.oneshot('return {"status": "retry", "message": "the other side is away", "retry_after_ms": 600_000}')


async def test_status_of_a_healthy_daemon_fits_one_screen_and_exits_0(daemon: Daemon) -> None:
    daemon.add("fine", sidecars.OK)
    await daemon.outcome(await daemon.emit())
    ran = await isolator(daemon.root, "status")
    assert (ran.code, ran.err) == (0, ""), ran
    assert daemon.host is not None
    lines = dict(line.split(":", 1) for line in ran.out.splitlines())
    assert lines["processes"].strip() == f"host {daemon.host.pid}"
    assert lines["plugins"].strip() == "1 running"
    assert lines["queue"].strip() == "0 deliveries not done"
    assert "failing" not in lines and all(len(line) <= 80 for line in ran.out.splitlines() if "daemon" not in line)


async def test_failing_plugin_shows_in_status_list_and_show(daemon: Daemon) -> None:
    daemon.add("fine", sidecars.OK)
    daemon.add("sad", FAILS)
    emitted = (await daemon.emit())["id"]
    await daemon.until(lambda: any(r["data"]["outcome"] == "retry" for r in daemon.of_type("event.response")))
    ran = await isolator(daemon.root, "status", "--json")
    assert (ran.code, ran.json["failing"], ran.json["states"]) == (1, ["sad"], {"running": 2})
    assert [s["name"] for s in ran.json["services"]] == ["host"]

    ran = await isolator(daemon.root, "plugin", "ls", "--failed")
    (row,) = ran.out.splitlines()[1:]
    assert re.fullmatch(r"sad +1\.0\.0 .* failing for \d+s: the other side is away(; next try in \d+[sm])?", row)
    (entry,) = (await isolator(daemon.root, "plugin", "list", "--failed", "--json")).json
    assert entry["last"]["event_id"] == emitted
    assert entry["failing_since"] <= entry["last"]["at"] < (entry["next_attempt"] or time.time())
    shown = (await isolator(daemon.root, "plugin", "inspect", "sad")).out
    assert re.search(r"^last outcome:     retry, \d+s ago, the other side is away  \(ev_", shown, re.M)
    assert re.search(rf"^held back by:     {emitted}$", shown, re.M)
    assert (await isolator(daemon.root, "plugin", "show", "fine", "--json")).json["held_by"] is None


async def test_ids_may_be_shortened_as_long_as_they_name_one_event(daemon: Daemon) -> None:
    daemon.add("fine", sidecars.OK)
    emitted = [await daemon.emit(), await daemon.emit()]
    first, second = (one["id"] for one in emitted)
    await daemon.outcome(emitted[1])
    ran = await isolator(daemon.root, "event", "show", second[:-3], "--json")
    assert ran.json["id"] == second
    ran = await isolator(daemon.root, "event", "show", "ev_")
    assert ran.code == 2 and "several ids begin so" in ran.err and first in ran.err
    ran = await isolator(daemon.root, "event", "replay", "ev_f")
    assert (ran.code, ran.err) == (3, "isolator: event ev_f: is not stored; see 'isolator event list'\n")


async def test_unknown_names_in_filters_are_errors_with_the_nearest(daemon: Daemon) -> None:
    daemon.add("notifier", sidecars.OK)
    ran = await isolator(daemon.root, "event", "list", "--name", "deploy.complete")
    assert ran.code == 3 and "did you mean deploy.completed?" in ran.err
    ran = await isolator(daemon.root, "event", "dead", "--plugin", "notifer")
    assert (ran.code, ran.err) == (3, "isolator: plugin notifer: is not registered; did you mean notifier?\n")


async def test_verbs_take_several_names_and_go_on_after_a_mistake(daemon: Daemon) -> None:
    daemon.add("one", sidecars.OK)
    daemon.add("two", sidecars.OK)
    ran = await isolator(daemon.root, "plugin", "start", "one", "missing", "two")
    assert ran.code == 3
    assert [line.split(",")[0] for line in ran.out.splitlines()] == ["started one", "started two"]
    assert "plugin missing: is not registered" in ran.err
    ran = await isolator(daemon.root, "plugin", "stop", "one", "missing", "--json")
    assert ran.code == 3 and ran.json["one"] == {} and ran.json["missing"]["error"]["code"] == "not_found"


async def test_removal_needs_a_yes_where_nobody_can_be_asked(daemon: Daemon) -> None:
    daemon.add("kept", sidecars.OK)
    ran = await isolator(daemon.root, "plugin", "rm", "kept")
    assert (ran.code, ran.err) == (5, "isolator: plugin remove: nobody is there to agree; add --yes\n")
    assert (await isolator(daemon.root, "plugin", "show", "kept")).code == 0


async def test_errors_are_json_where_json_was_wanted(daemon: Daemon) -> None:
    ran = await isolator(daemon.root, "plugin", "show", "nobody", "--json")
    assert (ran.code, ran.out) == (3, "")
    error = json.loads(ran.err)["error"]
    assert (error["code"], error["exit_code"], error["what"]) == ("not_found", 3, "plugin nobody")
    ran = await isolator(daemon.root, "plugin", "show", "--json")
    assert (ran.code, json.loads(ran.err)["error"]["code"]) == (2, "usage")


async def test_wait_prints_the_id_before_the_outcome(daemon: Daemon) -> None:
    daemon.add("slow", sidecars.oneshot("time.sleep(0.2); return {}"))
    payload = {"project_id": "p", "deployment_id": "d", "url": "https://x.example", "duration_ms": 1}
    ran = await isolator(daemon.root, "event", "emit", "deploy.completed", json.dumps(payload), "--wait")
    first, heading, row = ran.out.splitlines()[:3]
    assert first.startswith("ev_") and first.endswith("  deploy.completed  emitted")
    assert heading.startswith("plugin") and row.startswith("slow  ")


async def test_log_marks_where_another_run_begins_and_can_begin_at_a_time(daemon: Daemon) -> None:
    sidecar = daemon.add(
        "chatty", sidecars.oneshot("return {}", first='print("hello from", os.getpid(), flush=True)\n')
    )
    await daemon.outcome(await daemon.emit())
    await daemon.stop_sidecar(sidecar)
    await daemon.outcome(await daemon.emit())

    async def shown() -> list[str]:
        return (await isolator(daemon.root, "plugin", "logs", "chatty")).out.splitlines()

    while len(lines := await shown()) < 3:
        pass
    assert lines[0].endswith("hello from " + lines[0].split()[-1]) and lines[1] == f"--- run {sidecar.run}"
    ran = await isolator(daemon.root, "plugin", "logs", "chatty", "--since", "2100-01-01")
    assert (ran.code, ran.out) == (0, "")
    ran = await isolator(daemon.root, "plugin", "logs", "chatty", "--since", "1h", "--json")
    assert len(ran.out.splitlines()) == 2
    ran = await isolator(daemon.root, "plugin", "logs", "chatty", "--since", "soon")
    assert ran.code == 2 and "neither like 2h nor like" in ran.err
