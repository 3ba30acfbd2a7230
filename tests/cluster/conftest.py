"""Clusters whose hosts, queues and databases are real, on a log in memory; certificates for servers."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from host.database import wal
from tests.cluster.queues import Hosts, Make


def _none(_: int) -> None:
    raise OSError(38, "Function not implemented")


@pytest.fixture
async def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Clusters that have not been started. Hours pass in seconds, so no sync is waited for: no power is cut here."""
    monkeypatch.setattr(wal.os, "fdatasync", lambda _: None)
    monkeypatch.setattr(wal, "FileSync", _none)
    made: list[Hosts] = []

    def build(seed: int = 0, **more: object) -> Hosts:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Hosts(folder, seed, **more))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for hosts in made:
        await hosts.close()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A key and a certificate for ``localhost``."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, certificate
