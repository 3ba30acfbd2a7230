"""The lasting connection of stream mode."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING

from host.authoring.certify.stage import GOOD
from host.certifying.single import send_bytewise
from host.channel.reply import read_reply
from host.wire.strict_json import WireError, line, parse_object

if TYPE_CHECKING:
    from host.certifying.taps import Peer, TappedLink

_REQUEST = b'{"jsonrpc":"2.0","method":'
_HELLO = b'"method":"host.hello"'


class Lasting:
    """The conversation with one run."""

    def __init__(self, link: TappedLink, near: Peer, far: Peer, family: socket.AddressFamily, run: str) -> None:
        self._link, self._near, self._far, self._run = link, near, far, run
        self._doubles: dict[str, asyncio.Future[bytes]] = {}
        """Requests that are ours alone, by number, until they are answered."""

    async def hold(self) -> None:
        """Carry lines both ways, and play what is on the stage; raises OSError when one side has gone."""
        ways = {asyncio.ensure_future(self._down()), asyncio.ensure_future(self._up())}
        done, others = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in others:
            way.cancel()
        for way in done:
            way.result()

    async def _down(self) -> None:
        while request := await _line(self._near):
            scene = self._link.stage.scene()
            once = self._link.played != scene.number
            event = request.startswith(_REQUEST) and _HELLO not in request[:60] and b'"id":' in request
            if not event or not once:
                await self._far.send(request)
                continue
            self._link.played = scene.number
            match scene.play:
                case "bytes":
                    await send_bytewise(self._far, request)
                case "late":
                    await self._far.send(request[:1])
                    await asyncio.sleep(scene.late)
                    await self._far.send(request[1:])
                case "half" | "hold":
                    await self._far.send(request[: len(request) // 2])
                    if scene.play == "hold":
                        await self._near.reader.read()  # until the host gives up
                    return
                case "gone":
                    self._far.deafen()
                    await self._far.send(request)
                    return
                case "garbage":
                    await self._far.send(b"certify: this is no message\n" + request)
                case "note":
                    await self._far.send(line({"jsonrpc": "2.0", "method": "isolator.certify", "params": {}}))
                    await self._far.send(request)
                case "twice":
                    await self._double(request, b"")
                    await self._far.send(request)
                case "joined":
                    await self._double(request, request)
                case _:
                    await self._far.send(request)

    async def _double(self, request: bytes, beside: bytes) -> None:
        """Send the same event under another id, in one piece with ``beside``, and await its reply."""
        head, separator, _ = request.rpartition(b',"id":')
        number = os.urandom(8).hex()
        reply = self._doubles[number] = asyncio.get_running_loop().create_future()
        await self._far.send(beside + head + separator + f'"{number}"}}\n'.encode())
        try:
            outcome = read_reply(await asyncio.wait_for(reply, self._link.stage.scene().patience), expect=number)
            if outcome.kind not in GOOD:
                self._link.found(self._run, f"does not answer the same event again in good order: {outcome.detail}")
        except TimeoutError:
            self._link.found(self._run, "leaves one of two requests without a reply")

    async def _up(self) -> None:
        while reply := await _line(self._far):
            number: object = None
            if self._doubles:
                with contextlib.suppress(WireError):
                    number = parse_object(reply).get("id")
            double = self._doubles.pop(number, None) if isinstance(number, str) else None
            if double is None:
                await self._near.send(reply)
            elif not double.done():
                double.set_result(reply)

    def close(self) -> None:
        self._near.close()
        self._far.close()


async def _line(peer: Peer) -> bytes:
    """The next line, or what there is before the end; empty at the end."""
    try:
        return await peer.reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError:
        return await peer.reader.read(1 << 20)
