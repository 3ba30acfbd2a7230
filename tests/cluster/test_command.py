"""``isolator cluster`` as a person types it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from host.cli.root import cli
from host.cluster import command
from host.cluster.joining import connect
from host.cluster.log import LogUnavailableError
from host.cluster.nats import Access, NatsLog, addresses
from host.cluster.node import Node
from host.cluster.standing import standing
from host.control.cluster_types import ClusterHost, ClusterLog, ClusterPlugin, ClusterStanding
from host.control.verbs import result_keys
from host.database.store import Store
from isolator.errors import IsolatorError, UnavailableError, UsageError
from isolator.policy.cluster import Cluster as Settled
from tests.cluster.hosts import Cluster, Following
from tests.host.fake_supervisor import Daemon
from tests.support.nats_servers import Server, nats_servers
from tests.support.timeouts import seconds

NATS = 60999
"""A group of the servers' user."""


def _run(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, ["cluster", *map(str, words)])


def _error(*words: str | Path) -> IsolatorError:
    failed = _run(*words).exception
    assert isinstance(failed, IsolatorError), failed
    return failed


def test_users_are_written_for_servers_and_hosts_and_no_file_is_replaced(tmp_path: Path) -> None:
    done = _run("users", "--dir", tmp_path / "new", "h1", "h2", "--json")
    files = [Path(name) for name in json.loads(done.output)["files"]]
    assert sorted(file.name for file in files) == ["admin.secret", "h1.secret", "h2.secret", "users.conf"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    before = (tmp_path / "new/h1.secret").read_text()
    assert re.fullmatch(r"h1:[\w-]{40,}\n", before)
    again = _error("users", "--dir", tmp_path / "new", "h1")
    assert "is there already" in str(again) and (tmp_path / "new/h1.secret").read_text() == before
    for names in (("h1", "h1"), ("admin",), ("H1",)):
        assert isinstance(_error("users", "--dir", tmp_path / "other", *names), UsageError)


def test_host_is_added_to_the_users_of_a_cluster_and_those_of_the_others_stay(
    served: tuple[Server, Path], tmp_path: Path
) -> None:
    server, users = served
    folder, conf = tmp_path / "users", "users.conf"
    shutil.copytree(users, folder)
    before = {path.name: path.read_text() for path in folder.iterdir()}
    (folder / conf).chmod(0o640)
    os.chown(folder / conf, 0, NATS)  # as the servers of a package read it
    done = json.loads(_run("users", "--dir", folder, "--add", "h2", "h3", "--json").output)
    assert [Path(name).name for name in done["files"]] == [conf, "h2.secret", "h3.secret"]
    after = {path.name: path.read_text() for path in folder.iterdir()}
    assert {*after} == {*before, "h2.secret", "h3.secret"} and (folder / conf).stat().st_mode & 0o777 == 0o640
    assert ((folder / conf).stat().st_uid, (folder / conf).stat().st_gid) == (0, NATS)
    assert all(after[name] == text for name, text in before.items() if name != conf)
    for path in (folder / "h2.secret", folder / "h3.secret"):
        assert path.stat().st_mode & 0o777 == 0o600

    # Every user is known to a server of this configuration, and it reads the new ones without a restart.
    configured = server.config.read_text()
    assert before[conf] in configured
    server.config.write_text(configured.replace(before[conf], after[conf]))
    server.signal(signal.SIGHUP)
    for name in ("h1", "h2", "h3", "admin"):
        secret = (folder / f"{name}.secret").read_text().strip()
        _until_accepted(server, secret)
    server.config.write_text(configured)
    server.signal(signal.SIGHUP)

    for names, why in ((("h2",), "a user h2 already"), (("h1",), "a user h1 already"), (("h4", "h4"), "of its own")):
        assert why in str(_error("users", "--dir", folder, "--add", *names))
    (folder / "h4.secret").write_text("")
    assert "is there already" in str(_error("users", "--dir", folder, "--add", "h4"))
    assert {path.name: path.read_text() for path in folder.iterdir() if path.name != "h4.secret"} == after
    assert "cannot be read" in str(_error("users", "--dir", tmp_path / "none", "--add", "h5"))
    (folder / conf).write_text("# nothing\n")
    assert "has no list of users" in str(_error("users", "--dir", folder, "--add", "h5"))
    assert not (folder / "h5.secret").exists()


def _until_accepted(server: Server, secret: str) -> None:
    user, _, password = secret.partition(":")
    log = NatsLog(Access(addresses([f"127.0.0.1:{server.port}"], tls=False), user, password, inbox=f"_ISO.{user}"))

    async def connect() -> None:
        async with asyncio.timeout(seconds(30)):
            while True:
                try:
                    await log._connected()
                    break
                except LogUnavailableError:
                    await asyncio.sleep(0.05)
        await log.close()

    asyncio.run(connect())


@pytest.fixture
async def daemon(shared_dir: Path) -> AsyncIterator[Daemon]:
    """A host without a cluster."""
    fake = Daemon(shared_dir)
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server with the users that the command wrote."""
    folder = tmp_path_factory.mktemp("users")
    assert _run("users", "--dir", folder / "users", "h1").exit_code == 0
    with nats_servers(folder / "nats", 1, more=(folder / "users/users.conf").read_text()) as servers:
        yield servers[0], folder / "users"


def test_log_is_made_once_by_the_administrator_and_hosts_can_use_it(
    served: tuple[Server, Path], tmp_path: Path
) -> None:
    server, users = served
    where = ("--server", f"127.0.0.1:{server.port}", "--no-tls", "--replicas", "1", "--max-bytes", str(50 << 20))
    refused = _error("init", *where, "--credentials", users / "h1.secret")
    assert isinstance(refused, UnavailableError) and "permissions violation" in str(refused)
    made = json.loads(_run("init", *where, "--credentials", users / "admin.secret", "--json").output)
    assert made["made"] is True and made["replicas"] == 1
    again = _run("init", *where, "--credentials", users / "admin.secret")
    assert "is there already" in again.output and "next: [cluster] in host.toml" in again.output
    assert "Authorization Violation" in str(_error("init", *where))
    assert "is not HOST:PORT" in str(_error("init", "--server", "1.2.3.0/24"))
    assert "cannot be read" in str(_error("init", *where, "--credentials", tmp_path / "none"))
    assert "cannot be used" in str(_error("init", "--server", "a:1", "--ca", tmp_path / "none"))


async def test_host_joins_with_its_file_and_without_another_user(served: tuple[Server, Path], tmp_path: Path) -> None:
    server, users = served
    secret = (users / "h1.secret").read_text().strip()
    settings = {"name": "h1", "servers": (f"127.0.0.1:{server.port}",), "tls": False}
    database, follower = Store(tmp_path / "db"), Following()
    settled = Settled(**settings, secret=secret)
    node = Node(settled, connect(settled), database, follower, follower)
    await node.start()
    async with asyncio.timeout(seconds(60)):
        while not node.is_member:  # noqa: ASYNC110 # a beat has to come back
            await asyncio.sleep(0.05)
    await node.close()
    settled = Settled(**settings, secret="h1:guess")
    stranger = Node(settled, connect(settled), database, follower, follower)
    await stranger.start()
    async with asyncio.timeout(seconds(60)):
        while "refused" not in stranger.problems.lines:  # noqa: ASYNC110 # as above
            await asyncio.sleep(0.05)
    assert "Authorization Violation" in stranger.problems.lines["refused"] and not stranger.is_member
    await stranger.close()
    await database.close()


async def test_status_shows_hosts_plugins_problems_and_its_answer_has_the_keys_of_its_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster(tmp_path)
    await cluster.start()
    holder = await cluster.settled()
    holder.node.problems.begin("twin", "another \x1b[31mdaemon")
    found: dict[str, Any] = standing(holder.node, holder.clock.now())
    assert {*found} == {*result_keys(ClusterStanding)} and {*found["log"]} == {*result_keys(ClusterLog)}
    assert {*found["hosts"][0]} == {*result_keys(ClusterHost)} and {*found["plugins"][0]} == {
        *result_keys(ClusterPlugin)
    }
    assert found["member"] and 0 < found["seconds_left"] <= 12
    command._show(found)
    shown = capsys.readouterr().out
    assert "PROBLEM twin: another \\x1b[31mdaemon" in shown
    for words in (f"host:    {holder.name}, a member", "log:     read up to", "outbox:  0 events", "(this)", "alive"):
        assert words in shown, words
    ready = [one["name"] for one in found["hosts"] if "p" in one["ready"] and one["name"] != holder.name]
    assert ready and re.search(rf"^p +one +0 +{holder.name} +\d+ +{', '.join(ready)}$", shown, re.M)
    assert json.loads(json.dumps(found)) == found
    await cluster.stop()


async def test_verbs_refuse_where_there_is_no_cluster_and_load_nothing_of_it(daemon: Daemon) -> None:
    for verb, more in (
        ("cluster.status", {}),
        ("cluster.leave", {}),
        ("cluster.place", {"name": "p"}),
        ("plugin.remove", {"name": "p", "cluster": True}),
    ):
        with pytest.raises(UsageError, match=r"no \[cluster\] in host.toml"):
            await daemon.ask(verb, **more)


@pytest.mark.parametrize(
    ("placed", "where"),
    [
        ({"placement": "one", "shards": 1, "labels": []}, "p: on one host at a time, in 1 shard"),
        (
            {"placement": "one", "shards": 4, "labels": ["eu", "big"]},
            "p: on one host at a time, in 4 shards, only with eu, big",
        ),
        ({"placement": "all", "shards": 1, "labels": []}, "p: on every host"),
    ],
)
def test_place_says_where_the_plugin_runs(placed: dict[str, Any], where: str) -> None:
    assert command._where({"name": "p", **placed}) == where


@pytest.mark.parametrize(
    ("module", "names"),
    [("host.composition.host", ("nats", "host.cluster")), ("host.cluster.command", ("nats", "host.cluster.n"))],
)
def test_without_a_cluster_nothing_of_it_is_loaded(module: str, names: tuple[str, ...]) -> None:
    code = f"import {module}, sys; print([one for one in sys.modules if one.startswith({names})])"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
