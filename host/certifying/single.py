"""A connection for one event: one-shot and HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, NoReturn

from host.authoring.certify.stage import GOOD
from host.channel.cloud_events import outcome_of
from host.channel.http import AnswerReader
from host.channel.reply import LostError, NotSentError, Outcome, read_reply
from isolator.errors import IsolatorError

if TYPE_CHECKING:
    from host.certifying.taps import Peer, TappedLink

_LARGEST = 256 << 10
_LINGER_SECONDS, _GARBAGE_SECONDS = 0.3, 2.0
_PIECE_SECONDS = 0.002
_OTHER_ID = 4242
_EVENT, _PING = (b"{", b"POST "), b'"method":"ping"'


class Single:
    """The conversation about one event."""

    def __init__(self, link: TappedLink, near: Peer, far: Peer, family: socket.AddressFamily, run: str) -> None:
        self._link, self._near, self._far, self._family, self._run = link, near, far, family, run
        self._http = link.stage.scene().mode == "http"

    async def hold(self) -> None:
        """Play what is on the stage, and carry the event; raises OSError when one side has gone."""
        request = await self._near.reader.read(1 << 20)  # the host writes it at once
        if not request:
            return
        scene = self._link.stage.scene()
        play = scene.play if request.startswith(_EVENT[self._http]) and _PING not in request[:60] else "plain"
        if play in ("id", "empty", "half", "gone", "garbage", "twice") and self._link.played != scene.number:
            self._link.played = scene.number
            with contextlib.suppress(OSError):  # the plugin's right after such a thing
                await self._spoil(play, request)
            self._far.close()
            try:
                self._far = await self._link.again(self._family)
            except (IsolatorError, NotSentError) as error:
                self._link.found(self._run, f"cannot be reached any more: {error}")
                return
        if play == "hold":
            await self._far.send(request[: len(request) // 2])
            await self._until_one_has_gone()
            return
        if play == "late":
            await asyncio.sleep(scene.late)
        if play == "bytes":
            await send_bytewise(self._far, request)
        else:
            await self._far.send(request)
        await self._carry_reply()

    async def _until_one_has_gone(self) -> None:
        """Wait until the host gives up, or the plugin has ended; raises OSError when one was broken off."""
        ends = {asyncio.ensure_future(_end_of(side)) for side in (self._near, self._far)}
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in done:
                end.result()
        finally:
            for end in ends:
                end.cancel()

    async def _spoil(self, play: str, request: bytes) -> None:
        """Play a fault on a connection of its own."""
        if play == "empty":
            return
        if play == "garbage":
            await self._far.send(b"certify: this is no message\r\n\r\n")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._far.reader.read(_LARGEST), _GARBAGE_SECONDS)
        elif play == "half":
            await self._far.send(request[: len(request) // 2])
        elif play == "gone":
            self._far.deafen()
            await self._far.send(request)
        elif play == "twice":
            await self._far.send(request)
            self._judge(await self._reply(), "the same event, before it comes again")
        else:
            await self._far.send(request.replace(b',"id":1}', b',"id":%d}' % _OTHER_ID))
            self._judge(await self._reply(), f"a request with the id {_OTHER_ID}", _OTHER_ID)

    async def _reply(self) -> bytes:
        """The answer to what was sent, as far as it comes in time."""
        data = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._link.stage.scene().patience):
                while len(data) < _LARGEST and (chunk := await self._far.reader.read(1 << 16)):
                    data += chunk
                    if not self._http and b"\n" in data:
                        break
        return data

    def _judge(self, data: bytes, what: str, number: int = 1) -> None:
        try:
            if self._http:
                reader = AnswerReader("POST")
                outcome = outcome_of(reader.feed(data) or reader.feed(b"") or _never())
            else:
                outcome = read_reply(data, expect=number)
        except LostError as error:
            outcome = Outcome("failed", detail=str(error))
        if outcome.kind not in GOOD:
            self._link.found(self._run, f"answers {what} with none in good order: {outcome.detail}")

    async def _carry_reply(self) -> None:
        """Carry the reply to the host; a one-shot reply's last byte once what else comes is known."""
        gone = asyncio.ensure_future(self._near.reader.read())
        seen = b""
        try:
            while True:
                more = asyncio.ensure_future(self._far.reader.read(1 << 16))
                await asyncio.wait({more, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not more.done():
                    more.cancel()
                    return
                data = more.result()
                line, newline, behind = data.partition(b"\n")
                seen += line
                if self._http or (not newline and data and len(seen) < _LARGEST):
                    if not data:
                        return
                    await self._near.send(data)
                    continue
                if newline:
                    await self._near.send(line)
                    await self._look_behind(behind)
                    await self._near.send(b"\n")
                elif seen:
                    self._link.found(self._run, "its reply does not end with a newline")
                return
        finally:
            gone.cancel()

    async def _look_behind(self, behind: bytes) -> None:
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while not behind.strip() and (data := await self._far.reader.read(1 << 16)):
                    behind = data
        if behind.strip():
            self._link.found(self._run, "writes more than one line for one event")

    def close(self) -> None:
        self._near.close()
        self._far.close()


async def _end_of(peer: Peer) -> None:
    """Return when the peer has closed its side, whatever it sends before."""
    while await peer.reader.read(1 << 16):
        pass


async def send_bytewise(peer: Peer, data: bytes) -> None:
    """Send each byte by itself; the last two in one, since without its newline a message may be whole, and answered."""
    end = max(0, len(data) - 2)
    for place in range(end):
        await peer.send(data[place : place + 1])
        await asyncio.sleep(_PIECE_SECONDS)
    await peer.send(data[end:])


def _never() -> NoReturn:
    raise LostError("the connection was closed in the middle of it")
