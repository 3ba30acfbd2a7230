"""The daemon under demonstration and its command line: started, spoken to and stopped as an operator would.

`Trail` follows `isolator audit tail -f --json` and lets the demo wait for records, as any follower could.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import report

Record = dict[str, Any]


class DemoError(Exception):
    """The demo cannot go on; the text says what failed, why, and where to look."""


class Daemon:
    """`isolator serve` below a root of its own; a context manager that stops it and everything it made."""

    def __init__(self, root: Path, work: Path, log: Path, *, enter: Sequence[str] = ()) -> None:
        self.root = root
        self.enter = enter
        """The command that takes it and its commands into a network of their own."""
        self.work = work
        """Where the commands are given."""
        self.log = log
        self.exit_code: int | None = None
        self._process: subprocess.Popen[str] | None = None
        self.environment = {
            **os.environ,
            "ISOLATOR_ROOT": str(root),
            "COLUMNS": "78",
            "NO_COLOR": "1",
            "TERM": "dumb",
        }

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def __enter__(self) -> Daemon:
        with self.log.open("w") as log:
            # A session of its own: Ctrl-C in the terminal is for the demo, which then stops the daemon.
            self._process = subprocess.Popen(
                [*self.enter, "isolator", "serve"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(60)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _wait_until_ready(self, seconds: float) -> None:
        process, end = self._process, time.monotonic() + seconds
        assert process and process.stdout
        while (left := end - time.monotonic()) > 0:
            if not select.select([process.stdout], [], [], left)[0]:
                break
            line = process.stdout.readline()
            if line.strip() == "isolator: ready":
                return
            if not line:
                raise DemoError(f"'isolator serve' ended with {process.wait()}: {self.last_words()}")
        raise DemoError(f"'isolator serve' was not ready after {seconds:g} s: {self.last_words()}")

    def last_words(self) -> str:
        """The end of what the daemon wrote to its standard error."""
        return " / ".join(self.log.read_text(errors="replace").strip().splitlines()[-5:]) or "it said nothing"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (process := self._process) is None:
            return
        self._process = None
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            self.exit_code = process.wait(30)
        except BaseException as reason:  # whatever interrupts the wait, it must not outlive us
            process.kill()
            self.exit_code = process.wait()
            if not isinstance(reason, subprocess.TimeoutExpired):
                raise
        if process.stdout:
            process.stdout.close()

    def kill(self) -> None:
        """End it as a power cut does."""
        assert self._process
        process, self._process = self._process, None
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()

    # ------------------------------------------------------------------------- the command line

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start one command and leave it running."""
        return subprocess.Popen(
            [*self.enter, "isolator", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.work,
            env=self.environment,
            start_new_session=True,
        )

    def run(self, *arguments: str, seconds: float = 60) -> tuple[int, str]:
        """Run one command without showing it: exit code and output (both streams)."""
        with self.start(*arguments) as process:
            try:
                text, _ = process.communicate(timeout=seconds)
            except BaseException as error:
                process.kill()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise DemoError(f"'isolator {' '.join(arguments)}' gave no answer in {seconds:g} s") from None
        return process.returncode, text

    def show(self, *arguments: str, code: int = 0) -> str:
        """Print a command, run it, print what it said; its output. It has to end with ``code``."""
        report.command(["isolator", *arguments])
        ended, text = self.run(*arguments)
        report.output(text.replace(str(self.root), "$ROOT"))
        if ended != code:
            raise DemoError(f"'isolator {' '.join(arguments)}' ended with {ended}")
        return text


class Trail:
    """Every audit record as it is written, from the daemon's own follower."""

    def __init__(self, daemon: Daemon) -> None:
        self.records: list[Record] = []
        self.words = ""
        """The last that the follower said which is no record."""
        self._news = threading.Condition()
        self._process = daemon.start("audit", "tail", "-f", "-n", "1000", "--json")
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Trail:
        self._thread.start()
        return self

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            try:
                record = json.loads(line)
            except ValueError:
                self.words = line.strip()
                continue
            with self._news:
                self.records.append(record)
                self._news.notify_all()

    def wait(self, wanted: Callable[[Record], bool], seconds: float) -> Record | None:
        """The first record that is wanted, waiting for it if need be; None when it does not come in time."""
        with self._news:
            self._news.wait_for(lambda: any(map(wanted, self.records)), seconds)
            return next(filter(wanted, self.records), None)

    def of(self, event_id: str) -> list[Record]:
        """What one event caused so far, in order."""
        with self._news:
            return [record for record in self.records if caused_by(record, event_id)]

    def kinds(self, kind: str, plugin: str | None = None) -> list[Record]:
        """The records of one type so far, of one plugin or of all."""
        with self._news:
            return [r for r in self.records if r["type"] == kind and plugin in (None, r.get("plugin"))]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join(5)
        assert self._process.stdout
        self._process.stdout.close()


def caused_by(record: Record, event_id: str) -> bool:
    """Does the record belong to that event, alone or among others in flight?"""
    data = record.get("data") or {}
    return record.get("event_id") == event_id or event_id in (data.get("event_ids") or ())


def event_id_of(text: str) -> str:
    """The event's id in the output of `event emit --json`."""
    start = text.find("{")
    try:
        answer = json.loads(text[start:])
        return str(answer.get("event_id") or answer["id"])
    except (ValueError, KeyError):
        raise DemoError(f"'isolator event emit' named no event: {text.strip()[:300]}") from None
