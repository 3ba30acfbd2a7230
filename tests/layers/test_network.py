"""The network layer: what the ruleset stops by itself, that a changed ruleset is noticed, that nothing leaks."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isolator.broker import nflog
from isolator.errors import ConfinementError, UnavailableError, UsageError
from isolator.layers.network import namespace as network
from isolator.layers.network.layer import Network
from isolator.linux import netlink, netns
from isolator.policy.model import EffectivePolicy, EgressRule, NetworkPolicy
from tests.broker.conftest import listed
from tests.support.descriptors import open_descriptors
from tests.support.timeouts import seconds

PUBLIC = NetworkPolicy(mode="public")
LISTED = listed("hooks.example.com:443", "9.9.9.0/24:8080", "2620:fe::/48:8080")

Make = Callable[[NetworkPolicy], network.CageNetwork]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[network.CageNetwork] = []

    def prepare(policy: NetworkPolicy) -> network.CageNetwork:
        made.append(network.prepare(policy))
        return made[-1]

    yield prepare
    for item in made:
        network.release(item)


def connect(cage: network.CageNetwork, address: str, port: int) -> str:
    """Try to connect inside the cage: ``ok`` or the error's name."""

    def attempt() -> str:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
            sock.settimeout(2)
            try:
                sock.connect((address, port))
            except OSError as error:
                return errno.errorcode.get(error.errno or 0, type(error).__name__)
            return "ok"

    return netns.in_network(cage.netns_fd, attempt)


def denials(cage: network.CageNetwork) -> list[nflog.Refused]:
    """The refusals that the ruleset has logged so far."""
    found = []
    with socket.socket(fileno=os.dup(cage.sockets[4])) as log:
        log.setblocking(False)
        try:
            while True:
                found += [nflog.read(prefix, data) for prefix, data in netlink.parse_nflog(log.recv(65536))]
        except BlockingIOError:
            return found


@pytest.mark.vm
def test_listed_mode_lets_through_virtual_addresses_and_granted_networks_only(make: Make) -> None:
    cage = make(LISTED)
    assert connect(cage, "198.18.0.5", 443) == "ok"
    assert connect(cage, "9.9.9.9", 8080) == "ok"
    assert connect(cage, "2620:fe::9", 8080) == "ok"
    for address, port in (
        ("198.18.0.5", 80),
        ("198.19.255.1", 443),
        ("9.9.9.9", 443),
        ("9.9.8.9", 8080),
        ("2620:fe::9", 443),
        ("2001:4860:4860::8888", 443),
        ("169.254.169.254", 80),
        ("127.0.0.1", 9),
        ("127.0.0.1", 65053),
        ("::1", 65053),
    ):
        assert connect(cage, address, port) == "ECONNREFUSED", (address, port)


@pytest.mark.vm
def test_every_refusal_is_logged_with_destination(make: Make) -> None:
    cage = make(LISTED)
    connect(cage, "10.1.2.3", 443)
    connect(cage, "2001:4860:4860::8888", 53)

    def udp() -> int | None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.sendto(b"x", ("8.8.8.8", 53))
            except OSError as error:
                return error.errno
        return None

    assert netns.in_network(cage.netns_fd, udp) == errno.EPERM
    found = [(item.kind, item.protocol, str(item.address), item.port, item.count) for item in denials(cage)]
    assert found == [
        ("refused", "tcp", "10.1.2.3", 443, 1),
        ("refused", "tcp", "2001:4860:4860::8888", 53, 1),
        ("refused", "udp", "8.8.8.8", 53, 1),
    ]


@pytest.mark.parametrize("target", ["8.8.8.8", "224.0.0.251", "255.255.255.255", "198.18.0.5", "10.0.0.1"])
def test_udp_is_refused_at_once(make: Make, target: str) -> None:
    cage = make(PUBLIC)

    def attempt() -> int | None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            try:
                sock.sendto(b"x", (target, 5353))
            except OSError as error:
                return error.errno
        return None

    assert netns.in_network(cage.netns_fd, attempt) in {errno.EPERM, errno.ENETUNREACH}


def test_ping_and_raw_packets_are_refused(make: Make) -> None:
    cage = make(PUBLIC)

    def ping() -> int | None:
        # As root: a plugin may not even make these sockets.
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
            try:
                sock.sendto(b"\x08\0\xf7\xff\0\0\0\0", ("8.8.8.8", 0))
            except OSError as error:
                return error.errno
        return None

    assert netns.in_network(cage.netns_fd, ping) == errno.EPERM
    assert [(item.kind, item.protocol) for item in denials(cage)] == [("refused", "icmp")]


def test_the_cages_own_loopback_works_and_is_not_tracked(make: Make) -> None:
    cage = make(NetworkPolicy(mode="none"))

    def talk() -> list[bytes]:
        got = []
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.create_server((address, 80), family=family) as server:
                client = socket.create_connection((address, 80), 2)
                peer, _ = server.accept()
                client.sendall(b"tcp")
                got.append(peer.recv(10))
                client.close()
                peer.close()
            with socket.socket(family, socket.SOCK_DGRAM) as one, socket.socket(family, socket.SOCK_DGRAM) as two:
                one.bind((address, 5000))
                two.sendto(b"udp", (address, 5000))
                got.append(one.recv(10))
        return got

    assert netns.in_network(cage.netns_fd, talk) == [b"tcp", b"udp", b"tcp", b"udp"]
    count = netns.in_network(
        cage.netns_fd,
        lambda: open("/proc/thread-self/net/nf_conntrack").read(),  # noqa: SIM115, PTH123
    )
    assert count == ""
    assert denials(cage) == []


def test_connections_that_have_ended_leave_few_buckets_behind(make: Make) -> None:
    """No memory cap counts them, and all networks of the host share one table."""
    cage = make(NetworkPolicy(mode="none"))

    def connect_again_and_again() -> int:
        with socket.create_server(("127.0.0.1", 80)) as server:
            for _ in range(2000):
                with socket.create_connection(("127.0.0.1", 80)):
                    server.accept()[0].close()
        lines = Path("/proc/thread-self/net/sockstat").read_text().splitlines()
        words = next(line.split() for line in lines if line.startswith("TCP:"))
        return int(words[words.index("tw") + 1])

    assert 500 < netns.in_network(cage.netns_fd, connect_again_and_again) <= 1024


def of_all_sockets(name: str) -> str | None:
    """The value of a setting in the caller's network; None where this kernel has one for all networks."""
    file = Path("/proc/sys/net/core", name)
    return file.read_text().strip() if file.exists() else None


def test_options_of_a_socket_take_a_page_at_most(make: Make) -> None:
    found = netns.in_network(make(NetworkPolicy(mode="none")).netns_fd, lambda: of_all_sockets("optmem_max"))
    if found is None:
        pytest.skip("this kernel has one limit for all networks (before Linux 6.8)")
    assert found == "4096"


def test_what_a_socket_sends_is_not_kept_for_its_time_stamp(make: Make) -> None:
    """In its error queue, which no memory cap counts; asked for packet by packet, as no filter of calls sees."""
    cage = make(NetworkPolicy(mode="none"))
    if netns.in_network(cage.netns_fd, lambda: of_all_sockets("tstamp_allow_data")) is None:
        pytest.skip("this kernel has one setting for all networks")

    def send() -> None:
        asked = (socket.SOL_SOCKET, 37, struct.pack("=I", 2))  # SO_TIMESTAMPING, SOF_TIMESTAMPING_TX_SOFTWARE
        kind = (socket.AF_INET, socket.SOCK_DGRAM)
        with socket.socket(*kind) as one, socket.socket(*kind) as two:
            one.bind(("127.0.0.1", 5000))
            two.sendmsg([b"stamped"], [asked], 0, ("127.0.0.1", 5000))
            assert one.recv(10) == b"stamped"
            with pytest.raises(BlockingIOError):
                two.recvmsg(100, 1000, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)

    # As a plugin: who has CAP_NET_RAW is given a copy whatever the setting.
    netns.in_network(cage.netns_fd, lambda: without_capabilities(send))


def without_capabilities(work: Callable[[], None]) -> None:
    """Do it in a child process."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setresuid(65534, 65534, 65534)
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_bulk_crosses_a_cages_loopback_in_large_packets(make: Make) -> None:
    """The kernel gives the size back where it knows it (Linux 6.3)."""
    cage = make(NetworkPolicy(mode="none"))
    get_link, header, size = 18, 16, 63

    def loopback() -> dict[int, bytes]:
        query = netlink.RouteQuery()
        try:
            (link,) = query.dump(get_link, header)
        finally:
            query.close()
        return dict(netlink.attributes(link[header:]))

    found = netns.in_network(cage.netns_fd, loopback)
    if size not in found:
        pytest.skip("this kernel has no packets of IPv4 beyond 64 KiB")
    assert int.from_bytes(found[size], sys.byteorder) > 1 << 18


@pytest.mark.vm
def test_new_connections_are_limited_in_rate_and_the_refusals_are_counted(make: Make) -> None:
    cage = make(PUBLIC)

    def storm() -> list[str]:
        results = []
        for _ in range(120):
            with socket.socket() as sock:
                try:
                    sock.connect(("1.1.1.1", 443))
                    results.append("ok")
                except ConnectionRefusedError:
                    results.append("refused")
        return results

    results = netns.in_network(cage.netns_fd, storm)
    # The burst passes; a slow machine may earn a few more while it tries.
    assert 40 <= results.count("ok") <= 63
    rate = [item for item in denials(cage) if item.kind == "over_rate"]
    assert rate and {(str(item.address), item.port) for item in rate} == {("1.1.1.1", 443)}


def test_open_connections_are_limited(make: Make) -> None:
    cage = make(NetworkPolicy(mode="public", connects_per_second=1000, connect_burst=1000, connects_open=8))

    def storm() -> tuple[int, str]:
        opened = []
        try:
            for _ in range(20):
                opened.append(socket.create_connection(("1.1.1.1", 443), 2))
        except ConnectionRefusedError:
            pass
        count = len(opened)
        opened.pop().close()
        # The place is free when both ends have closed; nobody serves here, so an RST from our side does it.
        for sock in opened:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
        # The kernel sweeps its list at most once a jiffy.
        end = time.monotonic() + 5
        while time.monotonic() < end:
            try:
                socket.create_connection(("1.1.1.1", 443), 2).close()
            except ConnectionRefusedError:
                continue
            return count, "ok"
        return count, "refused"

    assert netns.in_network(cage.netns_fd, storm) == (8, "ok")
    assert {item.kind for item in denials(cage)} == {"over_open"}


def test_a_flood_is_sampled_and_still_counted(make: Make) -> None:
    cage = make(NetworkPolicy(mode="none"))

    def flood() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _ in range(5000):
                try:
                    sock.sendto(b"x", ("8.8.8.8", 1))
                except PermissionError:
                    continue

    netns.in_network(cage.netns_fd, flood)
    found = denials(cage)
    assert len(found) < 400
    assert 4000 < sum(item.count for item in found) <= 5300


@pytest.mark.vm
def test_confirm_notices_a_flushed_and_a_changed_ruleset(make: Make) -> None:
    cage = make(LISTED)
    network.confirm(cage, LISTED)

    def nft(command: str) -> None:
        netns.in_network(cage.netns_fd, lambda: subprocess.run(["nft", *command.split()], check=True))

    nft("insert rule inet isolator final accept")
    with pytest.raises(ConfinementError, match="changed"):
        network.confirm(cage, LISTED)
    nft("flush ruleset")
    with pytest.raises(ConfinementError, match="empty"):
        network.confirm(cage, LISTED)


def test_confirm_accepts_a_change_that_was_undone(make: Make) -> None:
    """Also in a second cage with the same rules, whose own are not read back again."""
    nft = ["nft", "add table inet other; delete table inet other"]
    for cage in (make(LISTED), make(LISTED)):
        network.watch(cage)
        netns.in_network(cage.netns_fd, lambda: subprocess.run(nft, check=True))
        network.confirm(cage, LISTED)


def test_a_change_before_anybody_watched_counts(make: Make) -> None:
    cage = make(LISTED)
    nft = ["nft", "insert rule inet isolator final accept"]
    netns.in_network(cage.netns_fd, lambda: subprocess.run(nft, check=True))
    network.watch(cage)
    with pytest.raises(ConfinementError, match="changed"):
        network.confirm(cage, LISTED)


def test_a_watch_reports_a_change(make: Make) -> None:
    cage = make(LISTED)
    told = select.poll()
    told.register(network.watch(cage), select.POLLIN)
    network.confirm(cage, LISTED)
    assert not told.poll(0)
    netns.in_network(cage.netns_fd, lambda: subprocess.run(["nft", "flush", "ruleset"], check=True))
    assert told.poll(seconds(2) * 1000)
    with pytest.raises(ConfinementError, match="empty"):
        network.confirm(cage, LISTED)
    assert not told.poll(0), "it has read what it was told"


def test_more_changes_than_a_watch_has_room_for_are_one_change(make: Make) -> None:
    cage = make(LISTED)
    network.watch(cage)
    nft = "; ".join(["add table inet other", "delete table inet other"] * 2000)
    netns.in_network(cage.netns_fd, lambda: subprocess.run(["nft", "-f", "-"], input=nft, text=True, check=True))
    network.confirm(cage, LISTED)


def test_settled_network_is_reached_through_its_socket(make: Make) -> None:
    cage = make(LISTED)
    network.settle(cage)
    (inside,) = network.connectors(cage, 1)
    with socket.socket(fileno=inside) as sock, pytest.raises(ConnectionRefusedError):
        sock.connect(("127.0.0.1", 9))
    network.confirm(cage, LISTED)
    network.release(cage)
    with pytest.raises(UnavailableError, match="has ended"):
        network.connectors(cage, 1)


def test_listeners_reopen_after_the_broker_has_ended(make: Make) -> None:
    cage = make(LISTED)
    network.close_sockets(cage)
    # The thread that loaded the rules has a copy of them (isolator.linux.nftables) until it has ended for the kernel,
    # too: some tenths of a millisecond after Python's join.
    deadline = time.monotonic() + seconds(10)
    left = ("ok", "ECONNRESET")  # taken in by that copy, perhaps just before it went
    while (answer := connect(cage, "198.18.0.5", 443)) in left and time.monotonic() < deadline:
        pass
    assert answer == "ECONNREFUSED"
    cage.sockets = network.reopen(cage)
    assert len(cage.sockets) == 5
    assert connect(cage, "198.18.0.5", 443) == "ok"
    with pytest.raises(ConfinementError, match="old broker"):
        network.reopen(cage)


def test_a_port_below_1024_needs_no_privilege_inside(make: Make) -> None:
    cage = make(LISTED)
    read = netns.in_network(
        cage.netns_fd,
        lambda: open("/proc/sys/net/ipv4/ip_unprivileged_port_start").read(),  # noqa: SIM115, PTH123
    )
    assert read.strip() == "0"


def test_the_callers_namespace_is_untouched_and_nothing_leaks() -> None:
    before = os.readlink("/proc/self/ns/net"), len(open_descriptors())
    for _ in range(5):
        cage = network.prepare(PUBLIC)
        network.confirm(cage, PUBLIC)
        network.release(cage)
        network.release(cage)
    assert (os.readlink("/proc/self/ns/net"), len(open_descriptors())) == before


def test_a_failed_prepare_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(open_descriptors())
    monkeypatch.setattr(network, "RESOLVER", "999.1.1.1")
    with pytest.raises(ConfinementError):
        network.prepare(PUBLIC)
    assert len(open_descriptors()) == before


def test_rules_of_two_cages_with_one_policy_are_the_same(make: Make) -> None:
    one, other = make(LISTED), make(LISTED)
    assert one.loaded == other.loaded
    assert network.is_loaded(one, LISTED) and not network.is_loaded(one, PUBLIC)


def test_rules_that_were_loaded_ahead_give_way_to_others(make: Make) -> None:
    cage = make(PUBLIC)
    with pytest.raises(ConfinementError, match="of another policy"):
        network.confirm(cage, LISTED)
    network.load(cage, LISTED)
    assert network.is_loaded(cage, LISTED)
    assert connect(cage, "1.1.1.1", 443) == "ECONNREFUSED"
    assert connect(cage, "9.9.9.9", 8080) == "ok"
    network.confirm(cage, LISTED)


def test_rules_that_somebody_has_changed_are_not_taken_for_loaded(make: Make) -> None:
    cage = make(LISTED)
    netns.in_network(cage.netns_fd, lambda: subprocess.run(["nft", "flush", "ruleset"], check=True))
    assert not network.is_loaded(cage, LISTED)
    network.load(cage, LISTED)
    network.confirm(cage, LISTED)


def test_rules_that_cannot_be_loaded_ahead_are_refused_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(open_descriptors())
    monkeypatch.setattr(network, "_ruleset", lambda policy: "add nonsense")
    cage = network.make(PUBLIC)
    assert not network.is_loaded(cage, PUBLIC)
    with pytest.raises(ConfinementError, match="syntax"):
        network.load(cage, PUBLIC)
    network.release(cage)
    assert len(open_descriptors()) == before


def test_a_rule_that_makes_no_sense_stops_the_start() -> None:
    with pytest.raises(UsageError):
        network.prepare(NetworkPolicy(mode="listed", egress=(EgressRule(host="a b", ports=(1,)),)))


def test_many_different_rules_still_load(make: Make) -> None:
    rules = [f"n{i}.example.com:{443 + i},{1000 + i}" for i in range(60)] + [
        f"11.{i}.0.0/16:{i + 1}" for i in range(60)
    ]
    policy = listed(*rules, connects_per_second=1000, connect_burst=1000)
    cage = make(policy)
    assert connect(cage, "11.7.1.1", 8) == "ok"
    assert connect(cage, "11.7.1.1", 9) == "ECONNREFUSED"
    network.confirm(cage, policy)


def test_check_reports_the_layer_as_enforced() -> None:
    assert [(one.key, one.state) for one in network.check()] == [("network", "enforced")]


def test_check_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isolator.linux.nftables.LIBRARY", "libnftables-missing.so.1")
    from isolator.linux import nftables

    nftables._library.cache_clear()
    try:
        (entry,) = network.check()
        assert entry.state == "unavailable" and entry.remedy == "apt-get install libnftables1"
    finally:
        nftables._library.cache_clear()


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (NetworkPolicy(mode="none"), "no network but a loopback of its own"),
        (listed(), "no network but a loopback of its own"),
        (LISTED, "hooks.example.com (TCP 443)"),
        (PUBLIC, "any public address"),
    ],
)
def test_the_promise_is_one_sentence(policy: NetworkPolicy, words: str) -> None:
    sentence = Network.describe(EffectivePolicy(plugin="p", network=policy))
    assert words in sentence and sentence.endswith(".")


MANY_FILES = """
import os, resource
from isolator.layers.network import namespace as network
from isolator.policy.model import NetworkPolicy
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
while os.dup(0) < 1500:
    pass
network.release(network.prepare(NetworkPolicy()))  # with the first one comes a descriptor that stays
before = len(os.listdir("/proc/self/fd"))
made = network.prepare(NetworkPolicy())
network.confirm(made, NetworkPolicy())
network.watch(made)
network.confirm(made, NetworkPolicy())
assert os.read(0, 1) == b"x"  # only the threads' copies of the table lost it
network.release(made)
print("closed", len(os.listdir("/proc/self/fd")) - before)
"""


def test_a_process_with_a_thousand_files_open_loads_rules() -> None:
    """libnftables uses select(2), and the C library ends a process that has it watch a descriptor beyond 1023."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", MANY_FILES], input=b"x", capture_output=True, check=False, timeout=seconds(60)
    )
    assert done.stdout == b"closed 0\n", (done.returncode, done.stderr)
