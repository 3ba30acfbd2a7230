"""Three whole daemons on three servers: what one of them does or suffers, as the others have it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host.client.client import Client
from host.cluster.entries import Claim, Release, decode
from host.cluster.life import PUT_BACK
from isolator.linux import netns
from isolator.paths import Paths
from tests.cluster.outages import history
from tests.cluster.outages.site import Host, Site, site
from tests.cluster.outages.stores import Copies, older_database, older_store
from tests.support.ledger import COURIER, Ledger, ledger
from tests.support.platforms import platforms
from tests.support.routed import both_ways
from tests.support.timeouts import seconds
from tests.system.daemon import event, wait_for, write_plugin

pytestmark = [pytest.mark.slow, pytest.mark.wide, pytest.mark.timeout(0)]

SCHEMA = {"type": "object", "properties": {"order_id": {"type": "string"}}, "required": ["order_id"]}
RATE = 5.0
"""Events a second, of each host."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("site"), '[defaults]\nstate = "0"\n') as found:
        found.add(COURIER)
        yield found


@pytest.fixture
def quiet(made: Site) -> Site:
    """The hosts, once all is well with them and one holds the plugin."""
    made.until_quiet(seconds(90))
    _holder(made)
    return made


@pytest.fixture(scope="module")
def kept(made: Site) -> Iterator[Ledger]:
    with ledger(made.network, {host.machine.address: host.name for host in made.hosts}) as found:
        yield found


def _holder(made: Site, *but: Host) -> Host:
    """The host that holds the plugin, as the others have it, and which is none of these."""

    def find() -> Host | None:
        asked = next(host for host in made.hosts if host not in but)
        names = [one["host"] for plugin in asked.status().get("plugins", ()) for one in plugin["shards"]]
        return next((host for host in made.hosts if host.name in names and host not in but), None)

    return wait_for(find, seconds(60), "nobody holds the plugin")  # type: ignore[no-any-return]


def _listed(by: Host) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in by.status().get("hosts", ())}


def _entries(made: Site, after: int) -> list[tuple[str, object]]:
    """The decisions behind a place of the log, each with its host."""

    async def read() -> list[tuple[str, object]]:
        log, at, found = made.log("h1"), [after], []
        while (entered := await history._answer(lambda: log.after(at[-1]))) is not None:
            at.append(entered.place)
            message = decode(entered.subject, entered.body)
            found += [(message.host, one) for one in message.entries]
        await log.close()
        return found

    return netns.in_network(made.hosts[0].machine.fd, lambda: asyncio.run(read()))


def _until_more(kept: Ledger) -> None:
    before = len(kept.events)
    wait_for(lambda: len(kept.events) >= before + 20, seconds(90), "no more events are handled")


@contextlib.contextmanager
def _nothing_is_lost(made: Site, kept: Ledger) -> Iterator[None]:
    """Every event accepted meanwhile, on any host, is handled, and nobody acts beside another."""
    with platforms(made.roots, RATE) as emitting:
        made.emitting.update(zip(made.roots, emitting, strict=True))
        _until_more(kept)
        yield
        for platform in emitting:
            platform.close()
        made.emitting.clear()
        accepted = {event for platform in emitting for event in platform.accepted}
    wait_for(lambda: accepted <= kept.events, seconds(120), "what was accepted is not handled")
    assert kept.wrong == []


def test_daemon_that_is_stopped_hands_its_plugin_over_and_one_that_is_reloaded_keeps_it(
    quiet: Site, kept: Ledger
) -> None:
    first = _holder(quiet)
    with _nothing_is_lost(quiet, kept):
        before = quiet.hosts[0].status()["place"]
        first.daemon.cli("reload")
        wait_for(lambda: first.status().get("member"), seconds(60), "it is no member after its reload")
        assert not [one for one in _entries(quiet, before) if isinstance(one[1], Claim | Release)]

        before = quiet.hosts[0].status()["place"]
        assert first.daemon.stop() == 0
        second = _holder(quiet, first)
        wait_for(lambda: kept.holder == second.name, seconds(90), "the next one does not act")
        assert not _listed(second)[first.name]["alive"] and _listed(second)[first.name]["stopped"]
        assert f"{first.name} " in (shown := second.daemon.cli("cluster", "status", code=None).stdout)
        assert "stopped" in shown and "SILENT" not in shown
        first.daemon.start(seconds(90))
        wait_for(lambda: _listed(second)[first.name]["alive"], seconds(60), "it is not back")
        moves = [(host, one) for host, one in _entries(quiet, before) if isinstance(one, Claim | Release)]
    assert [(host, type(one)) for host, one in moves] == [(first.name, Release), (second.name, Claim)]
    assert isinstance(moves[1][1], Claim) and moves[1][1].holder == "", "nobody waited for its silence"


def test_host_that_leaves_is_listed_by_none_until_it_joins_again(quiet: Site) -> None:
    leaver, other = quiet.hosts[1], quiet.hosts[0]
    leaver.daemon.cli("cluster", "leave")
    wait_for(lambda: leaver.name not in _listed(other), seconds(30), "it is listed as before")
    assert f"{leaver.name} " not in other.daemon.cli("cluster", "status", code=None).stdout
    _holder(quiet, leaver)
    leaver.daemon.cli("reload")
    wait_for(lambda: _listed(other).get(leaver.name, {}).get("alive"), seconds(60), "it is not back")


def test_label_moves_a_plugin_to_the_host_that_has_it_and_none_has_is_said(quiet: Site) -> None:
    holder = _holder(quiet)
    chosen = next(host for host in quiet.hosts if host is not holder)
    toml = chosen.daemon.root / "etc/isolator/host.toml"
    before = toml.read_text()
    toml.write_text(f'{before}labels = ["eu"]\n')
    chosen.daemon.cli("reload")
    wait_for(lambda: _listed(holder)[chosen.name]["labels"] == ["eu"], seconds(60), "nobody knows its label")
    placed = quiet.hosts[0].daemon.json("cluster", "place", COURIER.name, "--label", "eu")
    assert placed["labels"] == ["eu"] and placed["problem"] is None
    wait_for(lambda: _holder(quiet) is chosen, seconds(60), "it does not move")

    shown = quiet.hosts[0].daemon.cli("cluster", "place", COURIER.name, "--label", "us").stdout
    assert "no living host that has it (h1, h2, h3) has the labels us" in shown
    assert f"isolator cluster place {COURIER.name} with other labels" in shown
    wait_for(
        lambda: [one["host"] for plugin in holder.status()["plugins"] for one in plugin["shards"]] == [None],
        seconds(60), "it is held without the label",
    )  # fmt: skip
    toml.write_text(before)
    chosen.daemon.cli("reload")
    quiet.hosts[0].daemon.cli("cluster", "place", COURIER.name, "--no-labels")
    _holder(quiet)


def test_event_of_a_host_that_is_cut_off_is_said_to_wait_in_its_outbox(quiet: Site, kept: Ledger) -> None:
    host = quiet.hosts[2]
    emit = ("event", "emit", "deploy.completed")
    assert "kept_back" not in host.daemon.json(*emit, event("sent"))
    with quiet.network.cut(both_ways([host.machine], quiet.server_machines)):
        wait_for(lambda: host.status().get("problems"), seconds(60), "it has not noticed")
        answer = host.daemon.json(*emit, event("waits"))
        assert "the log does not answer" in answer["kept_back"] or "the log takes nothing" in answer["kept_back"]
        shown = host.daemon.cli(*emit, event("waits, too")).stdout.splitlines()
        assert shown[1].startswith("it waits in this host's outbox, and is sent as soon as the log takes it: the log ")
        assert answer["id"] not in kept.events
    quiet.until_quiet(seconds(90))
    wait_for(lambda: answer["id"] in kept.events, seconds(60), "it was not sent")
    assert "kept_back" not in host.daemon.json(*emit, event("sent again"))


def test_type_that_one_host_registers_is_known_by_all_and_by_one_that_was_away(quiet: Site) -> None:
    first, second, third = quiet.hosts
    assert third.daemon.stop() == 0
    with Client(first.daemon.root) as client:
        client.call("event.register", name="shop.order", schema=SCHEMA)
    wait_for(lambda: "shop.order" in second.daemon.cli("event", "types").stdout, what="the type is not known")
    third.daemon.start(seconds(90))
    wait_for(lambda: "shop.order" in third.daemon.cli("event", "types").stdout, what="it was away, and does not know")
    for host in (second, third):
        host.daemon.cli("event", "emit", "shop.order", '{"order_id": "7"}')
        refused = host.daemon.cli("event", "emit", "shop.order", "{}", code=None)
        assert refused.returncode and "order_id is required" in refused.stderr
    quiet.until_quiet(seconds(90))
    with Client(third.daemon.root) as client:
        client.call("event.unregister", name="shop.order")
    for host in quiet.hosts:
        wait_for(
            lambda host=host: "shop.order" not in host.daemon.cli("event", "types").stdout, what="the type is not gone"
        )


def test_story_of_an_event_says_how_another_host_has_delivered_it(quiet: Site, kept: Ledger) -> None:
    holder = _holder(quiet)
    emitter = next(host for host in quiet.hosts if host is not holder)
    emitted = emitter.daemon.json("event", "emit", "deploy.completed", event("told"))["id"]
    wait_for(lambda: emitted in kept.events, seconds(60), "it is not handled")
    wait_for(lambda: f"on {holder.name}" in _story(emitter, emitted), seconds(30), "the holder is not named")
    assert "not sent yet" not in _story(emitter, emitted)


def _story(host: Host, emitted: str) -> str:
    return host.daemon.cli("audit", "story", emitted).stdout


def test_plugin_that_was_removed_while_a_host_was_away_is_not_its_own_when_it_is_back(
    quiet: Site, tmp_path: Path
) -> None:
    plugin, away = write_plugin(tmp_path / "echo"), quiet.hosts[2]
    for host in quiet.hosts:
        host.daemon.cli("plugin", "add", str(plugin), "--yes")
    wait_for(lambda: "echo" in _listed(quiet.hosts[0])[away.name]["ready"], seconds(60), "it could not hold it")
    assert away.daemon.stop() == 0
    for host in quiet.hosts[:2]:
        host.daemon.cli("plugin", "remove", "echo", "--yes")
    names = [COURIER.name]
    wait_for(lambda: [one["name"] for one in quiet.hosts[0].status()["plugins"]] == names, seconds(60), "it is there")
    away.daemon.start(seconds(90))
    line = "plugin echo was removed from the cluster on another host, and does nothing here"
    wait_for(
        lambda: any(line in one for one in away.daemon.json("status", code=None)["alarms"]),
        seconds(60), "it does not say that the plugin has ended",
    )  # fmt: skip
    emitted = away.daemon.json("event", "emit", "deploy.completed", event("nobody's"))
    assert "echo" not in emitted["plugins"]
    away.daemon.cli("plugin", "remove", "echo", "--yes")


def test_plugin_that_a_host_removes_while_it_is_cut_off_stays_with_the_others(quiet: Site, tmp_path: Path) -> None:
    plugin, host = write_plugin(tmp_path / "kept"), quiet.hosts[2]
    for one in quiet.hosts:
        one.daemon.cli("plugin", "add", str(plugin), "--yes")
    wait_for(lambda: "kept" in _listed(host)["h1"]["ready"], seconds(60), "others could not hold it")
    with quiet.network.cut(both_ways([host.machine], quiet.server_machines)):
        wait_for(lambda: not _listed(host)["h1"]["alive"], seconds(90), "the others are not silent")
        host.daemon.cli("plugin", "remove", "kept", "--yes")
    quiet.until_quiet(seconds(90))
    wait_for(lambda: "kept" not in _listed(quiet.hosts[0])["h3"]["ready"], seconds(60), "its removal is not known")
    last = quiet.hosts[0].status()["place"]
    wait_for(lambda: quiet.hosts[0].status()["place"] > last + 5, seconds(60), "nothing is written any more")
    assert "kept" in [one["name"] for one in quiet.hosts[0].status()["plugins"]]
    for one in quiet.hosts[:2]:
        one.daemon.cli("plugin", "remove", "kept", "--yes")
    wait_for(
        lambda: "kept" not in [one["name"] for one in quiet.hosts[2].status()["plugins"]],
        seconds(60), "its last host has removed it",
    )  # fmt: skip


def test_older_copy_of_a_hosts_database_has_its_line_and_nothing_else_is_lost(
    quiet: Site, kept: Ledger, tmp_path: Path
) -> None:
    first, copies = _holder(quiet), Copies(tmp_path / "copies")
    with older_database(quiet, first, copies):
        pass  # the first copy is made
    quiet.until_quiet(seconds(90))
    with _nothing_is_lost(quiet, kept):
        _until_more(kept)
        with older_database(quiet, first, copies):
            pass
        wait_for(lambda: PUT_BACK in _lines(first), seconds(90), "the host does not say that its database is old")
        quiet.until_quiet(seconds(90))
        for other in quiet.hosts:
            if other is not first:
                assert "put_back" not in [one["data"]["kind"] for one in _problems(other)]
    _have_one_fold(quiet)


def _problems(host: Host) -> list[dict[str, Any]]:
    return [one for one in host.daemon.records() if one["type"] == "cluster.problem"]


def _lines(host: Host) -> list[str]:
    return [one["data"]["why"] for one in _problems(host)]


def _have_one_fold(made: Site) -> None:
    """Every host has folded the log to the same, as a fold of it by itself has it."""
    folded = {}
    for host in made.hosts:
        assert host.daemon.stop() == 0
        folded[host.name] = history.Folded.of(Paths.of(host.daemon.root).host_database)
    try:
        places, reader = [one.place for one in folded.values()], made.log("h1")
        found = netns.in_network(made.hosts[0].machine.fd, lambda: asyncio.run(history.History.read(reader, places)))
        assert history.differing(found, folded) == []
    finally:
        for host in made.hosts:
            host.daemon.start(seconds(90))


def test_older_copy_of_one_servers_store_changes_nothing_for_the_hosts(
    quiet: Site, kept: Ledger, tmp_path: Path
) -> None:
    copies = Copies(tmp_path / "copies")
    for server in quiet.servers:
        with older_store(quiet, server, copies):
            pass
    wait_for(quiet.replicas_are_current, seconds(90), "a server does not catch up")
    before = {host.name: len(_problems(host)) for host in quiet.hosts}
    with _nothing_is_lost(quiet, kept):
        for server in quiet.servers:
            _until_more(kept)
            with older_store(quiet, server, copies):
                pass
            wait_for(quiet.replicas_are_current, seconds(90), "a server does not catch up")
        quiet.until_quiet(seconds(90))
    for host in quiet.hosts:
        kinds = {one["data"]["kind"] for one in _problems(host)[before[host.name] :]}
        assert kinds <= {"unreachable", "unwritable"}, kinds
    _have_one_fold(quiet)
