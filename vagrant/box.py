"""Builds the virtual machine's disk from the distribution's packages alone, and keeps it by content hash.

No box is downloaded and no boot loader is needed: ``mmdebstrap`` unpacks the host's own release, or another one of its
distribution, into a folder, this module adds a user, a key and the network's settings, ``mkfs.ext4 -d`` turns the
folder into a file system without ever mounting it, and QEMU starts the kernel and initial RAM disk that were taken out
of it.

The machine never sees the internet: the Python environment that ``./dev`` would make is there already. Of the host's
own release, hence with the same Python, it is the host's; of another one ``./dev setup`` makes it in the folder.

A box is ``/var/cache/isolator-dev/box-HASH``; HASH covers this file, the release and the Python dependencies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vagrant.machine import say

CACHE = Path("/var/cache/isolator-dev")
READY = "isolator-vm: ready"  # what the guest writes to its console when ssh answers
CMD_LINE = "root=/dev/vda ro console=ttyS0 net.ifnames=0 panic=1 quiet"

_DISK = "6G"  # sparse; what the guest may fill
_DISK_GIB = 6
_KEPT = 3  # newest boxes; some 700 MB each

# Kernel packages without drivers for real hardware: small, and quick to boot under emulation.
_KERNEL = {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"}
_PACKAGES = (
    *("systemd-sysv", "libpam-systemd", "dbus", "udev", "kmod", "openssh-server", "sudo", "rsync", "ca-certificates"),
    *("python3", "nftables", "libnftables1", "libseccomp2", "iproute2", "e2fsprogs", "openssl", "util-linux"),
    *("mount", "procps", "passwd", "apparmor", "bubblewrap", "crun", "runc", "firejail"),
    *("strace", "curl", "nodejs", "zsh", "fish"),
)
_BUILD_PACKAGES = ("python3-venv", "python3-dev", "gcc", "libc6-dev", "libcap-dev")  # what ./dev setup would install
_SETTINGS = ("etc/pip.conf", "root/.config/pip/pip.conf", "etc/ssl/certs/ca-certificates.crt", "etc/resolv.conf")
"""The host's ways to its mirrors, lent to the folder while ``./dev setup`` runs there."""
# Periodic work of a long-lived machine only disturbs one that lives for minutes.
_MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer")

_FILES = {
    "etc/hostname": "isolator-vm\n",
    "etc/hosts": "127.0.0.1 localhost isolator-vm\n::1 localhost\n",
    "etc/fstab": "/dev/vda / ext4 errors=remount-ro 0 1\n",
    "etc/machine-id": "",
    "etc/systemd/network/10-dhcp.network": "[Match]\nName=eth*\n\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\n",
    "etc/sudoers.d/vagrant": "vagrant ALL=(ALL) NOPASSWD: ALL\n",
    "etc/ssh/sshd_config.d/vagrant.conf": "UseDNS no\nPasswordAuthentication no\n",
    "etc/systemd/system/isolator-vm-ready.service": f"""\
[Unit]
Description=Tell the console that ssh answers
After=ssh.service systemd-networkd-wait-online.service
Wants=systemd-networkd-wait-online.service

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo "{READY}" >/dev/console'

[Install]
WantedBy=multi-user.target
""",
}


@dataclass(frozen=True)
class Box:
    """One finished box: a qcow2 disk, what starts it, and the key of its user ``vagrant``."""

    folder: Path

    @property
    def disk(self) -> Path:
        return self.folder / "box.img"

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd.img"

    @property
    def key(self) -> Path:
        return self.folder / "id_ed25519"

    @property
    def archive(self) -> Path:
        """The same as Vagrant's ``box add`` takes it."""
        return self.folder / "isolator.box"


class BuildError(Exception):
    """The box could not be built; the message is one line and names the log."""


def ready_box(deps: Path, tree: Path, codename: str | None = None) -> Box:
    """The box of a release, the host's if none is named; built first if there is none.

    ``deps`` is the host's Python environment, ``tree`` the checkout whose ``./dev`` makes another release's. Takes two
    minutes the first time, of another release five. Only the newest boxes are kept. Raises BuildError.
    """
    distribution, own = _os_release()
    release = (distribution, codename or own)
    foreign = tree if release[1] != own else None
    key = hashlib.sha256(Path(__file__).read_bytes() + json.dumps([release, deps.name]).encode()).hexdigest()[:12]
    box = Box(CACHE / f"box-{key}")
    CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _locked(CACHE / "lock"):
        if box.folder.exists():
            return box
        say(f"building the machine's disk, once: {box.folder}")
        work = Path(tempfile.mkdtemp(prefix=".box-", dir=CACHE))
        try:
            _build(work, release, own, deps, foreign)
            (work / "box").rename(box.folder)
            # Two clones at different states may take turns; a machine that runs keeps its disk open, deleted or not.
            for old in sorted(CACHE.glob("box-*"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
                shutil.rmtree(old)
        finally:
            shutil.rmtree(work)
    return box


def _os_release() -> tuple[str, str]:
    values = dict(
        line.replace('"', "").split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    return values["ID"], values.get("VERSION_CODENAME", "")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(log: Path, *command: str | Path) -> None:
    """Run one build step; its output goes to ``log``, which is kept beside the cache when it fails."""
    with log.open("ab") as output:
        output.write(f"+ {' '.join(map(str, command))}\n".encode())
        output.flush()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False)
    if done.returncode != 0:
        kept = CACHE / "build.log"
        shutil.copy(log, kept)
        raise BuildError(f"{command[0]} failed with {done.returncode}; its output is in {kept}")


def _sources(distribution: str, own: str, codename: str) -> str:
    """The host's own package sources of a release, so that its mirror and its keys are used; third parties not."""
    fields = "$(REPO_URI) $(CODENAME) $(RELEASE) $(COMPONENT) $(ORIGIN) $(SIGNED_BY)"
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", fields, "Created-By: Packages"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    lines = set()
    for line in listing.splitlines():
        words = line.split()
        if len(words) < 5 or words[4].lower() != distribution or not words[1].startswith(own):
            continue
        lines.add(f"deb {words[0]} {codename}{words[1].removeprefix(own)} {words[3]}")
    return "\n".join(sorted(lines)) + "\n"


def _build(work: Path, release: tuple[str, str], own: str, deps: Path, foreign: Path | None) -> None:
    distribution, codename = release
    root, out, log = work / "root", work / "box", work / "log"
    out.mkdir()
    if distribution not in _KERNEL:
        raise BuildError(f"no kernel package known for {distribution}; the box is built on Debian and Ubuntu hosts")
    sources = work / "sources.list"
    sources.write_text(_sources(distribution, own, codename))
    include = ",".join((_KERNEL[distribution], *_PACKAGES, *(_BUILD_PACKAGES if foreign else ())))
    say(f"unpacking {release[0]} {release[1]} packages (a minute or two)")
    # root=mode root: the folder keeps its owners, so that mkfs can take them over.
    _run(
        log,
        *("mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase", f"--include={include}"),
        *('--aptopt=Acquire::Languages "none"', '--dpkgopt=path-exclude="/usr/share/man/*"'),
        *('--dpkgopt=path-exclude="/usr/share/doc/*"', '--dpkgopt=path-exclude="/usr/share/locale/*"'),
        *(codename, root, sources),
    )
    for name, text in _FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "etc/sudoers.d/vagrant").chmod(0o440)
    _run(log, "chroot", root, "useradd", "--create-home", "--shell", "/bin/bash", "vagrant")
    _run(log, "chroot", root, "systemctl", "enable", "systemd-networkd", "isolator-vm-ready", "ssh")
    _run(log, "chroot", root, "systemctl", "mask", *_MASKED)
    _add_key(root, out, log)
    if foreign is None:
        shutil.copytree(deps, root / deps.relative_to("/"), symlinks=True)
    else:
        say(f"making the Python environment of {codename}")
        _make_environment(root, foreign, log)

    _run(log, "cp", "--dereference", root / "vmlinuz", out / "vmlinuz")
    _run(log, "cp", "--dereference", root / "initrd.img", out / "initrd.img")
    say("making the disk")
    raw = work / "disk"
    _run(log, "mkfs.ext4", "-q", "-d", root, "-L", "isolator", raw, _DISK)
    _run(log, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, out / "box.img")
    _pack(out)


def _make_environment(root: Path, tree: Path, log: Path) -> None:
    """Run ``./dev setup`` in the folder; its environments stay, the copy of the tree that it made does not."""
    kept = {name: root / f"{name}.own" for name in _SETTINGS if (root / name).exists() or (root / name).is_symlink()}
    for name, aside in kept.items():
        (root / name).rename(aside)
    for name in _SETTINGS:
        if Path("/", name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path("/", name), root / name)
    shutil.copytree(tree, root / "setup")
    try:
        steps = 'mount -t proc none "$1/proc"; mount --rbind /dev "$1/dev"; exec chroot "$1" /setup/dev setup'
        _run(log, "unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", steps, "sh", root)
    finally:
        shutil.rmtree(root / "setup")
        for name in _SETTINGS:
            (root / name).unlink(missing_ok=True)
        for name, aside in kept.items():
            aside.rename(root / name)
    for made in (root / "opt/isolator-dev").iterdir():
        if made.is_dir() and made.name != "deps":
            shutil.rmtree(made)


def _add_key(root: Path, out: Path, log: Path) -> None:
    """A key pair of this box alone: Vagrant's well-known one would open the machine to anybody who can reach it."""
    _run(log, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "isolator-vm", "-f", out / "id_ed25519")
    folder = root / "home/vagrant/.ssh"
    folder.mkdir(mode=0o700)
    shutil.copy(out / "id_ed25519.pub", folder / "authorized_keys")
    for path in (folder, folder / "authorized_keys"):
        os.chown(path, 1000, 1000)


def _pack(out: Path) -> None:
    """The archive for ``vagrant box add``, uncompressed: it is read once, on this machine."""
    metadata = {"provider": "libvirt", "format": "qcow2", "virtual_size": _DISK_GIB}
    (out / "metadata.json").write_text(json.dumps(metadata) + "\n")
    with tarfile.open(out / "isolator.box", "w") as archive:
        for name in ("metadata.json", "box.img"):
            archive.add(out / name, name)
