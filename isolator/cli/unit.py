"""The systemd unit: as hard as a builder of cages can be, and why each line that is missing is missing.

A cage inherits what the unit sets (its mount view, its bounding set, its device filter, any system-call filter), so
every line here is also a wall around each plugin; and every line that would break what a cage is made of is left out:

=============================  ==================================================================================
RestrictNamespaces             cages are namespaces (and it makes clone3 fail with ENOSYS)
RestrictSUIDSGID               makes openat2 fail with ENOSYS, by which root opens what a plugin wrote without
                               ever following a link out of its folder
ProtectKernelTunables          makes /proc/sys read-only, also for the sysctls of a cage's own network namespace
ProtectControlGroups           makes the delegated subtree read-only
ProtectHostname                blocks sethostname, which a cage calls in its own UTS namespace
PrivateDevices                 no loop devices; DevicePolicy=closed with two entries does the same and keeps them
PrivateTmp, ProtectHome=yes    folders that plugins are granted, and ``plugin_dirs``, may lie there
PrivateNetwork, PrivateUsers   the broker carries connections; cages map no users
MemoryDenyWriteExecute         no clone of a cage; inherited by plugins: Node.js and every other JIT would die
SystemCallFilter               a cage's own filter hands forbidden calls to the daemon, which records them by name; a
                               filter of the unit's would answer first (EPERM beats a notification: seccomp(2)), and
                               what a plugin tried would be on no record
ProtectClock, ProtectKernel-   the same: each is a system-call filter. Without CAP_SYS_MODULE and
Modules and -Logs, Lock-       CAP_SYSLOG, and with DevicePolicy=closed, they would add nothing to that
Personality
CapabilityBoundingSet:         a cage's clocks that count from the host's start are set back to its own (timens_offsets)
~CAP_SYS_TIME
RestrictAddressFamilies        the same, for sockets of other families
User=                          it is root that makes users and namespaces; everything that parses others' bytes is not
=============================  ==================================================================================

The unit has a mount namespace (ProtectSystem and others make one), a slave of the host's: what the host mounts later
appears in it, what the daemon mounts (plugins' state) does not appear on the host and vanishes with the daemon.
"""

from __future__ import annotations

from pathlib import Path

from isolator.paths import Paths


def unit(program: Path, paths: Paths) -> str:
    """The text of ``isolator.service`` for one root."""
    root = f" --root {paths.root}" if paths.instance else ""
    writable = str(paths.root) if paths.instance else "/var /run"
    return _UNIT.format(program=program, root=root, writable=writable)


_UNIT = """\
# Written by 'isolator install', which writes it anew each time: put changes into
# /etc/systemd/system/isolator.service.d/local.conf ('systemctl edit isolator').
[Unit]
Description=Isolator: runs untrusted plugins in cages
After=local-fs.target network.target nss-user-lookup.target modprobe@loop.service
# DeviceAllow=block-loop means the number that the module has when the unit starts: none if it is not loaded.
Wants=modprobe@loop.service
# A daemon that cannot start for a while (a full disk) must come back when it can.
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={program}{root} serve
ExecReload={program}{root} reload
Restart=on-failure
RestartSec=2
WatchdogSec=30
TimeoutStartSec=120
TimeoutStopSec=90
KillMode=mixed
UMask=0022

# Control groups: the daemon hands out its own subtree. A plugin that runs out of memory is the daemon's business,
# not the unit's end; tasks are capped for each plugin.
Delegate=yes
OOMPolicy=continue
OOMScoreAdjust=-500
TasksMax=infinity
LimitNOFILE=65536
LimitCORE=1

# What is writable: /etc for useradd (passwd and its lock files), /var and /run for the daemon. Homes can be read,
# since what plugins are granted may lie there.
ProtectSystem=strict
ReadWritePaths=/etc {writable}
ProtectHome=read-only
ProtectProc=invisible
PrivateMounts=yes

# Devices: state images on loop devices, and the null, zero, full, random and urandom that every cage gets.
DevicePolicy=closed
DeviceAllow=/dev/loop-control rw
DeviceAllow=block-loop rw

NoNewPrivileges=yes
RestrictRealtime=yes
SystemCallArchitectures=native
KeyringMode=private
CapabilityBoundingSet=~CAP_AUDIT_CONTROL CAP_BLOCK_SUSPEND CAP_BPF CAP_CHECKPOINT_RESTORE CAP_IPC_LOCK CAP_LEASE
CapabilityBoundingSet=~CAP_LINUX_IMMUTABLE CAP_MAC_ADMIN CAP_MAC_OVERRIDE CAP_MKNOD CAP_PERFMON CAP_SETFCAP CAP_SYSLOG
CapabilityBoundingSet=~CAP_SYS_BOOT CAP_SYS_CHROOT CAP_SYS_MODULE CAP_SYS_NICE CAP_SYS_PACCT CAP_SYS_RAWIO
CapabilityBoundingSet=~CAP_SYS_TTY_CONFIG CAP_WAKE_ALARM

[Install]
WantedBy=multi-user.target
"""
