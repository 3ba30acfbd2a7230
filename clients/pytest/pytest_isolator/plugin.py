# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: 0BSD
"""The fixtures, as pytest finds them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from pytest_isolator.host_api import HostApi
from pytest_isolator.pretend_internet import PretendInternet
from pytest_isolator.sidecar import NoCageError, Sidecar

StrPath = str | os.PathLike[str]


@pytest.fixture
def host_api() -> Iterator[HostApi]:
    """Methods of the platform for the sidecars of this test."""
    api = HostApi()
    yield api
    api.close()


@pytest.fixture
def pretend_internet(tmp_path: Path) -> PretendInternet:
    """Answers in the place of every name that the sidecars of this test were granted."""
    return PretendInternet(tmp_path)


@pytest.fixture
def sidecar(request: pytest.FixtureRequest) -> Iterator[Callable[..., Sidecar]]:
    """Start a plugin in its cage; it ends with the test."""
    wanted = {"pretend_internet", "host_api"} & set(request.fixturenames)
    used = {name: request.getfixturevalue(name) for name in wanted}
    started: list[Sidecar] = []

    def start(
        folder: StrPath = ".", *, config: Mapping[str, str] | None = None, policy: StrPath | None = None,
        schemas: Mapping[str, StrPath] | None = None, timeout: float = 60.0,
    ) -> Sidecar:  # fmt: skip
        words = [os.fspath(folder), "--timeout", str(timeout)]
        for key, value in (config or {}).items():
            words += ["--config", f"{key}={value}"]
        for name, file in (schemas or {}).items():
            words += ["--schema", f"{name}={os.fspath(file)}"]
        if policy is not None:
            words += ["--policy", os.fspath(policy)]
        internet: PretendInternet | None = used.get("pretend_internet")
        if internet is not None:
            words += ["--recording", str(internet.recording())]
        try:
            started.append(Sidecar(words, internet, used.get("host_api")))
        except NoCageError as error:
            pytest.fail(f"no sidecar: {error}", pytrace=False)
        return started[-1]

    yield start
    for one in reversed(started):
        one.close()
