"""Logs of sidecars: stdout and stderr are read, cut, redacted, stored, and never a reason to wait or to grow.

Each pipe is read whenever it holds data, and ``LINES_PER_TURN`` of its lines are stored in one turn of the event
loop. Blank lines are skipped, lines are cut at 64 KiB. A plugin may write 1 MiB a second (both pipes together), for
which each line counts ``LINE_COST`` bytes beside its own; the excess is counted and dropped unread: the pipe is then
emptied in the kernel (``splice`` to ``/dev/null``; read, if its last line is a result) at a fixed slow beat, so that a
flood costs the host next to nothing and slows the plugin's own writes down. The count appears in the log as a line of
its own.

Stored as JSON lines ``{"time","run","stream","line"}`` in one file per plugin, rotated at 4 MiB, three kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from host.plugins.secrets import Redactor
from host.wire.strict_json import dumps
from isolator.audit.client import utc_now
from isolator.ipc.body import Body
from isolator.ipc.succession import Departure, Descriptors, to_bytes, to_text
from isolator.linux.backwards import reversed_lines

MAX_LINE = 64 * 1024
RATE = 1 << 20
"""Bytes kept per plugin and second.

Seconds begin with a full budget (no token bucket: its trickle would let a flood in by a few bytes a read).
"""
LINE_COST = 128
"""Bytes that each line counts beside its own: storing a line takes time, however short it is."""
LINES_PER_TURN = 256
_BLANK = re.compile(rb"\n{2,}")
FLOOD_BEAT = 0.01
ROTATE_AT, KEPT = 4 << 20, 3
_SPLICE = 1 << 20
UNREAD_LOG = 1 << 18
"""Bytes that wait for a follower of a log that does not read it."""
STDERR_TAIL = 5
"""Lines of stderr that are reported when a run has ended."""
_TAIL_LINE, _TAIL_SECONDS = 400, 0.5
"""Characters of such a line, and the wait for the end of the pipe."""

Follower = Callable[[dict[str, Any]], None]


def bounded(name: str, drained: asyncio.Event, notify: Callable[[str, Mapping[str, Any]], None]) -> Follower:
    """Make a follower that sends a plugin's lines by ``notify``; while ``drained`` is not set it only counts them."""
    unread = 0

    def follow(entry: dict[str, Any]) -> None:
        nonlocal unread
        if not drained.is_set():
            unread += 1
            return
        if unread:
            lost = f"[{unread} lines dropped: read too slowly]"
            notify("log", {**entry, "plugin": name, "stream": "isolator", "line": lost})
            unread = 0
        notify("log", {**entry, "plugin": name})

    return follow


class PipeState(Body):
    """A pipe on its way to another host."""

    run: str
    stream: str
    fd: int
    partial: str
    """the beginning of a line whose rest is to come"""
    torn: bool
    tail: str | None
    """its end so far, if the last line is wanted"""


class LogState(Body):
    """A plugin's log on its way to another host."""

    plugin: str
    dropped: int
    unreported: int
    stderr_runs: tuple[str, ...]
    stderr_lines: tuple[str, ...]
    pipes: tuple[PipeState, ...]


class PluginLog:
    """Log of one plugin: its file, its budget, its followers."""

    def __init__(self, folder: Path, name: str, redactor: Callable[[str], Redactor]) -> None:
        self.name = name
        self.path = folder / f"{name}.log"
        self.dropped = 0
        """Bytes dropped since the host started."""
        self.stderr_tail: deque[tuple[str | None, str]] = deque(maxlen=20)
        """(run, line) of the newest lines of stderr, for the cause of a crash."""
        self._redactor = redactor
        self._followers: set[Follower] = set()
        self._budget, self._second = RATE, 0.0
        self._unreported = 0
        self._fd: int | None = None
        self._size = 0
        self._loop = asyncio.get_running_loop()

    def follow(self, follower: Follower) -> Callable[[], None]:
        """Call ``follower`` with every new line until the returned function is called."""
        self._followers.add(follower)
        return lambda: self._followers.discard(follower)

    def budget(self) -> int:
        """Return the bytes that may still be kept in this second."""
        now = self._loop.time()
        if now - self._second >= 1.0:
            self._second, self._budget = now, RATE
            if self._unreported:
                dropped, self._unreported = self._unreported, 0
                self._store(None, "isolator", f"[{dropped} bytes dropped: more than {RATE} bytes a second]")
        return self._budget

    def pieces(self, data: bytes, *, ended: bool) -> tuple[list[bytes], bytes]:
        """Cut a line into pieces of ``MAX_LINE``, no secret in two; returns them and what waits for its ``ended``."""
        redactor, found = self._redactor(self.name), []
        while len(data) > MAX_LINE + (0 if ended else redactor.longest):
            at = redactor.cut(data, MAX_LINE)
            found.append(data[:at])
            data = data[at:]
        return ([*found, data], b"") if ended else (found, data)

    def skip(self, count: int) -> None:
        """Count bytes that were read and are dropped."""
        self._budget -= count
        self.drop(count)

    def keep(self, run: str | None, stream: str, line: bytes) -> None:
        self._budget -= len(line) + LINE_COST
        text = self._redactor(self.name)(line.decode("utf-8", "replace"))
        if stream == "stderr":
            self.stderr_tail.append((run, text[:_TAIL_LINE]))
        self._store(run, stream, text)

    def drop(self, count: int) -> None:
        """Count bytes that are dropped."""
        self.dropped += count
        self._unreported += count

    def read(self, limit: int) -> list[bytes]:
        """Read the last ``limit`` stored lines, as JSON."""
        lines: deque[bytes] = deque()
        for path in (self.path, *(self._old(n) for n in range(1, KEPT))):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                for line in reversed_lines(file):
                    if len(lines) >= limit:
                        return list(lines)
                    lines.appendleft(line)
        return list(lines)

    def remove(self) -> None:
        """Delete the files of a removed plugin."""
        self.close()
        for path in (self.path, *(self._old(n) for n in range(1, KEPT))):
            path.unlink(missing_ok=True)

    def pass_on(self, pipes: Iterable[PipeState]) -> LogState:
        """Hand the log on, with its pipes."""
        return LogState(
            plugin=self.name,
            dropped=self.dropped,
            unreported=self._unreported,
            stderr_runs=tuple(run or "" for run, _ in self.stderr_tail),
            stderr_lines=tuple(line for _, line in self.stderr_tail),
            pipes=tuple(pipes),
        )

    def take_over(self, state: LogState) -> None:
        """Go on with the log of another host."""
        self.dropped, self._unreported = state.dropped, state.unreported
        runs = (run or None for run in state.stderr_runs)
        self.stderr_tail.extend(zip(runs, state.stderr_lines, strict=True))

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _old(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _store(self, run: str | None, stream: str, text: str) -> None:
        entry = {"time": utc_now(), "run": run, "stream": stream, "line": text}
        for follower in list(self._followers):
            follower(entry)
        data = dumps(entry).encode("utf-8", "backslashreplace") + b"\n"
        # The log is a help, not a record: a full disk must not stop deliveries. The trail has its own rules.
        with contextlib.suppress(OSError):
            if self._fd is not None and self._size + len(data) > ROTATE_AT:
                self._rotate()
            if self._fd is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                self._fd = os.open(self.path, flags, 0o640)
                self._size = os.fstat(self._fd).st_size
            self._size += os.write(self._fd, data)

    def _rotate(self) -> None:
        self.close()
        for number in range(KEPT - 1, 0, -1):
            source = self._old(number - 1) if number > 1 else self.path
            with contextlib.suppress(FileNotFoundError):
                source.replace(self._old(number))


class _Pipe:
    """Read end of a pipe; owns its descriptor. ``on_close`` is called when it has ended or been closed."""

    def __init__(
        self, log: PluginLog, run: str, stream: str, fd: int, null: int, on_close: Callable[[_Pipe], None]
    ) -> None:
        self._log, self._fd, self._null, self._on_close = log, fd, null, on_close
        self.plugin, self.run, self.stream = log.name, run, stream
        self.ended = asyncio.Event()
        self.tail: bytes | None = None
        """The end so far of what has come, a line of ``MAX_LINE`` at least, if the last line is wanted."""
        self._loop = asyncio.get_running_loop()
        self._partial = b""
        self._torn = False
        """Bytes of the present line were dropped; the rest may begin within a secret, and is dropped too."""
        self._lines: deque[bytes] = deque()
        """Complete lines that wait for their turn; the pipe is not read meanwhile."""
        self._beat: asyncio.Handle | None = None
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        budget = self._log.budget()
        if budget <= 0:
            self._loop.remove_reader(self._fd)
            self._flooded()
            return
        try:
            chunk = os.read(self._fd, min(MAX_LINE, budget))
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self.close()
            return
        self._keep_tail(chunk)
        if self._torn:
            end = chunk.find(b"\n") + 1
            self._log.skip(end or len(chunk))
            if not end:
                return
            chunk, self._torn = chunk[end:], False
        *lines, rest = _BLANK.sub(b"\n", self._partial + chunk).split(b"\n")
        for line in lines:
            self._lines.extend(piece for piece in self._log.pieces(line, ended=True)[0] if piece)
        whole, self._partial = self._log.pieces(rest, ended=False)
        self._lines.extend(whole)
        self._store(LINES_PER_TURN)
        if self._lines:
            self._loop.remove_reader(self._fd)
            self._beat = self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._store(LINES_PER_TURN)
        if self._lines:
            self._beat = self._loop.call_soon(self._go_on)
        else:
            self._beat = None
            self._loop.add_reader(self._fd, self._readable)

    def _store(self, most: int) -> None:
        """Store at most that many of the waiting lines; beyond the budget they are dropped."""
        for _ in range(min(most, len(self._lines))):
            if self._log.budget() <= 0:
                self._log.drop(sum(len(line) + 1 for line in self._lines))
                self._lines.clear()
                return
            self._log.keep(self.run, self.stream, self._lines.popleft())

    def _flooded(self) -> None:
        """Empty the pipe unread, once per beat, until there is a budget again."""
        self._beat = None
        if self._log.budget() > 0:
            self._loop.add_reader(self._fd, self._readable)
            return
        try:
            count = self._drop_some()
        except BlockingIOError:
            count = -1
        except OSError:
            count = 0
        if count == 0:
            self.close()
            return
        if count > 0:
            # Bytes were lost in the middle of the line that had begun.
            self._log.drop(count + len(self._partial))
            self._partial, self._torn = b"", True
        self._beat = self._loop.call_later(FLOOD_BEAT, self._flooded)

    def _drop_some(self) -> int:
        """Take something out of the pipe; returns the number of bytes, 0 at its end. Raises OSError."""
        if self.tail is None:
            return os.splice(self._fd, self._null, _SPLICE, flags=os.SPLICE_F_NONBLOCK)
        chunk = os.read(self._fd, _SPLICE)
        self._keep_tail(chunk)
        return len(chunk)

    def _keep_tail(self, chunk: bytes) -> None:
        if self.tail is not None:
            self.tail = (self.tail + chunk)[-MAX_LINE - 2 :]

    def pass_on(self, departure: Departure) -> PipeState:
        """Hand the pipe to the successor of this process: its lines are stored, the half of one goes along.

        In place of one that has ended goes another that has: what it has read last is still to be asked for.
        """
        if self._fd < 0:
            self._fd = _ended_pipe()
        else:
            self._let_go()
        self._store(len(self._lines))
        number, self._fd = departure.add(self._fd), -1
        return PipeState(
            run=self.run, stream=self.stream, fd=number, partial=to_text(self._partial), torn=self._torn,
            tail=to_text(self.tail) if self.tail is not None else None,
        )  # fmt: skip

    def take_over(self, state: PipeState) -> None:
        """Go on with the half of a line that another host has read."""
        self._partial, self._torn = to_bytes(state.partial), state.torn
        self.tail = to_bytes(state.tail) if state.tail is not None else None

    def last_line(self) -> bytes:
        """The last line of all, without the blank ones behind it; empty if it is too long."""
        line = (self.tail or b"").rstrip(b"\r\n").rpartition(b"\n")
        return line[2] if line[1] or len(line[2]) <= MAX_LINE else b""

    def _let_go(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
        self._loop.remove_reader(self._fd)

    def close(self) -> None:
        if self._fd < 0:
            return
        self._let_go()
        os.close(self._fd)
        self._fd = -1
        self._store(len(self._lines))
        if self._partial:
            for line in self._log.pieces(self._partial, ended=True)[0]:
                self._log.keep(self.run, self.stream, line)
            self._partial = b""
        self.ended.set()
        self._on_close(self)


def _ended_pipe() -> int:
    """A pipe to which nobody writes."""
    read, write = os.pipe2(os.O_CLOEXEC)
    os.close(write)
    return read


class Logs:
    """Logs of all plugins."""

    def __init__(self, folder: Path, redactor: Callable[[str], Redactor]) -> None:
        self._folder = folder
        self._redactor = redactor
        self._logs: dict[str, PluginLog] = {}
        self._pipes: dict[str, set[_Pipe]] = {}
        self._tails: dict[str, _Pipe] = {}
        """By run, the pipes whose last lines are wanted."""
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)

    def of(self, name: str) -> PluginLog:
        """Return the log of one plugin."""
        log = self._logs.get(name)
        if log is None:
            log = self._logs[name] = PluginLog(self._folder, name, self._redactor)
        return log

    async def stderr_tail(self, name: str, run: str) -> list[str]:
        """Return the last lines that an ended run wrote to stderr, once its pipe is read to the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TAIL_SECONDS):
                for pipe in [p for p in self._pipes.get(name, ()) if (p.run, p.stream) == (run, "stderr")]:
                    await pipe.ended.wait()
        return [line for of, line in self.of(name).stderr_tail if of == run][-STDERR_TAIL:]

    async def last_line(self, run: str) -> bytes:
        """Return the last line that an ended run wrote to stdout; it was ``attach``-ed for that, and is forgotten."""
        pipe = self._tails.pop(run, None)
        if pipe is None:
            return b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TAIL_SECONDS):
                await pipe.ended.wait()
        return pipe.last_line()

    def attach(self, name: str, run: str, stdout: int, stderr: int, *, tail: bool = False) -> None:
        """Read the two pipes of a new run; owns the descriptors from then on. ``tail``: for ``last_line``."""
        log = self.of(name)
        pipes = self._pipes.setdefault(name, set())
        for stream, fd in (("stdout", stdout), ("stderr", stderr)):
            pipes.add(_Pipe(log, run, stream, fd, self._null, pipes.discard))
        if tail:
            (self._tails[run],) = (pipe for pipe in pipes if (pipe.run, pipe.stream) == (run, "stdout"))
            self._tails[run].tail = b""

    def pass_on(self, departure: Departure) -> tuple[LogState, ...]:
        """Hand every log to the successor of this process, with the pipes that are open."""
        states = []
        for name, log in self._logs.items():
            pipes = {*self._pipes.pop(name, ()), *(pipe for pipe in self._tails.values() if pipe.plugin == name)}
            states.append(log.pass_on([pipe.pass_on(departure) for pipe in pipes]))
            log.close()
        return tuple(states)

    def take_over(self, states: Iterable[LogState], descriptors: Descriptors) -> None:
        """Go on with the logs of another host."""
        for state in states:
            log = self.of(state.plugin)
            log.take_over(state)
            pipes = self._pipes.setdefault(state.plugin, set())
            for one in state.pipes:
                pipe = _Pipe(log, one.run, one.stream, descriptors.take(one.fd), self._null, pipes.discard)
                pipe.take_over(one)
                pipes.add(pipe)
                if pipe.tail is not None:
                    self._tails[one.run] = pipe

    def remove(self, name: str) -> None:
        """Delete the log of a removed plugin."""
        for pipe in list(self._pipes.pop(name, ())):
            pipe.close()
        self._tails = {run: pipe for run, pipe in self._tails.items() if pipe.plugin != name}
        self.of(name).remove()
        del self._logs[name]

    def close(self) -> None:
        """Close every pipe and file."""
        for pipes in self._pipes.values():
            for pipe in list(pipes):
                pipe.close()
        for log in self._logs.values():
            log.close()
        os.close(self._null)
