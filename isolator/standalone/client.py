"""``isolator run`` of who is not root: this process opens what the line names, and the daemon builds the cage.

The connection to the daemon's socket is the run. Nothing is imported here that this process does not need: it waits.
"""

from __future__ import annotations

# What signal and socket add to these are enumerations, whose classes take milliseconds to make, and comfort.
import _signal as signal  # type: ignore[import-not-found]
import _socket as socket
import os
import select
import sys

from isolator.errors import ConfinementError, DeniedError, IsolatorError, UsageError, translated
from isolator.ipc.run_request import MAX_POLICY, OPTIONS, POLICY, POLICY_NAME, SIGNALS, SOCKET, TERMINAL, pack, unpack
from isolator.linux.descriptors import owning
from isolator.standalone.streams import SILENT_ENDS, StreamsRestored

TYPE_CHECKING = False  # typing, which has it too, takes longer to import than all else here; mypy goes by the name
if TYPE_CHECKING:
    from types import FrameType

    from isolator.standalone.options import RunOptions

_OF_CALLER = ("LANG", "TERM", "TZ")
"""Variables that a command gets from its caller without being named."""
_ANSWER = 1 << 16


def run_through_daemon(options: RunOptions) -> int:
    """Run the command; returns the exit code. Raises IsolatorError."""
    if options.audit is not None:
        why = "is root's alone: the daemon's own trail has the records"
        raise UsageError("--audit", why, "leave it out, or use sudo")
    fields = _fields(options)
    fds = [0, 1, 2]
    try:
        fds += [_open("--read", path, os.O_NONBLOCK) for path in _absolute(options.read)]
        fds += [_open("--write", path, os.O_DIRECTORY) for path in _absolute(options.write)]
        sock = _connect(_socket_path(options.root))
        with StreamsRestored():
            run = Run(sock)
            run.send(pack(fields), fds)
            for fd in fds[3:]:
                os.close(fd)
            del fds[3:]
            if options.tty:
                from isolator.standalone.client_terminal import wait_with_terminal

                return _finish(options, wait_with_terminal(run))
            return _finish(options, run.wait())
    finally:
        for fd in fds[3:]:
            os.close(fd)


class Run:
    """The connection of one run, and the signals that this process passes on over it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.terminal = -1
        """The end of the command's terminal for keys and screen, once it has come."""
        self._early: list[int] | None = []
        # The handler of a signal that comes just before a wait runs after it, however long: this ends the wait.
        self._woken, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._ready = select.poll()
        for fd in (sock.fileno(), self._woken):
            self._ready.register(fd, select.POLLIN)
        for number in SIGNALS:
            signal.signal(number, self._pass_on)

    def send(self, request: bytes, fds: list[int]) -> None:
        """Send the request, and after it the signals that have come meanwhile."""
        try:
            rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
            self.sock.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it is refused already, and why can be read
        except OSError as error:
            remedy = "pass less, or put it in a file"
            raise UsageError("isolator run", f"the request cannot be sent: {error.strerror}", remedy) from None
        early, self._early = self._early or [], None
        for number in early:
            self._pass_on(number, None)

    def wait(self) -> dict[str, str]:
        """The daemon's last word; refused calls are shown as they come."""
        while (fields := self.hear()) is None:
            pass
        return fields

    def hear(self) -> dict[str, str] | None:
        """The daemon's next word, if it is the last; raises IsolatorError when that is an error."""
        if self._woken in (fd for fd, _ in self._ready.poll()):
            os.read(self._woken, _ANSWER)
            return None
        try:
            packet, ancillary, _, _ = self.sock.recvmsg(_ANSWER, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:  # comes before what there is to read, once
            return None
        for _, _, data in ancillary:
            self.terminal = int.from_bytes(data[:4], sys.byteorder)
        fields = dict(unpack(packet)) if packet else {}
        if "denied" in fields:
            print(f"isolator: denied: {fields['denied']}", file=sys.stderr, flush=True)
        elif "note" in fields:
            print(f"isolator: note: {fields['note']}", file=sys.stderr, flush=True)
        elif "error" in fields:
            raise IsolatorError.from_json({**fields, "code": fields["error"]})
        elif "end" in fields:
            return fields
        elif TERMINAL not in fields:
            raise ConfinementError("isolator run", "the daemon has ended, and the run with it", "run it again")
        return None

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        if self._early is not None:
            self._early.append(number)
            return
        try:
            self.sock.send(pack([("signal", str(number))]), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except OSError:
            return  # it has ended
        if number == signal.SIGTSTP:
            signal.signal(number, signal.SIG_DFL)  # the kernel's own stop: it knows whether somebody is there to go on
            os.kill(os.getpid(), number)
            signal.signal(number, self._pass_on)
            self._pass_on(signal.SIGCONT, None)


def _fields(options: RunOptions) -> list[tuple[str, str]]:
    fields = [(name, str(value)) for name in OPTIONS if (value := getattr(options, name)) is not None]
    fields += [("egress", text) for text in options.egress]
    fields += [("read", path) for path in _absolute(options.read)]
    fields += [("write", path) for path in _absolute(options.write)]
    fields += [("own", f"{name}={os.environ[name]}") for name in _OF_CALLER if name in os.environ]
    if options.policy is not None:
        fields += [(POLICY, _policy(options.policy)), (POLICY_NAME, options.policy)]
    if options.env or options.env_file:
        from pathlib import Path

        from isolator.standalone.variables import variables

        fields += [
            ("env", f"{name}={value}") for name, value in variables(options.env, map(Path, options.env_file)).items()
        ]
    if options.tty:
        fields.append((TERMINAL, "yes"))
    return fields + [("argument", word) for word in options.command]


def _policy(path: str) -> str:
    """The content of a policy file, which the daemon has read by a process without any right."""
    failing = translated(OSError, DeniedError, f"--policy {path}", "", "name a TOML file")
    with failing, owning(_open("--policy", path, os.O_NONBLOCK)) as fd:
        text = os.read(fd, MAX_POLICY + 1)
    if len(text) > MAX_POLICY:
        raise UsageError(f"--policy {path}", f"larger than {MAX_POLICY >> 10} KiB", "shorten it")
    return os.fsdecode(text)


def _absolute(paths: tuple[str, ...]) -> list[str]:
    return ["/" + os.path.abspath(path).lstrip("/") for path in paths]


def _open(option: str, path: str, flags: int) -> int:
    with translated(OSError, DeniedError, f"{option} {path}", "", "name what you may read yourself"):
        return os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC | flags)


def _socket_path(root: str | None) -> str:
    """The path of ``Paths.run_socket``, without what that would import."""
    return os.path.join(os.path.realpath(root or os.environ.get("ISOLATOR_ROOT") or "/"), "run/isolator", SOCKET)


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with owning(os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
            sock.connect(f"/proc/self/fd/{folder}/{SOCKET}")  # however long the path is
    except OSError as error:
        sock.close()
        what, why, remedy = "isolator run", f"{path}: {error.strerror}", "try again"
        if isinstance(error, PermissionError):
            remedy = "use sudo, or have the uid added to [roles] runner in host.toml and the daemon started again"
            raise DeniedError(what, f"uid {os.getuid()} is no runner", remedy) from None
        if isinstance(error, (FileNotFoundError, NotADirectoryError, ConnectionRefusedError)):
            why = f"building a cage needs root, or a daemon at {path}"
            remedy = "use sudo, or have the daemon started with your uid in [roles] runner of host.toml"
        raise ConfinementError(what, why, remedy) from None
    return sock


def _finish(options: RunOptions, end: dict[str, str]) -> int:
    """Say how it ended, as ``isolator run`` of root's does; returns the exit code."""
    code, number = (int(end[name]) if end[name] else None for name in ("exit_code", "signal"))
    if options.json:
        import json

        summary = {
            "exit_code": code, "signal": number, "cause": end["end"], "seconds": float(end["seconds"]),
            "oom_kills": int(end["oom_kills"]), "task_denials": int(end["task_denials"]),
        }  # fmt: skip
        print(json.dumps(summary), file=sys.stderr)
    elif end["end"] not in SILENT_ENDS:
        print(f"isolator: {options.command[0]} was ended: {end['end']}", file=sys.stderr)
    return code if code is not None else 128 + (number or 9)
