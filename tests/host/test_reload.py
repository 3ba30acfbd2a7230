"""``isolator reload``: when it is through, also beside a daemon of a version that does not say so."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import pytest

from host.cli import reload as reloading
from host.cli.reload import _ask, _complete, _outdated
from isolator.errors import IsolatorError, UnavailableError


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


class Busy:
    """Clients of a daemon that refuses a reload with each of the ``refusals``, then begins one."""

    refusals: ClassVar[list[UnavailableError]] = []

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Busy:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, verb: str) -> dict[str, Any]:
        if verb == "daemon.reload" and self.refusals:
            raise self.refusals.pop(0)
        return {"pid": 7, "generation": 3}


def test_one_that_comes_during_another_is_asked_for_when_that_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reloading, "Client", Busy)
    monkeypatch.setattr(reloading, "_LOOK", 0.001)
    refusals = [
        UnavailableError("reload", "another one is under way", "wait for it"),
        UnavailableError("reload", "the daemon is starting or stopping", "ask again"),
    ]
    monkeypatch.setattr(Busy, "refusals", refusals)
    assert _ask(None, time.monotonic() + 600) == (3, 7)
    monkeypatch.setattr(Busy, "refusals", [UnavailableError("reload", "another one is under way")])
    with pytest.raises(UnavailableError, match="under way"):
        _ask(None, time.monotonic() - 1)
    monkeypatch.setattr(Busy, "refusals", [UnavailableError("supervisor", "not running at the moment")])
    with pytest.raises(UnavailableError, match="not running"):
        _ask(None, time.monotonic() + 600)


def test_one_that_others_have_asked_for_will_do_when_it_began_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a SIGHUP every moment there is always another one under way, and this command never had its turn."""
    generations = iter([3, 3, 4, 5])

    class Renewed(Busy):
        def call(self, verb: str) -> dict[str, Any]:
            if verb == "daemon.reload":
                raise UnavailableError("reload", "another one is under way", "wait for it")
            return {"pid": 7, "generation": next(generations) if verb == "daemon.generation" else 0}

    monkeypatch.setattr(reloading, "Client", Renewed)
    monkeypatch.setattr(reloading, "_LOOK", 0.001)
    assert _ask(None, time.monotonic() + 600) == (5, 7)
