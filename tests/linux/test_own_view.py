"""Descriptors of another mount namespace, found again in a service's own view, and refused where that is another file.

The service of these tests sees the same places as the caller, read-only, as under ``ProtectHome=read-only``.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.timeouts import seconds

# In a mount namespace of its own: prepares its view, then answers for each descriptor that it is sent.
SERVICE = """
import array, errno, json, os, socket, subprocess, sys
from isolator.linux import mount
from isolator.linux.namespaces import CLONE_NEWNS, unshare
from isolator.linux.own_view import clone_in_own_view
unshare(CLONE_NEWNS)
mount.set_propagation("/", mount.MS_PRIVATE)
subprocess.run(["sh", "-ec", sys.argv[2], "sh", sys.argv[3]], check=True)
sock = socket.socket(fileno=int(sys.argv[1]))
sock.send(b"ready")
while True:
    message, fds, _, _ = socket.recv_fds(sock, 100, 1)
    if not message:
        break
    answer = {}
    try:
        try:
            mount.clone_tree("", directory=fds[0])
            answer["directly"] = "cloned"
        except OSError as error:
            answer["directly"] = errno.errorcode[error.errno]
        tree = clone_in_own_view(fds[0], writable=message == b"write")
        answer["flags"] = os.fstatvfs(tree).f_flag
        try:
            if os.path.isdir(f"/proc/self/fd/{tree}"):
                os.close(os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=tree))
            answer["wrote"] = True
        except OSError as error:
            answer["wrote"] = errno.errorcode[error.errno]
        os.close(tree)
    except OSError as error:
        answer["error"] = errno.errorcode[error.errno]
    os.close(fds[0])
    sock.send(json.dumps(answer).encode())
"""
READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"'


class Service:
    """The other process, with a view of its own; ``ask`` sends it a descriptor."""

    def __init__(self, root: Path, view: str) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(seconds(30))
        words = [sys.executable, "-I", "-c", SERVICE, str(theirs.fileno()), view, str(root)]
        self._process = subprocess.Popen(words, pass_fds=[theirs.fileno()])
        theirs.close()
        assert self._sock.recv(10) == b"ready"

    def ask(self, path: Path | int, how: str = "read", flags: int = os.O_PATH) -> dict[str, Any]:
        fd = path if isinstance(path, int) else os.open(path, flags | os.O_CLOEXEC)
        try:
            socket.send_fds(self._sock, [how.encode()], [fd])
        finally:
            os.close(fd)
        answer: dict[str, Any] = json.loads(self._sock.recv(1000))
        return answer

    def end(self) -> None:
        self._sock.close()
        assert self._process.wait(seconds(30)) == 0


@pytest.fixture
def service(shared_dir: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    (shared_dir / "inner/below").mkdir(parents=True)
    made = Service(shared_dir, getattr(request, "param", READ_ONLY))
    yield made
    made.end()


def test_folder_of_another_namespace_is_found_and_writable_where_the_service_sees_it_read_only(
    service: Service, shared_dir: Path
) -> None:
    read = service.ask(shared_dir / "inner")
    assert read["directly"] == "EINVAL"  # the reason for all this
    assert read["wrote"] == "EROFS"
    write = service.ask(shared_dir / "inner", "write", os.O_RDONLY | os.O_DIRECTORY)
    assert write["wrote"] is True
    assert (shared_dir / "inner/made").exists()
    for answer in (read, write):
        assert answer["flags"] & os.ST_NOSUID
        assert answer["flags"] & os.ST_NODEV


def test_file_is_found_by_the_name_that_it_has_now(service: Service, shared_dir: Path) -> None:
    file, link = shared_dir / "inner/file", shared_dir / "link"
    file.write_text("x")
    link.symlink_to(file)
    fd = os.open(link, os.O_RDONLY)
    file.rename(shared_dir / "inner/renamed")
    file.write_text("another")
    assert "error" not in service.ask(fd)


@pytest.mark.parametrize(
    ("service", "error"),
    [
        (f'{READ_ONLY} && mount -t tmpfs none "$1/inner/below"', "ESTALE"),
        (f'{READ_ONLY} && mount -t tmpfs none "$1/inner"', "ENOENT"),
        ('mount -t tmpfs none "$1" && mkdir -p "$1/inner" && ln -s /etc "$1/inner/below"', "ELOOP"),
    ],
    indirect=["service"],
    ids=["another file system there", "nothing there", "a link there"],
)
@pytest.mark.parametrize("how", ["read", "write"])
def test_folder_that_the_service_does_not_see_is_refused(
    service: Service, shared_dir: Path, error: str, how: str
) -> None:
    assert service.ask(shared_dir / "inner/below", how)["error"] == error


def test_folder_on_a_mount_that_the_service_lacks_is_refused(service: Service, shared_dir: Path) -> None:
    """What lies under it there is another folder of the same name."""
    place = shared_dir / "inner"
    subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], check=True)
    try:
        assert service.ask(place, "write")["error"] == "ESTALE"
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_deleted_file_pipe_and_device_are_refused(service: Service, shared_dir: Path) -> None:
    file = shared_dir / "file"
    file.write_text("x")
    fd = os.open(file, os.O_RDONLY)
    file.unlink()
    file.with_name("file (deleted)").write_text("a decoy")
    assert service.ask(fd)["error"] in ("ENOENT", "ESTALE")
    read, write = os.pipe()
    os.close(write)
    assert service.ask(read)["error"] == "EINVAL"
    assert service.ask(os.memfd_create("memory"))["error"] == "ENOENT"
    assert service.ask(Path("/dev/null"))["error"] == "EINVAL"
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
