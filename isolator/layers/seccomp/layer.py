"""System calls: an allowlist, compiled once and loaded as plain BPF.

allowed        the calls of ordinary services (isolator/layers/seccomp/profiles.py)
denied         calls that only an attack or a mistake makes: handed to a user-notify listener, which answers EPERM and
               writes an audit record with the call's name. Notify only ever denies: a decision to allow on the
               strength of a pointer could be changed under the supervisor's eyes
lent           a socket that lists network interfaces: the notifier makes it in the cage's network and hands it over,
               for the arguments in the registers alone, up to a number at once
narrowed       some ordinary calls fail, or do nothing, for certain arguments, without a record: programs ask all the
               time
unknown        ENOSYS, so that a newer C library falls back to an older call; no record
other ABIs     the process is killed (i386, x32): their numbers mean other calls

The filter does not depend on the plugin, only on the profile, so it is compiled once and kept by the hash of its
source. libseccomp knows the numbers of the calls, isolator/layers/seccomp/bpf.py makes the program.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import TYPE_CHECKING

from isolator.layers.base import CageSpec, Control, Kept, Layer, Process, mismatch
from isolator.layers.plan import Plan, Section
from isolator.linux import seccomp
from isolator.linux.files import read_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from isolator.layers.seccomp.profiles import Rule
    from isolator.policy.model import EffectivePolicy


_DIGEST = 32
_INSTALL = "apt-get install libseccomp2"
_MOST = 1 << 20
"""Bytes of a kept program; the kernel takes 32 KiB."""

SEALING = "strict-sealing"
"""The second program of the profile ``strict``, stacked on the first one in the sidecar's own process."""

LISTENER = "seccomp_listener"
"""Among the child's descriptors once the filter is loaded: the listener of denied calls, for the supervisor."""


class SeccompSection(Section, kind="seccomp"):
    """The compiled programs: of the profile, and the one that only the sidecar's own process gets (or nothing)."""

    program: bytes
    sealing: bytes = b""

    def enter(self, fds: dict[str, int]) -> None:
        fds[LISTENER] = seccomp.load_filter(self.program, listener=True)

    def seal(self) -> None:
        """Load the second program into the calling process: the sidecar's, just before its exec."""
        seccomp.add_filter(self.sealing)


class Seccomp(Layer):
    """Only the calls of the profile; those that attacks need are recorded by name."""

    name = "seccomp"

    @classmethod
    def check(cls) -> list[Control]:
        def unavailable(reason: str, remedy: str) -> list[Control]:
            return [Control("system call filter", cls.name, "unavailable", reason, remedy)]

        try:
            available = seccomp.action_available(seccomp.RET_USER_NOTIF)
        except OSError as error:
            return unavailable(str(error.strerror), "enable CONFIG_SECCOMP")
        try:
            import pyseccomp  # noqa: F401
        except (ImportError, RuntimeError) as error:
            return unavailable(str(error), _INSTALL)
        if not available:
            return unavailable("no user notification", "use kernel 5.0 or newer")
        return [Control("system call filter", cls.name, "enforced", "allowlist, denied calls recorded by name")]

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        strict = (
            "; no new process after the first exec, and no memory that it asks for is writable and executable at once"
        )
        return (
            f'System calls of the profile "{policy.syscalls}": those of ordinary programs only'
            f"{strict if policy.syscalls == 'strict' else ''}; any other call has no effect, and one that attacks need"
            " is recorded by name."
        )

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        program = compiled(spec.policy.syscalls, spec.cache)
        sealing = compiled(SEALING, spec.cache) if spec.policy.syscalls == "strict" else b""
        plan.add(SeccompSection(program, sealing))

    def adopt(self, spec: CageSpec, kept: Kept) -> None:
        """Take over nothing: ``confirm`` compares with no value of its own."""

    def confirm(self, process: Process) -> None:
        found = process.status.get("Seccomp")
        if found != "2":
            raise mismatch(self.name, "Seccomp", "2 (filter)", found)


_compiled: dict[str, bytes] = {}


def compiled(profile: str, cache: Path) -> bytes:
    """The BPF program of a profile, from memory, from the root-owned cache, or compiled now."""
    return _kept(profile, f"{fingerprint()}:{profile}", cache, lambda: compile_profile(profile))


def compiled_rules(name: str, rules: Iterable[Rule], cache: Path) -> bytes:
    """The BPF program of rules that are no profile, kept likewise; ``name`` only tells the cache's files apart."""
    wanted = list(rules)
    return _kept(name, f"{fingerprint()}:{name}:{wanted!r}", cache, lambda: compile_rules(wanted))


@functools.cache
def fingerprint() -> str:
    """A digest that changes with any rule of any profile, and with the compiler; importing either takes longer."""
    import hashlib
    from pathlib import Path

    sources = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in ("profiles", "bpf")]
    return hashlib.sha256(b"".join(sources)).hexdigest()


def _kept(name: str, source: str, cache: Path, make: Callable[[], bytes]) -> bytes:
    if source not in _compiled:
        import hashlib

        digest = hashlib.sha256(source.encode()).hexdigest()[:32]
        path = cache / f"seccomp-{name}-{digest}.filter"
        program = _stored(path)
        if program is None:
            program = make()
            _store(path, program)
        _compiled[source] = program
    return _compiled[source]


def _stored(path: Path) -> bytes | None:
    """The program that ``_store`` kept; None when there is none, or it is damaged."""
    import hashlib

    try:
        content = read_plain(path, most=_MOST)
    except OSError:
        return None
    program, digest = content[:-_DIGEST], content[-_DIGEST:]
    return program if program and hashlib.sha256(program).digest() == digest else None


def _store(path: Path, program: bytes) -> None:
    """Keep a program, and its SHA-256 after it: a power cut or a full disk may leave an empty file."""
    import hashlib
    import tempfile

    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        fd, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(fd, "wb") as out:
                out.write(program + hashlib.sha256(program).digest())
            os.replace(temporary, path)  # both names are in the same root-owned folder
        except BaseException:
            os.unlink(temporary)
            raise


def compile_profile(profile: str) -> bytes:
    """Compile a profile, or ``SEALING`` (needs libseccomp's shared library)."""
    from isolator.layers.seccomp import profiles as syscalls

    if profile == SEALING:
        return compile_rules(syscalls.sealing_rules(), otherwise_allowed=True)
    return compile_rules(syscalls.rules(profile))


def compile_rules(rules: Iterable[Rule], *, otherwise_allowed: bool = False) -> bytes:
    """Compile rules to BPF. A call that no rule names is answered ENOSYS, a denied one is handed to a listener.

    ``otherwise_allowed`` is for a filter that is stacked on another one: calls that no rule names are left to that one.
    """
    import errno

    from isolator.errors import ConfinementError

    try:
        import pyseccomp as lib
    except (ImportError, RuntimeError) as error:
        raise ConfinementError("system call filter", str(error), _INSTALL) from None

    from isolator.layers.seccomp import bpf
    from isolator.layers.seccomp import profiles as syscalls

    answers = {
        syscalls.ALLOW: seccomp.RET_ALLOW,
        syscalls.DENY: seccomp.RET_USER_NOTIF,
        syscalls.LEND: seccomp.RET_USER_NOTIF,
        syscalls.NO_FAMILY: seccomp.RET_ERRNO | errno.EAFNOSUPPORT,
        syscalls.REFUSE: seccomp.RET_ERRNO | errno.EPERM,
        syscalls.NO_PROTOCOL: seccomp.RET_ERRNO | errno.EPROTONOSUPPORT,
        syscalls.INVALID: seccomp.RET_ERRNO | errno.EINVAL,
        syscalls.PRETEND: seccomp.RET_ERRNO,
    }
    calls: dict[int, list[bpf.Judged]] = {}
    for name, action, conditions in rules:
        try:
            number = lib.resolve_syscall(lib.Arch.NATIVE, name)
        except (ValueError, RuntimeError):
            continue  # this architecture or this libseccomp does not know the name: it stays unknown, ENOSYS
        if number >= 0:
            calls.setdefault(number, []).append(bpf.Judged(answers[action], conditions))
    otherwise = seccomp.RET_ALLOW if otherwise_allowed else seccomp.RET_ERRNO | errno.ENOSYS
    return bpf.compile_calls(calls, otherwise=otherwise, arch=lib.system_arch())
