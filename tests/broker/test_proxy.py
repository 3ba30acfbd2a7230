"""A company's proxy between the broker and the internet: what is granted goes through it, every check stays here."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from isolator.broker import proxy as proxies
from isolator.broker.flow import DescribedError
from isolator.broker.resolver import HostResolvers, Resolver
from isolator.ipc.fence import Fence
from isolator.policy.model import NetworkPolicy
from tests.broker.conftest import MakeCage, listed
from tests.support.internet_servers import METADATA, OTHER, PRIVATE, WEB, WEB6, Connects
from tests.support.pretend_internet import BrokerProcess, PretendInternet

PORT = 3128
PROXY = f"{PRIVATE}:{PORT}"
"""A private address: what a policy cannot grant, the host's owner may name as the way out."""


@pytest.fixture
def proxy(pretend: PretendInternet) -> Iterator[Connects]:
    made = Connects(pretend.internet.bound(PRIVATE, PORT), pretend.internet.fd)
    pretend.internet.dns.records["proxy.example.com"] = [PRIVATE]
    yield made
    made.server.shutdown()
    made.server.server_close()


FETCH = "print(attempt(get, 'https://hooks.example.com/'))"


@pytest.mark.parametrize("where", [PROXY, f"proxy.example.com:{PORT}"])
async def test_granted_name_goes_through_the_proxy_by_the_address_that_was_checked(
    cages: MakeCage, broker: BrokerProcess, proxy: Connects, where: str
) -> None:
    cage = await cages(listed("hooks.example.com:443", proxy=where))
    answer = await cage.client(FETCH)
    assert answer.startswith("host=hooks.example.com from=") and "45.0.0.2" not in answer
    assert proxy.requests == [f"{WEB}:443"]
    connect = await broker.wait_for("net.connect", name="hooks.example.com", verdict="allowed")
    assert (connect["via"], connect["address"], connect["rule"]) == (where, WEB, "hooks.example.com:443")
    assert (await broker.wait_for("net.closed", flow=connect["flow"]))["received"] > 200


async def test_checks_of_names_and_addresses_stay_and_the_proxy_hears_of_nothing_refused(
    cages: MakeCage, broker: BrokerProcess, proxy: Connects
) -> None:
    cage = await cages(listed("hooks.example.com:443", "*.example.com:443", f"{OTHER}:80", proxy=PROXY))
    script = f"""
def asking_for(server, inner):
    context = ssl.create_default_context(cafile=CA)
    with socket.create_connection((server, 443), 5) as sock:
        context.wrap_socket(sock, server_hostname=inner)
print(attempt(asking_for, 'hooks.example.com', 'other.example.com'))
for name in ('metadata.example.com', 'private.example.com', 'host.example.com', 'secret.example.net'):
    print(attempt(socket.gethostbyname, name))
print(attempt(tcp, {PRIVATE!r}, {PORT}), attempt(tcp, {METADATA!r}, 80), attempt(tcp, {WEB!r}, 443))
print(get('http://{OTHER}/')[:12])
"""
    lines = (await cage.client(script)).splitlines()
    assert lines[0] == "ECONNRESET"
    assert lines[1:5] == ["gaierror"] * 4
    assert lines[5:] == ["ECONNREFUSED ECONNREFUSED ECONNREFUSED", f"host={OTHER}"]
    await broker.wait_for("net.denied", rule="sni-mismatch")
    # The connection was made before its first bytes were there to be judged; nothing of it was passed on.
    assert set(proxy.requests) <= {f"{WEB}:443", f"{OTHER}:80"}


async def test_server_that_speaks_first_is_heard_from_its_first_byte(cages: MakeCage, proxy: Connects) -> None:
    """Its greeting comes in one piece with the proxy's answer."""
    cage = await cages(listed("hooks.example.com:25", proxy=PROXY))
    script = "s = tcp('hooks.example.com', 25); print(s.recv(100)); s.sendall(b'EHLO'); print(s.recv(100))"
    assert await cage.client(script) == "b'220 hello\\r\\n'\nb'got EHLO'"


async def test_each_checked_address_is_tried_ipv4_first(
    cages: MakeCage, broker: BrokerProcess, proxy: Connects, pretend: PretendInternet
) -> None:
    pretend.internet.dns.records["several.example.com"] = [WEB6, "5.6.7.8"]
    proxy.names["5.6.7.8"] = "127.0.0.1:1"  # nobody answers there
    cage = await cages(listed("several.example.com:443", proxy=PROXY))
    assert (await cage.client("print(get('https://several.example.com/'))")).startswith("host=several.example.com")
    assert proxy.requests == ["5.6.7.8:443", f"[{WEB6}]:443"]
    assert (await broker.wait_for("net.connect"))["address"] == WEB6


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (
            b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Negotiate\r\n\r\n",
            f"proxy {PROXY} wants credentials (407); let this host through it without",
        ),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 4\r\n\r\nno\r\n", f"proxy {PROXY} refuses {WEB}:443 (403)"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", f"proxy {PROXY} does not speak HTTP"),
        (b"", f"proxy {PROXY} does not speak HTTP"),
        (b"HTTP/1.1 200 Yes\r\n" + b"x" * 20_000, f"proxy {PROXY} does not speak HTTP"),
    ],
    ids=["credentials", "refused", "ssh", "closed", "endless"],
)
async def test_failure_at_the_proxy_is_recorded_with_its_reason(
    cages: MakeCage, broker: BrokerProcess, proxy: Connects, answer: bytes, why: str
) -> None:
    proxy.answer = answer
    cage = await cages(listed("hooks.example.com:443", proxy=PROXY))
    assert await cage.client(FETCH) in {"ECONNRESET", "EOF occurred in violation of protocol (_ssl.c:992)"}
    connect = await broker.wait_for("net.connect", verdict="failed")
    assert (connect["error"], connect["via"]) == (why, PROXY)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        (f"{OTHER}:9", f"proxy {OTHER}:9 cannot be reached: "),
        ("nowhere.example.com:3128", "proxy nowhere.example.com:3128 is not found: its name has no address"),
    ],
)
async def test_proxy_that_is_away_is_recorded_as_such(
    cages: MakeCage, broker: BrokerProcess, where: str, why: str
) -> None:
    cage = await cages(listed("hooks.example.com:443", proxy=where))
    assert await cage.client(FETCH) == "ECONNRESET"
    assert (await broker.wait_for("net.connect", verdict="failed"))["error"].startswith(why)


async def test_name_that_only_the_proxy_can_look_up_has_to_be_left_to_it(
    cages: MakeCage, broker: BrokerProcess, proxy: Connects, pretend: PretendInternet
) -> None:
    proxy.names["far.example.com"] = WEB
    fetch = "print(attempt(get, 'https://far.example.com/'))"
    kept = await cages(listed("far.example.com:443", proxy=PROXY), "kept")
    assert await kept.client(fetch) == "gaierror"
    assert proxy.requests == []
    pretend.internet.dns.queries.clear()
    left = await cages(listed("far.example.com:443", proxy=PROXY, proxy_resolves=True), "left")
    assert (await left.client(fetch)).startswith("host=far.example.com")
    assert proxy.requests == ["far.example.com:443"]
    assert pretend.internet.dns.queries == []
    connect = await broker.wait_for("net.connect", name="far.example.com", verdict="allowed")
    assert connect["address"].startswith("198.1")
    assert await left.client("print(attempt(socket.gethostbyname, 'other.example.com'))") == "gaierror"


async def test_address_behind_a_name_that_is_left_to_the_proxy_is_not_checked_here(
    cages: MakeCage, proxy: Connects
) -> None:
    """What ``explain`` says is given up is given up; and with ``public`` alone it is not."""
    proxy.names["metadata.example.com"] = METADATA
    inside = "print(attempt(get, 'http://metadata.example.com/')[:25])"
    granted = await cages(listed("metadata.example.com:80", proxy=PROXY, proxy_resolves=True), "granted")
    assert await granted.client(inside) == "host=metadata.example.com"
    proxy.requests.clear()
    public = await cages(NetworkPolicy(mode="public", proxy=PROXY, proxy_resolves=True), "public")
    assert await public.client("print(attempt(get, 'http://metadata.example.com/'))") == "gaierror"
    assert proxy.requests == []
    assert (await public.client("print(get('http://other.example.com/'))")).startswith("host=other.example.com")
    assert proxy.requests == [f"{OTHER}:80"]


async def test_proxy_that_is_silent_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxies, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        proxy = proxies.Proxy(where, Resolver((), HostResolvers()), Fence())
        with pytest.raises(DescribedError, match=f"proxy {where} does not answer"):
            await proxy.dial((ip_address(WEB),), None, 443, small=False)
        await proxy.close()
