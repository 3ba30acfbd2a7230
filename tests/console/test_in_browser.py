"""The console in a real Chromium: whatever a plugin writes, nothing of it acts; and how the pages look."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver

from isolator.linux import netns
from tests.console.payloads import GROUPS, PAYLOADS, PLUGIN
from tests.console.support import Console
from tests.support.browser import chromium, missing, save_picture, show_as
from tests.system.daemon import ECHO, event, wait_for, write_plugin

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

T = TypeVar("T")
AXE = Path(os.environ.get("ISOLATOR_AXE") or "/nonexistent")
FOREIGN = r"[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u05d0\u200b-\u200f\u202a-\u202e\u2060-\u2069]"
STATE = """
const all = [...document.querySelectorAll('*')];
return {
  acted: window.acted === undefined ? null : window.acted,
  title: document.title,
  scripts: document.scripts.length,
  handlers: all.filter(e => [...e.attributes].some(a => a.name.startsWith('on'))).length,
  links: all.filter(e => ['href', 'src', 'action', 'data', 'srcdoc'].some(
    n => /^\\s*(javascript|data):/i.test(e.getAttribute(n) || ''))).length,
  injected: document.querySelectorAll(
    '#injected, iframe, object, embed, math, base, style, img, video, template, meta[http-equiv]').length,
  drawings: document.querySelectorAll('svg:not(.chart)').length,
  foreign: (document.body.innerText.match(new RegExp(arguments[0], 'g')) || []).length,
  elsewhere: performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(location.origin)),
  width: document.documentElement.scrollWidth,
};
"""
LOOK = """
const done = arguments[0];
axe.run(document).then(found => done(found.violations.map(
  one => [one.id, one.help, one.nodes.map(node => node.target.join(' ') + ': ' + node.failureSummary).slice(0, 3)])));
"""
_NAME = "const name = e => `${e.tagName} ${(e.innerText || e.name || e.id).trim().slice(0, 40)}`;"
REACHABLE = f"""{_NAME}
return [...document.querySelectorAll('a[href], button, select, input, summary, [tabindex="0"]')].filter(
  e => e.checkVisibility() && !e.hidden).map(name);
"""
FOCUSED = f"{_NAME} const e = document.activeElement; return [name(e), getComputedStyle(e).outlineStyle];"
HARMLESS = {
    "acted": None,
    "scripts": 1,
    "handlers": 0,
    "links": 0,
    "injected": 0,
    "drawings": 0,
    "foreign": 0,
    "elsewhere": [],
}


class Visitor:
    """A browser that was let in."""

    def __init__(self, browser: WebDriver, console: Console) -> None:
        self.browser, self.console = browser, console
        self.go(console.url(), whole=True)
        self.origin = self.do(lambda: browser.execute_script("return location.origin"))

    def do(self, work: Callable[[], T]) -> T:
        """Ask the browser, from its network."""
        return netns.in_network(self.console.network, work)

    def go(self, path: str, *, whole: bool = False) -> None:
        self.do(lambda: self.browser.get(path if whole else self.origin + path))

    def state(self) -> dict[str, object]:
        found: dict[str, object] = self.do(lambda: self.browser.execute_script(STATE, FOREIGN))
        return found

    def text(self, selector: str = "main") -> str:
        return self.do(lambda: self.browser.find_element(By.CSS_SELECTOR, selector).text)

    def check(self, path: str) -> str:
        """Look at a page: nothing acts; returns its text."""
        self.go(path)
        state = self.state()
        assert {key: state[key] for key in HARMLESS} == HARMLESS, (path, state)
        return self.text()


@pytest.fixture(scope="module")
def hostile(console: Console, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Ids of the events to which the hostile plugin has written its texts."""
    d, folder = console.daemon, tmp_path_factory.mktemp("plugins")
    described = PAYLOADS[0] + PAYLOADS[-1]
    d.cli("plugin", "add", str(write_plugin(folder / "hostile", PLUGIN, description=described[:500])), "--yes")
    d.cli("plugin", "add", str(write_plugin(folder / "echo", ECHO)), "--yes")
    ids = [d.json("event", "emit", "deploy.completed", event(number))["id"] for number in range(len(GROUPS))]
    wait_for(
        lambda: all(
            delivery["state"] == "ok"
            for one in ids
            for delivery in console.at_socket(f"/v1/event/show?id={one}").json["deliveries"]
        )
    )
    yield ids


@pytest.fixture(scope="module")
def runs(console: Console, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A plugin that runs once for each event, and has run."""
    program = "#!/usr/bin/python3\nimport json, sys\njson.load(sys.stdin)\nprint('{}')\n"
    made = {"binary": "./main", "hooks": ["deploy.failed"], "transport": {"mode": "exec"}}
    d = console.daemon
    d.cli("plugin", "add", str(write_plugin(tmp_path_factory.mktemp("exec") / "linter", program, **made)), "--yes")
    payload = {"project_id": "p1", "deployment_id": "d1", "error_code": "E1", "finished_at": "2026-01-02T03:04:05Z"}
    for _ in range(3):
        d.cli("event", "emit", "deploy.failed", json.dumps(payload), "--wait")


@pytest.fixture(scope="module")
def visitor(console: Console, hostile: list[str]) -> Iterator[Visitor]:
    with chromium(console.network) as browser:
        yield Visitor(browser, console)


def test_chromium_keeps_its_own_sandbox(visitor: Visitor) -> None:
    visitor.go("chrome://sandbox", whole=True)
    assert "You are adequately sandboxed." in visitor.text("body")


def test_nothing_that_a_plugin_wrote_acts(visitor: Visitor, hostile: list[str]) -> None:
    page = visitor.check("/plugin/hostile")
    for needle in ("<script>window.acted=1</script>", "onerror=window.acted=1", "{{7*7}}", "\\u202e", "\\x1b[31m"):
        assert needle in page, needle
    for path in ("/", "/events", "/denials", "/denials?plugin=hostile", "/trail", f"/story/{hostile[0]}"):
        visitor.check(path)
    assert "<script>" in visitor.check(f"/story/{hostile[0]}")


def test_mode_exec_is_shown_with_what_its_invocations_used(visitor: Visitor, runs: None) -> None:
    visitor.go("/")
    assert "linter" in visitor.text("#plugins") and "exec" in visitor.text("#plugins")
    used = re.compile(r"cores: \d+\.\d\d of")
    wait_for(lambda: visitor.go("/plugin/linter") is None and used.search(visitor.text("#charts")), what="no use")
    assert "its program runs once for each event" in visitor.text()


@pytest.mark.wide
def test_pages_that_nobody_sees_keep_no_connection_from_those_that_somebody_sees(visitor: Visitor) -> None:
    """A browser has six for all pages of a console."""
    browser, first = visitor.browser, visitor.do(lambda: visitor.browser.current_window_handle)
    opened = []
    for _ in range(8):
        visitor.do(lambda: browser.switch_to.new_window("tab"))
        opened.append(visitor.do(lambda: browser.current_window_handle))
        visitor.go("/")
        wait_for(lambda: visitor.do(lambda: browser.find_element(By.ID, "live").is_displayed()), what="not live")
    for one in opened:
        visitor.do(lambda one=one: browser.switch_to.window(one))
        visitor.do(browser.close)
    visitor.do(lambda: browser.switch_to.window(first))
    wait_for(lambda: visitor.do(lambda: browser.find_element(By.ID, "live").is_displayed()), what="not live again")


@pytest.mark.wide
def test_none_of_all_payloads_acts_in_any_story_and_record(visitor: Visitor, hostile: list[str]) -> None:
    for one in hostile:
        assert "hostile" in visitor.check(f"/story/{one}")
    last = visitor.console.at_socket("/v1/status").json["trail"]["last"]
    for seq in range(max(1, last - 150), last):
        visitor.check(f"/trail/{seq}")


@pytest.mark.wide
def test_denial_is_on_the_page_that_is_open(visitor: Visitor) -> None:
    visitor.go("/")
    wait_for(lambda: visitor.do(lambda: visitor.browser.find_element(By.ID, "live").is_displayed()), what="not live")
    visitor.do(lambda: visitor.browser.execute_script("window.same = 1"))
    before = visitor.text("#recent")
    visitor.console.daemon.cli("event", "emit", "deploy.completed", event(3), "--wait")
    wait_for(lambda: visitor.text("#recent") != before, what="the denial did not appear")
    assert visitor.do(lambda: visitor.browser.execute_script("return window.same")) == 1  # the page was not loaded anew
    state = visitor.state()
    assert {key: state[key] for key in HARMLESS} == HARMLESS, state


def pages(hostile: list[str]) -> dict[str, str]:
    return {
        "overview": "/", "plugin": "/plugin/hostile", "echo": "/plugin/echo", "exec": "/plugin/linter",
        "events": "/events", "story": f"/story/{hostile[1]}", "denials": "/denials", "trail": "/trail",
        "record": "/trail/1",
    }  # fmt: skip


@pytest.mark.wide
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_the_screen(visitor: Visitor, runs: None, hostile: list[str], width: int, tmp_path: Path) -> None:
    for name, path in pages(hostile).items():
        visitor.go(path)
        for dark in (False, True):
            picture = Path(os.environ.get("ISOLATOR_SCREENSHOTS", tmp_path)) / f"{name}-{width}{'-dark' * dark}.png"
            visitor.do(lambda picture=picture, dark=dark: save_picture(visitor.browser, picture, width, dark=dark))
        assert visitor.state()["width"] == width, name  # a telephone's innerWidth grows with its page


@pytest.mark.wide
@pytest.mark.skipif(not AXE.exists(), reason="needs axe-core, which './dev test --all' fetches with npm")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_pages_keep_nobody_out(visitor: Visitor, hostile: list[str], width: int, dark: bool) -> None:
    """Contrast, names, roles, structure: axe-core finds nothing."""
    visitor.do(lambda: show_as(visitor.browser, width, dark=dark))
    for path in (*pages(hostile).values(), "/plugin/nobody"):
        visitor.go(path)
        visitor.do(lambda: visitor.browser.execute_script(AXE.read_text()))
        found = visitor.do(lambda: visitor.browser.execute_async_script(LOOK))
        assert found == [], (path, found)


@pytest.mark.wide
def test_leaving_ends_the_session(console: Console, visitor: Visitor) -> None:
    other = Visitor(visitor.browser, console)
    other.go("/")
    other.do(lambda: other.browser.find_element(By.LINK_TEXT, "Leave").click())
    wait_for(lambda: "isolator console" in other.text(), what="it did not leave")
    other.go("/")
    assert "was not let in" in other.text()
    visitor.go("/")
    assert "Plugins" in visitor.text()


@pytest.mark.wide
def test_everything_is_reached_by_the_keyboard_and_shows_that_it_is(visitor: Visitor) -> None:
    visitor.do(lambda: show_as(visitor.browser, 1280))
    for path in ("/", "/plugin/hostile", "/events", "/denials"):
        visitor.go(path)
        wanted = visitor.do(lambda: visitor.browser.execute_script(REACHABLE))
        assert wanted[0] == "A Skip to content" and len(wanted) > 5
        seen = []
        for _ in wanted:
            visitor.do(lambda: ActionChains(visitor.browser).send_keys(Keys.TAB).perform())
            name, outline = visitor.do(lambda: visitor.browser.execute_script(FOCUSED))
            assert outline != "none", (path, name)
            seen.append(name)
        assert seen == wanted, path
