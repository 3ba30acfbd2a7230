"""The ledger as a daemon makes it: in a copy of the process, with what a check in the process itself says."""

from __future__ import annotations

import os

import pytest

from isolator.cli.check import render
from isolator.layers import ledger as module
from isolator.layers.base import Control
from isolator.layers.ledger import LAYERS, check_in_a_copy


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_checked", {})


def test_copy_finds_what_this_process_would_find() -> None:
    here = {layer: tuple(layer.check()) for layer in LAYERS}
    check_in_a_copy()
    assert module._checked == here


def test_what_a_copy_that_dies_has_not_said_is_checked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = os.getpid()
    check = LAYERS[-1].check
    monkeypatch.setattr(LAYERS[-1], "check", lambda: check() if os.getpid() == mine else os._exit(1))
    check_in_a_copy()
    assert module._checked == {}
    assert module.missing() == []
    assert set(module._checked) == set(LAYERS)


def test_word_of_a_remedy_is_never_broken_for_a_person_may_copy_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parameter = "systemd.unified_cgroup_hierarchy=1"
    one = Control(
        "open files, core dumps, locked memory", "cgroup", "degraded", "hybrid host", f"boot with {parameter}"
    )
    assert any(line.split()[-1] == parameter for line in render((one,)))
