"""The recorder of a private daemon, as the command that owns both sees it: its process, its file, its reports.

The command reads no byte of a plugin or of a server: it gets finished lines from the recorder's process, bounds them,
and writes them when it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from host.authoring.pack import written_whole
from host.authoring.recorder.authority import CERTIFICATES, VARIABLES, trusted_folder
from host.authoring.recorder.tape import FORMAT, MOST_BYTES, MOST_ENTRIES
from isolator.broker.hardening import filter_file
from isolator.errors import IsolatorError, UnavailableError, UsageError
from isolator.layers.user import UidLease
from isolator.linux.files import write_all
from isolator.linux.unprivileged import service_command
from isolator.paths import Paths

SAID = (
    "TLS ends at a throw-away authority that only this cage trusts; it ends with this command, and no other daemon has "
    "the like"
)
_MODULE = "host.authoring.recorder.service"
_MOST_LINE = 8 << 20
_SECONDS = 30.0


class Recorder:
    """Pretend answers for one private daemon, from ``file`` if it is there, else recorded into it.

    ``report`` gets a sentence for the author each time there is one, ``exchanged`` each request with its status; both
    from a thread.
    """

    def __init__(
        self, file: Path, report: Callable[[str], None],
        exchanged: Callable[[Mapping[str, Any]], None] = lambda exchange: None,
    ) -> None:  # fmt: skip
        """Raises UsageError for a file that cannot be used, UnavailableError where a library is missing."""
        try:
            import h11  # noqa: F401  # the process needs it
        except ImportError:
            why = "needs the library h11, which is not installed"
            raise UnavailableError("--recording", why, "pip install 'isolator[http]'") from None
        self._file, self._report, self._exchanged = file, report, exchanged
        self._recording = _contents(file)
        self._lines: list[str] = []
        self._size = 0
        self._full = self._ending = False
        self._certificate: str | None = None
        self._fault: str | None = None
        self._heard = threading.Condition()
        self._ordered = self._obeyed = 0
        self._control: socket.socket | None = None

    @property
    def replays(self) -> bool:
        """Whether answers come from the file."""
        return self._recording is not None

    @property
    def in_words(self) -> str:
        """One sentence about where answers come from."""
        if self.replays:
            return f"answers come from {self._file}, and nothing is connected to; {SAID}"
        return f"answers of granted names are recorded into {self._file}; {SAID}"

    @contextlib.contextmanager
    def running(self, paths: Paths, uid_range: tuple[int, int]) -> Iterator[Mapping[str, Any]]:
        """The recorder's process, and keys of ``[network]`` of ``host.toml`` that lead a daemon to it."""
        with contextlib.ExitStack() as stack:
            lease = UidLease(uid_range)
            stack.callback(lease.release)
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            stack.callback(self._write)
            port = listener.getsockname()[1]
            self._start(listener, paths, lease.uid, stack)
            listener.close()  # whoever connects to a recorder that has ended is refused
            self._wait_for(lambda: self._certificate is not None)
            assert self._certificate is not None
            trusted_folder(self._certificate, self._certificates(paths))
            yield {"proxy": f"127.0.0.1:{port}", "proxy_resolves": self.replays}

    def around(self, paths: Paths, command: list[str]) -> list[str]:
        """A command that has the authority's certificate among the host's, in a mount namespace of its own."""
        if not CERTIFICATES.is_dir():
            raise UnavailableError(str(CERTIFICATES), "is not there", "install the package ca-certificates")
        bound = 'mount --bind "$0" "$1" && shift && exec "$@"'
        return ["unshare", "-m", "--", "sh", "-c", bound, str(self._certificates(paths)), str(CERTIFICATES), *command]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the daemon, which its cages get, too."""
        return dict(VARIABLES)

    def serve(self, paths: Paths) -> None:
        """Let the broker of a daemon that has started in; nobody else may connect."""
        self._order({"peer": pwd.getpwnam(paths.named("isolator-net")).pw_uid})

    def hide(self, secrets: Mapping[str, str]) -> None:
        """Keep these values out of the recording, from now on."""
        self._order({"secrets": dict(secrets)})

    def settle(self) -> None:
        """Take every report that was made until now, unless the recorder has ended."""
        with contextlib.suppress(IsolatorError):
            self._order({})

    def _start(self, listener: socket.socket, paths: Paths, uid: int, stack: contextlib.ExitStack) -> None:
        paths.cache.mkdir(parents=True, exist_ok=True)
        self._control, theirs = socket.socketpair()
        with contextlib.ExitStack() as lent:
            lent.enter_context(theirs)
            fds = {
                "listener": listener.fileno(),
                "control": theirs.fileno(),
                "filter": filter_file(paths.cache),
                "peers": os.open("/proc/self/net/tcp", os.O_RDONLY | os.O_CLOEXEC),
            }
            if self._recording is not None:
                fds["recording"] = _memory(self._recording)
            for name in fds.keys() - {"listener", "control"}:
                lent.callback(os.close, fds[name])
            command = service_command(_MODULE, uid, uid, fds)
            # A recorder that replays reaches nobody; its listener stays where it was made.
            alone = ["unshare", "-n", "--"] if self.replays else []
            process = subprocess.Popen(
                [*alone, *command], pass_fds=tuple(fds.values()), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True, cwd="/",
            )  # fmt: skip
        hearing = threading.Thread(target=self._hear, name="recorder", daemon=True)
        hearing.start()
        stack.callback(self._end, process, hearing)

    def _end(self, process: subprocess.Popen[bytes], hearing: threading.Thread) -> None:
        """End the process, once it has sent what it had to."""
        assert self._control is not None
        self._ending = True
        self._control.shutdown(socket.SHUT_WR)
        try:
            process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        hearing.join(_SECONDS)
        self._control.close()

    def _hear(self) -> None:
        assert self._control is not None
        with self._control.makefile("rb") as reports, contextlib.suppress(OSError, ValueError):
            while (line := reports.readline(_MOST_LINE)).endswith(b"\n"):
                self._take(json.loads(line))
        if not self._ending and self._certificate is not None:
            self._report("the recorder has ended, and granted names are out of reach: start this command again")
        with self._heard:
            self._fault = self._fault or "its process has ended"
            self._heard.notify_all()

    def _take(self, report: Mapping[str, Any]) -> None:
        name = report.get("name", "")
        if "entry" in report:
            self._keep(str(report["entry"]))
        elif "exchange" in report:
            self._exchanged(report["exchange"])
        elif "note" in report:
            self._report(f"{name}: {report['note']}")
        elif "miss" in report:
            self._report(f"{name}: no answer is recorded for {report['miss']}; remove {self._file} to record again")
        with self._heard:
            self._certificate = report.get("certificate", self._certificate)
            self._fault = report.get("fault", self._fault)
            self._obeyed += report.get("heard", False)
            self._heard.notify_all()

    def _keep(self, line: str) -> None:
        self._size += len(line)
        if self._size > MOST_BYTES or len(self._lines) >= MOST_ENTRIES:
            if not self._full:
                self._full = True
                self._report(
                    f"the recording is full ({MOST_ENTRIES} answers, {MOST_BYTES >> 20} MiB); the rest is not kept"
                )
            return
        self._lines.append(" ".join(line.splitlines()))

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        with self._heard:
            if not self._heard.wait_for(lambda: condition() or self._fault is not None, _SECONDS):
                self._fault = "it gives no answer"
            if self._fault is not None and not condition():
                what = f"--recording {self._file}" if self.replays else "the recorder"
                why = self._fault
                raise IsolatorError(what, why, "remove the file to record again" if self.replays else "try again")

    def _order(self, order: Mapping[str, Any]) -> None:
        """Have an order carried out; raises IsolatorError. Reports of before are taken by then."""
        assert self._control is not None
        with contextlib.suppress(OSError):  # its end is noticed elsewhere
            self._control.sendall(json.dumps(order).encode() + b"\n")
        self._ordered = number = self._ordered + 1
        self._wait_for(lambda: self._obeyed >= number)

    def _write(self) -> None:
        """Write what was recorded, as a file of the user's who has called sudo."""
        if not self._lines:
            return
        try:
            with written_whole(self._file) as out:
                os.fchown(out.fileno(), *(int(os.environ.get(name, "-1")) for name in ("SUDO_UID", "SUDO_GID")))
                for line in (json.dumps({"isolator_recording": FORMAT}), *self._lines):
                    out.write(line.encode() + b"\n")
            self._report(f"recorded {len(self._lines)} answers into {self._file}")
        except OSError as error:
            self._report(f"{self._file} cannot be written: {error.strerror}")

    @staticmethod
    def _certificates(paths: Paths) -> Path:
        return paths.root / "certificates"


def _contents(file: Path) -> bytes | None:
    """The recording, or None where there is none yet; raises UsageError."""
    try:
        with file.open("rb") as recording:
            text = recording.read(MOST_BYTES + 1)
    except FileNotFoundError:
        if not file.parent.is_dir():
            raise UsageError(f"--recording {file}", "its folder is not there", "make it") from None
        return None
    except OSError as error:
        raise UsageError(f"--recording {file}", error.strerror or "cannot be read", "name a file") from None
    return text


def _memory(data: bytes) -> int:
    """A descriptor of these bytes, to be read from the beginning."""
    fd = os.memfd_create("recording", os.MFD_CLOEXEC)
    write_all(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
