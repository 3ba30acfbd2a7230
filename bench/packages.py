"""Verifying a package of 10 MB: what its reader does, beside the SHA-256 of the same bytes.

The reader's part alone: root hashes the content once more as it writes it, for the digest of the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from bench.frame import Contender, Report, interleave
from host.authoring.pack import pack_folder
from isolator.ipc.folder_stream import FolderWriter
from isolator.reader import package

FILES, SIZE = 100, 100_000


def measure(rounds: int) -> Report:
    """Verify it ``rounds`` times."""
    with tempfile.TemporaryDirectory(prefix="isolator-bench-") as work:
        path = _packed(Path(work))
        data = path.read_bytes()
        spent: list[float] = []

        def verify() -> None:
            began = time.process_time()
            fd, sink = os.open(path, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)
            try:
                package.read_package(lambda most: os.read(fd, most), FolderWriter(sink))
            finally:
                os.close(fd)
                os.close(sink)
            spent.append((time.process_time() - began) * 1e3)

        series = interleave(
            [
                Contender("SHA-256 of its bytes", "nothing", lambda: _hash(data)),
                Contender("its reader", "every header made anew, the digest, the content passed on", verify),
            ],
            rounds,
        )
    notes = (f"processor time of the reader: {statistics.median(spent):.1f} ms (to reach: 50 ms)",)
    return Report("packages", "Verifying a package of 10 MB", series, baselines=(series[0].name,), notes=notes)


def _hash(data: bytes) -> None:
    hashlib.sha256(data).digest()


def _packed(work: Path) -> Path:
    folder = work / "large"
    folder.mkdir()
    manifest = {"name": "large", "version": "1.0.0", "api_version": "1", "binary": "./main", "hooks": []}
    (folder / "plugin.json").write_text(json.dumps(manifest))
    (folder / "main").write_text("#!/bin/sh\n")
    (folder / "main").chmod(0o755)
    for number in range(FILES):
        (folder / f"file-{number}").write_bytes(os.urandom(SIZE))
    return pack_folder(folder, work / "large.isolator").path
