"""The steps of the demo with several hosts, while the platforms of all three emit."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import report
from daemon import DemoError, event_id_of
from hosts_stage import Demo, Host

from tests.cluster.outages import history
from tests.support.ledger import COURIER, PORT

NAME = COURIER.name
DEPLOY = {"project_id": "shop", "deployment_id": "dep_001", "url": "https://shop.example", "duration_ms": 8123}
MOVED_BY = 40.0
"""Seconds after which a take-over that has not come will not come; it takes about 18."""


def add_plugin(demo: Demo) -> None:
    report.heading(2, "A plugin, which one of them holds")
    report.say(
        "courier enters each deployment into the ledger. It is added on every host that shall be able to run it; one"
        " holds it, by a lease of the log, and whoever emits where, its events come from all."
    )
    demo.hosts[0].daemon.show("plugin", "add", str(COURIER), "--yes")
    for host in demo.hosts[1:]:
        code, text = host.daemon.run("plugin", "add", str(COURIER), "--yes")
        if code:
            raise DemoError(f"courier was not added on {host.name}: {text.strip()[-300:]}")
    report.say("(The same on h2 and h3.)")
    for host in demo.hosts:
        host.daemon.run("event", "emit", "deploy.completed", json.dumps(DEPLOY), "--wait")
    demo.wait(lambda: demo.ledger.holder, 60, "no host has the plugin")
    elsewhere = demo.others(demo.holder)[0]
    report.blank()
    report.say(f"{demo.holder.name} holds it. On {elsewhere.name}, which does not:")
    text = elsewhere.daemon.show("event", "emit", "deploy.completed", json.dumps(DEPLOY), "--wait")
    handled = next((one.host for one in demo.ledger.handled if one.event == text.split()[0]), "nobody")
    demo.promise(
        "An event reaches its plugin elsewhere", handled not in {elsewhere.name, "nobody"},
        f"emitted on {elsewhere.name}, entered by {handled}",
    )  # fmt: skip


def host_dies(demo: Demo) -> None:
    dead = demo.holder
    report.heading(3, f"The machine of {dead.name} dies")
    report.say(
        f"Platforms emit on all three hosts from now on. Then {dead.name}, which holds the plugin, loses its power:"
        " its daemon, its cages and its server are gone at once, and its network with them."
    )
    demo.wait(lambda: len(demo.ledger.events) > 60, 60, "the platforms' events are not handled")
    apart = contextlib.ExitStack()
    apart.enter_context(demo.apart(dead))
    began = time.monotonic()
    dead.server.kill()
    dead.daemon.kill()
    dead.stop()
    try:
        demo.wait(lambda: demo.ledger.holder != dead.name, MOVED_BY, f"nobody takes over from {dead.name}")
        took = demo.ledger.holdings[-1].first - began
        report.blank()
        report.say(f"{took:.1f} s later another host has it:")
        demo.others(dead)[0].daemon.show("cluster", "status")
        demo.promise("A dead host's plugin moves", True, f"{dead.name} to {demo.holder.name}, within {took:.1f} s")
    finally:
        apart.close()
    comes_back(demo, dead)


def comes_back(demo: Demo, dead: Host) -> None:
    report.heading(4, f"{dead.name} comes back")
    report.say("What it had accepted and not sent is on its disk, and goes into the log now. Nothing moves back.")
    before = demo.holder
    dead.server.start()
    dead.start()
    demo.wait(lambda: demo.quiet(demo.hosts), 90, f"{dead.name} is no member again")
    report.say(f"{dead.name} is a member again, its outbox is empty, and {demo.holder.name} holds the plugin.")
    demo.promise("Who comes back takes nothing away", before is demo.holder, f"{demo.holder.name} has held it on")


def cut_off(demo: Demo) -> None:
    old = demo.holder
    report.heading(5, f"{old.name} is cut off")
    report.say(
        f"Now whatever passes between {old.name} and the other machines is dropped, without a word to anybody. Its"
        " plugin could still reach the ledger. It must not: nobody can tell it whether another host has the plugin by"
        " now."
    )
    group = Path(old.records("plugin.started")[-1]["data"]["cgroup"])
    frozen_before = len(old.records("plugin.frozen"))
    with demo.apart(old):
        began = time.monotonic()
        report.blank()
        report.say(f"{old.name} goes on accepting:")
        demo.story = event_id_of(old.daemon.show("event", "emit", "deploy.completed", json.dumps(DEPLOY), "--json"))
        demo.wait(lambda: len(old.records("plugin.frozen")) > frozen_before, MOVED_BY, f"{old.name} freezes nothing")
        froze = time.monotonic() - began
        used = used_by(group)
        report.blank()
        report.say(f"{froze:.1f} s after the cut it has frozen the plugin's cage:")
        old.daemon.show("plugin", "list")
        old.daemon.show("cluster", "status", code=1)
        demo.wait(lambda: demo.ledger.holder != old.name, MOVED_BY, f"nobody takes over from {old.name}")
        took = demo.ledger.holdings[-1].first - began
        pause = demo.ledger.holdings[-1].first - demo.ledger.holdings[-2].last
        stands_still = used_by(group) == used
        reachable = old.machine.reaches(PORT)
    report.blank()
    report.say(
        f"{demo.holder.name} has the plugin {took:.1f} s after the cut. The ledger had its last line from {old.name}"
        f" {pause:.1f} s before the first from {demo.holder.name}."
    )
    demo.promise("A cut-off host accepts", demo.story in old.emitted(), "events wait in its outbox")
    demo.promise(
        "A cut-off plugin stands still", stands_still and reachable and pause > 0,
        f"frozen after {froze:.1f} s; no processor time since; {pause:.1f} s of silence, the ledger in reach",
    )  # fmt: skip
    demo.promise("A cut-off host's plugin moves", True, f"{old.name} to {demo.holder.name}, after {took:.1f} s")
    heals(demo, old)


def heals(demo: Demo, old: Host) -> None:
    report.heading(6, "The split heals")
    demo.wait(lambda: old.records("plugin.lost"), 60, f"{old.name} ends nothing")
    demo.wait(lambda: demo.quiet(demo.hosts), 90, f"{old.name} is no member again")
    demo.wait(lambda: demo.story in demo.ledger.events, 60, "an event that was accepted meanwhile is not handled")
    lost, thawed = old.records("plugin.lost")[-1]["data"]["runs"], old.records("plugin.thawed")
    stopped = [r for r in old.records("plugin.stopped") if r["run"] in lost]
    went_on = [run for record in thawed for run in record["data"]["runs"] if run in lost]
    cause = stopped[-1]["data"]["cause"] if stopped else "it was not ended"
    report.say(
        f"{old.name} reads that another host has the plugin, and kills the cage, frozen as it is. What waited in its"
        " outbox is in the log, and handled elsewhere."
    )
    demo.promise(
        "The frozen cage never acts again", cause == "its lease was lost" and not went_on,
        f"{old.name}: plugin.lost, ended while frozen ({cause})",
    )  # fmt: skip


def settle(demo: Demo) -> None:
    """Wait until all that the log has is handled."""
    logged = demo.history().ids
    demo.wait(lambda: logged <= demo.ledger.events, 60, "what stands in the log is not handled")
    demo.wait(lambda: demo.quiet(demo.hosts), 60, "the hosts do not come to rest")


def story(demo: Demo) -> None:
    report.heading(7, "The story of one event, on two hosts")
    one = next(one for one in demo.ledger.handled if one.event == demo.story)
    origin = next(host for host in demo.hosts if demo.story in host.emitted())
    there = next(host for host in demo.hosts if host.name == one.host)
    report.say(f"Accepted on {origin.name} while it was cut off, and entered into the ledger by {there.name}.")
    for host in (origin, there):
        report.blank()
        report.say(f"On {host.name}:")
        host.daemon.show("audit", "story", demo.story)
    shown = json.loads(origin.daemon.run("event", "show", demo.story, "--json")[1])
    states = [delivery["state"] for delivery in shown["deliveries"] if delivery["plugin"] == NAME]
    answered = [r for r in there.records("event.response") if demo.story == r.get("event_id")]
    demo.promise(
        "The story of an event crosses hosts", states == ["ok"] and bool(answered) and origin is not there,
        f"accepted on {origin.name}, answered on {there.name}; both know how it ended",
    )  # fmt: skip


def records_hold(demo: Demo) -> None:
    """Hold the ledger against the log, with the daemons stopped."""
    folds = demo.folds()
    found, handled = demo.history([one.place for one in folds.values()]), demo.ledger.handled
    lost = history.lost(found, [*demo.accepted, demo.story], demo.ledger.events)
    demo.promise(
        "What was accepted is handled", not lost,
        "; ".join(lost[:2]) or f"{len(demo.accepted) + 1} events, from three hosts, all in the ledger",
    )  # fmt: skip
    skipped = history.out_of_order(found, handled)
    demo.promise("In the log's order per key", not skipped, "; ".join(skipped[:2]) or f"{len(found.events)} keys")
    wrong = demo.ledger.wrong
    demo.promise(
        "One host acts at a time", not wrong,
        "; ".join(wrong[:2]) or f"{len(demo.ledger.holdings)} epochs in the ledger, each after the one before",
    )  # fmt: skip
    again = history.repeated(handled)
    demo.promise(
        "A move repeats little", not again.wrong,
        f"{again.events} of {len(demo.ledger.events)} events came twice; bound: 272 a move",
    )  # fmt: skip
    late = {epoch_of(one.value) for one in found.late}
    kept = {epoch_of(one.values.get((NAME, "holder"))) for one in folds.values()}
    demo.promise(
        "Late writes are void", late <= known_epochs(demo) and kept == {str(demo.ledger.holdings[-1].epoch)},
        f"{len(found.late)} values of a lost lease stand in the log, none of them counts" if late
        else "none came late this time; all hosts have the last holder's",
    )  # fmt: skip
    differing = history.differing(found, folds)
    demo.promise(
        "All hosts read the log alike", not differing,
        "; ".join(differing)[:200] or f"three folds, and a fourth made from {found.last} messages, agree",
    )  # fmt: skip
    codes = [host.daemon.exit_code for host in demo.hosts]
    verified = [host.daemon.run("audit", "verify")[0] for host in demo.hosts]
    demo.promise("The daemons stop when told", codes == [0, 0, 0], f"SIGTERM: exit codes {codes}")
    demo.promise("The trails verify", verified == [0, 0, 0], "all three, also that of the host that died")


def known_epochs(demo: Demo) -> set[str]:
    """The epochs that are over, as the plugin writes them."""
    return {str(one.epoch) for one in demo.ledger.holdings[:-1]}


def epoch_of(value: str | None) -> str:
    """The epoch in a value as the log has it: what the plugin has set, and when it expires."""
    return str(json.loads(value or "[null]")[0])


def used_by(group: Path) -> int:
    """Microseconds of processors that a cage has used."""
    return int((group / "cpu.stat").read_text().split()[1])


STEPS = (host_dies, cut_off)
