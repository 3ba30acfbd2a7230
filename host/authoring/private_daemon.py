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
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from host.client.client import Client
from isolator.cli.private_root import PrivateRoot
from isolator.errors import DeniedError, IsolatorError, UsageError
from isolator.linux.signals import ENDING, taken
from isolator.paths import Paths

if TYPE_CHECKING:
    from host.authoring.recorder.recorder import Recorder

_TAKEN = ("uid_range", "may_degrade", "ceiling", "defaults", "restart", "network", "events")
"""Keys and tables of ``host.toml`` that hold here, too."""
_START_SECONDS, _STOP_SECONDS = 60.0, 60.0


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
        with taken((signal.SIGINT, *ENDING), signal.SIG_IGN):
            self._stack.close()

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

    def settle(self) -> None:
        """Have told what the recorder has seen until now."""
        if self._recorder is not None:
            self._recorder.settle()

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


def wait_until(deadline: float, pause: float) -> bool:
    """Pause, unless the deadline (monotonic seconds) has come; whether there is time left."""
    left = deadline - time.monotonic()
    time.sleep(max(0.0, min(pause, left)))
    return left > 0


def _followed(path: Path) -> tuple[dict[str, Any], tuple[int, int]]:
    """The part of a host's settings that holds here, and its range of uids. Raises IsolatorError."""
    from isolator.policy.parse.trusted import load_host_config, read_trusted

    config = load_host_config(path)  # a fault is one of that file
    data = tomllib.loads(read_trusted(path).decode("utf-8-sig")) if path.exists() else {}
    return {key: data[key] for key in _TAKEN if key in data}, config.uid_range
