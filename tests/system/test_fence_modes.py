"""Past its deadline a plugin of any mode makes no call and sends no byte, be it frozen, or out of memory.

As in ``test_fence``, the test does in the host process what a holder of leases does. The plugins
(``restless``) write to a witness outside and call the host API as often as they can.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from isolator.linux.boottime import boottime
from tests.mcp.client import Client, text
from tests.support import restless
from tests.support.internet_servers import WEB
from tests.support.pretend_internet import PretendInternet, pretend_internet
from tests.support.timeouts import seconds
from tests.support.witness import Witness, of_day
from tests.system.daemon import daemon, wait_for
from tests.system.test_fence import LONG, Held

BACKOFF = 2
HOST_TOML = f'[network]\nresolvers = ["{WEB}"]\n[restart]\nbackoff_min = "{BACKOFF}s"\ncrashes = 100\n'
_numbers = itertools.count()
GLUTTON = "import sys; open(sys.argv[1], 'w').write('0'); b'x' * (60 << 20)"
"""Takes memory of another group than its own, and ends."""


class Daemon(Held):
    """A daemon with a plugin of some mode, whose name begins with that."""

    def started(self, name: str) -> list[dict[str, Any]]:
        return self.of_type("exec.started" if name.startswith("exec") else "plugin.started", name)

    def ended(self, name: str, cause: str) -> bool:
        kinds = ("exec.ended",) if name.startswith("exec") else ("plugin.crashed", "plugin.stopped")
        return any(cause in str(r["data"].get("cause")) for kind in kinds for r in self.of_type(kind, name))

    def freeze(self, name: str) -> float:
        before = len(self.of_type("plugin.frozen", name))
        self.hold(name, until := boottime() + 0.3)
        wait_for(lambda: len(self.of_type("plugin.frozen", name)) > before, what="its deadline passes unnoticed")
        return until


@pytest.fixture(scope="module")
def pretend() -> Iterator[PretendInternet]:
    with pretend_internet() as made:
        yield made


@pytest.fixture(scope="module")
def witness(pretend: PretendInternet) -> Witness:
    return Witness(pretend.internet)


@pytest.fixture(scope="module")
def running(pretend: PretendInternet) -> Iterator[Daemon]:
    with daemon(host_toml=HOST_TOML, network=pretend.host_fd, kind=Daemon) as made:
        assert isinstance(made, Daemon)
        yield made


@pytest.fixture
def name(mode: str) -> str:
    """A name of its own for each test's plugin: the trail has those of all."""
    return f"{mode}-{next(_numbers)}"


@pytest.fixture
def d(running: Daemon, mode: str, name: str, tmp_path: Path) -> Iterator[Daemon]:
    """The daemon with the plugin of a mode, which has an event that it does not end."""
    restless.add(running, tmp_path, mode, name)
    restless.emit(running, "first", "hold")
    wait_for(lambda: running.noted(name) == ["dfirst"], what=f"{name} gets no event")
    restless.until_tried(running, name)
    try:
        yield running
    finally:
        running.without.unlink(missing_ok=True)
        running.free(name)
        running.cli("plugin", "remove", name, "--yes")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("mode", [*restless.PLUGINS])
def test_plugin_of_any_mode_makes_no_call_past_its_deadline(
    d: Daemon, name: str, witness: Witness, frozen: bool
) -> None:
    wait_for(lambda: witness.after(boottime() - 1) and d.noted(name, "answered"), what="nothing comes through at all")
    if frozen:
        deadline = d.freeze(name)
    else:  # host and broker alone hold it back
        d.without.touch()
        d.hold(name, deadline := boottime() + 0.3)
        wait_for(lambda: boottime() > deadline)
    second, before = restless.emit(d, "second"), len(d.started(name))
    wait_for(lambda: d.show(name)["holding"] == "it has no lease at the moment", what="it is sent another event")
    if not frozen:
        restless.until_tried(d, name)
    if name.startswith("mcp"):
        with Client(d, name) as client:
            assert "lease" in str(client.initialize()) + str(client.call("act", deployment_id="d3", url="https://go"))
    assert witness.after(deadline) == []
    assert restless.answered_after(d, name, deadline) == []
    assert d.noted(name) == ["dfirst"] and len(d.started(name)) == before
    restless.go_on(d, name)
    d.hold(name, boottime() + LONG)
    wait_for(lambda: d.handled(second), what="it does not go on")
    wait_for(lambda: witness.after(deadline) or name.startswith("exec"), what="its connections do not go on")
    assert sorted(d.noted(name)) == ["dfirst", "dsecond"], "an event was repeated"
    if name.startswith("mcp"):
        with Client(d, name) as client:
            client.initialize()
            assert text(client.call("act", deployment_id="d4", url="https://go")) == "done"


@pytest.mark.parametrize("mode", [*restless.PLUGINS])
def test_frozen_cage_that_is_out_of_memory_ends_and_is_not_started_until_it_is_held(
    d: Daemon, name: str, witness: Witness
) -> None:
    deadline = d.freeze(name)
    starts = len(d.started(name))
    _exhaust(int(d.started(name)[-1]["data"]["pid"]))
    wait_for(lambda: d.ended(name, "out of memory"), what="the frozen cage does not end")
    second = restless.emit(d, "second")
    wait_for(lambda: d.show(name)["holding"] == "it has no lease at the moment", what="it is sent another event")
    if not name.startswith("exec"):
        refused = d.cli("plugin", "start", name, code=None)
        assert refused.returncode != 0 and "has no lease" in refused.stderr
    assert witness.after(deadline) == [] and restless.answered_after(d, name, deadline) == []
    assert len(d.started(name)) == starts
    restless.go_on(d, name)
    d.hold(name, boottime() + LONG)
    wait_for(lambda: d.handled(second), what="it is not started again")
    assert {*d.noted(name)} == {"dfirst", "dsecond"}


@pytest.mark.parametrize("mode", ["http", "mcp"])
def test_plugin_that_was_out_of_memory_is_not_started_past_its_deadline(d: Daemon, name: str, witness: Witness) -> None:
    _exhaust(int(d.started(name)[-1]["data"]["pid"]))
    wait_for(lambda: d.ended(name, "out of memory"), what="the cage does not end")
    d.hold(name, deadline := boottime())
    wait_for(lambda: boottime() > deadline + 2 * BACKOFF)
    assert witness.after(deadline) == [] and restless.answered_after(d, name, deadline) == []
    assert all(moment(record) < of_day(deadline) + 0.1 for record in d.started(name)), "it was started"
    second = restless.emit(d, "second")
    restless.go_on(d, name)
    d.hold(name, boottime() + LONG)
    wait_for(lambda: d.handled(second), what="it is not started again")


def moment(record: dict[str, Any]) -> float:
    """The Unix time of a record."""
    return datetime.fromisoformat(record["time"]).timestamp()


def _exhaust(pid: int) -> None:
    """Have the memory of a cage exhausted from outside, so that the kernel ends processes in it."""
    groups = dict(line.split(":", 2)[1:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    if "memory" in groups:
        (mount,) = (one[1] for one in mounts if one[2] == "cgroup" and "memory" in one[3].split(","))
        procs = f"{mount}{groups['memory']}/cgroup.procs"
        subprocess.run([sys.executable, "-I", "-c", GLUTTON, procs], check=False, timeout=seconds(60))
    else:
        (mount,) = (one[1] for one in mounts if one[2] == "cgroup2")
        Path(f"{mount}{groups['']}/memory.max").write_text("1M")
