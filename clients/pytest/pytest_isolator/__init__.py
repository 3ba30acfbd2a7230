# SPDX-FileCopyrightText: Isolator contributors
# SPDX-License-Identifier: 0BSD
"""Fixtures for tests of plugins: in their real cage, under their real policy, without a daemon."""

from pytest_isolator.host_api import HostApi
from pytest_isolator.pretend_internet import PretendInternet, Sent
from pytest_isolator.sidecar import NoCageError, Reply, Sidecar

__all__ = ["HostApi", "NoCageError", "PretendInternet", "Reply", "Sent", "Sidecar"]
