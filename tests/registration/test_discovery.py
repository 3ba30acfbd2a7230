"""Plugins in plugin_dirs are found, pending or rejected, whoever can write there."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path

from host.authoring.pack import pack_folder
from isolator.linux.folder_watch import FolderWatch
from isolator.policy.host import HostConfig
from isolator.reader.package import header
from isolator.registration.discovery import MAX_ENTRIES, scan
from isolator.registration.reading import ManifestReader
from tests.system.daemon import write_plugin

READER = ManifestReader(HostConfig().uid_range)


def found(*folders: Path, registered: dict[str, str] | None = None) -> dict[str, str]:
    return {entry.name: entry.error for entry in scan(map(str, folders), registered or {}, READER)}


def test_first_folder_of_a_name_is_pending_and_the_others_are_rejected(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_plugin(one / "alpha")
    write_plugin(two / "alpha")
    write_plugin(two / "beta")
    names = found(one, two)
    assert names.pop("alpha") == "" and names.pop("beta") == ""
    ((name, error),) = names.items()
    assert name.startswith("found-") and f"taken by {one}/alpha" in error


def test_registered_name_is_taken_unless_its_folder_is_the_source(tmp_path: Path) -> None:
    folder = write_plugin(tmp_path / "alpha")
    assert found(tmp_path, registered={"alpha": str(folder)}) == {}
    ((name, error),) = found(tmp_path, registered={"alpha": ""}).items()
    assert name != "alpha" and "is taken" in error


def test_broken_folder_never_hides_another(tmp_path: Path) -> None:
    write_plugin(tmp_path / "good")
    for name, content in {"empty": b"", "list": b"[]", "deep": b"[" * 9000, "large": b" " * (1 << 20)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "plugin.json").write_bytes(content)
    (tmp_path / "Not A Name").mkdir()
    (tmp_path / "Not A Name/plugin.json").write_text("{")
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff", os.O_CREAT | os.O_WRONLY))
    (tmp_path / "unreadable").mkdir()
    (tmp_path / "two\n").mkdir()
    (tmp_path / "two\n/plugin.json").write_text("{")
    names = found(tmp_path)
    assert names.pop("good") == ""
    assert len(names) == 6 and all(names.values()), names
    assert all(re.fullmatch("[a-z0-9-]+", name) for name in names), names


def test_package_is_found_as_its_folder_would_be(tmp_path: Path) -> None:
    pack_folder(write_plugin(tmp_path / "away/parcel"), tmp_path / "any.isolator")
    pack_folder(write_plugin(tmp_path / "away/many", **{"description": "x" * 3000}), tmp_path / "b.isolator")
    names = found(tmp_path)
    assert names == {"parcel": "", "many": ""}
    assert found(tmp_path, registered={"parcel": f"{tmp_path}/any.isolator"}) == {"many": ""}


def test_file_that_is_no_package_is_rejected_and_hides_nothing(tmp_path: Path) -> None:
    good = pack_folder(write_plugin(tmp_path / "away/parcel"), tmp_path / "parcel.isolator").path.read_bytes()
    (tmp_path / "parcel.tar").write_bytes(good)
    bad = {"empty": b"", "short": good[:700], "text": b"<html>" * 500, "huge": header(b"a", 8**11 - 1) + bytes(512)}
    for name, content in bad.items():
        (tmp_path / f"{name}.isolator").write_bytes(content)
    os.mkfifo(tmp_path / "fifo.isolator")
    (tmp_path / "link.isolator").symlink_to("parcel.isolator")
    names = found(tmp_path)
    assert names.pop("parcel") == ""
    assert len(names) == len(bad) + len(["fifo"]) and all("is no package" in error for error in names.values()), names
    (tmp_path / "empty.isolator").write_bytes(good.replace(b"parcel", b"second"))
    assert found(tmp_path)["second"] == ""


def test_scan_of_a_folder_is_bounded(tmp_path: Path) -> None:
    for number in range(MAX_ENTRIES + 10):
        folder = tmp_path / f"p{number:04}"
        folder.mkdir()
        body = {"name": f"p{number}", "version": "1.0.0", "api_version": "1", "binary": "./x", "hooks": []}
        (folder / "plugin.json").write_text(json.dumps(body))
    assert len(found(tmp_path)) <= MAX_ENTRIES


async def test_folder_changes_are_reported_once_they_have_settled(tmp_path: Path) -> None:
    reported: asyncio.Queue[set[str]] = asyncio.Queue()
    watch = FolderWatch(reported.put_nowait)
    try:
        watch.set([str(tmp_path), str(tmp_path / "missing")])
        for text in ("a", "ab", "abc"):
            (tmp_path / "file.new").write_text(text)
        (tmp_path / "file.new").rename(tmp_path / "file")
        async with asyncio.timeout(10):
            assert f"{tmp_path}/file" in await reported.get()
        (tmp_path / "file").chmod(0o600)
        async with asyncio.timeout(10):
            assert await reported.get() == {f"{tmp_path}/file"}
        (tmp_path / "sub").mkdir()
        watch.set([str(tmp_path / "sub")])
        (tmp_path / "file").unlink()
        (tmp_path / "sub/other").write_text("")
        async with asyncio.timeout(10):
            while f"{tmp_path}/sub/other" not in (seen := await reported.get()):
                assert f"{tmp_path}/file" not in seen, "a folder that is not watched any more"
    finally:
        watch.close()
