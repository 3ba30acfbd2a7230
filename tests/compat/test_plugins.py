"""Plugins on real client libraries receive ``deploy.completed`` in a cage and do their work through the broker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compat import plugged
from tests.compat.layer import Layer
from tests.compat.plugged import Platform
from tests.compat.program import Plugin, Result
from tests.compat.rows import PLUGGED
from tests.compat.rows.plugins import PLUGINS
from tests.compat.served import served
from tests.support.timeouts import seconds


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with plugged.platform() as made:
        yield made


@pytest.mark.timeout(plugged.BUILD_PATIENCE + seconds(100))
@pytest.mark.parametrize("plugin", PLUGINS, ids=[plugin.name for plugin in PLUGINS])
def test_plugin_does_its_work_with_its_client_library(
    plugin: Plugin, platform: Platform, everything: bool, installed: Layer, shown: Path, seen: list[Result]
) -> None:
    if plugin.more and not everything:
        pytest.skip("it downloads packages: with --all")
    if plugged.missing(plugin):
        pytest.skip(f"{plugin.tool} is not installed")
    folder = plugged.built(plugin, installed if plugin.packages else None)
    with contextlib.ExitStack() as stack:
        if plugin.server:
            stack.enter_context(served(plugin.server, platform.pretend, installed, shown))
        delivery = plugged.deliver(platform, plugin, folder)
    seen.append(Result(PLUGGED, plugin.library, plugin.work, "", delivery.outcome["state"] == "ok"))
    plugged.check(platform, plugin, delivery)
