"""Cages for attacks, with parts of them left out on purpose, inside a pretend host.

The pretend host is a network namespace of the test's own in which every address that an attempt goes for exists and
answers: what a cage without its network layer sends stays on this machine.

A cage is furnished like a plugin's: a state folder, a socket folder, files of its own, a terminal as standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isolator.cage.cage import Cage
from isolator.launcher import client
from isolator.layers.base import Bind, CageSpec, Kept, Layer, Process
from isolator.layers.cgroup.subtree import find_hierarchies
from isolator.layers.filesystem import AttachMount, FilesystemSection
from isolator.layers.namespaces import NamespacesSection
from isolator.layers.plan import Plan
from isolator.linux import mount, netns, nftables
from isolator.paths import Paths
from isolator.policy.host import HostConfig
from isolator.policy.model import EffectivePolicy, FilesystemPolicy, NetworkPolicy, ResourcePolicy
from isolator.probe.attacks import battery
from isolator.probe.run import Finding, Target, attack
from isolator.recovery.journal import Journal
from isolator.standalone.records import Records
from isolator.standalone.session import StandaloneSession, run_spec
from isolator.volume.volume import Volume

MIB = 1 << 20

POLICY = EffectivePolicy(
    plugin="probe",
    network=NetworkPolicy(mode="none"),
    resources=ResourcePolicy(memory=48 * MIB, memory_high=44 * MIB, cpu=300, tasks=24, nofile=512),
    filesystem=FilesystemPolicy(state=2 * MIB, state_inodes=64, tmp=2 * MIB, tmp_inodes=128, shm=1 * MIB),
)
"""Small caps, so that going over them is quick and harmless when nothing stops it."""

Edit = Callable[[Plan, "WeakenedCage"], None]


@dataclass(frozen=True)
class Weakness:
    """A cage's weakness: whole layers left out, edits of the plan, or furniture without its caps."""

    without: frozenset[str] = frozenset()
    edits: tuple[Edit, ...] = ()
    uncapped: bool = False
    template: str = ""
    """Statements that the launcher runs before it builds the template of all cages."""


class WeakenedCage(Cage):
    """A cage whose plan can be weakened after the layers have made it; nobody reads back what was weakened."""

    def __init__(self, *args: Any, weakness: Weakness, **others: Any) -> None:
        super().__init__(*args, without=weakness.without, **others)
        if weakness.edits or weakness.template:
            for layer in self._layers:
                layer.confirm = lambda process: None
            self._layers.append(_Edits(self, weakness.edits))


class _Edits(Layer):
    name = "edits"

    def __init__(self, cage: WeakenedCage, edits: tuple[Edit, ...]) -> None:
        self._cage, self._edits = cage, edits

    @classmethod
    def check(cls) -> list[Any]:
        return []

    @classmethod
    def describe(cls, policy: EffectivePolicy) -> str:
        return ""

    def prepare(self, spec: CageSpec, plan: Plan) -> None:
        for edit in self._edits:
            edit(plan, self._cage)

    def adopt(self, spec: CageSpec, kept: Kept) -> None:
        pass

    def confirm(self, process: Process) -> None:
        pass


# --- edits of the template -----------------------------------------------------------------------------------

HOST_VIEW = """
import isolator.launcher.server
from isolator.linux import mount, namespaces
def private_copy_of_the_host():
    namespaces.unshare(namespaces.CLONE_NEWNS)
    mount.set_propagation("/", mount.MS_PRIVATE)
isolator.launcher.server.build_template = private_copy_of_the_host
"""
HOST_IPC = """
import isolator.launcher.prefork
isolator.launcher.prefork.BEFORE_THE_PLAN = ("mnt", "uts")
"""
UNCOVERED = """
from isolator.layers.proc import layer
layer._cover = lambda: None
"""
HOST_CLOCK = """
from isolator.linux import namespaces
namespaces.CLONE_NEWTIME = 0
"""
HOST_PIDS = """
import isolator.launcher.prefork
isolator.launcher.prefork.AT_BIRTH = ()
"""
MANY_TERMINALS = """
from isolator.layers import filesystem
filesystem._TERMINAL_OPTIONS = "newinstance,ptmxmode=0666,mode=0600"
"""
SET_ID_FILES = """
from isolator.layers import filesystem
filesystem._READ_ONLY &= ~filesystem.mount.NOSUID
"""


@contextlib.contextmanager
def template(statements: str) -> Iterator[None]:
    whole = client._BOOT
    path, _, rest = whole.partition("; from ")
    client._BOOT = f"{path}\n{statements}\nfrom {rest}"
    try:
        yield
    finally:
        client._BOOT = whole


# --- edits of the plan ---------------------------------------------------------------------------------------


def battery_of_the_host(plan: Plan, _: WeakenedCage) -> None:
    """Without a view of its own the cage finds the battery where it lies on the host."""
    folder = Path(battery.__file__).parents[1]
    plan.argv[3] = f"import sys; sys.path.insert(0, {str(folder)!r}); from attacks.battery import main; main()"


def host_name(plan: Plan, _: WeakenedCage) -> None:
    plan.add(NamespacesSection(socket.gethostname()))


def no_cgroup_namespace(plan: Plan, _: WeakenedCage) -> None:
    """The other namespaces come with the clone; this one is unshared by the child."""
    del plan.sections["namespaces"]


def host_groups(plan: Plan, _: WeakenedCage) -> None:
    """The hierarchies' tops in place of the cage's leaves, as a mount without a leaf of its own would show them."""
    found = find_hierarchies()
    for name in [name for name in plan.fds if name.startswith("group ")]:
        top = found.v1.get(name.removeprefix("group "), found.unified)
        assert top is not None
        plan.own(name, mount.clone_tree(str(top), recursive=False))


def writable_plugin(plan: Plan, _: WeakenedCage) -> None:
    view = plan.section(FilesystemSection)
    assert view is not None
    for one in view.operations:
        if isinstance(one, AttachMount) and one.target == "plugin":
            mount.set_attributes(plan.fds[one.fd], 0, clear=mount.RDONLY)


def open_descriptor(plan: Plan, _: WeakenedCage) -> None:
    plan.argv[:] = ["/bin/bash", "-c", 'exec 7</usr; exec "$@"', "bash", *plan.argv]


def leaked_environment(plan: Plan, _: WeakenedCage) -> None:
    plan.env["LEAKED"] = os.environ["ISOLATOR_PROBE"]


def no_rules(_: Plan, cage: WeakenedCage) -> None:
    load = cage._network.load

    def flush() -> None:
        with nftables.Nftables() as nft:
            nft.run("flush ruleset")

    def load_and_flush(spec: CageSpec) -> None:
        load(spec)
        flush()  # this thread is in the namespace, and has left the descriptor of it

    cage._network.load = load_and_flush
    cage._network.is_loaded = lambda _: False  # or those that were loaded ahead stay


# --- the pretend host ----------------------------------------------------------------------------------------

_ADDRESSES = ("169.254.169.254", "10.0.0.1", "192.88.99.1", "198.51.100.53", "fd00:ec2::254", "2001:db8::53")
_SERVICES = (
    ("169.254.169.254", 80),
    ("fd00:ec2::254", 80),
    ("10.0.0.1", 443),
    ("192.88.99.1", 4444),
    ("198.51.100.53", 53),
)


def in_pretend_host(work: Callable[[], Any]) -> Any:
    """Run ``work`` in a thread whose network is one in which every target of the battery exists."""

    def body() -> Any:
        _ip("link set lo up")
        _ip("link add probe0 type veth peer name probe1")
        _ip("route add 224.0.0.0/4 dev lo")
        for address in _ADDRESSES:
            _ip(f"addr add {address} dev lo" + (" nodad" if ":" in address else ""))
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")
        with contextlib.ExitStack() as stack:
            for address, port in _SERVICES:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                stack.enter_context(socket.create_server((address, port), family=family))
            return work()

    return netns.in_new_network(body)


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


# --- attacks -------------------------------------------------------------------------------------------------


@dataclass
class Range:
    """A root directory for cages, and what they are furnished with."""

    root: Path
    host: HostConfig = field(default_factory=HostConfig)
    policy: EffectivePolicy = POLICY

    def attack(self, names: list[str] | None, weakness: Weakness = Weakness()) -> dict[str, Finding]:
        """Make attempts in a cage with a weakness; findings by name."""
        found: dict[str, Finding] = in_pretend_host(lambda: asyncio.run(self._attack(names, weakness)))
        return found

    async def _attack(self, names: list[str] | None, weakness: Weakness) -> dict[str, Finding]:
        paths = Paths.of(self.root)
        for folder in (paths.lib, paths.etc, paths.log):
            folder.mkdir(parents=True, exist_ok=True)
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(template(weakness.template))
            session = await stack.enter_async_context(StandaloneSession(paths))
            lease = session.lease(self.host)
            with self._furniture(lease.uid, session.runtime.journal, weakness) as furnish:

                def spec(run: str, argv: list[str], owned: list[int]) -> CageSpec:
                    return furnish(run_spec(paths, self.policy, argv, run, lease.uid, owned), owned)

                target = Target(
                    spec, self.host, inline=self.policy.syscalls == "strict", cage_type=WeakenedCage,
                    further={"weakness": weakness},
                )  # fmt: skip
                with contextlib.closing(Records(None, "probe", quiet=True)) as records:
                    return {f.name: f async for f in attack(session, target, records, names)}

    @contextlib.contextmanager
    def _furniture(self, uid: int, journal: Journal, weakness: Weakness) -> Iterator[Callable[..., CageSpec]]:
        fs = self.policy.filesystem
        plugin = self.root / "plugin"
        plugin.mkdir(exist_ok=True)
        os.chown(plugin, uid, uid)
        state = Volume(self.root / "state", "probe", journal)
        plain = self.root / "plain"
        plain.mkdir(exist_ok=True)
        os.chown(plain, uid, uid)

        def furnish(spec: CageSpec, owned: list[int]) -> CageSpec:
            def bind(target: str, fd: int, **how: bool) -> None:
                owned.append(fd)
                spec.binds.append(Bind(target, fd, **how))

            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            bind("/plugin", os.open(plugin, flags))
            folder = (
                os.open(plain, flags)
                if weakness.uncapped
                else state.open(size=fs.state, inodes=fs.state_inodes, uid=uid, gid=uid)
            )
            bind("/state", folder, writable=True)
            options = {"mode": "0700", "uid": str(uid), "gid": str(uid)}
            if not weakness.uncapped:
                options |= {"size": "64k", "nr_inodes": "16"}
            attributes = mount.NOSUID | mount.NODEV | mount.NOEXEC
            owned.append(mount.new_filesystem("tmpfs", options, attributes=attributes))
            spec.mounts = {"/run/isolator/plugin": owned[-1]}
            spec.policy = self.policy
            return spec

        try:
            yield furnish
        finally:
            state.remove()
