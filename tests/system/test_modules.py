"""Modules of each process of a daemon: nothing that is not turned on is loaded, nor what no plugin needs yet."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import children
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, wait_for, write_plugin

BROKER = "isolator.broker.service"
LIST = signal.SIGRTMIN + 3
HOOK = f"""
import json, os, signal, sys
def tell(*_):
    os.write(2, b"modules " + json.dumps([sys.argv[0], sorted(sys.modules)]).encode() + b"\\n")
signal.signal({int(LIST)}, tell)
"""
SUPERVISOR = """
sys.executable = os.environ["PYTHON_OF_SERVICES"]
from host.cli.main import main
sys.exit(main())
"""
SERVICE = """
import runpy
at = sys.argv.index("-m") if "-m" in sys.argv else 0
if not at:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])  # the launcher: tests/launcher/test_standard_library.py
sys.argv[:] = sys.argv[at + 1 :]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
NOWHERE = (
    # Not turned on: console, several hosts, MCP, encrypted or signed things, HTTP.
    "starlette", "uvicorn", "jinja2", "h11", "anyio", "nats", "host.console", "host.cluster", "host.membership",
    "host.mcp", "host.channel.http", "isolator.supervisor.console_link", "ssl", "_ssl", "cryptography",
    "securesystemslib", "http", "email",
    # What only commands use, and what is needed for no value that is ever written.
    "click", "rich", "psutil", "tomlkit", "pydantic", "pydantic_core.core_schema", "host.authoring", "decimal", "uuid",
    "fractions",
)  # fmt: skip
SUPERVISOR_ONLY = (
    # Of the check of the host, of cages, and of what somebody registers.
    "pyseccomp",
    "_hashlib",
    "shutil",
    "tempfile",
)
LIBRARIES = ("libnftables", "libseccomp", "libcrypto")


class Listing(Daemon):
    """Its processes write their modules into the log at a signal."""

    def command(self) -> list[str]:
        return [f"{self.root}/python", f"{self.root}/supervisor.py", "--root", str(self.root), "serve"]

    def start(self, timeout: float = seconds(30)) -> None:
        python = Path(shutil.which("isolator") or "").with_name("python3")
        for name, body in (("supervisor", SUPERVISOR), ("service", SERVICE)):
            (self.root / f"{name}.py").write_text(HOOK + body)
        for name, arguments in (("python", '-I "$@"'), ("services", f'-I {self.root}/service.py "$@"')):
            program = self.root / name
            program.write_text(f"#!/bin/sh\nPYTHON_OF_SERVICES={self.root}/services exec {python} {arguments}\n")
            program.chmod(0o755)
        super().start(timeout)

    def modules(self, pid: int) -> list[str]:
        """What that process has imported."""
        size = self.log.stat().st_size
        os.kill(pid, LIST)

        def told() -> str:
            lines = self.log.read_bytes()[size:].decode().splitlines(keepends=True)
            return next((line for line in lines if line.startswith("modules ") and line.endswith("\n")), "")

        line: str = wait_for(told, what=self.log.read_text)
        found: list[str] = json.loads(line.removeprefix("modules "))[1]
        return found


@pytest.fixture(scope="module")
def listing() -> Iterator[Listing]:
    """One that has been started before: the first start compiles filters, which later ones find."""
    with daemon(start=False, kind=Listing) as made:
        assert isinstance(made, Listing)
        made.start()
        made.stop()
        made.start()
        yield made


def among(found: list[str], names: tuple[str, ...]) -> list[str]:
    return [one for one in found if any(one == name or one.startswith(f"{name}.") for name in names)]


@pytest.mark.parametrize("service", ["isolator.audit.service", "host.service"])
def test_services_of_a_plain_daemon_have_nothing_that_is_not_turned_on(listing: Listing, service: str) -> None:
    found = listing.modules(listing.service_pid(service))
    of_its_own = {"cryptography"} if service == "isolator.audit.service" else set()  # it signs seals
    assert service in found and not among(found, tuple(name for name in NOWHERE if name not in of_its_own))


def test_supervisor_without_plugins_has_nothing_that_only_cages_need(listing: Listing) -> None:
    assert listing.process is not None
    found = listing.modules(listing.process.pid)
    assert "isolator.supervisor.supervisor" in found and not among(found, NOWHERE + SUPERVISOR_ONLY)
    mapped = Path(f"/proc/{listing.process.pid}/maps").read_text()
    assert not [library for library in LIBRARIES if library in mapped]


def test_broker_and_launcher_start_with_the_first_plugin_that_may(listing: Listing, tmp_path: Path) -> None:
    def broker() -> int:
        return listing.service_pid(BROKER, missing_ok=True)

    assert (_launchers(listing), broker()) == (0, 0)
    assert {one["name"] for one in listing.json("status")["services"]} == {"supervisor", "audit", "host"}
    listing.cli("plugin", "add", str(write_plugin(tmp_path / "echo")), "--yes")
    wait_for(lambda: (_launchers(listing), bool(broker())) == (2, True))  # the launcher, and its copy that is parked
    listing.cli("event", "emit", "deploy.completed", event(1), "--wait")
    found = listing.modules(broker())
    assert BROKER in found and not among(found, NOWHERE)


HANDS_OVER_FORMAT_3 = """
import sys
from isolator.supervisor.reload import trial
async def try_out(*_): return 3
trial.try_out = try_out
from host.cli.main import main
sys.exit(main())
"""


class Older(Daemon):
    """A daemon that is reloaded into one that goes on with launcher and broker only."""

    def command(self) -> list[str]:
        return [sys.executable, "-I", "-c", HANDS_OVER_FORMAT_3, "--root", str(self.root), "serve"]


def test_reload_without_a_plugin_hands_an_earlier_version_what_it_goes_on_with() -> None:
    with daemon(kind=Older) as running:
        running.cli("reload")
        services = {one["name"]: one["up"] for one in running.json("status")["services"]}
        assert services == dict.fromkeys(("supervisor", "audit", "broker", "host"), True)
        assert _launchers(running) == 0


def _launchers(running: Daemon) -> int:
    assert running.process is not None
    return len(children(running.process.pid, "isolator.launcher.server"))
