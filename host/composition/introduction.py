"""Introduction of a host: the supervisor's hello, read, and parts that another program may exchange."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping

from host.delivery.dispatch import SidecarLinks
from host.delivery.sidecar import SidecarLink
from host.host_api.api import HostApi
from isolator.base.structs import struct_class
from isolator.ipc.messages import HostHello, PluginEntry
from isolator.paths import Paths
from isolator.policy.host import HostConfig


@struct_class(frozen=True)
class Introduction:
    """The supervisor's ``hello``, read."""

    paths: Paths
    settings: HostConfig
    plugins: tuple[PluginEntry, ...]
    fresh: bool
    """The daemon has just started: eager plugins are to be started."""
    alarms: tuple[str, ...]
    """The supervisor's."""
    listener: socket.socket | None
    """The control socket."""
    fences: Mapping[str, float]
    """Deadlines by plugin, as the supervisor keeps them."""

    @classmethod
    def read(cls, hello: HostHello, fds: list[int]) -> Introduction:
        """Take over a ``hello`` and its descriptors: the listener, and a file with the entries if there are many."""
        listener = socket.socket(fileno=fds.pop(0)) if fds and not hello.parts else None
        plugins = hello.plugins
        if plugins is None:
            with os.fdopen(fds.pop(0), "rb") as file:
                file.seek(0)
                plugins = tuple(PluginEntry.from_json(entry, hello.op) for entry in json.load(file))
        return cls(
            paths=Paths.of(hello.root),
            settings=HostConfig.model_validate(hello.config),
            plugins=plugins,
            fresh=hello.fresh,
            alarms=hello.alarms,
            listener=listener,
            fences=hello.fences,
        )


@struct_class(frozen=True)
class HostParts:
    """Parts of a host that another program may put in its own place: ``isolator certify`` does."""

    sidecars: SidecarLinks = SidecarLink
    api: Callable[..., HostApi] = HostApi
