"""Root connects to a sidecar's socket only if it is a socket, and its own user's."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isolator.audit.schema import FsDenied
from isolator.errors import DeniedError
from isolator.supervisor.cage_spec import SOCKET
from isolator.supervisor.run import Run

PLUGIN, ANOTHER = 64995, 64996


@pytest.fixture
def scene(shared_dir: Path) -> Iterator[tuple[Run, Path, list[Any]]]:
    records: list[Any] = []
    directory = os.open(shared_dir, os.O_PATH | os.O_DIRECTORY)
    run = object.__new__(Run)
    run.id, run.plugin, run.directory = "run", "plugin", directory
    audit = SimpleNamespace(record=lambda record, **_: records.append(record))
    run.context = SimpleNamespace(audit=audit)  # type: ignore[assignment]
    yield run, shared_dir / SOCKET, records
    os.close(directory)


@pytest.mark.parametrize("owner", [0, ANOTHER])
def test_socket_of_another_user_is_refused_and_on_record(scene: tuple[Run, Path, list[Any]], owner: int) -> None:
    run, path, records = scene
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        os.chown(path, owner, owner)
        with pytest.raises(DeniedError, match="was replaced by something else"):
            run.connect_at_once(PLUGIN)
        assert [type(record) for record in records] == [FsDenied]
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()  # nobody has come
        os.chown(path, PLUGIN, PLUGIN)
        run.connect_at_once(PLUGIN).close()
        listener.accept()[0].close()


def test_file_of_its_own_in_the_sockets_place_is_refused(scene: tuple[Run, Path, list[Any]]) -> None:
    run, path, records = scene
    path.write_text("")
    os.chown(path, PLUGIN, PLUGIN)
    with pytest.raises(DeniedError, match="was replaced by something else"):
        run.connect_at_once(PLUGIN)
    assert len(records) == 1
