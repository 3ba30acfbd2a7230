"""Options of ``./dev test tests/compat``; a run that does not name this folder gets ``test_core.py`` alone."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compat import table
from tests.compat.layer import Layer, layer, prepare
from tests.compat.program import Result
from tests.compat.rows import ORDER, packages
from tests.support.leftovers import new_root

_seen = pytest.StashKey[list[Result]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-table", type=Path, metavar="FILE", help="compat: run the other sandboxes too, and write the page"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what needs packages unless it is wanted by name."""
    wanted = any("compat" in argument for argument in config.args)
    return None if wanted or collection_path.name in {"compat", "test_core.py"} else True


@pytest.fixture(scope="session")
def everything(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--all", default=False))


@pytest.fixture(scope="session")
def compared(request: pytest.FixtureRequest) -> bool:
    """Whether the other sandboxes are run, too."""
    return request.config.getoption("--write-table", default=None) is not None


@pytest.fixture(scope="session")
def installed(everything: bool) -> Iterator[Layer]:
    """The host with all packages of the table."""
    with layer(packages(everything=everything)) as made:
        yield made


def pytest_collection_finish(session: pytest.Session) -> None:
    """Install the packages before the first test, whose time is limited."""
    if any("installed" in getattr(item, "fixturenames", ()) for item in session.items):
        prepare(packages(everything=session.config.getoption("--all", default=False)))


@pytest.fixture(scope="session")
def root() -> Iterator[Path]:
    """One ``--root`` for all rows: what is compiled for a cage is kept in it."""
    path = new_root("test")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def shown() -> Iterator[Path]:
    """A folder that cages may read and servers, too: the authority's certificate, and a key for ssh."""
    folder = Path(f"/srv/isolator-shown-{os.getpid()}")
    folder.mkdir(mode=0o755)
    try:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        (folder / "key").chmod(0o644)
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Iterator[list[Result]]:
    """Rows for the table, filled by a test; they reach the process that writes it also from another one."""
    rows: list[Result] = []
    yield rows
    request.node.user_properties += [("row", dataclasses.asdict(row)) for row in rows]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_seen] = []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--write-table", default=None)
    if file is not None and not hasattr(session.config, "workerinput"):
        table.write(session.config.stash[_seen], file, ORDER)


class _Collector:
    def __init__(self, rows: list[Result]) -> None:
        self._rows = rows

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            for name, value in report.user_properties:
                if name == "row" and isinstance(value, dict):
                    self._rows.append(Result(**value))


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(_Collector(session.config.stash[_seen]), "compat-rows")
