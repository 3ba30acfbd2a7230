"""Chromium, headless, as an ordinary user so that its own sandbox stays on, in the network of a test."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from selenium.webdriver import ChromeOptions, Remote
from selenium.webdriver.remote.webdriver import WebDriver

from isolator.linux import netns
from tests.support.leaks import MARKER
from tests.support.timeouts import seconds

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
BROWSER_UID = 61150
DRIVER_PORT = 8555


def missing() -> str:
    """Why there is no browser; empty where there is one."""
    there = CHROMIUM.exists() and DRIVER.exists()
    return "" if there else "needs Debian's packages chromium and chromium-driver"


def show_as(browser: WebDriver, width: int, *, dark: bool = False, height: int = 900) -> None:
    """Show pages as on a screen of this size in pixels, in light or dark colours."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    command = cast(Any, browser).execute_cdp_cmd
    command("Emulation.setDeviceMetricsOverride", size)
    command("Emulation.setEmulatedMedia", {"features": scheme})


def save_picture(browser: WebDriver, path: Path, width: int, *, dark: bool = False) -> None:
    """Write the upper part of the page as ``show_as`` has it."""
    show_as(browser, width, dark=dark)
    if not browser.save_screenshot(str(path)):
        raise OSError(f"{path} could not be written")


@contextlib.contextmanager
def chromium(network: int) -> Iterator[WebDriver]:
    """A browser in this network; its profile and its processes are gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="isolator-browser-"))
    os.chown(home, BROWSER_UID, BROWSER_UID)
    with (home / "driver.log").open("wb") as log:
        driver = subprocess.Popen(
            ["nsenter", f"--net=/proc/{os.getpid()}/fd/{network}", "setpriv", f"--reuid={BROWSER_UID}",
             f"--regid={BROWSER_UID}", "--clear-groups", str(DRIVER), f"--port={DRIVER_PORT}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=home, start_new_session=True,
            env={"HOME": str(home), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TMPDIR": str(home),
                 **{key: value for key, value in os.environ.items() if key == MARKER}},
        )  # fmt: skip
    try:
        browser = netns.in_network(network, _connect)
        try:
            yield browser
        finally:
            netns.in_network(network, browser.quit)
    finally:
        driver.terminate()
        driver.wait(seconds(20))
        shutil.rmtree(home, ignore_errors=True)


def _connect() -> WebDriver:
    end = time.monotonic() + seconds(30)
    while True:  # until the driver listens
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", DRIVER_PORT)).close()
            break
        assert time.monotonic() < end, "the driver does not listen"
        time.sleep(0.05)
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in ("--headless=new", "--disable-gpu", "--no-first-run", "--disable-component-update",
                 "--disable-background-networking", "--hide-scrollbars", "--force-color-profile=srgb"):  # fmt: skip
        options.add_argument(word)
    return Remote(command_executor=f"http://127.0.0.1:{DRIVER_PORT}", options=options)
