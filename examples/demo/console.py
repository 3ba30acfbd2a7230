"""The console of the demo's daemon: for a person's browser outside its network, and as pictures.

The daemon's network is an empty namespace that no browser can reach. So a listener on the host's loopback, made before
that is entered, leads connections to the console, and to nothing else; whoever connects needs the token.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import report
from daemon import Daemon, DemoError
from stage import HOSTILE, Demo

PORT = 8090
"""The console's, in the demo's network."""
SETTINGS = f"[console]\nport = {PORT}\n"
KINDS = {"light": (1280, False), "dark": (1280, True), "narrow": (390, False)}
"""Widths of the kinds of pictures, by name, and whether they are dark."""


def outside() -> int:
    """The descriptor of a listener on loopback, which a program that this process executes keeps."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.set_inheritable(True)
    return listener.detach()


@contextlib.contextmanager
def leading(descriptor: int) -> Iterator[int]:
    """Lead connections of that listener to the console; its port."""
    with socket.socket(fileno=descriptor) as listener:
        listener.set_inheritable(False)
        loop = asyncio.new_event_loop()
        server = loop.run_until_complete(asyncio.start_server(_lead, sock=listener))
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.run_until_complete(_close(server))
            loop.close()


async def _close(server: asyncio.Server) -> None:
    """Close the listener, and the connections that a browser still has."""
    server.close()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.closing(writer), contextlib.suppress(OSError):
        near, far = await asyncio.open_connection("127.0.0.1", PORT)
        with contextlib.closing(far):
            ways = [asyncio.ensure_future(_copy(*way)) for way in ((reader, far), (near, writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)  # the console closes what it has answered
            for way in ways:
                way.cancel()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(1 << 16):
        target.write(data)
        await target.drain()


def url(daemon: Daemon, port: int = PORT) -> str:
    """A URL of the console that lets one browser in."""
    code, text = daemon.run("console", "--json")
    if code != 0:
        raise DemoError(f"'isolator console' ended with {code}: {text.strip()[:300]}")
    return str(json.loads(text)["url"]).replace(f":{PORT}/", f":{port}/")


def offer(daemon: Daemon, port: int) -> None:
    """Say where a browser finds the console."""
    report.blank()
    report.say("The console of this daemon, for a browser on this machine; the address works once:")
    print(url(daemon, port), flush=True)


def wait_for_person(daemon: Daemon, port: int) -> None:
    """Let a person look until they press Enter; without one at the keyboard there is nobody to wait for."""
    if not sys.stdin.isatty():
        return
    offer(daemon, port)
    report.say("Press Enter to end the demo.")
    select.select([sys.stdin], [], [])


def take_pictures(demo: Demo, folder: Path) -> None:
    """Write pictures of the pages, as Chromium shows them, to a folder."""
    from isolator.linux import netns
    from tests.support.browser import chromium, missing, save_picture

    if lacking := missing():
        raise DemoError(f"no screenshots: {lacking}")
    address = url(demo.daemon)
    origin = address.partition("/enter")[0]
    pages = {"overview": "/", "plugin": f"/plugin/{HOSTILE}", "story": f"/story/{demo.story}", "denials": "/denials"}
    network = netns.current_network()
    try:
        with chromium(network) as browser:
            browser.get(address)
            for name, path in pages.items():
                browser.get(origin + path)
                for kind, (width, dark) in KINDS.items():
                    save_picture(browser, folder / f"{name}-{kind}.png", width, dark=dark)
    finally:
        os.close(network)
    report.blank()
    report.say(f"Pictures of the console are in {folder}.")
