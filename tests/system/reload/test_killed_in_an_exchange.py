"""The old process, the new one, or both are killed at each step of an exchange: as after a crash, nothing is lost."""

from __future__ import annotations

import json
import os
import signal
from itertools import product
from pathlib import Path

import pytest

from isolator.paths import Paths
from isolator.recovery.daemon import subtree_folders
from tests.support.processes import start_time
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, wait_for, write_plugin
from tests.system.reload.exchanges import SLOW_ONESHOT, SLOW_STREAM, exchange, processes, seen
from tests.system.reload.kill_points import STEPS, VICTIMS, SteppedDaemon
from tests.system.test_killed_host import Load, _connected, _of

FEW = (("part", "old"), ("left", "new"), ("held", "both"))
EACH = tuple(product(STEPS, VICTIMS))


@pytest.mark.parametrize(
    ("service", "kills"),
    [("host", FEW), *(pytest.param(name, EACH, marks=pytest.mark.wide) for name in ("host", "broker", "audit"))],
    ids=["a few of the host", "host", "broker", "audit"],
)
def test_killed_at_a_step_of_an_exchange_nothing_is_lost(
    tmp_path: Path, service: str, kills: tuple[tuple[str, str], ...]
) -> None:
    folders = (
        write_plugin(tmp_path / "oneshot", SLOW_ONESHOT),
        write_plugin(tmp_path / "streams", SLOW_STREAM, transport={"mode": "stream"}),
    )
    with daemon(kind=SteppedDaemon) as d:
        assert isinstance(d, SteppedDaemon) and d.process is not None
        for folder in folders:
            d.cli("plugin", "add", str(folder), "--yes")
            d.cli("plugin", "start", folder.name)
        born = {f.name: (pid := d.json("plugin", "show", f.name)["pid"], start_time(pid)) for f in folders}
        with Load(d.root) as load:
            for step, victim in kills:
                d.kill_at(step, service, victim)
                os.kill(d.process.pid, signal.SIGUSR1)
                wait_for(lambda: d.done, what=lambda step=step: f"{step}: {d.log.read_text()}")
                wait_for(lambda: _settled(d, service), what=lambda step=step: f"{step}: {d.log.read_text()}")
                before = len(load.accepted)
                wait_for(
                    lambda before=before: len(load.accepted) > before,
                    what=lambda step=step: f"{step} {d.log.read_text()}",
                )
        exchange(d, service)
        with wait_for(lambda: _connected(d)) as client:
            rows = [client.call("event.wait", id=event, timeout=seconds(60)) for event in load.accepted]
        for folder in folders:
            reached = seen(d, folder.name)
            outcomes = {row["id"]: _of(row, folder.name) for row in rows}
            assert [e for e, one in outcomes.items() if one["state"] != "ok" or not reached[e]] == []
            assert [e for e, one in outcomes.items() if reached[e] > one["attempts"]] == []
            pid = d.json("plugin", "show", folder.name)["pid"]
            assert (pid, start_time(pid)) == born[folder.name], "the sidecar was ended"
        d.cli("audit", "verify")
        unified, *_ = subtree_folders(Paths.of(d.root))
        wait_for(lambda: len(list(unified.glob("service.*"))) == 3, what="leaves of services are left")


def _settled(d: Daemon, service: str) -> bool:
    """Whether the service is one process, which is up: one that has not answered its hello is not exchanged."""
    shown = d.cli("status", "--json", code=None).stdout
    up = [one["name"] for one in json.loads(shown)["services"] if one["up"]] if shown.startswith("{") else []
    return service in up and len(list(processes(d, service))) == 1
