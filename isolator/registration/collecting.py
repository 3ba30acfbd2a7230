"""Copies of what a caller offers: a collector reads it with the caller's rights, and root owns the copy from its first
byte.

Root opens nothing of the caller's, follows nothing and waits for nobody: a process that has become the caller
(``isolator/collector/``) writes what it can read to a pipe. Whatever comes out of it is bounded in size, number, depth
and time, and creates names in a new folder only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import socket
import subprocess
import sys
import threading
from pathlib import Path

from isolator.base.lean import sha256_of_much
from isolator.base.structs import field, struct_class
from isolator.errors import IsolatorError, UsageError, translated
from isolator.ipc import folder_stream as stream
from isolator.linux.descriptors import owning
from isolator.linux.files import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, openat2
from isolator.linux.peer import peer_groups, peer_ids

PACKAGE = "package"
"""Name of a package's copy in its folder, until it is unpacked."""
_MODULE = "isolator.collector.service"
"""Named, never imported."""
_SECONDS = 110.0
"""Patience with one copy; the host waits a little longer."""
MOST_GROUPS = 4096
_MOST_SIGNATURES = 8


@struct_class(frozen=True)
class Offer:
    """A connection over which a caller handed over a folder, a file or both, and whose rights they are read with.

    ``collect`` closes the connection; so does ``close``.
    """

    connection: socket.socket
    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def of_peer(cls, connection: socket.socket) -> Offer:
        """The offer of the process that connected; raises UsageError when it is in too many groups."""
        _, uid, gid = peer_ids(connection)
        with translated(OSError, UsageError, f"uid {uid}", "", "ask as another user"):
            groups = tuple(peer_groups(connection, most=MOST_GROUPS))
        return cls(connection, uid, gid, groups)

    @classmethod
    def of_owner(cls, folder: int) -> Offer:
        """An offer of a folder or package that root has opened, to be read with the rights of its owner."""
        info = os.fstat(folder)
        gid: int = info.st_gid
        groups: tuple[int, ...] = ()
        with contextlib.suppress(KeyError):
            user = pwd.getpwuid(info.st_uid)
            gid, groups = user.pw_gid, tuple(os.getgrouplist(user.pw_name, user.pw_gid))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            socket.send_fds(theirs, [b"\0"], [folder])
        return cls(ours, info.st_uid, gid, groups)

    def close(self) -> None:
        """Drop the offer; idempotent."""
        close_apart(self.connection)


def close_apart(connection: socket.socket) -> None:
    """Close a connection in a thread of its own; idempotent.

    Closing the last reference to a descriptor that waits in it may take as long as its sender likes (socket(7),
    SO_LINGER), whoever closes it.
    """
    fd = connection.detach()
    if fd >= 0:
        threading.Thread(target=os.close, args=(fd,), name="close", daemon=True).start()


@struct_class(frozen=True)
class Collected:
    """Content of an offer: the digest of the copied folder, and identity of the single file; empty or None: not there.

    The digest is the SHA-256 over names, modes and contents.
    """

    digest: str = ""
    single: tuple[int, int] | None = None
    files: int = 0
    size: int = 0
    """Bytes of what was copied."""
    packaged: bool = False
    """A package came, which is ``PACKAGE`` in the target now; nothing of it was read."""
    signatures: tuple[bytes, ...] = ()
    """As they came, unchecked."""


def collect(offer: Offer, target: Path, shown: str, *, packages: bool = False) -> Collected:
    """Copy an offered folder into ``target``, an empty folder; ``shown`` is its name in errors.

    With ``packages`` a regular file by itself is a package, and copied as it is. Raises UsageError for what cannot be
    copied, IsolatorError when the collector fails.
    """
    return receive(_start(offer, packages=packages), target, shown)


def receive(process: subprocess.Popen[bytes], target: Path, shown: str, *, by: str = "collector") -> Collected:
    """Make the copy that a process writes to its standard output, and end it; raises as ``collect``.

    ``by`` is what errors call that process.
    """
    assert process.stdout is not None
    try:
        with owning(os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as root:
            return _Copy(stream.FolderReader(process.stdout.fileno(), _SECONDS), shown).whole(root)
    except EOFError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        why = f"was not read to its end: the {by} ended ({process.returncode})"
        raise IsolatorError(shown, why, "run the command again") from None
    except (ValueError, OverflowError):
        raise IsolatorError(shown, f"was not read: its {by} made no sense", "run 'isolator check'") from None
    except TimeoutError:
        raise IsolatorError(shown, f"was not read within {_SECONDS:g} s", "run the command again") from None
    finally:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # in a file system that hangs: the next start reaps it
            process.wait(5)
        process.stdout.close()


def _start(offer: Offer, *, packages: bool) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [
                sys.executable, "-I", "-m", _MODULE, str(offer.uid), str(offer.gid),
                ",".join(map(str, offer.groups)), "package" if packages else "identity",
            ],
            stdin=offer.connection.fileno(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
            start_new_session=True, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
        )  # fmt: skip
    finally:
        offer.close()


@struct_class()
class _Copy:
    """One bounded copy of a stranger's folder."""

    reader: stream.FolderReader
    shown: str
    files: int = 0
    size: int = 0
    digest: stream.FolderDigest = field(default_factory=stream.FolderDigest)
    links: list[tuple[str, str]] = field(default_factory=list)

    def whole(self, root: int) -> Collected:
        """Read the stream to its end."""
        single, packaged = None, False
        end = self._folder(root, "", 0)
        if end == stream.SINGLE:
            single, end = self.reader.identity(), self.reader.kind()
        elif end == stream.PACKAGE and not self.files:
            self._content(root, PACKAGE, 0, executable=False)
            packaged, end = True, self.reader.kind()
        signatures: list[bytes] = []
        while end == stream.SIGNATURE and len(signatures) < _MOST_SIGNATURES:
            signatures.append(self.reader.text())
            end = self.reader.kind()
        if end != stream.END:
            raise ValueError("no end")
        for path, goal in self.links:
            self._check_link(root, path, goal)
        return Collected(
            self.digest.hexdigest() if self.files else "", single, self.files, self.size, packaged, tuple(signatures)
        )

    def _folder(self, target: int, prefix: str, depth: int) -> bytes:
        """Make what is in one folder; returns the letter of the record that ends it."""
        if depth > stream.MAX_DEPTH:
            raise ValueError("too deep")
        while True:
            kind = self.reader.kind()
            if kind == stream.ERROR:
                raise self._refusal()
            if kind not in (stream.ENTER, stream.LINK, stream.FILE):
                if (kind == stream.LEAVE) != (depth > 0):
                    raise ValueError("not nested")
                return kind
            self.files += 1
            if self.files > stream.MAX_FILES:
                raise UsageError(self.shown, f"more than {stream.MAX_FILES} files", "leave out what is not needed")
            name = self.reader.name()
            path = f"{prefix}{name}"
            if kind == stream.ENTER:
                self._enter(target, name, path, depth)
            elif kind == stream.LINK:
                self._link(target, name, path)
            else:
                self._file(target, name, path)

    def _enter(self, target: int, name: str, path: str, depth: int) -> None:
        self.digest.folder(path)
        os.mkdir(name, 0o755, dir_fd=target)
        with owning(openat2(target, name, os.O_RDONLY | os.O_DIRECTORY)) as below:
            os.fchmod(below, 0o755)
            self._folder(below, f"{path}/", depth + 1)

    def _link(self, target: int, name: str, path: str) -> None:
        goal = self.reader.goal()
        steps = os.path.normpath(os.path.join(os.path.dirname(path), goal))
        if goal.startswith("/") or steps == ".." or steps.startswith("../"):
            raise self._leads_out(path, goal)
        self.digest.link(path, goal)
        os.symlink(goal, name, dir_fd=target)
        self.links.append((path, goal))

    def _check_link(self, root: int, path: str, goal: str) -> None:
        """Follow a link of the finished copy: by way of another link, ``..`` is elsewhere than its text says."""
        try:
            os.close(openat2(root, path, os.O_PATH, resolve=RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # leads nowhere at all
                raise self._leads_out(path, goal) from None

    def _leads_out(self, path: str, goal: str) -> UsageError:
        # Harmless in the cage, but outside it other tools (a backup, a copy) would follow it out of the store.
        return UsageError(f"{self.shown}/{path}", f"a link out of the folder, to {goal}", "copy the file itself")

    def _file(self, target: int, name: str, path: str) -> None:
        executable, mtime_ns = self.reader.facts()
        sha256 = self._content(target, name, mtime_ns, executable=executable)
        self.digest.file(path, sha256, executable=executable)

    def _content(self, target: int, name: str, mtime_ns: int, *, executable: bool) -> str:
        """Make a file of what comes; returns its SHA-256."""
        content = sha256_of_much()
        fd = openat2(target, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o600)
        with os.fdopen(fd, "wb") as out:

            def take(chunk: bytes) -> None:
                self.size += len(chunk)
                if self.size > stream.MAX_BYTES:
                    why = f"more than {stream.MAX_BYTES >> 20} MiB"
                    raise UsageError(self.shown, why, "leave out what is not needed")
                content.update(chunk)
                out.write(chunk)

            self.reader.content(take)
            os.fchmod(fd, 0o755 if executable else 0o644)
            out.flush()
            # Python compares it with what a .pyc notes of its source. Not part of the digest.
            os.utime(fd, ns=(mtime_ns, mtime_ns))
        return content.hexdigest()

    def _refusal(self) -> UsageError:
        """The error that the collector reports, in its words but below the name that the caller used."""
        path, why, remedy = (self.reader.text().decode(errors="backslashreplace") for _ in range(3))
        return UsageError(f"{self.shown}/{path}" if path else self.shown, why, remedy)
