"""A power cut right after a plugin was registered: its files are there, whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from isolator.policy.host import HostConfig
from isolator.registration.reading import ManifestReader
from isolator.registration.staging import Source, stage
from isolator.registration.store import Registration, Release, Store
from tests.support.disks import ext4_image, run, shut_down
from tests.support.offers import offered
from tests.system.daemon import write_plugin


@pytest.mark.parametrize("sync", [True, False])
def test_registered_files_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool) -> None:
    package = write_plugin(tmp_path / "package/parcel")
    (package / "data").write_bytes(b"precious" * 4096)
    disk = tmp_path / "disk"
    disk.mkdir()
    if not sync:  # ablation
        monkeypatch.setattr("isolator.registration.store.sync_tree", lambda folder: None)
    with ext4_image(32 << 20) as image:
        run("mount", "-o", "loop", image, str(disk))
        try:
            store = Store(disk / "plugins")
            staged = stage(
                store.base, Source(path=str(package)), ManifestReader(HostConfig().uid_range), offered(package)
            )
            store.keep(staged)
            saved = Registration("parcel", "user", 1, Release(staged.digest, "1.0.0"))
            store.save(saved)
            shut_down(disk)
        finally:
            run("umount", str(disk))
        run("mount", "-o", "loop", image, str(disk))
        try:
            assert store.load("parcel") == saved
            kept = store.folder("parcel", saved.release) / "data"
            whole = kept.exists() and kept.read_bytes() == b"precious" * 4096
            assert whole == sync, "a registration of files that are not there" if sync else "nothing is shown"
        finally:
            run("umount", str(disk))
