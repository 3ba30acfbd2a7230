"""Ways into the console from a browser, from the network and from other users, each refused."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

import pytest

from host.console import connections
from host.console.upstream import LISTENERS_OF_ONE
from tests.console.support import CALLER, EMITTER, PORT, STRANGER, VIEWER, Console
from tests.support.timeouts import seconds
from tests.system.daemon import event, wait_for

PAGES = ("/", "/events", "/denials", "/trail", "/trail/1", "/live", "/v1/status", "/v1/openapi.json", "/plugin/x")


def test_page_is_shown_to_a_browser_that_was_let_in(console: Console) -> None:
    host, cookie = console.enter()
    page = console.at_port("/", host=host, cookie=cookie)
    assert page.status == 200 and "Overview" in page.text, page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["referrer-policy"] == "no-referrer" and page.headers["x-frame-options"] == "DENY"
    assert "script-src 'self';" in page.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert console.at_port("/v1/status", host=host, cookie=cookie).json["plugins"] == 0


@pytest.mark.parametrize(("name", "kind"), [("console.css", "text/css"), ("console.js", "text/javascript")])
def test_style_and_script_are_served(console: Console, name: str, kind: str) -> None:
    answer = console.at_port(f"/static/{name}")
    assert answer.status == 200 and answer.headers["content-type"].startswith(kind) and answer.body


@pytest.mark.parametrize("path", PAGES)
def test_nothing_is_shown_without_a_session(console: Console, path: str) -> None:
    refused = console.at_port(path)
    assert refused.status == 401 and refused.headers["www-authenticate"] == 'Isolator realm="console"'
    assert console.at_port(path, cookie="isolator=" + "A" * 43).status == 401


@pytest.mark.parametrize(
    "host",
    [
        f"evil.example:{PORT}",
        "evil.localhost.example",
        f"localhost.:{PORT}",
        "",
        "169.254.169.254",
        "evil.example/v1/ingress/shop",
        "evil.example/v1/ingress/shop?",
        "localhost@evil.example",
        "evil.example#localhost",
    ],
)
def test_name_that_is_rebound_to_this_host_is_refused_before_routing(console: Console, host: str) -> None:
    _, cookie = console.enter()
    for path in ("/", "/healthz", "/static/console.js", "/enter?token=x"):
        assert console.at_port(path, host=host, cookie=cookie).status in (400, 401, 403), path


def test_cookie_is_worth_nothing_under_another_name(console: Console) -> None:
    _, cookie = console.enter()  # a program at another port of 127.0.0.1 may have been sent it
    assert console.at_port("/", cookie=cookie).status == 401
    assert console.at_port("/", host=f"i00.localhost:{PORT}", cookie=cookie).status == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": f"http://127.0.0.1:{PORT + 1}"},
        {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"},
    ],
)  # fmt: skip
def test_request_of_another_page_is_refused(console: Console, headers: dict[str, str]) -> None:
    host, cookie = console.enter()
    assert console.at_port("/", host=host, cookie=cookie, **headers).status == 403
    good = {"origin": f"http://{host}", "sec_fetch_site": "same-origin"}
    assert console.at_port("/", host=host, cookie=cookie, **good).status == 200


def test_token_works_once(console: Console) -> None:
    host, _, rest = console.url().removeprefix("http://").partition("/")
    first = console.at_port(f"/{rest}", host=host)
    assert first.status == 303 and "HttpOnly" in first.headers["set-cookie"]
    assert "samesite=strict" in first.headers["set-cookie"].lower()
    assert console.at_port(f"/{rest}", host=host).status == 401
    assert console.at_port("/enter?token=", host=host).status == 401


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/v1/events", "/v1/token", "/v1/plugin/remove", "/v1/status"])
def test_cookie_reads_and_never_posts(console: Console, method: str, path: str) -> None:
    host, cookie = console.enter()
    answer = console.at_port(path, method=method, host=host, cookie=cookie, body=b"{}")
    assert answer.status in (401, 403), (method, path, answer.text)


def test_other_users_reach_the_socket_only_with_a_role(console: Console) -> None:
    assert console.as_user(VIEWER, "/v1/status")[0] == 200
    assert console.as_user(STRANGER, "/v1/status")[0] == 403
    assert console.as_user(CALLER, "/v1/status")[0] == 403  # of tools, and of nothing else
    assert console.as_user(STRANGER, "/v1/token", "-d", "")[0] == 403
    assert console.as_user(VIEWER, "/v1/status", member=False)[0] == 0  # the group's alone
    cloud = ["-H", "content-type: application/cloudevents+json", "-d"]
    body = '{"specversion":"1.0","id":"u1","source":"/test","type":"deploy.completed","data":' + event(1) + "}"
    assert console.as_user(VIEWER, "/v1/events", *cloud, body)[0] == 403
    assert console.as_user(EMITTER, "/v1/events", *cloud, body)[0] == 200


@pytest.mark.parametrize(
    "path", ["/static/../service.py", "/static/%2e%2e/service.py", "/static/..%2fapp.py", "/static//etc/passwd",
             "/static/%00", "/plugin/..%2f..%2fetc", "/story/..%2F..", "/trail/-1", "/trail/99999999999999999999",
             "/trail/1e3", "/trail/" + "9" * 5000, "/trail/" + "9" * 16, "/events?since=99999999999w",
             "/events?since=0001-01-01T00:00%2B14:00"],
)  # fmt: skip
def test_path_leads_nowhere_else(console: Console, path: str) -> None:
    host, cookie = console.enter()
    answer = console.at_port(path, host=host, cookie=cookie)
    assert answer.status in (400, 404), (answer.status, answer.text[:300])
    assert "root:" not in answer.text and "import" not in answer.text


def test_request_with_two_lengths_is_refused_and_nothing_behind_it_is_read(console: Console) -> None:
    two = (
        b"POST /v1/ingress/shop HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    with console.connect() as sock, sock.makefile("rb") as answers:
        sock.sendall(two + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        text = answers.read()
    assert text.startswith(b"HTTP/1.1 400") and text.count(b"HTTP/1.1") == 1, text


def test_pages_of_one_session_leave_the_live_view_to_others(console: Console) -> None:
    with contextlib.ExitStack() as stack:

        def follow(host: str, cookie: str) -> bytes:
            sock = stack.enter_context(console.connect())
            sock.sendall(f"GET /live HTTP/1.1\r\nHost: {host}\r\nCookie: {cookie}\r\n\r\n".encode())
            return sock.recv(12)

        one, other = console.enter(), console.enter()
        assert [follow(*one) for _ in range(LISTENERS_OF_ONE + 1)][-2:] == [b"HTTP/1.1 200", b"HTTP/1.1 503"]
        assert follow(*other) == b"HTTP/1.1 200"


def test_request_that_is_no_http_ends_its_connection_alone(console: Console) -> None:
    smuggled = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    twice, tls = b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00"
    for garbage in (tls, twice, b"A" * 70_000 + b"\r\n\r\n", smuggled):
        with console.connect() as sock:
            try:
                sock.sendall(garbage)
                answer = sock.recv(1000)
            except ConnectionError:
                answer = b""
        assert answer == b"" or answer.split()[1] in (b"400", b"401", b"403", b"431"), answer
    assert console.at_port("/healthz").json == {"ok": True}


def test_slow_callers_take_no_place_for_long(console: Console) -> None:
    began = time.monotonic()
    slow = [console.connect() for _ in range(connections.CONNECTIONS)]
    for number, sock in enumerate(slow):
        if number % 2:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: 127.")
    assert _closed(console), "one more was served"
    assert console.at_socket("/healthz").status == 200  # those who are known are not held up
    wait_for(lambda: not _closed(console), seconds(60), "slow callers keep their places")
    assert time.monotonic() - began >= connections.REQUEST_SECONDS / 2
    for sock in slow:
        sock.close()


def _closed(console: Console) -> bool:
    try:
        return console.at_port("/healthz").status != 200
    except OSError:
        return True


def test_console_that_was_taken_over_changes_nothing(console: Console) -> None:
    """Its user at the control socket, past its own code."""
    status = Path(f"/proc/{console.daemon.service_pid('host.console.service')}/status").read_text()
    uid = int(status.partition("Uid:\t")[2].split()[0])
    for words in (("event", "cancel", "x"), ("event", "replay", "x"), ("event", "skip", "x")):
        done = subprocess.run(
            ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups",
             "isolator", "--root", str(console.daemon.root), *words],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 4 and "operator" in done.stderr, (words, done.stderr)


def test_process_has_no_rights_and_starts_nothing(console: Console) -> None:
    pid = console.daemon.service_pid("host.console.service")
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2" and status["Groups"].strip() == ""
    assert os.stat(f"/proc/{pid}/maps").st_uid == 0  # not dumpable: nobody of its uid looks into it
    assert int(status["Uid"].split()[0]) != 0
