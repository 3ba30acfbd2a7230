"""The installed service on a host with systemd and pure cgroup v2, and what may happen to such a host."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyseccomp import Arch, resolve_syscall

from host.client.client import Client
from isolator.cli.environment import program
from isolator.cli.install import COMPLETIONS, LINK
from isolator.layers.seccomp.profiles import DENY, rules
from tests.support.timeouts import seconds
from tests.system.daemon import alive, event, wait_for
from tests.vm import reboot_before
from tests.vm.service import Service, needs_machine, slow_plugin
from tests.vm.shells import completed

pytestmark = [pytest.mark.vm, needs_machine]

FAILED = {"project_id": "p1", "deployment_id": "d1", "error_code": "E1", "finished_at": "2026-01-01T00:00:00Z"}

LITTLE = {"hooks": ["deploy.failed"], "sandbox": {"resources": {"memory": "48M"}}}
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

INSTALLED = (
    Path("/etc/systemd/system/isolator.service"), Path("/etc/systemd/system/multi-user.target.wants/isolator.service"),
    Path("/opt/isolator"), LINK, *COMPLETIONS.values(),
    *(Path(f"{parent}/isolator") for parent in ("/etc", "/var/lib", "/var/log", "/run")),
)  # fmt: skip
"""Everything outside the clone that an installed service is made of."""
HOST_TOML, NOTE = Path("/etc/isolator/host.toml"), "# a note of the operator's own\n"

# Makes each call it is told of, without an argument that could do anything, and answers.
CALLER = """\
    #!/usr/bin/python3
    import ctypes, json, os, socket
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["PLUGIN_SOCKET"])
    server.listen(1)
    connection, _ = server.accept()
    request = json.loads(connection.recv(4096))
    libc = ctypes.CDLL(None)
    for number in NUMBERS:
        libc.syscall(number, 0, 0, 0, 0, 0, 0)
    libc.socket(17, 3, 0)
    reply = {"jsonrpc": "2.0", "id": request["id"], "result": {"status": "ok"}}
    connection.sendall(json.dumps(reply).encode() + b"\\n")
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service()
    if made.property("ActiveState") == "active":  # left there by reboot_after.py, which spares a minute
        made.cli("plugin", "remove", reboot_before.PLUGIN, "--yes", code=None)
    else:
        subprocess.run(["isolator", "install"], check=True, timeout=seconds(30))
    try:
        with HOST_TOML.open("a") as file:
            file.write(NOTE)
        made.cli("plugin", "add", str(slow_plugin(tmp_path_factory.mktemp("plugins") / "echo")), "--yes")
        made.cli("event", "emit", "deploy.completed", event("first"), "--wait")
        yield made
    finally:
        print(made.journal())
        subprocess.run(["isolator", "uninstall", "--purge", "--yes"], check=True)
        assert not [path for path in INSTALLED if path.exists() or path.is_symlink()]
        assert "isolator" not in Path("/etc/passwd").read_text(), "a system user was left"


def test_installed_enabled_ready_and_watched(service: Service) -> None:
    assert all(path.exists() for path in INSTALLED)
    assert service.property("ActiveState") == "active"
    assert service.property("UnitFileState") == "enabled", "it would not start at boot"
    assert service.property("Type") == "notify" and service.property("WatchdogUSec") == "30s"
    assert service.property("Delegate") == "yes" and service.property("NRestarts") == "0"
    executable = Path(f"/proc/{service.pid()}/cmdline").read_bytes().split(b"\0")[0].decode()
    assert re.match(r"/opt/isolator/env\.\w+/bin/python3", executable), "it must not run from a copy that may vanish"
    assert "[ceiling]" in HOST_TOML.read_text()
    # Hardened as far as a builder of cages can be (isolator/cli/unit.py); a unit without a word on it scores 9.6.
    subprocess.run(["systemd-analyze", "security", "--threshold=78", "isolator"], check=True, capture_output=True)


@pytest.mark.parametrize("shell", COMPLETIONS)
def test_the_shells_complete_commands(service: Service, shell: str) -> None:
    assert completed(shell, "isolator plugin sh", "show")


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
    services = {one.name.split(".")[1]: one for one in group.parent.glob("service.*")}
    assert services.keys() == {"audit", "broker", "host"}
    weights = {name: int((one / "cpu.weight").read_text()) for name, one in services.items()}
    assert min(weights.values()) == 10 * int((group / "cpu.weight").read_text()), "cages could keep a service waiting"
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
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds(20))
    assert 70000 <= int(result.stdout) <= 74999
    # Two at once, and a shell that stays in the unit's group beside them.
    both = "exec 3<&0; for n in 1 2; do /usr/local/bin/isolator run -- sh -c 'id -u; cat' <&3 & done; wait"
    with subprocess.Popen([*unit, "sh", "-c", both], stdin=-1, stdout=-1, text=True) as at_once:
        assert at_once.stdin is not None and at_once.stdout is not None
        assert len({at_once.stdout.readline() for _ in range(2)}) == 2
        at_once.stdin.close()  # until then neither ends
        assert at_once.wait(seconds(40)) == 0
    after = subprocess.run(
        ["systemctl", "list-units", "--plain", "--no-legend", "isolator-*.scope"], check=True, capture_output=True
    )
    assert after.stdout == before.stdout, "a scope was left"


INTERRUPTIONS = {
    "restart": ["systemctl", "restart", "--no-block", "isolator"],
    "kill": ["systemctl", "kill", "-s", "KILL", "isolator"],
}
RELOADS = {"reload": ["systemctl", "reload", "isolator"], "upgrade": ["isolator", "install"]}


@pytest.mark.parametrize("how", INTERRUPTIONS)
def test_nothing_accepted_is_lost(service: Service, how: str) -> None:
    old, before = service.pid(), service.processes()
    accepted = {f"{how}{n}" for n in range(20) if service.emit(f"{how}{n}")}
    interruption = subprocess.Popen(INTERRUPTIONS[how])
    accepted |= {f"{how}{n}" for n in range(20, 40) if service.emit(f"{how}{n}")}
    service.wait_active(besides=old)
    assert interruption.wait(timeout=seconds(30)) == 0
    wait_for(lambda: service.emit(f"{how}-after"), seconds(10), "it accepts no event")
    accepted.add(f"{how}-after")
    assert len(accepted) > 20
    wait_for(lambda: accepted <= set(service.seen()), seconds(15), "an accepted event was lost")
    assert not [pid for pid in before if alive(pid)], "a process outlived its daemon"
    assert HOST_TOML.read_text().endswith(NOTE), "what the operator wrote is gone"
    service.cli("audit", "verify")


@pytest.mark.wide
@pytest.mark.parametrize("how", RELOADS)
def test_nobody_notices_a_reload(service: Service, how: str) -> None:
    service.cli("plugin", "start", "echo")
    run, pid = service.json("plugin", "show", "echo")["run"], service.pid()
    accepted = {f"{how}{n}" for n in range(20) if service.emit(f"{how}{n}")}
    reload = subprocess.Popen(RELOADS[how])
    accepted |= {f"{how}{n}" for n in range(20, 40) if service.emit(f"{how}{n}")}
    assert reload.wait(timeout=seconds(60)) == 0, service.journal()
    assert len(accepted) == 40, "an event was refused"
    wait_for(lambda: accepted <= set(service.seen()), seconds(15), "an accepted event was lost")
    assert service.pid() == pid and service.property("ActiveState") == "active", service.journal()
    assert service.json("plugin", "show", "echo")["run"] == run, service.journal()
    assert HOST_TOML.read_text().endswith(NOTE), "what the operator wrote is gone"
    service.cli("audit", "verify")


# The loop of a new image does nothing any more in the middle of its adoption.
HANGS = """
if "--adopt" in sys.argv:
    import time
    from isolator.supervisor.reload import adopt
    adopt.launcher = lambda before: time.sleep(1e6)
"""


def test_image_that_hangs_is_ended_by_the_units_watchdog_and_the_next_start_clears_everything(service: Service) -> None:
    installed, restarts = program(), int(service.property("NRestarts"))
    whole, hanging = installed.read_text(), installed.with_name("hanging")
    service.cli("plugin", "start", "echo")
    run, old, before = service.json("plugin", "show", "echo")["run"], service.pid(), service.processes()
    hanging.write_text(whole.replace("\nfrom host.cli.main", f"{HANGS}\nfrom host.cli.main"))
    hanging.chmod(0o755)
    hanging.rename(installed)
    try:
        began = time.monotonic()
        reload = subprocess.run(RELOADS["reload"], capture_output=True, text=True, check=False, timeout=seconds(120))
        assert reload.returncode != 0 and time.monotonic() - began < 120, "it waited for more than its watchdog"
        wait_for(lambda: service.property("ActiveState") == "active" and service.pid() not in (0, old), seconds(60))
    finally:
        hanging.write_text(whole)
        hanging.chmod(0o755)
        hanging.rename(installed)
    assert int(service.property("NRestarts")) == restarts + 1
    assert not [pid for pid in before if alive(pid)], "a process outlived its daemon"
    journal = service.journal()
    assert "Watchdog timeout" in journal and "cleared what an earlier daemon left: cage echo" in journal, journal
    assert service.emit("after-hanging")
    wait_for(lambda: "after-hanging" in service.seen(), seconds(30), "it delivers nothing")
    assert service.json("plugin", "show", "echo")["run"] != run
    subprocess.run(RELOADS["reload"], check=True, timeout=seconds(120))
    service.cli("audit", "verify")


def test_one_plugin_out_of_memory_leaves_the_others(service: Service, tmp_path: Path) -> None:
    service.cli("plugin", "add", str(slow_plugin(tmp_path / "hog", HOG, **LITTLE)), "--yes")
    run, pid = service.json("plugin", "show", "echo")["run"], service.pid()
    with Client() as client:
        client.call("event.emit", name="deploy.failed", payload=FAILED)
    wait_for(
        lambda: "out of memory" in service.cli("audit", "query", "--plugin", "hog", "--json"),
        seconds(10),
        "nothing tells of it",
    )
    service.cli("plugin", "remove", "hog", "--yes")
    assert service.pid() == pid and service.property("ActiveState") == "active"
    assert service.json("plugin", "show", "echo")["run"] == run


def test_every_forbidden_call_is_on_record(service: Service, tmp_path: Path) -> None:
    """The unit's own hardening must not answer a plugin's call before the cage's filter, which records it."""
    actions: dict[str, list[str]] = {}
    for name, action, _ in rules("default"):
        actions.setdefault(name, []).append(action)
    names = [name for name, all_of_it in actions.items() if all_of_it == [DENY]]
    numbers = {name: resolve_syscall(Arch.NATIVE, name) for name in names}
    known = {name: number for name, number in numbers.items() if number is not None and number >= 0}
    script = CALLER.replace("NUMBERS", repr(sorted(known.values())))
    service.cli("plugin", "add", str(slow_plugin(tmp_path / "caller", script, hooks=["deploy.failed"])), "--yes")
    service.cli("event", "emit", "deploy.failed", json.dumps(FAILED), "--wait")
    wanted = known.keys() | {"socket"}
    wait_for(lambda: wanted <= _denied(service), seconds(5), "a forbidden call is on no record")
    service.cli("plugin", "remove", "caller", "--yes")


def _denied(service: Service) -> set[str]:
    records = service.cli("audit", "query", "--plugin", "caller", "--type", "syscall.denied", "--json").splitlines()
    return {json.loads(record)["data"]["call"] for record in records}


def test_flushing_the_hosts_rules_changes_nothing_for_a_cage(service: Service) -> None:
    inside = ["nsenter", "-n", "-t", str(service.json("plugin", "show", "echo")["pid"]), "nft", "-s", "list", "ruleset"]
    before = subprocess.run(inside, capture_output=True, text=True, check=True).stdout
    subprocess.run(["nft", "add", "table", "inet", "isolator_vm"], check=True)
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    assert not subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=True).stdout
    assert before and subprocess.run(inside, capture_output=True, text=True, check=True).stdout == before


def test_the_clock_jumps_a_day_forward_and_back(service: Service) -> None:
    pid, real = service.pid(), time.CLOCK_REALTIME
    for name, days in (("tomorrow", 1), ("today", -1)):
        time.clock_settime(real, time.clock_gettime(real) + days * 86400)
        assert service.emit(name)
        wait_for(lambda name=name: name in service.seen(), seconds(10), f"not delivered after {days} day")
        service.cli("audit", "verify")
    assert service.pid() == pid, "a clock that jumps ended the daemon"


def test_a_full_disk_loses_nothing_that_was_accepted(service: Service) -> None:
    pid = service.pid()
    accepted = {name for name in (f"before-full{n}" for n in range(20)) if service.emit(name)}
    filler = Path("/var/tmp/filler")
    try:
        with filler.open("wb") as file:
            _fill(file.fileno())
        for number in range(2000):
            name = f"full{number}"
            if not service.emit(name, url="https://app.example/" + "x" * 1500):
                break
            accepted.add(name)
        else:
            pytest.fail("the disk was not full")
        assert service.pid() == pid, "a full disk ended the daemon"
    finally:
        filler.unlink()
    wait_for(lambda: service.emit("room-again"), seconds(10), "it accepts no event")
    wait_for(lambda: accepted | {"room-again"} <= set(service.seen()), seconds(30), "an accepted event was lost")
    assert service.pid() == pid
    service.cli("audit", "verify")


def _fill(fd: int) -> None:
    """Take every block of the file system, also those that are reserved for root, without writing them."""
    size, step = 0, 1 << 30
    while step >= 4096:
        try:
            os.posix_fallocate(fd, size, step)
            size += step
        except OSError:
            step //= 2
