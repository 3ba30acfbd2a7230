"""Specification of a plugin's cage: its user, files, state, socket and environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from isolator.cage.view import PATH, certificate_variables, open_read_path, time_zone
from isolator.errors import NotApprovedError
from isolator.layers.base import Bind, CageSpec
from isolator.layers.user import plugin_gid
from isolator.linux import mount
from isolator.registration import store as plugin_store
from isolator.registration.staging import hash_descriptor, open_binary
from isolator.supervisor.reach import SOCKET_FOLDER

if TYPE_CHECKING:
    from isolator.ipc.messages import Environment
    from isolator.paths import Paths
    from isolator.policy.model import EffectivePolicy
    from isolator.volume.volume import Volume

SOCKET = "plugin.sock"


def plugin_spec(
    registration: plugin_store.Registration,
    effective: EffectivePolicy,
    argv: list[str],
    paths: Paths,
    run: str,
    environment: Environment,
    state: int,
    api: str,
    own: Callable[[int], object],
) -> CageSpec:
    """The cage of one run. ``state``: as of ``open_state``, and the caller's; ``api`` names the folder of its host API.

    ``own`` takes over each descriptor that is opened, also when this fails half-way.

    Raises NotApprovedError when a binary registered by path is not the one that was approved any more.
    """
    name = registration.name
    uid, gid = registration.uid, plugin_gid(registration.user, registration.uid)
    store = plugin_store.Store(paths.plugins)
    binds: list[Bind] = []

    def bind(target: str, fd: int) -> None:
        own(fd)
        binds.append(Bind(target, fd))

    store.open_to(name, registration.release, gid)  # also of a user that was made again
    bind("/plugin", os.open(store.folder(name, registration.release), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    release = registration.release
    if release.kind == "binary":
        fd = open_binary(Path(release.binary_path))
        found = hash_descriptor(fd)
        bind(f"/run/isolator/bin/{Path(release.binary_path).name}", fd)
        if found != release.binary_sha256:
            remedy = f"isolator plugin approve {name}, if you trust the new one"
            raise NotApprovedError(release.binary_path, "has changed since it was approved", remedy)
    for path in effective.filesystem.read:
        bind(path, open_read_path(path))
    bind("/run/isolator/host", os.open(host_api_folder(paths, api), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    if state >= 0:
        binds.append(Bind("/state", state, writable=True))
    options = {"size": "64k", "nr_inodes": "16", "mode": "0700", "uid": str(uid), "gid": str(gid)}
    attributes = mount.NOSUID | mount.NODEV | mount.NOEXEC
    directory = mount.new_filesystem("tmpfs", options, attributes=attributes)
    own(directory)
    return CageSpec(
        name=name,
        run=run,
        uid=uid,
        gid=gid,
        user=registration.user,
        policy=effective,
        paths=paths,
        argv=list(argv),
        env=sidecar_environment(name, effective, environment),
        cwd="/plugin",
        hostname=name[:63],
        binds=binds,
        mounts={SOCKET_FOLDER: directory},
        files=environment.files,
    )


def open_state(registration: plugin_store.Registration, effective: EffectivePolicy, state: Volume) -> int:
    """A descriptor of the folder for a plugin's state, as ``Volume.open``; -1 where it is granted none."""
    files = effective.filesystem
    if not files.state:
        return -1
    gid = plugin_gid(registration.user, registration.uid)
    return state.open(size=files.state, inodes=files.state_inodes, uid=registration.uid, gid=gid)


def host_api_folder(paths: Paths, name: str) -> Path:
    """Folder on the host with the host-API socket of a plugin, or invocation; bound whole, it survives the host."""
    folder = paths.run / "hostapi" / name
    try:
        os.chmod(folder, 0o755)  # as that of a plugin is from its first start on
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        os.chmod(folder, 0o755)
    return folder


def sidecar_environment(name: str, policy: EffectivePolicy, environment: Environment) -> dict[str, str]:
    """Environment of a sidecar (docs/plugins.md); of two who set a variable, the policy wins over the config."""
    state = "/state" if policy.filesystem.state else ""
    return {
        **certificate_variables(),
        **environment.env,
        "LANG": "C.UTF-8",
        "TZ": time_zone(),
        **policy.env,
        "PATH": PATH,
        "HOME": state or "/tmp",
        "TMPDIR": "/tmp",
        "PLUGIN_NAME": name,
        "PLUGIN_SOCKET": f"{SOCKET_FOLDER}/{SOCKET}",
        "PLUGIN_HOST_SOCKET": "/run/isolator/host/host.sock",
        **({"PLUGIN_STATE_DIR": state} if state else {}),
    }
