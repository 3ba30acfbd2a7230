"""Start of ``isolator run``: what it imports, what it starts, and that both readers of its command line agree.

Its time is measured by ``./dev bench run_start``; here is noticed what would make it another kind of program.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from host.cli.main import read_serve
from isolator.cli.run import run as command
from isolator.cli.serve import serve
from isolator.standalone.options import OPTIONS, read_plainly
from tests.support.cage_fixture import isolator
from tests.support.processes import children
from tests.support.timeouts import seconds

PROGRAM = Path(sys.executable).with_name("isolator")
MAIN = "from host.cli.main import main; main()"
HEAVY = {
    "click", "pydantic", "pydantic_core", "pyroute2", "cryptography", "psutil", "rich",  # packages
    "_ssl", "email", "importlib.metadata", "logging", "platform", "secrets", "string", "subprocess", "tomllib",
    "traceback", "urllib.parse", "uuid",  # Python's own
    "pyseccomp", "isolator.layers.seccomp.profiles", "isolator.layers.seccomp.bpf",  # the filter is kept compiled
    "isolator.audit.schema", "isolator.audit.client", "isolator.ipc.channel", "isolator.ipc.messages",
    "isolator.policy.request", "isolator.volume.volume", "isolator.cli.run", "host.cli.root",
}  # fmt: skip


def test_command_imports_nothing_that_takes_long(shared_dir: Path) -> None:
    assert isolator(shared_dir, "run", "--", "true").returncode == 0  # compiles the filter
    words = [sys.executable, "-I", "-X", "importtime", "-c", MAIN, "--root", str(shared_dir), "run", "--", "true"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=seconds(60))
    imported = set(re.findall(r"^import time: .* ([\w.]+)$", done.stderr, re.MULTILINE))
    assert {"asyncio", "isolator.cage.cage"} <= imported
    assert imported & HEAVY == set()


def test_command_starts_no_program_but_its_own(shared_dir: Path) -> None:
    assert isolator(shared_dir, "run", "--", "true").returncode == 0
    words = ["strace", "-f", "-qq", "-e", "trace=execve", "-e", "signal=none", "-z"]
    words += [sys.executable, "-I", "-c", MAIN, "--root", str(shared_dir), "run", "--", "/usr/bin/true"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=seconds(60))
    assert re.findall(r'execve\("([^"]+)', done.stderr) == [sys.executable, "/usr/bin/true"]


def test_program_leaves_site_to_the_lines_that_need_it(shared_dir: Path) -> None:
    for line, wanted in ((["run", "--", "true"], False), (["--version"], True)):
        # Its first line's words, and after them what shows the imports.
        words = [*PROGRAM.read_text().splitlines()[0].removeprefix("#!").split(), "-X", "importtime", str(PROGRAM)]
        done = subprocess.run(
            [*words, "--root", str(shared_dir), *line], capture_output=True, text=True, check=True, timeout=seconds(60)
        )
        assert bool(re.search(r"\| *site$", done.stderr, re.MULTILINE)) == wanted
        assert not wanted or done.stdout.startswith("isolator")


FAILED_BEFORE_ASYNCIO = """
import gc, os, sys
from pathlib import Path
from isolator.paths import Paths
from isolator.standalone.beginning import Beginning
from isolator.standalone.launcher import fork_launcher

gc.disable()
paths = Paths.of(sys.argv[1])
launcher = fork_launcher()
try:
    with Beginning(paths, launcher) as beginning:
        print(len(beginning.subtree.folders()))
        raise LookupError
except LookupError:
    launcher.close()
print(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split(), os.listdir(paths.run))
print(sum(folder.exists() for folder in beginning.subtree.folders()), len(os.listdir("/proc/self/fd")))
"""


def test_command_that_fails_before_its_session_leaves_nothing(shared_dir: Path) -> None:
    words = [sys.executable, "-I", "-c", FAILED_BEFORE_ASYNCIO, str(shared_dir)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=seconds(60))
    made, left, folders = done.stdout.splitlines()
    assert int(made) >= 1
    assert left == "[] []", "no child, dead or alive, and no journal"
    assert folders == "0 4", "no control group; the standard streams and the listing's own descriptor"


def test_processes_of_a_cage_hold_nothing_of_the_caller(shared_dir: Path) -> None:
    # The launcher and pid 1 are forks of a process that was called with these.
    words = [sys.executable, "-I", "-c", MAIN, "--root", str(shared_dir), "run", "--env", "WORD=argument-of-caller"]
    process = subprocess.Popen(
        [*words, "--", "sh", "-c", "echo up; read line"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OF_CALLER": "value-of-caller"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "up\n"
    try:
        below = children(process.pid)
        assert len(below) == 2
        assert "libcrypto" not in Path(f"/proc/{process.pid}/maps").read_text()
        for pid in below:
            assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"isolator-launcher\0")
            assert b"caller" not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert b"caller" not in Path(f"/proc/{pid}/environ").read_bytes()
            assert b"value-of-caller" not in _stack(pid)
    finally:
        process.communicate("\n", timeout=seconds(30))
    assert process.returncode == 0


def _stack(pid: int) -> bytes:
    """The stack of a process, on which its arguments and environment begin."""
    line = next(line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if line.endswith("[stack]"))
    begin, end = (int(part, 16) for part in line.split()[0].split("-"))
    with Path(f"/proc/{pid}/mem").open("rb") as memory:
        memory.seek(begin)
        return memory.read(end - begin)


IN_ORDER = [
    ["true"],
    ["--", "sh", "-c", "x", "--", "-y"],
    ["--memory", "1M", "--cpu=20%", "--tasks", "3", "--nofile=9", "sh", "--help"],
    ["--read", "/a", "--read=/b", "--write", "/c", "--egress", "a:1", "--egress", "b:2", "--env", "A=b=c", "--", "x"],
    ["-t", "--json", "--audit", "f", "--env-file", "e", "--env-file", "g", "--cwd", "/", "--tmp", "4M", "x", "-t"],
    ["--tty", "--net", "none", "--policy", "--json", "-"],
    ["--env=", "--", "--"],
]
WITH_MISTAKES = [
    [], ["--"], ["--help"], ["--memory"], ["--no-such", "x"], ["--mem", "1M", "x"], ["--tasks", "many", "x"],
    ["--tasks", "-1", "x"], ["--net", "all", "x"], ["--json=1", "x"], ["-x", "y"], ["-tt", "x"], ["--tty=1", "x"],
]  # fmt: skip


@pytest.mark.parametrize("words", IN_ORDER, ids=" ".join)
def test_line_in_order_is_read_as_click_reads_it(words: list[str]) -> None:
    plain = read_plainly(["run", *words])
    assert plain is not None
    found: dict[str, Any] = command.make_context("run", list(words)).params
    assert {name: getattr(plain, name) for name in found} == found
    assert set(found) == {option.field for option in OPTIONS} | {"command"}


@pytest.mark.parametrize("words", WITH_MISTAKES, ids=" ".join)
def test_line_with_a_mistake_is_left_to_click(words: list[str]) -> None:
    assert read_plainly(["run", *words]) is None


@pytest.mark.parametrize("words", [[], ["--config", "f", "--certifying"], ["--check-handover", "7", "--config", "-"]])
def test_line_of_serve_is_read_as_click_reads_it(words: list[str]) -> None:
    plain = read_serve(["--root", "/r", "serve", *words])
    assert plain is not None and plain.pop("root") == "/r"
    found: dict[str, Any] = serve.make_context("serve", list(words)).params
    assert {name: value for name, value in found.items() if value not in (None, False)} == plain


@pytest.mark.parametrize(
    "line", ["serve --help", "serve --config", "serve --adopt x", "serve --config=f", "--root=/r serve", "run", ""]
)
def test_other_lines_of_the_daemon_are_left_to_click(line: str) -> None:
    assert read_serve(line.split()) is None


def test_only_lines_of_run_are_read_plainly() -> None:
    plain = read_plainly(["--root", "/r", "run", "x"])
    assert plain is not None
    assert plain.root == "/r"
    assert plain.command == ("x",)
    for line in ([], ["run"], ["check"], ["--debug", "run", "x"], ["--root"], ["--root", "/r"], ["--root=/r", "check"]):
        assert read_plainly(line) is None
    assert isinstance(command, click.Command)
