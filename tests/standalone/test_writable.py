"""``isolator run --write``: what the cage makes is the caller's, root's files stay root's, nothing else changes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.linux import mount
from isolator.linux.namespaces import exchange, new_user_namespace
from tests.support.cage_fixture import isolator

CALLER, GROUP, COLLEAGUE = 4711, 4712, 4713


@pytest.fixture
def project(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the caller's, with a private file, a colleague's file that the group may change, and root's."""
    monkeypatch.setenv("SUDO_UID", str(CALLER))
    monkeypatch.setenv("SUDO_GID", str(GROUP))
    folder = shared_dir / "project"
    folder.mkdir()
    for name, uid, gid, mode in (
        ("private", CALLER, GROUP, 0o600), ("shared", COLLEAGUE, GROUP, 0o664), ("theirs", COLLEAGUE, COLLEAGUE, 0o644),
        ("root", 0, 0, 0o644),
    ):  # fmt: skip
        path = folder / name
        path.write_text(f"{name}\n")
        os.chown(path, uid, gid)
        path.chmod(mode)
    os.chown(folder, CALLER, GROUP)
    return folder


def _owner(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


def _in(folder: Path, script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a cage that may change the folder and starts there."""
    root = folder.parent
    return isolator(root, "run", "--write", str(folder), "--cwd", str(folder), *flags, "--", "sh", "-c", script)


def test_files_made_in_the_cage_belong_to_the_caller(project: Path) -> None:
    script = "mkdir -p out/deep && echo made >out/deep/file && cat private && echo more >>private && mv private moved"
    result = _in(project, script)
    assert (result.returncode, result.stdout) == (0, "private\n"), result.stderr
    made = [project / name for name in ("out", "out/deep", "out/deep/file", "moved")]
    assert {_owner(path) for path in made} == {(CALLER, GROUP)}
    assert (project / "moved").read_text() == "private\nmore\n"


def test_a_group_may_change_a_colleagues_file_and_nobody_roots(project: Path) -> None:
    script = (
        "for f in shared theirs root; do (echo more >>$f) 2>/dev/null && echo $f; done; stat -c '%n %u' theirs root"
    )
    result = _in(project, script)
    assert result.stdout == f"shared\ntheirs {COLLEAGUE}\nroot 65534\n", result.stderr
    assert _owner(project / "shared") == (COLLEAGUE, GROUP)


def test_git_finds_no_dubious_owner(project: Path) -> None:
    commit = "git -c user.name=a -c user.email=a@b commit -q --allow-empty -m x"
    result = _in(project, f"git init -q . && {commit} && git log --format=%s")
    assert (result.returncode, result.stdout) == (0, "x\n"), result.stderr


def test_a_program_that_was_built_there_can_be_run(project: Path) -> None:
    result = _in(project, r"printf '#!/bin/sh\necho ran\n' >tool && chmod +x tool && ./tool")
    assert result.stdout == "ran\n", result.stderr


def test_nothing_else_can_be_changed(shared_dir: Path, project: Path) -> None:
    """A folder below that is only to be read, the folder above, and another one beside it."""
    other = shared_dir / "other"
    for folder in (other, project / "kept"):
        folder.mkdir()
        os.chown(folder, CALLER, GROUP)
    script = f"for d in . kept {shared_dir} {other}; do touch $d/new 2>/dev/null && echo $d; done; true"
    result = _in(project, script, "--read", f"{project}/kept", "--read", str(other))
    assert (result.returncode, result.stdout) == (0, ".\n"), result.stderr


def test_without_sudo_files_belong_to_the_owner_of_the_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUDO_UID")
    os.chown(project, COLLEAGUE, GROUP)
    result = _in(project, "touch new")
    assert result.returncode == 0, result.stderr
    assert _owner(project / "new") == (COLLEAGUE, GROUP)


def test_a_folder_of_roots_is_refused(project: Path) -> None:
    os.chown(project, 0, 0)
    result = _in(project, "true")
    assert (result.returncode, result.stderr) == (
        125, f"isolator: --write {project}: it is root's, and nothing in a cage acts as root; "
        "give the folder to a user: chown USER: DIR\n",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["file", "link", "missing"])
def test_only_a_folder_by_its_real_path_can_be_written(shared_dir: Path, project: Path, kind: str) -> None:
    (project / "file").touch()
    (shared_dir / "link").symlink_to(project)
    path = {"file": project / "file", "link": shared_dir / "link", "missing": project / "missing"}[kind]
    result = isolator(shared_dir, "run", "--write", str(path), "--", "true")
    assert result.returncode == 125
    assert result.stderr.startswith(f"isolator: --write {path}: ")
    assert result.stderr.endswith("name a folder by its real path, without symbolic links\n")


@pytest.fixture
def unmappable(shared_dir: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder whose file system has no idmapped mounts, or that is on one already."""
    place = shared_dir / "place"
    place.mkdir()
    os.chown(place, CALLER, GROUP)
    if request.param == "ramfs":
        subprocess.run(["mount", "-t", "ramfs", "none", place], check=True)
        os.chown(place, CALLER, GROUP)
    else:
        tree, ids = mount.clone_tree(str(place)), new_user_namespace(exchange(1, 2), exchange(1, 2))
        mount.map_ids(tree, ids)
        mount.attach(tree, str(place))
        os.close(tree)
        os.close(ids)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(
    ("unmappable", "why"),
    [("ramfs", "cannot show owners as others (idmapped mounts)"), ("mapped", "are shown as others already")],
    indirect=["unmappable"],
)
def test_a_file_system_that_cannot_map_owners_is_named(shared_dir: Path, unmappable: Path, why: str) -> None:
    result = isolator(shared_dir, "run", "--write", str(unmappable), "--", "true")
    assert result.returncode == 125
    assert result.stderr.startswith(f"isolator: writable folder {unmappable}: ")
    assert why in result.stderr


@pytest.mark.parametrize(("one", "other"), [(1, 2), (1000, 74999), (74999, 1000), (5, 5), (1, 0xFFFFFFFE)])
def test_an_exchange_of_ids_leaves_out_root_alone(one: int, other: int) -> None:
    lines = exchange(one, other)
    assert sum(count for _, _, count in lines) == 0xFFFFFFFE
    assert all(inside and outside for inside, outside, _ in lines)
    shown = {inside: outside for inside, outside, count in lines if count == 1}
    assert one == other or (shown[one], shown[other]) == (other, one)
