"""What operators see at a glance: status, lists and notes; names and ids as people type them."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from host.cli.output import table
from host.cli.root import cli
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
    ran = await isolator(daemon.root, "event", "types", "deploy.complete")
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
    assert (ran.code, ran.out, ran.err) == (0, "", "chatty has written nothing since 2100-01-01\n")
    ran = await isolator(daemon.root, "plugin", "logs", "chatty", "--since", "1h", "--json")
    assert len(ran.out.splitlines()) == 2
    ran = await isolator(daemon.root, "plugin", "logs", "chatty", "--since", "1h", "-n", "1")
    assert ran.out.splitlines() == [lines[2]]
    ran = await isolator(daemon.root, "plugin", "logs", "chatty", "--since", "soon")
    assert ran.code == 2 and "neither like 2h nor like" in ran.err


async def test_logs_of_several_plugins_or_all_are_one_by_time_with_their_names(daemon: Daemon) -> None:
    for name in ("first", "the-other"):
        daemon.add(name, sidecars.oneshot('print("handled", flush=True)\nreturn {}'))
    await daemon.outcome(await daemon.emit())

    async def shown(*words: str) -> list[str]:
        return (await isolator(daemon.root, "plugin", "logs", *words)).out.splitlines()

    while len(lines := await shown()) < 2:
        pass
    assert sorted(line.split("Z ", 1)[1] for line in lines) == ["first       handled", "the-other   handled"]
    assert sorted(await shown("the-other", "first")) == sorted(lines)
    assert await shown("-n", "1") == lines[1:]
    found = [json.loads(line) for line in await shown("--json")]
    assert {one["plugin"] for one in found} == {"first", "the-other"}
    assert [one["time"] for one in found] == sorted(one["time"] for one in found)
    ran = await isolator(daemon.root, "plugin", "logs", "first", "the-othr")
    assert (ran.code, "did you mean the-other?" in ran.err) == (3, True)


async def test_shells_complete_names_of_plugins_and_events(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.add("notifier", sidecars.OK)
    daemon.add("indexer", sidecars.OK)
    emitted = (await daemon.emit())["id"]
    shell = ShellComplete(cli, {}, "isolator", "_ISOLATOR_COMPLETE")
    root = ["--root", str(daemon.root)]

    async def completed(*words: str) -> list[str]:
        found = await asyncio.to_thread(shell.get_completions, list(words[:-1]), words[-1])
        return [one.value for one in found]

    for words in (("plugin", "show"), ("plugin", "logs"), ("plugin", "stop", "indexer"), ("audit", "tail", "--plugin")):
        assert await completed(*root, *words, "no") == ["notifier"], words
    assert await completed(*root, "event", "emit", "deploy.c") == ["deploy.completed"]
    assert await completed(*root, "event", "show", "ev_") == [emitted]
    assert await completed("--root", str(daemon.root / "none"), "plugin", "show", "no") == []
    monkeypatch.setenv("ISOLATOR_ROOT", str(daemon.root))
    assert await completed("plugin", "show", "no") == ["notifier"]


@pytest.mark.parametrize("columns", [40, 60, 80, 100])
def test_table_loses_nothing_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    long = "config of slack-deploy-notifier: slack_webhook_url is required and not set"
    table(["name", "version", "state", "pid", "note"], [["slack-deploy-notifier", "1.2.0", "stopped", 31337, long]])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= columns for line in lines), lines
    shown = " ".join(" ".join(lines).split())
    assert all(word in shown for word in ("slack-deploy-notifier", "1.2.0", "stopped", "31337", *long.split())), lines


async def test_end_of_everything_needs_a_yes_where_nobody_can_be_asked(tmp_path: Path) -> None:
    (tmp_path / "var").mkdir()
    ran = await isolator(tmp_path, "uninstall", "--purge")
    assert (ran.code, ran.err) == (5, "isolator: uninstall --purge: nobody is there to agree; add --yes\n")
    ran = await isolator(tmp_path, "uninstall")
    assert ran.code == 0 and "no service is installed" in ran.err
