"""Every server has an older copy of its store, as a backup of all makes it: the log has lost what came since."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from isolator.linux import netns
from isolator.paths import Paths
from tests.cluster.outages import history
from tests.cluster.outages.site import Site, site
from tests.cluster.outages.stores import Copies
from tests.cluster.outages.watch import watch
from tests.support.ledger import COURIER, ledger
from tests.support.platforms import platforms
from tests.support.timeouts import seconds
from tests.system.daemon import wait_for

RATE = 4.0
"""Events a second, of each host."""


def _exchange(made: Site, copies: Copies) -> None:
    for server in made.servers:
        server.kill()
    for server in made.servers:
        copies.exchange(server.name, [server.store])
    for server in made.servers:
        server.start()


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.timeout(0)
def test_log_whose_servers_lost_its_end_gets_its_events_again_and_nobody_acts_twice(tmp_path: Path) -> None:
    with (
        site(tmp_path, '[defaults]\nstate = "0"\n') as made,
        ledger(made.network, {host.machine.address: host.name for host in made.hosts}) as kept,
    ):
        made.add(COURIER)
        copies = Copies(tmp_path / "copies")
        with watch(made.roots) as watched, platforms(made.roots, RATE) as emitting:
            wait_for(lambda: len(kept.events) >= 20, seconds(90), "no event is handled")
            _exchange(made, copies)
            made.until_quiet(seconds(90))
            before = len(kept.events)
            wait_for(lambda: len(kept.events) >= before + 60, seconds(90), "no more events are handled")
            _exchange(made, copies)
            wait_for(
                lambda: all("log_lost" in trail.problems for trail in watched.trails.values()),
                seconds(90), "a host has not noticed that the log lost its end",
            )  # fmt: skip
            made.until_quiet(seconds(150))
            for platform in emitting:
                platform.close()
            accepted = {event for platform in emitting for event in platform.accepted}
            wait_for(lambda: accepted <= kept.events, seconds(150), "what was accepted is not handled")
            made.until_quiet(seconds(90))
        folded = {}
        for host in made.hosts:
            assert host.daemon.stop() == 0
            folded[host.name] = history.Folded.of(Paths.of(host.daemon.root).host_database)
        places, reader = [one.place for one in folded.values()], made.log("h1")
        machine = made.hosts[0].machine
        found = netns.in_network(machine.fd, lambda: asyncio.run(history.History.read(reader, places)))
    assert [*kept.wrong, *watched.wrong, *history.differing(found, folded)] == []
    assert history.lost(found, accepted, kept.events) == []
    kinds = {kind for trail in watched.trails.values() for kind in trail.problems}
    assert kinds <= {"log_lost", "unreachable", "unwritable"}
