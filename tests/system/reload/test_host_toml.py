"""``host.toml`` over a reload: its settings are in force afterwards, for the plugins they concern and no others."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from host.client.client import Client
from tests.support.timeouts import seconds
from tests.system.daemon import EVENT, Daemon, daemon, wait_for, write_plugin
from tests.system.reload.faulty import FaultyDaemon
from tests.system.reload.test_reload import STATE, running

BEFORE = """
[roles]
viewer = [65533]
[metrics]
port = 9464
[ceiling]
memory = "1G"
"""
AFTER = """
[roles]
viewer = [65534]
runner = [65534]
[metrics]
port = 9465
[ceiling]
memory = "260M"
"""


def listens(d: Daemon, port: int) -> bool:
    """Whether somebody in the daemon's network namespace listens on this port of 127.0.0.1."""
    assert d.process is not None
    return f" 0100007F:{port:04X} 00000000:0000 0A " in Path(f"/proc/{d.process.pid}/net/tcp").read_text()


def memory_of_large(d: Daemon) -> int:
    """The cap that is in force, in bytes."""
    return int(d.json("plugin", "show", "large")["effective"]["resources"]["memory"])


def may_look(d: Daemon, uid: int) -> bool:
    """Whether a user is served as a viewer."""
    program = "import sys; from host.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-I", "-c", program, "--root", str(d.root), "status"]
    done = subprocess.run(command, user=uid, group=uid, extra_groups=[], capture_output=True, check=False, cwd="/")
    return done.returncode != 4


def test_reload_puts_host_toml_in_force_and_stops_nobody(shared_dir: Path) -> None:
    with daemon(host_toml=BEFORE) as d:
        large = {**STATE, "resources": {"memory": "300M"}}
        for name, sandbox in (("large", large), ("small", STATE)):
            d.cli("plugin", "add", str(write_plugin(shared_dir / name, sandbox=sandbox)), "--yes")
            if name == "large":
                policy = d.root / "etc/isolator/policies/large.toml"
                policy.write_text(policy.read_text().replace('memory = "256M"', 'memory = "300M"', 1))
            # The new policy may end a start that is under way.
            wait_for(lambda name=name: d.cli("plugin", "start", name, code=None).returncode == 0)
        wait_for(lambda: memory_of_large(d) == 300 << 20, what="the edited policy")
        wait_for(lambda: set(running(d)) == {"large", "small"})
        before = running(d)
        assert listens(d, 9464) and not listens(d, 9465)
        assert may_look(d, 65533) and not may_look(d, 65534)
        (d.root / "etc/isolator/host.toml").write_text(AFTER)
        began = time.time()
        d.cli("reload")
        assert d.json("status", code=None)["started_at"] < began, "it is the daemon's start, and not the reload"
        wait_for(lambda: listens(d, 9465) and not listens(d, 9464), what="the port of the metrics")
        wait_for(lambda: may_look(d, 65534) and not may_look(d, 65533), what="the roles")
        assert running(d) == before
        large_one = wait_for(lambda: (shown := d.json("plugin", "show", "large"))["error"] and shown, what="the error")
        assert "300M is over the ceiling, 260M" in large_one["error"]
        assert large_one["error"].endswith("the last good policy stays in force")
        assert memory_of_large(d) == 300 << 20
        assert not d.json("plugin", "show", "small")["error"]
        d.cli("plugin", "restart", "large", code=None)
        assert "over the ceiling" in d.json("plugin", "show", "large")["error"]


@contextlib.contextmanager
def emitting(d: Daemon) -> Iterator[None]:
    """One event after the other, without a pause that anybody would notice."""
    stop, faults = threading.Event(), list[Exception]()

    def emit() -> None:
        try:
            with Client(d.root, timeout=seconds(60)) as client:
                while not stop.wait(0.002):
                    client.call("event.emit", name="deploy.completed", payload=EVENT)
        except Exception as error:  # for the test
            faults.append(error)

    thread = threading.Thread(target=emit)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not faults


def test_no_plugin_is_begun_anew_while_a_reload_starts_the_console_or_ends_it(shared_dir: Path) -> None:
    """The host is served meanwhile, and asks for connections to plugins that run."""
    with daemon() as d:
        d.cli("plugin", "add", str(write_plugin(shared_dir / "echo", sandbox=STATE)), "--yes")
        d.cli("plugin", "start", "echo")
        before = running(d)
        (d.root / "etc/isolator").mkdir(exist_ok=True)
        with emitting(d):
            for settings in ("[console]\nport = 8090\n", ""):
                (d.root / "etc/isolator/host.toml").write_text(settings)
                d.cli("reload")
                wait_for(lambda settings=settings: listens(d, 8090) == bool(settings), what="the console")
                assert running(d) == before
        assert [one["type"] for one in d.records() if one["plugin"] == "echo"].count("plugin.started") == 1


def test_host_toml_that_is_being_written_after_its_trial_ends_nothing(shared_dir: Path) -> None:
    """It would end the daemon, and with it every plugin: what was tried is in force until the next reload."""
    with daemon(kind=FaultyDaemon) as made:
        d = cast(FaultyDaemon, made)
        d.cli("plugin", "add", str(write_plugin(shared_dir / "small", sandbox=STATE)), "--yes")
        d.cli("plugin", "start", "small")
        before, host_toml = running(d), d.root / "etc/isolator/host.toml"
        host_toml.parent.mkdir(parents=True, exist_ok=True)
        host_toml.write_text("[roles]\nviewer = [65534]\n")
        d.at_exec("spoil")
        d.cli("reload")
        assert running(d) == before
        assert may_look(d, 65534)
        assert f"{host_toml} has changed; it takes effect with 'isolator reload'" in d.log.read_text()
        assert "host.toml" in d.cli("reload", code=1).stderr
        host_toml.write_text("[roles]\nviewer = [65533]\n")
        d.cli("reload")
        assert may_look(d, 65533) and not may_look(d, 65534)
        assert running(d) == before
