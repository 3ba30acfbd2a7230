"""Home of the service's code: a root-owned environment that nothing but ``isolator install`` changes.

A copy of a clone (what ``./dev exec`` runs from) is replaced with every change of the clone, and pip writes over a
virtual environment, while a daemon imports late: the code of its own reload, say. So the code and the runtime
dependencies are copied into ``/opt/isolator/env.XXXXXX``, and the symbolic link ``/opt/isolator/current`` is switched
to it in one step. A running daemon keeps seeing the environment that it was started from (its interpreter is named by
the real path), and the old ones are removed after the service runs from the new one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.util import cache_from_source
from pathlib import Path

from isolator.errors import IsolatorError

BASE = Path("/opt/isolator")
CURRENT = BASE / "current"

_CODE = Path(__file__).parents[2]  # site-packages, or the top of a clone's copy
_SHARED = "share/isolator"
_PACKAGES = ("isolator", "host", "clients/python/isolator_client")
"""The project's own packages, as they lie in a clone; a wheel of each is installed by pip."""
_OWN = frozenset({"isolator-client"})
"""Distributions among the requirements that are such a package: no index is asked for them."""
_EXTRAS = ("http", "console", "cluster")
"""Extras of pyproject.toml that go along: nothing of them is imported until an operator turns it on."""


def shipped(name: str) -> Path:
    """A file that comes with the package (``policies/host.toml``), installed or in a clone. Raises IsolatorError."""
    for folder in (Path(sys.prefix) / _SHARED, _CODE):
        if (folder / name).exists():
            return folder / name
    raise IsolatorError(f"{name}", "it is not part of this installation", "install the package again")


def program() -> Path:
    """The ``isolator`` command that the unit names, which ``make_stable`` makes."""
    return CURRENT / "bin/isolator"


def make_stable() -> None:
    """Make the environment of ``program()``, unless we run from one that was made so.

    Raises IsolatorError when somebody other than root could change what root would run.
    """
    if _is_installed():
        check_owned_by_root(_CODE)
    if Path(sys.prefix).parent != BASE or not Path(sys.prefix).name.startswith("env."):
        _make_environment()
    check_owned_by_root(program().resolve())


def _is_installed() -> bool:
    return _CODE.name == "site-packages"


def check_owned_by_root(path: Path) -> None:
    """Refuse a path that another user could change, or that unprivileged users could not reach."""
    for part in (path, *path.parents):
        found = part.lstat()
        if found.st_uid != 0 or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
            why = f"{part} can be written by somebody other than root, and root would run it"
            remedy = "install into a virtual environment of root's: sudo python3 -m venv /opt/isolator"
            raise IsolatorError(f"{path}", why, remedy)
        if stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o001:
            remedy = "install into a virtual environment outside any home: sudo python3 -m venv /opt/isolator"
            raise IsolatorError(f"{path}", f"the daemon's unprivileged processes cannot enter {part}", remedy)


def remove_old() -> None:
    """Delete every environment but the current one, and those that a process was started from: it imports late."""
    current = CURRENT.resolve()
    for path in BASE.glob("env.*"):
        if path != current and not _in_use(path):
            shutil.rmtree(path)


def _in_use(environment: Path) -> bool:
    """Whether a process names a file of the environment on its command line, as each of the daemon's does."""
    name = os.fsencode(environment) + b"/"
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if name in place.read_bytes():
                return True
    return False


def remove_all() -> list[Path]:
    """Delete the environments that ``install`` made, and return them; one of the operator's own stays."""
    if not CURRENT.is_symlink():
        return []
    CURRENT.unlink()
    made = list(BASE.glob("env.*"))
    for path in made:
        shutil.rmtree(path)
    if not any(BASE.iterdir()):
        BASE.rmdir()
    return made


def _make_environment() -> None:
    BASE.mkdir(parents=True, exist_ok=True)
    BASE.chmod(0o755)
    new = Path(tempfile.mkdtemp(prefix="env.", dir=BASE))
    try:
        fill(new)
        packages = write_program(new, new)
        compile_all(packages)
    except BaseException:
        shutil.rmtree(new)
        raise
    link = BASE / f".current.{os.getpid()}"
    link.symlink_to(new.name)
    link.rename(CURRENT)


def compile_all(packages: Path) -> None:
    """Write the bytecode of every module; the unprivileged processes cannot, and would compile it at each start.

    In a process of its own: since Python 3.13 the workers of ``compileall`` import the program that started them.
    """
    command = [sys.executable, "-I", "-m", "compileall", "-qq", "-j", "0", str(packages)]
    subprocess.run(command, check=False, stdin=subprocess.DEVNULL)  # a file of a dependency may be no Python: its own


_PROGRAM = """#!{place}/bin/python3 -IS
import sys

sys.path.append("{packages}")
from host.cli.main import main

sys.exit(main())
"""
"""The command: ``isolator run`` needs nothing else of ``site``, which ``host.cli.main`` calls for every other line."""


def _packages(environment: Path) -> Path:
    return environment / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


def fill(new: Path, python: str = "python3") -> None:
    """Copy our code, and every distribution that it needs, to a folder; ``python``: its interpreter."""
    new.chmod(0o755)
    packages = _packages(new)
    packages.mkdir(parents=True)
    (new / "bin").mkdir()
    (new / "bin/python3").symlink_to(Path(sys.base_prefix) / "bin" / python)
    (new / "pyvenv.cfg").write_text(f"home = {sys.base_prefix}/bin\ninclude-system-site-packages = false\n")
    for package in _PACKAGES:
        name = Path(package).name
        shutil.copytree(_CODE / (name if _is_installed() else package), packages / name)
    shutil.copytree(shipped("policies"), new / _SHARED / "policies")
    for name in _closure(_requirements()):
        _copy_distribution(name, packages)
    for path in (new, *new.rglob("*")):
        if not path.is_symlink():
            os.chown(path, 0, 0)
            path.chmod((path.stat().st_mode | (0o555 if path.is_dir() else 0o444)) & ~0o7022)


def write_program(environment: Path, place: Path) -> Path:
    """Write the command of an environment that will be at ``place``; returns the folder of its packages."""
    script, packages = environment / "bin/isolator", _packages(environment)
    script.write_text(_PROGRAM.format(place=place, packages=place / packages.relative_to(environment)))
    script.chmod(0o755)
    return packages


def _requirements() -> list[str]:
    """Requirements to come along; one of a wheel's extra, whose marker is cut to ``;``, only if it is installed."""
    if _is_installed():
        found = (one.partition("extra ==") for one in metadata.requires("isolator") or ())
        return [one.partition(";")[0] + ";" * bool(mark) for one, mark, extra in found if "dev" not in extra]
    project = tomllib.loads((_CODE / "pyproject.toml").read_text())["project"]
    extras = [requirement for extra in _EXTRAS for requirement in project["optional-dependencies"][extra]]
    return [str(requirement) for requirement in (*project["dependencies"], *extras)]


def _closure(requirements: Iterable[str]) -> set[str]:
    """The installed distributions that the requirements need, theirs included; extras are nobody's need here."""
    wanted: set[str] = set()
    left = [(requirement, ";" not in requirement) for requirement in requirements]
    while left:
        requirement, mandatory = left.pop()
        found = re.match(r"[A-Za-z0-9._-]+", requirement)
        if found is None or "extra ==" in requirement:
            continue
        name = re.sub(r"[-_.]+", "-", found[0]).lower()
        if name in wanted | _OWN:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if mandatory:
                raise IsolatorError(name, "a dependency is not installed here", "run 'sudo ./dev setup'") from None
            continue  # for another platform or Python, says a marker
        wanted.add(name)
        left += [(inner, ";" not in inner) for inner in distribution.requires or ()]
    return wanted


def _copy_distribution(name: str, packages: Path) -> None:
    """Copy one distribution's files, with their times, by which their bytecode stays valid.

    What it put outside site-packages (scripts) is not needed.
    """
    for source, relative in _files(metadata.distribution(name)):
        target = packages / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
        compiled = Path(cache_from_source(str(source)))
        if source.suffix == ".py" and compiled.exists():
            (target.parent / "__pycache__").mkdir(exist_ok=True)
            shutil.copy2(compiled, target.parent / "__pycache__")


def _files(distribution: metadata.Distribution) -> Iterator[tuple[Path, Path]]:
    """(file, its path below site-packages) of one distribution."""
    if distribution.read_text("RECORD") is not None:
        for file in distribution.files or ():
            source = Path(str(distribution.locate_file(file)))
            if ".." not in file.parts and file.suffix != ".pyc" and source.exists():
                yield source, Path(file)
        return
    # Installed by setup.py (python-prctl, by an old pip): there is no list, but the names of its modules.
    folder = Path(str(distribution.locate_file("")))
    for module in (distribution.read_text("top_level.txt") or "").split():
        for found in (*folder.glob(f"{module}.py"), *folder.glob(f"{module}.*.so"), *folder.glob(f"{module}/**/*")):
            if found.is_file() and found.suffix != ".pyc":
                yield found, found.relative_to(folder)
