"""Log lines: plain on a terminal or a file, with sd-daemon priorities on the journal's stream."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import logging, sys
sys.path.insert(0, sys.argv[1])
from isolator.linux import daemon_log
daemon_log.set_up()
logging.getLogger("isolator.supervisor").info("ready")
logging.getLogger("host.control").error("two\\nlines")
if "stranger" in sys.argv:
    logging.getLogger("host.control").error("%s: %d: %s", "a\\n<0>isolator: ready", 3, ValueError("\\x1b[2J"))
"""


def _run(out: Path, *more: str, journal: bool) -> str:
    with out.open("w") as stream:
        found = os.fstat(stream.fileno())
        marker = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino if journal else 1}"}
        code = str(Path(__file__).parents[2])
        subprocess.run(
            [sys.executable, "-I", "-c", CODE, code, *more], stderr=stream, env={**os.environ, **marker}, check=True
        )
    return out.read_text()


def test_lines_of_a_file_are_plain(tmp_path: Path) -> None:
    assert _run(tmp_path / "log", journal=False) == "isolator: ready\nisolator: two\nlines\n"


def test_lines_of_the_journal_carry_their_priority(tmp_path: Path) -> None:
    assert _run(tmp_path / "log", journal=True) == "<6>isolator: ready\n<3>isolator: two\n<3>lines\n"


def test_names_of_a_stranger_begin_no_line(tmp_path: Path) -> None:
    lines = _run(tmp_path / "log", "stranger", journal=True).splitlines()
    assert lines[3:] == [r"<3>isolator: a\n<0>isolator: ready: 3: \x1b[2J"]
