"""The journal as a killed daemon leaves it, and damaged: what it still says is used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from isolator.errors import IsolatorError
from isolator.recovery.journal import Entry, Journal, boot_id, read_entries

GOOD = Entry("good", "leaf", ("/sys/fs/cgroup/x",))


@pytest.mark.parametrize(
    "line",
    [
        b"[1]",
        b"7",
        b'"text"',
        b"null",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"gone": []}',
        b'{"gone": {"a": 1}}',
        json.dumps({"name": "x", "kind": "leaf", "boot": boot_id()}).encode(),
        json.dumps({"name": "x", "kind": "leaf", "folders": 7, "boot": boot_id()}).encode(),
        json.dumps({"name": "x", "kind": "leaf", "folders": [7], "boot": boot_id()}).encode(),
        json.dumps({"name": "x", "kind": "leaf", "folders": ["relative"], "boot": boot_id()}).encode(),
        json.dumps({"name": "x", "kind": "mount", "folders": [], "boot": boot_id()}).encode(),
        json.dumps({"name": "x", "kind": "moon", "folders": ["/x"], "boot": boot_id()}).encode(),
        json.dumps({"name": "x", "kind": ["leaf"], "folders": ["/x"], "boot": boot_id()}).encode(),
        json.dumps({"name": ["x"], "kind": "leaf", "folders": ["/x"], "boot": boot_id()}).encode(),
        json.dumps({"name": "x", "kind": "leaf", "folders": ["/x"], "boot": boot_id(), "more": 1}).encode(),
    ],
)
def test_line_that_is_no_entry_is_passed_over(tmp_path: Path, line: bytes) -> None:
    good = json.dumps(GOOD.__dict__).encode()
    assert read_entries(b"\n".join([line, good, line])) == {"good": GOOD}
    (tmp_path / "journal").write_bytes(line + b"\n" + good)
    journal = Journal(tmp_path / "journal")
    assert journal.open == {"good": GOOD}
    journal.close()


def test_journal_of_absurd_size_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(IsolatorError, match=f"{path}: is damaged: it has "):
        Journal(path)


def test_folder_in_the_journal_s_place_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    with pytest.raises(IsolatorError, match=f"{tmp_path / 'journal'}: Is a directory"):
        Journal(tmp_path / "journal")
