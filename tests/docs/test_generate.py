"""Generated parts of the documents: written between their markers, found stale when the code has moved on."""

import subprocess
import sys
from pathlib import Path

import pytest

from docs.generate.replace import Part, update

REPO = Path(__file__).resolve().parents[2]


def test_stale_part_is_found_and_written_and_the_rest_is_kept(tmp_path: Path) -> None:
    document = tmp_path / "guide.md"
    document.write_text("before\n<!-- generated: one -->\nold\n<!-- end: one -->\nafter\n")
    parts = [Part("guide.md", "one", lambda: "| new |\n")]
    assert update(tmp_path, parts, write=False) == ["guide.md"]
    assert "old" in document.read_text(), "a check writes nothing"
    assert update(tmp_path, parts, write=True) == ["guide.md"]
    assert document.read_text() == "before\n<!-- generated: one -->\n| new |\n<!-- end: one -->\nafter\n"
    assert update(tmp_path, parts, write=True) == []


def test_several_parts_of_one_document_are_all_written(tmp_path: Path) -> None:
    document = tmp_path / "guide.md"
    document.write_text("".join(f"<!-- generated: {name} -->\n<!-- end: {name} -->\n" for name in "ab"))
    update(tmp_path, [Part("guide.md", name, name.upper) for name in "ab"], write=True)
    assert document.read_text().splitlines()[1::3] == ["A", "B"]


def test_missing_marker_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "guide.md").write_text("<!-- generated: one -->\n")
    with pytest.raises(ValueError, match="lacks the lines"):
        update(tmp_path, [Part("guide.md", "one", str)], write=True)


@pytest.mark.wide  # ./dev lint looks at each
def test_documents_of_this_repository_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "-I", REPO / "docs/generate", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
