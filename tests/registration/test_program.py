"""A program is refused at registration if a cage could not execute it, with the reason and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.errors import UsageError
from isolator.registration.program import CageView, check_program


@pytest.fixture
def elsewhere(shared_dir: Path) -> Path:
    """A folder of the host that no cage sees, with an interpreter in it."""
    (shared_dir / "python3").symlink_to("/usr/bin/python3")
    return shared_dir


@pytest.fixture
def link(elsewhere: Path) -> Iterator[Path]:
    """A name below /usr for something that is not there."""
    path = Path("/usr/local/lib") / f"{elsewhere.name}-python3"
    path.symlink_to(elsewhere / "python3")
    yield path
    path.unlink()


def check(tmp_path: Path, content: str | bytes, *read: str) -> None:
    program = tmp_path / "main"
    program.write_bytes(content.encode() if isinstance(content, str) else content)
    program.chmod(0o755)
    check_program(CageView(tmp_path, read), "./main", shown="plugin/main")


def refusal(tmp_path: Path, content: str | bytes, *read: str) -> str:
    with pytest.raises(UsageError) as caught:
        check(tmp_path, content, *read)
    return str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "#!/usr/bin/python3", "#! /bin/sh -e", "#!/usr/bin/env python3", "#!/usr/bin/env -S python3 -u",
        "#!/usr/bin/awk -f", "#!/usr/bin/env\tsh", "#!/plugin/bin/python3", "#!bin/python3",
        "#!/usr/../usr/bin/python3",
    ],
)  # fmt: skip
def test_interpreter_that_a_cage_sees_is_accepted(tmp_path: Path, line: str) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text("")
    check(tmp_path, f"{line}\n")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("#!/usr/bin/python3\r", "ends in CR LF; save it with Unix line ends"),
        ("#!/usr/bin/env python3\r", "ends in CR LF"),
        ("#!", "names no interpreter"),
        ("#!/usr/bin/nosuch", "needs /usr/bin/nosuch, which is not on this host; install nosuch"),
        ("#!/plugin/nosuch", "which is not in the plugin's folder"),
        ("#!/plugin/../usr/bin/nosuch", "which is not on this host"),
        ("#!/usr/bin/env nosuch", "no interpreter 'nosuch' in a cage"),
        ("#!/usr/bin/env python3 -u", "write #!/usr/bin/env -S python3 -u"),
    ],
)
def test_script_that_no_cage_could_run_is_refused(tmp_path: Path, line: str, why: str) -> None:
    assert why in refusal(tmp_path, f"{line}\nprint(1)\n")


def test_interpreter_that_only_the_host_has_is_refused(tmp_path: Path, elsewhere: Path, link: Path) -> None:
    for path in (elsewhere / "python3", link):
        assert f"needs {path}, which is not visible in a cage" in refusal(tmp_path, f"#!{path}\n")
        check(tmp_path, f"#!{path}\n", str(elsewhere))


def test_program_whose_dynamic_linker_no_cage_has_is_refused(tmp_path: Path) -> None:
    program = Path("/bin/true").read_bytes()
    begin = program.index(b"/lib", 0, 4096)
    linker = program[begin : program.index(b"\0", begin)]
    check(tmp_path, program)
    other = b"/nosuch/ld".ljust(len(linker), b"x")
    assert f"needs {os.fsdecode(other)}, which is not on this host" in refusal(
        tmp_path, program.replace(linker, other, 1)
    )


def test_program_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    for size in (4, 5, 19):
        assert "is cut short" in refusal(tmp_path, Path("/bin/true").read_bytes()[:size])
