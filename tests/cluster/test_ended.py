"""A plugin that was removed from the cluster while a host that has it was away is not that host's own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from host.cluster import snapshots
from host.cluster.entries import Plugin
from tests.cluster.queues import Hosts, Make, SimHost

ONE = Plugin("p", "d")
ALL = Plugin("p", "d", placement="all")


@pytest.fixture(autouse=True)
def with_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have hosts make copies of their fold often."""
    monkeypatch.setattr(snapshots, "LEAST", 3)


async def _removed_while_away(hosts: Hosts, plugin: Plugin, snapshot: bool) -> SimHost:
    """Have a host come back that was away while the others removed a plugin which it has; the host."""
    await hosts.start(plugin)
    await hosts.until(lambda: all(host.node.is_member for host in hosts.hosts))
    await hosts.emit(hosts.hosts[0], "k")
    await hosts.until(lambda: hosts.all_handled("p"))
    away, *there = hosts.hosts
    await away.end()
    for host in there:
        host.forget("p")
    await hosts.during(there[0].decide(replace(plugin, removed=True)))
    if snapshot:  # what it has not read is not in the log any more
        await hosts.trim(there[0])
    await away.start()
    await hosts.until(lambda: away.node.is_member)
    return away


@pytest.mark.parametrize("plugin", [ONE, ALL], ids=lambda one: one.placement)
@pytest.mark.parametrize("snapshot", [False, True], ids=["log", "copy"])
async def test_plugin_that_ended_while_its_host_was_away_does_nothing_there(
    make: Make, plugin: Plugin, snapshot: bool
) -> None:
    hosts = make()
    away = await _removed_while_away(hosts, plugin, snapshot)
    done = len(hosts.witness.begun)
    for restarted in (False, True):
        event = await hosts.during(away.emit("k"))
        await hosts.during(hosts.hosts[1].emit("k"))
        await hosts.passes(20.0)
        assert away.follower.ended == ["p"] and not away.follower.may_act("p") and not away.fences.may_act("p")
        assert len(hosts.witness.begun) == done, "it was sent an event"
        assert [row.plugin for row in away.show(event).deliveries] == []
        if not restarted:
            await away.end()
            await away.start()
            await hosts.until(lambda: away.node.is_member)


async def test_plugin_that_ended_is_the_clusters_again_on_command_and_its_hosts_own_after_it_left(make: Make) -> None:
    hosts = make()
    away = await _removed_while_away(hosts, ONE, False)
    hosts.accepted.clear()
    await hosts.during(away.decide(ONE))
    assert away.follower.ended == []
    await hosts.until(lambda: hosts.holder("p") is away)
    await hosts.emit(hosts.hosts[1], "k")
    await hosts.until(lambda: hosts.all_handled("p"))


async def test_plugin_that_was_removed_here_and_added_again_has_not_ended(make: Make) -> None:
    hosts = make()
    away = await _removed_while_away(hosts, ONE, False)
    away.forget("p")
    assert away.follower.ended == []
    away.serve(ONE)
    assert away.follower.ended == [] and not away.follower.may_act("p")
    await hosts.during(away.decide(ONE))
    await hosts.until(lambda: away.follower.may_act("p"))


async def test_plugin_of_before_the_cluster_is_not_ended_by_what_the_log_has_of_its_name(make: Make) -> None:
    hosts = make(hosts=2)
    first, second = hosts.hosts
    hosts.plugins = {"p": ONE}
    first.plugins["p"] = ONE
    await first.start()
    await hosts.during(first.decide(ONE))
    await hosts.until(lambda: first.node.held)
    first.forget("p")
    await hosts.during(first.decide(replace(ONE, removed=True)))
    second.plugins["p"] = ONE  # it had one of that name before it joined
    await second.start()
    await hosts.until(lambda: second.node.is_member)
    assert second.follower.ended == []
