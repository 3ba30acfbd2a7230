"""The host's addresses and gateways are those that a library for netlink finds, in every form that a route has."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from isolator.linux import netlink
from isolator.linux.namespaces import CLONE_NEWNET, setns, unshare
from isolator.linux.netlink import RouteQuery
from isolator.linux.routes import HostNetwork, read_network
from tests.system.daemon import wait_for

NETWORK = """
link add one type veth peer name two
link add far type veth peer name beyond
link set one up
link set two up
link set far up
link set beyond up
address add 10.1.0.5/24 broadcast 10.1.0.255 dev one
address add 2001:db8:1::5/64 dev one nodad
address add 10.2.0.5/24 dev two
address add 2001:db8:2::5/64 dev two nodad
address add 10.9.0.1 peer 10.9.0.2 dev far
address add 2001:db8:9::1 peer 2001:db8:9::2 dev far
route add default via 10.1.0.1
route add 10.50.0.0/16 nexthop via 10.1.0.2 weight 1 nexthop via 10.2.0.2 weight 2 nexthop dev far
route add 10.51.0.0/16 via 10.2.0.3 table 77
route add 10.52.0.0/16 via inet6 2001:db8:1::9 dev one
route add unreachable 10.53.0.0/16
route add default via 2001:db8:1::1
route add 2001:db8:50::/48 nexthop via 2001:db8:1::2 nexthop via 2001:db8:2::2
route add 2001:db8:51::/48 via fe80::77 dev two
nexthop add id 5 via 10.1.0.88 dev one
route add 10.54.0.0/16 nhid 5
"""
IFF_RUNNING = 0x40
"""The kernel sets it for a device that is up in its own time."""
GATEWAYS = """
10.9.0.2 2001:db8:9::2 10.1.0.1 10.1.0.2 10.2.0.2 10.2.0.3 2001:db8:1::9 2001:db8:1::1 2001:db8:1::2 2001:db8:2::2
fe80::77 10.1.0.88
"""


@pytest.fixture(scope="module")
def network() -> Iterator[HostNetwork]:
    """That of a network namespace with all of it."""
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    unshare(CLONE_NEWNET)
    try:
        subprocess.run(["ip", "-batch", "-"], input=NETWORK, text=True, check=True)
        wait_for(lambda: sum(bool(flags & IFF_RUNNING) for flags in read_network().flags.values()) == 4)
        yield read_network()
    finally:
        setns(before)
        os.close(before)


def test_gateway_of_each_form_is_found_and_nothing_else(network: HostNetwork) -> None:
    assert network.gateways == {ip_address(text) for text in GATEWAYS.split()}


def test_addresses_and_devices_are_those_that_a_library_finds(network: HostNetwork) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as library:
        own, flags = set(), {link["index"]: link["flags"] for link in library.get_links()}
        for message in library.get_addr():
            found = dict(message["attrs"])
            own |= {found[name] for name in ("IFA_ADDRESS", "IFA_LOCAL", "IFA_BROADCAST") if name in found}
    assert {str(address) for address in network.own} == own
    assert network.flags == flags
    assert {"10.1.0.5", "10.1.0.255", "10.9.0.2", "2001:db8:9::1"} <= own and len(flags) >= 5


def test_list_that_changes_meanwhile_is_read_again(network: HostNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    real, marked = netlink._messages, [netlink._NLM_F_DUMP_INTR, 0]

    def interrupted(data: bytes) -> Iterator[tuple[int, int, int, int, bytes]]:
        for kind, flags, turn, port, content in real(data):
            yield kind, flags | marked[0], turn, port, content[:0] if marked[0] else content
        marked[:1] = marked[1:]

    query = RouteQuery()
    try:
        whole = query.dump(22, 8)
        monkeypatch.setattr(netlink, "_messages", interrupted)
        assert query.dump(22, 8) == whole and b"" not in whole
    finally:
        query.close()


def test_refused_list_is_an_error() -> None:
    query = RouteQuery()
    try:
        with pytest.raises(OSError, match="netlink list 9999"):
            query.dump(9999, 8)
    finally:
        query.close()


def test_answer_to_a_question_that_was_given_up_answers_no_other(network: HostNetwork) -> None:
    """As when the kernel had no memory for its acknowledgement (ENOBUFS): the answer itself is still to be read."""
    query = RouteQuery()
    try:
        for asked in (
            lambda: query.is_own("10.1.0.5"),
            lambda: query.neighbours_device("2001:db8:1::7") > 0,
            lambda: len(query.dump(22, 8)) >= 8,
        ):
            left = struct.pack(
                "=IHHIIBBBBBBBBIHH4s", 36, 26, 1, 0, 0, 2, 32, 0, 0, 0, 0, 0, 0, 0, 8, 1, b"\x0a\x01\0\x07"
            )
            query._sock.send(left)
            assert asked()
            assert not query.is_own("10.1.0.7")
    finally:
        query.close()
    assert query.is_own("10.1.0.7"), "whose address it is cannot be asked"
    assert query.neighbours_device("2001:db8:1::7") == -1
