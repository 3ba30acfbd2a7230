"""A server whose machine is gone without a word: the others notice it soon, and hosts read as before."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from click.testing import CliRunner

from host.cluster.command import cluster
from host.cluster.log import LogUnavailableError
from host.cluster.nats import Access, NatsLog, make_stream
from isolator.linux import netns
from tests.support.nats_servers import Place, nats_servers
from tests.support.routed import both_ways, network
from tests.support.timeouts import seconds

STEADY = 40
"""Answers in a row. As long as a server takes the vanished one to be there, every second or third is missing."""


async def _until_steady(log: NatsLog) -> None:
    """Return when that many reads in a row were answered; raises TimeoutError."""
    async with asyncio.timeout(seconds(25)):
        answered = 0
        while answered < STEADY:
            try:
                assert await log.after(0) is not None
                answered += 1
            except LogUnavailableError:
                answered = 0


@pytest.mark.slow
def test_log_is_read_steadily_soon_after_a_server_has_vanished(tmp_path: Path) -> None:
    written = CliRunner().invoke(cluster, ["users", "--dir", str(tmp_path / "users"), "h1"], obj=None)
    assert written.exit_code == 0, written.output
    user, _, password = (tmp_path / "users/admin.secret").read_text().strip().partition(":")
    with network(3) as joined:
        places = [Place(machine.address, machine.enter) for machine in joined.machines]
        more = (tmp_path / "users/users.conf").read_text()
        with nats_servers(tmp_path / "nats", 3, first_port=4222, more=more, places=places) as servers:
            gone, *there = joined.machines

            async def read() -> None:
                assert await make_stream(Access(tuple(one.url for one in servers), user, password), 3, 50 << 20)
                log = NatsLog(Access(tuple(one.url for one in servers[1:]), user, password))
                try:
                    await log.append("iso.ctl.h1", b"one")
                    await _until_steady(log)
                    with joined.cut(both_ways([gone], there)):
                        await _until_steady(log)
                finally:
                    await log.close()

            netns.in_network(there[0].fd, lambda: asyncio.run(read()))
