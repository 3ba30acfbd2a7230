"""The collector reads with the caller's rights and nobody else's, below what was handed over, and root believes none of
it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isolator.errors import IsolatorError, UsageError
from isolator.ipc import folder_stream
from isolator.linux import landlock
from isolator.registration import collecting
from isolator.registration.collecting import Offer, collect
from tests.support.offers import offered
from tests.support.timeouts import seconds

ALICE, BOB, TEAM = 64990, 64991, 64992


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    return folder


@pytest.fixture
def folder(shared_dir: Path) -> Path:
    """A folder of alice's with a file of hers, one of bob's, one for her team and one of root's."""
    place = shared_dir / "folder"
    place.mkdir()
    for name, uid, gid, mode in (
        ("mine", ALICE, ALICE, 0o600), ("bobs", BOB, BOB, 0o600), ("team", BOB, TEAM, 0o640), ("roots", 0, 0, 0o600),
    ):  # fmt: skip
        (place / name).write_text(name)
        os.chown(place / name, uid, gid)
        (place / name).chmod(mode)
    os.chown(place, ALICE, ALICE)
    return place


def attempts(how: str, folder: Path, outside: Path, uid: int = ALICE) -> set[str]:
    command = [sys.executable, "-I", "-m", "tests.collector.taken_over", how, str(uid), str(uid), "", str(folder)]
    return set(subprocess.run([*command, str(outside)], capture_output=True, text=True, check=True).stdout.splitlines())


def test_collector_can_only_read_and_only_below_what_was_handed_over(folder: Path, shared_dir: Path) -> None:
    outside = shared_dir / "outside"
    outside.write_text("")
    os.chown(outside, ALICE, ALICE)
    everything = {
        "read", "read outside", "write", "create", "read of root", "connect", "signal", "fork", "become root", "trace",
        "dumpable True", "still here",
    }  # fmt: skip
    assert attempts("root", folder, outside) == everything
    # With the user's rights and no filter: the user's own, and nothing that is not.
    user = attempts("user", folder, outside)
    assert user == {"read", "read outside", "write", "create", "connect", "dumpable False", "still here"}
    hardened = attempts("hardened", folder, outside)
    try:
        landlock.abi()
    except OSError:  # the second wall is not there: the filter alone
        assert hardened <= {"read", "read outside", "write", "create", "still here"}
    else:
        assert hardened == {"read", "still here"}


def test_file_that_the_caller_may_not_read_is_refused(folder: Path, target: Path) -> None:
    for foreign in ("bobs", "roots", "team"):
        with pytest.raises(UsageError, match=r"folder/(bobs|roots|team): uid 64990 may not read it"):
            collect(offered(folder, uid=ALICE, gid=ALICE), target, str(folder))
        (folder / foreign).unlink()
        clear(target)
    (folder / "team").write_text("team")
    os.chown(folder / "team", BOB, TEAM)
    (folder / "team").chmod(0o640)
    collect(offered(folder, uid=ALICE, gid=ALICE, groups=(TEAM,)), target, str(folder))
    copied = {path.name: (path.read_text(), path.stat().st_uid) for path in target.iterdir()}
    assert copied == {"mine": ("mine", 0), "team": ("team", 0)}


def test_root_reads_what_only_others_may(folder: Path, target: Path) -> None:
    assert collect(offered(folder), target, str(folder)).digest
    assert {path.name for path in target.iterdir()} == {"mine", "bobs", "team", "roots"}


def test_peer_of_a_connection_is_whose_rights_count(folder: Path, target: Path, shared_dir: Path) -> None:
    """The kernel's word for uid, gid and groups, of a process that has dropped root's."""
    path = str(shared_dir / "sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        os.chmod(path, 0o666)
        listener.listen(1)
        child = os.fork()
        if child == 0:
            os.setgroups([TEAM, 4, 24])
            os.setresgid(ALICE, ALICE, ALICE)
            os.setresuid(ALICE, ALICE, ALICE)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
            os._exit(0)
        connection, _ = listener.accept()
        os.waitpid(child, 0)
    offer = Offer.of_peer(connection)
    assert (offer.uid, offer.gid, sorted(offer.groups)) == (ALICE, ALICE, [4, 24, TEAM])
    offer.close()


def test_descriptor_that_proves_no_right_to_read_is_refused(folder: Path, target: Path) -> None:
    for flags in (os.O_PATH, os.O_WRONLY):
        with pytest.raises(UsageError, match="open for reading"):
            collect(offered(folder / "roots", flags=flags, uid=ALICE, gid=ALICE), target, "it")


def test_single_file_is_named_and_not_copied(folder: Path, target: Path) -> None:
    found = collect(offered(folder / "mine", uid=ALICE, gid=ALICE), target, "it")
    info = (folder / "mine").stat()
    assert (found.digest, found.single) == ("", (info.st_dev, info.st_ino))
    assert not list(target.iterdir())


@pytest.mark.parametrize("count", [0, 3])
def test_number_of_descriptors_is_bounded(folder: Path, target: Path, count: int) -> None:
    with pytest.raises(UsageError, match="nothing was handed over"):
        collect(offered(*[folder] * count), target, "it")


def test_descriptor_of_another_kind_is_refused(tmp_path: Path, target: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="neither a folder nor a regular file"):
        collect(offered(tmp_path / "fifo"), target, "it")


def test_file_that_becomes_a_fifo_holds_nobody_up(folder: Path, target: Path) -> None:
    """Exchanged between the look at it and the opening, again and again: refused or copied, never waited for."""
    over = threading.Event()

    def exchange() -> None:
        while not over.is_set():
            os.mkfifo(folder / "new")
            (folder / "new").rename(folder / "mine")
            (folder / "new").write_text("mine")
            (folder / "new").rename(folder / "mine")

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(10):
            with contextlib.suppress(UsageError):
                collect(offered(folder), target, "it")
            clear(target)
    finally:
        over.set()
        thread.join()


def test_stopped_collector_is_given_up(folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller may stop or kill the process that has its uid: that is an error, and nobody waits for ever."""
    real = collecting._start

    def stopped(offer: Offer, *, packages: bool) -> subprocess.Popen[bytes]:
        process = real(offer, packages=packages)
        process.send_signal(signal.SIGSTOP)
        return process

    monkeypatch.setattr(collecting, "_start", stopped)
    monkeypatch.setattr(collecting, "_SECONDS", 0.2)
    with pytest.raises(IsolatorError, match="was not read within"):
        collect(offered(folder), target, "it")

    def killed(offer: Offer, *, packages: bool) -> subprocess.Popen[bytes]:
        process = real(offer, packages=packages)
        process.kill()
        return process

    monkeypatch.setattr(collecting, "_start", killed)
    monkeypatch.setattr(collecting, "_SECONDS", seconds(30))
    with pytest.raises(IsolatorError, match="the collector ended"):
        collect(offered(folder), target, "it")


# --- a collector that was taken over, as root sees it ----------------------------------------------------------------


def text(data: bytes) -> bytes:
    return struct.pack("=I", len(data)) + data


def a_file(name: bytes, *chunks: bytes) -> bytes:
    return b"f" + text(name) + struct.pack("=?q", False, 0) + b"".join(map(text, (*chunks, b"")))


LIES: dict[str, bytes] = {
    "nothing": b"",
    "unknown letter": b"?",
    "name up": a_file(b"..", b"x"),
    "name here": a_file(b".", b"x"),
    "name with a path": a_file(b"../../evil", b"x"),
    "absolute name": a_file(b"/etc/evil", b"x"),
    "empty name": a_file(b"", b"x"),
    "name with a zero": a_file(b"a\0b", b"x"),
    "long name": a_file(b"a" * 5000, b"x"),
    "name that is too long for a disk": a_file(b"a" * 300, b"x"),
    "folder up": b"d" + text(b"..") + a_file(b"evil", b"x"),
    "leaves more than it entered": b"u" + a_file(b"evil", b"x") + b".",
    "ends inside": b"d" + text(b"a") + b".",
    "the same name twice": a_file(b"a", b"x") + a_file(b"a", b"y") + b".",
    "file through a link": b"l" + text(b"a") + text(b"b") + a_file(b"a", b"x") + b".",
    "folder through a link": b"d" + text(b"b") + b"u" + b"l" + text(b"a") + text(b"b") + b"d" + text(b"a") + b"u.",
    "link out": b"l" + text(b"a") + text(b"../../etc") + b".",
    "absolute link": b"l" + text(b"a") + text(b"/etc/shadow") + b".",
    "long chunk": b"f" + text(b"a") + struct.pack("=?q", False, 0) + struct.pack("=I", 1 << 30),
    "deep": b"".join(b"d" + text(b"a") for _ in range(100)),
    "many": b"".join(a_file(b"%d" % number) for number in range(60)),
    "time that no disk has": b"f" + text(b"a") + struct.pack("=?q", False, 1 << 62) + text(b"") + b"!",
    "error that is no text": b"e" + text(b"\xff\x1b[2J") + text(b"\n<0>kernel") + text(b"\0"),
    "package behind a file": b"f" + text(b"a") + struct.pack("=?q", False, 0) + struct.pack("=I", 0) * 2 + b"p.",
    "many signatures": (b"g" + text(b"x" * 64)) * 9 + b".",
    "garbage": bytes(range(256)) * 100,
}


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[bytes], None]]:
    def say(answer: bytes) -> None:
        path = tmp_path / "answer"
        path.write_bytes(answer)

        def start(offer: Offer, *, packages: bool) -> subprocess.Popen[bytes]:
            offer.close()
            return subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE)

        monkeypatch.setattr(collecting, "_start", start)

    yield say


@pytest.mark.parametrize("kind", LIES)
def test_lie_of_a_collector_is_refused_and_leads_nowhere(
    kind: str, says: Callable[[bytes], None], target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_stream, "MAX_FILES", 50)
    says(LIES[kind])
    before = sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(target))
    with pytest.raises((IsolatorError, OSError)) as caught:
        collect(offered(tmp_path), target, "it")
    assert str(caught.value).isprintable()
    assert sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(target)) == before


def test_copy_of_a_collector_that_never_ends_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, says: Callable[[bytes], None], target: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(folder_stream, "MAX_BYTES", 1 << 20)
    says(b"f" + text(b"a") + struct.pack("=?q", False, 0) + text(b"x" * 65536) * 100)
    with pytest.raises(UsageError, match="more than 1 MiB"):
        collect(offered(tmp_path), target, "it")
    assert (target / "a").stat().st_size <= 1 << 20


def test_closing_an_offer_waits_for_nobody() -> None:
    """A descriptor whose last reference takes its time to close: a TCP socket that lingers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with socket.create_connection(server.getsockname()) as slow, theirs:
            peer, _ = server.accept()
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
            slow.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    slow.send(b"x" * 65536)
            socket.send_fds(theirs, [b"\0"], [slow.fileno()])
        Offer(ours, 0, 0, ()).close()
        closing = [thread for thread in threading.enumerate() if thread.name == "close"]
        assert closing, "nothing lingers: the test shows nothing"
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()  # a reset: nothing to wait for any more
        for thread in closing:
            thread.join(seconds(30))
            assert not thread.is_alive()


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
