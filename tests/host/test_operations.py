"""Deliveries as an operator changes them: pauses, and events that wait, in the order of their keys and over crashes."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from isolator.errors import IsolatorError, NotFoundError, UsageError
from tests.host.fake_supervisor import Daemon
from tests.host.test_cli import isolator
from tests.support import sidecars
from tests.support.timeouts import seconds

LATER = 'return {"status": "retry", "retry_after_ms": 600000}'
"""Ten minutes: longer than any test waits."""


def _noted(daemon: Daemon, *, while_missing: str = "", of: str = "") -> str:
    """A plugin that notes the deployments it was sent, and wants all, or one, again later while a file is missing."""
    seen = daemon.root / "seen"
    seen.touch()
    seen.chmod(0o666)
    when = f'not os.path.exists({while_missing!r}) and params["deployment_id"] in ({of!r} or params["deployment_id"])'
    again = f"if {when}:\n    {LATER}\n" if while_missing else ""
    note = f'open({str(seen)!r}, "a").write(params["deployment_id"] + "\\n")'
    return sidecars.oneshot(f'{note}\n{again}return {{"status": "ok"}}')


def _seen(daemon: Daemon) -> list[str]:
    return (daemon.root / "seen").read_text().split()


async def _shown(daemon: Daemon, event_id: str) -> dict[str, Any]:
    (delivery,) = (await daemon.ask("event.show", id=event_id))["deliveries"]
    assert isinstance(delivery, dict)
    return delivery


async def _state_is(daemon: Daemon, event_id: str, state: str) -> None:
    async with asyncio.timeout(seconds(20)):
        while (await _shown(daemon, event_id))["state"] != state:  # noqa: ASYNC110 # no notification tells
            await asyncio.sleep(0.02)


# Pauses


async def test_paused_plugin_gets_nothing_and_its_sidecar_stays(daemon: Daemon) -> None:
    daemon.add("one", _noted(daemon))
    await daemon.outcome(await daemon.emit(deployment_id="before"))
    run = daemon.sidecars["one"].run
    assert await daemon.ask("plugin.pause", name="one") == {"paused": True, "changed": True, "holders": []}
    assert await daemon.ask("plugin.pause", name="one") == {"paused": True, "changed": False, "holders": []}
    waiting = await daemon.emit(deployment_id="while")
    other = await daemon.emit(deployment_id="another")
    shown = await daemon.ask("plugin.show", name="one")
    assert (shown["queue"], shown["paused"]["by"], shown["run"]) == (2, "uid:0", run)
    assert (await daemon.ask("status"))["paused"] == ["one"]
    assert (await _shown(daemon, waiting["id"]))["holding"] == "it is paused"
    assert await daemon.ask("plugin.resume", name="one") == {"paused": False, "changed": True, "holders": []}
    for emitted in (waiting, other):
        (delivery,) = (await daemon.outcome(emitted))["deliveries"]
        assert (delivery["state"], delivery["attempts"]) == ("ok", 1)
    assert _seen(daemon) == ["before", "while", "another"]
    assert daemon.sidecars["one"].run == run
    assert (await daemon.ask("plugin.show", name="one"))["paused"] is None
    assert [r["data"]["by"] for t in ("plugin.paused", "plugin.resumed") for r in daemon.of_type(t)] == ["uid:0"] * 2


async def test_pause_survives_a_kill_of_the_host_and_ends_with_the_plugin(daemon: Daemon) -> None:
    daemon.add("one", _noted(daemon))
    await daemon.ask("plugin.pause", name="one")
    emitted = await daemon.emit(deployment_id="while")
    await daemon.kill_host()
    await daemon.start_host()
    assert (await daemon.ask("plugin.show", name="one"))["paused"]["by"] == "uid:0"
    second = await daemon.emit(deployment_id="after")
    assert daemon.sidecars["one"].run is None, "no event starts a paused plugin"
    await daemon.ask("plugin.resume", name="one")
    for each in (emitted, second):
        await daemon.outcome(each)
    assert _seen(daemon) == ["while", "after"]
    await daemon.ask("plugin.pause", name="one")
    await daemon.ask("plugin.remove", name="one")
    await daemon.kill_host()
    await daemon.start_host()
    daemon.add("one", _noted(daemon))
    assert (await daemon.deliver())["state"] == "ok", "the namesake is not paused"


@pytest.mark.parametrize("mode", ["oneshot", "stream"])
async def test_event_in_flight_at_the_pause_is_concluded_and_those_behind_wait(daemon: Daemon, mode: str) -> None:
    go = daemon.root / "go"
    hold = f"while not os.path.exists({str(go)!r}):\n    time.sleep(0.01)\n"
    if mode == "stream":
        script = sidecars.stream(f'{hold}send(id=id, result={{"status": "ok"}})')
    else:
        script = sidecars.oneshot(f'{hold}return {{"status": "ok"}}')
    more = {"transport": {"mode": mode, "max_in_flight": 1}} if mode == "stream" else {}
    daemon.add("slow", script, **more)
    first, second = await daemon.emit(deployment_id="a"), await daemon.emit(deployment_id="b")
    await _state_is(daemon, first["id"], "in_flight")
    await daemon.ask("plugin.pause", name="slow")
    go.touch()
    await daemon.outcome(first)
    assert (await _shown(daemon, second["id"]))["attempts"] == 0
    await daemon.ask("plugin.resume", name="slow")
    assert (await daemon.outcome(second))["deliveries"][0]["state"] == "ok"


# Events that wait


async def test_retry_goes_at_once_and_keeps_its_place(daemon: Daemon) -> None:
    works = daemon.root / "works"
    daemon.add("one", _noted(daemon, while_missing=str(works)))
    first = await daemon.emit(deployment_id="a")
    await _state_is(daemon, first["id"], "retry")
    second = await daemon.emit(deployment_id="b")
    with pytest.raises(UsageError, match=first["id"]):
        await daemon.ask("event.retry", id=second["id"])
    works.touch()
    assert await daemon.ask("event.retry", id=first["id"]) == {"id": first["id"], "plugins": ["one"]}
    for each in (first, second):
        assert (await daemon.outcome(each))["deliveries"][0]["state"] == "ok"
    assert _seen(daemon) == ["a", "a", "b"]
    (record,) = daemon.of_type("event.retried")
    assert (record["event_id"], record["plugin"]) == (first["id"], "one")
    assert record["data"] == {"attempts": 1, "by": "uid:0"}
    with pytest.raises(UsageError, match="none of its deliveries waits"):
        await daemon.ask("event.retry", id=first["id"])


@pytest.mark.parametrize(("verb", "state"), [("event.skip", "skipped"), ("event.cancel", "cancelled")])
async def test_event_that_is_passed_over_lets_its_key_go_on_also_after_a_kill(
    daemon: Daemon, verb: str, state: str
) -> None:
    daemon.add("one", _noted(daemon, while_missing="/no/such/file", of="poison"))
    poison = await daemon.emit(deployment_id="poison")
    await _state_is(daemon, poison["id"], "retry")
    behind = await daemon.emit(deployment_id="behind")
    assert (await _shown(daemon, behind["id"]))["state"] == "queued"
    await daemon.ask("plugin.pause", name="one")  # the one behind must not be in flight at the kill
    assert await daemon.ask(verb, id=poison["id"][:16]) == {"id": poison["id"], "plugins": ["one"]}
    await daemon.until(lambda: daemon.of_type(f"event.{state}"))
    await daemon.kill_host()
    await daemon.start_host()
    await daemon.ask("plugin.resume", name="one")
    assert (await daemon.outcome(behind))["deliveries"][0]["state"] == "ok"
    delivery = await _shown(daemon, poison["id"])
    assert (delivery["state"], delivery["detail"]) == (state, f"{state} by uid:0")
    assert _seen(daemon) == ["poison", "behind"]
    assert [r["event_id"] for r in daemon.of_type(f"event.{state}")] == [poison["id"]]
    assert (await daemon.ask("event.dead"))["deliveries"] == []
    with pytest.raises(UsageError, match="none of its deliveries waits"):
        await daemon.ask(verb, id=poison["id"])


async def test_event_in_flight_is_neither_skipped_nor_cancelled(daemon: Daemon) -> None:
    go = daemon.root / "go"
    daemon.add("slow", sidecars.oneshot(f"while not os.path.exists({str(go)!r}):\n    time.sleep(0.01)\nreturn 1"))
    emitted = await daemon.emit()
    await _state_is(daemon, emitted["id"], "in_flight")
    for verb in ("event.skip", "event.cancel"):
        with pytest.raises(UsageError, match="in flight in slow"):
            await daemon.ask(verb, id=emitted["id"])
    go.touch()
    assert (await daemon.outcome(emitted))["deliveries"][0]["state"] == "ok"
    with pytest.raises(NotFoundError):
        await daemon.ask("event.skip", id=emitted["id"], plugin="nobody")


async def test_list_is_narrowed_by_plugin_state_type_and_time(daemon: Daemon) -> None:
    daemon.add("one", _noted(daemon))
    daemon.add("no", sidecars.oneshot('return {"status": "rejected"}'), hooks=["deploy.completed", "project.created"])
    done = await daemon.emit(deployment_id="a")
    await daemon.outcome(done)
    project = await daemon.ask("event.emit", name="project.created", payload={"project_id": "p", "name": "n"})
    await daemon.outcome(project)

    async def ids(**narrowed: Any) -> list[str]:
        return [event["id"] for event in (await daemon.ask("event.list", **narrowed))["events"]]

    assert await ids(plugin="one") == [done["id"]]
    assert await ids(state="dead") == [project["id"], done["id"]]
    assert await ids(plugin="one", state="dead") == []
    assert await ids(event="project.created", plugin="no") == [project["id"]]
    assert await ids(since=4e9) == []
    with pytest.raises(IsolatorError, match="must be one of queued"):
        await daemon.ask("event.list", state="nonsense")


async def test_commands_change_deliveries_and_show_pauses(daemon: Daemon) -> None:
    daemon.add("one", _noted(daemon, while_missing="/no/such/file"))
    assert (await isolator(daemon.root, "plugin", "pause", "one")).out == "paused one\n"
    emitted = await daemon.emit()
    ran = await isolator(daemon.root, "plugin", "list")
    assert "by uid:0; isolator plugin resume one" in ran.out
    assert "paused:" in (await isolator(daemon.root, "plugin", "show", "one")).out
    assert "paused:    one" in (await isolator(daemon.root, "status")).out
    assert (await isolator(daemon.root, "plugin", "resume", "one")).out == "resumed one\n"
    await _state_is(daemon, emitted["id"], "retry")
    ran = await isolator(daemon.root, "event", "list", "--plugin", "one", "--state", "retry", "--since", "1h", "--json")
    assert [event["id"] for event in ran.json] == [emitted["id"]]
    ran = await isolator(daemon.root, "event", "retry", emitted["id"])
    assert ran.out == f"retrying {emitted['id']} for one\n"
    await daemon.until(lambda: len(daemon.of_type("event.response")) == 2)
    await _state_is(daemon, emitted["id"], "retry")
    ran = await isolator(daemon.root, "event", "skip", emitted["id"], "--plugin", "one", "--json")
    assert ran.json == {"id": emitted["id"], "plugins": ["one"]}
    assert (await isolator(daemon.root, "event", "cancel", emitted["id"])).code == 2


# Recovery jobs


def _rejects(daemon: Daemon) -> str:
    """A plugin that gives up every event until a file is there, and notes those that it handles."""
    seen, works = daemon.root / "seen", daemon.root / "works"
    seen.touch()
    seen.chmod(0o666)
    note = f'open({str(seen)!r}, "a").write(params["deployment_id"] + "\\n")'
    refuse = f'if not os.path.exists({str(works)!r}):\n    return {{"status": "rejected"}}\n'
    return sidecars.oneshot(f'{refuse}{note}\nreturn {{"status": "ok"}}')


async def _given_up(daemon: Daemon, count: int) -> list[str]:
    """Events that were given up."""
    emitted = [await daemon.emit(deployment_id=f"d{n}") for n in range(count)]
    for one in emitted:
        await daemon.outcome(one)
    (daemon.root / "works").touch()
    return [one["id"] for one in emitted]


async def _job(daemon: Daemon, job: str, state: str) -> dict[str, Any]:
    async with asyncio.timeout(seconds(30)):
        while True:
            (found,) = [one for one in (await daemon.ask("event.jobs"))["jobs"] if one["id"] == job]
            if found["state"] == state:
                assert isinstance(found, dict)
                return found
            await asyncio.sleep(0.05)


async def test_recovery_plans_first_and_queues_what_was_given_up_in_order(daemon: Daemon) -> None:
    daemon.add("one", _rejects(daemon))
    ids = await _given_up(daemon, 6)
    plan = await daemon.ask("event.recover", plugin="one", since=0, dry_run=True)
    assert plan == {"job": None, "plugin": "one", "count": 6}
    assert (await daemon.ask("event.recover", plugin="one", since=4e9))["count"] == 0
    assert (await daemon.ask("event.recover", plugin="one", since=0, missed=True))["count"] == 0
    assert _seen(daemon) == [], "a plan changes nothing"
    begun = await daemon.ask("event.recover", plugin="one", since=0, rate=100)
    job = await _job(daemon, begun["job"], "done")
    assert (job["done"], job["total"], job["by"], job["dead"], job["missed"]) == (6, 6, "uid:0", True, True)
    for one in ids:
        assert (await daemon.outcome({"id": one}))["deliveries"][0]["state"] == "ok"
    assert _seen(daemon) == [f"d{n}" for n in range(6)]
    replayed = [(r["event_id"], r["data"]["reason"], r["data"]["by"]) for r in daemon.of_type("event.replayed")]
    assert replayed == [(one, begun["job"], "uid:0") for one in ids]
    assert (await daemon.ask("event.recover", plugin="one", since=0))["job"] is None, "nothing is left"
    for wrong in ({"rate": 0}, {"rate": 1e9}, {"since": "x"}):
        with pytest.raises(UsageError):
            await daemon.ask("event.recover", **({"plugin": "one", "since": 0} | wrong))


async def test_plugin_gets_what_it_has_missed_as_far_as_its_hooks_and_filters_go(daemon: Daemon) -> None:
    for project in ("shop", "bank", "shop"):
        await daemon.emit(project_id=project, deployment_id=project)
    await daemon.ask("event.emit", name="project.created", payload={"project_id": "shop", "name": "n"})
    wanted = {"filters": [{"exact": {"project_id": "shop"}}]}
    daemon.add("late", _noted(daemon), delivery=wanted)
    assert (await daemon.ask("event.recover", plugin="late", since=0, dead=True))["count"] == 0
    begun = await daemon.ask("event.recover", plugin="late", since=0, missed=True, rate=100)
    assert begun["count"] == 2
    await _job(daemon, begun["job"], "done")
    await daemon.poll(lambda: _seen(daemon) == ["shop", "shop"])
    assert (await daemon.ask("event.recover", plugin="late", since=0))["count"] == 0


async def test_recovery_goes_on_after_a_kill_and_repeats_nothing_that_had_ended(daemon: Daemon) -> None:
    daemon.add("one", _rejects(daemon))
    ids = await _given_up(daemon, 30)
    begun = await daemon.ask("event.recover", plugin="one", since=0, rate=20)
    await daemon.poll(lambda: len(_seen(daemon)) >= 5)
    events = (await daemon.ask("event.list"))["events"]
    ended = {event["payload"]["deployment_id"] for event in events if event["deliveries"][0]["state"] == "ok"}
    await daemon.kill_host()
    assert len(_seen(daemon)) < 30
    await daemon.start_host()
    job = await _job(daemon, begun["job"], "done")
    assert job["done"] == 30, "each was queued once"
    for one in ids:
        assert (await daemon.outcome({"id": one}))["deliveries"][0]["state"] == "ok"
    seen = _seen(daemon)
    assert ended and {one for one in ended if seen.count(one) != 1} == set()
    assert set(seen) == {f"d{n}" for n in range(30)}


async def test_job_that_is_cancelled_leaves_the_rest_as_it_was_also_when_its_plugin_goes(daemon: Daemon) -> None:
    daemon.add("one", _rejects(daemon))
    await _given_up(daemon, 10)
    begun = await daemon.ask("event.recover", plugin="one", since=0, rate=2)
    await daemon.poll(lambda: _seen(daemon))
    assert await daemon.ask("event.cancel", id=begun["job"][:14]) == {"id": begun["job"], "plugins": ["one"]}
    job = await _job(daemon, begun["job"], "cancelled")
    with pytest.raises(UsageError, match="cancelled already"):
        await daemon.ask("event.cancel", id=begun["job"])
    left = (await daemon.ask("event.dead"))["deliveries"]
    assert 0 < job["done"] < 10 and len(left) == 10 - job["done"]

    begun = await daemon.ask("event.recover", plugin="one", since=0, rate=1)
    await daemon.ask("plugin.remove", name="one")
    daemon.add("one", _rejects(daemon))
    await _job(daemon, begun["job"], "cancelled")
    assert (await daemon.ask("plugin.show", name="one"))["queue"] == 0, "nothing is for the namesake"


async def test_commands_recover_and_list_jobs(daemon: Daemon) -> None:
    daemon.add("one", _rejects(daemon))
    await _given_up(daemon, 2)
    ran = await isolator(daemon.root, "event", "recover", "--plugin", "one", "--since", "1h", "--dry-run")
    assert ran.out == "2 deliveries to recover for one\n"
    words = ("event", "recover", "--plugin", "one", "--since", "1h", "--rate")
    ran = await isolator(daemon.root, *words, "50/s", "--dead", "--json")
    assert ran.json["count"] == 2
    await _job(daemon, ran.json["job"], "done")
    assert re.search(r"job_\w+ +one +dead +done +2/2 +50/s", (await isolator(daemon.root, "event", "jobs")).out)
    assert (await isolator(daemon.root, *words, "x")).code == 2
    assert (await isolator(daemon.root, "event", "cancel", "job_nothing")).code == 3


async def test_command_waits_for_its_job_and_fails_with_one_that_is_cancelled(daemon: Daemon) -> None:
    daemon.add("one", _rejects(daemon))
    await _given_up(daemon, 3)
    words = ("event", "recover", "--plugin", "one", "--since", "1h", "--dead", "--wait", "--rate")
    waiting = asyncio.create_task(isolator(daemon.root, *words, "0.001/s"))
    async with asyncio.timeout(seconds(20)):
        while not (jobs := (await daemon.ask("event.jobs"))["jobs"]):  # noqa: ASYNC110 # no notification tells
            await asyncio.sleep(0.02)
    await daemon.ask("event.cancel", id=jobs[0]["id"])
    ran = await waiting
    assert (ran.code, ran.err) == (1, f"isolator: job {jobs[0]['id']}: was cancelled; isolator event jobs\n")
    ran = await isolator(daemon.root, *words, "100/s", "--json")
    assert (ran.code, ran.json["count"], ran.json["state"]) == (0, 3, "done")
