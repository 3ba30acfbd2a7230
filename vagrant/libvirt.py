"""One virtual machine through Vagrant and a libvirt of its own: ``vagrant up``, a Machine, ``vagrant destroy``.

Theory of operation. The caller has entered network, mount and PID namespaces of its own (``run.py`` makes them). Here
libvirt's folders become fresh tmpfs, so that its daemon starts as on an empty host whatever runs outside; ``/sys``
is mounted anew, because the old one shows the network devices of the host's namespace. libvirtd makes an isolated
bridge with its DHCP server inside the namespace. No daemon is detached: libvirtd is this process's child, and what it
starts ends with the PID namespace at the latest.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vagrant.box import CMD_LINE, Box
from vagrant.machine import InfrastructureError, Machine, say

_DAEMON_SECONDS = 60.0
_UP_SECONDS = 1200.0
_VERSION = "1.0.0"

_FOLDERS = ("/run", "/etc/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt")

# Root inside namespaces of its own gains nothing from a second user, AppArmor profile or cgroup for QEMU.
# The console log is written by QEMU itself ("file"): otherwise a second daemon, virtlogd, would have to run.
_QEMU_CONF = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""
_LIBVIRTD_CONF = 'auth_unix_rw = "none"\nauth_unix_ro = "none"\n'


@contextmanager
def boot(box: Box, folder: Path, *, cpus: int, memory_mb: int) -> Iterator[Machine]:
    """A machine made by Vagrant from ``box``; ``folder`` (temporary, root's own) takes disks, logs and Vagrant's home.

    Raises InfrastructureError if libvirt or the machine does not come up.
    """
    _fresh_folders(folder)
    with _libvirtd(folder):
        environment = _environment(box, folder, cpus, memory_mb)
        project = folder / "project"
        project.mkdir()
        shutil.copy(Path(__file__).with_name("Vagrantfile"), project)
        _vagrant(project, environment, "box", "add", "--provider", "libvirt", str(_catalog(box, folder)))
        _seed_pool(box, folder)
        try:
            _vagrant(project, environment, "up", "--provider", "libvirt")
            yield Machine(_address(project, environment), 22, box.key, folder)
        finally:
            _vagrant(project, environment, "destroy", "--force", must=False)


def _fresh_folders(folder: Path) -> None:
    """Hide the host's libvirt, runtime files and network devices from everything that is started here."""
    for path in _FOLDERS:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.path.ismount(path) or path == "/run":
            subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "none", path], check=True)
    subprocess.run(["mount", "-t", "sysfs", "none", "/sys"], check=True)
    images = folder / "images"
    images.mkdir()
    Path("/var/lib/libvirt/images").mkdir(exist_ok=True)
    # Disks belong on a disk: in the tmpfs they would fill the host's memory.
    subprocess.run(["mount", "--bind", images, "/var/lib/libvirt/images"], check=True)
    Path("/run/lock").mkdir(exist_ok=True)
    Path("/etc/libvirt/qemu.conf").write_text(_QEMU_CONF)
    Path("/etc/libvirt/libvirtd.conf").write_text(_LIBVIRTD_CONF)


@contextmanager
def _libvirtd(folder: Path) -> Iterator[None]:
    """libvirtd, answering on its socket; ended with the context."""
    log = folder / "libvirtd.log"
    with log.open("wb") as output:
        daemon = subprocess.Popen(["libvirtd"], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        pidfd = os.pidfd_open(daemon.pid)
        try:
            _wait_for_socket(Path("/run/libvirt/libvirt-sock"), pidfd, log)
        finally:
            os.close(pidfd)
        yield
    finally:
        daemon.terminate()
        try:
            daemon.wait(timeout=30)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _wait_for_socket(socket: Path, pidfd: int, log: Path) -> None:
    deadline = time.monotonic() + _DAEMON_SECONDS
    while not socket.exists():
        # Its end is an event, its readiness is not (it notifies only systemd): so this looks five times a second.
        ended, _, _ = select.select([pidfd], [], [], 0.2)
        if ended or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise InfrastructureError(f"libvirtd did not start: {lines[-1] if lines else 'it said nothing'}")


def _environment(box: Box, folder: Path, cpus: int, memory_mb: int) -> dict[str, str]:
    console = folder / "console.log"
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "VAGRANT_HOME": str(folder / "vagrant"),
        "VAGRANT_CHECKPOINT_DISABLE": "1",  # it would ask a server for news, and wait for the answer
        "VAGRANT_DEFAULT_PROVIDER": "libvirt",
        "LIBVIRT_DEFAULT_URI": "qemu:///system",
        "ISOLATOR_VM_BOX": str(box.folder),
        "ISOLATOR_VM_CMD_LINE": CMD_LINE,
        "ISOLATOR_VM_CONSOLE": str(console),
        "ISOLATOR_VM_CPUS": str(cpus),
        "ISOLATOR_VM_MEMORY": str(memory_mb),
    }


def _vagrant(project: Path, environment: Mapping[str, str], *words: str, must: bool = True) -> str:
    """Run one vagrant command and tell its steps; its output. InfrastructureError if it fails and ``must`` not."""
    lines: list[str] = []
    process = subprocess.Popen(
        ["vagrant", *words, "--no-tty", "--no-color"],
        cwd=project, env=dict(environment), text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    late = threading.Timer(_UP_SECONDS, process.kill)
    late.start()
    with process, (project.parent / f"vagrant-{words[0]}.log").open("w") as log:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            log.write(line)
            if line.startswith("==>") and " -- " not in line:  # its steps, not the domain's settings
                say(f"vagrant: {line.split(': ', 1)[-1].strip()}")
    took_too_long = not late.is_alive()
    late.cancel()
    if process.returncode != 0:
        said = " ".join("".join(lines).split())[-400:]
        why = f"took more than {_UP_SECONDS:.0f} s" if took_too_long else f"returned {process.returncode}"
        if must:
            raise InfrastructureError(f"'vagrant {words[0]}' {why}: {said}")
        say(f"'vagrant {words[0]}' {why}: {said}")
    return "".join(lines)


def _catalog(box: Box, folder: Path) -> Path:
    """A catalogue of one box: only a box from a catalogue has a version, and with it a predictable disk name."""
    provider = {"name": "libvirt", "url": f"file://{box.archive}"}
    path = folder / "catalogue.json"
    path.write_text(json.dumps({"name": "isolator", "versions": [{"version": _VERSION, "providers": [provider]}]}))
    return path


def _seed_pool(box: Box, folder: Path) -> None:
    """Put the box's disk where Vagrant would upload it to, through libvirt's slow stream."""
    name = f"isolator_vagrant_box_image_{_VERSION}_box.img"
    seeded = folder / "images" / name
    subprocess.run(["cp", "--reflink=auto", "--sparse=always", box.disk, seeded], check=True)
    pool = (
        *("pool-define-as", "default", "dir", "--target", "/var/lib/libvirt/images"),
        *(";", "pool-start", "default", ";", "pool-refresh", "default"),
    )
    done = subprocess.run(
        ["virsh", "--quiet", "--connect", "qemu:///system", " ".join(pool)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise InfrastructureError(f"libvirt's storage pool: {done.stderr.strip()}")


def _address(project: Path, environment: Mapping[str, str]) -> str:
    for line in _vagrant(project, environment, "ssh-config").splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == "HostName":
            return words[1]
    raise InfrastructureError("'vagrant ssh-config' names no address")
