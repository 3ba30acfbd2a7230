"""The name of the control socket: open to everybody, shut to those without a role for a while."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import Any, cast

import pytest

from isolator.audit.client import AuditClient
from isolator.ipc import messages
from isolator.paths import Paths
from isolator.policy.host import HostConfig, Roles
from isolator.supervisor import control_door
from isolator.supervisor.control_door import ControlDoor

ACL = "system.posix_acl_access"


class _Audit:
    def __init__(self) -> None:
        self.records: list[Any] = []

    def record(self, record: object) -> None:
        self.records.append(record)


async def test_shut_door_opens_by_itself(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, audit = Paths.of(shared_dir), _Audit()
    paths.run.mkdir(parents=True)
    config = HostConfig(roles=Roles(viewer=(64010,), caller=(64011,)))
    door = ControlDoor(paths, config, cast(AuditClient, audit))
    opened = asyncio.Event()
    allow_all = control_door.allow_all

    def noting(path: Path) -> None:
        allow_all(path)
        opened.set()

    monkeypatch.setattr(control_door, "allow_all", noting)
    monkeypatch.setattr(control_door, "SHUT", 0.01)
    with door.listen():
        for _ in range(2):
            opened.clear()
            await door.shut(messages.ShutOut(uid=64009))
            await door.shut(messages.ShutOut(uid=64009))  # shut already
            assert stat.S_IMODE(os.lstat(paths.control_socket).st_mode) & 0o007 == 0
            assert ACL in os.listxattr(paths.control_socket)
            await asyncio.wait_for(opened.wait(), 60)
            assert stat.S_IMODE(os.lstat(paths.control_socket).st_mode) == 0o666
            assert ACL not in os.listxattr(paths.control_socket)
    assert [(record.uid, record.seconds) for record in audit.records] == [(64009, 0.01)] * 2


async def test_door_that_was_shut_before_an_exec_opens_when_it_would_have_opened(shared_dir: Path) -> None:
    paths, audit = Paths.of(shared_dir), cast(AuditClient, _Audit())
    paths.run.mkdir(parents=True)
    before = ControlDoor(paths, HostConfig(roles=Roles(viewer=(64010,))), audit)
    with before.listen():
        await before.shut(messages.ShutOut(uid=64009))
        opens = before.opens
        assert opens is not None
        before.close()
        door = ControlDoor(paths, HostConfig(roles=Roles(viewer=(64012,))), audit)  # host.toml has changed meanwhile
        door.adopt(opens)
        assert door.opens == opens
        acl = os.getxattr(paths.control_socket, ACL)
        assert (64012).to_bytes(4, "little") in acl and (64010).to_bytes(4, "little") not in acl
        door.adopt(asyncio.get_running_loop().time())
        while door.opens is not None:  # noqa: ASYNC110 # its timer is the event
            await asyncio.sleep(0.001)
        assert stat.S_IMODE(os.lstat(paths.control_socket).st_mode) == 0o666
        door.adopt(None)
        assert ACL not in os.listxattr(paths.control_socket)


async def test_no_socket_is_no_fault(shared_dir: Path) -> None:
    ControlDoor(Paths.of(shared_dir), HostConfig(), cast(AuditClient, _Audit())).open()
