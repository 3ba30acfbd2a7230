"""Attempts of a broken broker: each from inside the hardened process, and again without hardening."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from isolator.broker.hardening import rules
from isolator.layers.seccomp.layer import compile_rules
from tests.broker.conftest import MakeCage, listed
from tests.support.pretend_internet import BROKER_UID, BrokerProcess, PretendInternet

ATTEMPTS = {
    "exec": "os.execv('/bin/true', ['true'])",
    "fork": "os.waitpid(os.fork() or os._exit(0), 0)",
    "unix socket": "socket.socket(socket.AF_UNIX)",
    "write a file": "os.close(os.open(sys.argv[1] + '/new', os.O_WRONLY | os.O_CREAT, 0o600))",
    "remove a file": "os.unlink(sys.argv[1] + '/old')",
    "signal another": "os.kill(int(sys.argv[2]), 0)",
    "namespace": "libc.unshare(0x10000000) and fail(ctypes.get_errno())",
}


def attempt(pretend: PretendInternet, folder: Path, code: str, *, harden: bool) -> str:
    """Run one attempt as the broker's user: ``done``, or the error's name."""
    script = (
        "import ctypes, errno, os, socket, sys\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def fail(number):\n    raise OSError(number, '')\n"
        f"from isolator.broker.hardening import harden\nprogram = open(sys.argv[3], 'rb').read()\n"
        f"{'harden(program)' if harden else ''}\n"
        f"try:\n    {code}\n"
        "except OSError as error:\n    print(errno.errorcode[error.errno])\nelse:\n    print('done')\n"
    )
    other = subprocess.Popen(["sleep", "60"], user=BROKER_UID)
    try:
        result = subprocess.run(
            ["setpriv", f"--reuid={BROKER_UID}", f"--regid={BROKER_UID}", "--clear-groups", "--bounding-set=-all",
             *pretend.python("attempt", str(folder), str(other.pid), str(folder / "filter"))],
            capture_output=True, text=True, check=False, env={"ATTEMPT": script, "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout.strip() or "done"  # a successful exec prints nothing
    finally:
        other.kill()
        other.wait()


@pytest.fixture
def folder(pretend: PretendInternet) -> Path:
    """A folder that is the broker's own, with a file."""
    import os

    made = pretend.directory / "own"
    made.mkdir(exist_ok=True)
    (made / "old").touch()
    (made / "new").unlink(missing_ok=True)
    (made / "filter").write_bytes(compile_rules(rules()))
    for path in (made, made / "old"):
        os.chown(path, BROKER_UID, BROKER_UID)
    (pretend.directory / "attempt.py").write_text("import os\nexec(os.environ['ATTEMPT'])\n")
    return made


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempt_in_the_hardened_broker_is_refused(pretend: PretendInternet, folder: Path, name: str) -> None:
    assert attempt(pretend, folder, ATTEMPTS[name], harden=True) in {"EPERM", "EACCES"}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_attempt_without_hardening_succeeds(pretend: PretendInternet, folder: Path, name: str) -> None:
    assert attempt(pretend, folder, ATTEMPTS[name], harden=False) == "done"


async def test_the_running_broker_is_hardened(broker: BrokerProcess) -> None:
    status = Path(f"/proc/{broker.process.pid}/status").read_text()
    for line in ("Seccomp:\t2", "NoNewPrivs:\t1", "CapBnd:\t0000000000000000", f"Uid:\t{BROKER_UID}"):
        assert line in status
    assert Path(f"/proc/{broker.process.pid}/mem").stat().st_uid == 0  # not dumpable: not its own user's to open


async def test_new_connections_are_refused_while_the_trail_cannot_be_written(
    cages: MakeCage, broker: BrokerProcess, pretend: PretendInternet
) -> None:
    cage = await cages(listed("hooks.example.com:80"))
    ask = "print(attempt(get, 'http://hooks.example.com/'))"
    assert "host=hooks" in await cage.client(ask)
    address = await cage.client("print(socket.gethostbyname('hooks.example.com'))")
    broker.audit.send(b'{"blocked": "the disk is full"}')
    await asyncio.sleep(0.2)  # nothing answers such a packet
    raw = f"s = attempt(tcp, {address!r}, 80)\nprint(s if isinstance(s, str) else attempt(s.recv, 1))"
    assert await cage.client(raw) == "ECONNRESET"
    assert await cage.client("print(attempt(socket.gethostbyname, 'hooks.example.com'))") == "gaierror"
    await broker.wait_for("net.query", verdict="failed", rule="audit-unavailable")
    await broker.wait_for("net.denied", rule="audit-unavailable", name="hooks.example.com")
    broker.audit.send(b'{"blocked": null}')
    await asyncio.sleep(0.2)
    assert "host=hooks" in await cage.client(ask)


async def test_new_audit_process_is_used_at_once_and_gets_every_record(cages: MakeCage, broker: BrokerProcess) -> None:
    cage = await cages(listed("hooks.example.com:80"))
    broker.acknowledge = False
    assert "host=hooks" in await cage.client("print(get('http://hooks.example.com/'))")
    await broker.wait_for("net.closed")
    before = len(broker.records)
    await broker.new_audit()
    await broker.wait_for("net.closed")  # the unacknowledged ones come again
    assert len(broker.records) >= before
    assert "host=hooks" in await cage.client("print(get('http://hooks.example.com/'))")
