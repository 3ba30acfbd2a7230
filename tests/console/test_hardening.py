"""Attempts of a console that was taken over: each from inside the hardened process, and again without hardening."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isolator.broker.hardening import CONSOLE, FAMILIES, rules
from isolator.layers.seccomp.layer import compile_rules

UID = 61160
ATTEMPTS = {
    "exec": "os.execv('/bin/true', ['true'])",
    "fork": "os.waitpid(os.fork() or os._exit(0), 0)",
    "dial out": "socket.socket(socket.AF_INET)",
    "dial out by IPv6": "socket.socket(socket.AF_INET6)",
    "read another file": "os.close(os.open(sys.argv[1] + '/other/file', os.O_RDONLY))",
    "write a file": "os.close(os.open(sys.argv[1] + '/trail/new', os.O_WRONLY | os.O_CREAT, 0o600))",
}
HARDEN = "harden(program, [sys.base_prefix, sys.argv[1] + '/trail'])"
NEEDED = {
    "read the trail": "os.close(os.open(sys.argv[1] + '/trail/file', os.O_RDONLY))",
    "reach the daemon": "socket.socket(socket.AF_UNIX)",
}


def attempt(folder: Path, code: str, *, harden: bool) -> str:
    """Run one attempt as the console's user: ``done``, or the error's name."""
    script = (
        "import errno, os, socket, sys\n"
        "from isolator.broker.hardening import harden\n"
        "program = open(sys.argv[3], 'rb').read()\n"
        f"{HARDEN if harden else ''}\n"
        f"try:\n    {code}\n"
        "except OSError as error:\n    print(errno.errorcode[error.errno])\nelse:\n    print('done')\n"
    )
    other = subprocess.Popen(["sleep", "60"], user=UID)
    try:
        result = subprocess.run(
            ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--bounding-set=-all",
             sys.executable, "-I", "-c", script, str(folder), str(other.pid), str(folder / "filter")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout.strip() or "done"  # a successful exec prints nothing
    finally:
        other.kill()
        other.wait()


@pytest.fixture
def folder(shared_dir: Path) -> Path:
    """Folders of the console's own user, one of which stands for the trail."""
    (shared_dir / "filter").write_bytes(compile_rules(rules(FAMILIES[CONSOLE])))
    (shared_dir / "filter").chmod(0o644)
    for name in ("trail", "other"):
        (shared_dir / name).mkdir()
        (shared_dir / name / "file").touch()
        (shared_dir / name / "new").unlink(missing_ok=True)
        for path in (shared_dir / name, shared_dir / name / "file"):
            os.chown(path, UID, UID)
    return shared_dir


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempt_in_the_hardened_console_is_refused(folder: Path, name: str) -> None:
    assert attempt(folder, ATTEMPTS[name], harden=True) in {"EPERM", "EACCES"}
    assert attempt(folder, ATTEMPTS[name], harden=False) == "done"


@pytest.mark.parametrize("name", NEEDED)
def test_hardened_console_keeps_what_it_needs(folder: Path, name: str) -> None:
    assert attempt(folder, NEEDED[name], harden=True) == "done"
