"""A host sends a plugin nothing before it knows from the log whose it is: the cluster's, or this host's own."""

from __future__ import annotations

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


def _may_act(host: SimHost) -> bool:
    return host.follower.may_act("p") and host.fences.may_act("p")


async def _beside(make: Make, plugin: Plugin, *, copy: bool = False) -> tuple[Hosts, SimHost]:
    """A plugin that others have, and a host that has it, too, cut off, with an empty database."""
    hosts = make()
    await hosts.start()
    *others, away = hosts.hosts
    hosts.plugins["p"] = plugin
    for host in others:
        host.serve(plugin)
    await hosts.during(others[0].decide(plugin))
    await away.end()
    away.path.unlink()
    for _ in range(3):
        await hosts.emit(others[0], "k")
    await hosts.until(lambda: hosts.all_handled("p"))
    if copy:
        await hosts.trim(others[0])
    away.plugins["p"] = plugin
    away.cut_until(1e9)
    await away.start()
    return hosts, away


@pytest.mark.parametrize("copy", [False, True], ids=["log", "copy"])
@pytest.mark.parametrize("plugin", [ONE, ALL], ids=lambda one: one.placement)
async def test_host_with_an_empty_database_waits_for_the_log(make: Make, plugin: Plugin, copy: bool) -> None:
    hosts, away = await _beside(make, plugin, copy=copy)
    begun = len(hosts.witness.begun)
    await hosts.emit(away, "k")
    await hosts.passes(30.0)
    assert not _may_act(away) and len(hosts.witness.begun) == begun
    assert [row.state for row in away.show(hosts.accepted[-1]).deliveries] == ["queued"]
    away.cut_until(0.0)
    await hosts.until(lambda: hosts.all_handled("p"))
    await hosts.until(lambda: away.node.is_member)
    await hosts.passes(3.0)
    assert _may_act(away) == (plugin is ALL)
    copies = 0 if plugin is ONE else 5 if copy else 8  # a copy of the fold has none of the three events before it
    assert hosts.witness.repeated("p") == copies


async def test_own_plugin_of_a_host_begins_where_the_log_ends_and_goes_on_while_it_is_cut_off(make: Make) -> None:
    hosts = make(hosts=2)
    first, second = hosts.hosts
    await first.start()
    before = await hosts.during(first.emit("k"))
    await hosts.until(lambda: first.node.is_member)
    second.plugins["p"], hosts.plugins["p"] = ONE, ONE
    await second.start()
    second.cut_until(1e9)
    await hosts.emit(second, "k")
    await hosts.passes(20.0)
    assert not _may_act(second) and not hosts.witness.begun
    second.cut_until(0.0)
    await hosts.until(lambda: hosts.all_handled("p"))
    assert before not in {act.event for act in hosts.witness.handled}
    second.cut_until(1e9)
    await second.end()
    await second.start()
    await hosts.passes(20.0)
    await hosts.emit(second, "k")
    await hosts.until(lambda: hosts.all_handled("p"))
    assert hosts.witness.repeated("p") == 0


@pytest.mark.parametrize("added", [ONE, ALL], ids=lambda one: one.placement)
async def test_plugin_that_is_added_while_its_host_is_cut_off_waits_for_its_own_entry(
    make: Make, added: Plugin
) -> None:
    hosts = make(hosts=1)
    await hosts.start()
    (host,) = hosts.hosts
    await hosts.until(lambda: host.node.is_member)
    host.cut_until(1e9)
    host.serve(added)
    hosts.plugins["p"] = added
    await hosts.emit(host, "k")
    await hosts.passes(20.0)
    assert not _may_act(host) and not hosts.witness.begun
    await hosts.heal()
    await hosts.until(lambda: host.node.is_member)
    assert not _may_act(host), "nobody has said yet where it runs"
    await hosts.during(host.decide(added))
    await hosts.until(lambda: hosts.all_handled("p"))
    assert hosts.witness.repeated("p") == 0


async def test_own_plugin_that_the_cluster_gets_ends_what_it_has_begun(make: Make) -> None:
    hosts = make(hosts=2)
    first, second = hosts.hosts
    first.plugins["p"], hosts.plugins["p"] = ONE, ONE
    await first.start()
    await second.start()
    second.serve(ONE)
    await hosts.until(lambda: first.node.is_member and second.node.is_member)
    await hosts.emit(first, "k")
    await hosts.until(lambda: hosts.all_handled("p"))
    for _ in range(8):
        await hosts.emit(first, "k")
    await hosts.until(lambda: len(hosts.witness.begun) > 1)
    await hosts.during(second.decide(ONE))
    await hosts.until(lambda: hosts.all_handled("p"))
    await hosts.passes(30.0)
    assert {act.epoch > 0 for act in hosts.witness.handled} == {True, False}


async def test_plugin_that_waits_for_the_log_is_its_hosts_own_once_that_has_left(make: Make) -> None:
    hosts, away = await _beside(make, ONE)
    await hosts.passes(20.0)
    assert not away.fences.may_act("p")
    await hosts.during(away.node.leave(force=True))
    assert away.fences.may_act("p")
    away.serve(ONE)
    assert away.fences.may_act("p"), "it is started anew after it was freed"
