"""A control that this host lacks: refused with one line, or, where host.toml says so, done without and recorded.

The host really lacks it: in a mount namespace of the command's own the controller's hierarchy is unmounted.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.layers.cgroup.subtree import find_hierarchies
from isolator.layers.ledger import LAYERS, ledger
from isolator.policy.host import MAY_DEGRADE
from tests.system import daemon as system
from tests.system.daemon import Daemon, event, write_plugin

_LABELS = {"memory": "memory cap", "cpu": "cpu cap", "pids": "task cap"}

pytestmark = pytest.mark.skipif(
    not set(_LABELS) <= find_hierarchies().v1.keys(), reason="pure cgroup v2: one mount holds every controller"
)


def _without(controller: str) -> list[str]:
    """Run the rest of the command on a host without a controller."""
    place = str(find_hierarchies().v1[controller])
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    mounted = max((point for point in mounts if f"{place}/".startswith(f"{point}/")), key=len)
    return ["unshare", "-m", "sh", "-c", f'umount {mounted} && exec "$@"', "sh"]


def _run(root: Path, controller: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [*_without(controller), "isolator", "--root", str(root), "run", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def _configure(root: Path, *keys: str) -> None:
    (root / "etc/isolator").mkdir(parents=True, exist_ok=True)
    (root / "etc/isolator/host.toml").write_text(f"may_degrade = {json.dumps(keys)}\n")


@pytest.mark.parametrize("controller", _LABELS)
def test_a_run_without_a_controller(shared_dir: Path, controller: str) -> None:
    refused = _run(shared_dir, controller, "--", "true")
    assert refused.returncode == 125
    assert refused.stderr.count("\n") == 1
    assert f"cannot enforce {_LABELS[controller]}" in refused.stderr
    assert f'list "cgroup.{controller}" in may_degrade' in refused.stderr
    _configure(shared_dir, *({f"cgroup.{one}" for one in _LABELS} - {f"cgroup.{controller}"}))
    assert _run(shared_dir, controller, "--", "true").returncode == 125, "another control was listed, not this one"
    _configure(shared_dir, f"cgroup.{controller}")
    records = shared_dir / "records"
    done = _run(shared_dir, controller, "--audit", str(records), "--", "sh", "-c", "echo done; exit 3")
    assert (done.returncode, done.stdout) == (3, "done\n"), done.stderr
    (started,) = [r for r in map(json.loads, records.read_text().splitlines()) if r["type"] == "plugin.started"]
    assert f"cgroup.{controller}" in started["data"]["degraded"]


class _Lacking(Daemon):
    def command(self) -> list[str]:
        return [*_without("cpu"), *super().command()]


@pytest.fixture
def lacking() -> Iterator[Daemon]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "Daemon", _Lacking)
        with system.daemon(start=False) as d:
            yield d


def test_a_daemon_without_a_controller(lacking: Daemon, tmp_path: Path) -> None:
    refused = subprocess.run(lacking.command(), capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "cannot enforce cpu cap" in refused.stderr and 'list "cgroup.cpu"' in refused.stderr
    _configure(lacking.root, "cgroup.cpu")
    lacking.start()
    lacking.cli("plugin", "add", str(write_plugin(tmp_path / "echo")), "--yes")
    for number in range(2):
        lacking.cli("event", "emit", "deploy.completed", event(number), "--wait")
        lacking.cli("plugin", "restart", "echo")
    started = [r for r in lacking.records() if r["type"] == "plugin.started"]
    assert len(started) > 1
    assert all("cgroup.cpu" in r["data"]["degraded"] for r in started)
    lacking.cli("audit", "verify")


def test_every_name_that_may_be_listed_is_one_of_the_ledger() -> None:
    keys = {control.key for control in ledger()}
    assert sorted(MAY_DEGRADE) == sorted(key for layer in LAYERS for key in layer.may_degrade)
    assert keys >= set(MAY_DEGRADE)
    shipped = (Path(__file__).parents[2] / "policies/host.toml").read_text()
    documented = (Path(__file__).parents[2] / "docs/policy.md").read_text()
    for key in MAY_DEGRADE:
        assert f"#   {key} " in shipped
        assert f"`{key}`" in documented
