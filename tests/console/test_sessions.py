"""Tokens and sessions: nobody's push out those of others."""

from __future__ import annotations

import http.server
import socketserver
import threading
from pathlib import Path
from typing import Any

import pytest

from host.console import sessions
from host.console.command import _url_of_the_daemons
from host.console.events import as_many
from host.console.sessions import MOST, Sessions
from isolator.errors import IsolatorError
from isolator.paths import Paths
from isolator.policy.cluster import Cluster
from isolator.policy.host import Console, HostConfig, Roles
from isolator.supervisor.console_link import ConsoleLink

ROOT, VIEWER = 0, 61100


def test_tokens_and_sessions_of_a_viewer_take_no_place_of_an_operators() -> None:
    kept = Sessions()
    token, cookie = kept.token(ROOT), kept.enter(kept.token(ROOT), "a.localhost")
    assert cookie is not None
    for _ in range(10 * MOST):
        kept.enter(kept.token(VIEWER), "b.localhost")
        kept.token(VIEWER)
    assert kept.of(cookie, "a.localhost") is not None
    assert kept.enter(token, "a.localhost") is not None
    assert len(kept.pass_on()) == MOST + 2


def test_session_that_is_over_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Sessions()
    monkeypatch.setattr(sessions, "SESSION_SECONDS", -1.0)
    cookie = kept.enter(kept.token(VIEWER), "b.localhost")
    assert cookie is not None and kept.of(cookie, "b.localhost") is None
    kept.enter(kept.token(ROOT), "a.localhost")
    assert len(kept.pass_on()) == 1


@pytest.mark.parametrize(
    "answer",
    [
        '{"url": "\\u001b]0;owned\\u0007"}',
        '{"url": "http://evil.example/enter?token=' + "A" * 43 + '"}',
        '{"url": "http://i0123456789abcdef.localhost:80/enter?token=' + "A" * 43 + '\\n"}',
        '{"url": 7}',
        "{}",
    ],
)
def test_console_that_was_taken_over_prints_nothing_of_its_own(tmp_path: Path, answer: str) -> None:
    class Broken(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + answer.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with socketserver.UnixStreamServer(str(tmp_path / "socket"), Broken) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(IsolatorError, match="no URL of its own"):
            _url_of_the_daemons(tmp_path / "socket")
        thread.join()


def test_console_learns_nothing_but_its_settings_and_the_roles() -> None:
    link = object.__new__(ConsoleLink)
    link._settings = Console(port=8090)
    cluster = Cluster(name="one", servers=("nats:4222",), secret="USER:PASSWORD")
    link._config = HostConfig(
        roles=Roles(viewer=(VIEWER,)), console=link._settings, proxy="proxy.example:3128", cluster=cluster
    )
    link._paths = Paths.of("/nowhere")
    sent = HostConfig.model_validate(link._hello(0).config)
    assert sent == HostConfig(roles=link._config.roles, console=link._settings)


def test_every_ingress_takes_as_long_as_one_that_does_not_exist() -> None:
    secrets = {"one": ("a",), "two": ("b", "c"), "none": ()}
    assert {len(as_many(secrets.get(name, ()), secrets.values())) for name in (*secrets, "nobody")} == {2}
    assert as_many(("a",), secrets.values())[0] == "a" and len(as_many((), [])) == 1
