"""Runs of users over a reload of the daemon: nobody notices, and nobody holds it up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from isolator.ipc.run_request import pack
from tests.runners.conftest import ALICE, run_as, words
from tests.runners.raw import answer, connect, send
from tests.runners.test_hostile import bob_is_served, end_of, lingering, started
from tests.support.hanging_file import file_that_does_not_close
from tests.support.timeouts import seconds
from tests.system.taken_over import TakenOver

SCRIPT = """
import ctypes, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
print("up", flush=True)
signal.sigwait({signal.SIGHUP})
libc = ctypes.CDLL(None, use_errno=True)
print(libc.mount(b"x", b"/tmp", b"tmpfs", 0, None), ctypes.get_errno(), flush=True)
sys.exit(9)
"""
"""Makes a call that is refused when a signal comes."""


def test_run_its_share_and_its_end_are_what_they_were_after_reloads(daemon: TakenOver) -> None:
    flags = ["--memory", "300M", "--", "python3", "-c", SCRIPT]
    process = subprocess.Popen(
        words(daemon.root, ALICE, "run", *flags), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd="/",
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    start = started(daemon)
    with connect(daemon.root, ALICE) as sock, Path("/dev/null").open("r+b") as null:  # one that has said nothing yet
        daemon.cli("reload")
        send(sock, pack([("memory", "64M"), ("argument", "true")]), [null.fileno()] * 3)
        assert answer(sock)["exit_code"] == "0"
    for again in (False, True):
        if again:
            daemon.cli("reload")
        refused = run_as(daemon, ALICE, "--memory", "300M", "--", "true")
        assert "all_memory in [runner] of host.toml" in refused.stderr
        assert bob_is_served(daemon)
    reloaded = [one["data"]["adopted"] for one in daemon.records() if one["type"] == "daemon.reloaded"]
    assert reloaded[-2:] == [1, 1]
    process.send_signal(signal.SIGHUP)
    out, errors = process.communicate(timeout=seconds(30))
    assert (process.returncode, out) == (9, "-1 1\n"), errors
    assert errors.startswith("isolator: denied: system call mount")
    ended = end_of(daemon, start)
    assert (ended["cause"], ended["exit_code"], ended["by"]) == ("exit", 9, f"uid:{ALICE}")
    assert run_as(daemon, ALICE, "--memory", "300M", "--", "true").returncode == 0


def test_descriptor_that_takes_minutes_to_close_holds_up_no_reload(daemon: TakenOver) -> None:
    assert daemon.process is not None
    null = os.open("/dev/null", os.O_RDWR)
    with contextlib.ExitStack() as stack:
        callers = []
        daemon.process.send_signal(signal.SIGSTOP)  # it has to be the last that closes
        for streams in (2, 3):  # a stream, and something that nobody asked for
            fd = stack.enter_context(lingering())
            callers.append(stack.enter_context(connect(daemon.root, ALICE)))
            send(callers[-1], pack([("argument", "true")]), [null] * streams + [fd])
            os.close(fd)
        daemon.process.send_signal(signal.SIGCONT)
        assert all(answer(caller) for caller in callers)
        for _ in range(2):
            daemon.cli("reload")
            assert bob_is_served(daemon)
    os.close(null)


def test_file_system_that_does_not_answer_is_named_and_holds_up_nobody_else(daemon: TakenOver, tmp_path: Path) -> None:
    assert daemon.process is not None
    with file_that_does_not_close(tmp_path / "file", daemon.process.pid) as file:
        with connect(daemon.root, ALICE) as caller, Path("/dev/null").open("r+b") as null:
            send(caller, pack([("argument", "true")]), [null.fileno()] * 3 + [file.fd])
            assert answer(caller)
        file.hangs()
        assert bob_is_served(daemon)
        refused = daemon.cli("reload", code=1).stderr
        assert "nothing has changed" in refused and refused.count("\n") == 1
        assert f"a descriptor that uid {ALICE} has handed over does not close" in refused
        assert "end the file system behind it" in refused
        assert bob_is_served(daemon)
    daemon.cli("reload")
    assert bob_is_served(daemon)
