"""Debian's Chromium in a cage, on a pretend internet: a screenshot of a granted page, and of no other."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import ssl
import struct
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.support.internet_servers import THIRD, WEB, Server, run_in
from tests.support.pretend_internet import PretendInternet
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event, wait_for

CHROMIUM = Path("/usr/lib/chromium/chromium")
EXAMPLES = Path(__file__).parents[2] / "examples"
PROFILE = EXAMPLES.parent / "policies/profiles/browser.toml"
pytestmark = [
    pytest.mark.wide,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed (apt install chromium)"),
]

PAGE = """<!doctype html><html lang="en"><head><title>Shop</title><meta name="viewport" content="width=device-width">
<style>body {background: #08f; margin: 0}</style></head><body><img src="/a.png"></body></html>"""
FLAGS = "--ignore-certificate-errors --window-size=320,200"
"""The pretend authority is none that Chromium knows."""


class _Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = PAGE.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture(scope="module", autouse=True)
def page(pretend: PretendInternet) -> Iterator[None]:
    """A page of its own at an address of its own, with TLS."""
    run_in(pretend.internet.fd, "ip", "addr", "add", f"{THIRD}/32", "dev", "lo")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pretend.directory / "ca.pem", pretend.directory / "key.pem")
    server = Server(pretend.internet.bound(THIRD, 8443), _Page, context)
    pretend.internet.dns.records["www.example.com"] = [THIRD]
    yield
    server.shutdown()
    server.server_close()
    run_in(pretend.internet.fd, "ip", "addr", "del", f"{THIRD}/32", "dev", "lo")


def open_page(pretend: PretendInternet, folder: Path, policy: str, url: str) -> tuple[bytes, str, list[dict[str, Any]]]:
    """The screenshot, the page's text after scripts, and the records of one run of the browser."""
    root, records, file = folder / "root", folder / "records", folder / "policy.toml"
    (root / "etc/isolator").mkdir(parents=True)
    (root / "etc/isolator/host.toml").write_text(f'[network]\nresolvers = ["{WEB}"]\n')
    file.write_text(policy)
    script = (
        f"{CHROMIUM} --headless --no-sandbox --user-data-dir=/tmp/profile {FLAGS} --screenshot=/tmp/page.png "
        f"--dump-dom {url} >/tmp/page.html 2>/tmp/log; base64 -w0 /tmp/page.png; echo; cat /tmp/page.html"
    )
    result = subprocess.run(
        ["nsenter", f"--net=/proc/{os.getpid()}/fd/{pretend.host_fd}", "isolator", "--root", str(root), "run",
         "--policy", str(file), "--audit", str(records), "--", "sh", "-c", script],
        capture_output=True, text=True, check=False, timeout=seconds(180),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    image, _, text = result.stdout.partition("\n")
    return base64.b64decode(image), text, [json.loads(line) for line in records.read_text().splitlines()]


def is_picture(data: bytes) -> bool:
    """Whether it is a PNG of the window's size."""
    return data.startswith(b"\x89PNG\r\n") and struct.unpack(">II", data[16:24]) == (320, 200)


def profile(**changes: str) -> str:
    text = PROFILE.read_text().replace('"www.example.com:443"', '"www.example.com:8443"')
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


def test_profile_makes_a_screenshot_of_a_granted_page(pretend: PretendInternet, tmp_path: Path) -> None:
    image, text, records = open_page(pretend, tmp_path, profile(), "https://www.example.com:8443/")
    assert is_picture(image)
    assert "<title>Shop</title>" in text
    connects = [r["data"] for r in records if r["type"] == "net.connect"]
    assert {(c["name"], c["verdict"]) for c in connects} == {("www.example.com", "allowed")}


def test_browser_without_the_key_is_refused_for_what_its_hello_may_hide(
    pretend: PretendInternet, tmp_path: Path
) -> None:
    policy = profile(**{"allow_ech = true": ""})
    _, text, records = open_page(pretend, tmp_path, policy, "https://www.example.com:8443/")
    assert "<title>Shop</title>" not in text
    assert "encrypted-hello" in {r["data"]["rule"] for r in records if r["type"] == "net.denied"}


@contextlib.contextmanager
def page_report(pretend: PretendInternet, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with the example and its policy."""
    folder = tmp_path / "page-report"
    shutil.copytree(EXAMPLES / "page-report", folder)
    manifest = folder / "plugin.json"
    manifest.write_text(manifest.read_text().replace("[443]", "[8443]"))
    toml = f'[network]\nresolvers = ["{WEB}"]\n'
    with daemon(host_toml=toml, network=pretend.host_fd) as d:
        policies = d.root / "etc/isolator/policies"
        policies.mkdir(parents=True, exist_ok=True)
        text = (EXAMPLES.parent / "policies/page-report.toml").read_text()
        (policies / "page-report.toml").write_text(text.replace("example.com:443", "example.com:8443"))
        d.cli("plugin", "add", str(folder), "--yes", "--config", f"browser_flags={FLAGS}")
        yield d


def replies(d: Daemon, event_id: str) -> list[dict[str, Any]]:
    """What the example answered to an event, attempt after attempt."""
    found = [r for r in d.records() if r["type"] == "event.response" and r["event_id"] == event_id]
    return [json.loads(r["data"]["response"])["result"] for r in found]


def test_page_report_keeps_a_screenshot_of_each_deployed_page(pretend: PretendInternet, tmp_path: Path) -> None:
    with page_report(pretend, tmp_path) as d:
        emitted = d.json("event", "emit", "deploy.completed", event("shop", url="https://www.example.com:8443/"))
        result = wait_for(lambda: replies(d, emitted["id"]), seconds(180))[-1]
        assert result["status"] == "ok", result
        shown = {key: result[key] for key in ("url", "title", "language", "viewport", "unnamed_images")}
        assert shown == {
            "url": "https://www.example.com:8443/", "title": "Shop", "language": True, "viewport": True,
            "unnamed_images": 1,
        }  # fmt: skip
        kept = d.state_of("page-report")
        assert is_picture((kept / "dshop.png").read_bytes())


def test_outage_of_a_site_loses_no_event_of_page_report(pretend: PretendInternet, tmp_path: Path) -> None:
    """Five attempts take more than twenty seconds with the pauses between them."""
    records = pretend.internet.dns.records
    with page_report(pretend, tmp_path) as d:
        address = records.pop("www.example.com")
        try:
            emitted = d.json("event", "emit", "deploy.completed", event("shop", url="https://www.example.com:8443/"))
            tried = wait_for(lambda: (found := replies(d, emitted["id"]))[4:] and found, seconds(300), d.log.read_text)
            assert {one["status"] for one in tried} == {"retry"}, tried
        finally:
            records["www.example.com"] = address
        wait_for(lambda: replies(d, emitted["id"])[-1]["status"] == "ok", seconds(300), "the page is there again")
        assert not [r["type"] for r in d.records() if r["type"] in ("event.dead", "event.quarantined", "plugin.failed")]
