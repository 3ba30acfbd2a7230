"""Upgrades and downgrades between two installed versions, each from wheels and in an environment of its own.

The newer one is this tree with another version, and other formats of the states that supervisor and host hand over:
each has a field more, and steps from and to the format before.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
from pathlib import Path

import pytest

import isolator
from host.client.client import Client
from isolator.errors import IsolatorError
from isolator.ipc.formats import TABLES
from isolator.supervisor.kept import tables
from tests.support import wheels
from tests.support.timeouts import seconds
from tests.system.daemon import EVENT, Daemon, daemon, wait_for
from tests.system.reload.test_reload import loaded_daemon, reload_under_events

NEWER = "9.9.9"
TIMES = 20


STATES = {
    "isolator/supervisor/reload/formats.py": (
        "isolator/ipc/handover.py", "A whole daemon at rest.", "isolator/supervisor/reload/reloader.py",
    ),
    "host/composition/handover.py": (
        "host/composition/handover.py",
        "Everything that a host knows and neither its database nor the supervisor does.",
        "host/composition/host.py",
    ),
}  # fmt: skip
"""By file with the formats of a state: the file with its type, that one's docstring, and the file that makes one."""


def make_newer(tree: Path) -> None:
    """Make a copied tree the next version, with a field more in what supervisor and host hand over."""
    exchange(tree / "isolator/__init__.py", f'"{isolator.__version__}"', f'"{NEWER}"')
    up = "lambda body: {**body, 'upgraded': True}"
    down = "lambda body: {key: value for key, value in body.items() if key != 'upgraded'}"
    for name, (place, docstring, maker) in STATES.items():
        path = tree / name
        found = re.search(r"^FORMATS = Formats\((\w+), (\d+), .*\)$", path.read_text(), re.MULTILINE)
        assert found is not None, name
        kind, number = found[1], int(found[2])
        exchange(path, found[0], f"FORMATS = Formats({kind}, {number + 1}, up={up}, down={down})")
        head = f'    """{docstring}"""\n'
        exchange(tree / place, head, f"{head}\n    upgraded: bool\n")
        exchange(tree / maker, f" {kind}(\n", f" {kind}(\n            upgraded=True,\n")


def exchange(path: Path, before: str, after: str) -> None:
    """Replace one piece of a file, which has to be there."""
    text = path.read_text()
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, after))


@pytest.fixture
def versions(shared_dir: Path) -> dict[str, Path]:
    """Environments by version."""
    wheels.need_builder()
    found = {}
    for version in (isolator.__version__, NEWER):
        tree = wheels.copy_tree(shared_dir / f"tree-{version}")
        if version == NEWER:
            make_newer(tree)
        environment = found[version] = shared_dir / f"installed-{version}"
        wheels.install(wheels.build(tree, shared_dir / f"wheels-{version}"), environment)
    return found


def version_of(d: Daemon) -> str | None:
    """The version of the host process that answers, and of the supervisor if both are the same."""
    try:
        with Client(d.root, timeout=seconds(20)) as client:
            versions = {client.call("status")["version"], client.call("daemon.generation")["version"]}
    except IsolatorError:
        return None  # it is being exchanged
    return versions.pop() if len(versions) == 1 else None


@pytest.mark.wide
@pytest.mark.timeout(seconds(1800))
def test_sidecars_and_their_events_go_on_over_upgrades_and_downgrades(
    shared_dir: Path, versions: dict[str, Path]
) -> None:
    current = shared_dir / "current"
    current.symlink_to(versions[isolator.__version__])

    class Installed(Daemon):
        def command(self) -> list[str]:
            return [str(current / "bin/isolator"), "--root", str(self.root), "serve"]

    def exchange_version(d: Daemon, number: int) -> None:
        wanted = (NEWER, isolator.__version__)[number % 2]
        new = shared_dir / "current.new"
        new.symlink_to(versions[wanted])
        new.rename(current)
        d.cli("reload")
        wait_for(lambda: version_of(d) == wanted, seconds(60), f"it is not {wanted} after {number} reloads")

    with loaded_daemon(shared_dir, Installed) as d:
        reload_under_events(d, TIMES, 0.25, exchange_version)
        reloaded = [one["data"] for one in d.records() if one["type"] == "daemon.reloaded"]
        there, back = (isolator.__version__, NEWER), (NEWER, isolator.__version__)
        assert [(one["from"], one["to"]) for one in reloaded] == [there, back] * (TIMES // 2)
        assert d.stop() == 0
        assert d.json("gc", "--dry-run") == []


def test_reload_to_a_version_that_knows_only_older_tables_is_refused_and_loses_nothing() -> None:
    with daemon() as d:
        database = d.root / "var/lib/isolator/host/host.db"
        host = d.service_pid("host.service")

        def change(version: int) -> None:
            with contextlib.closing(sqlite3.connect(database, timeout=seconds(10))) as db:
                db.execute(f"PRAGMA user_version={version}")
                wait_for(lambda: db.execute("PRAGMA wal_checkpoint").fetchone() and tables(database) == version)

        change(TABLES + 1)  # as a newer version would, which this one is to follow
        refused = d.cli("reload", code=None)
        assert refused.returncode != 0
        assert f"its tables to version {TABLES + 1}, and that one knows {TABLES}" in refused.stderr, refused.stderr
        assert d.service_pid("host.service") == host
        change(TABLES)
        d.cli("event", "emit", "deploy.completed", json.dumps(EVENT))
        d.cli("reload")
        assert d.service_pid("host.service") != host
