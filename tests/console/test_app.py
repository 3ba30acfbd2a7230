"""The application by itself: what it answers when something in it, or behind it, is at fault."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest

from host.console.app import BODIES, App
from host.console.sessions import Sessions
from host.console.upstream import Live
from isolator.policy.host import Console, HostConfig, Ingress

ROOT = 0


class Faulty:
    """A daemon whose answers nobody has thought of."""

    connected = False

    async def call(self, verb: str, /, **params: Any) -> dict[str, Any]:
        raise RuntimeError("\x1b[31mnobody has thought of this")


async def ask(
    app: App, path: str, accept: str = "", *, method: str = "GET", uid: int | None = ROOT, receive: Any = None
) -> tuple[int, str]:
    """Status and text of one request."""
    sent: list[dict[str, Any]] = []

    async def whole() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    scope = {
        "type": "http", "method": method, "path": path, "query_string": b"", "headers": [(b"accept", accept.encode())],
        "state": {"uid": uid}, "server": None, "client": None, "scheme": "http", "http_version": "1.1",
    }  # fmt: skip
    await app.asgi(scope, receive or whole, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()


def made(folder: Path, config: HostConfig | None = None) -> App:
    upstream: Any = Faulty()
    return App(upstream, Live(upstream), Sessions(), folder, port=None, config=config)


async def test_fault_is_answered_as_every_refusal_is_and_does_not_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = made(tmp_path)
    for _ in range(50):
        status, text = await ask(app, "/v1/status")
        assert status == 500 and json.loads(text)["error"]["code"] == "failed" and "nobody" not in text
    status, text = await ask(app, "/", "text/html")
    assert status == 500 and "has failed" in text and "<html" in text
    assert 0 < len([one for one in caplog.records if one.levelname == "ERROR"]) <= 5


async def test_bodies_of_nobody_take_no_memory_of_callers_that_are_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = made(tmp_path, HostConfig(console=Console(emit=True)))
    ended = asyncio.Event()

    async def half() -> AsyncIterator[dict[str, Any]]:
        yield {"type": "http.request", "body": b"x" * 1_000_000, "more_body": True}
        await ended.wait()
        yield {"type": "http.disconnect"}

    def send_half(uid: int | None) -> Awaitable[tuple[int, str]]:
        path = "/v1/ingress/shop" if uid is None else "/v1/events"
        return asyncio.ensure_future(ask(app, path, method="POST", uid=uid, receive=half().__anext__))

    slow = [send_half(None) for _ in range(BODIES // 1_000_000 + 1)]
    (refused,), others = await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
    assert refused.result()[0] == 503
    status, text = await ask(app, "/v1/events", method="POST")
    assert status == 400 and "CloudEvent" in text
    ended.set()
    assert {status for status, _ in await asyncio.gather(*others)} == {400}
    assert app._bodies.total() == 0 and not caplog.records


async def test_health_is_that_of_the_daemon_behind_it(tmp_path: Path) -> None:
    assert await ask(made(tmp_path), "/healthz") == (503, '{"ok": false}')


async def test_events_are_taken_only_where_that_is_on(tmp_path: Path) -> None:
    status, text = await ask(made(tmp_path, HostConfig(console=Console(port=8090))), "/v1/events", method="POST")
    assert status == 403 and "[console] emit = true" in text


def test_console_gets_no_role_that_it_does_not_need() -> None:
    ingress = {"shop": Ingress(secret_file="/etc/secret", events=("deploy.completed",))}
    for settings, role in (
        (Console(), "viewer"),
        (Console(emit=True), "emitter"),
        (Console(ingress=ingress), "emitter"),
    ):
        assert HostConfig(console=settings).with_console(61150).role_of(61150) == role
