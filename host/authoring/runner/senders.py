"""Senders of events to a plugin that ``isolator run`` runs, one for each mode: what they send is what the daemon sends.

Each is a context manager, with a function that sends one event and returns the outcome of that attempt. In every mode
but exec one sidecar gets all events. There is no host API, and the calls of a stream are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from host.authoring.runner.cage import Cage
from host.authoring.trial import Trial
from host.channel.oneshot import Exchange
from host.channel.reply import (
    PERMISSION_DENIED,
    STREAM_MESSAGE,
    LostError,
    NotSentError,
    Outcome,
    build_params,
    event_params,
    oneshot_request,
    params_text,
    read_reply,
)
from host.events import EventType
from host.queue.interface import Event
from host.wire.lines import CPU_A_SECOND, CPU_AT_ONCE, LineProtocol
from isolator.base.pacing import TokenBucket
from isolator.errors import IsolatorError

if TYPE_CHECKING:
    from host.channel.stream import Greeting, StreamConnection

_CLOSED_SECONDS = 2.0
"""Seconds for an MCP server to end once its input is closed."""
_NO_API = {"error": {"code": PERMISSION_DENIED, "message": "there is no host API in this trial"}}
_TOO_LARGE = Outcome("rejected", "payload_too_large", "the event is larger than a request may be")


@dataclass
class Sending:
    """One event on its way: the plugin's name for it, what orders it, and the seconds that its answer may take."""

    event: Event
    hook: str
    event_type: EventType
    key: str
    timeout: float
    sent_ns: int = 0
    """``time.perf_counter_ns`` when sending began."""

    def begin(self) -> None:
        """Note that it is sent now."""
        self.sent_ns = time.perf_counter_ns()


Sender = Callable[[Sending], Outcome]


def sender_of(mode: str) -> Callable[[Cage, Trial], contextlib.AbstractContextManager[Sender]]:
    """The sender of a mode; raises IsolatorError when that needs a package which is not installed."""
    if mode == "http":
        try:
            import h11  # noqa: F401
        except ImportError:
            remedy = "install it, or all that this mode needs: isolator[http]"
            raise IsolatorError("the mode http", "needs the Python package h11", remedy) from None
    return _SENDERS[mode]


@contextlib.contextmanager
def _to_a_sidecar(cage: Cage, trial: Trial) -> Iterator[Callable[[], socket.socket]]:
    """A sidecar that runs; a function that connects to it and raises NotSentError."""
    run = cage.start(trial, {}, subprocess.DEVNULL)
    up = time.monotonic() + cage.effective.restart.start_timeout
    try:
        yield lambda: cage.connect(run, up)
    finally:
        run.end()


@contextlib.contextmanager
def _oneshot(cage: Cage, trial: Trial) -> Iterator[Sender]:
    async def send(connect: Callable[[], socket.socket], one: Sending) -> Outcome:
        line = oneshot_request(
            one.event, one.hook, one.event_type, attempt=1, timeout=one.timeout, major=_major(cage),
            meta=cage.manifest.transport.meta == "fit",
        )  # fmt: skip
        if line is None:
            return _TOO_LARGE
        with connect() as sock:
            sock.setblocking(False)
            one.begin()
            with contextlib.closing(Exchange(sock, line, one.timeout)) as exchange:
                exchange.send()
                exchange.listen()
                return read_reply(await exchange.reply)

    with _to_a_sidecar(cage, trial) as connect, asyncio.Runner() as loop:
        yield lambda one: loop.run(send(connect, one))


@contextlib.contextmanager
def _stream(cage: Cage, trial: Trial) -> Iterator[Sender]:
    opened: list[tuple[StreamConnection, Greeting]] = []

    async def deliver(connect: Callable[[], socket.socket], one: Sending) -> Outcome:
        from host.channel.stream import event_request
        from host.events import random_hex

        if not opened or opened[-1][0].closed:
            opened.append(await _greeted(cage, connect()))
        connection, greeting = opened[-1]
        if one.hook not in greeting.handles:
            return Outcome(
                "rejected", "not_handled", "the plugin said in host.hello that it does not handle this event"
            )
        number, reply = random_hex(), asyncio.get_running_loop().create_future()
        params = event_params(one.event, one.event_type, _major(cage), 1, one.timeout)
        request = event_request(one.hook, params, number)
        if len(request) > STREAM_MESSAGE:
            return _TOO_LARGE
        one.begin()
        connection.write(number, request, one.timeout, reply)
        connection.flush()
        return read_reply((await reply)[1], expect=number)

    with _to_a_sidecar(cage, trial) as connect, asyncio.Runner() as loop:
        yield lambda one: loop.run(deliver(connect, one))
        loop.run(_close(connection for connection, _ in opened))


async def _greeted(cage: Cage, sock: socket.socket) -> tuple[StreamConnection, Greeting]:
    """Open a stream; raises NotSentError when its greeting fails."""
    from host.channel.stream import StreamConnection, open_stream

    async def refuse(_method: str, _params: Any) -> dict[str, Any]:
        return _NO_API

    sock.setblocking(False)
    cpu = TokenBucket(CPU_A_SECOND, CPU_AT_ONCE)
    connection = await open_stream(sock, lambda: StreamConnection(refuse, lambda _: None, cpu, lambda text: text))
    core, hooks = cage.manifest.core, sorted(cage.effective.hooks)
    limits = {
        "max_message": STREAM_MESSAGE,
        "max_in_flight": cage.manifest.transport.max_in_flight,
        "deadline_ms": round(cage.effective.delivery_timeout * 1000),
    }
    _, reply = connection.hello(plugin={"name": core.name, "version": core.version}, hooks=hooks, limits=limits)
    return connection, await connection.greeting(hooks, reply)


@contextlib.contextmanager
def _http(cage: Cage, trial: Trial) -> Iterator[Sender]:
    from host.channel.cloud_events import event_headers, outcome_of, sign
    from host.channel.http import request, write_request

    transport = cage.manifest.transport

    async def post(sock: socket.socket, one: Sending) -> Outcome:
        body = params_text(one.event, one.event_type, _major(cage)).encode()
        if len(body) > STREAM_MESSAGE:
            return _TOO_LARGE
        headers = event_headers(one.event, one.hook, "isolator", key=one.key, attempt=1)
        if transport.secret is not None:
            headers += sign(cage.secret(transport.secret), one.event.id, int(time.time()), body)
        data = write_request("POST", transport.path, headers, body)
        with sock:
            sock.setblocking(False)
            one.begin()
            return outcome_of(await request(sock, "POST", data, one.timeout))

    with _to_a_sidecar(cage, trial) as connect, asyncio.Runner() as loop:
        yield lambda one: loop.run(post(connect(), one))


@contextlib.contextmanager
def _mcp(cage: Cage, trial: Trial) -> Iterator[Sender]:
    from host.mcp.event_calls import call_of, outcome_of
    from host.mcp.session import Session
    from host.wire.mcp import MAX_LINE, request

    transport, sessions = cage.manifest.transport, list[Session]()

    async def opened(input_: socket.socket, output: socket.socket) -> Session:
        if not sessions:
            session = Session("", transport.era, lambda *_: None)
            await session.connect(input_.dup(), output.dup())
            await session.greet(cage.effective.restart.start_timeout)
            sessions.append(session)
        return sessions[0]

    async def call(session: Session, one: Sending) -> Outcome:
        if one.hook not in transport.calls:
            return Outcome("rejected", "no_call", "its manifest has no call for this event")
        number, reply = session.new_id(), asyncio.get_running_loop().create_future()
        params = call_of(transport.calls[one.hook], build_params(one.event, one.event_type, _major(cage)))
        line = request(session.era, number, "tools/call", params)
        if len(line) > MAX_LINE:
            return _TOO_LARGE
        one.begin()
        session.write(number, line, one.timeout, reply)
        return outcome_of(await reply)

    with contextlib.ExitStack() as stack:
        (input_, stdin), (output, stdout) = (socket.socketpair() for _ in range(2))
        for end in (input_, output):
            stack.enter_context(end)
        with stdin, stdout:
            run = cage.start(trial, {}, stdin, stdout)
        stack.callback(run.end, _CLOSED_SECONDS)
        stack.callback(input_.close)
        loop = stack.enter_context(asyncio.Runner())

        def send(one: Sending) -> Outcome:
            try:
                session = loop.run(opened(input_, output))
            except NotSentError as error:
                run.end(_CLOSED_SECONDS)
                raise NotSentError(run.why or f"{error}; the sidecar has ended") from None
            return loop.run(call(session, one))

        yield send
        loop.run(_close(sessions))


async def _close(connections: Iterable[LineProtocol]) -> None:
    """Close them, for which their transports need a turn of the loop."""
    for connection in connections:
        connection.close()
    await asyncio.sleep(0)


@contextlib.contextmanager
def _exec(cage: Cage, trial: Trial) -> Iterator[Sender]:
    def send(one: Sending) -> Outcome:
        about = {"PLUGIN_EVENT_ID": one.event.id, "PLUGIN_EVENT_TYPE": one.hook, "PLUGIN_EVENT_ATTEMPT": "1"}
        one.begin()
        run = cage.start(trial, about, subprocess.PIPE)
        line = event_params(one.event, one.event_type, _major(cage), 1, one.timeout).encode() + b"\n"
        assert run.process.stdin is not None
        with contextlib.suppress(OSError):
            run.process.stdin.write(line)
        with contextlib.suppress(OSError):
            run.process.stdin.close()
        try:
            run.process.wait(one.timeout)
        except subprocess.TimeoutExpired:
            return Outcome("failed", "ended", f"no end within {one.timeout:g} s")
        finally:
            run.end()
        return run.outcome()

    yield send


_SENDERS = {"oneshot": _oneshot, "stream": _stream, "http": _http, "mcp": _mcp, "exec": _exec}


def attempt(send: Sender, one: Sending) -> tuple[Outcome, int | None]:
    """Send one event; returns the outcome, and the microseconds until it was there, unless nothing was sent.

    An answer that does not come, or a sidecar that is not there, is an outcome.
    """
    try:
        outcome = send(one)
    except NotSentError as error:
        return Outcome("unknown", "not_started", str(error)), None
    except LostError as error:
        outcome = error.outcome
    return outcome, (time.perf_counter_ns() - one.sent_ns) // 1000 if one.sent_ns else None


def _major(cage: Cage) -> int:
    return int(cage.manifest.core.api_version.partition(".")[0])
