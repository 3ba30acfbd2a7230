"""A small deployment platform that embeds Isolator.

    python3 examples/platform --data DIR [--port N] [--root DIR]

Threads and tasks: HTTP requests change the store, each in a thread of its own; one thread deploys what was accepted;
the event loop has the connection to the daemon, answers what plugins ask, and empties the outbox. Nobody waits for the
daemon: while it is away requests are accepted all the same and their events wait in the outbox.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from store import Row, Store
from web import server, take

from host import PluginHost
from isolator.errors import DeniedError, IsolatorError, NotFoundError, UnavailableError, UsageError

DEPLOY_TIME = 0.05
PAUSE_FIRST, PAUSE_LONGEST = 0.1, 5.0
EMIT_TIMEOUT = 30.0


def deploy(store: Store, work: threading.Event, stop: threading.Event) -> None:
    """Deploy what was accepted, one after the other; a branch called ``broken`` fails."""
    while not stop.is_set():
        deployment = store.next_deployment()
        if deployment is None:
            work.wait()
            work.clear()
            continue
        began = time.monotonic()
        stop.wait(DEPLOY_TIME)  # here a real platform builds and starts something
        took = round((time.monotonic() - began) * 1000)
        if deployment["branch"] == "broken":
            store.finish(deployment, took, error="BUILD_FAILED")
        else:
            store.finish(deployment, took, url=f"https://{deployment['id'].replace('_', '-')}.apps.example")


async def empty_outbox(store: Store, host: PluginHost, news: asyncio.Event) -> None:
    """Emit what waits, in order, for ever. An event leaves the outbox only when the daemon has it on disk."""
    pause, said = PAUSE_FIRST, ""
    while True:
        news.clear()
        rows = store.waiting()
        for row in rows:
            try:
                async with asyncio.timeout(EMIT_TIMEOUT):
                    event = await host.emit(row["name"], json.loads(row["payload"]), dedupe_key=row["key"])
            except (UsageError, NotFoundError) as error:
                # It will never be right: keep it with the reason instead of holding up all that follow.
                store.settle(row["seq"], error=str(error))
                print(f"platform: {row['name']} was refused: {error}", file=sys.stderr, flush=True)
                continue
            except (IsolatorError, TimeoutError) as error:
                if str(error) != said:
                    said = str(error)
                    print(f"platform: events wait: {said or 'the daemon does not answer'}", file=sys.stderr, flush=True)
                await asyncio.sleep(pause)
                pause = min(pause * 2, PAUSE_LONGEST)
                break
            store.settle(row["seq"], event_id=event.id)
            pause, said = PAUSE_FIRST, ""
        if not rows:
            await news.wait()


async def serve_plugins(store: Store, host: PluginHost) -> None:
    """Register what plugins may ask; raises DeniedError when this user has no role."""

    def method(answer: Callable[[Row], Any], **fields: tuple[type, bool]) -> Callable[[str, Row], Any]:
        async def handler(plugin: str, params: Row) -> Any:
            return await asyncio.to_thread(answer, take(params, **fields))

        return handler

    def listing(table: str) -> Callable[[Row], Any]:
        return lambda given: {table: store.some(table, given.get("project_id"), min(max(given["limit"] or 50, 1), 100))}

    def single(table: str) -> Callable[[Row], Any]:
        return lambda given: store.one(table, "id", given["id"])

    some, of_project, by_id = {"limit": (int, False)}, {"project_id": (str, False)}, {"id": (str, True)}
    await host.serve("projects.get", "read:projects", method(single("projects"), **by_id))
    await host.serve("projects.list", "read:projects", method(listing("projects"), **some))
    await host.serve("deployments.get", "read:deployments", method(single("deployments"), **by_id))
    await host.serve("deployments.list", "read:deployments", method(listing("deployments"), **of_project, **some))
    await host.serve("domains.list", "read:domains", method(listing("domains"), **of_project, **some))


async def talk_to_the_daemon(store: Store, root: str | None, news: asyncio.Event) -> None:
    """Connect as soon as there is a daemon; from then on the library connects again by itself."""
    said = False
    while True:
        with contextlib.suppress(UnavailableError):
            async with PluginHost.connect(root) as host:
                await serve_plugins(store, host)
                print("platform: connected to the daemon", file=sys.stderr, flush=True)
                await empty_outbox(store, host, news)
        if not said:
            said = True
            print("platform: the daemon is away; events wait", file=sys.stderr, flush=True)
        await asyncio.sleep(PAUSE_FIRST * 5)


async def run(data: Path, port: int, root: str | None) -> None:
    """Serve until SIGTERM or SIGINT; what was accepted is on disk at any instant."""
    store = Store(data / "platform.db")
    web = server(store, port)
    loop, news, stop = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    work, end = threading.Event(), threading.Event()

    def on_event() -> None:
        work.set()
        loop.call_soon_threadsafe(news.set)

    store.on_event = on_event
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    threads = [threading.Thread(target=web.serve_forever), threading.Thread(target=deploy, args=(store, work, end))]
    for thread in threads:
        thread.start()
    talking = asyncio.create_task(talk_to_the_daemon(store, root, news))
    stopping = asyncio.create_task(stop.wait())
    print(f"platform: ready on http://127.0.0.1:{web.server_port}", flush=True)
    try:
        await asyncio.wait((talking, stopping), return_when=asyncio.FIRST_COMPLETED)
        if talking.done():
            await talking  # it only ends by an error
    finally:
        for task in (talking, stopping):
            task.cancel()
        await asyncio.gather(talking, stopping, return_exceptions=True)
        end.set()
        work.set()
        await asyncio.to_thread(web.shutdown)
        web.server_close()  # waits for the requests that are under way
        for thread in threads:
            await asyncio.to_thread(thread.join)
        store.on_event = lambda: None
        store.close()
    print("platform: stopped", flush=True)


def main() -> int:
    """The command line; errors are one line."""
    parser = argparse.ArgumentParser(prog="platform", description="A small deployment platform with plugins.")
    parser.add_argument("--data", type=Path, required=True, help="folder for its database")
    parser.add_argument("--port", type=int, default=8080, help="on 127.0.0.1; 0: any (default: 8080)")
    parser.add_argument("--root", help="the daemon's --root")
    given = parser.parse_args()
    try:
        asyncio.run(run(given.data, given.port, given.root))
    except DeniedError as error:
        print(f"platform: {error}", file=sys.stderr)
        return 4
    except IsolatorError as error:
        print(f"platform: {error}", file=sys.stderr)
        return 1
    return 0


sys.exit(main())
