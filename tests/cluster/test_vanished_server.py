"""Servers that are cut off without a word: the others notice it soon, and nobody believes what they say."""

from __future__ import annotations

import asyncio
import contextlib
import json
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
def test_leader_that_is_cut_off_from_the_other_servers_is_not_believed(tmp_path: Path) -> None:
    with network(4) as joined:
        *machines, host = joined.machines
        places = [Place(machine.address, machine.enter) for machine in machines]
        with nats_servers(tmp_path / "nats", 3, first_port=4222, places=places) as servers:

            async def read() -> None:
                assert await make_stream(Access(tuple(one.url for one in servers)), 3, 50 << 20)
                every = NatsLog(Access(tuple(one.url for one in servers)))
                await every.append("iso.ctl.h1", b"one")
                info = json.loads((await every._ask("$JS.API.STREAM.INFO.ISO", b"")).data)
                leads = next(at for at, one in enumerate(servers) if one.name == info["cluster"]["leader"])
                others = NatsLog(Access(tuple(one.url for at, one in enumerate(servers) if at != leads)))
                cut_off = NatsLog(Access((servers[leads].url,)))
                assert (await cut_off.facts()).last == 1
                with joined.cut(both_ways([machines[leads]], machines)):
                    async with asyncio.timeout(seconds(30)):
                        while not await _appends(others):  # noqa: ASYNC110 # until they have a leader
                            await asyncio.sleep(0.2)
                    # For as long as it is cut off it says that the log ends at 1.
                    for _ in range(5):
                        with pytest.raises(LogUnavailableError, match="lost touch"):
                            await cut_off.facts()
                        assert (await others.facts()).last >= 2
                for log in (every, others, cut_off):
                    await log.close()

            netns.in_network(host.fd, lambda: asyncio.run(read()))


async def _appends(log: NatsLog) -> bool:
    with contextlib.suppress(LogUnavailableError):
        await log.append("iso.ctl.h1", b"two")
        return True
    return False


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
