"""No accepted event is lost: kill -9 of the host, restarts of sidecars, removal.

A hundred kills under load, with a whole daemon, are in tests/system/test_killed_host.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

from host.lifecycle.lifecycle import EAGER_STARTS
from tests.host.fake_supervisor import Daemon
from tests.support import sidecars


def _recorder(daemon: Daemon, sleep: float = 0.0) -> tuple[str, Path]:
    log = daemon.root / "seen"
    log.touch()
    log.chmod(0o666)
    body = f"""
with open({str(log)!r}, "a") as file:
    file.write(params["deployment_id"] + " " + params["_meta"]["id"] + "\\n")
time.sleep({sleep})
return {{}}
"""
    return sidecars.oneshot(body), log


async def test_the_queue_survives_kill_9_of_the_host(daemon: Daemon) -> None:
    script, log = _recorder(daemon, 0.02)
    daemon.add("recorder", script)
    emitted = [await daemon.emit(deployment_id=str(n)) for n in range(50)]
    await daemon.kill_host()
    await daemon.start_host()
    for event in emitted:
        (delivery,) = (await daemon.outcome(event))["deliveries"]
        assert delivery["state"] == "ok"
    order = [int(line.split()[0]) for line in log.read_text().splitlines()]
    assert sorted(set(order)) == list(range(50))
    # At least once, in order: what comes again after the crash starts at most one event back.
    assert order == sorted(order)
    assert len(order) <= 51


async def test_sidecars_go_on_running_while_the_host_is_replaced(daemon: Daemon) -> None:
    sidecar = daemon.add("steady", sidecars.OK)
    await daemon.outcome(await daemon.emit())
    for _ in range(3):
        await daemon.kill_host()
        await daemon.start_host()
        (delivery,) = (await daemon.outcome(await daemon.emit()))["deliveries"]
        assert delivery["state"] == "ok"
    assert sidecar.starts == 1


async def test_event_in_flight_at_the_crash_has_an_attempt_and_comes_again_with_the_same_id(daemon: Daemon) -> None:
    script, log = _recorder(daemon, 0.7)
    daemon.add("slow", script)
    emitted = await daemon.emit(deployment_id="x")
    await daemon.until(lambda: len(daemon.of_type("event.dispatched")) == 1)
    await daemon.poll(log.read_text)
    await daemon.kill_host()
    await daemon.start_host()
    row = await daemon.ask("event.show", id=emitted["id"])
    assert row["deliveries"][0]["state"] == "retry"
    assert row["deliveries"][0]["attempts"] == 1
    (delivery,) = (await daemon.outcome(emitted))["deliveries"]
    assert (delivery["state"], delivery["attempts"]) == ("ok", 2)
    assert log.read_text().split() == ["x", emitted["id"]] * 2


async def test_logs_go_on_after_the_host_was_killed(daemon: Daemon) -> None:
    daemon.add("talker", sidecars.LOGGED)
    await daemon.outcome(await daemon.emit())
    await daemon.kill_host()
    await daemon.start_host()
    await daemon.outcome(await daemon.emit())
    await daemon.poll(lambda: len((daemon.paths.plugin_log / "talker.log").read_text().splitlines()) == 2)


async def test_a_restarted_sidecar_gets_the_next_event(daemon: Daemon) -> None:
    script, log = _recorder(daemon)
    sidecar = daemon.add("recorder", script)
    for number in range(5):
        emitted = await daemon.emit(deployment_id=str(number))
        (delivery,) = (await daemon.outcome(emitted))["deliveries"]
        assert delivery["state"] == "ok"
        os.kill(sidecar.process.pid, signal.SIGKILL)
        await daemon.until(lambda n=number: sidecar.starts == n + 2 and sidecar.run is not None)
    assert [line.split()[0] for line in log.read_text().splitlines()] == list("01234")


async def test_a_disabled_plugin_keeps_its_events(daemon: Daemon) -> None:
    daemon.add("rests", sidecars.OK)
    await daemon.ask("plugin.disable", name="rests")
    emitted = await daemon.emit()
    row = await daemon.outcome(emitted, timeout=0.5)
    assert row["deliveries"][0]["state"] == "queued"
    await daemon.ask("plugin.enable", name="rests")
    row = await daemon.outcome(emitted)
    assert row["deliveries"][0]["state"] == "ok"


async def test_a_removed_plugin_leaves_no_config_and_no_queue_for_its_namesake(daemon: Daemon) -> None:
    daemon.add("again", sidecars.OK)
    await daemon.ask("plugin.disable", name="again")
    await daemon.emit()
    await daemon.ask("config.set", name="again", config={"token": "old-secret"})
    await daemon.ask("plugin.remove", name="again")
    sidecar = daemon.add("again", sidecars.OK)
    assert (await daemon.ask("config.list", name="again"))["items"] == []
    (delivery,) = (await daemon.outcome(await daemon.emit()))["deliveries"]
    assert delivery["state"] == "ok"
    assert "token" not in sidecar.env


async def test_no_event_from_before_reaches_a_plugin_that_takes_the_name_of_a_removed_one(daemon: Daemon) -> None:
    accepted: list[dict[str, Any]] = []
    removed = asyncio.Event()

    async def emit_on() -> None:
        while not removed.is_set():
            accepted.append(await daemon.emit())

    for number in range(4):
        daemon.add("again", sidecars.OK)
        await daemon.deliver()
        removed.clear()
        emitters = [asyncio.create_task(emit_on()) for _ in range(4)]
        await daemon.ask("plugin.remove", name="again")
        removed.set()
        await asyncio.gather(*emitters)
        sidecar = daemon.add("again", sidecars.LOGGED)
        fresh = await daemon.emit(deployment_id=f"fresh{number}")
        await daemon.outcome(fresh)
        lines = [entry["line"] for entry in (await daemon.ask("plugin.logs", name="again"))["lines"]]
        events = [json.loads(line.removeprefix("event ")) for line in lines if line.startswith("event ")]
        assert {event["deployment_id"] for event in events} == {f"fresh{number}"}
        for event in accepted:
            shown = await daemon.ask("event.show", id=event["id"])
            assert [d for d in shown["deliveries"] if d["state"] in ("queued", "retry", "in_flight")] == []
        accepted.clear()
        await daemon.ask("plugin.remove", name=sidecar.name)


async def test_events_of_a_plugin_whose_policy_is_of_no_use_wait_for_it(daemon: Daemon) -> None:
    sidecar = daemon.add("typo", sidecars.OK)
    sidecar.state = "disabled"
    daemon.changed(sidecar)
    before = await daemon.emit()
    await daemon.kill_host()
    sidecar.state = "rejected"
    await daemon.start_host()
    meanwhile = await daemon.emit()
    assert meanwhile["plugins"] == ["typo"]
    for event in (before, meanwhile):
        assert [d["state"] for d in (await daemon.outcome(event, timeout=0.3))["deliveries"]] == ["queued"]
    sidecar.state = "stopped"
    daemon.changed(sidecar)
    for event in (before, meanwhile):
        assert [d["state"] for d in (await daemon.outcome(event))["deliveries"]] == ["ok"]


async def test_plugins_for_which_events_wait_start_before_all_eager_ones(daemon: Daemon) -> None:
    waiting = daemon.add("waiting", sidecars.OK)
    waiting.state = "disabled"
    daemon.changed(waiting)
    emitted = await daemon.emit()
    await daemon.kill_host()
    waiting.state, daemon.fresh = "stopped", True
    for number in range(3 * EAGER_STARTS):
        daemon.add(f"eager{number}", sidecars.OK, activation={"start": "eager"})
    daemon.first = "import host.lifecycle.lifecycle as it\nit.EAGER_PATIENCE = 600.0\n"
    daemon.starts_may_go_on.clear()
    await daemon.start_host()
    await daemon.until(lambda: len(daemon.ensured) == 1 + EAGER_STARTS)
    await daemon.ask("status")
    assert len(daemon.ensured) == 1 + EAGER_STARTS
    assert "waiting" in daemon.ensured
    daemon.starts_may_go_on.set()
    assert [d["state"] for d in (await daemon.outcome(emitted))["deliveries"] if d["plugin"] == "waiting"] == ["ok"]
    await daemon.until(lambda: len(daemon.ensured) == 1 + 3 * EAGER_STARTS)
