"""The log as a JetStream stream of NATS servers, read by ``DIRECT.GET`` alone: no state of this host is in a server.

One connection at a time serves everything; one that does not answer within a second is given up for the next server's.
Nothing is buffered for a server that is away: what leaves late could only be taken for something new.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import nats.errors

from host.cluster.access import STREAM, SUBJECTS, TICK, is_for_answers, subject_for_answer
from host.cluster.client import HEADERS, PUBLISHED, MistrustfulClient
from host.cluster.clock import Clock
from host.cluster.entries import MAX_MESSAGE
from host.cluster.log import QUESTION, Entered, Facts, LogFullError, LogRefusedError, LogUnavailableError
from isolator.ipc.tasks import cancel_all

OLDEST: Final = (2, 9, 0)
"""The first servers that answer ``DIRECT.GET``."""
OLDEST_OF_THREE: Final = (2, 10, 26)
"""Older replicas have been seen to keep different messages under one number, silently."""
MAX_AGE: Final = 14 * 86400
"""Seconds for which the stream keeps messages."""
MAX_BYTES: Final = 8 << 30
_ANSWER, _CONNECT = 1.0, 2.0
"""Seconds for an answer, and for a connection."""
_TOUCH = 3_000_000_000
"""Nanoseconds within which a leader has to have heard of the others; it does about every second."""
_HEDGES: Final = (0.2, 0.3, None)
"""Seconds after which another replica is asked for the same message, each time; None: no other is."""
_HEARD, _ASKED, _WITHIN = 500, 50, 0.25
"""Wakings and questions of other hosts that are taken within so many seconds."""
_ATTEMPTS = 10
_FULL = re.compile("maximum bytes|insufficient|resource|no space|storage", re.IGNORECASE)
_REFUSED = re.compile("no TLS|authorization|permission|authentication|credential|certificate", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Access:
    """How this host reaches the servers: ``nats://`` addresses, or ``tls://`` with ``tls``."""

    servers: tuple[str, ...]
    user: str = ""
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    inbox: str = "_ISO"
    """The prefix of the subjects on which answers come; a host's own, so that no other can read them."""


Request = Callable[[Any, str, bytes], Awaitable[Any]]


async def _of_one(client: Any, subject: str, body: bytes) -> Any:
    return await client.request(subject, body, timeout=_ANSWER)


async def _of_any_replica(client: Any, subject: str, body: bytes) -> Any:
    """The first answer to a question that each replica can answer.

    The servers pass each question on to one of them. Of a machine that is gone without a word they go on believing
    for seconds that it is there, and it answers nothing.
    """
    asked: list[asyncio.Task[Any]] = []
    try:
        for patience in _HEDGES:
            asked.append(asyncio.create_task(_of_one(client, subject, body)))
            done, _ = await asyncio.wait(asked, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if done:
                break
        return await done.pop()
    finally:
        await cancel_all(asked)


class NatsLog:
    """The log of a host (``host.cluster.log.Log``)."""

    def __init__(self, access: Access, clock: Clock | None = None) -> None:
        self._access, self._clock = access, clock or Clock()
        self._urls = list(access.servers)
        self._client: Any = None
        self._connecting: asyncio.Lock = asyncio.Lock()
        self._woken = asyncio.Event()
        self._complaint = ""
        """The newest error that the server or the connection has reported."""
        self._versions: dict[str, str] = {}
        """By server's name."""
        self._surveyed = False
        self._answers: dict[str, Callable[[bytes], bytes | None]] = {}
        self._unanswered = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def append(self, subject: str, body: bytes) -> None:
        client = await self._connected()
        self._complaint = ""
        try:
            answer = json.loads((await client.request(subject, body, timeout=_ANSWER, headers=HEADERS)).data)
        except nats.errors.NoRespondersError:
            raise LogUnavailableError(f"no server has a leader for the stream {STREAM}") from None
        except (nats.errors.Error, OSError, TimeoutError, ValueError) as error:
            self._unanswered += 1
            if self._unanswered >= 3 or client.is_closed:  # another server may reach the leader
                self._drop(client)
            raise self._error(error) from None
        self._unanswered = 0
        if isinstance(answer, dict) and "error" in answer:
            raise _error_of(str(answer["error"].get("description")))
        with contextlib.suppress(nats.errors.Error, OSError):
            await client.publish(TICK, b"")

    async def after(self, place: int) -> Entered | None:
        wish = json.dumps({"seq": place + 1, "next_by_subj": "iso.>"}).encode()
        message = await self._ask(f"$JS.API.DIRECT.GET.{STREAM}", wish, _of_any_replica)
        headers = message.headers or {}
        if PUBLISHED not in headers:
            status = headers.get("Status", "")
            if status == "404":
                return None
            raise LogUnavailableError(f"a direct get was answered {status or 'without a place'}")
        try:
            time = datetime.fromisoformat(headers["Nats-Time-Stamp"]).timestamp()
            body = message.data if headers[PUBLISHED] else b""
            return Entered(int(headers["Nats-Sequence"]), time, headers["Nats-Subject"], body)
        except (KeyError, ValueError) as error:
            raise LogUnavailableError(f"a direct get was answered with a bad header: {error}") from None

    async def wait(self, seconds: float) -> None:
        await self._clock.event(self._woken, seconds)

    async def facts(self) -> Facts:
        if not self._surveyed:
            await self._survey()
        answer = json.loads((await self._ask(f"$JS.API.STREAM.INFO.{STREAM}", b"")).data)
        if "error" in answer:
            text = str(answer["error"].get("description"))
            if answer["error"].get("code") == 404:
                return Facts(
                    1, 0, wrong=(f"there is no stream {STREAM}: an operator makes it with 'isolator cluster init'",)
                )
            raise _error_of(text)
        cluster = answer.get("cluster") or {}
        if not _is_in_touch(cluster, int(answer["config"]["num_replicas"])):
            if self._client is not None:
                self._drop(self._client)  # another server may reach the one that leads now
            raise LogUnavailableError("the server that answers for the stream has lost touch with the others")
        config, state = answer["config"], answer["state"]
        too_old = _too_old(self._versions, int(config["num_replicas"]))
        self._surveyed = not too_old  # or it is looked at again: somebody may update it
        return Facts(
            # An empty stream begins behind its last message; a new one has none.
            first=max(int(state["first_seq"]), 1),
            last=int(state["last_seq"]),
            created=str(answer["created"]),
            replicas=int(config["num_replicas"]),
            servers=tuple(sorted(self._versions.values())),
            bytes=int(state["bytes"]),
            max_bytes=int(config["max_bytes"]),
            wrong=(*_wrong(config), *too_old),
            behind=tuple(
                sorted(
                    str(one.get("name"))[:64]
                    for one in cluster.get("replicas") or ()
                    if not one.get("current") or one.get("offline")
                )
            ),
        )

    async def ask(self, subject: str, body: bytes) -> bytes:
        client = await self._connected()
        # A subject for this answer alone: who is asked, and may be hostile, learns nothing about where others come.
        inbox, future = subject_for_answer(self._access.inbox), asyncio.get_running_loop().create_future()
        try:
            subscription = await client.subscribe(inbox, future=future, max_msgs=1)
            try:
                await subscription.unsubscribe(limit=1)
                await client.publish(subject, body, reply=inbox)
                async with asyncio.timeout(_ANSWER):
                    message = await asyncio.shield(future)
            finally:
                if future.cancel():
                    await subscription.unsubscribe()
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise self._error(error) from None
        if (message.headers or {}).get("Status") == "503":
            raise LogUnavailableError("no other host answers")
        return bytes(message.data)

    def answer(self, subject: str, handler: Callable[[bytes], bytes | None]) -> None:
        self._answers[subject] = handler

    async def _answered(self, message: Any) -> None:
        if not is_for_answers(message.reply):
            return  # where this host's own entries go, for one
        answer = self._answers[message.subject](message.data)
        if answer is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await message.respond(answer)

    async def close(self) -> None:
        if self._client is not None:
            self._drop(self._client)
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _ask(self, subject: str, body: bytes, request: Request = _of_one) -> Any:
        client = await self._connected()
        try:
            return await request(client, subject, body)
        except nats.errors.NoRespondersError:
            # A server that does not know the stream yet, or no more; another one may.
            self._drop(client)
            raise LogUnavailableError(
                f"no server answers for the stream {STREAM}: see 'isolator cluster init'"
            ) from None
        except (nats.errors.Error, OSError, TimeoutError) as error:
            self._drop(client)
            raise self._error(error) from None

    async def _connected(self) -> Any:
        async with self._connecting:
            if self._client is not None and not self._client.is_connected:
                self._drop(self._client)
            if self._client is None:
                url = self._urls.pop(0)
                self._urls.append(url)
                client = await self._connect(url)
                await self._listen(client, TICK, self._ticked)
                for subject in self._answers:
                    await self._listen(client, subject, self._answered)
                self._client = client
            return self._client

    async def _listen(self, client: Any, subject: str, take: Callable[[Any], Awaitable[None]]) -> None:
        """Take messages of other hosts; the server sends no more in a while than leave time for the log."""
        left, began = _HEARD if subject == TICK else _ASKED, self._clock.now()

        async def one(message: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._clock.call_later(max(0.0, began + _WITHIN - self._clock.now()), again)
            if len(message.data) <= QUESTION:
                await take(message)

        def again() -> None:
            if client is self._client and client.is_connected:
                self._begin(self._listen(client, subject, take))

        with contextlib.suppress(nats.errors.Error, OSError):
            subscription = await client.subscribe(subject, cb=one)
            await subscription.unsubscribe(limit=left)

    async def _connect(self, url: str) -> Any:
        access, client = self._access, MistrustfulClient()
        self._complaint = ""
        try:
            async with asyncio.timeout(_CONNECT):
                await client.connect(
                    [url], name="isolator", user=access.user or None, password=access.password or None, tls=access.tls,
                    inbox_prefix=access.inbox, pending_size=0, allow_reconnect=False, connect_timeout=1,
                    max_reconnect_attempts=1, reconnect_time_wait=0.01, ping_interval=2, max_outstanding_pings=2,  # type: ignore[arg-type]
                    error_cb=self._failed, no_echo=False,
                )  # fmt: skip
        except (nats.errors.Error, OSError, TimeoutError, ssl.SSLError) as error:
            self._close_later(client)
            raise self._error(error, url) from None
        self._versions[str(client._server_info.get("server_name", url))] = str(client._server_info.get("version", ""))
        return client

    async def _survey(self) -> None:
        """Learn the versions of all servers that answer: each connection shows its own server's alone."""
        for client in await asyncio.gather(*map(self._connect, self._access.servers), return_exceptions=True):
            if not isinstance(client, BaseException):
                self._surveyed = True
                self._close_later(client)

    async def _ticked(self, _: Any) -> None:
        self._woken.set()

    async def _failed(self, error: Exception) -> None:
        self._complaint = _said(error)

    def _error(self, error: Exception, url: str = "") -> LogUnavailableError:
        complaint = "" if isinstance(error, nats.errors.NoServersError) else _said(error)
        text = self._complaint or complaint or f"no answer within {_CONNECT if url else _ANSWER:.0f} s"
        return _error_of(f"{_plain(url)}: {text}" if url else text)

    def _drop(self, client: Any) -> None:
        self._unanswered = 0
        if self._client is client:
            self._client = None
        self._close_later(client)

    def _close_later(self, client: Any) -> None:
        async def end() -> None:
            with contextlib.suppress(Exception, asyncio.CancelledError):  # whatever it is: it is over
                await asyncio.wait_for(client.close(), _ANSWER)

        self._begin(end())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def make_stream(access: Access, replicas: int, max_bytes: int = MAX_BYTES) -> bool:
    """Make the stream, once for a cluster, as a user who may; whether it was not there. Raises LogUnavailableError."""
    log = NatsLog(access)
    config = {
        "name": STREAM, "subjects": [*SUBJECTS], "storage": "file", "retention": "limits", "discard": "old",
        "num_replicas": replicas, "max_bytes": max_bytes, "max_age": MAX_AGE * 1_000_000_000, "max_msgs": -1,
        "max_msg_size": MAX_MESSAGE, "allow_direct": True, "deny_delete": True, "deny_purge": True,
    }  # fmt: skip
    try:
        for attempt in range(_ATTEMPTS):
            try:
                known = json.loads((await log._ask(f"$JS.API.STREAM.INFO.{STREAM}", b"")).data)
                if "error" not in known:
                    return False
                answer = await log._ask(f"$JS.API.STREAM.CREATE.{STREAM}", json.dumps(config).encode())
                break
            except LogRefusedError:
                raise
            except LogUnavailableError:  # servers that have just started have no leader yet
                if attempt == _ATTEMPTS - 1:
                    raise
                await asyncio.sleep(1)
    finally:
        await log.close()
    made = json.loads(answer.data)
    if "error" in made:
        raise _error_of(str(made["error"].get("description")))
    return True


def _is_in_touch(cluster: dict[str, Any], replicas: int) -> bool:
    """Whether a stream's leader has heard of a majority lately.

    One that is cut off goes on describing the stream as it was then, for as long as that lasts: to believe it would be
    to think that the log has lost what others have appended since.
    """
    if replicas == 1:
        return True
    heard = [
        one
        for one in cluster.get("replicas") or ()
        if one.get("name") != cluster.get("leader") and (one.get("current") or one.get("active"))
    ]
    lately = sum(one.get("active", 0) <= _TOUCH and not one.get("offline") for one in heard)
    return bool(cluster.get("leader")) and 2 * (1 + lately) > replicas


def _wrong(config: dict[str, Any]) -> list[str]:
    found = []
    for key, right in (("storage", "file"), ("retention", "limits"), ("discard", "old"), ("allow_direct", True)):
        if config.get(key, False) != right:
            found.append(f"the stream has {key} {config.get(key)!r} in place of {right!r}")
    if sorted(config.get("subjects") or ()) != sorted(SUBJECTS):
        found.append(f"the stream has the subjects {', '.join(config.get('subjects') or ())[:100]}")
    if config["num_replicas"] == 2:
        found.append("the stream has two replicas: neither can decide without the other; one or three can")
    if config.get("max_msgs", -1) > 0 or config.get("max_msgs_per_subject", -1) > 0:
        found.append("the stream has a bound of messages: its bounds are max_bytes and max_age")
    return found


def _too_old(versions: dict[str, str], replicas: int) -> list[str]:
    oldest = OLDEST_OF_THREE if replicas > 1 else OLDEST
    return [
        f"nats-server {version} ({name[:64]}) is too old: {replicas} replicas need {'.'.join(map(str, oldest))}"
        for name, version in sorted(versions.items())
        if tuple(map(int, re.findall(r"\d+", version)[:3])) < oldest
    ]


def _error_of(text: str) -> LogUnavailableError:
    if _FULL.search(text):
        return LogFullError(text)
    return LogRefusedError(text) if _REFUSED.search(text) else LogUnavailableError(text)


def _said(error: Exception) -> str:
    """Say an error in words for who runs the servers; empty: there was no answer."""
    if isinstance(error, TimeoutError):
        return ""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)  # below 0: of a name's resolution
    return str(error) or type(error).__name__


def _plain(url: str) -> str:
    return url.rpartition("@")[2].removeprefix("nats://").removeprefix("tls://")


def addresses(servers: Sequence[str], tls: bool) -> tuple[str, ...]:
    """URLs of ``HOST:PORT``."""
    return tuple(f"{'tls' if tls else 'nats'}://{server}" for server in servers)
