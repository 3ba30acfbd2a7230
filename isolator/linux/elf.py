"""Numbers of elf(5)."""

from __future__ import annotations

MACHINES = {
    3: "i386", 8: "mips", 20: "powerpc", 21: "ppc64le", 22: "s390x", 40: "arm", 62: "x86_64", 183: "aarch64",
    243: "riscv64", 258: "loongarch64",
}  # fmt: skip
"""Machines that a file may be built for, as platform.machine() names them."""
