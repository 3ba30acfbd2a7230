"""The table of plugins: what the host is told when one of them changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from isolator.ipc.messages import PluginState
from isolator.supervisor.plugins import PluginTable


class Told:
    """A link to a host that notes what it is told."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, Any]] = []
        self.process = SimpleNamespace(outdated=False)

    def plugin_changed(self, entry: Any) -> None:
        self.messages.append(("entry", entry))

    def plugin_turned(self, turned: Any) -> None:
        self.messages.append(("turned", turned.state))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> PluginTable:
    made = PluginTable.__new__(PluginTable)
    made._context = cast(Any, SimpleNamespace(host=Told(), fences=SimpleNamespace(notice=lambda name: "")))
    monkeypatch.setattr(PluginTable, "entry", lambda table, plugin: plugin.registration)
    return made


def plugin(registration: str) -> Any:
    """A plugin that does not run."""
    fields: dict[str, Any] = {"run": None, "restarts": 0, "on_trial": False, "told": None, "effective": object()}
    notices = dict.fromkeys(("error", "notice", "outdated", "lacking"), "")
    return SimpleNamespace(name="echo", registration=registration, state=PluginState.STOPPED, **fields, **notices)


def test_host_is_told_of_a_plugin_s_state_alone_only_if_it_knows_the_rest(table: PluginTable) -> None:
    echo, host = plugin("first"), cast(Told, table._context.host)
    table.announce(echo)
    echo.state = PluginState.STARTING
    table.announce(echo)
    echo.registration = "second"
    table.announce(echo)
    echo.effective = object()
    table.announce(echo)
    echo.state = PluginState.RUNNING
    table.announce(echo)
    host.process.outdated = True
    table.announce(echo)
    assert host.messages == [
        ("entry", "first"), ("turned", "starting"), ("entry", "second"), ("entry", "second"), ("turned", "running"),
        ("entry", "second"),
    ]  # fmt: skip


def test_entry_that_could_not_be_sent_is_sent_again(table: PluginTable, monkeypatch: pytest.MonkeyPatch) -> None:
    echo, host = plugin("first"), cast(Told, table._context.host)

    def fails(_: Any) -> None:
        raise ValueError("too long")

    with monkeypatch.context() as broken:
        broken.setattr(host, "plugin_changed", fails)
        with pytest.raises(ValueError, match="too long"):
            table.announce(echo)
    table.announce(echo)
    assert host.messages == [("entry", "first")]
