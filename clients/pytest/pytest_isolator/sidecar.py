# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: 0BSD
"""A plugin in its cage, under an ``isolator dev`` of its own."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_isolator.host_api import HostApi
from pytest_isolator.pretend_internet import PretendInternet

START_SECONDS, END_SECONDS = 180.0, 120.0
_STARTS = ("loaded", "error")


class NoCageError(AssertionError):
    """There is no cage, or the plugin does not come up in it; the sentence says what is missing."""


@dataclass(frozen=True)
class Reply:
    """Outcome of the first attempt to deliver one event."""

    event: str
    outcome: str
    ok: bool
    """True when it was handled, or passed over."""
    detail: str | None
    result: Any
    """of the reply, where it has one"""
    latency_us: int | None


class Sidecar:
    """See the module; use it by the fixture ``sidecar``."""

    def __init__(self, words: Sequence[str], internet: PretendInternet | None, api: HostApi | None) -> None:
        """``words`` of the command behind ``isolator dev``. Raises NoCageError."""
        self.log: list[str] = []
        """Lines that it has written."""
        self.denials: list[dict[str, Any]] = []
        """Things that it was refused, each with the line that would grant it."""
        self.errors: list[str] = []
        self.notes: list[str] = []
        self._internet, self._api, self._rest = internet, api, b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        program = shutil.which("isolator")
        if program is None:
            raise NoCageError("the command 'isolator' is not installed: without it there is no cage")
        rights = [] if os.geteuid() == 0 else ["sudo", "-n", "--"]
        self._process = subprocess.Popen(
            [*rights, program, "dev", "--json", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
        )  # fmt: skip
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def send(self, event: str, payload: Mapping[str, Any] | None = None, *, timeout: float = 120.0) -> Reply:
        """Send an event and wait for its first attempt; without a payload an example is sent.

        Raises NoCageError when the plugin has no cage any more, ValueError for an event that cannot be sent.
        """
        line = event if payload is None else f"{event} {json.dumps(payload)}"
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), line.encode() + b"\n")
        except BrokenPipeError:
            raise NoCageError(self._ended()) from None
        found = self._next(lambda one: one["kind"] in {"answer", "error"}, timeout)
        if found["kind"] == "error":
            raise ValueError(_sentence(found["error"]))
        return Reply(
            found["event"], found["outcome"], found["ok"], found["detail"], _result(found["reply"]), found["latency_us"]
        )

    def close(self) -> None:
        """End it, with all that belongs to it."""
        if self._process.poll() is None:
            # By a line, not by a signal: sudo passes none on from a process of its own group.
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._drain(END_SECONDS)
            finally:
                if self._process.poll() is None:
                    self._process.send_signal(signal.SIGTERM)
                self._process.wait(END_SECONDS)
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                stream.close()

    def _start(self) -> None:
        root = self._next(lambda one: one["kind"] == "ready", START_SECONDS)["root"]
        if self._api is not None:
            try:
                self._api.connect(root)
            except Exception as error:
                raise NoCageError(f"host_api reaches its daemon as root alone: {error}") from None
        first = self._next(lambda one: one["kind"] in _STARTS, START_SECONDS)
        if first["kind"] == "error":
            raise NoCageError(_sentence(first["error"]))

    def _next(self, fits: Callable[[dict[str, Any]], bool], timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while True:
            for one in self._read(deadline - time.monotonic()):
                self._take(one)
                if fits(one):
                    return one

    def _read(self, timeout: float) -> list[dict[str, Any]]:
        """Wait for objects and return those that have come; a line that fits ends the waiting of its caller, so they
        come one at a time."""
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            if not select.select([self._process.stdout], [], [], max(0.0, timeout))[0]:
                raise NoCageError("isolator dev gave no answer in time")
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                raise NoCageError(self._ended())
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return [json.loads(line)]

    def _drain(self, timeout: float) -> None:
        """Read on until it has ended."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                for one in self._read(deadline - time.monotonic()):
                    self._take(one)
        except NoCageError:
            return

    def _take(self, one: dict[str, Any]) -> None:
        kind = one["kind"]
        if kind == "log":
            self.log.append(one["line"])
        elif kind == "denial":
            self.denials.append(one["denial"])
        elif kind == "error":
            self.errors.append(_sentence(one["error"]))
        elif kind in {"note", "crashed"}:
            self.notes.append(one.get("text") or one["why"])
        elif kind == "exchange" and self._internet is not None:
            self._internet.note(one)

    def _ended(self) -> str:
        self._process.wait(END_SECONDS)
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()
        for line in reversed(said):
            if line.startswith('{"error"'):
                return _sentence(json.loads(line)["error"])
        return said[-1] if said else f"isolator dev has ended with {self._process.returncode}"


def _sentence(error: Mapping[str, Any]) -> str:
    parts = [str(error[key]) for key in ("what", "why", "remedy") if error.get(key)]
    return ": ".join(parts[:2]) + (f" ({parts[2]})" if len(parts) > 2 else "")


def _result(reply: str | None) -> Any:
    try:
        message = json.loads(reply or "null")
    except ValueError:
        return reply
    return message["result"] if isinstance(message, dict) and "result" in message else message
