"""Every sentence of ``explain`` is true: each clause is held against a real cage of a policy that has it.

A sentence is the sequence of its clauses; one that is not made of the clauses below fails here, so that no promise is
without its proof. A clause is proved by reading the kernel back from inside (numbers are compared with those in the
sentence), by attempts of the battery that must be stopped, or by tests elsewhere where a broker or a host has to take
part. Each read-back is shown to notice: in a cage with a weakness it fails. (Attempts have that in test_ablation.)
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from isolator.base.structs import replace
from isolator.layers.base import Bind, CageSpec
from isolator.layers.explain import ORDER, sentences
from isolator.layers.filesystem import AttachMount, FilesystemSection, ResizeTmpfs
from isolator.layers.ledger import ledger
from isolator.layers.plan import Plan
from isolator.layers.proc import template
from isolator.layers.seccomp import profiles
from isolator.layers.seccomp.layer import SeccompSection, compiled
from isolator.linux import mount
from isolator.linux.descriptors import FdSet
from isolator.policy.host import HostConfig
from isolator.policy.meet.effective import meet, policy_alone
from isolator.policy.meet.single_run import policy_for_run
from isolator.policy.model import (
    AddressException,
    EffectivePolicy,
    EgressRule,
    FilesystemPolicy,
    ListenRule,
    NetworkPolicy,
    ResourcePolicy,
)
from isolator.policy.units import parse_cpu, parse_size
from isolator.probe.run import Finding
from isolator.recovery.journal import Journal
from isolator.standalone.broker import Records
from isolator.volume.volume import Volume
from tests.escape import cages, inspection
from tests.escape.cages import Range, WeakenedCage, Weakness, in_pretend_host
from tests.escape.test_ablation import ABLATIONS
from tests.policy.samples import DEFAULT
from tests.policy.test_effective_always import _CORES, _GRANTS, _HOST_CONFIGS
from tests.support.cage_fixture import StartedCage, cage
from tests.support.timeouts import seconds

MIB = 1 << 20
TESTS = Path(__file__).parents[1]
ADDRESSES = (("192.88.99.1", 443), ("10.0.0.1", 443), ("169.254.169.254", 80), ("fd00:ec2::254", 80), ("127.0.0.1", 9))
"""A public address, and private, local and metadata ones."""
PORT, CAGE_PORT = 43117, 8080

SMALL = ResourcePolicy(memory=48 * MIB, memory_high=44 * MIB, cpu=300, tasks=24, nofile=100)


def _policy(**fields: Any) -> EffectivePolicy:
    fields.setdefault("network", NetworkPolicy(mode="none"))
    fields.setdefault("resources", SMALL)
    fields.setdefault("filesystem", FilesystemPolicy(state=0, tmp=2 * MIB, tmp_inodes=64, shm=MIB))
    return EffectivePolicy(plugin="test", **fields)


VARIANTS = {
    "plain": _policy(),
    "strict, with everything": _policy(
        syscalls="strict",
        network=NetworkPolicy(mode="none", listen=(ListenRule(port=PORT, cage_port=CAGE_PORT),)),
        resources=SMALL.model_copy(update={"swap": 4 * MIB, "cpu": 125, "tasks": 9, "io_read": MIB, "io_write": MIB}),
        filesystem=FilesystemPolicy(state=2 * MIB, state_inodes=64, tmp=MIB, shm=2 * MIB, read=("READ",)),
    ),
    "listed": _policy(
        network=NetworkPolicy(
            mode="listed", egress=(EgressRule(host="hooks.example.com", ports=(443,)),), allow_no_sni=True,
            allow_ech=True,
            exceptions=(AddressException(cidr="10.9.9.9/32", port=5432),),
        )
    ),
    "public": _policy(
        network=NetworkPolicy(mode="public", egress=(EgressRule(host="db.example.com", ports=(5432, 5433)),))
    ),
    "listed, looked up by a proxy": _policy(
        network=NetworkPolicy(
            mode="listed", egress=(EgressRule(host="hooks.example.com", ports=(443,)),), proxy="10.9.9.9:3128",
            proxy_resolves=True,
        )
    ),
    "public, events": _policy(
        network=NetworkPolicy(mode="public", proxy="10.9.9.9:3128"), hooks=("deploy.started", "deploy.failed"),
        permissions=("read:projects",),
    ),
}  # fmt: skip


@dataclass
class Inspected:
    """A cage of one policy as it is seen from inside (``inspection``) and by the host."""

    inside: dict[str, Any]
    policy: EffectivePolicy
    uid: int
    groups: dict[str, str]
    """The files of the cage's control groups, by name, while it ran."""
    denied: set[str]
    """System calls on record."""
    forwarded: bytes = b""


Check = Callable[["re.Match[str]", Inspected], None]


@dataclass(frozen=True)
class Clause:
    """A part of a sentence, as a pattern, and its proofs."""

    pattern: str
    check: Check | None = None
    attempts: str = ""
    """Attempts of the battery that are stopped."""
    tests: tuple[str, ...] = ()
    """Tests elsewhere, as FILE::NAME below ``tests``."""


# --- user ----------------------------------------------------------------------------------------------------


def own_user(_: re.Match[str], seen: Inspected) -> None:
    assert set(seen.inside["status"]["Uid"].split()) == set(seen.inside["status"]["Gid"].split()) == {str(seen.uid)}
    low, high = HostConfig().uid_range
    assert low <= seen.uid <= high


def no_other_group(_: re.Match[str], seen: Inspected) -> None:
    assert not seen.inside["status"]["Groups"].split()


def no_other_user(_: re.Match[str], seen: Inspected) -> None:
    assert set(seen.inside["become"]) == {"EPERM"}


# --- control groups ------------------------------------------------------------------------------------------


def _group(seen: Inspected, v2: str, v1: str) -> str | None:
    return seen.groups.get(v2, seen.groups.get(v1))


def memory(found: re.Match[str], seen: Inspected) -> None:
    assert _group(seen, "memory.max", "memory.limit_in_bytes") == str(parse_size(found["memory"]))


def slowed(found: re.Match[str], seen: Inspected) -> None:
    assert "memory.max" not in seen.groups or seen.groups["memory.high"] == str(parse_size(found["high"]))


def swap(found: re.Match[str], seen: Inspected) -> None:
    granted = parse_size(found["swap"]) if found["swap"] else 0
    if "memory.max" in seen.groups:
        assert seen.groups.get("memory.swap.max", "0") == str(granted)  # without swap there is no such file
    elif "memory.memsw.limit_in_bytes" in seen.groups:
        assert seen.groups["memory.memsw.limit_in_bytes"] == str(seen.policy.resources.memory + granted)
    else:  # a host without swap accounting
        assert seen.groups["memory.swappiness"] == ("60" if granted else "0")


def processor(found: re.Match[str], seen: Inspected) -> None:
    if "cpu.max" in seen.groups:
        quota, period = map(int, seen.groups["cpu.max"].split())
    else:
        quota, period = int(seen.groups["cpu.cfs_quota_us"]), int(seen.groups["cpu.cfs_period_us"])
    assert quota * 1000 == period * parse_cpu(found["cpu"])


def tasks(found: re.Match[str], seen: Inspected) -> None:
    assert seen.inside["tasks"] == int(found["tasks"])


def disk(found: re.Match[str], seen: Inspected) -> None:
    verb, rate = found["verb"], str(parse_size(found["rate"]))
    v1 = seen.groups.get(f"blkio.throttle.{verb}_bps_device")
    rates = [line.split()[-1] for line in v1.splitlines()] if v1 is not None else []
    rates += re.findall(rf"{verb[0]}bps=(\d+)", seen.groups.get("io.max", ""))
    assert rates and set(rates) == {rate}


# --- namespaces ----------------------------------------------------------------------------------------------


def _own_namespace(kind: str, seen: Inspected) -> None:
    assert seen.inside["namespaces"][kind] != os.readlink(f"/proc/self/ns/{kind}")


def own_processes(_: re.Match[str], seen: Inspected) -> None:
    _own_namespace("pid", seen)
    assert set(seen.inside["processes"]) == {2}  # pid 1 of the cage is ours, and hidden


def own_mounts(_: re.Match[str], seen: Inspected) -> None:
    _own_namespace("mnt", seen)


def own_uptime(_: re.Match[str], seen: Inspected) -> None:
    if next(control for control in ledger() if control.key == "namespaces.time").state == "enforced":
        _own_namespace("time", seen)


def own_host_name(_: re.Match[str], seen: Inspected) -> None:
    _own_namespace("uts", seen)
    assert seen.inside["host name"] == "cage"


def own_ipc(_: re.Match[str], seen: Inspected) -> None:
    _own_namespace("ipc", seen)


def own_groups(_: re.Match[str], seen: Inspected) -> None:
    _own_namespace("cgroup", seen)
    assert {line.split(":", 2)[2] for line in seen.inside["cgroup"].splitlines() if line.startswith("0::")} == {"/"}


def own_interfaces(_: re.Match[str], seen: Inspected) -> None:
    _own_namespace("net", seen)
    assert seen.inside["interfaces"] == ["lo"]


# --- file system ---------------------------------------------------------------------------------------------

_VIEW = {
    "/", "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/plugin", "/state", "/tmp", "/dev/shm",
    "/proc", "/sys", "/etc", "/dev",
    "/run/isolator", "/run/isolator/plugin", "/etc/ssl/certs", "/etc/alternatives", "/etc/ca-certificates", "/etc/pki",
    "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/dev/pts",
}  # fmt: skip
_PUBLIC = "/etc/(fonts|java-[^/]+|python3[^/]*|perl|groff|terminfo|dictionaries-common|libreoffice/registry)"
_NOT_READ_ONLY = {"/tmp", "/state", "/run/isolator/plugin", "/proc"}
_PLAIN_DEVICES = ["full", "null", "random", "urandom", "zero"]


def read_only(_: re.Match[str], seen: Inspected) -> None:
    assert {seen.inside["write"][place] for place in ("/", "/usr/bin", "/etc", "/plugin")} <= {"EROFS", "EACCES"}
    assert {"/usr/bin", "/plugin"} <= set(seen.inside["readable"])
    for place in ("/usr", "/plugin", "/etc/ld.so.cache"):
        assert place not in seen.inside["mounts"] or "ro" in seen.inside["mounts"][place]
    assert {"/usr", "/plugin"} <= set(seen.inside["mounts"])
    for place, options in seen.inside["mounts"].items():  # also what another user than root could not write anyway
        assert place in _NOT_READ_ONLY or place.startswith("/dev/") or "ro" in options, place


def read_paths(found: re.Match[str], seen: Inspected) -> None:
    for place in re.split(", | and ", found["paths"]):
        assert place in seen.inside["readable"] and seen.inside["write"][place] in ("EROFS", "EACCES")
        assert "ro" in seen.inside["mounts"][place]


def no_state(_: re.Match[str], seen: Inspected) -> None:
    assert "/state" not in seen.inside["mounts"] and "/state" not in seen.inside["writable"]


def state_size(found: re.Match[str], seen: Inspected) -> None:
    """An ext4 image: the size is what is left for data, a little more than granted."""
    assert parse_size(found["state"]) <= seen.inside["sizes"]["/state"] <= parse_size(found["state"]) + MIB
    assert "/state" in seen.inside["writable"]


def scratch_size(found: re.Match[str], seen: Inspected) -> None:
    for place, size in found.groupdict().items():
        path = {"tmp": "/tmp", "shm": "/dev/shm"}[place]
        assert seen.inside["sizes"][path] == parse_size(size)
        assert path in seen.inside["writable"]


def socket_folder(_: re.Match[str], seen: Inspected) -> None:
    assert set(seen.inside["writable"]) - {"/tmp", "/dev/shm", "/state"} == {"/run/isolator/plugin"}


def executes_none(_: re.Match[str], seen: Inspected) -> None:
    """The attempts of the profile ``strict`` (test_ablation.py) try it."""
    assert {"/tmp", "/dev/shm", "/run/isolator/plugin"} <= set(seen.inside["writable"]), "nothing was tried"
    for place in seen.inside["writable"]:
        assert "noexec" in seen.inside["mounts"][place]


def nothing_else(_: re.Match[str], seen: Inspected) -> None:
    devices = {f"/dev/{name}" for name in _PLAIN_DEVICES}
    found = {place for place in seen.inside["mounts"] if not re.fullmatch(f"{_PUBLIC}|/proc/.*|/sys/.*", place)}
    assert found <= _VIEW | devices | set(seen.policy.filesystem.read)
    assert seen.inside["devices"] == _PLAIN_DEVICES
    assert seen.inside["figures"]["sys"] == ["devices", "fs"]


def own_terminals(_: re.Match[str], seen: Inspected) -> None:
    assert seen.inside["terminal"] == "/dev/pts/0"


# --- /proc and /sys ------------------------------------------------------------------------------------------

_LINKS = {"self", "thread-self", "mounts", "net"}
_OWN_ENTRIES = {"sysvipc", "uptime", "version"}
_FIGURES = {"cgroups", "cpuinfo", "filesystems", "loadavg", "meminfo", "stat", "swaps", "sys", "vmstat"}


def own_processors(found: re.Match[str], seen: Inspected) -> None:
    count = min(int(found["processors"]), len(os.sched_getaffinity(0)))
    listed = list(seen.inside["figures"]["processors"].values())
    assert len(listed[0]) == count and all(one == listed[0] for one in listed), listed
    assert set(seen.inside["figures"]["counted"]) == {count}


def own_memory(found: re.Match[str], seen: Inspected) -> None:
    assert seen.inside["figures"]["meminfo"]["MemTotal"] == parse_size(found["memory"])
    assert seen.inside["figures"]["meminfo"]["SwapTotal"] == seen.policy.resources.swap


def own_load(_: re.Match[str], seen: Inspected) -> None:
    assert seen.inside["figures"]["load"] == "0.00 0.00 0.00 1/1 1\n"


def own_groups_shown(_: re.Match[str], seen: Inspected) -> None:
    shown = {folder: rest for folder, (is_group, *rest) in seen.inside["figures"]["groups"].items() if is_group}
    assert shown and not any(shown.values()), shown


def no_host_entry(_: re.Match[str], seen: Inspected) -> None:
    """By what is allowed: whatever else this kernel has is empty here."""
    by_kind: dict[str, set[str]] = {}
    for name, kind in seen.inside["figures"]["entries"].items():
        by_kind.setdefault(kind, set()).add(name)
    assert by_kind["link"] == _LINKS
    assert by_kind["the kernel's"] <= _OWN_ENTRIES
    assert by_kind["covered"] <= _FIGURES
    settings = {name.removeprefix("/proc/sys/") for name in seen.inside["figures"]["settings"]}
    assert settings <= {*template._SETTINGS, *template._OF_NEW_NETWORKS, *template._LIVE, "kernel/random/boot_id"}


# --- network -------------------------------------------------------------------------------------------------


def no_network(_: re.Match[str], seen: Inspected) -> None:
    found = dict(seen.inside["connections"])
    assert found.pop("own loopback") == "done"
    assert found.pop("datagram") in ("EPERM", "ENETUNREACH")
    assert set(found.values()) == {"ECONNREFUSED"}


def nothing_else_reached(_: re.Match[str], seen: Inspected) -> None:
    no_network(_, seen)  # none of these is granted


def never_inside(_: re.Match[str], seen: Inspected) -> None:
    found = seen.inside["connections"]
    assert {found[f"{address} {port}"] for address, port in ADDRESSES[1:]} == {"ECONNREFUSED"}


def forwards(found: re.Match[str], seen: Inspected) -> None:
    assert (found["outside"], found["inside"]) == (f"127.0.0.1:{PORT}", str(CAGE_PORT))
    assert seen.forwarded == b"from the cage"


# --- capabilities, no_new_privs, Landlock --------------------------------------------------------------------


def no_capability(_: re.Match[str], seen: Inspected) -> None:
    sets = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    assert {int(seen.inside["status"][name], 16) for name in sets} == {0}


def no_gain(_: re.Match[str], seen: Inspected) -> None:
    assert seen.inside["securebits"] & 0xFF == 0b11101111, "NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE, all locked"
    assert seen.inside["raise ambient"] == "EPERM" and seen.inside["capset"] == "EPERM"
    assert int(seen.inside["status"]["CapBnd"], 16) == 0 and seen.inside["status"]["NoNewPrivs"] == "1"


def no_new_privileges(_: re.Match[str], seen: Inspected) -> None:
    assert seen.inside["status"]["NoNewPrivs"] == "1"


def writable_places(found: re.Match[str], seen: Inspected) -> None:
    named = set(re.findall(r"/[\w/]+", found["places"])) | {"/run/isolator/plugin"}
    assert set(seen.inside["writable"]) == named


def reads_and_executes(_: re.Match[str], seen: Inspected) -> None:
    assert {"/usr/bin", "/plugin"} <= set(seen.inside["readable"])
    assert seen.inside["spawn"] == "done" or seen.policy.syscalls == "strict"


# --- system calls --------------------------------------------------------------------------------------------


def _answers(seen: Inspected) -> dict[str, str]:
    return {name: seen.inside["calls"][str(number)] for name, number in _refused(seen.policy.syscalls).items()}


def ordinary_calls(found: re.Match[str], seen: Inspected) -> None:
    assert found["profile"] == seen.policy.syscalls
    assert seen.inside["memory"]["ordinary"] == "done"
    assert seen.inside["status"]["Seccomp"] == "2"


_PRETENDED = ("sched_setparam", "sync", "syncfs")


def without_effect(_: re.Match[str], seen: Inspected) -> None:
    for name, answer in _answers(seen).items():
        assert answer in ("EPERM", "ENOSYS") or (name in _PRETENDED and answer == "done"), name


def recorded(_: re.Match[str], seen: Inspected) -> None:
    made = {name for name in profiles._DENIED if name in _refused(seen.policy.syscalls)}
    assert {"mount", "ptrace", "bpf", "unshare"} <= made <= seen.denied


def no_process(_: re.Match[str], seen: Inspected) -> None:
    assert (seen.inside["fork"], seen.inside["spawn"]) == ("EPERM", "EPERM")


def not_both(_: re.Match[str], seen: Inspected) -> None:
    found = dict(seen.inside["memory"])
    assert found.pop("ordinary") == "done"
    assert set(found.values()) == {"EPERM"}


# --- limits --------------------------------------------------------------------------------------------------


def open_files(found: re.Match[str], seen: Inspected) -> None:
    assert seen.inside["open files"] == int(found["files"])


def locked_memory(_: re.Match[str], seen: Inspected) -> None:
    assert seen.inside["lock 64K"] == "done" and seen.inside["lock more"] in ("ENOMEM", "EAGAIN", "EPERM")


def no_core_file(_: re.Match[str], seen: Inspected) -> None:
    assert max(seen.inside["core limit"]) <= 1
    if "dumped" in seen.inside:
        assert not seen.inside["dumped"] and seen.inside["core files"] == []


def no_dumped_memory(_: re.Match[str], seen: Inspected) -> None:
    """By the filter of what a dump holds, also where the handler is not started by the limit (a socket, Linux 6.16)."""
    assert int(seen.inside["core filter"], 16) == 0


CLAUSES: dict[str, tuple[Clause, ...]] = {
    "user": (
        Clause("Runs as a system user of its own", own_user, "identity"),
        Clause(", in no other group", no_other_group),
        Clause(r" and with no way to become another user\.", no_other_user, "become-root become-another join-group"),
    ),
    "cgroup": (
        Clause(
            r"May use (?P<memory>\w+) of memory", memory, "memory memory-in-files memory-in-segments memory-in-sockets"
        ),
        Clause(
            r" \(slowed down above (?P<high>\w+) on cgroup v2\)", slowed,
            tests=("cage/test_cage.py::test_out_of_memory",),
        ),
        Clause(r", (no|(?P<swap>\w+) of) swap", swap),
        Clause(r", (?P<cpu>[\d.]+%) of one core", processor, "processor-time"),
        Clause(r" and (?P<tasks>\d+) tasks?", tasks, "processes threads"),
        Clause(
            "; beyond its memory every process of the plugin is ended",
            tests=("cage/test_cage.py::test_out_of_memory_in_a_child_ends_the_whole_cage",),
        ),
        Clause(r"\."),
        Clause(
            r" It (?P<verb>read)s at most (?P<rate>\w+) a second", disk,
            tests=("layers/test_disk_caps.py::test_a_cap_slows_writing_and_reading",),
        ),
        Clause(
            r"( It| and) (?P<verb>write)s at most (?P<rate>\w+) a second", disk,
            tests=("layers/test_disk_caps.py::test_a_cap_slows_writing_and_reading",),
        ),
        Clause(r" of each disk\.", tests=("layers/test_disk_caps.py::test_reading_the_hosts_files_is_capped",)),
    ),
    "namespaces": (
        Clause("Sees only its own processes", own_processes, "other-processes other-processes-in-proc kill-init"),
        Clause(", mounts", own_mounts, "list-host-folders join-namespace"),
        Clause(", host name", own_host_name, "learn-host-name"),
        Clause(", uptime", own_uptime, "host-uptime"),
        Clause(", IPC objects", own_ipc, "read-segment"),
        Clause(", control groups", own_groups, "learn-cgroup"),
        Clause(r" and network interfaces\.", own_interfaces, "other-interfaces list-interfaces change-network"),
    ),
    "filesystem": (
        Clause(
            r"Sees its own files, /usr and public files of /etc \(certificates, fonts and the like\) read-only",
            read_only, "write-read-only",
        ),
        Clause(r", and read-only (?P<paths>.+?)(?=, whose sockets)", read_paths),
        Clause(
            ", whose sockets it may connect to",
            tests=("standalone/test_run.py::test_socket_in_a_shown_folder_can_be_connected_to",),
        ),
        Clause(
            r"; can lock \(flock\) what is the host's of them",
            tests=("escape/test_reach.py::test_lock_in_a_cage_reaches_a_file_of_the_host_as_the_readme_says",),
        ),
        Clause("; may write no persistent folder", no_state),
        Clause(r"; may write /state up to (?P<state>\w+)", state_size, "fill-state"),
        Clause(r", /tmp up to (?P<tmp>\w+)", scratch_size, "fill-tmp fill-tmp-inodes"),
        Clause(r", /dev/shm up to (?P<shm>\w+)", scratch_size, "fill-shm"),
        Clause(" and its socket's folder", socket_folder, "fill-socket-folder"),
        Clause(", and execute none of it", executes_none),
        Clause(
            r"; nothing else of this host is there but the devices null, zero, full, random and urandom",
            nothing_else,
            "list-host-folders list-root-home daemon-files see-sys host-devices read-shadow kernel-memory machine-id",
        ),
        Clause(r"; has up to \d+ terminals of its own\.", own_terminals, "host-terminals fill-terminals"),
    ),
    "proc": (
        Clause(
            "Learns its own limits in /proc and /sys, not this host's: at most (?P<processors>\\d+) processors?",
            own_processors, tests=("cage/test_figures.py::test_runtimes_count_the_processors_of_their_cap",),
        ),
        Clause(r", (?P<memory>\w+) of memory", own_memory, "host-memory"),
        Clause(", its own load", own_load, "host-load"),
        Clause(" and control groups", own_groups_shown, "other-groups"),
        Clause(
            r"; of /proc's other entries sees none of the host's\.", no_host_entry, "read-host-figures host-settings"
        ),
    ),
    "network": (
        Clause(
            r"Has no network but a loopback of its own\.", no_network,
            "host-loopback public-address private-network datagram outside-resolver ping",
            ("broker/test_broker.py::test_policy_without_network_refuses_everything_at_once",),
        ),
        Clause(
            "May connect to any public address, TCP 80 and 443",
            tests=("broker/test_broker.py::test_public_mode_reaches_the_public_and_nothing_private",),
        ),
        Clause(
            r"(, besides|May connect to) [^;]+? \(TCP [^;]+?\)(?= and to nothing else|;)",
            tests=(
                "broker/test_broker.py::test_a_granted_name_is_reached_over_https_and_recorded",
                "layers/test_network.py::test_listed_mode_lets_through_virtual_addresses_and_granted_networks_only",
            ),
        ),
        Clause(
            " and to nothing else", nothing_else_reached,
            tests=("broker/test_broker.py::test_a_name_that_is_not_listed_never_leaves_the_host",),
        ),
        Clause(
            "; never private, local or metadata addresses", never_inside,
            "metadata-service metadata-service-6 private-network mapped-private-network host-loopback",
            ("broker/test_guarantees.py::test_a_granted_name_that_leads_inside_is_refused",),
        ),
        Clause(
            "; addresses that it writes itself are never private, local or metadata ones", never_inside,
            tests=("broker/test_proxy.py::test_checks_of_names_and_addresses_stay_and_the_proxy_hears_of_nothing_refused",),
        ),
        Clause(
            r", but for the exceptions of host\.toml",
            tests=("broker/test_guarantees.py::test_an_exception_opens_one_address_and_port",),
        ),
        Clause(
            "; names it asks for leave this host",
            tests=("broker/test_broker.py::test_public_mode_reaches_the_public_and_nothing_private",),
        ),
        Clause(r"\."),
        Clause(
            r" All of it goes through the proxy \S+ of this host\.?",
            tests=(
                "broker/test_proxy.py::test_granted_name_goes_through_the_proxy_by_the_address_that_was_checked",
            ),
        ),
        Clause(
            r", which looks granted names up itself: whether they lead inside is the proxy's to check\.",
            tests=(
                "broker/test_proxy.py::test_address_behind_a_name_that_is_left_to_the_proxy_is_not_checked_here",
            ),
        ),
        Clause(
            r" TLS without a server name is let through\.",
            tests=("broker/test_guarantees.py::test_missing_server_name_can_be_allowed",),
        ),
        Clause(
            r" TLS may hide a second server name \(ECH\): behind a server that serves many names, one that is not "
            r"granted can be reached\.",
            tests=("broker/test_guarantees.py::test_hello_that_may_hide_a_second_name_can_be_allowed",),
        ),
        Clause(
            r" This host forwards (?P<outside>\S+) to its port (?P<inside>\d+).*\.", forwards,
            tests=("broker/test_inbound.py::test_a_granted_host_port_leads_into_the_cage_and_is_recorded",),
        ),
    ),
    "capabilities": (
        Clause("Holds no capability", no_capability, "have-capability raw-socket raise-limit raise-priority real-time"),
        Clause(
            r" and can never gain one, by no file and no program it runs\.", no_gain,
            "file-capability set-user-id-program",
        ),
    ),
    "no_new_privs": (
        Clause(
            r"Set-user-ID programs and file capabilities give it nothing\.", no_new_privileges,
            "set-user-id-program file-capability no-new-privs",
        ),
    ),
    "landlock": (
        Clause(
            "A second wall behind the file view: only files in (?P<places>.+?) and its socket's folder can be changed",
            writable_places, "write-proc reopen-standard-input",
        ),
        Clause(", even if others were writable", tests=("escape/test_sentences.py::test_landlock_is_a_second_wall",)),
        Clause(
            r"; reading and executing it does not restrict\.", reads_and_executes,
            tests=("cage/test_programs.py::test_python",),
        ),
    ),
    "seccomp": (
        Clause(
            r'System calls of the profile "(?P<profile>\w+)": those of ordinary programs only', ordinary_calls,
            "unshare-user keyring perf-events userfaultfd io-uring trace-child netlink-socket terminal-input-64",
            ("cage/test_programs.py::test_python",),
        ),
        Clause("; no new process after the first exec", no_process),
        Clause(", and no memory that it asks for is writable and executable at once", not_both),
        Clause("; any other call has no effect", without_effect, "i386-call x32-call"),
        Clause(r", and one that attacks need is recorded by name\.", recorded),
    ),
    "rlimits": (
        Clause(r"May have (?P<files>\d+) open files?", open_files, "descriptors"),
        Clause(" and 64K of locked memory", locked_memory, "lock-memory"),
        Clause("; a crash writes no core file", no_core_file, "core-dump core-handler"),
        Clause(
            r" and gives none of its memory to the host's core handler\.", no_dumped_memory,
            tests=("escape/test_reach.py::test_a_crash_starts_nothing_on_the_host",),
        ),
    ),
    "events": (
        Clause("Receives [^;]+", tests=("host/test_dispatch.py::test_only_subscribed_events_are_dispatched",)),
        Clause(
            "; may ask the host for [^;]+",
            tests=("host/test_host_api.py::test_call_without_its_permission_is_refused_with_the_line_that_grants_it",),
        ),
        Clause(r"; answers within [\w.]+", tests=("system/test_bad_plugins.py::test_bad_answers_hurt_nobody_else",)),
        Clause(
            r", \d+ attempts?",
            tests=("host/test_dispatch.py::test_attempts_end_in_a_dead_letter_that_can_be_replayed",),
        ),
        Clause(
            r"; after \d+ crash(es)? in [\w.]+ it is not started again\.",
            tests=("system/test_bad_plugins.py::test_sidecar_that_cannot_serve_fails_visibly",),
        ),
    ),
}  # fmt: skip


def clauses(layer: str, sentence: str) -> list[tuple[Clause, re.Match[str]]]:
    """The clauses that a sentence consists of, in order."""
    found, rest = [], sentence
    for clause in CLAUSES[layer]:
        if match := re.match(clause.pattern, rest):
            found.append((clause, match))
            rest = rest[match.end() :]
    assert not rest, f"{layer}: no test proves {rest!r} of {sentence!r}"
    return found


# --- completeness --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(_CORES, _GRANTS, _HOST_CONFIGS)
def test_a_sentence_of_any_policy_consists_of_clauses_that_are_proved(core: Any, grant: Any, host: HostConfig) -> None:
    for policy in (
        meet(core, grant, host).effective,
        meet(core, None, host).effective,
        policy_alone(grant, host, "p").effective,
    ):
        for layer, sentence in sentences(policy).items():
            clauses(layer, sentence)


def test_every_clause_is_in_a_sentence_of_an_inspected_cage() -> None:
    used = {
        id(c)
        for policy in VARIANTS.values()
        for layer, text in sentences(policy).items()
        for c, _ in clauses(layer, text)
    }
    assert [c.pattern for part in CLAUSES.values() for c in part if id(c) not in used] == []
    assert {*CLAUSES} == {*(layer.name for layer in ORDER), "events"} == {*sentences(policy_for_run(DEFAULT))}


def test_every_clause_has_a_proof_that_can_fail() -> None:
    """An attempt gets through a weakened cage; a test elsewhere is there; any other read-back has a weakness below."""
    ablated = {name for ablation in ABLATIONS.values() for name in ablation.names.split()}
    noticed = {check for part in WEAKNESSES.values() for check in part.checks}
    for clause in (clause for part in CLAUSES.values() for clause in part if clause.pattern != r"\."):
        assert set(clause.attempts.split()) <= ablated
        for test in clause.tests:
            file, _, name = test.partition("::")
            assert re.search(rf"^(async )?def {name}\(", (TESTS / file).read_text(), re.MULTILINE), test
        assert clause.attempts or clause.tests or clause.check in noticed, clause.pattern


# --- inspected cages -----------------------------------------------------------------------------------------


@functools.cache
def _refused(profile: str) -> dict[str, int]:
    """The calls that a profile refuses whatever their arguments: numbers by name; and a number that is no call's."""
    import pyseccomp

    actions: dict[str, set[str]] = {}
    for name, action, _ in profiles.rules(profile):
        actions.setdefault(name, set()).add(action)
    refused: dict[str, int] = {"no call": 1000}
    for name, found in actions.items():
        with contextlib.suppress(ValueError, RuntimeError):
            number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
            if number >= 0 and profiles.ALLOW not in found and name not in ("fork", "vfork"):
                refused[name] = number
    return refused


WHOLE = Weakness()


def inspect(root: Path, policy: EffectivePolicy, weakness: Weakness = WHOLE) -> Inspected:
    """Run ``inspection`` in a cage of that policy, in a network of the test's own."""
    with cages.template(weakness.template):
        found: Inspected = in_pretend_host(lambda: asyncio.run(_inspect(root, policy, weakness)))
        return found


async def _inspect(root: Path, policy: EffectivePolicy, weakness: Weakness) -> Inspected:
    class Kept(Records):
        def write(self, record: dict[str, Any]) -> None:
            if record["type"] == "syscall.denied":
                denied.add(record["data"]["call"])

    def furnish(spec: CageSpec) -> None:
        def bind(target: str, fd: int, **how: bool) -> None:
            spec.binds.append(Bind(target, owned.add(fd), **how))

        spec.policy = policy
        bind("/plugin", os.open(plugin, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        if (fs := policy.filesystem).state:
            folder = state.open(size=fs.state, inodes=fs.state_inodes, uid=spec.uid, gid=spec.gid)
            bind("/state", folder, writable=True)
        options = {"mode": "0700", "uid": str(spec.uid), "gid": str(spec.gid), "size": "64k", "nr_inodes": "16"}
        attributes = mount.NOSUID | mount.NODEV | mount.NOEXEC
        spec.mounts = {"/run/isolator/plugin": owned.add(mount.new_filesystem("tmpfs", options, attributes=attributes))}

    denied: set[str] = set()
    task = {
        "calls": list(_refused(policy.syscalls).values()), "connect": ADDRESSES, "read": policy.filesystem.read,
        "fork": policy.syscalls != "strict", "serve": CAGE_PORT if policy.network.listen else 0,
    }  # fmt: skip
    plugin = root / "plugin"
    plugin.mkdir(exist_ok=True)
    (plugin / "file").touch()
    argv = ["/usr/bin/python3", "-I", "-c", Path(inspection.__file__).read_text(), json.dumps(task)]
    kept = Kept(None, "test", quiet=True)
    with FdSet() as owned, contextlib.closing(Journal(root / "run/sentences.journal")) as journal:
        state = Volume(root / "state", "sentences", journal)
        try:
            async with cage(
                root, argv, policy, change=furnish, records=kept, cage_type=WeakenedCage, weakness=weakness
            ) as one:
                groups = {}
                if "cgroup" not in weakness.without:
                    files = [file for folder in one.cage.leaf.folders() for file in folder.iterdir()]
                    groups = {file.name: text for file in files if (text := _text(file)) is not None}
                forwarded = await _fetch(one) if policy.network.listen else b""
                end = await one.cage.wait()
                assert end.returncode == 0, (end, one.text())
                inside, uid = json.loads(one.text().splitlines()[0]), one.cage.spec.uid
        finally:
            state.remove()
    return Inspected(inside, policy, uid, groups, denied, forwarded)


def _text(file: Path) -> str | None:
    with contextlib.suppress(OSError):
        return file.read_text().strip() if file.is_file() else None
    return None


async def _fetch(one: StartedCage) -> bytes:
    """Connect to the forwarded port once the cage serves it; returns what it sends."""
    async with asyncio.timeout(seconds(30)):
        while "serving" not in one.text():
            assert not one.cage.processes.ended.is_set(), one.text()
            await asyncio.sleep(0.05)
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        data = await reader.read()
        writer.close()
    return data


@pytest.fixture(scope="module")
def opened() -> Iterator[str]:
    """A folder of the host for policies to open."""
    folder = Path(tempfile.mkdtemp(prefix="isolator-read-", dir="/opt"))
    folder.chmod(0o755)
    (folder / "file").touch()
    yield str(folder)
    shutil.rmtree(folder)


def _variant(name: str, opened: str) -> EffectivePolicy:
    policy = VARIANTS[name]
    read = tuple(opened for _ in policy.filesystem.read)
    return policy.model_copy(update={"filesystem": policy.filesystem.model_copy(update={"read": read})})


@pytest.fixture(scope="module")
def inspected(arena: Range, opened: str) -> Callable[[str], Inspected]:
    """One inspected cage a variant."""
    return functools.cache(lambda name: inspect(arena.root, _variant(name, opened)))


@pytest.fixture(scope="module")
def held(arena: Range) -> dict[str, Finding]:
    """The attempts that clauses name, made in a whole cage."""
    names = {name for part in CLAUSES.values() for clause in part for name in clause.attempts.split()}
    return arena.attack(sorted(names))


@pytest.mark.parametrize("layer", CLAUSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sentence_is_true_of_its_cage(
    inspected: Callable[[str], Inspected], held: dict[str, Finding], variant: str, layer: str
) -> None:
    seen = inspected(variant)
    for clause, match in clauses(layer, sentences(seen.policy)[layer]):
        if clause.check is not None:
            clause.check(match, seen)
        for name in clause.attempts.split():
            assert held[name].outcome == "held", (clause.pattern, held[name])


def test_landlock_is_a_second_wall(arena: Range) -> None:
    """A folder that the view has writable by mistake still cannot be changed."""
    found = arena.attack(["write-read-only"], Weakness(edits=(cages.writable_plugin,)))
    assert found["write-read-only"].outcome == "held"


# --- read-backs notice ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noticed:
    """A weakness of a cage, and the read-backs that fail because of it."""

    variant: str
    weakness: Weakness
    checks: tuple[Check, ...]


OTHER_GROUPS = "import os\nos.setgroups([4, 24])"


def _no_sealing(plan: Plan, _: WeakenedCage) -> None:
    section = plan.section(SeccompSection)
    assert section is not None
    plan.add(replace(section, sealing=b""))


def _default_profile(plan: Plan, cage: WeakenedCage) -> None:
    section = plan.section(SeccompSection)
    assert section is not None
    plan.add(replace(section, program=compiled("default", cage.spec.cache), sealing=b""))


def _programs_run(plan: Plan, _: WeakenedCage) -> None:
    view = plan.section(FilesystemSection)
    assert view is not None
    operations = (replace(one, executable=True) if isinstance(one, ResizeTmpfs) else one for one in view.operations)
    plan.add(replace(view, operations=tuple(operations)))


def _further_mount(target: str) -> cages.Edit:
    """Attach a writable file system in memory at ``target``, over what is there."""

    def edit(plan: Plan, _: WeakenedCage) -> None:
        view = plan.section(FilesystemSection)
        assert view is not None
        plan.own(
            "further",
            mount.new_filesystem("tmpfs", {"mode": "1777", "size": "64k"}, attributes=mount.NOSUID | mount.NODEV),
        )
        *before, last = view.operations
        plan.add(replace(view, operations=(*before, AttachMount(target.lstrip("/"), "further", is_folder=True), last)))

    return edit


def _read_path_is_writable(plan: Plan, cage: WeakenedCage) -> None:
    _further_mount(cage.spec.policy.filesystem.read[0])(plan, cage)


EVERYTHING = "strict, with everything"
WEAKNESSES = {
    "no user of its own": Noticed(
        "plain", Weakness(frozenset({"user", "capabilities"}), template=OTHER_GROUPS),
        (own_user, no_other_group, no_other_user),
    ),
    "no control groups": Noticed(EVERYTHING, Weakness(frozenset({"cgroup"})), (memory, swap, processor, tasks, disk)),
    "the host's processes": Noticed("plain", Weakness(template=cages.HOST_PIDS), (own_processes,)),
    "the host's name": Noticed("plain", Weakness(edits=(cages.host_name,)), (own_host_name,)),
    "an uncovered /proc": Noticed(
        "plain", Weakness(template=cages.UNCOVERED), (own_memory, own_load, no_host_entry)
    ),
    "the tops of the control groups": Noticed("plain", Weakness(edits=(cages.host_groups,)), (own_groups_shown,)),
    "the host's control groups": Noticed("plain", Weakness(edits=(cages.no_cgroup_namespace,)), (own_groups,)),
    "the host's IPC objects": Noticed("plain", Weakness(template=cages.HOST_IPC), (own_ipc,)),
    "the host's network": Noticed("plain", Weakness(frozenset({"network"})), (own_interfaces, no_network)),
    "a state folder": Noticed("plain", Weakness(edits=(_further_mount("/state"),)), (no_state,)),
    "a writable read path": Noticed(
        EVERYTHING, Weakness(frozenset({"landlock"}), (_read_path_is_writable,)), (read_paths,)
    ),
    "folders with programs": Noticed(EVERYTHING, Weakness(edits=(_programs_run,)), (executes_none,)),
    "no limits": Noticed("plain", Weakness(frozenset({"rlimits"})), (open_files, locked_memory)),
    "no filter": Noticed("plain", Weakness(frozenset({"seccomp"})), (without_effect, recorded)),
    "no second filter": Noticed(EVERYTHING, Weakness(edits=(_no_sealing,)), (no_process,)),
    "the filter of another profile": Noticed(EVERYTHING, Weakness(edits=(_default_profile,)), (not_both,)),
}  # fmt: skip


@pytest.mark.parametrize("weakness", WEAKNESSES)
def test_read_backs_notice_a_weakness(arena: Range, opened: str, weakness: str) -> None:
    case = WEAKNESSES[weakness]
    seen = inspect(arena.root, _variant(case.variant, opened), case.weakness)
    found = [(c, match) for layer, text in sentences(seen.policy).items() for c, match in clauses(layer, text)]
    for check in case.checks:
        match = next(match for clause, match in found if clause.check is check)
        with pytest.raises((AssertionError, KeyError)):
            check(match, seen)
