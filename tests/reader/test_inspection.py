"""Faults of a plugin's folder are found before its first event, by a process that can do nothing else."""

from __future__ import annotations

import compileall
import os
import py_compile
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from isolator.linux.unprivileged import service_command
from isolator.policy.host import HostConfig
from isolator.reader.inspection import Host
from isolator.reader.libraries import Elf, NotUnderstoodError
from isolator.registration import processes
from isolator.registration.inspecting import inspect_folder

UIDS = HostConfig().uid_range
HERE = f"{sys.version_info.major}{sys.version_info.minor}"
PROGRAM = Path("/usr/bin/true").read_bytes()


@pytest.fixture
def folder(shared_dir: Path) -> Path:
    """A folder as staging leaves it: readable, below one that nobody else may enter."""
    closed = shared_dir / "closed"
    closed.mkdir(mode=0o700)
    made = closed / "staged"
    made.mkdir(mode=0o755)
    return made


def built_for(machine: int) -> bytes:
    return PROGRAM[:18] + struct.pack("<H", machine) + PROGRAM[20:]


def needing(name: str) -> bytes:
    """A program that loads a library of another name than the C library's, which is as long."""
    assert len(name) == len("libc.so.6")
    return PROGRAM.replace(b"libc.so.6\0", name.encode() + b"\0")


def put(folder: Path, path: str, content: bytes) -> None:
    file = folder / path
    for parent in reversed([*file.relative_to(folder).parents][:-1]):
        (folder / parent).mkdir(exist_ok=True, mode=0o755)
    file.write_bytes(content)
    file.chmod(0o755)


def found(folder: Path) -> tuple[str, ...]:
    return inspect_folder(folder, UIDS)


def test_programs_of_this_host_have_no_fault(folder: Path) -> None:
    for name in ("true", "ls", "python3", "openssl"):
        put(folder, f"bin/{name}", Path("/usr/bin", name).read_bytes())
    put(folder, "main.py", b"#!/usr/bin/python3\n")
    put(folder, "README", b"text")
    assert found(folder) == ()


def test_extension_for_another_python_is_named(folder: Path) -> None:
    put(folder, "vendor/_x.cpython-399-x86_64-linux-gnu.so", PROGRAM)
    (fault,) = found(folder)
    assert fault.startswith("vendor/_x.cpython-399-x86_64-linux-gnu.so is built for Python 3.99, and this host's is 3.")


@pytest.mark.parametrize("beside", [f"vendor/_x.cpython-{HERE}-x86_64-linux-gnu.so", "bin/python3.99"])
def test_extension_beside_the_one_for_this_python_or_with_its_own_is_no_fault(folder: Path, beside: str) -> None:
    put(folder, "vendor/_x.cpython-399-x86_64-linux-gnu.so", PROGRAM)
    put(folder, beside, PROGRAM)
    assert found(folder) == ()


def test_file_for_another_machine_is_named(folder: Path) -> None:
    other, name = (183, "aarch64") if os.uname().machine != "aarch64" else (62, "x86_64")
    put(folder, "lib/native.node", built_for(other))
    assert found(folder) == (f"lib/native.node is built for {name}, and this host is {os.uname().machine}",)


def test_package_with_files_for_several_machines_has_no_fault(folder: Path) -> None:
    put(folder, "node_modules/p/prebuilds/linux-arm64/p.node", built_for(183))
    put(folder, "node_modules/p/prebuilds/linux-riscv64/p.node", built_for(243))
    put(folder, "node_modules/p/prebuilds/linux-x64/p.node", PROGRAM)
    assert found(folder) == ()


def test_missing_library_is_named(folder: Path) -> None:
    put(folder, "main", needing("libq.so.6"))
    assert found(folder) == ("main needs libq.so.6, which is neither shipped nor below /usr: ship or install it",)


@pytest.mark.parametrize("how", ["file", "link"])
def test_library_that_is_shipped_is_not_missing(folder: Path, how: str) -> None:
    put(folder, "main", needing("libq.so.6"))
    if how == "file":
        put(folder, "libs/libq.so.6", PROGRAM)
    else:
        put(folder, "libs/libq.so.6.1", PROGRAM)
        (folder / "libs/libq.so.6").symlink_to("libq.so.6.1")
    assert found(folder) == ()


def test_newer_c_library_is_named(folder: Path) -> None:
    version = max(re.findall(rb"\0(GLIBC_2\.\d+)(?=\0)", PROGRAM), key=lambda name: int(name[8:]))
    newer = b"GLIBC_2." + b"9" * (len(version) - len(b"GLIBC_2."))
    put(folder, "main", PROGRAM.replace(version + b"\0", newer + b"\0"))
    (fault,) = found(folder)
    assert fault.startswith(f"main needs a C library of version {newer.decode()[6:]}, and this host's is 2.")


def test_static_program_is_understood(tmp_path: Path) -> None:
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    (tmp_path / "main.c").write_text("int main(void) { return 0; }\n")
    subprocess.run(["gcc", "-static", "-o", tmp_path / "main", tmp_path / "main.c"], check=True)
    fd = os.open(tmp_path / "main", os.O_RDONLY)
    elf = Elf.read(fd)
    os.close(fd)
    assert elf is not None and elf.needed == [] and elf.machine == os.uname().machine


def test_modules_without_bytecode_are_counted(folder: Path) -> None:
    for number in range(30):
        put(folder, f"vendor/m{number}.py", b"x = 1\n")
    (fault,) = found(folder)
    assert fault.startswith("30 Python modules have no bytecode for this host's Python and are compiled at every start")
    subprocess.run([sys.executable, "-m", "compileall", "-q", folder], check=True)
    assert found(folder) == ()
    for number in range(25):  # as after a change of the source
        os.utime(folder / f"vendor/m{number}.py", (1, 1))
    assert found(folder)[0].startswith("25 Python modules")
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(str(folder), quiet=2, force=True, invalidation_mode=unchecked)
    assert found(folder) == ()


def test_names_of_files_cannot_reach_the_terminal(folder: Path) -> None:
    put(folder, "a\x1b[2Jb", built_for(183))
    (fault,) = found(folder)
    assert "\x1b" not in fault


@pytest.mark.parametrize("at", [4, 16, 32, 40, 54, 56, 64, 0x40 + 32, 0x300, 0x400])
def test_damaged_files_are_a_sentence_at_most(folder: Path, at: int) -> None:
    """Each number of the header, and tables: all ones, zeros, and cut short."""
    for number, content in enumerate(
        (PROGRAM[:at] + b"\xff" * 64 + PROGRAM[at + 64 :], PROGRAM[:at] + bytes(64) + PROGRAM[at + 64 :], PROGRAM[:at])
    ):
        put(folder, f"f{number}", content)
    assert len(found(folder)) <= 12


def test_every_byte_of_a_header_may_be_anything(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for at in range(0, 0x400, 7):
        file.write_bytes(PROGRAM[:at] + os.urandom(16) + PROGRAM[at + 16 :])
        fd = os.open(file, os.O_RDONLY)
        try:
            Elf.read(fd)
        except NotUnderstoodError:
            pass
        finally:
            os.close(fd)


ATTEMPTS = """
import os, socket, sys
from isolator.reader.inspector import harden
if sys.argv[1] == "hardened":
    harden()
def attempt(name, action):
    try:
        action()
        os.write(1, name.encode() + b" ")
    except OSError:
        pass
attempt("socket", socket.socket)
attempt("fork", lambda: os.fork() or os._exit(0))
attempt("execute", lambda: os.posix_spawn("/usr/bin/true", ["true"], {}))
attempt("signal", lambda: os.kill(os.getppid(), 0))
attempt("write", lambda: os.open("/dev/null", os.O_RDONLY) and os.mkdir(f"/tmp/{os.getpid()}-made"))
os.write(1, b"still here")
"""


def test_hardened_inspector_can_do_none_of_what_an_unhardened_one_can(tmp_path: Path) -> None:
    def attempts(how: str) -> list[str]:
        return subprocess.run(
            [sys.executable, "-I", "-c", ATTEMPTS, how], capture_output=True, text=True, check=True
        ).stdout.split()

    free = attempts("free")
    for made in Path("/tmp").glob("*-made"):
        made.rmdir()
    assert free == ["socket", "fork", "execute", "signal", "write", "still", "here"]
    assert attempts("hardened") == ["still", "here"]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("print('no json')", "made to mislead"),
        ("print('{}')", "made to mislead"),
        ("print('[1]')", "made to mislead"),
        ("print('[' + ', '.join(['\"x\"'] * 13) + ']')", "made to mislead"),
        ("import os\nwhile True: os.write(1, b'x' * 65536)", "made to mislead"),
        ("raise SystemExit(1)", "made to mislead"),
    ],
)
def test_broken_inspector_fails_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, why: str) -> None:
    def command(module: str, uid: int, gid: int, fds: dict[str, int]) -> list[str]:
        whole = service_command(module, uid, gid, fds)
        return [*whole[: whole.index("-m")], "-c", code]

    monkeypatch.setattr(processes, "service_command", command)
    (sentence,) = found(folder)
    assert why in sentence


def test_host_of_a_cage_has_the_c_library() -> None:
    host = Host.here()
    assert "libc.so.6" in host.libraries
    assert host.c_library >= (2, 28)
