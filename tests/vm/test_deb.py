"""The Debian package on a host with systemd: a plugin runs through its upgrade, and a purge leaves nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.packaging.package import NEWER, build, run
from tests.support.timeouts import seconds
from tests.system.daemon import event, wait_for
from tests.vm.service import needs_machine, slow_plugin

pytestmark = [pytest.mark.vm, pytest.mark.wide, needs_machine]


def isolator(*words: str) -> str:
    return run("/usr/bin/isolator", *words)


def both(*command: str) -> str:
    """Output and errors of a command that has to succeed."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=seconds(300), check=True)
    return result.stdout + result.stderr


def pid_of(plugin: str) -> int:
    return int(json.loads(isolator("plugin", "show", plugin, "--json"))["pid"])


def version_that_answers() -> str | None:
    """The version of the host process; None while none answers. ``status`` has an exit code of its own."""
    command = ["/usr/bin/isolator", "status", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=seconds(60), check=False)
    return str(json.loads(result.stdout)["version"]) if result.stdout else None


def test_deb_is_installed_upgraded_removed_and_purged(tmp_path: Path) -> None:
    package, newer = build(tmp_path)
    if Path("/etc/systemd/system/isolator.service").exists():  # of the tests of 'isolator install'
        command = ["dpkg", "-i", str(package)]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=seconds(60), check=False)
        assert refused.returncode != 0 and "run 'sudo isolator uninstall' first" in refused.stderr
        run("isolator", "uninstall", "--purge", "--yes")
    run("apt-get", "install", "-y", str(package))
    try:
        assert run("systemctl", "is-active", "isolator").strip() == "active"
        assert run("systemctl", "is-enabled", "isolator").strip() == "enabled"
        # An image for servers may be set up to leave manual pages out.
        assert "/usr/share/man/man1/isolator-plugin-add.1.gz" in run("dpkg", "-L", "isolator").splitlines()
        isolator("plugin", "add", str(slow_plugin(tmp_path / "echo")), "--yes")
        isolator("event", "emit", "deploy.completed", event("before"), "--wait")
        before, daemon = pid_of("echo"), run("systemctl", "show", "-P", "MainPID", "isolator")
        printed = both("dpkg", "-i", str(newer))
        journal = both("journalctl", "-u", "isolator", "-n", "60", "--no-pager")
        assert "runs on" not in printed, (printed, journal)
        # Its host process, which answers, is exchanged after the supervisor.
        wait_for(lambda: version_that_answers() == NEWER, seconds(120), f"{printed}\n{journal}")
        assert (pid_of("echo"), run("systemctl", "show", "-P", "MainPID", "isolator")) == (before, daemon)
        isolator("event", "emit", "deploy.completed", event("after"), "--wait")
        run("dpkg", "-r", "isolator")
        assert not Path("/usr/lib/isolator").exists()
        assert Path("/var/lib/isolator/plugins/echo/plugin.state").exists()
        run("dpkg", "-i", str(newer))
        isolator("event", "emit", "deploy.completed", event("again"), "--wait")
    finally:
        run("dpkg", "-P", "isolator")
    for left in ("/etc/isolator", "/var/lib/isolator", "/var/log/isolator", "/run/isolator", "/usr/lib/isolator"):
        assert not Path(left).exists(), left
    users = Path("/etc/passwd").read_text()
    assert "isolator-host" not in users and "plugin-echo" not in users
    run("isolator", "install")
    assert run("systemctl", "is-active", "isolator").strip() == "active"
    run("isolator", "uninstall", "--purge", "--yes")
