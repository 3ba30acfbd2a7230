"""A plugin whose deadline passes, in a whole daemon: frozen, its bytes held back, thawed in time or killed.

The test does in the host process what a holder of leases does: it moves the deadline on, or does not.
The plugin does all that it can to go on: it computes, writes to a witness outside, starts children, and sets timers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isolator.linux.boottime import boottime
from tests.support.internet_servers import WEB
from tests.support.pretend_internet import PretendInternet, pretend_internet
from tests.support.timeouts import seconds
from tests.support.witness import PORT, Witness
from tests.system.daemon import ECHO, daemon, event, kill_9, wait_for, write_plugin
from tests.system.taken_over import TakenOver

HOST_TOML = f'[network]\nresolvers = ["{WEB}"]\n[restart]\nbackoff_min = "0.1s"\ncrashes = 2\n'
POLICY = f"""\
[grant]
hooks = ["deploy.*"]
egress = ["hooks.example.com:{PORT}"]
[limits]
connects_per_second = 100
cpu = "50%"
"""
NETWORK = {"network": {"egress": [{"host": "hooks.example.com", "ports": [PORT]}]}}
BUSY = f"""
    import ctypes, signal, threading, time
    def stamp():
        return b"%r\\n" % time.time()
    def write():
        while True:
            try:
                with socket.create_connection((address, {PORT}), 5) as s:
                    while True:
                        s.sendall(stamp())
                        ctypes.CDLL(None).ptrace(0, 0, 0, 0)
                        time.sleep(0.01)
            except OSError:
                time.sleep(0.05)
    def bear():
        while True:
            if os.fork() == 0:
                os._exit(sum(range(1000)) % 2)
            os.wait()
    address = socket.gethostbyname("hooks.example.com")
    for work in (write, write, bear):
        if os.fork() == 0:
            work()
    threading.Thread(target=write, daemon=True).start()
    signal.signal(signal.SIGALRM, lambda *_: sum(range(1000)))
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
"""
SCRIPT = ECHO.replace('    path = os.environ["PLUGIN_SOCKET"]\n', f'{BUSY}    path = os.environ["PLUGIN_SOCKET"]\n')
ONCE = """\
    #!/usr/bin/python3
    import os, time
    if os.environ["PLUGIN_EVENT_ATTEMPT"] != "1":
        raise SystemExit(64)  # it was counted
    while not os.path.exists(os.environ["PLUGIN_STATE_DIR"] + "/go"):
        time.sleep(0.02)
"""
LONG = 600.0


class Held(TakenOver):
    """A daemon whose plugins are held."""

    @property
    def without(self) -> Path:
        """While there is this file, no cage is frozen."""
        return self.root / "without-freezing"

    def command(self) -> list[str]:
        *before, program, root, path, serve = super().command()
        weakened = (
            "import os\nfrom isolator.layers.cgroup.leaf import Leaf\nfreeze = Leaf.freeze\n"
            f"Leaf.freeze = lambda self: None if os.path.exists({str(self.without)!r}) else freeze(self)\n"
        )
        return [*before, weakened + program, root, path, serve]

    def hold(self, name: str, until: float) -> None:
        self.fence("hold", name, until)

    def free(self, name: str) -> None:
        self.fence("free", name)

    def lose(self, name: str) -> None:
        self.fence("lost", name)

    def of_type(self, kind: str, name: str) -> list[dict[str, Any]]:
        return [r for r in self.records() if r["type"] == kind and r["plugin"] == name]

    def show(self, name: str) -> dict[str, Any]:
        return self.json("plugin", "show", name)

    def handled(self, event_id: str) -> bool:
        deliveries = self.json("event", "show", event_id)["deliveries"]
        return all(one["state"] == "ok" for one in deliveries)

    def groups(self, name: str) -> Path:
        """The v2 group of the plugin's run."""
        return Path(self.of_type("plugin.started", name)[-1]["data"]["cgroup"])

    def frozen(self, name: str) -> bool:
        return "frozen 1" in (self.groups(name) / "cgroup.events").read_text()

    def used(self, name: str) -> str:
        """The processor's time that the plugin has used, in µs."""
        return (self.groups(name) / "cpu.stat").read_text().split()[1]

    def freeze(self, name: str) -> float:
        """Let its deadline pass; returns that, once its cage is frozen."""
        before = len(self.of_type("plugin.frozen", name))
        until = boottime() + 0.3
        self.hold(name, until)
        wait_for(lambda: len(self.of_type("plugin.frozen", name)) > before, what="its deadline passes unnoticed")
        wait_for(lambda: self.frozen(name), what="the kernel has not frozen it")
        return until


@pytest.fixture(scope="module")
def pretend() -> Iterator[PretendInternet]:
    with pretend_internet() as made:
        yield made


@pytest.fixture(scope="module")
def witness(pretend: PretendInternet) -> Witness:
    return Witness(pretend.internet)


@contextlib.contextmanager
def held(pretend: PretendInternet, folder: Path) -> Iterator[Held]:
    """A daemon with the plugin ``busy``, which runs, and ``once``, of the mode exec."""
    with daemon(host_toml=HOST_TOML, network=pretend.host_fd, kind=Held) as made:
        assert isinstance(made, Held)
        policies = made.root / "etc/isolator/policies"
        policies.mkdir(parents=True, exist_ok=True)
        (policies / "busy.toml").write_text(POLICY)
        made.cli("plugin", "add", str(write_plugin(folder / "busy", SCRIPT, sandbox=NETWORK)), "--yes")
        made.cli("event", "emit", "deploy.completed", event(1), "--wait")
        yield made


@pytest.fixture(scope="module")
def d(pretend: PretendInternet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    with held(pretend, tmp_path_factory.mktemp("plugins")) as made:
        yield made


@pytest.fixture(autouse=True)
def _free(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "d" in request.fixturenames:
        request.getfixturevalue("d").free("busy")


def up(d: Held) -> str:
    """Have the plugin run; returns its run."""
    d.cli("event", "emit", "deploy.completed", event(1), "--wait")
    return str(d.show("busy")["run"])


def test_plugin_past_its_deadline_stands_still_and_goes_on_when_it_is_moved(d: Held, witness: Witness) -> None:
    run, restarts = up(d), d.show("busy")["restarts"]
    wait_for(lambda: witness.after(boottime() - 1), what="nothing comes through at all")
    deadline = d.freeze("busy")
    used = d.used("busy")
    shown = d.show("busy")
    assert shown["lease"].startswith("frozen: lease") and shown["lease"] in shown["error"]
    assert "frozen: lease" in d.cli("plugin", "list").stdout
    assert shown["state"] == "running"
    d.cli("plugin", "denials", "busy")
    assert witness.after(deadline) == []
    assert d.used("busy") == used
    (record,) = [r for r in d.of_type("plugin.frozen", "busy") if run in r["data"]["runs"]]
    assert record["data"]["late_ms"] >= 0

    d.hold("busy", boottime() + LONG)
    wait_for(lambda: d.used("busy") != used, what="it does not go on")
    wait_for(lambda: witness.after(deadline), what="its connections do not go on")
    assert d.of_type("plugin.thawed", "busy")[-1]["data"]["runs"] == [run]
    assert up(d) == run and d.show("busy")["restarts"] == restarts
    assert not d.show("busy").get("lease")


def test_deadline_passes_though_the_host_process_was_killed(d: Held, witness: Witness) -> None:
    run = up(d)
    deadline = boottime() + 1.5
    d.hold("busy", deadline)
    kill_9(d.service_pid("host.service"))
    wait_for(lambda: d.frozen("busy"), what="nobody has kept the deadline")
    wait_for(lambda: d.cli("plugin", "list", code=None).returncode == 0, what="no host comes back")
    id_ = d.json("event", "emit", "deploy.completed", event(2))["id"]
    wait_for(lambda: d.show("busy")["holding"] == "it has no lease at the moment", what="the new host sends it events")
    kill_9(d.service_pid("isolator.broker.service"))
    wait_for(lambda: d.service_pid("isolator.broker.service", missing_ok=True), what="no broker comes back")
    assert witness.after(deadline) == []
    d.hold("busy", boottime() + LONG)
    wait_for(lambda: d.handled(id_), what="the event is not delivered")
    assert d.show("busy")["run"] == run


def test_frozen_plugin_is_stopped_at_once_and_not_started(d: Held) -> None:
    up(d)
    d.freeze("busy")
    restarts = d.show("busy")["restarts"]
    d.cli("plugin", "stop", "busy")
    ended = d.of_type("plugin.stopped", "busy")[-1]["data"]
    assert (ended["cause"], ended["origin"]) == ("stopped at once: it was frozen", "operator")
    refused = d.cli("plugin", "start", "busy", code=None)
    assert refused.returncode != 0 and "has no lease" in refused.stderr and refused.stderr.count("\n") <= 2
    shown = d.show("busy")
    assert (shown["state"], shown["lease"], shown["restarts"]) == ("stopped", "waits for its lease", restarts)
    assert not shown["error"], "to be held by another host is no fault"
    d.hold("busy", boottime() + LONG)
    d.cli("plugin", "start", "busy")


def test_lost_plugin_is_killed_frozen_and_blamed_for_nothing(d: Held, witness: Witness) -> None:
    up(d)
    deadline, crashes = d.freeze("busy"), len(d.of_type("plugin.crashed", "busy"))
    d.lose("busy")
    wait_for(lambda: d.show("busy")["state"] == "stopped", what="it is not ended")
    assert witness.after(deadline) == [], "its last words have come through"
    for _ in range(2):  # with that, more often than it may crash
        d.hold("busy", boottime() + LONG)
        d.cli("plugin", "start", "busy")
        d.lose("busy")
        wait_for(lambda: d.show("busy")["state"] == "stopped", what="it is not ended")
    assert d.of_type("plugin.stopped", "busy")[-1]["data"]["cause"] == "its lease was lost"
    assert len(d.of_type("plugin.lost", "busy")) == 3
    assert len(d.of_type("plugin.crashed", "busy")) == crashes


def test_frozen_plugin_is_updated_without_a_trial(d: Held, tmp_path: Path) -> None:
    up(d)
    d.freeze("busy")
    d.cli(
        "plugin",
        "update",
        "busy",
        str(write_plugin(tmp_path / "busy", SCRIPT, sandbox=NETWORK, version="2.0.0")),
        "--yes",
    )
    shown = d.show("busy")
    assert (shown["version"], shown["state"], shown["lease"]) == ("2.0.0", "stopped", "waits for its lease")
    d.hold("busy", boottime() + LONG)
    assert up(d)


@pytest.mark.wide
def test_plugin_whose_deadline_passes_while_it_is_stopped_is_killed(d: Held, tmp_path: Path) -> None:
    stubborn = ECHO.replace(
        "    server.bind(path)\n", "    import signal; signal.signal(15, signal.SIG_IGN)\n    server.bind(path)\n"
    )
    (d.root / "etc/isolator/policies/stubborn.toml").write_text(
        '[grant]\nhooks = ["deploy.*"]\n[restart]\nstop_grace = "60s"\n'
    )
    d.cli("plugin", "add", str(write_plugin(tmp_path / "stubborn", stubborn)), "--yes")
    d.cli("event", "emit", "deploy.completed", event(5), "--wait")
    stop = d.begin("plugin", "stop", "stubborn")
    wait_for(lambda: d.show("stubborn")["state"] == "stopping", what="it is not stopped")
    d.hold("stubborn", boottime() - 1)
    assert stop.wait(seconds(30)) == 0, "its grace is waited for"
    stop.communicate()
    assert d.of_type("plugin.stopped", "stubborn")[-1]["data"]["cause"] == "stopped at once: it was frozen"
    d.cli("plugin", "remove", "stubborn", "--yes")


def test_deadline_is_kept_over_reloads(d: Held, witness: Witness) -> None:
    run = up(d)
    d.hold("busy", boottime() + LONG)
    d.cli("reload")
    used = d.used("busy")
    wait_for(lambda: d.used("busy") != used, what="it still stands still after the reload")
    deadline = d.freeze("busy")
    d.cli("reload")
    assert d.frozen("busy") and d.show("busy")["lease"]
    assert witness.after(deadline) == []
    d.hold("busy", boottime() + LONG)
    wait_for(lambda: witness.after(deadline), what="its connections do not go on")
    assert up(d) == run
    assert d.of_type("plugin.thawed", "busy")[-1]["data"]["seconds"] > 0


def test_backup_leaves_a_frozen_plugin_frozen(d: Held, tmp_path: Path) -> None:
    up(d)
    d.freeze("busy")
    used = d.used("busy")
    (passphrase := tmp_path / "passphrase").write_text("a passphrase for tests")
    passphrase.chmod(0o600)
    d.cli("backup", str(tmp_path / "backup"), "--passphrase-file", str(passphrase))
    assert d.frozen("busy") and d.used("busy") == used


def test_frozen_invocation_is_ended_when_it_is_lost_and_counts_no_attempt(d: Held, tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "once", ONCE, transport={"mode": "exec"})
    d.cli("plugin", "add", str(folder), "--yes")
    id_ = d.json("event", "emit", "deploy.completed", event(3))["id"]
    wait_for(lambda: d.of_type("exec.started", "once"), what="it does not begin")
    d.hold("once", boottime() + 0.1)
    wait_for(lambda: d.of_type("plugin.frozen", "once"), what="it is not frozen")
    d.lose("once")
    (ended,) = wait_for(lambda: d.of_type("exec.ended", "once"), what="it is not ended")
    assert (ended["data"]["cause"], ended["data"]["origin"]) == ("its lease was lost", "daemon")
    (d.state_of("once") / "go").touch()
    d.hold("once", boottime() + LONG)
    wait_for(lambda: d.handled(id_), what="the event is not delivered")
    d.cli("plugin", "remove", "once", "--yes")


@pytest.mark.wide
def test_time_for_which_a_plugin_is_frozen_counts_for_none_of_its_times(d: Held, tmp_path: Path) -> None:
    slow = ECHO.replace("    server.bind(path)\n", "    import time; time.sleep(1)\n    server.bind(path)\n")
    policies = d.root / "etc/isolator/policies"
    for name, limits in (("slow", '[restart]\nstart_timeout = "4s"'), ("once", '[delivery]\ntimeout = "4s"')):
        (policies / f"{name}.toml").write_text(f'[grant]\nhooks = ["deploy.*"]\n{limits}\n')
    d.cli("plugin", "add", str(write_plugin(tmp_path / "slow", slow)), "--yes")
    d.cli("plugin", "add", str(write_plugin(tmp_path / "once", ONCE, transport={"mode": "exec"})), "--yes")
    id_ = d.json("event", "emit", "deploy.completed", event(4))["id"]
    for name, started in (("slow", "plugin.started"), ("once", "exec.started")):
        wait_for(lambda name=name, started=started: d.of_type(started, name), what="it does not begin")
        d.hold(name, boottime() - 1)
    frozen = boottime()
    wait_for(lambda: boottime() > frozen + 5)
    (d.state_of("once") / "go").touch()
    for name in ("slow", "once"):
        d.hold(name, boottime() + LONG)
    wait_for(lambda: d.handled(id_), what="they are not waited for")
    assert d.of_type("plugin.crashed", "slow") == []
    assert [r["data"]["cause"] for r in d.of_type("exec.ended", "once")][-1] == "exit"
    d.cli("plugin", "remove", "slow", "--yes")
    d.cli("plugin", "remove", "once", "--yes")


@pytest.mark.wide
def test_frozen_plugin_ends_with_the_daemon(pretend: PretendInternet, tmp_path: Path) -> None:
    with held(pretend, tmp_path) as d:
        d.freeze("busy")
        group = d.groups("busy")
        d.stop()
        assert not group.exists()
        d.start()
        up(d)
        d.freeze("busy")
        group = d.groups("busy")
        d.kill()
        wait_for(lambda: not group.exists() or "populated 0" in (group / "cgroup.events").read_text())


def test_plugin_of_a_supervisor_that_freezes_nothing_goes_on(d: Held) -> None:
    up(d)
    d.without.touch()
    try:
        d.hold("busy", boottime() - 1)
        wait_for(lambda: d.show("busy").get("lease"), what="its deadline passes unnoticed")
        used = d.used("busy")
        wait_for(lambda: d.used("busy") != used, what="the attack is no attack")
    finally:
        d.without.unlink()
