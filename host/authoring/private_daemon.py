"""A daemon of a command's own, below a private root: the whole of what runs in production, for one author's plugin.

It takes from ``host.toml`` what decides about cages, and nothing that would reach further: no plugins to discover, no
roles, no forwarded ports, no metrics, no console. It ends with the command, also when that is killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from host.client.client import Client
from isolator.cli.private_root import PrivateRoot
from isolator.errors import DeniedError, IsolatorError
from isolator.paths import Paths

_TAKEN = ("uid_range", "may_degrade", "ceiling", "defaults", "restart", "network", "events")
"""Keys and tables of ``host.toml`` that hold here, too."""
_START_SECONDS, _STOP_SECONDS = 60.0, 60.0


class PrivateDaemon:
    """A running daemon; a context manager that stops it and removes every trace of it."""

    def __init__(
        self, command: str, root: str | None, *, options: Sequence[str] = (), network: Mapping[str, Any] | None = None
    ) -> None:
        """``command`` is what errors call it; ``root``: where the ``host.toml`` to follow is. Raises IsolatorError.

        ``options`` of its ``serve``; ``network`` takes the place of that table.
        """
        if os.geteuid() != 0:
            why = "building a cage needs root; the role 'runner' of a running daemon serves 'isolator run' only"
            raise DeniedError(command, why, f"run it with sudo: sudo isolator {command} DIR")
        self._host_toml = _followed(Paths.of(root).host_toml, network)
        self._options = options
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrivateDaemon:
        with self._stack:
            self.paths = self._stack.enter_context(PrivateRoot()).paths
            self.paths.policies.mkdir(parents=True)
            self.paths.host_toml.write_text(self._host_toml)
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

    def client(self, timeout: float | None = 150.0) -> Client:
        """A new connection to it."""
        return Client(self.root, timeout=timeout)

    def _start(self) -> None:
        program = sys.argv[0] if "/" in sys.argv[0] else shutil.which(sys.argv[0]) or sys.argv[0]
        log = self.paths.root / "serve.log"
        with log.open("wb") as errors:
            # In a session of its own: ^C is this command's, which then stops it.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "--", program, "--root", self.root, "serve", *self._options],
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


def _followed(path: Path, network: Mapping[str, Any] | None) -> str:
    """The part of a host's settings that holds here, as the text of a ``host.toml``. Raises IsolatorError."""
    import tomlkit

    from isolator.policy.parse.load import load_host_config
    from isolator.policy.parse.trusted import read_trusted

    load_host_config(path)  # a fault is one of that file
    data = tomllib.loads(read_trusted(path).decode("utf-8-sig")) if path.exists() else {}
    if network is not None:
        data["network"] = network
    return tomlkit.dumps({key: data[key] for key in _TAKEN if key in data})
