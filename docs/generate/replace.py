"""Write generated files, and the parts of documents between two marker lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Part:
    """One generated part of a document, or a whole generated file."""

    document: str
    """Path below the repository."""
    marker: str | None
    """Name in the two marker lines, unique within the document; None for a whole file."""
    text: Callable[[], str]
    """Returns the Markdown between the marker lines, or the file's content."""


def update(root: Path, parts: Iterable[Part], *, write: bool) -> list[str]:
    """Bring the parts of the documents below ``root`` up to date, or only compare them; returns the stale documents.

    Raises ValueError when a document lacks the two marker lines of a part.
    """
    documents: dict[str, str] = {}
    for part in parts:
        if part.marker is None:
            documents[part.document] = part.text()
        else:
            text = documents.get(part.document) or (root / part.document).read_text()
            documents[part.document] = replaced(text, part)
    stale = [name for name, text in documents.items() if not _holds(root / name, text)]
    for name in stale if write else ():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(documents[name])
    return stale


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


def replaced(text: str, part: Part) -> str:
    """The document's text with one part written anew."""
    begin, end = f"<!-- generated: {part.marker} -->\n", f"<!-- end: {part.marker} -->\n"
    before, opened, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"{part.document} lacks the lines {begin.strip()!r} and {end.strip()!r}")
    return f"{before}{begin}{part.text().strip()}\n{end}{after}"
