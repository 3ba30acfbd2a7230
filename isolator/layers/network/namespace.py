"""The content of the network layer: a namespace with only ``lo`` per cage, its ruleset, and the broker's sockets in it.

``make`` makes the namespace and the sockets, which are the same for every cage, in a thread of its own that unshares
the network and ends: the namespace lives on in ``netns_fd`` and in the sockets. It may load a policy's ruleset, too;
where that is not the cage's own (``is_loaded``), nothing may run there until ``load`` has replaced it. The process of a
cage enters it with ``setns``; the broker gets the sockets, made inside but served from outside; whatever is not one of
those sockets has no way out. When the last descriptor is closed the kernel removes the namespace with everything in it,
so there is nothing to clear after a crash.

The kernel numbers each change of a namespace's rules (the generation): ``confirm`` asks whether it is still the one
that loading made. ``watch`` reports a change when it happens, and reads the rules back, so that a change which was
undone is distinguished from one that was not.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
from collections.abc import Callable
from typing import TypeVar

from isolator.base.structs import struct_class
from isolator.errors import ConfinementError, UnavailableError
from isolator.layers.base import Control, Kept
from isolator.layers.network.ruleset import PORT, TABLE, render
from isolator.linux import netlink, netns, nftables
from isolator.linux.descriptors import owning
from isolator.linux.files import write_file
from isolator.linux.sysctl import NetworkSettings
from isolator.policy.addresses import bracketed
from isolator.policy.destinations import Rules
from isolator.policy.model import ListenRule, NetworkPolicy

T = TypeVar("T")

RESOLVER = "127.0.0.53"
"""The name server of a cage's ``/etc/resolv.conf``."""
BACKLOG = 128
INSTALL = "apt-get install libnftables1"

# The owner of a redirected connection's buffers is the broker, not the cage's cgroup: without a cap, 64 flows could
# pin 64 times 33 MB there. Per namespace since Linux 4.15. No cgroup counts what is left of a connection for a minute
# (TIME_WAIT, 256 bytes), all are in one table of the host's, and each namespace may fill half of it by default.
_SYSCTLS = {
    "ip_unprivileged_port_start": "0",
    "tcp_max_tw_buckets": "1024",
    "tcp_rmem": "4096 131072 2097152",
    "tcp_wmem": "4096 65536 2097152",
}
"""Settings of IPv4, by name."""
_CORE = {"optmem_max": "4096", "tstamp_allow_data": "0"}
"""Settings of all sockets, by name, where they are the namespace's own (Linux 6.8, and a later one). No cgroup counts
what options of a socket take, nor its error queue, where copies wait of what it has sent with a time stamp."""
_settings = NetworkSettings()


@struct_class()
class CageNetwork:
    """A prepared network namespace. Its holder owns its descriptors; ``release`` closes them."""

    netns_fd: int
    """The namespace, until ``settle``; then -1."""
    sockets: list[int]
    """TCP v4, TCP v6, DNS UDP, DNS TCP, NFLOG: for the broker, in every mode."""
    generations: netlink.Generations
    """Asks for the generation of the namespace's ruleset, and hears of changes, from whichever namespace the caller is
    in. Its socket leads to the namespace, too."""
    inode: int
    """The namespace's number."""
    ruleset: str = ""
    """The ruleset as the kernel gave it back while nobody had changed it; from ``watch`` on."""
    generation: int = 0
    """The kernel's number of that ruleset."""
    loaded: str = ""
    """The ruleset as it was loaded, in nft's language."""


def make(policy: NetworkPolicy | None = None) -> CageNetwork:
    """Make a namespace and the broker's sockets, and load the policy's ruleset, unless that fails; see ``is_loaded``.

    Raises ConfinementError. Safe in any thread; the caller's namespace does not change.
    """
    text = _ruleset(policy) if policy is not None else ""

    def build() -> CageNetwork:
        network = _build()
        if text:
            with contextlib.suppress(OSError):  # ``load`` says why
                _load(network, text)
        return network

    try:
        return netns.in_new_network(build)
    except OSError as error:
        raise ConfinementError("network", str(error), _remedy(error)) from error


def is_loaded(network: CageNetwork, policy: NetworkPolicy) -> bool:
    """Whether the policy's ruleset is the one that was loaded, and nobody has changed it since."""
    try:
        return network.loaded == _ruleset(policy) and network.generations.current() == network.generation
    except OSError:
        return False


def load(network: CageNetwork, policy: NetworkPolicy) -> None:
    """Put the policy's ruleset in force in place of another; raises ConfinementError. Safe in any thread."""
    text = _ruleset(policy)
    try:
        _inside(network, lambda: _load(network, text))
    except OSError as error:
        raise ConfinementError("network", str(error), _remedy(error)) from error


def prepare(policy: NetworkPolicy) -> CageNetwork:
    """As ``make``, with the ruleset in force; raises ConfinementError."""
    network = make(policy)
    try:
        if not is_loaded(network, policy):
            load(network, policy)
    except BaseException:
        release(network)
        raise
    return network


def reopen(network: CageNetwork) -> list[int]:
    """Fresh listeners and NFLOG socket for a new broker, in the order of ``sockets``; raises ConfinementError.

    The old broker's must be closed: the addresses are the same.
    """
    try:
        return _inside(network, lambda: _detach(_open_sockets()))
    except OSError as error:
        raise ConfinementError("network", f"fresh listeners: {error}", "is the old broker still running?") from error


def host_listeners(policy: NetworkPolicy) -> list[int]:
    """A listener in the caller's own namespace for each of the policy's ``listen`` rules, in their order.

    The broker gets them after ``sockets``. Raises UnavailableError when a port is taken.
    """
    opened: list[socket.socket] = []
    try:
        for rule in policy.listen:
            opened.append(_host_listener(rule))
    except UnavailableError:
        for sock in opened:
            sock.close()
        raise
    return _detach(opened)


def connectors(network: CageNetwork, count: int, *, version: int = 4) -> list[int]:
    """Unconnected TCP sockets that live inside the cage's network; raises UnavailableError when it has ended.

    Connecting one reaches the cage's own loopback, whoever does it, and nothing else that the ruleset does not allow:
    it is how the broker, outside, gets a connection to a port of the cage. Loopback traffic needs no rule of its own.
    """
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    try:
        return _inside(network, lambda: _detach([socket.socket(family) for _ in range(count)]))
    except OSError as error:
        if error.errno == errno.EBADF:
            raise UnavailableError("the cage's network", "has ended", "nothing is to be done") from None
        raise UnavailableError("sockets in the cage's network", error.strerror or str(error), "try again") from None


def confirm(network: CageNetwork, policy: NetworkPolicy) -> None:
    """Read back that the ruleset is the one that was loaded; raises ConfinementError when it is not."""
    if network.loaded not in ("", _ruleset(policy)):  # not known any more after an exec of this process
        raise ConfinementError("network", "the cage's ruleset is that of another policy", "the cage was destroyed")
    try:
        generation = network.generations.current()
        if generation == network.generation:
            return
        found = _inside(network, _list_ruleset)
    except OSError as error:
        raise ConfinementError("network", f"the ruleset cannot be read back: {error}", _remedy(error)) from error
    if not network.ruleset or found != network.ruleset:
        lost = "it is empty" if TABLE not in found else "it was changed"
        raise ConfinementError("network", f"the cage's ruleset is not the one that was loaded: {lost}")
    network.generation = generation


def watch(network: CageNetwork) -> int:
    """A descriptor that becomes readable when the cage's ruleset changes: then ``confirm``, which reads it empty.

    It stays the network's.
    """
    network.generations.watch()
    if not network.ruleset:
        _read_back(network)
    return network.generations.fileno()


_read: dict[str, str] = {}
"""What the kernel gives back of a ruleset, by the text that was loaded: the same in every namespace."""
_MOST_READ = 256


def _read_back(network: CageNetwork) -> None:
    """Note the ruleset as it is given back, unless somebody has changed it. A plugin's is read at its first start."""
    found = _read.get(network.loaded) or _inside(network, _list_ruleset)
    if network.generations.current() != network.generation:
        return
    network.ruleset = found
    if network.loaded and network.loaded not in _read:
        if len(_read) >= _MOST_READ:
            del _read[next(iter(_read))]
        _read[network.loaded] = found


def settle(network: CageNetwork) -> None:
    """Close the descriptor of the namespace: what is still asked for later finds it by the socket."""
    if network.netns_fd >= 0:
        fd, network.netns_fd = network.netns_fd, -1
        os.close(fd)


def hand_over(network: CageNetwork) -> Kept:
    """State for ``adopt`` after this process's exec; the broker has the sockets.

    An earlier version of this program needs the namespace's own descriptor.
    """
    if network.netns_fd < 0:
        network.netns_fd = network.generations.namespace()
    values = {"inode": network.inode, "ruleset": network.ruleset, "generation": network.generation}
    return Kept(values, {"netns": network.netns_fd, "generations": network.generations.fileno()})


def adopt(kept: Kept) -> CageNetwork:
    """The network of a cage that runs since before this process's exec; raises OSError."""
    values = kept.values
    generations = netlink.Generations(socket.socket(fileno=kept.fds["generations"]))
    inode, number = int(values["inode"]), int(values["generation"])
    return CageNetwork(kept.fds["netns"], [], generations, inode, str(values["ruleset"]), number)


def tcp_memory_of_nobody(network: CageNetwork) -> int:
    """Bytes held for the cage's TCP connections that no process has, its own or the broker; raises OSError."""
    return _inside(network, lambda: netlink.tcp_memory_of_nobody(but_port=PORT))


def release(network: CageNetwork) -> None:
    """Close every descriptor that is still held; idempotent. The namespace goes when its last process and socket do."""
    close_sockets(network)
    network.generations.close()
    settle(network)


def _inside(network: CageNetwork, work: Callable[[], T]) -> T:
    """Do ``work`` in the namespace; raises OSError, EBADF once it was released, perhaps by another thread just now."""
    opened = [network.generations.namespace()]

    def entered() -> T:
        os.close(opened.pop())  # before the work, which may leave this thread with a table of its own (nftables)
        return work()

    try:
        if os.fstat(opened[0]).st_ino != network.inode:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return netns.in_network(opened[0], entered)
    finally:
        for fd in opened:
            os.close(fd)


def close_sockets(network: CageNetwork) -> None:
    """Close the broker's sockets here, once it has its own: a kept copy would let connects hang if the broker dies."""
    while network.sockets:
        with contextlib.suppress(OSError):
            os.close(network.sockets.pop())


def check() -> list[Control]:
    """The layer's controls on this host, tried for real in a throw-away namespace."""
    missing = nftables.available()
    if missing is not None:
        return [Control("network", "network", "unavailable", f"libnftables cannot be loaded: {missing}", INSTALL)]
    policy = NetworkPolicy(mode="public")
    try:
        network = prepare(policy)
        try:
            confirm(network, policy)
        finally:
            release(network)
    except ConfinementError as error:
        return [Control("network", "network", "unavailable", error.why, error.remedy)]
    controls = [Control("network", "network", "enforced", "a namespace with lo alone, nftables")]
    if not netlink.has_ipv6():
        why = "this kernel has no IPv6; cages have none either"
        controls.append(Control("network-ipv6", "network", "enforced", why))
    return controls


def _build() -> CageNetwork:
    """Build the network, in the thread of the new namespace."""
    with contextlib.ExitStack() as undo:
        fd = netns.current_network()
        undo.callback(os.close, fd)
        netlink.bring_up_loopback()
        _set_sysctls()
        generations = netlink.Generations()
        undo.callback(generations.close)
        sockets = _open_sockets()
        undo.pop_all()
    return CageNetwork(fd, _detach(sockets), generations, os.fstat(fd).st_ino)


def _set_sysctls() -> None:
    with owning(_settings.open()) as folder:
        for name, value in _SYSCTLS.items():
            write_file(name, value, folder=folder)
        for name, value in _CORE.items():
            with contextlib.suppress(FileNotFoundError):
                write_file(f"../core/{name}", value, folder=folder)


@functools.lru_cache(_MOST_READ)
def _ruleset(policy: NetworkPolicy) -> str:
    return render(Rules(policy))


def _load(network: CageNetwork, text: str) -> None:
    """Load the rules, in a thread that is in the namespace: one transaction, taken whole or not at all."""
    with nftables.Nftables() as nft, contextlib.closing(netlink.Generations()) as generations:
        nft.run(text)
        network.generation, network.loaded = generations.current(), text


def _list_ruleset() -> str:
    with nftables.Nftables() as nft:
        return nft.run("list ruleset")


def _open_sockets() -> list[socket.socket]:
    opened: list[socket.socket] = []
    try:
        opened.append(_listener(socket.AF_INET, "127.0.0.1", PORT))
        # Without IPv6 an unconnected socket takes the place of its listener: the order is the contract.
        opened.append(_listener(socket.AF_INET6, "::1", PORT) if netlink.has_ipv6() else socket.socket(socket.AF_UNIX))
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.append(udp)
        udp.bind((RESOLVER, 53))
        opened.append(_listener(socket.AF_INET, RESOLVER, 53))
        opened.append(netlink.open_nflog())
    except OSError:
        for sock in opened:
            sock.close()
        raise
    return opened


def _listener(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # The connections of the broker before this one may still be in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _host_listener(rule: ListenRule) -> socket.socket:
    family = socket.AF_INET6 if ":" in rule.address else socket.AF_INET
    try:
        return _listener(family, rule.address, rule.port)
    except OSError as error:
        why = {
            errno.EADDRINUSE: "another program listens there already",
            errno.EADDRNOTAVAIL: "this host has no such address",
        }.get(error.errno or 0, error.strerror or str(error))
        remedy = "stop it, or grant another port in the policy's listen"
        raise UnavailableError(f"listening on {bracketed(rule.address)}:{rule.port}", why, remedy) from None


def _detach(sockets: list[socket.socket]) -> list[int]:
    return [sock.detach() for sock in sockets]


def _remedy(error: OSError) -> str:
    if isinstance(error, nftables.NftablesError):
        return "the kernel needs nf_tables with nat, reject, log, limit, connlimit and numgen"
    if nftables.available() is not None:
        return INSTALL
    return "run as root on a kernel with network namespaces and nf_tables"
