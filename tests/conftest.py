"""What every test gets: root, a directory that unprivileged children can read, and a check that nothing is left.

``--leaks=test`` looks after each test instead of once at the end, to find the one that leaks; ``--leaks=off`` is for a
run that leaves something on purpose, for the next one to find (``tests/vm/reboot_before.py``).

Tests may run in several processes (pytest-xdist, which ``./dev test`` uses for the whole suite): most of their time is
spent waiting. What is left on the host is then looked for once, by the process that started the others, when they
are gone; each of these looks for descriptors that it holds itself.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from hypothesis import HealthCheck, settings
from xdist.workermanage import NodeManager

from tests.support import commands
from tests.support.leaks import MARKER, HostState, RunLock, is_own, wait_until_clean
from tests.support.leftovers import ROOTS, new_root
from tests.support.timeouts import seconds

# A hung test fails by itself, with a traceback, and its clean-up runs. Read by pytest-timeout when it is configured.
os.environ.setdefault("PYTEST_TIMEOUT", str(seconds(300)))

# No example has a deadline: how long one takes is the machine's affair, which may be emulated.
settings.register_profile("isolator", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("isolator")

_PATIENCE = seconds(15)  # that the kernel and stopping daemons get at the end of the run

_CLEAN_UP = seconds(90)
"""Seconds that each process of a run that is ended gets for its clean-up."""
_clean = threading.Event()

_ON_DEMAND = {"test_mutations.py": "mutations", "test_chaos.py": "kills"}
"""Files of tests that run only with an option."""

_LEAKED = 10
"""Exit status of a run that left something; ``./dev test`` runs failed tests once more only after 1."""

_LOST = 11
"""Exit status of a run one of whose processes died: what it had still to do was not done."""

_run = pytest.StashKey["_Run"]()


class _Run:
    """One test run, or one worker of it: its marker, the host's state before it, and what it left."""

    def __init__(self, *, worker: bool) -> None:
        if not worker:
            os.environ[MARKER] = os.environ.get(MARKER, "") + uuid.uuid4().hex
        self.marker = os.environ[MARKER]
        self.folders: list[str] = []
        self.lock = None if worker or ROOTS in os.environ else RunLock()
        self.before = HostState.read(self.marker)
        self.leaks: list[str] = []
        self.doubtful: list[str] = []
        self.lost: list[str] = []

    def check(self) -> None:
        if self.lock is None:
            held = wait_until_clean(self.before, self.marker, _PATIENCE, kinds=frozenset({"descriptors"}))
            assert not held, f"this worker still holds: {held}"
            return
        alone = self.lock.alone()
        for kind, names in wait_until_clean(self.before, self.marker, _PATIENCE).items():
            for name in names:
                certain = alone or is_own(kind, name, self.folders)
                (self.leaks if certain else self.doubtful).append(f"{kind}: {name}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--leaks", choices=("run", "test", "off"), default="run", help="look for leaks after the run, after each test"
    )
    parser.addoption("--all", action="store_true", help="also run what is marked wide")
    parser.addoption("--kills", type=int, default=0, help="faults of tests/chaos, which does not run without")
    parser.addoption("--fuzz", type=float, default=0, help="seconds for each parser of tests/fuzz; 0: a few examples")
    parser.addoption("--faults", type=int, default=5, help="faults of tests/cluster/test_outages.py")
    parser.addoption("--kind", action="append", default=[], help="a kind of these, at the plugin's holder; repeatable")
    parser.addoption("--events", type=int, default=600, help="events of the same")
    parser.addoption("--minutes", type=float, default=600, help="time after which neither of both has a further fault")
    parser.addoption("--seed", type=int, default=None, help="seed of either")
    parser.addoption("--mutations", action="store_true", help="run tests in copies of the tree with a fault each")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    wide = [item for item in items if item.get_closest_marker("wide") is not None]
    if wide:
        config.hook.pytest_deselected(items=wide)
        items[:] = [item for item in items if item.get_closest_marker("wide") is None]


def _have_its_end_told(stderr: int) -> None:
    """Have a process of the tests that is ended at once by what it tests say where, on the stderr of the run.

    A thread of pytest-xdist's ends it ten seconds after it was interrupted, which a clean-up may well take.
    """
    end, here = os._exit, os.getpid()

    def told(status: int) -> NoReturn:
        if status and os.getpid() == here:
            if threading.current_thread() is not threading.main_thread():
                _clean.wait(_CLEAN_UP)
            faulthandler.dump_traceback(stderr)
        end(status)

    os._exit = told


def pytest_sessionstart(session: pytest.Session) -> None:
    _have_its_end_told(session.config.stash.get(fault_handler_stderr_fd_key, 2))


def pytest_configure(config: pytest.Config) -> None:
    if os.geteuid() != 0:
        # Skipping would look like passing: nearly every test makes users, cgroups or namespaces.
        pytest.exit("the tests make users, cgroups and namespaces: run 'sudo ./dev test'", returncode=1)
    if config.getoption("mutations") and config.args == config.getini("testpaths"):
        config.args[:] = ["tests/mutations"]
    os.umask(0o022)
    if config.getoption("all"):
        os.environ[commands.EXECUTE] = "1"
    # CI ends a run that takes too long with SIGTERM: the clean-up of fixtures has to happen then, too.
    # pytest-xdist sends its processes SIGINT then, which what a shell has started in the background would ignore.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    # What nohup(1) ignores is inherited, and a daemon heeds it: with a handler, what is executed has the default.
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    NodeManager.EXIT_TIMEOUT = int(_CLEAN_UP)
    config.stash[_run] = _Run(worker=hasattr(config, "workerinput"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what has a command of its own: it takes longer than everything else together."""
    option = _ON_DEMAND.get(collection_path.name)
    return True if option is not None and not config.getoption(option) else None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash[_run]
    commands.end()
    if session.config.getoption("--leaks") != "off":
        run.check()
    if run.leaks:
        session.exitstatus = _LEAKED
    if run.lost:
        session.exitstatus = _LOST


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object | None) -> None:
    """Remember a test process that died: with ``--max-worker-restart 0`` nobody takes over what it had to do."""
    if error:
        node.config.stash[_run].lost.append(f"{node.gateway.id}: {error}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash[_run]
    if run.lost:
        terminalreporter.section("LOST: the run failed because a process of it died; not every test was run", red=True)
        for line in run.lost:
            terminalreporter.line(line)
    if run.leaks:
        terminalreporter.section("LEAKS: the run failed because it left these behind", red=True)
        for line in run.leaks:
            terminalreporter.line(line)
    if run.doubtful:
        terminalreporter.section("new on this host, perhaps made by another test run at the same time", yellow=True)
        for line in run.doubtful:
            terminalreporter.line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    _clean.set()
    if _run in config.stash and (lock := config.stash[_run].lock) is not None:
        lock.close()


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``--leaks=test``: fail the test that leaves something behind."""
    if request.config.getoption("--leaks") != "test":
        yield
        return
    marker = request.config.stash[_run].marker
    before = HostState.read(marker)
    yield
    commands.end()
    left = wait_until_clean(before, marker, _PATIENCE)
    assert not left, f"left behind: {left}"


@pytest.fixture
def shared_dir(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A fresh root-owned 0755 directory; unlike ``tmp_path`` other users can reach it. A place for ``--root``.

    What is still mounted below it at the end is a leak: it is unmounted, so that nothing is deleted through it,
    and the test fails.
    """
    path = new_root("test")
    request.config.stash[_run].folders.append(str(path))
    yield path
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {path}/" in line]
    for target in reversed(mounted):
        subprocess.run(["umount", "-l", target], check=True)
    shutil.rmtree(path)
    assert not mounted, f"still mounted at the end of the test: {mounted}"
