"""Resolvers as hosts have them: search domains, silent servers, networks with IPv6 alone."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.broker.conftest import listed
from tests.support.internet_servers import GATEWAY, HOST, OTHER, WEB, WEB6, Dns, run_in
from tests.support.pretend_internet import BrokerProcess, CageNet, PretendInternet

NAT64 = "64:ff9b::5db8:d822"
"""The spelling of ``WEB`` that a DNS64 server answers where there is no IPv4."""


@contextlib.asynccontextmanager
async def cage_on_host(pretend: PretendInternet, resolv_conf: str, *rules: str) -> AsyncIterator[CageNet]:
    """A cage on a host with this ``/etc/resolv.conf``."""
    file = pretend.directory / "host-resolv.conf"
    honest = file.read_text()
    file.write_text(resolv_conf)
    pretend.internet.dns.queries.clear()
    broker = await BrokerProcess.start(pretend)
    try:
        cage = await CageNet.attach(broker, listed(*rules))
        try:
            yield cage
        finally:
            await cage.detach()
    finally:
        file.write_text(honest)
        await broker.stop()


async def test_search_domains_of_the_host_change_no_name_and_leak_none(pretend: PretendInternet) -> None:
    conf = (
        f"domain corp.example.net\nsearch corp.example.net example.com\noptions ndots:5 timeout:1\nnameserver {WEB}\n"
    )
    async with cage_on_host(pretend, conf, "hooks.example.com:80", "absent.example.com:80") as cage:
        script = """
print(get('http://hooks.example.com/')[:22])
print(attempt(socket.gethostbyname, 'absent.example.com'), attempt(socket.gethostbyname, 'hooks'))
"""
        assert await cage.client(script) == "host=hooks.example.com\ngaierror gaierror"
        assert set(pretend.internet.dns.queries) == {"hooks.example.com", "absent.example.com"}


async def test_silent_first_server_costs_the_next_one_no_lookup(pretend: PretendInternet) -> None:
    silent = pretend.internet.bound(OTHER, 53, socket.SOCK_DGRAM)
    try:
        async with cage_on_host(pretend, f"nameserver {OTHER}\nnameserver {WEB}\n", "hooks.example.com:80") as cage:
            assert "host=hooks" in await cage.client("print(get('http://hooks.example.com/'))")
            assert silent.recv(512)  # it was asked
    finally:
        silent.close()


async def test_no_server_that_answers_is_on_record_as_such(pretend: PretendInternet) -> None:
    silent = pretend.internet.bound(OTHER, 53, socket.SOCK_DGRAM)
    try:
        async with cage_on_host(pretend, f"nameserver {OTHER}\n", "hooks.example.com:80") as cage:
            assert await cage.client("print(attempt(get, 'http://hooks.example.com/'))") == "gaierror"
            await cage.broker.wait_for("net.query", name="hooks.example.com", verdict="failed", rule="upstream")
    finally:
        silent.close()


@pytest.fixture
def ipv6_alone(pretend: PretendInternet) -> Iterator[Dns]:
    """The host has no IPv4 address and no route; its name server is one of IPv6, and answers with DNS64."""
    kinds = (socket.SOCK_DGRAM, socket.SOCK_STREAM)
    server = Dns(*(pretend.internet.bound(WEB6, 53, kind) for kind in kinds))
    server.records.update({"both.example.com": [WEB, WEB6], "four.example.com": [NAT64], "inside.example.com": [
        "64:ff9b::a09:909"]})  # fmt: skip
    for address in (NAT64, "64:ff9b::a09:909"):
        run_in(pretend.internet.fd, "ip", "-6", "addr", "add", f"{address}/128", "dev", "lo", "nodad")
    run_in(pretend.host_fd, "ip", "addr", "del", f"{HOST}/24", "dev", "up0")
    try:
        yield server
    finally:
        run_in(pretend.host_fd, "ip", "addr", "add", f"{HOST}/24", "dev", "up0")
        run_in(pretend.host_fd, "ip", "route", "add", "default", "via", GATEWAY)
        for address in (NAT64, "64:ff9b::a09:909"):
            run_in(pretend.internet.fd, "ip", "-6", "addr", "del", f"{address}/128", "dev", "lo")
        for sock in (server._udp, server._tcp):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


async def test_cage_on_a_host_with_ipv6_alone_reaches_its_names(pretend: PretendInternet, ipv6_alone: Dns) -> None:
    """Inside nothing is different: names have addresses of IPv4 there."""
    rules = ("both.example.com:80", "four.example.com:80", "inside.example.com:80")
    async with cage_on_host(pretend, f"nameserver {WEB6}\n", *rules) as cage:
        script = """
print(get('http://both.example.com/')[:21], get('http://four.example.com/')[:21])
print(attempt(get, 'http://inside.example.com/'))
"""
        assert await cage.client(script) == "host=both.example.com host=four.example.com\ngaierror"
        first = await cage.broker.wait_for("net.connect", name="both.example.com", verdict="allowed")
        second = await cage.broker.wait_for("net.connect", name="four.example.com", verdict="allowed")
        assert (first["address"], second["address"]) == (WEB6, NAT64)
        await cage.broker.wait_for("net.query", name="inside.example.com", rule="blocked-address")
