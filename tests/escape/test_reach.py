"""Calls that need no right and would reach past the cage do not, seen from the host's side."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.recovery.journal import Journal
from isolator.volume.volume import Volume
from tests.support.cage_fixture import isolator
from tests.system.daemon import wait_for

pytestmark = pytest.mark.vm


@pytest.fixture
def elsewhere(shared_dir: Path) -> Iterator[Path]:
    """A file system of the host that no cage sees, on a device of its own."""
    with contextlib.closing(Journal(shared_dir / "run/journal")) as journal:
        state = Volume(shared_dir / "elsewhere", "elsewhere", journal)
        os.close(state.open(size=1 << 20, inodes=64, uid=0, gid=0))
        yield shared_dir / "elsewhere/elsewhere/mnt/state"
        state.remove()


@contextlib.contextmanager
def _setting(path: str, value: str) -> Iterator[None]:
    """One setting for the whole host, which has its old value again as soon as possible."""
    file = Path(path)
    before = file.read_text()
    file.write_text(value)
    try:
        yield
    finally:
        file.write_text(before)


def _waits(file: Path) -> bool:
    """Whether the data of a file still waits for its place on the disk: ext4 gives it one when it writes it."""
    listing = subprocess.run(["filefrag", "-v", file], capture_output=True, text=True, check=True).stdout
    return "delalloc" in listing


def test_sync_in_a_cage_flushes_no_file_of_the_host(shared_dir: Path, elsewhere: Path) -> None:
    file = elsewhere / "file"
    assert any(_waits_after_a_sync(shared_dir, file) for _ in range(5)), "a cage made the host write another's data"
    os.sync()
    assert not _waits(file), "nothing was waiting to be written: the test cannot fail"


def _waits_after_a_sync(root: Path, file: Path) -> bool:
    """Have a cage call sync(2). Others on this machine may, too; but not each time."""
    with _setting("/proc/sys/vm/dirty_writeback_centisecs", "100000"):  # nor does the kernel by itself
        file.unlink(missing_ok=True)  # a file that is emptied and written anew is not kept waiting
        file.write_bytes(b"x" * 65536)
        done = isolator(root, "run", "--", "python3", "-c", "import os; os.sync(); print('done')")
        assert done.stdout == "done\n", done.stderr
        assert "denied" not in done.stderr
        return _waits(file)


WATCHES = """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    watcher = libc.inotify_init1(0)
    watch = lambda mask: libc.inotify_add_watch(watcher, b"/tmp", mask) > 0
    # What tail -f, Node's fs.watch and Go's fsnotify ask for.
    assert watch(0x2 | 0x4 | 0x400 | 0x800)
    assert watch(0x4 | 0x100 | 0x2 | 0x200 | 0x400 | 0x800 | 0x40 | 0x80)
    assert watch(0x8 | 0x1000000)
    assert not watch(0xFFF) and ctypes.get_errno() == 1
    open("/tmp/file", "w").close()
    assert os.read(watcher, 4096)
    print("fine")
"""


def test_changes_of_files_can_be_watched(shared_dir: Path) -> None:
    done = isolator(shared_dir, "run", "--", "python3", "-c", textwrap.dedent(WATCHES))
    assert done.stdout == "fine\n", done.stderr


def test_a_program_that_forbids_core_dumps_runs(shared_dir: Path) -> None:
    """It succeeds, and the limit stays where it is: also what insists goes on."""
    done = isolator(shared_dir, "run", "--", "bash", "-ec", "ulimit -c 0; ulimit -n 100; ulimit -n; echo fine")
    assert done.stdout == "100\nfine\n", done.stderr
    code = "import resource as r; print(r.getrlimit(r.RLIMIT_CORE)); r.prlimit(0, r.RLIMIT_CORE, (0, 0))"
    insists = isolator(shared_dir, "run", "--", "python3", "-c", code)
    assert insists.stdout == "(1, 1)\n" and "ValueError" in insists.stderr, "a value before it would be made up"


def test_a_crash_starts_nothing_on_the_host(shared_dir: Path) -> None:
    """With a ``core_pattern`` that names a program, which is one setting for the whole host: put back at once."""
    trace, helper = shared_dir / "trace", shared_dir / "helper"
    helper.write_text(f"#!/bin/sh\necho $1 >> {trace}\ncat > /dev/null\n")
    helper.chmod(0o755)
    with _setting("/proc/sys/kernel/core_pattern", f"|{helper} %u"):
        crashed = isolator(shared_dir, "run", "--", "python3", "-c", "import os; os.abort()")
        assert crashed.returncode == 134, crashed.stderr
        # A crash after it, outside, with a limit of 0: the kernel starts helpers one after the other.
        subprocess.run(["sh", "-c", "ulimit -c 0; kill -ABRT $$"], check=False, user=64123, group=64123)
        started = wait_for(lambda: trace.exists() and (uids := trace.read_text().split()) and "64123" in uids and uids)
        assert not [uid for uid in started if 70000 <= int(uid) < 75000], "a crash in a cage started a program as root"


def test_lock_in_a_cage_reaches_a_file_of_the_host_as_the_readme_says(shared_dir: Path) -> None:
    """A limit, not a promise: a read-only bind shows the host's own inode. Files that no cage sees are out of reach."""
    assert (
        "A file of `/usr` that a cage sees is the host's own" in (Path(__file__).parents[2] / "README.md").read_text()
    )
    program = """
        import fcntl, os, sys
        file = os.open("/usr/bin/env", os.O_RDONLY)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print("locked", flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        ["isolator", "--root", shared_dir, "run", "--", "python3", "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as cage:  # fmt: skip
        assert cage.stdin is not None and cage.stdout is not None
        assert cage.stdout.readline() == "locked\n"
        with Path("/usr/bin/env").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        cage.stdin.close()
        cage.wait()
    with Path("/usr/bin/env").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


LABELS = """
    import errno, socket, struct
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(socket.AF_INET6, kind) as sock:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            request = struct.pack("=16sIBBHHHI", bytes(15) + bytes([1]), 0, 0, 255, 1, 6, 6, 0)
            try:
                sock.setsockopt(socket.IPPROTO_IPV6, 32, request)  # IPV6_FLOWLABEL_MGR
                print("leased")
            except OSError as error:
                assert error.errno == errno.EPERM, error
    print("fine")
"""


def test_cage_leases_no_flow_label_of_the_hosts(shared_dir: Path) -> None:
    done = isolator(shared_dir, "run", "--", "python3", "-c", textwrap.dedent(LABELS))
    assert done.stdout == "fine\n", done.stderr


UNCOUNTED = """
    import errno, socket, struct
    refused = ((socket.AF_INET6, 41, 6), (socket.AF_INET, 6, 14), (socket.AF_INET, 6, 32), (socket.AF_INET, 6, 38),
               (socket.AF_INET, 1, 26), (socket.AF_INET, 1, 51), (socket.AF_INET, 1, 37), (socket.AF_INET, 1, 65))
    for family, level, option in refused:
        try:
            socket.socket(family).setsockopt(level, option, bytes(216))
            print(level, option, "is set")
        except OSError as error:
            assert error.errno == errno.EPERM, (level, option, error)
    old, new = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    for sock, level, option in ((old, 0, 11), (new, 41, 25)):  # RECVERR
        sock.setsockopt(level, option, 1)
        assert sock.getsockopt(level, option) == 0
    group = socket.inet_pton(socket.AF_INET6, "ff02::fb")
    new.setsockopt(41, socket.IPV6_JOIN_GROUP, group + struct.pack("=I", 1))
    new.setsockopt(41, 42, struct.pack("=IIHHI", 1, 0, socket.AF_INET6, 0, 0) + group + bytes(112))  # MCAST_JOIN_GROUP
    assert group.hex() not in open("/proc/self/net/igmp6").read()
    old.setsockopt(0, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("224.0.0.251") + socket.inet_aton("127.0.0.1"))
    print("fine")
"""


def test_sockets_of_a_cage_keep_no_memory_that_no_cap_counts(shared_dir: Path) -> None:
    done = isolator(shared_dir, "run", "--", "python3", "-c", textwrap.dedent(UNCOUNTED))
    assert done.stdout == "fine\n", done.stderr
