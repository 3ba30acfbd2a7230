"""A daemon that was away for longer than the log is kept says which events its plugin will never get."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import nats
import pytest

from host.cluster.entries import Beat, Message, Number, encode
from host.cluster.snapshots import Snapshots
from isolator.linux import netns
from isolator.paths import Paths
from tests.cluster.outages.site import Host, Site, site
from tests.support.timeouts import seconds
from tests.system.daemon import event, wait_for, write_plugin

DISK = "4MB"
"""Bytes that each server may keep."""
LARGE, MESSAGES, AT_ONCE = 100, 60, 6
"""KiB of a message; how many fill the log more than once; how many of them everybody has read before more come."""


async def _write(made: Site, first: int) -> int:
    """Have another host, of which nobody knows more, write messages; the place of the last."""
    user, _, password = made.secrets["admin"].partition(":")
    client = await nats.connect([one.url for one in made.servers], user=user, password=password)
    for number in range(first, first + AT_ONCE):
        beat = Beat(labels=("x" * 1024,) * LARGE if number < MESSAGES else ())
        body = encode(Message("ghost", "ctl", Number(1, number), (beat,)))
        answer = json.loads((await client.request("iso.ctl.ghost", body, timeout=seconds(30))).data)
    await client.close()
    return int(answer["seq"])


def _fill(made: Site, reading: Sequence[Host]) -> None:
    """Fill the log until what stood there before is gone; hosts that are there read on meanwhile."""
    for first in range(1, MESSAGES + 1, AT_ONCE):
        last = netns.in_network(reading[0].machine.fd, lambda first=first: asyncio.run(_write(made, first)))
        wait_for(
            lambda last=last: all(host.status().get("place", 0) >= last for host in reading),
            seconds(90), "a host does not read on",
        )  # fmt: skip


def _make_copy(host: Host) -> None:
    """Have a host's copy of its fold, which it makes once a day, made now: it is stopped meanwhile."""
    created = host.status()["log"]["created"]
    assert host.daemon.stop() == 0
    path = Paths.of(host.daemon.root).host_database
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        Snapshots(host.name, None, folder := path.with_name("cluster-folds"))._make(db, created)  # type: ignore[arg-type]
    owner = path.stat()
    for made in (folder, *folder.iterdir(), *path.parent.glob("host.db*")):
        os.chown(made, owner.st_uid, owner.st_gid)
    host.daemon.start(seconds(90))


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.timeout(0)
def test_events_that_were_trimmed_while_a_host_was_away_are_on_its_trail(tmp_path: Path) -> None:
    with site(tmp_path, "# as it is", DISK) as made:
        away, other = made.hosts[2], made.hosts[0]
        plugin = write_plugin(tmp_path / "echo")
        for host in made.hosts:
            host.daemon.cli("plugin", "add", str(plugin), "--yes")
        other.daemon.cli("cluster", "place", "echo", "--all", "--anew")
        other.daemon.cli("event", "emit", "deploy.completed", event(1))
        wait_for(lambda: _seen(made) == [["d1"]] * 3, seconds(60), "not every host has its copy of the plugin")
        assert away.daemon.stop() == 0
        for number in (2, 3):
            other.daemon.cli("event", "emit", "deploy.completed", event(number))
        wait_for(other.has_sent_all, seconds(60), "the log does not get what was emitted")

        before = other.status()["place"]
        _fill(made, made.hosts[:2])
        wait_for(lambda: other.status()["log"]["first"] > before, seconds(90), "nothing was trimmed")
        _make_copy(other)

        away.daemon.start(seconds(90))
        line = wait_for(
            lambda: next((one["line"] for one in away.status()["problems"] if one["kind"] == "events_lost"), ""),
            seconds(90), "nothing is said to be lost",
        )  # fmt: skip
        assert line.startswith("events for plugin echo are lost (h1 2 to 3)")
        assert "the trail has the numbers (event.lost)" in line
        assert any(line in one for one in away.daemon.json("status", code=None)["alarms"])
        lost = [record for record in away.daemon.records() if record["type"] == "event.lost"]
        assert [record["plugin"] for record in lost] == ["echo"]
        assert [{key: record["data"][key] for key in ("sender", "first", "last")} for record in lost] == [
            {"sender": "h1", "first": 2, "last": 3}
        ]
        for host in made.hosts[:2]:
            assert {one["kind"] for one in host.status()["problems"]} <= {"unreadable"}, "but for what filled the log"
            assert not [record for record in host.daemon.records() if record["type"] == "event.lost"]

        other.daemon.cli("event", "emit", "deploy.completed", event(4))
        wait_for(
            lambda: _seen(made) == [["d1", "d2", "d3", "d4"]] * 2 + [["d1", "d4"]],
            seconds(60), "it does not go on with what came later",
        )  # fmt: skip


def _seen(made: Site) -> list[list[str]]:
    """What the copies of the plugin were sent, in their order."""
    found = []
    for host in made.hosts:
        found.append(list(dict.fromkeys(host.daemon.noted("echo"))))
    return found
