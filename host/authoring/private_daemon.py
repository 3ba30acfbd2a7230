"""A daemon of a command's own, below a private root: the whole of what runs in production, for one author's plugin.

It takes from ``host.toml`` what decides about cages, and nothing that would reach further: no plugins to discover, no
roles, no forwarded ports, no metrics, no console. It ends with the command, also when that is killed. With a recorder
every connection of its cages leads there, and only they trust its authority.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from host.client.client import Client
from isolator.cli.private_root import PrivateRoot
from isolator.errors import DeniedError, IsolatorError, UsageError
from isolator.paths import Paths

if TYPE_CHECKING:
    from host.authoring.recorder.recorder import Recorder

_TAKEN = ("uid_range", "may_degrade", "ceiling", "defaults", "restart", "network", "events")
"""Keys and tables of ``host.toml`` that hold here, too."""
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_START_SECONDS, _STOP_SECONDS = 60.0, 60.0
_REPEAT_SECONDS = 0.05


class PrivateDaemon:
    """A running daemon; a context manager that stops it and removes every trace of it."""

    def __init__(
        self, command: str, root: str | None, recorder: Recorder | None = None, *, options: Sequence[str] = (),
        network: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """``command`` is what errors call it; ``root``: where the ``host.toml`` to follow is. Raises IsolatorError.

        ``options`` of its ``serve``; ``network`` takes the place of that table.
        """
        if os.geteuid() != 0:
            why = "building a cage needs root; the role 'runner' of a running daemon serves 'run' and 'plugin test'"
            raise DeniedError(command, why, f"run it with sudo: sudo isolator {command} DIR")
        self._settings, self._uid_range = _followed(Paths.of(root).host_toml)
        if network is not None:
            self._settings["network"] = network
        self._options, self._recorder = options, recorder
        if recorder is not None and not recorder.replays and self._settings.get("network", {}).get("proxy"):
            why = "[network] proxy of host.toml is the only way out, and nothing can be recorded through it"
            raise UsageError("--recording", why, "record where no proxy is needed; replaying works here")
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrivateDaemon:
        import tomlkit

        with self._stack:
            self.paths = self._stack.enter_context(PrivateRoot()).paths
            self.paths.policies.mkdir(parents=True)
            if self._recorder is not None:
                way = self._stack.enter_context(self._recorder.running(self.paths, self._uid_range))
                self._settings["network"] = {**self._settings.get("network", {}), **way}
            self.paths.host_toml.write_text(tomlkit.dumps(self._settings))
            self._start()
            if self._recorder is not None:
                self._recorder.serve(self.paths)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        # A second ^C would leave half of it.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *_ENDING)}
        try:
            self._stack.close()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def pid(self) -> int:
        """Its process, in whose mount namespace the plugins' files are."""
        assert self._process is not None
        return self._process.pid

    @property
    def root(self) -> str:
        """Its root, for ``Client`` and the readers of the trail."""
        return str(self.paths.root)

    def hide(self, secrets: Mapping[str, str]) -> None:
        """Keep the values of a config that are secret out of what is recorded."""
        if self._recorder is not None:
            self._recorder.hide(secrets)

    def client(self, timeout: float | None = 150.0) -> Client:
        """A new connection to it."""
        return Client(self.root, timeout=timeout)

    def _start(self) -> None:
        program = sys.argv[0] if "/" in sys.argv[0] else shutil.which(sys.argv[0]) or sys.argv[0]
        log = self.paths.root / "serve.log"
        command, environment = [program, "--root", self.root, "serve", *self._options], dict(os.environ)
        if self._recorder is not None:
            command = self._recorder.around(self.paths, command)
            environment |= self._recorder.environment
        with log.open("wb") as errors:
            # In a session of its own: ^C is this command's, which then stops it.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "--", *command], env=environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True, cwd="/",
            )  # fmt: skip
        self._stack.callback(self._stop)
        assert self._process.stdout is not None
        readable = select.select([self._process.stdout], [], [], _START_SECONDS)[0]
        if not readable or self._process.stdout.readline() != b"isolator: ready\n":
            said = log.read_text(errors="replace").strip().splitlines()
            why = said[-1].removeprefix("isolator: ") if said else "it was not ready in time"
            raise IsolatorError("the daemon of this command did not start", why, "run 'isolator check'")

    def _stop(self) -> None:
        process, self._process = self._process, None
        assert process is not None and process.stdout is not None
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this command as ^C does, whatever it waits for: what it has made is removed.

    The handler of a signal that comes just before a wait, or to another thread, runs when the wait is over. A thread
    ends the wait, by a signal that does nothing else.
    """
    begun = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        begun.set()
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        sys.exit(128 + number)

    def end_waits() -> None:
        with os.fdopen(woken, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                while number[0] in ending and not begun.wait(_REPEAT_SECONDS):
                    signal.pthread_kill(main, signal.SIGURG)

    ending = {*_ENDING, signal.SIGINT} if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else {*_ENDING}
    before = {number: signal.signal(number, end) for number in ending}
    before[signal.SIGURG] = signal.signal(signal.SIGURG, lambda *_: None)
    main, (woken, wake) = threading.get_ident(), os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(woken, True)
    earlier = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    thread = threading.Thread(target=end_waits, name="ends of waits", daemon=True)
    thread.start()
    try:
        yield
    finally:
        begun.set()
        signal.set_wakeup_fd(earlier)
        os.close(wake)
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_until(deadline: float, pause: float) -> bool:
    """Pause, unless the deadline (monotonic seconds) has come; whether there is time left."""
    left = deadline - time.monotonic()
    time.sleep(max(0.0, min(pause, left)))
    return left > 0


def _followed(path: Path) -> tuple[dict[str, Any], tuple[int, int]]:
    """The part of a host's settings that holds here, and its range of uids. Raises IsolatorError."""
    from isolator.policy.parse.load import load_host_config
    from isolator.policy.parse.trusted import read_trusted

    config = load_host_config(path)  # a fault is one of that file
    data = tomllib.loads(read_trusted(path).decode("utf-8-sig")) if path.exists() else {}
    return {key: data[key] for key in _TAKEN if key in data}, config.uid_range
