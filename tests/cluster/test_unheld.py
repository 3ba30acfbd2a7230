"""A plugin that no living host has is said to be nobody's, with what to do, and after that its events are delivered."""

from __future__ import annotations

import pytest

from host.cluster.entries import Beat, Claim, Number, Plugin
from host.cluster.fold import State
from host.cluster.standing import plugin, standing
from host.cluster.unheld import LASTS, Unheld
from tests.cluster.queues import Hosts, Make, SimHost
from tests.cluster.test_fold import Log

ONE = Plugin("p", "sha256:0123456789abcdef")


async def _orphaned(make: Make) -> tuple[Hosts, SimHost, SimHost]:
    """The only host that has a plugin is gone for good, with events that wait; the two that are left."""
    hosts = make()
    await hosts.start()
    first, second, third = hosts.hosts
    hosts.plugins["p"] = ONE
    first.serve(ONE)
    await hosts.during(first.decide(ONE))
    await hosts.until(lambda: hosts.holder("p") is first)
    hosts.failing = 1.0
    for number in range(6):
        await hosts.emit(hosts.hosts[number % 3], f"k{number % 2}")
    await hosts.until(lambda: hosts.witness.begun)
    await hosts.passes(2.0)
    await first.end()
    hosts.failing = 0.0
    await hosts.passes(5.0)
    assert not second.problems and not second.node.unheld, "it may come back in a moment"
    await hosts.emit(second, "k0")
    await hosts.until(lambda: second.node.unheld and third.node.unheld)
    return hosts, second, third


async def test_plugin_that_no_living_host_has_is_said_everywhere_with_its_remedies(make: Make) -> None:
    hosts, second, third = await _orphaned(make)
    for host in (second, third):
        line = host.problems["unheld"]
        assert line == host.node.problems.lines["unheld"] == host.node.unheld["p"]
        assert "nobody holds plugin p, and its events wait" in line
        assert "no living host has the version sha256:0123456789ab enabled (h0 had it, and is silent)" in line
        assert "isolator plugin add or enable it on a living one" in line
        assert "isolator plugin remove --cluster p" in line
        shown = standing(host.node, host.clock.now())
        assert {"kind": "unheld", "line": line} in shown["problems"]
        assert plugin(host.node, "p")["problem"] == line == shown["plugins"][0]["problem"]
    assert not hosts.all_handled("p")


async def test_plugin_that_is_added_on_a_living_host_gets_what_waits(make: Make) -> None:
    hosts, second, third = await _orphaned(make)
    second.serve(ONE)
    await hosts.until(lambda: hosts.all_handled("p"))
    hosts.witness.check_order()
    await hosts.passes(3.0)
    for host in (second, third):
        assert not host.node.unheld and host.problems["unheld"] == "" and not host.node.problems.lines


async def test_plugin_that_is_added_in_another_version_gets_what_waits(make: Make) -> None:
    hosts, second, _ = await _orphaned(make)
    newer = Plugin("p", "sha256:new")
    second.serve(newer)
    await hosts.during(second.decide(newer))
    await hosts.until(lambda: hosts.all_handled("p"))
    hosts.witness.check_order()


async def test_host_that_comes_back_gets_what_waits(make: Make) -> None:
    hosts, second, _ = await _orphaned(make)
    await hosts.heal()
    await hosts.until(lambda: hosts.all_handled("p"))
    hosts.witness.check_order()
    await hosts.passes(3.0)
    assert not second.node.unheld


async def test_plugin_that_is_removed_is_no_problem_and_begins_anew_without_what_waited(make: Make) -> None:
    hosts, second, third = await _orphaned(make)
    await hosts.during(third.decide(Plugin("p", ONE.digest, removed=True)))
    await hosts.passes(3.0)
    assert not second.node.problems.lines and not second.node.unheld
    hosts.accepted.clear()
    second.serve(ONE)
    await hosts.during(second.decide(ONE))
    await hosts.emit(third, "k0")
    await hosts.until(lambda: hosts.all_handled("p"))
    await hosts.passes(5.0)
    assert {act.event for act in hosts.witness.handled} == {*hosts.accepted}


def _state(*ready: str, labels: tuple[str, ...] = (), held: bool = False) -> State:
    """The state after hosts have said what they could hold; ``a`` holds it."""
    log = Log()
    log.put("a", Plugin("p", "d", labels=("eu",)), *([Claim("p", 0, "d")] if held else []), Beat(labels=labels))
    for host in ready:
        log.put(host, Beat(ready=("p",), labels=labels), first=1, series=2)
    return log.state


@pytest.mark.parametrize(
    ("state", "alive", "line"),
    [
        (_state(), "ab", "no living host has the version d enabled;"),
        (_state("b", "c"), "a", "no living host has the version d enabled (b, c had it, and are silent);"),
        (_state("b"), "ab", "no living host that has it (b) has the labels eu; isolator cluster place p"),
        (_state("b", labels=("eu",)), "ab", None),
        (_state("b", labels=("eu",)), "a", "(b had it, and is silent)"),
        (_state(held=True, labels=("eu",)), "ab", None),
        (_state(held=True), "ab", "no living host has the version d enabled;"),
        (_state(held=True), "b", "no living host has the version d enabled;"),
    ],
)
def test_reason_is_who_lives_and_what_they_have(state: State, alive: str, line: str | None) -> None:
    unheld = Unheld()
    unheld.look(state, alive, 100.0)
    assert unheld.line is None, "it may be over in a moment"
    unheld.look(state, alive, 100.0 + LASTS)
    assert (line is None) == (unheld.line is None)
    assert line is None or line in str(unheld.line)


def test_many_plugins_are_one_line_and_one_that_is_held_again_has_none() -> None:
    log = Log()
    log.put("a", *(Plugin(f"p{number}", "d") for number in range(8)))
    unheld = Unheld()
    for now in (0.0, LASTS):
        unheld.look(log.state, "a", now)
    assert len(unheld.lines) == 8 and str(unheld.line).endswith("; and 3 more plugins")
    log.put("b", Beat(ready=("p0", "p1")))
    unheld.look(log.state, "ab", LASTS + 1)
    assert {*unheld.lines} == {f"p{number}" for number in range(2, 8)}
    unheld.look(log.state, "a", LASTS + 2)
    assert "p0" not in unheld.lines
    assert log.state.claim(("p0", 0)).cited == Number(0, 0)
