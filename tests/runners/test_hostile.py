"""Hostile runners: what they send, keep open or flood with costs them alone, and ends with them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isolator.ipc.run_request import pack
from tests.runners.conftest import ALICE, BOB, HOST_TOML, STRANGER, run_as, words
from tests.runners.raw import NULL, acting_as, answer, connect, request, send
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, wait_for
from tests.system.daemon import daemon as running_daemon
from tests.system.taken_over import TakenOver

TRUE = pack([("argument", "true")])


@pytest.fixture
def null() -> Iterator[int]:
    fd = os.open("/dev/null", os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture(autouse=True)
def _share(daemon: TakenOver) -> None:
    """Alice has her whole share: what a test before leaves to the daemon, that is over."""
    wait_for(lambda: whole_share_is_free(daemon), seconds(60))


def whole_share_is_free(d: TakenOver) -> bool:
    with connect(d.root, ALICE) as first, connect(d.root, ALICE) as second:
        said = []
        for sock in (second, first):  # which is accepted first, and has its place while the second is served
            send(sock, b"neither")
            said.append(answer(sock)["error"])
        return said == ["usage", "usage"]


def bob_is_served(d: TakenOver) -> bool:
    return run_as(d, BOB, "--", "echo", "served").stdout == "served\n"


def begin(d: Daemon, uid: int, *arguments: str) -> subprocess.Popen[str]:
    """A run that has said ``up``; it waits for a line."""
    process = subprocess.Popen(
        words(d.root, uid, "run", *arguments, "--", "sh", "-c", "echo up; read line; true"), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def end(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.communicate("\n", timeout=seconds(30))


def started(d: Daemon) -> dict[str, Any]:
    """The record of Alice's newest run."""
    found: dict[str, Any] = [r for r in d.records() if r["type"] == "run.started" and r["plugin"] == f"_run.{ALICE}"][
        -1
    ]
    return found


def end_of(d: Daemon, start: dict[str, Any]) -> dict[str, Any]:
    """The data of the record of a run's end."""
    ends = wait_for(lambda: [r for r in d.records() if r["type"] == "run.ended" and r["run"] == start["run"]])
    found: dict[str, Any] = ends[0]["data"]
    return found


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and errors of a run whose input stays open."""
    code = process.wait(seconds(30))
    _, errors = process.communicate()
    return code, errors


# --- who --------------------------------------------------------------------------------------------------------------


def test_nobody_but_runners_can_connect(daemon: TakenOver) -> None:
    path = str(daemon.root / "run/isolator/run.sock")
    for uid in (STRANGER, 65534):
        with pytest.raises(PermissionError):
            connect(daemon.root, uid)
    assert "is no runner" in request(daemon.root, 0, [])["why"]  # root can, and is not served
    # The daemon's own processes, taken over.
    assert daemon.order("host.service", connect=path)["error"]["code"] == "PermissionError"
    assert daemon.order("isolator.audit.service", connect=path)["error"]["code"] == "PermissionError"


def test_runner_has_no_role_on_the_other_sockets(daemon: TakenOver) -> None:
    for name in ("ticket.sock", "metrics.sock"):
        with socket.socket(socket.AF_UNIX) as sock, acting_as(ALICE), pytest.raises(PermissionError):
            sock.connect(str(daemon.root / "run/isolator" / name))
    done = subprocess.run(
        words(daemon.root, ALICE, "plugin", "list"), capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 4
    assert f"uid {ALICE} has the role none" in done.stderr


# --- what -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "packet",
    [
        b"\0", b"argument", b"\xff" * 1000, b"argument=true\0audit=/etc/shadow", b'{"argument": ["true"]}',
        b"argument=true\0env", b"argument=" + b"x" * 150_000, b"argument=x" + b"\0argument=" * 9000,
        b"argument=true\0read=/srv",
    ],
    ids=range(9),
)  # fmt: skip
def test_malformed_request_is_refused_in_words(daemon: TakenOver, packet: bytes, null: int) -> None:
    with connect(daemon.root, ALICE) as sock:
        send(sock, packet, [null] * 3)
        assert answer(sock)["error"] == "usage"


@pytest.mark.parametrize("count", [0, 1, 2, 4, 64, 253])
def test_other_number_of_descriptors_is_refused(daemon: TakenOver, null: int, count: int) -> None:
    with connect(daemon.root, ALICE) as sock:
        send(sock, TRUE, [null] * count)
        found = answer(sock)
        assert (found["error"], found["why"]) == ("usage", "another number of descriptors than paths")


@pytest.mark.wide
def test_connection_that_says_nothing_is_closed(daemon: TakenOver) -> None:
    with connect(daemon.root, ALICE) as sock:
        assert answer(sock) == {}


@pytest.mark.parametrize("flags", [os.O_RDONLY | os.O_DIRECTORY, os.O_PATH])
def test_stream_that_leads_to_files_is_refused(daemon: TakenOver, flags: int) -> None:
    """From a folder's descriptor a program would get anywhere on the host that others may."""
    for place in range(3):
        streams = [NULL, NULL, NULL]
        streams[place] = ("/", flags)
        found = request(daemon.root, ALICE, [], streams=streams)
        assert (found["error"], found["why"].partition(": ")[0]) == ("confinement", "standard streams")


def test_other_packets_than_signals_end_the_run(daemon: TakenOver, null: int) -> None:
    for packet, fds in ((b"signal=9", []), (b"signal=15 ", []), (TRUE, []), (b"signal=28", [null])):
        with connect(daemon.root, ALICE) as sock:
            send(sock, pack([("argument", "sleep"), ("argument", "1000")]), [null] * 3)
            send(sock, packet, fds)
            found = answer(sock)
            assert (found["end"], found["signal"]) == ("its caller has left", "9")


# --- how much ---------------------------------------------------------------------------------------------------------


def test_user_who_has_its_share_is_told_so_and_others_are_served(daemon: TakenOver) -> None:
    taken = [begin(daemon, ALICE) for _ in range(2)]
    try:
        result = run_as(daemon, ALICE, "--", "true")
        assert result.returncode == 125
        assert "2 of your runs are under way, as many as cages in [runner] of host.toml" in result.stderr
        assert bob_is_served(daemon)
        theirs = [begin(daemon, BOB) for _ in range(2)]
        end(*theirs)
    finally:
        end(*taken)
    assert run_as(daemon, ALICE, "--", "true").returncode == 0


def test_place_is_free_when_its_run_has_the_answer(daemon: TakenOver, null: int) -> None:
    """Whoever has one run after another does not find that its own last one is under way."""
    with connect(daemon.root, ALICE) as other:
        for _ in range(20):
            with connect(daemon.root, ALICE) as sock:
                send(sock, b"neither", [null] * 3)
                assert answer(sock)["error"] == "usage"
        send(other, b"neither")
        assert answer(other)["error"] == "usage"


def test_tasks_and_memory_of_all_runs_are_bounded_before_anything_is_made(daemon: TakenOver) -> None:
    def started() -> int:
        return len([r for r in daemon.records() if r["type"] == "run.started"])

    known = started()
    taken = begin(daemon, ALICE, "--tasks", "100", "--memory", "300M")
    try:
        before = wait_for(lambda: (now := started()) > known and now, what="its start is not on record")
        for flags, key in ((["--tasks", "51"], "all_tasks"), (["--tasks", "9", "--memory", "300M"], "all_memory")):
            result = run_as(daemon, ALICE, *flags, "--", "true")
            assert (result.returncode, f"{key} in [runner]" in result.stderr) == (125, True), result.stderr
            assert started() == before
        assert bob_is_served(daemon)
    finally:
        end(taken)


def test_connections_that_wait_take_their_own_users_share_alone(daemon: TakenOver) -> None:
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connect(daemon.root, ALICE)) for _ in range(20)]
        assert bob_is_served(daemon)
        said = [answer(sock) for sock in waiting]
    assert sum("under way" in one.get("why", "") for one in said) == 18
    assert said.count({}) == 2


def test_flood_of_requests_delays_nobody_else(daemon: TakenOver) -> None:
    stop = threading.Event()
    counts = []

    def flood() -> None:
        count = 0
        while not stop.is_set():
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.setblocking(False)
                sock.connect(path)
                sock.send(b"\0" * 60_000)
                count += 1
        counts.append(count)

    path = f"/proc/self/fd/{(folder := os.open(daemon.root / 'run/isolator', os.O_PATH))}/run.sock"
    thread = threading.Thread(target=flood)
    # The flood's thread keeps these ids: they are a thread's own to the kernel, and of every thread to Python.
    with acting_as(ALICE):
        thread.start()
        served = []
        program = words(daemon.root, BOB, "run", "--", "echo", "served")
        os.setresuid(-1, 0, -1)
    try:
        for _ in range(3):
            served.append(subprocess.run(program, capture_output=True, text=True, check=False, cwd="/").stdout)
        daemon.cli("plugin", "list")
    finally:
        stop.set()
        thread.join()
        os.close(folder)
    assert served == ["served\n"] * 3
    assert counts[0] > 100


@pytest.mark.wide
def test_flood_of_signals_delays_nobody_else(daemon: TakenOver, null: int) -> None:
    with connect(daemon.root, ALICE) as sock:
        send(sock, pack([("argument", "sleep"), ("argument", "1000")]), [null] * 3)
        sock.setblocking(False)
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    sock.send(b"signal=28")

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            assert bob_is_served(daemon)
            start = started(daemon)
        finally:
            stop.set()
            thread.join()
    assert end_of(daemon, start)["cause"] == "its caller has left"


# --- what hangs -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lingering() -> Iterator[int]:
    """A descriptor whose last close takes five minutes: a connection whose peer takes nothing in (SO_LINGER)."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as sock:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(server.getsockname())
        peer, _ = server.accept()
        with peer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 300))
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(b"x" * 65536)
            yield sock.detach()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends it at once


@pytest.mark.parametrize("where", ["request", "unread request", "signal", "stream"])
def test_descriptor_that_takes_minutes_to_close_holds_up_nobody(daemon: TakenOver, null: int, where: str) -> None:
    assert daemon.process is not None
    # Connected before, as a stopped daemon accepts nobody.
    with lingering() as fd, connect(daemon.root, ALICE) as sock, connect(daemon.root, ALICE) as other:
        # Stopped, so that the last close is the daemon's, and that an unread request is there when the one before it
        # ends the connection.
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            if where == "stream":
                send(sock, TRUE, [null, null, fd])
            else:
                send(sock, pack([("argument", "sleep"), ("argument", "1000")]), [null] * 3)
            if where == "request":
                send(other, TRUE, [null] * 3 + [fd])
            elif where == "unread request":
                send(sock, b"no signal")
                send(sock, b"x", [fd])
            elif where == "signal":
                send(sock, b"signal=28", [fd])
            os.close(fd)
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        sock.close()
        other.close()
        for _ in range(3):
            assert bob_is_served(daemon)
        daemon.cli("plugin", "list")


def test_descriptors_that_do_not_close_keep_nobody_else_out(daemon: TakenOver, null: int) -> None:
    assert daemon.process is not None
    with contextlib.ExitStack() as stack:
        daemon.process.send_signal(signal.SIGSTOP)  # all of it waits when the daemon comes to the first
        try:
            for _ in range(80):
                fd = stack.enter_context(lingering())
                with connect(daemon.root, ALICE) as sock:
                    send(sock, TRUE, [null] * 3 + [fd])
                os.close(fd)
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        for _ in range(3):
            assert bob_is_served(daemon)
    wait_for(lambda: run_as(daemon, ALICE, "--", "true").returncode == 0, seconds(60), "she is not served any more")


def test_pipe_that_nobody_serves_as_a_stream_holds_up_nobody(daemon: TakenOver, null: int) -> None:
    read, write = os.pipe()
    with connect(daemon.root, ALICE) as sock:
        send(sock, pack([("argument", "cat")]), [read, null, null])
        os.close(read)
        assert bob_is_served(daemon)
    os.close(write)


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True])
def test_cage_ends_with_its_client(daemon: TakenOver, stopped: bool) -> None:
    process = begin(daemon, ALICE)
    start = started(daemon)
    group = Path(start["data"]["cgroup"])
    assert (group / "cgroup.procs").read_text().split()
    if stopped:
        process.send_signal(signal.SIGSTOP)
    process.kill()
    process.wait(seconds(30))
    wait_for(lambda: not group.exists(), seconds(30), "the cage outlives its client")
    assert end_of(daemon, start)["cause"] == "its caller has left"
    process.communicate()  # its input has been open until here: that was not what ended the cage


def test_client_that_is_stopped_holds_up_nobody_and_learns_the_end_later(daemon: TakenOver) -> None:
    process = begin(daemon, ALICE)
    group = Path(started(daemon)["data"]["cgroup"])
    process.send_signal(signal.SIGSTOP)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    wait_for(lambda: not group.exists(), seconds(30), "the run waits for its client")
    assert bob_is_served(daemon)
    process.send_signal(signal.SIGCONT)
    assert process.wait(seconds(30)) == 0
    process.communicate()


def test_children_of_the_command_end_with_it(daemon: TakenOver) -> None:
    result = run_as(daemon, ALICE, "--", "sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo begun")
    assert (result.returncode, result.stdout) == (0, "begun\n")
    group = Path(started(daemon)["data"]["cgroup"])
    assert not group.exists()


def test_run_ends_with_the_launcher_and_with_the_daemon_and_is_on_record() -> None:
    with running_daemon(host_toml=HOST_TOML) as made:
        process = begin(made, ALICE)
        os.kill(made.service_pid("isolator.launcher"), signal.SIGKILL)
        assert outcome(process) == (137, "isolator: sh was ended: the launcher died\n")
        process = wait_for(lambda: _begun(made), seconds(60), "no run after the launcher has died")
        start = started(made)
        made.kill()
        code, errors = outcome(process)
        assert (code, "the daemon has ended, and the run with it" in errors) == (125, True)
        made.start()
        assert end_of(made, start) == {"cause": "found dead: the daemon was killed"}
        process = begin(made, ALICE)
        assert made.stop() == 0
        assert outcome(process) == (137, "isolator: sh was ended: the daemon stops\n")


def _begun(d: Daemon) -> subprocess.Popen[str] | None:
    """A run, unless the launcher is not there again."""
    process = subprocess.Popen(
        words(d.root, ALICE, "run", "--", "sh", "-c", "echo up; read line"), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
    )  # fmt: skip
    assert process.stdout is not None
    if process.stdout.readline() == "up\n":
        return process
    process.communicate(timeout=seconds(30))
    return None


# --- from inside ------------------------------------------------------------------------------------------------------


def test_cage_sees_no_other_cage_and_no_socket_of_the_daemon(daemon: TakenOver, home: Path) -> None:
    other = begin(daemon, BOB)
    try:
        script = "ls /run/isolator; ps -e -o pid= | wc -l; kill -9 -1 2>/dev/null; ls /run 2>/dev/null"
        result = run_as(daemon, ALICE, "--write", str(home), "--", "sh", "-c", f"({script})")
        assert "sock" not in result.stdout
        assert other.poll() is None
    finally:
        end(other)
    assert other.returncode == 0
