"""Every attempt fails against the whole cage, and succeeds when the layers that stop it are left out.

An attempt that cannot succeed proves nothing when it fails. Its ablation is the same attempt in a cage with a named
weakness. Where several layers each stop the attempt alone, the weakness names all of them.
"""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from isolator.probe.attacks.battery import ATTEMPTS
from isolator.probe.run import Finding
from tests.escape import cages
from tests.escape.cages import Range, Weakness

ROOT = frozenset({"user", "capabilities"})
"""Without its own uid and with every capability: the rest of the cage holds a root process."""


def _weak(
    *layers: str, root: bool = False, edits: tuple[cages.Edit, ...] = (), uncapped: bool = False, template: str = ""
) -> Weakness:
    return Weakness(frozenset(layers) | (ROOT if root else frozenset()), edits, uncapped, template)


@dataclass(frozen=True)
class Ablation:
    """Attempts that one weakness lets through; they share a cage, in this order."""

    weakness: Weakness
    names: str
    unable: dict[int, str] = field(default_factory=dict)
    """Answers of the kernel that mean it lacks what the attempt needs, and what that is."""
    cpu: int = cages.POLICY.resources.cpu
    """Thousandths of a core that are granted."""


OUTSIDE = (cages.battery_of_the_host,)

ABLATIONS = {
    "no filter": Ablation(
        _weak("seccomp"),
        "unshare-user clone-user-namespace clone3-user-namespace keyring join-keyring perf-events userfaultfd io-uring "
        "watch-files quota executable-data i386-call x32-call trace-child read-memory "
        "netlink-socket vsock-socket crypto-socket terminal-input terminal-input-64 console-paste console-paste-64 "
        "line-discipline watch-programs watch-programs-by-signal asynchronous-io huge-pages huge-pages-in-files "
        "uncommon-protocol core-handler netlink-answers flow-labels compiled-programs options-of-sockets shorter-slice",
        {
            errno.ENOSYS: "this kernel does not have the call",
            errno.EAFNOSUPPORT: "this kernel does not have the socket family",
            errno.EPROTONOSUPPORT: "this kernel does not have the protocols",
        },
    ),
    "no filter, no resource limits": Ablation(_weak("seccomp", "rlimits"), "core-dump"),
    "no filter, no resource limits, no Landlock": Ablation(_weak("seccomp", "rlimits", "landlock"), "message-queue"),
    "root without a filter": Ablation(
        _weak("seccomp", root=True),
        "unshare-mount unshare-pid unshare-ipc unshare-uts unshare-cgroup unshare-network bpf kexec kernel-module "
        "kernel-messages reboot swap clock host-name packet-socket xdp-socket key-socket open-by-handle trace-init "
        "steal-descriptor chroot change-rules huge-pages-in-segments",
        {
            errno.ENOSYS: "this kernel does not have the call",
            errno.EAFNOSUPPORT: "this kernel does not have the socket family",
        },
    ),
    "root without a filter or Landlock": Ablation(
        _weak("seccomp", "landlock", root=True),
        "make-device mount unmount remount-writable new-mount-api copy-mount-tree",
    ),
    "root without a filter or Landlock, once more": Ablation(_weak("seccomp", "landlock", root=True), "pivot-root"),
    "root": Ablation(
        _weak(root=True),
        "become-another join-group have-capability raise-limit raise-priority raw-socket raw-socket-6 "
        "file-capability read-init-environment change-network",
    ),
    "root without control groups": Ablation(_weak("cgroup", root=True), "real-time"),
    "no user of its own": Ablation(_weak("user"), "become-root identity"),
    "root without Landlock": Ablation(_weak("landlock", root=True), "write-init-memory reopen-standard-input"),
    "no Landlock": Ablation(_weak("landlock"), "write-proc"),
    "no resource limits": Ablation(_weak("rlimits"), "descriptors lock-memory pending-signals"),
    "no control groups": Ablation(
        _weak("cgroup"),
        "processes threads processor-time memory memory-in-files memory-in-segments memory-in-sockets",
        cpu=10,  # more than that it gets of the busiest machine
    ),
    "the host's IPC objects": Ablation(_weak(template=cages.HOST_IPC), "read-segment"),
    "no view of its own": Ablation(
        _weak("filesystem", "proc", edits=OUTSIDE, template=cages.HOST_VIEW),
        "list-host-folders daemon-files see-sys host-devices host-terminals fill-tmp-inodes machine-id fill-tmp "
        "fill-shm",
    ),
    "root without a view or Landlock": Ablation(
        _weak("filesystem", "proc", "landlock", root=True, edits=OUTSIDE, template=cages.HOST_VIEW),
        "read-shadow list-root-home write-kernel-settings kernel-memory kernel-log write-cgroup",
    ),
    "the host's pids and root, no Landlock": Ablation(
        _weak("landlock", root=True, template=cages.HOST_PIDS), "root-through-process"
    ),
    "the host's pids and root, no Landlock, no filter": Ablation(
        _weak("seccomp", "landlock", root=True, template=cages.HOST_PIDS), "join-namespace"
    ),
    "a writable folder, no Landlock": Ablation(_weak("landlock", edits=(cages.writable_plugin,)), "write-read-only"),
    "folders without caps": Ablation(_weak(uncapped=True), "fill-state fill-socket-folder"),
    "the host's pids": Ablation(_weak(template=cages.HOST_PIDS), "other-processes kill-init"),
    "the host's pids and root": Ablation(_weak(root=True, template=cages.HOST_PIDS), "other-processes-in-proc"),
    "the host's name": Ablation(_weak(edits=(cages.host_name,)), "learn-host-name"),
    "the host's control groups": Ablation(_weak(edits=(cages.no_cgroup_namespace,)), "learn-cgroup"),
    "the host's network": Ablation(
        _weak("network"),
        "host-loopback metadata-service metadata-service-6 private-network mapped-private-network public-address "
        "outside-resolver outside-resolver-tcp datagram datagram-6 multicast ping other-interfaces list-interfaces",
    ),
    "the host's network, no Landlock": Ablation(_weak("network", "landlock"), "abstract-socket"),
    "no network rules": Ablation(_weak(edits=(cages.no_rules,)), "broker-port"),
    "an uncovered /proc": Ablation(
        _weak(template=cages.UNCOVERED), "read-host-figures host-memory host-load host-settings"
    ),
    "the tops of the control groups": Ablation(_weak(edits=(cages.host_groups,)), "other-groups"),
    "the host's clocks": Ablation(_weak(template=cages.HOST_CLOCK), "host-uptime"),
    "terminals without a cap": Ablation(_weak(template=cages.MANY_TERMINALS), "fill-terminals"),
    "set-user-ID programs": Ablation(
        _weak("no_new_privs", "seccomp", "landlock", template=cages.SET_ID_FILES), "set-user-id-program"
    ),
    "new privileges": Ablation(_weak("no_new_privs", "seccomp", "landlock"), "no-new-privs"),
    "the default profile": Ablation(
        _weak(), "execute-from-scratch load-from-scratch execute-from-memory executable-segment"
    ),
    "a descriptor left open": Ablation(_weak(edits=(cages.open_descriptor,)), "inherited-descriptors"),
    "a leaked environment": Ablation(_weak(edits=(cages.leaked_environment,)), "inherited-environment"),
}

_NEEDS = {"raise-limit": 24}
"""Capabilities that some containers keep from their root, by number: there the attempt cannot get through either."""

_NO_FILE = {
    "shorter-slice": ("the slice stays", "this kernel has one slice for all (before Linux 6.12)"),
    "kernel-memory": ("no such file", "this kernel offers no /proc/kcore, /dev/mem or /dev/kmem"),
    "host-uptime": (
        "this host keeps no promise about it (namespaces.time)",
        "no time namespace, or no CAP_SYS_TIME, on this host",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _a_host_that_would_let_them() -> Iterator[None]:
    """Clear a weakened attempt's way of obstacles that are not the cage's: few hosts have huge pages reserved, Debian
    keeps perf events to root, and sudo takes core dumps from everything that it starts."""
    reserved, paranoid = Path("/proc/sys/vm/nr_hugepages"), Path("/proc/sys/kernel/perf_event_paranoid")
    before = {path: path.read_text() for path in (reserved, paranoid)}
    limit = resource.getrlimit(resource.RLIMIT_CORE)
    reserved.write_text(str(int(before[reserved]) + 2))
    paranoid.write_text(str(min(int(before[paranoid]), 2)))
    with contextlib.suppress(ValueError, PermissionError):  # not in every container, but nothing was taken there
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, limit)
    for path, text in before.items():
        path.write_text(text)


@pytest.fixture(scope="module")
def whole(arena: Range) -> dict[str, Finding]:
    """The battery against the whole cage."""
    return arena.attack(None)


@pytest.fixture(scope="module")
def weakened(arena: Range) -> dict[str, dict[str, Finding]]:
    """Findings by weakness, made at their first use."""

    class Lazily(dict[str, dict[str, Finding]]):
        def __missing__(self, key: str) -> dict[str, Finding]:
            ablation = ABLATIONS[key]
            resources = arena.policy.resources.model_copy(update={"cpu": ablation.cpu})
            weak = replace(arena, policy=arena.policy.model_copy(update={"resources": resources}))
            self[key] = weak.attack(ablation.names.split(), ablation.weakness)
            return self[key]

    return Lazily()


def test_every_attempt_has_an_ablation() -> None:
    named = [name for ablation in ABLATIONS.values() for name in ablation.names.split()]
    assert sorted(named) == sorted(ATTEMPTS)


@pytest.mark.parametrize("name", [name for name, one in ATTEMPTS.items() if not one.strict])
def test_the_whole_cage_holds_an_attempt(whole: dict[str, Finding], name: str) -> None:
    assert whole[name].outcome == "held", whole[name].detail


@pytest.mark.parametrize("name", [name for name, one in ATTEMPTS.items() if one.strict])
def test_a_strict_cage_holds_an_attempt(arena: Range, name: str) -> None:
    found = replace(arena, policy=arena.policy.model_copy(update={"syscalls": "strict"})).attack([name])
    assert found[name].outcome == "held" and found[name].errno in (errno.EACCES, errno.EPERM), found[name].detail


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, one in ABLATIONS.items() for n in one.names.split()])
def test_an_attempt_gets_through_a_weakened_cage(
    weakened: dict[str, dict[str, Finding]], whole: dict[str, Finding], group: str, name: str
) -> None:
    found = weakened[group][name]
    if found.outcome == "held":
        if found.errno in ABLATIONS[group].unable:
            pytest.skip(ABLATIONS[group].unable[found.errno])
        if name in _NEEDS and not _own_capabilities() >> _NEEDS[name] & 1:
            pytest.skip(f"root itself lacks capability {_NEEDS[name]} here")
        if name in _NO_FILE and found.detail == _NO_FILE[name][0]:
            pytest.skip(_NO_FILE[name][1])
    assert found.outcome == "through", f"with {group}: {found.outcome}: {found.detail}"


def test_programs_run_in_every_folder_but_the_sockets_under_the_default_profile(
    weakened: dict[str, dict[str, Finding]],
) -> None:
    for name in ("execute-from-scratch", "load-from-scratch"):
        assert weakened["the default profile"][name].detail == "/tmp, /dev/shm, /state"


def _own_capabilities() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff"))
