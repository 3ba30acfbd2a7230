"""The installed service on a host with systemd and pure cgroup v2, and what may happen to such a host.

These tests install the real service, flush the host's nftables and set its clock: they run in a machine that is
thrown away afterwards and nowhere else.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from host.client import Client
from isolator.errors import IsolatorError
from tests.system.daemon import EVENT, Daemon, alive, event, wait_for, write_plugin

_DISPOSABLE = Path("/etc/systemd/system/isolator-vm-ready.service")  # the box of ./dev vm, and nothing else, has it
_PURE_V2 = Path("/sys/fs/cgroup/cgroup.controllers")
pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(
        not (_DISPOSABLE.exists() and Path("/run/systemd/system").exists() and _PURE_V2.exists()),
        reason="needs systemd as PID 1 and pure cgroup v2: sudo ./dev vm",
    ),
]

FAILED = {"project_id": "p1", "deployment_id": "d1", "error_code": "E1", "finished_at": "2026-01-01T00:00:00Z"}

HOG = """\
    #!/usr/bin/python3
    import os, socket
    path = os.environ["PLUGIN_SOCKET"]
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(1)
    server.accept()
    block = bytearray(b"x") * (1 << 30)
"""


class Service:
    """``isolator.service``, used as an operator does."""

    def cli(self, *words: str, code: int | None = 0) -> str:
        result = subprocess.run(
            ["/usr/local/bin/isolator", *words], capture_output=True, text=True, check=False, timeout=200,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if code is not None:
            assert result.returncode == code, (words, result.returncode, result.stdout, result.stderr)
        return result.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self.cli(*words, "--json"))

    def property(self, name: str) -> str:
        command = ["systemctl", "show", "--value", "-p", name, "isolator.service"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def pid(self) -> int:
        return int(self.property("MainPID"))

    def seen(self, plugin: str = "echo") -> set[str]:
        """What the plugin has written; its state is mounted in the service's own mount namespace."""
        path = Path(f"/proc/{self.pid()}/root/var/lib/isolator/state/{plugin}/mnt/state/seen")
        return set(path.read_text().split()) if path.exists() else set()

    def emit(self, name: str) -> bool:
        """Whether the daemon accepted the event."""
        try:
            with Client(timeout=10) as client:
                client.call("event.emit", name="deploy.completed", payload=EVENT | {"deployment_id": name})
        except (IsolatorError, OSError):
            return False
        return True

    def wait_active(self, besides: int = 0) -> None:
        """Until it is active, as another process than ``besides``."""
        wait_for(
            lambda: self.property("ActiveState") == "active" and self.pid() not in (0, besides), 150, "not active again"
        )

    def processes(self) -> set[int]:
        """Every process of the unit's group and of all groups below it."""
        group = Path("/sys/fs/cgroup/system.slice/isolator.service")
        return {int(pid) for file in group.rglob("cgroup.procs") for pid in file.read_text().split()}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    subprocess.run(["isolator", "install"], check=True, timeout=280)
    made = Service()
    try:
        made.cli("plugin", "add", str(write_plugin(tmp_path_factory.mktemp("plugins") / "echo")), "--yes")
        made.cli("event", "emit", "deploy.completed", event("first"), "--wait")
        yield made
    finally:
        journal = subprocess.run(
            ["journalctl", "-u", "isolator", "--no-pager"], capture_output=True, text=True, check=False
        )
        print(journal.stdout[-8000:])
        subprocess.run(["isolator", "uninstall", "--purge", "--yes"], check=True)


@pytest.mark.timeout(600)
def test_installed_enabled_ready_and_watched(service: Service) -> None:
    assert service.property("ActiveState") == "active"
    assert service.property("UnitFileState") == "enabled", "it would not start at boot"
    assert service.property("Type") == "notify" and service.property("WatchdogUSec") == "30s"
    assert service.property("Delegate") == "yes" and service.property("NRestarts") == "0"
    executable = Path(f"/proc/{service.pid()}/cmdline").read_bytes().split(b"\0")[0].decode()
    assert re.match(r"/opt/isolator/env\.\w+/bin/python3", executable), "it must not run from a copy that may vanish"
    again = Path("/etc/isolator/host.toml").read_text()
    assert "[ceiling]" in again


def test_a_cage_has_all_controllers_and_every_limit(service: Service) -> None:
    entry = service.json("plugin", "show", "echo")
    group = Path("/sys/fs/cgroup" + Path(f"/proc/{entry['pid']}/cgroup").read_text().strip().partition("::")[2])
    assert group.is_relative_to("/sys/fs/cgroup/system.slice/isolator.service/isolator")
    assert {"cpu", "io", "memory", "pids"} <= set((group / "cgroup.controllers").read_text().split())
    wanted = {
        "memory.max": str(256 << 20), "memory.high": "max", "memory.swap.max": "0", "memory.oom.group": "1",
        "cpu.max": "2500 10000", "pids.max": "65",
    }  # fmt: skip
    assert {name: (group / name).read_text().strip() for name in wanted} == wanted
    assert Path(f"/proc/{entry['pid']}/oom_score_adj").read_text().strip() == "500"
    ledger = service.json("check")
    short = [c for c in ledger["controls"] if c["state"] != "enforced" and c["layer"] != "landlock"]
    assert ledger["ready"] and not short


def test_run_from_a_session_and_from_a_unit(service: Service) -> None:
    before = subprocess.run(
        ["systemctl", "list-units", "--plain", "--no-legend", "isolator-*.scope"], check=True, capture_output=True
    )
    assert "/etc/shadow" not in service.cli("run", "--", "cat", "/proc/self/cgroup")
    assert service.cli("run", "--", "sh", "-c", "exit 7", code=7) == ""
    unit = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", "-p", "Delegate=yes"]
    command = [*unit, "/usr/local/bin/isolator", "run", "--", "id", "-u"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    assert 70000 <= int(result.stdout) <= 74999
    after = subprocess.run(
        ["systemctl", "list-units", "--plain", "--no-legend", "isolator-*.scope"], check=True, capture_output=True
    )
    assert after.stdout == before.stdout, "a scope was left"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("how", ["restart", "kill"])
def test_nothing_accepted_is_lost(service: Service, how: str) -> None:
    old, before = service.pid(), service.processes()
    accepted = {f"{how}{n}" for n in range(20) if service.emit(f"{how}{n}")}
    if how == "restart":
        subprocess.run(["systemctl", "restart", "--no-block", "isolator"], check=True)
    else:
        subprocess.run(["systemctl", "kill", "-s", "KILL", "isolator"], check=True)
    accepted |= {f"{how}{n}" for n in range(20, 40) if service.emit(f"{how}{n}")}
    service.wait_active(besides=old)
    wait_for(lambda: service.emit(f"{how}-after"), 60, "it accepts no event")
    accepted.add(f"{how}-after")
    assert len(accepted) > 20
    wait_for(lambda: accepted <= service.seen(), 120, f"lost: {sorted(accepted - service.seen())}")
    assert not [pid for pid in before if alive(pid)], "a process outlived its daemon"
    service.cli("audit", "verify")


def test_one_plugin_out_of_memory_leaves_the_others(service: Service, tmp_path: Path) -> None:
    hooks = {"hooks": ["deploy.failed"]}
    service.cli("plugin", "add", str(write_plugin(tmp_path / "hog", HOG, **hooks)), "--yes")
    run, pid = service.json("plugin", "show", "echo")["run"], service.pid()
    with Client() as client:
        client.call("event.emit", name="deploy.failed", payload=FAILED)
    wait_for(
        lambda: "memory" in service.cli("audit", "query", "--plugin", "hog", "--json", code=None), 90, "no OOM told"
    )
    service.cli("plugin", "remove", "hog")
    assert service.pid() == pid and service.property("ActiveState") == "active"
    assert service.json("plugin", "show", "echo")["run"] == run


def test_flushing_the_hosts_rules_changes_nothing_for_a_cage(service: Service) -> None:
    inside = ["nsenter", "-n", "-t", str(service.json("plugin", "show", "echo")["pid"]), "nft", "-s", "list", "ruleset"]
    before = subprocess.run(inside, capture_output=True, text=True, check=True).stdout
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    assert before and subprocess.run(inside, capture_output=True, text=True, check=True).stdout == before


def test_the_clock_jumps_a_day_forward_and_back(service: Service) -> None:
    real = time.CLOCK_REALTIME
    for name, days in (("tomorrow", 1), ("today", -1)):
        time.clock_settime(real, time.clock_gettime(real) + days * 86400)
        assert service.emit(name)
        wait_for(lambda name=name: name in service.seen(), 60, f"not delivered after the clock jumped {days} day")
        service.cli("audit", "verify")
    assert service.property("NRestarts") in ("0", "1"), "only the test that kills it may restart it"


@pytest.mark.timeout(400)
def test_a_full_disk_loses_nothing_that_was_accepted(shared_dir: Path, tmp_path: Path) -> None:
    image, var = tmp_path / "disk", shared_dir / "var"
    var.mkdir()
    subprocess.run(["truncate", "-s", "192M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, var], check=True)
    d = Daemon(shared_dir)
    try:
        d.start(timeout=120)
        d.cli("plugin", "add", str(write_plugin(tmp_path / "echo")), "--yes")
        d.cli("event", "emit", "deploy.completed", event("before"), "--wait")
        filler = var / "filler"
        full = subprocess.run(
            ["dd", "if=/dev/zero", f"of={filler}", "bs=64k"], capture_output=True, text=True, check=False
        )
        assert "No space left" in full.stderr
        accepted, refused = {"dbefore"}, 0
        with Client(d.root, timeout=5) as client:
            for number in range(100):
                payload = EVENT | {"deployment_id": f"d{number}", "url": "https://app.example/" + "x" * 1500}
                try:
                    client.call("event.emit", name="deploy.completed", payload=payload)
                except IsolatorError:
                    refused += 1
                    break
                accepted.add(f"d{number}")
        assert refused, "the disk was not full"
        filler.unlink()
        assert d.process is not None and d.process.poll() is None, "a full disk ended the daemon"
        wait_for(
            lambda: d.cli("event", "emit", "deploy.completed", event("after"), code=None).returncode == 0,
            90,
            "no event",
        )
        seen = shared_dir / "var/lib/isolator/state/echo/mnt/state/seen"
        wait_for(lambda: accepted | {"dafter"} <= set(seen.read_text().split()), 120, "an accepted event was lost")
        d.cli("audit", "verify")
    finally:
        if d.process is not None:
            d.stop()
        d.cli("uninstall", "--purge", "--yes")
        subprocess.run(["umount", var], check=True)
