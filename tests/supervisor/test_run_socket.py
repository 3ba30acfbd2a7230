"""Root connects to a sidecar's socket, or lends it to the host, only if it is a socket, and its own user's."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isolator.audit.schema import FsDenied
from isolator.errors import DeniedError, UnavailableError
from isolator.supervisor import sidecar_socket
from isolator.supervisor.cage_spec import SOCKET
from isolator.supervisor.sidecar_socket import SidecarSocket
from tests.support.descriptors import open_descriptors, opened_since

PLUGIN, ANOTHER = 64995, 64996
Scene = tuple[SidecarSocket, Path, list[Any]]


@pytest.fixture
def scene(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    records: list[Any] = []
    directory = os.open(shared_dir, os.O_PATH | os.O_DIRECTORY)
    audit: Any = SimpleNamespace(record=lambda record, **_: records.append(record))
    cage: Any = None
    sidecar = SidecarSocket("plugin", "run", cage, (0, 0), audit)
    monkeypatch.setattr(sidecar, "folder", lambda: nullcontext(directory))
    yield sidecar, shared_dir / SOCKET, records
    os.close(directory)


@pytest.mark.parametrize("owner", [0, ANOTHER])
def test_socket_of_another_user_is_refused_and_on_record(scene: Scene, owner: int) -> None:
    sidecar, path, records = scene
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        os.chown(path, owner, owner)
        with pytest.raises(DeniedError, match="was replaced by something else"):
            sidecar.connect(PLUGIN)
        assert [type(record) for record in records] == [FsDenied]
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()  # nobody has come
        os.chown(path, PLUGIN, PLUGIN)
        sidecar.connect(PLUGIN).close()
        listener.accept()[0].close()


def test_file_of_its_own_in_the_sockets_place_is_refused(scene: Scene) -> None:
    sidecar, path, records = scene
    path.write_text("")
    os.chown(path, PLUGIN, PLUGIN)
    with pytest.raises(DeniedError, match="was replaced by something else"):
        sidecar.connect(PLUGIN)
    assert len(records) == 1


# --- a socket file that the host may connect to by itself ----------------------------------------------------------

HOST, OTHER = 64997, 64998


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(8)
    os.chown(path, PLUGIN, PLUGIN)
    path.chmod(0o700)
    return listener


def _lend(sidecar: SidecarSocket, *, alive: bool = True) -> tuple[int, int]:
    return asyncio.run(sidecar.lend(PLUGIN, HOST, lambda: alive))


def _as_user(uid: int, do: Callable[[], object]) -> str:
    """What a process with this user and group, without any other right, gets for an answer."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            do()
            answer = "done"
        except OSError as error:
            answer = errno.errorcode[error.errno or 0]
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as file:
        return file.read()


def _connect(fd: int) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"/proc/self/fd/{fd}")


def test_lent_socket_lets_the_hosts_group_connect_and_nobody_else(scene: Scene) -> None:
    sidecar, path, records = scene
    with _listen(path):
        before = os.open(path, os.O_PATH)
        assert _as_user(HOST, lambda: _connect(before)) == "EACCES", "it was not lent"
        fd, changed = _lend(sidecar)
        assert _as_user(HOST, lambda: _connect(fd)) == "done"
        assert _as_user(OTHER, lambda: _connect(fd)) == "EACCES"
        assert (changed, records) == (os.fstat(fd).st_ctime_ns, [])
        again, unchanged = _lend(sidecar)
        assert unchanged == changed, "what is open to the host is left as it is"
        for one in (before, fd, again):
            os.close(one)


def test_lent_socket_is_good_for_connecting_alone(scene: Scene) -> None:
    sidecar, path, _ = scene
    with _listen(path):
        fd, _ = _lend(sidecar)
        there = f"/proc/self/fd/{fd}"
        tries: dict[str, Callable[[], object]] = {
            "enter": lambda: os.fchdir(fd),
            "leave upwards": lambda: os.open("..", os.O_PATH, dir_fd=fd),
            "open": lambda: os.open(there, os.O_RDWR),
            "open to all": lambda: os.chmod(there, 0o777),
            "give away": lambda: os.chown(there, OTHER, OTHER),
        }
        done = [what for what, do in tries.items() if _as_user(HOST, do) == "done"]
        assert not done
        os.close(fd)


def test_listener_that_is_gone_cannot_be_reached_by_its_lent_file(scene: Scene) -> None:
    sidecar, path, _ = scene
    with _listen(path):
        fd, _ = _lend(sidecar)
    assert _as_user(HOST, lambda: _connect(fd)) == "ECONNREFUSED"
    os.close(fd)


@pytest.mark.parametrize("what", ["a file", "a link", "a socket of another user's"])
def test_what_is_not_the_plugins_socket_is_not_lent_and_not_changed(scene: Scene, what: str) -> None:
    sidecar, path, _ = scene
    other = path.with_name("other")
    with _listen(other):
        os.chown(other, ANOTHER, ANOTHER)
        if what == "a file":
            path.write_text("")
            os.chown(path, PLUGIN, PLUGIN)
        elif what == "a link":
            path.symlink_to(other)
        else:
            other.rename(path)
        before = path.lstat(), path.stat()
        descriptors = open_descriptors()
        with pytest.raises(DeniedError):
            _lend(sidecar)
        assert (path.lstat(), path.stat()) == before
        assert not opened_since(descriptors)


@pytest.mark.parametrize("change", ["rename", "replace", "remove", "shut"])
def test_socket_that_is_changed_while_it_is_lent_is_not(
    scene: Scene, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change comes at the same time as the supervisor's own, so that the file's time may not show it."""
    sidecar, path, _ = scene
    changes: dict[str, Callable[[], object]] = {
        "rename": lambda: path.rename(path.with_name("gone")),
        "replace": lambda: path.with_name("next").rename(path),
        "remove": path.unlink,
        "shut": lambda: path.chmod(0),
    }
    let = sidecar_socket.let_group_write

    def let_and_change(fd: int, gid: int) -> None:
        let(fd, gid)
        changes[change]()

    monkeypatch.setattr(sidecar_socket, "let_group_write", let_and_change)
    with _listen(path), _listen(path.with_name("next")):
        descriptors = open_descriptors()
        if change == "shut":
            fd, _ = _lend(sidecar)
            assert _as_user(HOST, lambda: _connect(fd)) == "EACCES", "it is shut for good, and the host asks"
            os.close(fd)
        else:
            with pytest.raises((UnavailableError, FileNotFoundError)):
                _lend(sidecar)
        assert not opened_since(descriptors)


def test_change_after_a_socket_was_lent_changes_its_time(scene: Scene) -> None:
    sidecar, path, _ = scene
    for change in (
        lambda: path.rename(path.with_name("gone")),
        lambda: path.with_name("next").rename(path),
        path.unlink,
        lambda: path.chmod(0o770),
    ):
        with _listen(path), _listen(path.with_name("next")):
            fd, changed = _lend(sidecar)
            change()  # at once: the file's time has gone on since the supervisor looked
            assert os.fstat(fd).st_ctime_ns != changed
            os.close(fd)
        for left in path.parent.iterdir():
            left.unlink()


def test_run_that_ends_meanwhile_lends_nothing(scene: Scene) -> None:
    sidecar, path, _ = scene
    with _listen(path):
        descriptors = open_descriptors()
        with pytest.raises(UnavailableError):
            _lend(sidecar, alive=False)
        assert not opened_since(descriptors)
