"""``isolator run`` as a person uses it: its exit codes, what it prints, what it shows the command, how it is ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from isolator.cage.tcp_memory import CAUSE
from tests.support.cage_fixture import COMMAND, caged, isolator, leaves
from tests.support.processes import children
from tests.support.timeouts import seconds
from tests.system.test_tcp_memory import HOARD


def test_output_input_and_exit_code(shared_dir: Path) -> None:
    result = isolator(shared_dir, "run", "--", "sh", "-c", "cat; echo error >&2; exit 3", input="through\n")
    assert (result.returncode, result.stdout, result.stderr) == (3, "through\n", "error\n")


def test_a_signal_becomes_128_and_its_number(shared_dir: Path) -> None:
    assert isolator(shared_dir, "run", "--", "sh", "-c", "kill -SEGV $$").returncode == 128 + signal.SIGSEGV


def test_a_cage_that_cannot_be_built_is_125_and_one_line(shared_dir: Path) -> None:
    result = isolator(shared_dir, "run", "--", "/no/such/program")
    assert result.returncode == 125
    assert result.stdout == ""
    assert result.stderr.startswith("isolator: start of run: /no/such/program: No such file or directory; ")
    assert "--read or --write names" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "no command"),
        (["--memory", "lots", "--", "true"], "--memory"),
        (["--egress", "nowhere", "--", "true"], "--egress"),
        (["--no-such-option", "--", "true"], "no-such-option"),
    ],
)
def test_a_wrong_request_is_2(shared_dir: Path, arguments: list[str], complaint: str) -> None:
    result = isolator(shared_dir, "run", *arguments)
    assert result.returncode == 2, result.stderr
    assert complaint in result.stderr
    assert "Traceback" not in result.stderr


def test_how_it_ended_as_json(shared_dir: Path) -> None:
    result = isolator(shared_dir, "run", "--json", "--", "sh", "-c", "exit 4")
    found = json.loads(result.stderr)
    assert result.returncode == 4
    assert found["exit_code"] == 4
    assert found["signal"] is None
    assert found["cause"] == "exit"
    assert found["oom_kills"] == found["task_denials"] == 0


@pytest.mark.parametrize(("words", "code", "what"), [
    (["--", "nowhere"], 125, "start of run"),
    (["--cpu", "5000%", "--", "true"], 2, "the command line"),
])  # fmt: skip
def test_error_is_json_too(shared_dir: Path, words: list[str], code: int, what: str) -> None:
    result = isolator(shared_dir, "run", "--json", *words)
    error = json.loads(result.stderr)["error"]
    assert (result.returncode, error["exit_code"], error["what"]) == (code, code, what)
    assert error["why"] and error["remedy"]


def test_a_memory_cap_is_kept_and_told(shared_dir: Path) -> None:
    result = isolator(shared_dir, "run", "--memory", "32M", "--", "python3", "-c", "bytearray(300 << 20)")
    assert result.returncode == 128 + signal.SIGKILL
    assert "python3 was ended: out of memory" in result.stderr


def test_a_command_that_hoards_tcp_memory_is_ended(shared_dir: Path) -> None:
    """To it the host's pool looks used: to use it up would end what runs beside this test."""
    main = (
        "from isolator.cage import tcp_memory; from host.cli.main import main;"
        "tcp_memory.is_much_in_use = lambda: True; main()"
    )
    words = [
        sys.executable,
        "-I",
        "-c",
        main,
        "--root",
        str(shared_dir),
        "run",
        "--",
        "python3",
        "-c",
        f"import time\n{HOARD}",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=seconds(120), check=False)
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr == f"isolator: python3 was ended: {CAUSE}\n"


def test_a_task_cap_is_kept(shared_dir: Path) -> None:
    script = "for i in 1 2 3 4 5 6; do sleep 1 & done 2>/dev/null; wait"
    result = isolator(shared_dir, "run", "--tasks", "3", "--json", "--", "bash", "-c", script)
    assert json.loads(result.stderr.splitlines()[-1])["task_denials"] > 0


def test_socket_in_a_shown_folder_can_be_connected_to(shared_dir: Path) -> None:
    """It is what ``explain`` says of ``filesystem.read``; who must not be talked to keeps the socket elsewhere."""
    place = shared_dir / "served"
    place.mkdir()
    program = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(9).decode())"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "sock"))
        listener.listen()
        (place / "sock").chmod(0o666)
        thread = threading.Thread(target=lambda: listener.accept()[0].sendall(b"reached"))
        thread.start()
        command = ["--", "python3", "-c", program, str(place / "sock")]
        result = isolator(shared_dir, "run", "--read", str(place), *command)
        thread.join(seconds(30))
    assert result.stdout.strip() == "reached", result


def test_only_what_is_named_can_be_read(shared_dir: Path) -> None:
    named, other = shared_dir / "named", shared_dir / "other"
    for folder in (named, other):
        folder.mkdir()
        (folder / "file").write_text("content\n")
    script = f"cat {named}/file; ls {other}; touch {named}/new; pwd"
    result = isolator(shared_dir, "run", "--read", str(named), "--", "sh", "-c", script)
    assert result.stdout == "content\n/\n"
    assert "other': No such file" in result.stderr
    assert "Read-only file system" in result.stderr


def test_a_read_path_behind_a_link_is_refused(shared_dir: Path) -> None:
    (shared_dir / "link").symlink_to("/root")
    result = isolator(shared_dir, "run", "--read", str(shared_dir / "link"), "--", "true")
    assert result.returncode in (2, 125)
    assert "symbolic link" in result.stderr


def test_arguments_may_be_as_long_as_the_kernel_takes(shared_dir: Path) -> None:
    words = [str(number) for number in range(60_000)]
    result = isolator(shared_dir, "run", "--", "sh", "-c", 'echo $# "$1"', "sh", *words, "x" * 100_000)
    assert (result.returncode, result.stdout) == (0, "60001 0\n"), result.stderr


def test_hundreds_of_paths_can_be_read_with_few_open_files(shared_dir: Path) -> None:
    """More than one packet holds of descriptors, than a shell allows, and than the cage may have open at once."""
    paths = [shared_dir / f"a/b/{number}" for number in range(700)]
    for path in paths:
        path.mkdir(parents=True)
        (path / "file").write_text(f"{path.name}\n")
    policy = shared_dir / "policy.toml"
    policy.write_text("[limits]\nnofile = 16\n")
    flags = [word for path in paths for word in ("--read", str(path))]
    result = subprocess.run(
        ["bash", "-c", 'ulimit -Sn 1024; exec "$@"', "bash", *COMMAND, "--root", str(shared_dir), "run",
         "--policy", str(policy), *flags, "--", "sh", "-c", f"cat {shared_dir}/a/b/*/file | wc -l"],
        capture_output=True, text=True, check=False, timeout=seconds(60),
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "700\n"), result.stderr


def test_variables_come_from_options_and_files_and_never_from_the_command_line_of_ps(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASSED", "from here")
    monkeypatch.setenv("NOT_NAMED", "stays")
    file = shared_dir / "env"
    file.write_text('# secrets\n\nTOKEN=s3cret = "quoted"\nLANG=C\nPASSED\nWINS=file\n')
    file.chmod(0o600)
    flags = ["--env-file", str(file), "--env", "WINS=option", "--env", "EMPTY="]
    with _running(shared_dir, *flags, "--", "sh", "-c", "env; echo ready; read end", stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        shown = dict(line.rstrip("\n").split("=", 1) for line in iter(process.stdout.readline, "ready\n"))
        lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in [process.pid, *caged(shared_dir)]]
        process.communicate("end\n", timeout=seconds(20))
    wanted = {"TOKEN": 's3cret = "quoted"', "LANG": "C", "PASSED": "from here", "WINS": "option", "EMPTY": ""}
    assert shown.items() >= wanted.items()
    assert "NOT_NAMED" not in shown
    assert not any(b"s3cret" in line for line in lines)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--env", "SURELY_NOT_SET"], "--env SURELY_NOT_SET: is not set here"),
        (["--env-file", "/no/such/file"], "--env-file /no/such/file: No such file"),
        (["--env-file", "{root}/bad"], "{root}/bad:2: is no NAME=VALUE"),
    ],
)
def test_a_wrong_variable_is_explained_without_its_value(shared_dir: Path, flags: list[str], complaint: str) -> None:
    (shared_dir / "bad").write_text("GOOD=1\nsecret words=2\n")
    result = isolator(shared_dir, "run", *(flag.format(root=shared_dir) for flag in flags), "--", "true")
    assert result.returncode == 2
    assert complaint.format(root=shared_dir) in result.stderr
    assert "secret" not in result.stderr


def test_folder_to_start_in_size_of_tmp_and_open_files(shared_dir: Path) -> None:
    script = "pwd; ulimit -n; df -k --output=size /tmp | tail -1"
    flags = ["--read", str(shared_dir), "--cwd", str(shared_dir), "--tmp", "3M", "--nofile", "77"]
    result = isolator(shared_dir, "run", *flags, "--", "bash", "-c", script)
    assert result.stdout.split() == [str(shared_dir), "77", "3072"], result.stderr


def test_a_folder_to_start_in_that_the_cage_does_not_see(shared_dir: Path) -> None:
    result = isolator(shared_dir, "run", "--cwd", str(shared_dir), "--", "true")
    assert result.returncode == 125
    assert f"working directory: {shared_dir}: No such file or directory; only folders that the cage" in result.stderr


def test_what_a_policy_file_cannot_mean_here_is_said(shared_dir: Path) -> None:
    policy = shared_dir / "policy.toml"
    policy.write_text('[filesystem]\nstate = "16M"\n')
    result = isolator(shared_dir, "run", "--policy", str(policy), "--", "true")
    assert result.returncode == 0
    assert result.stderr.startswith(f"isolator: note: {policy}: filesystem.state has no effect: ")
    assert result.stderr.count("\n") == 1


def test_denials_are_shown(shared_dir: Path) -> None:
    code = "import socket, ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0); socket.create_connection(('192.0.2.1', 80))"
    result = isolator(shared_dir, "run", "--", "python3", "-c", code)
    assert result.returncode == 1
    assert "isolator: denied: system call ptrace" in result.stderr
    assert "isolator: denied: connection to 192.0.2.1:80" in result.stderr


def test_records_go_to_a_file(shared_dir: Path) -> None:
    code = "import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)"
    log = shared_dir / "records"
    result = isolator(shared_dir, "run", "--audit", str(log), "--", "python3", "-c", code)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["type"] for record in records][::2] == ["plugin.started", "plugin.stopped"]
    assert {record["data"].get("call") for record in records} >= {"ptrace"}
    assert result.stderr == ""


def test_nothing_of_the_caller_comes_along(shared_dir: Path) -> None:
    """Its umask, its folder, its groups, its descriptors, its environment, what signals it ignores."""
    script = (
        "umask; pwd; id -G; ls /proc/self/fd | wc -l; env | grep -c LEAK; "
        "awk '/core file/ {print $5}' /proc/self/limits; "
        "grep -E '^(SigIgn|Groups)' /proc/self/status | tr -d '[:space:]'"
    )
    read, write = os.pipe()
    try:
        done = subprocess.run(
            ["env", "--ignore-signal=USR1", "--ignore-signal=HUP", *COMMAND, "--root", str(shared_dir), "run", "--",
             "sh", "-c", script],
            umask=0, cwd="/tmp", extra_groups=[4, 24, 27], pass_fds=[read, write], capture_output=True, text=True,
            check=False, timeout=60, env={**os.environ, "LEAK": "1"},
        )  # fmt: skip
    finally:
        os.close(read)
        os.close(write)
    uid = done.stdout.split()[2] if len(done.stdout.split()) > 2 else ""
    *found, signals = done.stdout.split()
    assert found == ["0022", "/", uid, "4", "0", "1"], (done.stdout, done.stderr)
    assert not int(signals.removeprefix("Groups:SigIgn:"), 16) & ~0x180000000  # which the C library keeps for itself
    assert 70000 <= int(uid) < 75000


def test_it_says_that_it_needs_root(shared_dir: Path) -> None:
    result = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", *COMMAND, "run", "--", "true"],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert result.returncode == 125
    assert result.stderr == (
        "isolator: isolator run: building a cage needs root, or a daemon at /run/isolator/run.sock; "
        "use sudo, or have the daemon started with your uid in [roles] runner of host.toml\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on(shared_dir: Path, number: signal.Signals) -> None:
    script = f"trap 'echo caught; exit 9' {number}; echo ready; while :; do sleep 0.05; done"
    with _running(shared_dir, "--", "bash", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=20)[0] == "caught\n"
        assert process.returncode == 9


def test_nothing_survives_a_killed_run(shared_dir: Path) -> None:
    """The launcher sees the end of its supervisor and kills the cage's group."""
    with _running(shared_dir, "--", "bash", "-c", "sleep 300 & echo $$; wait") as process:
        assert process.stdout is not None
        process.stdout.readline()
        pids = caged(shared_dir)
        assert len(pids) == 3  # pid 1 of the cage, bash, sleep
        process.kill()
        process.wait()
        _wait_gone(pids)
    _remove(leaves(shared_dir))


def test_nothing_survives_when_the_launcher_is_killed_too(shared_dir: Path) -> None:
    with _running(shared_dir, "--", "bash", "-c", "sleep 300 & echo $$; wait") as process:
        assert process.stdout is not None
        process.stdout.readline()
        pids = caged(shared_dir)
        launcher = next(pid for pid in children(process.pid) if pid not in pids)
        os.kill(process.pid, signal.SIGSTOP)  # so that it cannot take the cage down in an orderly way
        os.kill(launcher, signal.SIGKILL)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _wait_gone(pids)
    _remove(leaves(shared_dir))


def _running(root: Path, *words: str, stdin: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "--root", str(root), "run", *words], stdin=stdin, stdout=subprocess.PIPE, text=True
    )


def _wait_gone(pids: list[int]) -> None:
    import select

    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([fd], [], [], 10)[0], f"process {pid} still runs"
        finally:
            os.close(fd)


def _remove(folders: list[Path]) -> None:
    for top in folders:
        for child in top.iterdir():
            if child.is_dir():
                child.rmdir()
        top.rmdir()


def test_time_zone_is_utc_unless_somebody_sets_it(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = shared_dir / "berlin.toml"
    policy.write_text('[env]\nTZ = "Europe/Berlin"\nGREETING = "hello there"\n')
    show = ("--", "sh", "-c", 'echo "$TZ,$GREETING"')
    monkeypatch.delenv("TZ", raising=False)
    assert isolator(shared_dir, "run", *show).stdout == "UTC,\n"
    assert isolator(shared_dir, "run", "--policy", str(policy), *show).stdout == "Europe/Berlin,hello there\n"
    flag = isolator(shared_dir, "run", "--policy", str(policy), "--env", "TZ=Asia/Tokyo", *show)
    assert flag.stdout == "Asia/Tokyo,hello there\n"
    monkeypatch.setenv("TZ", "America/Lima")
    assert isolator(shared_dir, "run", *show).stdout == "America/Lima,\n"


def test_runtimes_agree_about_the_time_zone(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TZ", raising=False)
    offsets = """date +%z; python3 -c 'import time; print(time.strftime("%z"))'
perl -MPOSIX -e 'print strftime("%z", localtime)'"""
    assert isolator(shared_dir, "run", "--", "sh", "-c", offsets).stdout.split() == ["+0000"] * 3
    tokyo = isolator(shared_dir, "run", "--env", "TZ=Asia/Tokyo", "--", "sh", "-c", offsets)
    assert tokyo.stdout.split() == ["+0900"] * 3


def test_program_that_watches_the_use_of_files_hears_what_to_watch_instead(shared_dir: Path) -> None:
    """Python's watchdog wants every kind of event unless it is given a filter."""
    code = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "watch = lambda mask: libc.inotify_add_watch(libc.inotify_init1(0), b'/tmp', mask) > 0 or ctypes.get_errno()\n"
        "print(watch(0xFFF), watch(0xFFF & ~0x31))\n"
    )
    result = isolator(shared_dir, "run", "--", "python3", "-c", code)
    assert result.stdout == "1 True\n"
    assert "denied: system call inotify_add_watch; in /usr the use of files tells" in result.stderr
    assert "event_filter=[FileModifiedEvent, ...]" in result.stderr


def test_check_says_that_connections_leave_through_a_proxy(shared_dir: Path) -> None:
    settings = shared_dir / "etc/isolator/host.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text('[network]\nproxy = "proxy.example.com:3128"\n')
    shown = isolator(shared_dir, "check").stdout
    assert "Note: Connections leave through the proxy proxy.example.com:3128" in shown
    settings.write_text('[network]\nproxy = "proxy.example.com:3128"\nproxy_resolves = true\n')
    notes = json.loads(isolator(shared_dir, "check", "--json").stdout)["notes"]
    assert len(notes) == 2 and "no longer checked here" in notes[1]
