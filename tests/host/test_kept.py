"""What verbs keep for a connection: no longer than it lasts, and nothing twice, however long a connection is open."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from host.control.audit_types import AuditFollow, AuditSearch
from host.control.endpoints import Belonging, Caller
from host.control.follow import TrailStreams
from host.control.plugin_types import PluginLogs
from host.control.plugin_verbs import PluginVerbs
from host.control.registration_verbs import RegistrationVerbs, _Staged
from host.control.searches import Searches
from host.plugins.logs import Logs
from host.plugins.secrets import Redactor
from isolator.errors import IsolatorError


class Open:
    """A connection that stays open: its caller, and the notifications that it gets."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[tuple[str, Mapping[str, Any]]] = asyncio.Queue()
        self.caller = Caller(
            0, 1, "operator", may_call=False, notify=lambda *said: self.said.put_nowait(said), narrow=lambda _: None,
            cut=lambda: None,
        )  # fmt: skip
        self.caller.drained.set()

    @property
    def kept(self) -> int:
        return len(self.caller.on_close) + len(self.caller.belongings)


async def test_search_that_is_over_is_kept_no_longer(tmp_path: Path) -> None:
    searches, connection = Searches(tmp_path), Open()
    for _ in range(2):
        await searches.search(AuditSearch(), connection.caller)
        assert (connection.kept, connection.caller.follows) == (1, 1)
        async with asyncio.timeout(60):
            while (await connection.said.get())[1]["more"]:
                pass
            while connection.kept:  # noqa: ASYNC110 # a turn: its task has just ended
                await asyncio.sleep(0)
        assert not connection.caller.follows, "it can be handed on again"


async def test_follower_that_was_refused_is_kept_no_longer(tmp_path: Path) -> None:
    trail, connection = TrailStreams(tmp_path, cast(Any, SimpleNamespace())), Open()
    with pytest.raises(IsolatorError, match="audit trail"):
        await trail.follow(AuditFollow(after=7), connection.caller)
    assert not connection.kept and not connection.caller.follows
    trail.close()


async def test_log_that_is_followed_twice_comes_once(tmp_path: Path) -> None:
    logs, connection, nobody = Logs(tmp_path, lambda _: Redactor([])), Open(), cast(Any, None)
    registry = cast(Any, SimpleNamespace(need=lambda name: SimpleNamespace(name=name)))
    verbs = PluginVerbs(nobody, registry, nobody, nobody, nobody, nobody, logs, nobody)
    for _ in range(3):
        await verbs.logs(PluginLogs(name="chatty", follow=True), connection.caller)
    logs.of("chatty").keep(None, "stdout", b"a line")
    assert (connection.said.qsize(), connection.kept, connection.caller.follows) == (1, 1, 1)
    for end in list(connection.caller.on_close):
        end()
    logs.of("chatty").keep(None, "stdout", b"another")
    assert connection.said.qsize() == 1
    logs.close()


@pytest.mark.parametrize("how", ["committed", "discarded"])
async def test_what_was_staged_and_is_no_more_is_kept_no_longer(how: str) -> None:
    discarded: list[str] = []
    connection, nobody = Open(), cast(Any, None)
    verbs = RegistrationVerbs(cast(Any, SimpleNamespace(discard=discarded.append)), *([nobody] * 6))
    staged = _Staged(cast(Any, None), "digest", b"{}", "name")
    for token in ("one", "two"):
        verbs._keep(connection.caller, token, staged)
    assert connection.kept == 4
    if how == "committed":
        assert verbs._take("one") is staged
    else:
        verbs._abandon("one")
    assert connection.kept == 2
    (left,) = connection.caller.belongings
    assert isinstance(left(), Belonging) and left().data["token"] == "two"
    for end in list(connection.caller.on_close):
        end()
    assert not connection.kept
    assert discarded == (["two"] if how == "committed" else ["one", "two"])
