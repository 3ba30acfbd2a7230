"""A file that is exchanged between the look at it and its opening is neither followed nor waited for."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from isolator.collector import walk
from isolator.errors import UsageError
from isolator.ipc.folder_stream import FolderWriter
from tests.support.timeouts import seconds


def exchanged(monkeypatch: pytest.MonkeyPatch, folder: Path, exchange: Callable[[], object]) -> tuple[str, bytes]:
    """Write a folder in which ``exchange`` happens before the first opening; returns the error and what was written."""
    real, done, found = walk._open, [], []

    def opening(*arguments: object) -> int:
        if not done:
            done.append(exchange())
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(walk, "_open", opening)
    source = os.open(folder, os.O_RDONLY)
    read, write = os.pipe()

    def run() -> None:
        writer = FolderWriter(write)
        try:
            walk.write_folder(source, writer)
            writer.end()
        except UsageError as error:
            found.append(str(error))
            writer.end()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(seconds(10))
    waits = thread.is_alive()
    if waits:
        with contextlib.suppress(OSError):  # lets it go on
            os.close(os.open(folder / "file", os.O_WRONLY | os.O_NONBLOCK))
        thread.join(seconds(10))
    os.set_blocking(read, False)
    written = os.read(read, 1 << 16)
    for fd in (source, read, write):
        os.close(fd)
    assert done and not waits, "it waits for whoever writes to a FIFO"
    return "".join(found), written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "folder"
    place.mkdir()
    (place / "file").write_text("harmless")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/file").write_text("TOP SECRET")
    return place


def test_file_that_becomes_a_link_is_not_followed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange() -> None:
        (folder / "file").unlink()
        (folder / "file").symlink_to(folder.parent / "secrets/file")

    error, written = exchanged(monkeypatch, folder, exchange)
    assert "file: Too many levels of symbolic links" in error and b"SECRET" not in written


def test_link_that_stays_within_the_folder_is_not_followed_either(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "other").write_text("other")

    def exchange() -> None:
        (folder / "file").unlink()
        (folder / "file").symlink_to("other")

    error, _ = exchanged(monkeypatch, folder, exchange)
    assert "Too many levels of symbolic links" in error


def test_folder_that_becomes_a_link_is_not_followed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").unlink()
    (folder / "sub").mkdir()

    def exchange() -> None:
        (folder / "sub").rmdir()
        (folder / "sub").symlink_to(folder.parent / "secrets")

    error, written = exchanged(monkeypatch, folder, exchange)
    assert error and b"SECRET" not in written


def test_file_that_becomes_a_fifo_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange() -> None:
        (folder / "file").unlink()
        os.mkfifo(folder / "file")

    error, _ = exchanged(monkeypatch, folder, exchange)
    assert "changed while it was being read" in error


def test_names_that_lead_out_are_no_files_of_the_folder(folder: Path) -> None:
    source = os.open(folder, os.O_RDONLY)
    try:
        for name in ("../secrets/file", "/etc/hostname", ".."):
            with pytest.raises(UsageError):
                os.close(walk._open(source, name, name, os.O_NONBLOCK))
    finally:
        os.close(source)
