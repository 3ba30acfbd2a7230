"""``isolator reload``: when it is through, also beside a daemon of a version that does not say so."""

from __future__ import annotations

from typing import Any

import pytest

from host.cli.reload import _complete, _outdated
from isolator.errors import IsolatorError


class Answering:
    """A client of a daemon whose host process has this pid."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def call(self, verb: str) -> dict[str, Any]:
        assert verb == "status"
        return {"pid": self._pid}


@pytest.mark.parametrize(
    ("found", "pid", "left"),
    [
        ({"outdated": {}}, 7, {}),
        ({"outdated": {"audit": "", "host": ""}}, 7, {"audit": "", "host": ""}),
        ({}, 7, {"host": ""}),
        ({}, 8, {}),
    ],
    ids=["all are exchanged", "two are to come", "an older host, that of before", "an older host, another"],
)
def test_services_that_are_still_as_before(found: dict[str, Any], pid: int, left: dict[str, str]) -> None:
    assert _outdated(Answering(pid), found, 7) == left  # type: ignore[arg-type]


def test_service_that_stays_as_it_was_is_named() -> None:
    assert _complete({"generation": 2}, {}) == {"generation": 2}
    with pytest.raises(IsolatorError, match="broker goes on as before the reload: broker: is busy"):
        _complete({"generation": 2}, {"broker": "broker: is busy"})
