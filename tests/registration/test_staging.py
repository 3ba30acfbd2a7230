"""A stranger's folder is copied whole or refused with a reason, and nothing of it leads out of its folder."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.errors import IsolatorError, NotFoundError, UsageError
from isolator.policy.host import HostConfig
from isolator.registration import staging
from isolator.registration.reading import ManifestReader
from isolator.registration.staging import Source, Staged, discard, stage
from isolator.registration.store import Registration, Release, Store
from tests.support.timeouts import seconds
from tests.system.daemon import wait_for, write_plugin

READER = ManifestReader(HostConfig().uid_range)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_plugin(tmp_path / "package" / "parcel")


def offer(base: Path, folder: Path) -> Staged:
    return stage(base, Source(path=str(folder)), READER)


def refused(base: Path, folder: Path, pattern: str) -> None:
    with pytest.raises(UsageError, match=pattern):
        offer(base, folder)
    assert not list(base.iterdir()), "a refused package left a copy"


# --- what is copied ------------------------------------------------------------------------------------------------


def test_the_copy_is_the_folder_with_plain_modes(base: Path, package: Path) -> None:
    (package / "lib").mkdir(mode=0o700)
    (package / "lib/data").write_bytes(b"\0\1")
    (package / "lib/data").chmod(0o4711)
    (package / "lib/secret").write_text("x")
    (package / "lib/secret").chmod(0o600)
    (package / "link").symlink_to("lib/data")
    os.utime(package / "lib/data", (1_000_000_000, 1_000_000_000))
    (package / ".git").mkdir()
    (package / ".git/config").write_text("not needed")
    os.chown(package / "lib/data", 65533, 65533)
    staged = offer(base, package)
    copied = {str(path.relative_to(staged.folder)) for path in staged.folder.rglob("*")}
    assert copied == {"plugin.json", "main", "lib", "lib/data", "lib/secret", "link"}
    modes = {name: stat.S_IMODE((staged.folder / name).stat().st_mode) for name in ("lib", "lib/data", "lib/secret")}
    assert modes == {"lib": 0o755, "lib/data": 0o755, "lib/secret": 0o644}
    # A .pyc counts only while its source has the time of change that it notes.
    assert (staged.folder / "lib/data").stat().st_mtime == 1_000_000_000
    assert all(path.lstat().st_uid == 0 for path in staged.folder.rglob("*"))
    assert os.readlink(staged.folder / "link") == "lib/data"
    assert (staged.name, staged.kind, staged.synthesised) == ("parcel", "folder", False)
    discard(staged)
    assert not list(base.iterdir())


def digest(base: Path, folder: Path) -> str:
    staged = offer(base, folder)
    discard(staged)
    return staged.digest


def test_the_digest_is_of_names_modes_and_contents(base: Path, package: Path) -> None:
    first = digest(base, package)
    os.utime(package / "main", (1, 1))
    os.chown(package / "main", 65533, 65533)
    (package / "main").chmod(0o777)
    assert digest(base, package) == first
    changes: list[Callable[[], object]] = [
        lambda: (package / "extra").write_text(""),
        lambda: (package / "extra").chmod(0o755),
        lambda: (package / "extra").write_text("x"),
        lambda: (package / "extra").rename(package / "other"),
        (package / "folder").mkdir,
        lambda: (package / "link").symlink_to("main"),
        lambda: ((package / "link").unlink(), (package / "link").symlink_to("other")),
    ]
    seen = {first}
    for change in changes:
        change()
        now = digest(base, package)
        assert now not in seen
        seen.add(now)


def test_file_name_that_looks_like_two_files_has_another_digest(base: Path, package: Path) -> None:
    (package / "a").write_text("")
    (package / "b").write_text("")
    two = digest(base, package)
    (package / "a").unlink()
    (package / "b").unlink()
    content = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    for odd in (f"a\0{content}\nf\0b".replace("\0", "\n"), "a\nb", "a\\0b"):
        (package / odd).write_text("")
        assert digest(base, package) != two
        (package / odd).unlink()
    os.close(os.open(os.fsencode(package) + b"/\xff\xfe", os.O_CREAT | os.O_WRONLY))
    assert digest(base, package) != two


@settings(max_examples=60, deadline=None)
@given(
    trees=st.lists(
        st.dictionaries(st.sampled_from(["a", "b", "a\nf", "c\0x".replace("\0", "\1")]), st.binary(max_size=4)),
        min_size=2, max_size=2,
    )
)  # fmt: skip
def test_different_folders_have_different_digests(
    tmp_path_factory: pytest.TempPathFactory, trees: list[dict[str, bytes]]
) -> None:
    found = []
    for tree in trees:
        base = tmp_path_factory.mktemp("store")
        folder = write_plugin(tmp_path_factory.mktemp("package") / "parcel")
        for name, content in tree.items():
            (folder / name).write_bytes(content)
        found.append(digest(base, folder))
    assert (found[0] == found[1]) == (trees[0] == trees[1])


# --- what is refused -----------------------------------------------------------------------------------------------


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "odd")


def _socket(folder: Path) -> None:
    here = os.open(folder, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"/proc/self/fd/{here}/odd")
    finally:
        os.close(here)


def _device(folder: Path) -> None:
    os.mknod(folder / "odd", stat.S_IFBLK | 0o666, os.makedev(7, 0))


def _deep(folder: Path) -> None:
    place = os.open(folder, os.O_RDONLY)
    for _ in range(staging.MAX_DEPTH + 2):
        os.mkdir("d", dir_fd=place)
        below = os.open("d", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = below
    os.close(place)


def _link(goal: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub/odd").symlink_to(goal)

    return make


def _link_by_way_of_a_link(folder: Path) -> None:
    (folder / "d/e").mkdir(parents=True)
    (folder / "d/e/x").symlink_to("../..")
    (folder / "evil").symlink_to("d/e/x/../other")


def _manifest(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "plugin.json").unlink()
        change(folder / "plugin.json")

    return make


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (_fifo, "odd: not a regular file"),
    "socket": (_socket, "odd: not a regular file"),
    "device": (_device, "odd: not a regular file"),
    "deep": (_deep, "deeper than 64 folders"),
    "absolute link": (_link("/etc/shadow"), "a link out of the folder"),
    "link up": (_link("../../other"), "a link out of the folder"),
    "link round": (_link("../../parcel/main"), "a link out of the folder"),
    "link out by way of a link": (_link_by_way_of_a_link, "evil: a link out of the folder, to d/e/x/../other"),
    "link to proc": (_link("/proc/self/root/etc"), "a link out of the folder"),
    "manifest link": (_manifest(lambda path: path.symlink_to("main")), "not a regular file"),
    "manifest fifo": (_manifest(os.mkfifo), "not a regular file"),
    "manifest folder": (_manifest(Path.mkdir), "not a regular file"),
    "manifest missing": (_manifest(lambda path: None), "not there"),
    "manifest huge": (_manifest(lambda path: path.write_bytes(b" " * (300 << 10))), "262144"),
    "manifest binary": (_manifest(lambda path: path.write_bytes(b"\xff\xfe\0")), "plugin.json"),
    "manifest nested": (_manifest(lambda path: path.write_text("[" * 5000)), "plugin.json"),
    "name up": (_manifest(lambda path: path.write_text('{"name": "../../etc"}')), "plugin.json"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_package_is_refused(base: Path, package: Path, kind: str) -> None:
    change, pattern = HOSTILE[kind]
    change(package)
    refused(base, package, pattern)


@pytest.mark.parametrize("text", ["/srv/a\0b", "/srv/\ud800", "\0"])
@pytest.mark.parametrize("key", ["path", "binary", "files"])
def test_text_that_no_path_can_be_is_refused(base: Path, package: Path, key: str, text: str) -> None:
    source = {"name": "parcel", "binary": str(package / "main"), key: text}
    with pytest.raises(UsageError, match="no path can have"):
        stage(base, Source(**source), READER)
    assert not list(base.iterdir())


def test_links_within_the_folder_stay_links(base: Path, package: Path) -> None:
    (package / "sub").mkdir()
    (package / "sub/back").symlink_to("../main")
    (package / "here").symlink_to(".")
    (package / "nowhere").symlink_to("not/there")
    (package / "loop").symlink_to("loop")
    staged = offer(base, package)
    assert os.readlink(staged.folder / "sub/back") == "../main" and (staged.folder / "loop").is_symlink()


def test_the_copy_is_bounded(base: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MAX_FILES", 20)
    for number in range(19):
        (package / f"file{number}").touch()
    refused(base, package, "more than 20 files")
    monkeypatch.setattr(staging, "MAX_FILES", 50)
    monkeypatch.setattr(staging, "MAX_BYTES", 4 << 20)
    with (package / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    refused(base, package, "more than 4 MiB")


def test_folder_that_is_too_large_is_refused_before_a_byte_is_copied(base: Path, package: Path) -> None:
    with (package / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    READER.read((package / "plugin.json").read_bytes(), "read before")
    before = written()
    refused(base, package, "more than 2048 MiB")
    assert written() - before < 1 << 20


def written() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def test_names_of_a_stranger_stay_on_the_line_of_their_error(base: Path, package: Path) -> None:
    odd = "\x1b[2J\nisolator: ready\x9b"
    for make in (os.mkfifo, lambda path: path.symlink_to(f"/{odd}")):
        make(package / odd)
        with pytest.raises(UsageError) as caught:
            offer(base, package)
        assert str(caught.value).isprintable() and r"\x1b[2J\nisolator: ready\x9b" in str(caught.value)
        (package / odd).unlink()


def test_folder_that_changes_while_it_is_read_leaks_no_secret(base: Path, package: Path, tmp_path: Path) -> None:
    """Somebody exchanges a file for a link to a secret, again and again: the secret is never in a copy."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("TOP SECRET")
    target, over = package / "sub", threading.Event()

    def exchange() -> None:
        while not over.is_set():
            target.mkdir()
            (target / "key").write_text("harmless")
            target.rename(package / "aside")
            target.symlink_to(secret)
            target.unlink()
            (package / "aside/key").unlink()
            (package / "aside").rmdir()

    thread = threading.Thread(target=exchange)
    thread.start()
    copies = 0
    try:
        for _ in range(300):
            try:
                staged = offer(base, package)
            except (UsageError, OSError):
                continue
            copies += 1
            for path in staged.folder.rglob("*"):
                assert path.is_symlink() or not path.is_file() or "TOP SECRET" not in path.read_text()
            discard(staged)
    finally:
        over.set()
        thread.join()
    assert copies
    assert not list(base.iterdir()), "a copy that was cut short by a change was left"


def _becomes_a_link(entry: Path, secret: Path) -> None:
    entry.symlink_to(secret / "key" if entry.name == "file" else secret)


def _becomes_a_pipe(entry: Path, _: Path) -> None:
    os.mkfifo(entry)


@pytest.mark.timeout(seconds(20))  # an open that waits for the other end of a pipe waits for ever
@pytest.mark.parametrize(
    ("name", "become"), [("folder", _becomes_a_link), ("file", _becomes_a_link), ("file", _becomes_a_pipe)]
)
def test_entry_that_is_exchanged_as_it_is_opened_is_neither_followed_nor_waited_for(
    base: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
    become: Callable[[Path, Path], None],
) -> None:  # fmt: skip
    """At the worst moment: behind the last look at it."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("TOP SECRET")
    (package / "folder").mkdir()
    (package / "file").write_text("harmless")
    look = os.stat

    def looked(path: str | Path, **further: Any) -> os.stat_result:
        found = look(path, **further)
        if path == name and "dir_fd" in further and not (package / name).is_symlink():
            (package / name).rename(tmp_path / "aside")
            become(package / name, secret)
        return found

    monkeypatch.setattr(os, "stat", looked)
    with pytest.raises((UsageError, OSError)):
        offer(base, package)
    assert (tmp_path / "aside").exists(), "nothing was exchanged"
    assert not list(base.iterdir())


# --- binaries that stay where they are -----------------------------------------------------------------------------


@pytest.fixture
def binary(shared_dir: Path) -> Path:
    # Below a folder that only root can write, all the way: /tmp is not one.
    path = Path("/usr/local/lib") / f"isolator-{shared_dir.name}"
    path.mkdir()
    (path / "tool").write_text("#!/bin/sh\n")
    (path / "tool").chmod(0o755)
    yield path / "tool"
    for left in path.iterdir():
        left.unlink()
    path.rmdir()


def by_path(base: Path, path: Path, *hooks: str, name: str = "tool-name") -> Staged:
    return stage(base, Source(name=name, binary=str(path), hooks=hooks or ("deploy.completed",)), READER)


def test_a_binary_is_pinned_and_not_copied(base: Path, binary: Path) -> None:
    staged = by_path(base, binary)
    assert (staged.kind, staged.binary_path, staged.synthesised) == ("binary", str(binary), True)
    assert [path.name for path in staged.folder.iterdir()] == ["plugin.json"]
    first = staged.digest
    assert by_path(base, binary).digest == first
    binary.write_text("#!/bin/sh\nexit 1\n")
    changed = by_path(base, binary)
    assert changed.digest != first and changed.binary_sha256 != staged.binary_sha256


def test_a_pinned_binary_is_read_again_only_when_it_has_changed(binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = staging._hash
    monkeypatch.setattr(staging, "_hash", lambda fd: read.append(fd) or real(fd))
    wait_for(lambda: time.time_ns() - binary.stat().st_ctime_ns > 2 * staging._TICK_NS)
    first = staging.hash_binary(binary)
    assert (staging.hash_binary(binary), len(read)) == (first, 1)
    times = binary.stat()
    binary.write_text("#!/bin/no\n")  # as long as before
    os.utime(binary, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert staging.hash_binary(binary) != first


def test_a_binary_that_others_can_change_is_refused(base: Path, binary: Path) -> None:
    changes: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lambda: binary.chmod(0o775), lambda: binary.chmod(0o755)),
        (lambda: binary.chmod(0o757), lambda: binary.chmod(0o755)),
        (lambda: os.chown(binary, 65533, 0), lambda: os.chown(binary, 0, 0)),
        (lambda: binary.parent.chmod(0o777), lambda: binary.parent.chmod(0o755)),
        (lambda: binary.parent.chmod(0o1777), lambda: binary.parent.chmod(0o755)),
        (lambda: os.chown(binary.parent, 65533, 0), lambda: os.chown(binary.parent, 0, 0)),
    ]
    for spoil, restore in changes:
        spoil()
        with pytest.raises(UsageError, match="others than root can change it"):
            by_path(base, binary)
        restore()
    binary.chmod(0o644)
    with pytest.raises(UsageError, match="not executable"):
        by_path(base, binary)
    with pytest.raises(UsageError, match="not a regular file"):
        by_path(base, binary.parent)
    with pytest.raises(UsageError):
        by_path(base, binary.parent / "missing")
    assert not list(base.iterdir())


def test_flags_only_narrow_a_manifest(base: Path, package: Path) -> None:
    manifest = json.loads((package / "plugin.json").read_text())
    (package / "plugin.json").write_text(json.dumps(manifest | {"hooks": ["deploy.started", "deploy.completed"]}))
    main = package / "main"
    narrowed = by_path(base, main, "deploy.completed", name="parcel")
    assert json.loads((narrowed.folder / "plugin.json").read_text())["hooks"] == ["deploy.completed"]
    assert narrowed.digest != offer(base, package).digest
    with pytest.raises(UsageError, match="does not list"):
        by_path(base, main, "deploy.failed", name="parcel")
    with pytest.raises(UsageError, match="calls it parcel"):
        by_path(base, main, name="another-name")


# --- the store -----------------------------------------------------------------------------------------------------


def registration(name: str, *digests: str) -> Registration:
    first, *others = (Release(digest, "1.0.0") for digest in digests)
    return Registration(name, "user", 1, first, previous=tuple(others))


def test_kept_versions_are_found_again_and_the_rest_is_pruned(base: Path, package: Path) -> None:
    store = Store(base)
    digests = []
    for number in range(3):
        (package / "number").write_text(str(number))
        staged = offer(base, package)
        store.keep(staged)
        digests.append(staged.digest)
    store.keep(offer(base, package))  # the same content again
    saved = registration("parcel", *digests)
    store.save(saved)
    assert store.load("parcel") == saved and store.names() == ["parcel"]
    assert (store.folder("parcel", saved.release) / "number").read_text() == "0"
    store.prune("parcel", registration("parcel", digests[2]).kept)
    assert [path.name for path in (base / "parcel").iterdir() if path.is_dir()] == [digests[2]]
    assert not list(base.glob(".staging-*"))
    store.delete("parcel")
    assert not list(base.iterdir())


@pytest.mark.parametrize("name", ["..", "../parcel", "a/b", "", ".staging-1", "A", "x" * 64, "a\nb"])
def test_invalid_name_is_not_found(base: Path, name: str) -> None:
    with pytest.raises(NotFoundError):
        Store(base).load(name)


def test_unreadable_state_file_is_an_error_with_its_path(base: Path) -> None:
    (base / "parcel").mkdir()
    for content in ("", "{}", "[]", '{"name": 1}'):
        (base / "parcel/plugin.state").write_text(content)
        with pytest.raises(IsolatorError, match=r"plugin\.state: cannot be read"):
            Store(base).load("parcel")


def test_remains_of_a_killed_daemon_are_cleared(base: Path, package: Path) -> None:
    store = Store(base)
    kept = offer(base, package)
    store.keep(kept)
    store.save(registration("parcel", kept.digest))
    (base / "parcel" / ("0" * 64)).mkdir()
    (base / "parcel/.plugin.state").write_text("half")
    offer(base, package)
    (base / "nobody").mkdir()
    store.prune_all()
    assert sorted(path.name for path in base.iterdir()) == ["parcel"]
    assert sorted(path.name for path in (base / "parcel").iterdir()) == sorted(["plugin.state", kept.digest])
