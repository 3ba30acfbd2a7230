"""A plugin that is placed on hosts with labels is held by these alone, whoever held it before."""

from __future__ import annotations

from host.cluster.entries import Plugin
from tests.cluster.queues import Make


async def test_labels_move_a_plugin_to_a_host_that_has_them(make: Make) -> None:
    hosts = make()
    hosts.hosts[2].labels = ("eu",)
    await hosts.start(Plugin("p", "sha256:1"))
    await hosts.until(lambda: hosts.holder("p"))
    if hosts.holder("p") is hosts.hosts[2]:
        hosts.hosts[2].labels, hosts.hosts[1].labels = (), ("eu",)
        for host in hosts.hosts[1:]:
            await host.end()
            await host.start()
        await hosts.until(lambda: all(host.node.is_member for host in hosts.hosts))
        await hosts.until(lambda: hosts.holder("p") is hosts.hosts[2])
    wanted = next(host for host in hosts.hosts if host.labels)
    for number in range(12):
        await hosts.emit(hosts.hosts[number % 3], f"k{number % 2}")
    began = hosts.clock.time
    await hosts.during(hosts.hosts[0].decide(Plugin("p", "sha256:1", labels=("eu",))))
    await hosts.until(lambda: hosts.holder("p") is wanted)
    assert hosts.clock.time - began < 10.0, "it is released, not waited for"
    await hosts.until(lambda: hosts.all_handled("p"))
    hosts.witness.check_order()
    assert hosts.witness.repeated("p") == 0


async def test_labels_that_nobody_has_leave_a_plugin_to_nobody_and_the_remedy_is_said(make: Make) -> None:
    hosts = make()
    await hosts.start(Plugin("p", "sha256:1"))
    await hosts.until(lambda: hosts.holder("p"))
    await hosts.during(hosts.hosts[0].decide(Plugin("p", "sha256:1", labels=("eu",))))
    await hosts.until(lambda: hosts.holder("p") is None)
    await hosts.emit(hosts.hosts[0], "k")
    await hosts.until(lambda: all(host.node.unheld for host in hosts.hosts))
    line = hosts.hosts[1].node.unheld["p"]
    assert "no living host that has it (h0, h1, h2) has the labels eu" in line
    assert "isolator cluster place p with other labels" in line and "[cluster] labels" in line
    assert not hosts.all_handled("p")
    await hosts.during(hosts.hosts[1].decide(Plugin("p", "sha256:1")))
    await hosts.until(lambda: hosts.all_handled("p"))
