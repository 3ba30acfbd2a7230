"""Settings of networks: each thread opens those of its own network, and none is looked for among very many."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from isolator.linux import mount, netns, sysctl
from isolator.linux.descriptors import FdSet, owning
from isolator.linux.files import write_file
from isolator.linux.sysctl import NetworkSettings

NAME = "tcp_max_tw_buckets"


def value_written(settings: NetworkSettings, value: int) -> int:
    """The value of a setting in a new network, after it was written there."""

    def work() -> int:
        with owning(settings.open()) as folder:
            write_file(NAME, str(value), folder=folder)
        return int(Path("/proc/sys/net/ipv4", NAME).read_text())

    return netns.in_new_network(work)


def test_each_thread_opens_the_settings_of_its_own_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysctl, "_FEW", 2)
    settings, values = NetworkSettings(), range(1000, 1060)
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda value: value_written(settings, value), values)] == [*values]


def test_another_procfs_after_some_networks_and_one_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysctl, "_FEW", 3)
    settings, before = NetworkSettings(), len(os.listdir("/proc/self/fd"))
    with FdSet() as opened:

        def device() -> int:
            return os.fstat(opened.add(settings.open())).st_dev

        devices = [netns.in_new_network(device) for _ in range(7)]
        assert len({*devices}) == 3 and devices.count(devices[0]) == devices.count(devices[3]) == 3
    assert os.stat("/proc").st_dev not in devices
    assert len(os.listdir("/proc/self/fd")) == before + 1


def test_where_mounts_are_forbidden_the_hosts_own_procfs_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(mount, "new_filesystem", forbidden)
    assert value_written(NetworkSettings(), 1234) == 1234


def test_where_it_may_not_write_in_a_procfs_of_its_own_the_hosts_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made, hidden = mount.new_filesystem, list[int]()

    def read_only(kind: str) -> int:
        hidden.append(made(kind))
        mount.set_attributes(hidden[-1], mount.RDONLY, recursive=False)
        return hidden[-1]

    monkeypatch.setattr(mount, "new_filesystem", read_only)
    assert value_written(NetworkSettings(), 1234) == 1234
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(hidden[0])
