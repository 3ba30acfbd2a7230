"""The demo from its beginning to its end, as `./dev demo` runs it."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from psutil import Process

from isolator.paths import Paths
from tests.docs.blocks import holds, shown_in
from tests.examples.conftest import EXAMPLES
from tests.examples.screen import lines_of, svg
from tests.support.timeouts import seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("isolator") is None, reason="needs isolator on PATH: ./dev test"),
]
NUMBER = re.compile(r"\d+(?:\.\d+)?")
PICTURE = EXAMPLES.parent / "docs/figures/demo.svg"
"""Written anew by ``sudo ./dev test tests/examples/test_whole_demo.py --write-screen "$PWD/docs/figures/demo.svg"``."""
SCRIPT = EXAMPLES / "demo" / "demo.py"


def traces(root: Path) -> set[str]:
    """What a demo with this root makes on the machine and must take away."""
    instance = Paths.of(root).instance
    found = {user for line in Path("/etc/passwd").read_text().splitlines() if (user := line.split(":")[0])}
    found = {user for user in found if user.endswith(f"-{instance}")} | ({str(root)} if root.exists() else set())
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found |= {path.read_text()} if str(root) in path.read_text() else set()
    return found


@contextlib.contextmanager
def running_demo(
    *options: str, until: str = "What arrived"
) -> Iterator[tuple[subprocess.Popen[str], list[str], Path]]:  # fmt: skip
    """A demo in whose middle the daemon and a cage run: its process, its lines so far, and its root."""
    command = [sys.executable, "-I", str(SCRIPT), *options]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert demo.stdout is not None and demo.stderr is not None
        before = []
        for line in demo.stdout:
            before.append(line)
            if until in line:
                break
        else:
            raise AssertionError("".join(before) + demo.stderr.read())
        children = [argument for child in Process(demo.pid).children(recursive=True) for argument in child.cmdline()]
        roots = {Path(argument) for argument in children if argument.startswith("/var/lib/isolator-demo-")}
        (root,) = {Path(*path.parts[:4]) for path in roots}
        yield demo, before, root
    finally:
        demo.kill()
        demo.wait()


@pytest.mark.vm
def test_every_promise_holds_and_nothing_is_left(request: pytest.FixtureRequest) -> None:
    with running_demo() as (demo, before, root):
        assert len(traces(root)) >= 5
        rest, errors = demo.communicate(timeout=seconds(120))
    out = "".join(before) + rest
    assert demo.returncode == 0, out + errors
    lines = out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert "\x1b" not in out
    assert len(lines) < 340
    held = re.search(r"^(\d+) of (\d+) promises held\.$", out, re.M)
    assert held is not None
    assert held[1] == held[2]
    assert errors == ""
    assert not traces(root)
    shown = [block.body for block in shown_in(__file__)]
    assert [body for body in shown if not holds(NUMBER.sub("0", body), NUMBER.sub("0", out))] == []
    write_to = request.config.getoption("write_screen", default=None)
    if write_to:
        Path(write_to).write_text(svg(screen_of(out)))
    assert promises(lines_of(PICTURE.read_text())) == promises(screen_of(out))


def screen_of(out: str) -> list[str]:
    """The last screen of the demo: what was promised, and what held."""
    return ["$ sudo ./dev demo", "...", *out[out.index("== 6.") :].splitlines()]


def promises(screen: list[str]) -> list[str]:
    """The promises of a screen, and whether each held; figures differ, and with them the lines of the evidence."""
    return [text for line in screen if (text := NUMBER.sub("0", line[:39]).rstrip())]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.wide)])
def test_an_interrupted_demo_cleans_up_and_fails(number: signal.Signals) -> None:
    with running_demo() as (demo, _, root):
        os.kill(demo.pid, number)
        rest, errors = demo.communicate(timeout=seconds(120))
    assert demo.returncode == 1, rest + errors
    assert re.search(r"Nothing is left behind +yes", rest), rest
    assert "demo: interrupted" in errors
    assert "Traceback" not in errors
    assert not traces(root)


@pytest.mark.wide
def test_browser_outside_its_network_sees_the_console_of_the_demo() -> None:
    with running_demo("--browser", until="http://") as (demo, before, root):
        host, _, path = before[-1].strip().removeprefix("http://").partition("/")
        port = int(host.rpartition(":")[2])

        def ask(path: str, **headers: str) -> http.client.HTTPResponse:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds(30))
            connection.request("GET", path, headers={"Host": host, **headers})
            return connection.getresponse()

        entered = ask(f"/{path}")
        assert entered.status == 303
        page = ask("/", Cookie=str(entered.headers["set-cookie"]).partition(";")[0])
        assert page.status == 200 and b"Overview" in page.read()
        assert ask("/").status == ask(f"/{path}").status == 401
        os.kill(demo.pid, signal.SIGINT)
        rest, errors = demo.communicate(timeout=seconds(120))
    assert demo.returncode == 1 and "Traceback" not in errors, rest + errors
    assert re.search(r"Nothing is left behind +yes", rest), rest
    assert not traces(root)
