"""The leak check itself: each kind of leftover is seen, and a clean run is called clean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.support.leaks import MARKER, HostState, RunLock
from tests.support.timeouts import seconds

pytest_plugins = ["pytester"]

_CONFTEST = Path(__file__).with_name("conftest.py")


def _left(before: HostState) -> dict[str, list[str]]:
    return HostState.read(os.environ[MARKER]).since(before)


def _wait_until_gone(before: HostState, kind: str, text: str) -> None:
    """Another worker's test may have one of its own at this moment."""
    end = time.monotonic() + seconds(5)
    while any(text in name for name in _left(before).get(kind, [])):
        assert time.monotonic() < end, f"{text} is still there"
        time.sleep(0.05)


def test_mount_is_seen(shared_dir: Path) -> None:
    before = HostState.read(os.environ[MARKER])
    target = shared_dir / "mounted"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(target)], check=True)
    try:
        assert any(str(target) in name for name in _left(before)["mounts"])
    finally:
        subprocess.run(["umount", str(target)], check=True)
    _wait_until_gone(before, "mounts", str(target))


def test_loop_device_is_seen(shared_dir: Path) -> None:
    before = HostState.read(os.environ[MARKER])
    image = shared_dir / "image"
    image.write_bytes(bytes(1 << 20))
    device = subprocess.run(
        ["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        assert any(str(image) in name for name in _left(before)["loops"])
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    _wait_until_gone(before, "loops", str(image))


def test_process_is_seen_even_when_its_parent_is_gone() -> None:
    before = HostState.read(os.environ[MARKER])
    shell = subprocess.run(
        ["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"], check=True, capture_output=True, text=True
    )
    pid = int(shell.stdout)
    pidfd = os.pidfd_open(pid)
    try:
        assert any(name.startswith(f"{pid} ") for name in _left(before)["processes"])
        assert any("pidfd" in name for name in _left(before)["descriptors"])
    finally:
        os.kill(pid, 9)
        os.close(pidfd)
    _wait_until_gone(before, "processes", f"{pid} ")


def _inner_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, test: str, *options: str
) -> pytest.RunResult:
    """Run ``test`` under this suite's own ``conftest.py``."""
    # The inner run gets a lock of its own: it must not count as a run that overlaps with this one.
    conftest = _CONFTEST.read_text().replace("RunLock()", "RunLock('lock')")
    conftest = conftest.replace("_PATIENCE = seconds(15)", "_PATIENCE = 0.5")
    pytester.makeconftest(conftest)
    pytester.makepyfile(textwrap.dedent(test))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        monkeypatch.delenv(name)
    return pytester.run(
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null", *options, str(pytester.path)
    )


def test_run_that_leaks_fails(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A passing test that leaves a process behind makes the whole run fail, by name."""
    result = _inner_run(
        pytester,
        monkeypatch,
        """
        import subprocess
        from pathlib import Path

        def test_leaks():
            process = subprocess.Popen(["sleep", "60"])
            process.returncode = 0  # nobody will wait for it
            Path("pid").write_text(str(process.pid))
        """,
    )
    try:
        assert result.ret == 10
        result.stdout.fnmatch_lines(["*1 passed*"])
        result.stdout.fnmatch_lines(["*LEAKS*", "processes: * sleep 60"])
    finally:
        os.kill(int((pytester.path / "pid").read_text()), 9)


def test_run_one_of_whose_processes_dies_fails_and_ends(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its status is not that of failed tests, which would be run once more alone, and the rest of its work never."""
    result = _inner_run(
        pytester,
        monkeypatch,
        """
        import os
        import signal

        def test_dies():
            os.kill(os.getpid(), signal.SIGKILL)

        def test_not_run():
            pass
        """,
        *("-n", "2", "--dist", "loadfile", "--max-worker-restart", "0"),
    )
    assert result.ret == 11
    result.stdout.fnmatch_lines(["*LOST*", "gw*: Not properly terminated"])


@pytest.mark.wide
def test_run_that_is_ended_lets_its_processes_clean_up(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than the ten seconds that pytest-xdist gives them by itself; as a shell runs it in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    result = _inner_run(
        pytester,
        monkeypatch,
        """
        import os, pytest, signal, time
        from pathlib import Path

        @pytest.fixture
        def daemon():
            yield
            time.sleep(12)
            Path("cleaned").touch()

        def test_takes_too_long(daemon):
            os.kill(os.getppid(), signal.SIGTERM)
            signal.pause()
        """,
        *("-n", "1", "--leaks", "off"),
    )
    signal.signal(signal.SIGINT, before)
    assert result.ret == 2
    assert (pytester.path / "cleaned").exists()


def test_a_run_knows_whether_it_was_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    first = RunLock(path)
    assert first.alone()
    second = RunLock(path)
    assert not first.alone()
    assert not second.alone()
    first.close()
    second.close()
    third = RunLock(path)
    assert third.alone()
    third.close()
