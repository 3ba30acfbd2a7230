"""The console before 200 plugins and a trail of a million records: first page, a denial until it is seen, memory.

The plugins are those of ``many``, registered and not running; the trail is written by its own writer's code, with the
hashes and seals of a real one, while the daemon does not run. Timed at the port, over one connection each, as a browser
asks: the page, then its style and its script. "In Chromium" is until everything is drawn, by the browser's own clock.

A denial is a name that a plugin looks up and was not granted, another one each time. Its time is the record's own, and
it ends when the page holds it: in Chromium, when the open page has put it in its place.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bench.frame import Report, Series, Skipped
from bench.many import COUNT, pss, register
from isolator.audit.log import Chain, Limits, Trail
from isolator.audit.record import Incoming
from isolator.linux import netlink, netns
from isolator.paths import Paths
from tests.console.support import Console
from tests.support.browser import chromium, missing
from tests.system.daemon import ECHO, Daemon, daemon, wait_for, write_plugin

RECORDS = 1_000_000
AT_ONCE = 20_000
ROUNDS, DENIALS = 50, 20
REFUSED = "refused"
ASKS = ECHO.replace(
    "        reply = ",
    """\
        try:
            socket.getaddrinfo(params["project_id"] + ".example", 443)
        except OSError:
            pass
        reply = """,
).replace('params["deployment_id"]', 'params["project_id"]')
ASKED = {"hooks": ["project.created"], "sandbox": {"network": {"egress": [{"host": "hooks.example.com"}]}}}
"""An event that the other plugins do not get, and a list of names, so that any other one is refused."""
_LOADED = "return performance.getEntriesByType('navigation')[0].loadEventEnd"
_WATCH = """
window.seen = [];
const list = () => document.querySelector('#recent li a').getAttribute('href');
let last = list();
new MutationObserver(() => { if (list() !== last) { last = list(); window.seen.push([last, Date.now()]); } })
  .observe(document.body, {childList: true, subtree: true});
"""


def measure(rounds: int) -> Report:
    """Run at most ``rounds`` rounds of loading the page, and some denials."""
    rounds = min(rounds, ROUNDS)
    network = netns.in_new_network(netns.current_network)
    try:
        netns.in_network(network, netlink.bring_up_loopback)
        with (
            tempfile.TemporaryDirectory(prefix="isolator-bench-") as folder,
            daemon(host_toml="[console]\nport = 8090\n", network=network) as running,
        ):
            return _measure(running, network, Path(folder), rounds)
    finally:
        os.close(network)


def _measure(running: Daemon, network: int, work: Path, rounds: int) -> Report:
    work.chmod(0o755)
    names = register(running, work)
    running.cli("plugin", "add", str(write_plugin(work / REFUSED, ASKS, **ASKED)), "--yes")
    _ask(running, "first", "--wait")
    running.stop()
    _fill(Paths.of(running.root), names)
    running.start()
    console = Console(running, network)
    wait_for(lambda: console.at_socket("/healthz").status == 200)
    host, cookie = console.enter()
    first = _page(console, host, cookie)
    pages = [_page(console, host, cookie) for _ in range(rounds)]
    denials = [_denied(console, host, cookie, number) for number in range(1, DENIALS + 1)]
    kib = pss(running.service_pid("host.console.service"))
    series = [Series("isolator, the page", "page, style and script", "ms", tuple(pages)),
              Series("isolator, a denial", "until the page has it", "ms", tuple(denials))]  # fmt: skip
    skipped = []
    if lacking := missing():
        skipped.append(Skipped("in Chromium", lacking))
    else:
        loads, seen = _in_chromium(console, network, min(rounds, DENIALS))
        series += [Series("isolator, the page in Chromium", "until it is drawn", "ms", loads),
                   Series("isolator, a denial in Chromium", "until it is drawn", "ms", seen)]  # fmt: skip
    return Report(
        name="console",
        title=f"the console: {COUNT} plugins, {RECORDS} records",
        series=tuple(series),
        skipped=tuple(skipped),
        notes=(
            f"the very first page after the start: {first:.0f} ms; goal: 200",
            "goal of a denial: 1000 ms",
            f"memory of the console: {kib / 1024:.1f} MiB before a browser came, "
            f"{pss(running.service_pid('host.console.service')) / 1024:.1f} MiB at the end; goal: 40",
        ),
    )


def _ask(running: Daemon, name: str, *words: str) -> None:
    """Have the plugin look up a name that it was not granted."""
    running.cli("event", "emit", "project.created", json.dumps({"project_id": name, "name": name}), *words)


def _fill(paths: Paths, names: list[str]) -> None:
    """Write the records, as of the last hours, with the daemon's own key."""
    owner = paths.audit_file.stat()
    trail = Trail(paths.audit_log, paths.audit_lib, Limits())
    end, signer = trail.open()
    chain = Chain(end, signer, Limits())
    with closing(trail):
        for number, record in enumerate(_records(names), 1):
            chain.append(record)
            if number % AT_ONCE == 0:
                trail.commit(chain.take())
        trail.commit(chain.take())
    for path in (*paths.audit_log.iterdir(), *paths.audit_lib.iterdir()):
        os.chown(path, owner.st_uid, owner.st_gid if path.parent == paths.audit_log else -1)


def _records(names: list[str]) -> Iterator[Incoming]:
    """Deliveries of all plugins and figures of their use, with a refusal now and then."""
    began = datetime.now(UTC) - timedelta(hours=10)
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        ("event.dispatched", {"attempt": 1, "queued_us": 800, "request_bytes": 300, "request_sha256": "0" * 64}),
        ("event.response", {"attempt": 1, "outcome": "ok", "latency_us": 1500, "response_bytes": 80, "response": "{}"}),
        ("resources", {"cpu_us": 1000, "memory": 20 << 20, "tasks": 3}),
    )
    for number in range(RECORDS):
        plugin, (kind, data) = names[number % len(names)], kinds[number % len(kinds)]
        if number % 500 == 0:
            kind, data = "net.denied", {"name": f"host-{number % 7}.example", "port": 443, "rule": "not granted"}
        at = (began + timedelta(milliseconds=30 * number)).isoformat(timespec="microseconds")[:26] + "Z"
        of_event = f"ev_{number // 3:028x}" if kind.startswith("event.") else None
        yield Incoming(at, kind, plugin, "0123456789ab", of_event, None, data, "host")


def _page(console: Console, host: str, cookie: str) -> float:
    """Milliseconds until the page, its style and its script are there."""
    began = time.perf_counter()
    answer = console.at_port("/", host=host, cookie=cookie)
    console.at_port("/static/console.css", host=host, cookie=cookie)
    console.at_port("/static/console.js", host=host, cookie=cookie)
    took = (time.perf_counter() - began) * 1e3
    assert answer.status == 200 and f"<b>{COUNT + 1}</b> plugins" in answer.text, answer.text[:2000]
    return took


def _denied(console: Console, host: str, cookie: str, number: int) -> float:
    """Milliseconds from a denial's own time until a page that follows the stream has it."""
    before = _newest(console.at_port("/", host=host, cookie=cookie).text)
    with _stream(console, host, cookie) as lines:
        _ask(console.daemon, f"p{number}")
        for line in lines:
            if line.startswith("data:") and "denials" in line:
                page = console.at_port("/", host=host, cookie=cookie).text
                seen = time.time()
                if (path := _newest(page)) != before:
                    return (seen - _time_of(console, path)) * 1e3
    raise RuntimeError("the stream ended")


@contextmanager
def _stream(console: Console, host: str, cookie: str) -> Iterator[Iterator[str]]:
    with console.connect() as sock:
        sock.sendall(f"GET /live HTTP/1.1\r\nHost: {host}\r\nCookie: {cookie}\r\n\r\n".encode())
        with sock.makefile() as file:
            next(line for line in file if line.startswith("retry"))  # it listens from here on
            yield file


def _newest(page: str) -> str:
    """The record of the refusal that stands first on a page, as the path of its own page."""
    return page[page.index('id="recent"') :].partition('href="')[2].partition('"')[0]


def _time_of(console: Console, path: str) -> float:
    answer = console.at_socket(path, accept="text/html").text
    moment = answer.partition("<dt>time</dt><dd>")[2].partition("</dd>")[0]
    return datetime.fromisoformat(moment).timestamp()


def _in_chromium(console: Console, network: int, rounds: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    loads, seen = [], []
    with chromium(network) as browser:

        def ask(script: str) -> Any:
            return netns.in_network(network, lambda: browser.execute_script(script))

        netns.in_network(network, lambda: browser.get(console.url()))
        origin = ask("return location.origin")
        for _ in range(rounds):
            netns.in_network(network, lambda: browser.get(origin + "/"))
            loads.append(float(ask(_LOADED)))
        wait_for(lambda: ask("return !document.getElementById('live').hidden"))
        ask(_WATCH)
        for number in range(1, rounds + 1):
            _ask(console.daemon, f"c{number}")
            path, at = wait_for(lambda number=number: (ask("return window.seen") + [None] * number)[number - 1])
            seen.append(at - _time_of(console, path) * 1e3)
    return tuple(loads), tuple(seen)
