"""Paths of a runner: shown is what its user opened itself; changed, what this user may change; root opens nothing."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.runners.conftest import ALICE, BOB, HOST_TOML, run_as
from tests.runners.raw import request
from tests.system.daemon import Daemon
from tests.system.daemon import daemon as running_daemon
from tests.system.taken_over import TakenOver


def own(path: Path, uid: int, mode: int | None = None, gid: int | None = None) -> Path:
    os.chown(path, uid, uid if gid is None else gid)
    if mode is not None:
        path.chmod(mode)
    return path


def test_folder_is_changed_as_the_callers_own(daemon: TakenOver, home: Path) -> None:
    own(home, ALICE, 0o700)
    private = home / "private"
    private.write_text("private\n")
    own(private, ALICE, 0o600)
    script = "cat private && mkdir -p out/deep && echo made >out/deep/file && echo more >>private && stat -c %u . "
    result = run_as(daemon, ALICE, "--write", str(home), "--cwd", str(home), "--", "sh", "-c", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("private\n7")  # the owner is the cage's user there
    for name in ("out", "out/deep", "out/deep/file"):
        found = (home / name).stat()
        assert (found.st_uid, found.st_gid) == (ALICE, ALICE)
    assert private.read_text() == "private\nmore\n"


def test_file_and_folder_are_read_and_not_changed(daemon: TakenOver, home: Path) -> None:
    (home / "file").write_text("content")
    own(home, ALICE)
    script = f"cat {home}/file; echo x 2>/dev/null >{home}/file; echo x 2>/dev/null >{home}/new; true"
    for shown in (home, home / "file"):
        result = run_as(daemon, ALICE, "--read", str(shown), "--", "sh", "-c", script)
        assert result.stdout == "content", result.stderr
    assert [path.name for path in home.iterdir()] == ["file"]


@pytest.mark.parametrize("option", ["--read", "--write"])
def test_what_the_caller_cannot_open_is_not_opened_for_it(daemon: TakenOver, shared_dir: Path, option: str) -> None:
    closed = shared_dir / "bob"
    (closed / "open").mkdir(parents=True)
    (closed / "open/file").write_text("bob's")
    own(closed / "open", BOB, 0o777)
    own(closed, BOB, 0o700)
    result = run_as(daemon, ALICE, option, str(closed / "open"), "--", "cat", f"{closed}/open/file")
    assert (result.returncode, result.stdout) == (125, "")
    assert f"{option} {closed}/open: Permission denied; name what you may read yourself" in result.stderr
    # Control: its owner can, and the cage sees it.
    assert run_as(daemon, BOB, option, str(closed / "open"), "--", "cat", f"{closed}/open/file").stdout == "bob's"


@pytest.mark.parametrize("target", ["bob/open", "bob/open/file"])
def test_descriptor_that_proves_no_right_to_read_is_refused(daemon: TakenOver, shared_dir: Path, target: str) -> None:
    """An O_PATH descriptor takes the right to search alone; one for writing the right to write alone."""
    folder = shared_dir / "bob/open"
    folder.mkdir(parents=True)
    (folder / "file").write_text("x")
    own(folder / "file", BOB, 0o222)
    own(folder, BOB, 0o711)
    for flags in (os.O_PATH, os.O_WRONLY) if target.endswith("file") else (os.O_PATH,):
        answer = request(daemon.root, ALICE, [("read", str(shared_dir / target))], [(str(shared_dir / target), flags)])
        assert answer["error"] == "denied"
        assert "open for reading" in answer["why"]


def test_descriptor_under_another_name_is_refused(daemon: TakenOver, home: Path, shared_dir: Path) -> None:
    """The name decides about ceilings and about the place in the cage; it cannot be another file's."""
    (home / "mine").write_text("x")
    (shared_dir / "public").mkdir()
    for name, opened in ((shared_dir / "public", home), (home / "mine", Path("/etc/hostname"))):
        answer = request(daemon.root, ALICE, [("read", str(name))], [(str(opened), os.O_RDONLY)])
        assert (answer["error"], answer["why"]) == ("usage", f"is {opened} in truth")
    (home / "link").symlink_to(shared_dir / "public")
    result = run_as(daemon, ALICE, "--read", str(home / "link"), "--", "true")
    assert f"is {shared_dir}/public in truth; name a file or folder by its real path" in result.stderr


@pytest.mark.parametrize("path", ["/tmp/../etc/shadow", "/srv//x", "/srv/./x", "srv", "/srv/", "/proc/1/root/srv", "/"])
def test_other_spellings_of_paths_are_refused(daemon: TakenOver, path: str) -> None:
    answer = request(daemon.root, ALICE, [("read", path)], [("/etc/hostname", os.O_RDONLY)])
    assert answer["error"] == "usage", answer


def test_folder_that_the_caller_may_not_change_is_not_changed_for_it(daemon: TakenOver, shared_dir: Path) -> None:
    theirs = shared_dir / "bob"
    theirs.mkdir()
    own(theirs, BOB, 0o755)
    result = run_as(daemon, ALICE, "--write", str(theirs), "--", "touch", f"{theirs}/made")
    assert result.returncode == 125
    assert f"--write {theirs}: uid {ALICE} may not change it: Permission denied" in result.stderr
    own(theirs, BOB, 0o757)
    assert run_as(daemon, ALICE, "--write", str(theirs), "--", "touch", f"{theirs}/made").returncode == 0
    assert (theirs / "made").stat().st_uid == ALICE


def test_folder_of_roots_is_refused_whoever_may_change_it(daemon: TakenOver, shared_dir: Path) -> None:
    shared = shared_dir / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    result = run_as(daemon, ALICE, "--write", str(shared), "--", "touch", f"{shared}/made")
    assert result.returncode == 125
    assert "it is root's, and nothing in a cage acts as root" in result.stderr
    assert not list(shared.iterdir())


def test_roots_file_in_a_folder_of_the_callers_stays_roots(daemon: TakenOver, home: Path) -> None:
    (home / "root").write_text("root's")
    (home / "root").chmod(0o600)
    script = "cat root 2>/dev/null; echo x 2>/dev/null >>root; chmod 777 root 2>/dev/null; true"
    result = run_as(daemon, ALICE, "--write", str(home), "--cwd", str(home), "--", "sh", "-c", script)
    assert (result.returncode, result.stdout) == (0, "")
    assert (home / "root").read_text() == "root's"
    assert stat.S_IMODE((home / "root").stat().st_mode) == 0o600


def test_set_uid_files_and_devices_below_have_no_effect(daemon: TakenOver, home: Path) -> None:
    subprocess.run(["cp", "/usr/bin/id", str(home / "id")], check=True)
    own(home / "id", BOB, 0o4755)
    os.mknod(home / "device", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    (home / "device").chmod(0o666)
    script = "./id -u; head -c 1 device 2>&1 | grep -c denied; id -u"
    for option in ("--write", "--read"):
        result = run_as(daemon, ALICE, option, str(home), "--cwd", str(home), "--", "sh", "-c", script)
        effective, denied, uid = result.stdout.split()
        assert effective == uid
        assert denied == "1"


def test_mounts_below_a_folder_do_not_come_along(daemon: TakenOver, home: Path) -> None:
    (home / "inner").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(home / "inner")], check=True)
    try:
        (home / "inner/file").write_text("x")
        for option in ("--write", "--read"):
            assert run_as(daemon, ALICE, option, str(home), "--", "ls", f"{home}/inner").stdout == ""
    finally:
        subprocess.run(["umount", str(home / "inner")], check=True)


def test_pipe_device_and_socket_are_no_paths(daemon: TakenOver, home: Path) -> None:
    os.mkfifo(home / "pipe")
    own(home / "pipe", ALICE)
    os.mknod(home / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (home / "device").chmod(0o666)
    for name in ("pipe", "device"):
        result = run_as(daemon, ALICE, "--read", str(home / name), "--", "true")
        assert result.returncode == 125
        assert "is neither a file nor a folder" in result.stderr
    assert run_as(daemon, ALICE, "--write", str(home / "pipe"), "--", "true").returncode == 125


def test_caller_whose_group_is_roots_changes_nothing(daemon: TakenOver, home: Path) -> None:
    answer = request(daemon.root, ALICE, [("write", str(home))], [(str(home), os.O_RDONLY | os.O_DIRECTORY)], gid=0)
    assert "your group is root's" in answer["why"]


class ReadOnlyView(Daemon):
    """A daemon whose own view of /tmp is read-only, as a service's of /home is with ProtectHome=read-only."""

    def command(self) -> list[str]:
        script = 'mount --bind /tmp /tmp; mount --bind "$0" "$0"; mount -o remount,bind,ro /tmp; exec "$@"'
        return ["unshare", "-m", "sh", "-ec", script, str(self.root), *super().command()]


def test_daemon_with_a_read_only_view_of_the_host_serves_paths(home: Path) -> None:
    with running_daemon(host_toml=HOST_TOML, kind=ReadOnlyView) as made:
        script = "echo made >file; cat file"
        result = run_as(made, ALICE, "--write", str(home), "--cwd", str(home), "--", "sh", "-c", script)  # type: ignore[arg-type]
        assert (result.returncode, result.stdout) == (0, "made\n"), result.stderr
        # What only the caller's namespace has, the daemon does not take for the folder of that name in its own.
        (home / "inner").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", str(home / "inner")], check=True)
        try:
            own(home / "inner", ALICE)
            refused = run_as(made, ALICE, "--write", str(home / "inner"), "--", "true")  # type: ignore[arg-type]
        finally:
            subprocess.run(["umount", str(home / "inner")], check=True)
        assert "the daemon sees another file there, or none" in refused.stderr
