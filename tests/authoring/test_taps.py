"""The certifier's taps between the host and a plugin."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import cast

import pytest

from host.certifying.single import Single
from host.certifying.taps import Peer, TappedLink
from tests.support.timeouts import seconds


@pytest.mark.parametrize("who", ["plugin", "host"])
async def test_held_event_is_over_when_either_side_has_gone(who: str) -> None:
    """Else the attempt of a plugin that has ended stays in flight for as long as an event may take."""
    host, near = socket.socketpair()
    far, plugin = socket.socketpair()
    for sock in (near, far):
        sock.setblocking(False)
    scene = SimpleNamespace(play="hold", mode="oneshot", number=1)
    link = cast(TappedLink, SimpleNamespace(stage=SimpleNamespace(scene=lambda: scene), played=0))
    conversation = Single(link, await Peer.over(near), await Peer.over(far), socket.AF_UNIX, "run")
    with host, plugin:
        host.send(b'{"jsonrpc":"2.0","method":"deploy.completed","id":1}\n')
        held = asyncio.ensure_future(conversation.hold())
        assert await asyncio.get_running_loop().run_in_executor(None, plugin.recv, 4096)
        plugin.send(b"half an answer")  # says nothing of its end
        {"plugin": plugin, "host": host}[who].close()
        await asyncio.wait_for(held, seconds(60))
        conversation.close()
