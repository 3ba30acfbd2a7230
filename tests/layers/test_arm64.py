"""On arm64: the filters answer that machine's calls as the rules say, and what goes to its kernel has its layouts.

The programs are made for arm64 here and interpreted. Numbers, layouts and constants are held against the headers of
arm64 by a cross-compiler, which runs nothing: every line is an assertion at compile time.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence

import pyseccomp
import pytest

from isolator.broker import hardening
from isolator.layers.seccomp import bpf, profiles
from isolator.layers.seccomp import layer as seccomp
from isolator.linux import (
    _libc,
    capability,
    files,
    inotify,
    landlock,
    loop,
    mount,
    namespaces,
    peer,
)
from isolator.linux import seccomp as kernel
from isolator.probe.attacks import kit
from tests.layers.test_seccomp_filter import ARM64, NONE, carry_out, edge_arguments, expected

COMPILER = "aarch64-linux-gnu-gcc"
PROFILES = {
    "default": list(profiles.rules("default")),
    "strict": list(profiles.rules("strict")),
    seccomp.SEALING: list(profiles.sealing_rules()),
    "broker": list(hardening.rules()),
}


def number_of(name: str) -> int:
    """The number of a call on arm64; negative: it has none."""
    try:
        return int(pyseccomp.resolve_syscall(pyseccomp.Arch.AARCH64, name))
    except (ValueError, RuntimeError):
        return -1


@pytest.fixture
def on_arm64(monkeypatch: pytest.MonkeyPatch) -> dict[int, Sequence[bpf.Judged]]:
    """Let profiles be compiled for arm64; the rules by number, once one has been."""
    seen: dict[int, Sequence[bpf.Judged]] = {}
    real = bpf.compile_calls

    def noted(calls: dict[int, list[bpf.Judged]], *, otherwise: int, arch: int) -> bytes:
        assert arch == ARM64
        seen.update(calls)
        return real(calls, otherwise=otherwise, arch=arch)

    monkeypatch.setattr(bpf, "compile_calls", noted)
    monkeypatch.setattr(pyseccomp, "resolve_syscall", lambda _, name, real=pyseccomp.resolve_syscall: real(
        pyseccomp.Arch.AARCH64, name))  # fmt: skip
    monkeypatch.setattr(pyseccomp, "system_arch", lambda: ARM64)
    return seen


@pytest.mark.parametrize("name", PROFILES)
def test_filter_for_arm64_answers_as_its_rules_say(name: str, on_arm64: dict[int, Sequence[bpf.Judged]]) -> None:
    program = seccomp.compile_rules(PROFILES[name], otherwise_allowed=name == seccomp.SEALING)
    numbers = {number_of(call) for call, _, _ in PROFILES[name]}
    assert on_arm64.keys() == {number for number in numbers if number >= 0}
    otherwise = carry_out(program, 5000, NONE, ARM64)
    for number in range(600):
        for arguments in edge_arguments(on_arm64.get(number, ())):
            assert carry_out(program, number, arguments, ARM64) == expected(
                on_arm64.get(number, ()), arguments, otherwise
            ), number
    for number in (0, 59, 0x40000000, 0xFFFFFFFE):
        assert carry_out(program, number, NONE) == bpf.RET_KILL_PROCESS, "a call of x86_64"
    assert len(program) // 8 < 520


def test_calls_of_attacks_are_handed_over_on_arm64(on_arm64: dict[int, Sequence[bpf.Judged]]) -> None:
    program = seccomp.compile_rules(PROFILES["default"])
    handed_over = {
        call for call in kit.CALLS
        if carry_out(program, number_of(call), NONE, ARM64) == kernel.RET_USER_NOTIF
    }  # fmt: skip
    assert handed_over >= {
        "add_key", "bpf", "chroot", "init_module", "kexec_load", "keyctl", "mount", "open_by_handle_at",
        "perf_event_open", "pivot_root", "ptrace", "reboot", "setns", "swapon", "umount2", "userfaultfd",
    }  # fmt: skip
    assert on_arm64


def test_tables_of_numbers_agree_on_arm64() -> None:
    ours = _libc._OLD["aarch64"]
    assert {name: number_of(name) for name in ours} == ours


# --- headers -------------------------------------------------------------------------------------------------------

HEADERS = """\
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/socket.h>
#include <asm/ioctl.h>
#include <asm/unistd.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/if_addr.h>
#include <linux/if_link.h>
#include <linux/inotify.h>
#include <linux/landlock.h>
#include <linux/loop.h>
#include <linux/mount.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netlink.h>
#include <linux/openat2.h>
#include <linux/posix_acl_xattr.h>
#include <linux/prctl.h>
#include <linux/rtnetlink.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
"""


def offsets(pattern: str) -> list[int]:
    """Offsets of a format's fields."""
    order, found, fields = pattern[0] if pattern[0] in "=<>!@" else "@", [], ""
    number = ""
    for letter in pattern.removeprefix(order):
        if letter.isdigit():
            number += letter
            continue
        for _ in range(int(number or 1)):
            fields += letter
            if letter != "x":
                found.append(struct.calcsize(order + fields) - struct.calcsize(f"={letter}"))
        number = ""
    return found


STRUCTURES: dict[str, tuple[type[ctypes.Structure], str]] = {
    "struct sock_fprog": (kernel._Program, "len filter"),
    "struct clone_args": (
        namespaces.CloneArgs,
        "flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid set_tid_size cgroup",
    ),
}
"""By structure of the kernel: ours, and the kernel's names of the fields."""

FORMATS: dict[str, tuple[str, str]] = {
    "struct mount_attr": (mount._MOUNT_ATTR.format, "attr_set attr_clr propagation userns_fd"),
    "struct landlock_path_beneath_attr": (landlock._PATH_BENEATH_ATTR.format, "allowed_access parent_fd"),
    "struct open_how": (files._OPEN_HOW.format, "flags mode resolve"),
    "struct __user_cap_header_struct": (capability._HEADER.format, "version pid"),
    "struct __user_cap_data_struct": (capability._SETS.format[:-2], "effective permitted inheritable"),
    "struct seccomp_notif": (
        kernel._NOTIFICATION.format,
        "id pid flags data.nr data.arch data.instruction_pointer data.args[0] data.args[1] data.args[2] data.args[3]"
        " data.args[4] data.args[5]",
    ),
    "struct seccomp_notif_resp": (kernel._RESPONSE.format, "id val error flags"),
    "struct seccomp_notif_addfd": (kernel._DESCRIPTOR.format, "id flags srcfd newfd newfd_flags"),
    "struct inotify_event": (inotify._HEADER.format, "wd mask cookie len"),
    "struct sock_filter": ("=HBBI", "code jt jf k"),
    "struct ucred": ("3i", "pid uid gid"),
    "struct linger": ("ii", "l_onoff l_linger"),
    "struct nlmsghdr": ("=IHHII", "nlmsg_len nlmsg_type nlmsg_flags nlmsg_seq nlmsg_pid"),
    "struct nlattr": ("=HH", "nla_len nla_type"),
    "struct rtmsg": (
        "=BBBBBBBBI",
        "rtm_family rtm_dst_len rtm_src_len rtm_tos rtm_table rtm_protocol rtm_scope rtm_type rtm_flags",
    ),
    "struct ifaddrmsg": ("=BBBBI", "ifa_family ifa_prefixlen ifa_flags ifa_scope ifa_index"),
    "struct ifinfomsg": ("=BxHiII", "ifi_family ifi_type ifi_index ifi_flags ifi_change"),
    "struct nfgenmsg": ("!BBH", "nfgen_family version res_id"),
    "struct posix_acl_xattr_entry": ("<HHI", "e_tag e_perm e_id"),
}
"""By structure of the kernel: the format that we pack or unpack, and the kernel's names of its fields."""

VALUES: dict[str, int] = {
    "AUDIT_ARCH_AARCH64": ARM64,
    "SECCOMP_IOCTL_NOTIF_RECV": kernel._RECV,
    "SECCOMP_IOCTL_NOTIF_SEND": kernel._SEND,
    "SECCOMP_IOCTL_NOTIF_ID_VALID": kernel._ID_VALID,
    "SECCOMP_IOCTL_NOTIF_ADDFD": kernel._ADD_DESCRIPTOR,
    "SECCOMP_ADDFD_FLAG_SEND": kernel._AND_ANSWER,
    "SECCOMP_FILTER_FLAG_NEW_LISTENER": kernel._NEW_LISTENER,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": kernel._WAIT_KILLABLE_RECV,
    "SECCOMP_RET_USER_NOTIF": kernel.RET_USER_NOTIF,
    "offsetof(struct seccomp_data, nr)": bpf._NUMBER,
    "offsetof(struct seccomp_data, arch)": bpf._ARCH,
    "offsetof(struct seccomp_data, args)": bpf._ARGUMENTS,
    "__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__": int(bpf._LOW == 0),
    "LANDLOCK_ACCESS_FS_REFER": landlock.REFER,
    "LANDLOCK_ACCESS_FS_MAKE_SYM": landlock.MAKE_SYM,
    "offsetof(struct landlock_ruleset_attr, handled_access_fs)": offsets(landlock._RULESET_ATTR.format)[0],
    "LOOP_CTL_GET_FREE": loop._CTL_GET_FREE,
    "LOOP_CONFIGURE": loop._CONFIGURE,
    "LOOP_GET_STATUS64": loop._GET_STATUS64,
    "offsetof(struct loop_config, info.lo_flags)": 8 + 52,
    "sizeof(struct loop_config)": 8 + 232 + 64,
    "offsetof(struct loop_info64, lo_device)": 0,
    "offsetof(struct loop_info64, lo_inode)": 8,
    "CLONE_INTO_CGROUP": namespaces.CLONE_INTO_CGROUP,
    "CLONE_NEWNET": namespaces.CLONE_NEWNET,
    "_LINUX_CAPABILITY_VERSION_3": capability._VERSION_3,
    "PR_SET_SECUREBITS": capability._PR_SET_SECUREBITS,
    "RESOLVE_BENEATH": files.RESOLVE_BENEATH,
    "MOVE_MOUNT_F_EMPTY_PATH": mount._MOVE_EMPTY_FROM,
    "IN_ONLYDIR": inotify.IN_ONLYDIR,
    "MOUNT_ATTR_IDMAP": mount._IDMAP,
    "POSIX_ACL_XATTR_VERSION": peer._ACL_VERSION,
}


def assertions() -> Iterator[tuple[str, int]]:
    """Every C expression with the value that we take it to have."""
    yield from VALUES.items()
    for structure, (ours, names) in STRUCTURES.items():
        yield f"sizeof({structure})", ctypes.sizeof(ours)
        fields = [field[0] for field in ours._fields_]
        for mine, its in zip(fields, names.split(), strict=True):
            yield f"offsetof({structure}, {its})", getattr(ours, mine).offset
            yield f"sizeof((({structure} *)0)->{its})", getattr(ours, mine).size
    for structure, (pattern, names) in FORMATS.items():
        yield f"sizeof({structure})", struct.calcsize(pattern)
        for offset, its in zip(offsets(pattern), names.split(), strict=True):
            yield f"offsetof({structure}, {its})", offset
    tables = (_libc._OLD["aarch64"], {name: number for name, number in _libc.NUMBERS.items() if number > 424})
    for table in tables:
        yield from ((f"__NR_{name}", number) for name, number in table.items())


def compiled(lines: Sequence[str]) -> list[str]:
    """What the compiler for arm64 has against the assertions."""
    run = subprocess.run(
        [COMPILER, "-fsyntax-only", "-x", "c", "-"],
        input=HEADERS + "\n".join(lines) + "\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    return [line for line in run.stderr.splitlines() if "error" in line]


@pytest.fixture(scope="module")
def cross_compiler() -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip("needs gcc-aarch64-linux-gnu and libc6-dev-arm64-cross, which './dev test --all' installs")


@pytest.mark.wide
@pytest.mark.usefixtures("cross_compiler")
def test_what_goes_to_an_arm64_kernel_has_its_layout() -> None:
    lines = [f'_Static_assert(({left}) == {right}, "{left} is not {right}");' for left, right in assertions()]
    assert compiled(lines) == []
    assert compiled(['_Static_assert(__NR_pivot_root == 155, "x86_64");']), "control: a wrong number is noticed"


@pytest.mark.wide
@pytest.mark.usefixtures("cross_compiler")
def test_libseccomp_has_the_numbers_of_the_headers_of_arm64() -> None:
    """Calls that the headers do not have are newer than they are: these have one number everywhere."""
    names = sorted({call for rules in PROFILES.values() for call, _, _ in rules})
    known = {name: number for name in names if (number := number_of(name)) >= 0}
    assert len(known) > 250
    lines = []
    for name, number in known.items():
        lines += [
            f"#ifdef __NR_{name}", f'_Static_assert(__NR_{name} == {number}, "{name} is not {number}");',
            "#else", f'_Static_assert({number} > 424, "{name}: not in the headers");', "#endif",
        ]  # fmt: skip
    lines += [
        line for name in names if name not in known
        for line in (f"#ifdef __NR_{name}", f'_Static_assert(0, "{name}: libseccomp does not know it");', "#endif")
    ]  # fmt: skip
    assert compiled(lines) == []
