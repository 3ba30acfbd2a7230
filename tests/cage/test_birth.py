"""Pid 1 of a cage is cloned before its plan is made: a start that fails at any moment from then on leaves nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from isolator.cage.cage import Cage
from isolator.errors import ConfinementError
from isolator.layers.base import Process
from isolator.layers.ledger import EVERY_LAYER
from tests.escape.cages import template
from tests.support.cage_fixture import cage, leaves
from tests.support.processes import children

_FAILING_PROC = """
from isolator.layers.proc import layer
def fail():
    raise OSError(5, "no covers today")
layer._cover = fail
"""


_SILENT_DEATH = """
import os
from isolator.launcher import prefork
become = prefork.become
def die(*args):
    become(*args)
    os._exit(9)
prefork.become = die
"""


_NOTHING_KNOWN_OF_PROC = """
from isolator.layers.proc import layer
layer.learn_covers = lambda found: None
"""


class _GivenUp(Cage):
    """A cage that is born, and whose plan then cannot be made."""

    async def _prepare(self, *args: Any) -> None:
        raise ConfinementError("test", "given up before the plan")


async def test_cage_that_is_born_and_gets_no_plan_ends(shared_dir: Path) -> None:
    before = children(os.getpid())
    with pytest.raises(ConfinementError, match="given up before the plan"):
        async with cage(shared_dir, ["true"], cage_type=_GivenUp):
            pass
    assert not leaves(shared_dir)
    assert children(os.getpid()) == before


async def test_failure_of_what_a_cage_does_before_its_plan_is_named(shared_dir: Path) -> None:
    with template(_FAILING_PROC), pytest.raises(ConfinementError, match="proc: no covers today"):
        async with cage(shared_dir, ["true"]):
            pass
    assert not leaves(shared_dir)


async def test_entry_of_proc_that_the_launcher_has_not_seen_is_covered(shared_dir: Path) -> None:
    program = ["/bin/sh", "-c", "cat /proc/cmdline /proc/kallsyms; ls /proc/sys /proc/bus; cat /proc/sys/kernel/ostype"]
    with template(_NOTHING_KNOWN_OF_PROC):
        async with cage(shared_dir, program) as started:
            await started.cage.wait()
            unseen = started.text()
    async with cage(shared_dir, program) as started:
        await started.cage.wait()
        assert unseen == started.text()
    assert unseen.startswith("/proc/bus:\n\n/proc/sys:\n")  # the two files are empty
    assert unseen.endswith("Linux\n")


async def test_bounding_set_of_a_launcher_stays_until_a_cage_is_to_have_none(shared_dir: Path) -> None:
    def bounding(pid: int) -> int:
        return int(Process(pid).status["CapBnd"], 16)

    own = bounding(os.getpid())
    async with cage(shared_dir, ["sleep", "60"], without=frozenset({"capabilities"})) as started:
        assert bounding(started.session.runtime.launcher.pid) == own
        assert bounding(started.cage.pid) == own
    async with cage(shared_dir, ["sleep", "60"]) as started:
        assert bounding(started.session.runtime.launcher.pid) == 0
        assert bounding(started.cage.pid) == 0


async def test_cage_that_ends_before_its_pid_is_known_leaves_nothing(shared_dir: Path) -> None:
    before = children(os.getpid())
    with template(_SILENT_DEATH), pytest.raises(ConfinementError, match="died while it was being built"):
        async with cage(shared_dir, ["true"]):
            pass
    assert not leaves(shared_dir)
    assert children(os.getpid()) == before


@pytest.mark.parametrize("name", sorted(EVERY_LAYER))
async def test_layer_that_is_not_in_force_ends_the_start(shared_dir: Path, name: str) -> None:
    """Whenever it is read back: at birth, once the view is made, or at the end."""
    asked = []

    class Doubted(Cage):
        def __init__(self, *args: Any, **others: Any) -> None:
            super().__init__(*args, **others)
            (layer,) = (one for one in self._layers if one.name == name)
            layer.confirm = self._doubt  # type: ignore[method-assign]

        def _doubt(self, process: Process) -> None:
            asked.append(Path(f"/proc/{process.pid}/comm").read_text())
            raise ConfinementError(f"layer {name}", "it is not in force")

    with pytest.raises(ConfinementError, match="it is not in force"):
        async with cage(shared_dir, ["echo", "ran"], cage_type=Doubted):
            pass
    assert len(asked) == 1
    assert (shared_dir / "out").read_text() == ""
    assert not leaves(shared_dir)
