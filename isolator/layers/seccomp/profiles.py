"""The system-call profiles, as data: which calls are allowed, which denied and recorded, and on which arguments.

The rules of one call are tried in their order, and the first that holds decides. Arguments are compared under a 32-bit
mask where the kernel uses only 32 bits: a 64-bit comparison lets ``TIOCSTI + 2**32`` through (CVE-2019-10063).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from isolator.layers.seccomp.bpf import AnyBit, Condition, Equal

ALLOW, DENY, NO_FAMILY, REFUSE = "allow", "deny", "no_family", "refuse"
NO_PROTOCOL, INVALID, PRETEND, LEND = "no_protocol", "invalid", "pretend", "lend"

Rule = tuple[str, str, tuple[Condition, ...]]
"""(call, action, the conditions on its arguments, which must all hold)."""

WORD = 0xFFFFFFFF

_ALLOWED_NAMES = """
    accept accept4 access alarm arch_prctl bind brk cachestat capget capset chdir chmod chown clock_getres
    clock_gettime clock_nanosleep close close_range connect copy_file_range creat dup dup2 dup3 epoll_create
    epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2
    execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2
    fchown fchownat fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstatfs fsync ftruncate
    futex futex_waitv futex_wait futex_wake futex_requeue futimesat get_robust_list get_thread_area getcpu getcwd
    getdents getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid
    getpriority getrandom getresgid getresuid getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday
    getuid getxattr inotify_init inotify_init1 inotify_rm_watch ioprio_get ioprio_set kill landlock_add_rule
    landlock_create_ruleset landlock_restrict_self lchown lgetxattr link linkat listen listxattr llistxattr
    lremovexattr lseek lsetxattr lstat madvise map_shadow_stack membarrier mincore mkdir mkdirat mlock mlock2
    mlockall mprotect mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap nanosleep newfstatat
    open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll
    pread64 preadv preadv2 pselect6 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recvfrom
    recvmmsg recvmsg remap_file_pages removexattr rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction
    rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
    sched_rr_get_interval sched_setaffinity sched_yield select
    semctl semget semop semtimedop sendfile sendmmsg sendmsg sendto set_robust_list set_thread_area set_tid_address
    setgid setgroups setitimer setpgid setpriority setregid setresgid setresuid setreuid setsid setuid
    setfsuid setfsgid setxattr shmat shmctl shmdt shutdown sigaltstack signalfd signalfd4 splice stat statfs statx
    symlink symlinkat sync_file_range sysinfo tee tgkill time timer_create timer_delete timer_getoverrun
    timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask uname
    unlink unlinkat utime utimensat utimes vfork vmsplice wait4 waitid write writev riscv_flush_icache
    riscv_hwprobe
"""
_ALLOWED = tuple(_ALLOWED_NAMES.split())
"""Allowed whatever the arguments. The set*id family and capset are harmless here (no capability, one uid) and programs
ask; System V objects are those of the cage's own IPC namespace, and their memory is charged to it."""

_DENIED_NAMES = """
    _sysctl acct add_key adjtimex afs_syscall bpf chroot clock_adjtime clock_settime create_module delete_module
    fanotify_init fanotify_mark finit_module fsconfig fsmount fsopen fspick get_kernel_syms getpmsg init_module
    io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load keyctl listns
    lookup_dcookie lsm_get_self_attr lsm_list_modules lsm_set_self_attr modify_ldt mount mount_setattr move_mount
    mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink name_to_handle_at nfsservctl
    open_by_handle_at open_tree open_tree_attr perf_event_open pidfd_getfd pivot_root process_madvise
    process_mrelease process_vm_readv process_vm_writev ptrace putpmsg query_module quotactl quotactl_fd reboot
    request_key seccomp security setdomainname sethostname setns settimeofday swapoff swapon sysfs syslog tuxcall
    umount umount2 unshare uselib userfaultfd ustat vhangup vserver
"""
_DENIED = tuple(_DENIED_NAMES.split())
"""Answered EPERM and recorded by name. Not among them: what programs ask ordinarily and do without, as on a kernel that
lacks it: placing memory on NUMA nodes (mbind and its kin), statmount and listmount (they read mountinfo instead)."""

_CLONE_NEW = 0x20000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
"""Every namespace flag that clone(2) takes."""

_TERMINAL_IOCTLS = (0x5412, 0x541C, 0x541D, 0x5423)  # TIOCSTI, TIOCLINUX, TIOCCONS, TIOCSETD
_AF_UNIX, _INTERNET = 1, (2, 10)  # AF_INET, AF_INET6
_PROTOCOLS = (0, 1, 6, 17, 58)  # the usual one of the type, ICMP, TCP, UDP, ICMPv6
_MPTCP = 262  # Go's listeners try it first and fall back silently, so it is refused without a record
AF_NETLINK, NETLINK_ROUTE = 16, 0  # other protocols are tried all the time, so they are refused without a record
_PRCTL = (
    1, 2,  # PDEATHSIG
    3, 4,  # DUMPABLE
    7, 8,  # KEEPCAPS (no effect without capabilities)
    15, 16,  # NAME
    21,  # GET_SECCOMP
    23, 24,  # CAPBSET_READ, CAPBSET_DROP (can only take away)
    25, 26,  # TSC
    27,  # GET_SECUREBITS
    29, 30,  # TIMERSLACK
    36, 37,  # CHILD_SUBREAPER
    38, 39,  # NO_NEW_PRIVS
    40,  # GET_TID_ADDRESS
    41, 42,  # THP_DISABLE
    47,  # CAP_AMBIENT
    52, 53,  # SPECULATION_CTRL
    55, 56,  # TAGGED_ADDR_CTRL (arm64)
    65, 66,  # MDWE
    0x53564D41,  # SET_VMA (names of mappings)
    0x59616D61,  # SET_PTRACER (crash reporters ask; there is nobody to trace)
)  # fmt: skip
_PERSONALITIES = (0x0, 0xFFFFFFFF, 0x0040000, 0x0008)  # default, query, ADDR_NO_RANDOMIZE, LINUX32 as setarch sets it
_USES = 0x1 | 0x10 | 0x20  # IN_ACCESS, IN_CLOSE_NOWRITE, IN_OPEN
_F_NOTIFY = 1026
_RLIMIT_CORE = 4
_POINTER = 0xFFFFFFFFFFFFFFFF
_SOL_SOCKET, _IP, _TCP, _IPV6 = 1, 0, 6, 41
_UNCOUNTED = (
    (_IPV6, WORD, 32, REFUSE),  # FLOWLABEL_MGR: leases come out of one pool of the host's
    (_SOL_SOCKET, WORD, 26, REFUSE), (_SOL_SOCKET, WORD, 51, REFUSE),  # ATTACH_FILTER, ATTACH_REUSEPORT_CBPF
    (_SOL_SOCKET, WORD, 37, REFUSE), (_SOL_SOCKET, WORD, 65, REFUSE),  # TIMESTAMPING, which fills the error queue
    (_IP, WORD, 11, PRETEND), (_IPV6, WORD, 25, PRETEND),  # RECVERR, which does, too; the C library asks for it
    (_TCP, WORD, 14, REFUSE), (_TCP, WORD, 32, REFUSE), (_TCP, WORD, 38, REFUSE),  # MD5SIG, its EXT, AO_ADD_KEY
    (_IPV6, WORD, 6, REFUSE),  # 2292PKTOPTIONS, up to 64 KiB
    (_IPV6, WORD - 1, 20, PRETEND), (_IPV6, WORD - 1, 42, PRETEND), (_IPV6, WORD - 3, 44, PRETEND),  # multicast
)  # fmt: skip
"""Options of sockets by which the kernel keeps what no memory cap counts: level, mask and value, and the answer."""
_REAL_TIME = (1, 2, 0x40000001, 0x40000002)  # SCHED_FIFO, SCHED_RR; with SCHED_RESET_ON_FORK
_MAP_HUGETLB, _MFD_HUGETLB, _SHM_HUGETLB = 0x40000, 0x4, 0o4000
_SHM_EXEC = 0o100000
_MKNOD_DEVICES = (0o020000, 0o060000)  # S_IFCHR, S_IFBLK
_S_IFMT = 0o170000


def rules(profile: str) -> Iterator[Rule]:
    """Every rule of a profile; a call that no rule names is answered ENOSYS."""
    strict = profile == "strict"
    for name in _ALLOWED:
        if strict and name in _STRICT_ARGUMENTS:
            continue
        yield name, ALLOW, ()
    for name in _DENIED:
        yield name, DENY, ()
    if strict:
        yield from _strict()
    # Threads and processes, but no namespaces. clone3 hides its flags behind a pointer: ENOSYS, libc falls back.
    yield from _either("clone", AnyBit(0, _CLONE_NEW), DENY, ALLOW)
    yield from _only("ioctl", 1, _TERMINAL_IOCTLS, inside=DENY, outside=ALLOW)
    # The second filter of ``strict`` is loaded under the first one, and allows no third.
    prctl = (*_PRCTL, _PR_SET_SECCOMP) if strict else _PRCTL
    yield from _only("prctl", 0, prctl, inside=ALLOW, outside=DENY)
    yield from _only("personality", 0, _PERSONALITIES, inside=ALLOW, outside=DENY)
    yield from _sockets()
    yield from _watches()
    yield from _host_wide()
    yield from _slices()
    yield from _huge_pages(strict=strict)
    for call, index in (("mknod", 1), ("mknodat", 2)):
        for kind in _MKNOD_DEVICES:
            yield call, DENY, (Equal(index, _S_IFMT, kind),)
        yield call, ALLOW, ()


def _sockets() -> Iterator[Rule]:
    """TCP, UDP, ICMP and Unix sockets. Asking for another protocol makes the kernel load its module, for anybody.

    Sockets of NETLINK_ROUTE, by which libraries list interfaces and addresses, are lent by the notifier. Without a
    capability they only read, and the cage's own network is all that there is to read; but what waits in them is
    charged to no memory cap, so a cage has few.
    """
    yield "socket", LEND, (Equal(0, WORD, AF_NETLINK), Equal(2, WORD, NETLINK_ROUTE))
    for call in ("socket", "socketpair"):
        yield call, ALLOW, (Equal(0, WORD, _AF_UNIX),)
        for family in _INTERNET:
            of_family = Equal(0, WORD, family)
            for protocol in _PROTOCOLS:
                yield call, ALLOW, (of_family, Equal(2, WORD, protocol))
            yield call, NO_PROTOCOL, (of_family, Equal(2, WORD, _MPTCP))
        yield call, NO_FAMILY, (Equal(0, WORD, AF_NETLINK),)
        yield call, DENY, ()


def _watches() -> Iterator[Rule]:
    """Allow watches on changes of files, and refuse watches on their mere use.

    A watch is on the inode, whichever mount it is seen through: opens of /usr/bin/* tell which programs the host and
    the other plugins run, and when.
    """
    yield from _either("inotify_add_watch", AnyBit(2, _USES), DENY, ALLOW)
    yield from _only("fcntl", 1, (_F_NOTIFY,), inside=DENY, outside=ALLOW)


def _host_wide() -> Iterator[Rule]:
    """Narrow the calls that reach past the cage without needing any right.

    sync(2) flushes every file system of the host, as often as it is called, and syncfs(2) the host's own through any
    file of /usr. The limit on core dumps is 1 (layer rlimits), which is the one value that keeps the kernel from
    starting the host's core handler, as root, at every crash; 0 does not. So a change of it succeeds without effect:
    who forbids core dumps has none anyway. Not where the value before is asked for too, which nobody would fill in.
    Leases of IPv6 flow labels come out of one pool of the host's, whatever the network namespace. So does the memory of
    compiled BPF programs (net.core.bpf_jit_limit), which no memory cap counts: once sockets' filters have used it up,
    nobody without CAP_BPF can load a filter any more, a cage that starts included. seccomp and bpf are denied anyway.
    Other options have each socket keep from 20 to 400 KiB that no cap counts either (sock_kmalloc, the error queue): a
    cage may have tens of thousands of sockets. Joins of multicast groups, to which no cage can send, succeed.
    (The requests of Linux native AIO are counted against one limit for the whole host, so its calls are not known here
    at all.)
    """
    for call in ("sync", "syncfs"):
        yield call, PRETEND, ()
    for level, mask, option, action in _UNCOUNTED:
        yield "setsockopt", action, (Equal(1, WORD, level), Equal(2, mask, option))
    yield "setsockopt", ALLOW, ()
    core, changed = Equal(1, WORD, _RLIMIT_CORE), AnyBit(2, _POINTER)
    yield "setrlimit", PRETEND, (Equal(0, WORD, _RLIMIT_CORE),)
    yield "setrlimit", ALLOW, ()
    yield "prlimit64", INVALID, (core, changed, AnyBit(3, _POINTER))
    yield "prlimit64", PRETEND, (core, changed)
    yield "prlimit64", ALLOW, ()


def _slices() -> Iterator[Rule]:
    """Keep the slice of a cage's threads, which is longer than the kernel's own (isolator.linux.priority).

    A shorter one would interrupt the host and the other plugins at each wake-up. Any change of policy or parameters
    sets the slice back, but to a real-time policy, which the kernel refuses by itself.
    """
    yield "sched_setattr", REFUSE, ()
    yield "sched_setparam", PRETEND, ()
    yield from _only("sched_setscheduler", 1, _REAL_TIME, inside=ALLOW, outside=PRETEND)


def _huge_pages(*, strict: bool) -> Iterator[Rule]:
    """Refuse huge pages: the host's reserved ones are counted against no memory cap."""
    yield from _either("mmap", AnyBit(3, _MAP_HUGETLB), REFUSE, ALLOW)
    yield from _either("shmget", AnyBit(2, _SHM_HUGETLB), REFUSE, ALLOW)
    if not strict:
        yield from _either("memfd_create", AnyBit(1, _MFD_HUGETLB), REFUSE, ALLOW)


_STRICT_ARGUMENTS = ("mprotect", "pkey_mprotect", "shmat", "execveat", "fork", "vfork")
_PROT_WRITE, _PROT_EXEC = 2, 4
_BOTH = _PROT_WRITE | _PROT_EXEC
_PR_SET_SECCOMP = 22
_CLONE_THREAD = 0x10000


def _strict() -> Iterator[Rule]:
    """Refuse memory that is writable and executable at once, and memory that becomes executable.

    Only files of a mount that is not noexec can then be mapped executable, and the plugin can write to none of these
    (layer filesystem); files in memory, which have no mount that says so, are not made.
    The kernel still gives a program what its own file declares at exec: a segment that is writable and executable, an
    executable stack. Forks are the business of ``sealing_rules``: pid 1 lives under these rules and has to fork the
    sidecar.
    """
    yield "mmap", DENY, (Equal(2, _BOTH, _BOTH),)
    for call in ("mprotect", "pkey_mprotect"):
        yield from _either(call, AnyBit(2, _PROT_EXEC), DENY, ALLOW)
    yield from _either("shmat", AnyBit(2, _SHM_EXEC), DENY, ALLOW)
    for call in ("memfd_create", "execveat", "fork", "vfork"):
        yield call, DENY, ()


def sealing_rules() -> Iterator[Rule]:
    """The second filter of ``strict``, which the sidecar's process gets just before its exec: it starts no other.

    Everything that this does not name is allowed by it, and still judged by the first filter. Threads stay possible,
    and so does execve: a filter cannot tell the first one, which starts the sidecar, from a second. A program that
    execs another is replaced by it, in the same cage and under the same filters. Nor does it load filters of its own:
    no cap counts the memory of their compiled programs (``_host_wide``), of 32,768 instructions for each thread.
    Refusals are EPERM and are not recorded by name: a process has one listener, the first filter's.
    """
    yield "prctl", REFUSE, (Equal(0, WORD, _PR_SET_SECCOMP),)
    for call in ("fork", "vfork"):
        yield call, REFUSE, ()
    yield "clone", REFUSE, (Equal(0, _CLONE_THREAD, 0),)


def _only(call: str, index: int, values: Iterable[int], *, inside: str, outside: str) -> Iterator[Rule]:
    for value in values:
        yield call, inside, (Equal(index, WORD, value),)
    yield call, outside, ()


def _either(call: str, condition: Condition, holds: str, otherwise: str) -> Iterator[Rule]:
    yield call, holds, (condition,)
    yield call, otherwise, ()
