"""Every row of the table: the program works in a cage, or fails there for the reason that the table has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compat import sandboxes
from tests.compat.layer import Layer
from tests.compat.program import Program, Result
from tests.compat.rows import PROGRAMS


@pytest.mark.parametrize(("group", "program"), PROGRAMS, ids=[program.name for _, program in PROGRAMS])
def test_program_works_in_a_cage(
    group: str,
    program: Program,
    everything: bool,
    compared: bool,
    installed: Layer,
    root: Path,
    seen: list[Result],
) -> None:
    if program.more and not everything:
        pytest.skip("its packages are large: with --all")
    ending = sandboxes.isolator(root, program, installed)
    others = {}
    if compared and not program.capped:
        others = {
            "bubblewrap": sandboxes.bubblewrap(program, installed).done,
            "firejail": sandboxes.firejail(program, installed).done,
        }
    flags = f"{program.flags}{' --write DIR --cwd DIR' if program.project else ''}".strip()
    seen.append(Result(group, program.name, program.work, flags, ending.done, **others, why=program.fails))
    if (compared or not ending.done) and not program.capped:
        outside = sandboxes.plain(program, installed)
        assert outside.done, f"its script does not work outside either: {outside.output}"
    if program.fails:
        assert not ending.done, "it works: the reason in the table is wrong"
    else:
        assert ending.done, f"exit {ending.code}: {ending.output}"
