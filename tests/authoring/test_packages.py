"""Packages: the same bytes everywhere, the content of the folder and nothing else, or one line and nothing left."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from host.authoring.pack import pack_folder
from isolator.errors import IsolatorError, UsageError
from isolator.ipc.folder_stream import FolderWriter
from isolator.policy.host import HostConfig
from isolator.reader import package
from isolator.registration import unpacking
from isolator.registration.reading import ManifestReader
from isolator.registration.staging import Source, Staged, discard, stage
from tests.host.test_cli import isolator
from tests.support.offers import offered
from tests.system.daemon import write_plugin

READER = ManifestReader(HostConfig().uid_range)
GOLDEN = "13999f03fc2a1d95bd4fc2bd6a00491d790706a26472ff4b932dbf4e87dc5e5a"
"""SHA-256 of the package of ``_example``."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


def _example(folder: Path, *, first: str = "a") -> Path:
    """A plugin with what a package has to keep; ``first`` is the file that is made first."""
    write_plugin(folder, script="#!/bin/sh\n", name="parcel")
    for name in sorted(("a", "z"), key=lambda name: name != first):
        (folder / name).write_text(name)
    (folder / "lib/empty").mkdir(parents=True)
    (folder / "lib-2").write_bytes(bytes(range(256)) * 3)
    (folder / "lib" / "ü \n").write_text("")
    (folder / "lib" / ("n" * 90)).mkdir()
    (folder / "lib" / ("n" * 90) / "deep").write_text("x" * 512)
    return folder


@pytest.fixture
def parcel(tmp_path: Path) -> Path:
    """A good package."""
    return pack_folder(_example(tmp_path / "plugin"), tmp_path / "parcel.isolator").path


def _staged(base: Path, path: Path) -> Staged:
    return stage(base, Source(path=str(path)), READER, offered(path))


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A tar archive as others write it, with a right digest at its end."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        size = archive.offset
    data = out.getvalue()[:size]
    return data + package.trailer(hashlib.sha256(data).digest())


def _member(
    name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", goal: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, goal, 0o755 if kind == tarfile.DIRTYPE else 0o644
    return info, content


def _with_sum(data: bytes) -> bytes:
    return data + package.trailer(hashlib.sha256(data).digest())


def _member_bytes(path: bytes, content: bytes = b"") -> bytes:
    return package.header(path, len(content)) + content + package.padding(len(content))


def _owned(member: tuple[tarfile.TarInfo, bytes]) -> tuple[tarfile.TarInfo, bytes]:
    member[0].uid = 1000
    return member


def _set_uid(member: tuple[tarfile.TarInfo, bytes]) -> tuple[tarfile.TarInfo, bytes]:
    member[0].mode = 0o4755
    return member


def _without_sum(data: bytes) -> bytes:
    return data[: -len(package.trailer(bytes(32)))]


def _with_gap(data: bytes) -> bytes:
    """A byte in the padding behind the first member, with a digest that is right."""
    end = data.index(b"\0", 512)
    return _with_sum(_without_sum(data[: end + 1] + b"\1" + data[end + 2 :]))


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "symbolic link": (lambda _: _tar(_member("a", tarfile.SYMTYPE, goal="/etc/passwd")), "a: is a link"),
    "hard link": (lambda _: _tar(_member("a"), _member("b", tarfile.LNKTYPE, goal="a")), "b: is a link"),
    "device": (lambda _: _tar(_member("a", tarfile.CHRTYPE)), "a: is a device"),
    "fifo": (lambda _: _tar(_member("a", tarfile.FIFOTYPE)), "a: is a FIFO"),
    "dots": (lambda _: _with_sum(_member_bytes(b"../a")), "leads out of the package"),
    "root": (lambda _: _with_sum(_member_bytes(b"/etc/a")), "leads out of the package"),
    "dot": (lambda _: _with_sum(_member_bytes(b"./a")), "leads out of the package"),
    "twice": (lambda _: _with_sum(_member_bytes(b"a") * 2), "a: is there twice"),
    "disorder": (lambda _: _with_sum(_member_bytes(b"b") + _member_bytes(b"a")), "not in its place"),
    "no folder": (lambda _: _with_sum(_member_bytes(b"a/b")), "a folder that the package does not have"),
    "file as folder": (lambda _: _with_sum(_member_bytes(b"a") + _member_bytes(b"a/b")), "does not have"),
    "owner": (lambda _: _tar(_owned(_member("a"))), "its header is not as a package has it"),
    "setuid": (lambda _: _tar(_set_uid(_member("a"))), "its header is not as a package has it"),
    "bomb": (lambda _: package.header(b"a", 8**11 - 1) + bytes(512), "more than .* MiB"),
    "sparse": (lambda _: _tar(_member("a", tarfile.GNUTYPE_SPARSE)), "a: is a sparse file"),
    "extension": (lambda _: _tar(_member("a", tarfile.XHDTYPE)), "a: is a PAX extension"),
    "compressed": (gzip.compress, "is no package"),
    "empty": (lambda _: b"", "ends too early"),
    "short": (lambda good: good[:-1], "ends too early"),
    "long": (lambda good: good + b"\0", "something behind its end"),
    "no digest": (lambda good: _without_sum(good) + bytes(1024), "without the digest"),
    "changed byte": (lambda good: good.replace(b"#!/bin/sh", b"#!/bin/ah"), "damaged"),
    "gap": (_with_gap, "something between its members"),
    "no manifest": (lambda _: _tar(_member("a")), "plugin.json: not there"),
}


# --- packing ---------------------------------------------------------------------------------------------------------


def test_same_files_give_the_same_bytes_whatever_made_them(tmp_path: Path) -> None:
    one = pack_folder(_example(tmp_path / "one"), tmp_path / "1")
    two = _example(tmp_path / "two", first="z")
    (two / ".git").mkdir()
    (two / ".git/HEAD").write_text("ref: refs/heads/main\n")
    for path in two.rglob("*"):
        os.chown(path, 1234, 1234)
        path.chmod(0o700 if path.stat().st_mode & 0o100 else 0o600)
        os.utime(path, (1, 1))
    other = pack_folder(two, tmp_path / "2")
    assert one.path.read_bytes() == other.path.read_bytes()
    assert one.sha256 == other.sha256 == hashlib.sha256(one.path.read_bytes()).hexdigest()
    assert one.sha256 == GOLDEN, "packages of other hosts and versions are others now"


def test_package_is_an_archive_that_tar_reads(parcel: Path, tmp_path: Path) -> None:
    with tarfile.open(parcel) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "out")
    assert names[-1] == "isolator.sum" and "lib/empty" in names
    assert (tmp_path / "out/lib/ü \n").exists() and os.access(tmp_path / "out/main", os.X_OK)


@pytest.mark.parametrize("kind", ["link", "fifo", "reserved", "long", "key"])
def test_folder_that_no_package_can_hold_is_refused_and_nothing_is_written(tmp_path: Path, kind: str) -> None:
    folder = _example(tmp_path / "plugin")
    if kind == "link":
        (folder / "b").symlink_to("a")
    elif kind == "fifo":
        os.mkfifo(folder / "b")
    elif kind == "reserved":
        (folder / "isolator.sum").touch()
    elif kind == "key":
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(folder / "b.key")], check=True)
    else:
        (folder / ("n" * 101)).touch()
    expected = {
        "link": "is a link", "fifo": "neither a file", "reserved": "package's own", "long": "too long",
        "key": "b.key: is a private key",
    }  # fmt: skip
    with pytest.raises(UsageError, match=expected[kind]):
        pack_folder(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["plugin"]


async def test_pack_command_names_the_file_by_plugin_and_version(tmp_path: Path) -> None:
    _example(tmp_path / "plugin")
    ran = await isolator(tmp_path, "pack", "plugin", "--json", cwd=tmp_path)
    assert ran.json["file"] == "parcel-1.0.0.isolator" and ran.json["files"] == 10
    ran = await isolator(tmp_path, "pack", "plugin", "-o", "plugin/x", cwd=tmp_path)
    assert ran.code == 2 and "inside the folder" in ran.err and "add -o x" in ran.err
    ran = await isolator(tmp_path, "pack", ".", cwd=tmp_path / "plugin")
    assert ran.code == 2 and ran.err.endswith("add -o ../parcel-1.0.0.isolator\n")
    assert (await isolator(tmp_path, "pack", ".", "-o", "../parcel-1.0.0.isolator", cwd=tmp_path / "plugin")).code == 0
    ran = await isolator(tmp_path, "pack", "nowhere", cwd=tmp_path)
    assert ran.code == 3 and ran.err.count("\n") == 1


# --- reading ---------------------------------------------------------------------------------------------------------


def test_plugin_from_a_package_is_the_one_from_its_folder(base: Path, parcel: Path) -> None:
    folder, packed = _staged(base, parcel.parent / "plugin"), _staged(base, parcel)
    assert (packed.digest, packed.files, packed.size) == (folder.digest, folder.files, folder.size)
    assert (folder.kind, packed.kind) == ("folder", "package")
    assert sorted(p.name for p in packed.folder.rglob("*")) == sorted(p.name for p in folder.folder.rglob("*"))
    discard(folder)
    discard(packed)
    assert not list(base.iterdir())


@pytest.mark.parametrize("kind", BAD)
def test_bad_package_is_refused_in_one_line_and_leaves_nothing(base: Path, parcel: Path, kind: str) -> None:
    make, expected = BAD[kind]
    parcel.write_bytes(make(parcel.read_bytes()))
    with pytest.raises(UsageError, match=expected) as caught:
        _staged(base, parcel)
    assert str(caught.value).startswith(str(parcel)) and str(caught.value).isprintable()
    assert not list(base.iterdir())


def _mutated(good: bytes, chance: random.Random) -> bytes:
    """The package with one change, of those that accidents and attackers make."""
    data = bytearray(good)
    at, other = chance.randrange(len(data)), chance.randrange(len(data))
    block, another = at // 512 * 512, other // 512 * 512
    match chance.randrange(8):
        case 0:
            data[at] ^= 1 << chance.randrange(8)
        case 1:
            del data[at:]
        case 2:
            del data[block : block + 512]
        case 3:
            data[block:block] = data[another : another + 512]
        case 4:
            data[block : block + 512], data[another : another + 512] = (
                data[another : another + 512], data[block : block + 512],
            )  # fmt: skip
        case 5:
            data[at : at + 8] = chance.randbytes(8)
        case 6:
            data[at:at] = bytes(chance.randrange(1, 1024))
        case 7:  # with a right checksum of the header, and a right digest
            headers = [start for start in range(0, len(data), 512) if data[start + 257 : start + 262] == b"ustar"]
            start = chance.choice(headers[:-1])
            data[start + chance.randrange(500)] = chance.randrange(256)
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
            return _with_sum(_without_sum(bytes(data)))
    return bytes(data)


def _content(data: bytes) -> bool:
    """Whether a package is read; raises UsageError, and nothing else, for a bad one."""
    with Path(os.devnull).open("wb") as sink:
        package.read_package(io.BytesIO(data).read, FolderWriter(sink.fileno()))
    return True


def test_mutated_package_is_refused_or_a_good_one(parcel: Path) -> None:
    good, chance, refused = parcel.read_bytes(), random.Random(19), 0
    assert _content(good)
    for _ in range(400):
        data = _mutated(good, chance)
        try:
            _content(data)
        except UsageError as error:
            assert error.why and str(error).isprintable()
            refused += 1
        else:  # a name, a size or a mode that a package may have as well
            assert data == good or data[-2048:] != good[-2048:]
    assert refused > 300


@pytest.mark.parametrize(
    ("count", "seed"), [(10, 10), *(pytest.param(200, seed, marks=pytest.mark.wide) for seed in range(5))]
)
def test_mutated_package_leaves_nothing_and_breaks_nothing(base: Path, parcel: Path, count: int, seed: int) -> None:
    """A thousand of them with ``--all``, in parts that each have a test's time."""
    good, chance = parcel.read_bytes(), random.Random(seed)
    for _ in range(count):
        parcel.write_bytes(_mutated(good, chance))
        try:
            discard(_staged(base, parcel))
        except UsageError as error:
            assert str(error).startswith(str(parcel)) and str(error).isprintable()
        assert not list(base.iterdir())
    parcel.write_bytes(good)
    discard(_staged(base, parcel))


def test_package_is_read_by_a_process_that_can_do_nothing_else(
    base: Path, parcel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "_MODULE", "tests.reader.broken_package")
    with pytest.raises(IsolatorError, match=r"succeeded with \[\]"):
        _staged(base, parcel)
