"""``isolator run`` of users without privilege, through the daemon, as they use it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.standalone import client
from tests.runners.conftest import ALICE, BOB, STRANGER, run_as, words
from tests.support.timeouts import seconds
from tests.system.daemon import wait_for
from tests.system.taken_over import TakenOver


def test_output_input_and_exit_code(daemon: TakenOver) -> None:
    result = run_as(daemon, ALICE, "--", "sh", "-c", "cat; echo error >&2; exit 3", input="through\n")
    assert (result.returncode, result.stdout, result.stderr) == (3, "through\n", "error\n")


def test_end_by_a_signal_is_128_and_its_number_and_told_as_json(daemon: TakenOver) -> None:
    result = run_as(daemon, ALICE, "--json", "--", "sh", "-c", "kill -SEGV $$")
    assert result.returncode == 128 + signal.SIGSEGV
    found = json.loads(result.stderr)
    assert (found["exit_code"], found["signal"], found["cause"]) == (None, signal.SIGSEGV, "signal")
    assert run_as(daemon, ALICE, "--memory", "16M", "--", "sh", "-c", "x=$(yes)").stderr == (
        "isolator: sh was ended: out of memory\n"
    )


def test_cage_that_cannot_be_built_is_125_and_one_line(daemon: TakenOver) -> None:
    result = run_as(daemon, ALICE, "--", "/no/such/program")
    assert (result.returncode, result.stdout) == (125, "")
    assert result.stderr.startswith("isolator: start of run: /no/such/program: No such file or directory; ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--memory", "lots"], "--memory: "),
        (["--memory", "1G"], "1G is over the ceiling, 512M; lower it, or raise the ceiling in [runner] of "),
        (["--egress", "nowhere"], "--egress: "),
        (["--egress", "other.example:443"], "other.example:443 is over the ceiling; "),
        (["--net", "public"], '"public" is over the ceiling; '),
        (["--read", "/proc/1"], "never made visible"),
        (["--read", "/sys/kernel"], "never made visible"),
        (["--cwd", "here"], "--cwd: is not absolute"),
        (["--audit", "/dev/null"], "--audit: is root's alone: the daemon's own trail has the records; leave it out"),
        (["--env", "=x"], "--env: "),
    ],
)
def test_wrong_request_is_2_and_says_why(daemon: TakenOver, arguments: list[str], complaint: str) -> None:
    result = run_as(daemon, ALICE, *arguments, "--", "true")
    assert result.returncode == 2, result.stderr
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1


def test_command_has_a_user_of_its_own_and_no_group_of_the_callers(daemon: TakenOver) -> None:
    script = "id -u; id -G; cat /proc/self/status | grep -c 'CapEff:.*0000000000000000'"
    first, last = HostConfig().uid_range
    uid, groups, bare = run_as(daemon, ALICE, "--", "sh", "-c", script).stdout.split()
    assert first <= int(uid) <= last
    assert (groups, bare) == (uid, "1")


def test_variables_are_the_named_ones_and_the_callers_own_of_language_terminal_and_time(
    daemon: TakenOver, shared_dir: Path
) -> None:
    file = shared_dir / "variables"
    file.write_text("A=of file\nB=b\n")
    own = {"PATH": os.environ["PATH"], "TERM": "odd", "TZ": "Asia/Tokyo", "LANG": "C.UTF-8", "MINE": "m", "OTHER": "o"}
    result = run_as(daemon, ALICE, "--env-file", str(file), "--env", "A=a=b", "--env", "MINE", "--", "env", env=own)
    found = dict(line.split("=", 1) for line in result.stdout.splitlines())
    expected = {"A": "a=b", "B": "b", "MINE": "m", "TERM": "odd", "TZ": "Asia/Tokyo", "HOME": "/tmp"}
    assert {name: found.get(name) for name in expected} == expected
    assert "OTHER" not in found


def test_signals_reach_the_whole_group_of_the_command(daemon: TakenOver) -> None:
    script = "trap 'echo term; exit 5' TERM; echo up; while :; do sleep 0.1; done"
    process = subprocess.Popen(
        words(daemon.root, ALICE, "run", "--", "sh", "-c", script), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
        text=True, cwd="/",
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.terminate()
    assert process.communicate(timeout=seconds(30))[0] == "term\n"
    assert process.returncode == 5


def test_signal_that_comes_just_before_the_wait_for_the_daemon_is_passed_on() -> None:
    main, futex = threading.get_native_id(), {"x86_64": "202", "aarch64": "98"}[os.uname().machine]
    heard: list[bytes] = []

    def play_daemon() -> None:
        while Path(f"/proc/self/task/{main}/syscall").read_text().split()[0] in ("running", futex):
            pass
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # no wait of the main thread is ended by that
        with contextlib.suppress(TimeoutError):
            heard.append(daemons.recv(1000))
        daemons.send(client.pack([("end", "exit")]))

    before = {number: signal.getsignal(number) for number in client.SIGNALS}
    ours, daemons = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, daemons:
        run = client.Run(ours)
        run.send(client.pack([("tty", "no")]), [])
        daemons.recv(1000)
        daemons.settimeout(seconds(10))
        playing = threading.Thread(target=play_daemon)
        playing.start()
        try:
            assert run.wait() == {"end": "exit"}
        finally:
            playing.join()
            os.close(signal.set_wakeup_fd(-1))
            os.close(run._woken)
            for number, handler in before.items():
                signal.signal(number, handler)
    assert heard == [client.pack([("signal", str(int(signal.SIGTERM)))])]


def test_refused_call_is_shown_and_on_record(daemon: TakenOver) -> None:
    result = run_as(daemon, ALICE, "--", "python3", "-c", "import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)")
    assert "isolator: denied: system call ptrace" in result.stderr
    assert wait_for(lambda: [r for r in daemon.records() if r["type"] == "syscall.denied"])[-1]["plugin"] == (
        f"_run.{ALICE}"
    )


def test_trail_has_who_asked_and_what_was_shown(daemon: TakenOver, home: Path) -> None:
    (home / "file").write_text("x")
    words_ = ["--read", str(home / "file"), "--write", str(home), "--env", "SECRET=s3cret", "--", "sh", "-c", "exit 7"]
    assert run_as(daemon, ALICE, *words_).returncode == 7
    ended = wait_for(
        lambda: [r for r in daemon.records() if r["type"] == "run.ended" and r["data"].get("exit_code") == 7]
    )
    (started,) = [r for r in daemon.records() if r["type"] == "run.started" and r["run"] == ended[0]["run"]]
    assert started["plugin"] == ended[0]["plugin"] == f"_run.{ALICE}"
    data = started["data"]
    assert (data["by"], data["program"]) == (f"uid:{ALICE}", "sh")
    assert (data["read"], data["write"]) == ([str(home / "file")], [str(home)])
    assert "SECRET" in data["env"]
    assert "s3cret" not in json.dumps(daemon.records())
    daemon.cli("audit", "verify")


def test_user_without_the_role_is_told_what_to_do(daemon: TakenOver) -> None:
    result = run_as(daemon, STRANGER, "--", "true")
    assert result.returncode == 125
    assert f"uid {STRANGER} is no runner; use sudo, or have the uid added to [roles] runner" in result.stderr


def test_user_without_a_daemon_is_told_what_to_do(shared_dir: Path) -> None:
    result = subprocess.run(
        words(shared_dir, ALICE, "run", "--", "true"), capture_output=True, text=True, check=False, cwd="/"
    )
    assert result.returncode == 125
    assert "building a cage needs root, or a daemon at " in result.stderr
    assert "use sudo" in result.stderr


def test_client_knows_the_path_of_the_socket(shared_dir: Path) -> None:
    for root in (str(shared_dir), "/"):
        assert client._socket_path(root) == str(Paths.of(root).run_socket)


def test_client_loads_next_to_nothing(daemon: TakenOver) -> None:
    program = (
        "import sys; before = set(sys.modules)\n"
        "import host.cli.main, isolator.standalone.command as command\n"
        "code = command.run(host.cli.main.read_plainly(sys.argv[1:]))\n"
        "print(*sorted(set(sys.modules) - before))\n"
        "sys.exit(code)\n"
    )
    argv = words(daemon.root, ALICE, "run", "--read", "/opt", "--net", "none", "--", "true")
    argv[argv.index("-c") + 1] = program
    done = subprocess.run(argv, capture_output=True, text=True, check=True, cwd="/", stdin=subprocess.DEVNULL)
    loaded = set(done.stdout.split())
    heavy = {"asyncio", "collections", "contextlib", "enum", "json", "pathlib", "re", "signal", "socket", "typing"}
    assert loaded & heavy == set()
    assert {name.split(".")[1] for name in loaded if name.startswith("isolator.")} == {
        "errors", "ipc", "linux", "standalone",
    }  # fmt: skip


def test_two_users_runs_at_once_have_two_uids(daemon: TakenOver) -> None:
    def begin(uid: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            words(daemon.root, uid, "run", "--", "sh", "-c", "id -u; read line"), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, cwd="/",
        )  # fmt: skip

    runs = [begin(ALICE), begin(BOB), begin(ALICE)]
    try:
        uids = {run.stdout.readline() for run in runs if run.stdout is not None}
        assert len(uids) == 3
    finally:
        for run in runs:
            run.communicate("\n", timeout=seconds(30))
    assert [run.returncode for run in runs] == [0, 0, 0]
