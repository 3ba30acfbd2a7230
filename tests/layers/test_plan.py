"""The plan: what is packed is read back with the receiver's descriptors, and nothing else is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolator.launcher import enter
from isolator.layers.filesystem import (
    AttachMount,
    FilesystemSection,
    FillFolder,
    MountOperation,
    ResizeTmpfs,
    SealMount,
)
from isolator.layers.landlock import LandlockSection, WritableFolder
from isolator.layers.ledger import LAYERS
from isolator.layers.plan import Part, Plan, Section
from isolator.layers.proc.layer import GroupFolder, ProcSection
from isolator.layers.rlimits import RlimitsSection
from isolator.layers.seccomp.layer import SeccompSection
from isolator.layers.user import UserSection

texts = st.text(max_size=20)
numbers = st.integers(-(2**40), 2**40)
files = st.dictionaries(texts, texts, max_size=3)
operations: st.SearchStrategy[MountOperation] = st.one_of(
    st.builds(ResizeTmpfs, texts, texts, st.booleans()),
    st.builds(FillFolder, texts, files, numbers, numbers, numbers, numbers),
    st.builds(AttachMount, texts, texts, st.booleans()),
    st.builds(SealMount, texts),
)
sections: st.SearchStrategy[Section] = st.one_of(
    st.builds(UserSection, numbers, numbers),
    st.builds(RlimitsSection, numbers),
    st.builds(LandlockSection, numbers, st.lists(st.builds(WritableFolder, texts), max_size=2).map(tuple)),
    st.builds(ProcSection, st.lists(st.builds(GroupFolder, texts, texts), max_size=3).map(tuple), texts),
    st.builds(SeccompSection, st.binary(max_size=50), st.binary(max_size=9)),
    st.builds(FilesystemSection, st.booleans(), st.lists(operations, max_size=6).map(tuple)),
)
plans = st.builds(
    Plan, texts, st.lists(texts, max_size=3), files, texts, numbers,
    st.lists(sections, max_size=5).map(lambda found: {one.kind: one for one in found}),
    st.dictionaries(texts, st.integers(0, 999), max_size=4), st.booleans(), st.booleans(),
)  # fmt: skip


@given(plans)
def test_a_plan_arrives_as_it_was_sent(plan: Plan) -> None:
    packet, fds = plan.pack()
    found = Plan.unpack(packet, [fd + 7 for fd in fds])
    assert found.fds == {name: fd + 7 for name, fd in plan.fds.items()}
    found.fds = plan.fds
    assert found == plan
    for kind, section in plan.sections.items():
        assert type(found.sections[kind]) is type(section)


def test_a_section_and_an_operation_cannot_be_changed() -> None:
    for part in (UserSection(1, 2), SealMount("x")):
        with pytest.raises(FrozenInstanceError):
            part.kind = "other"  # type: ignore[misc]


def test_every_layer_of_the_child_has_a_section_of_its_name() -> None:
    names = {kind.kind for kind in enter.STEPS} | {SeccompSection.kind}
    assert names == {layer.name for layer in LAYERS} - {"cgroup"}  # the child is born in its groups


def test_two_parts_cannot_have_one_name() -> None:
    with pytest.raises(ValueError, match="two parts of a plan are called user"):

        class Second(Part, kind="user"):
            pass


def _packet(**changes: Any) -> bytes:
    body = {
        "cage": "c", "argv": ["true"], "env": {"A": "b"}, "cwd": "/", "umask": 18,
        "sections": [["user", {"uid": 1, "gid": 2}]], "fds": ["stdin"], "to_group": False, "terminal": False,
    }  # fmt: skip
    return json.dumps([*(body | changes).values()]).encode()


def test_the_packet_of_these_tests_is_a_plan() -> None:
    plan = Plan.unpack(_packet(), [5])
    assert (plan.fds, plan.section(UserSection)) == ({"stdin": 5}, UserSection(1, 2))
    assert plan.section(RlimitsSection) is None


@pytest.mark.parametrize(
    "packet",
    [
        b"", b"{}", b"[]", b"null", b"[[[", b"\xff",
        _packet(cage=1), _packet(argv="true"), _packet(argv=["true", 1]), _packet(env={"A": 1}), _packet(umask=True),
        _packet(fds=[]), _packet(fds=["stdin", "stdout"]), _packet(fds=[0]),
        _packet(to_group=0),
        _packet(sections={}), _packet(sections=[{}]), _packet(sections=[[]]), _packet(sections=[["user"]]),
        _packet(sections=[["nobody", {}]]), _packet(sections=[[["user"], {}]]), _packet(sections=[["user", []]]),
        _packet(sections=[["user", {"uid": 1}]]), _packet(sections=[["user", {"uid": 1, "gid": "2"}]]),
        _packet(sections=[["user", {"uid": 1, "gid": True}]]),
        _packet(sections=[["user", {"uid": 1, "gid": 2, "x": 3}]]),
        _packet(sections=[["seal", {"target": "x"}]]),
        _packet(sections=[["seccomp", {"program": 1, "sealing": ""}]]),
        _packet(sections=[["seccomp", {"program": "A", "sealing": ""}]]),
        _packet(sections=[["filesystem", {"own_root": False, "operations": [["user", {"uid": 1, "gid": 2}]]}]]),
        _packet(sections=[["filesystem", {"own_root": False, "operations": [[]]}]]),
        _packet(sections=[["filesystem", {"own_root": False, "operations": ["seal"]}]]),
    ],
)  # fmt: skip
def test_a_packet_that_is_no_plan_is_refused(packet: bytes) -> None:
    with pytest.raises(ValueError):
        Plan.unpack(packet, [5])


def test_an_error_quotes_no_value() -> None:
    packet = _packet(sections=[["user", {"uid": "secret", "gid": "secret"}]])
    with pytest.raises(ValueError) as raised:
        Plan.unpack(packet, [5])
    assert "secret" not in str(raised.value)


def test_a_descriptor_that_a_plan_owns_is_closed_once() -> None:
    plan = Plan("c", [], {})
    read, write = os.pipe()
    plan.own("one", read)
    plan.fds["other"] = write
    plan.close_owned()
    plan.close_owned()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)
    os.close(write)


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (ResizeTmpfs("tmp", "size=1", executable=True), "/tmp: tmpfs, size=1"),
        (FillFolder("run/x", {}, 7, 8, 0o500, 0o400), "/run/x: a folder of uid 7, mode 0500"),
        (AttachMount("plugin", "mount0", is_folder=True), "/plugin: a mounted folder"),
        (AttachMount("etc/localtime", "mount1", is_folder=False), "/etc/localtime: a mounted file"),
        (SealMount("run/isolator"), "/run/isolator: read-only"),
    ],
)
def test_an_operation_describes_its_result(operation: MountOperation, words: str) -> None:
    assert operation.describe() == words


def test_an_operation_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel's error names no file."""

    class Full(MountOperation, kind="full"):
        def execute(self, fds: dict[str, int]) -> None:
            raise OSError(28, os.strerror(28))

        def describe(self) -> str:
            return "/full: nothing"

    quiet: Callable[[str], None] = lambda path: None  # noqa: E731
    monkeypatch.setattr(os, "chdir", quiet)
    with pytest.raises(OSError) as raised:
        FilesystemSection(own_root=False, operations=(Full(),)).enter({})
    assert (raised.value.errno, raised.value.filename) == (28, "/full: nothing")
