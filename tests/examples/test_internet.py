"""The pretend internet: what is there, that it reports what reaches it, and that it leaves nothing."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from tests.examples.conftest import EXAMPLES


def inside(tmp_path: Path, code: str) -> str:
    """Run Python in an empty network namespace of its own."""
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(EXAMPLES / "demo")!r})
        import internet, socket, pathlib
        directory = pathlib.Path({str(tmp_path)!r})
    """)
    run = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", script + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_everything_is_there_and_reports(tmp_path: Path) -> None:
    out = inside(
        tmp_path,
        """
        import ssl, urllib.request, dns.message, dns.query
        with internet.Internet(directory) as net:
            question = dns.message.make_query("hooks.slack.com", "A")
            print(dns.query.udp(question, internet.RESOLVER, 5).answer[0][0])
            print(dns.query.tcp(question, internet.OUTSIDE_RESOLVER, 5).answer[0][0])
            print(dns.query.udp(dns.message.make_query("nobody.example", "A"), internet.RESOLVER, 5).rcode().name)
            print(len(dns.query.udp(dns.message.make_query("hooks.slack.com", "AAAA"), internet.RESOLVER, 5).answer))
            print(urllib.request.urlopen(f"http://{internet.METADATA}/x", timeout=5).status)
            print(internet.exchange((internet.COLLECTOR, 443), b"loot"))
            context = ssl.create_default_context(cafile=net.ca)
            with socket.create_connection((internet.WEBHOOK, 443), 5) as plain:
                with context.wrap_socket(plain, server_hostname="hooks.slack.com") as tls:
                    tls.sendall(b"POST /services/x HTTP/1.1\\r\\nHost: hooks.slack.com\\r\\n")
                    tls.sendall(b"Content-Length: 9\\r\\n\\r\\n")
                    tls.sendall(b'{"a":"b"}')
                    print(tls.recv(4096).split(b"\\r\\n")[0])
            net.wait(lambda all: len(all) >= 8, "contacts", 5)
            print(sorted({contact.kind for contact in net.contacts}), net.of("webhook")[0].body)
    """,
    )
    assert out.splitlines() == [
        "44.128.1.10",
        "44.128.1.10",
        "NXDOMAIN",
        "0",
        "200",
        "b'pretend service ready\\n'",
        "b'HTTP/1.0 200 OK'",
        "['collector', 'dns', 'metadata', 'ready', 'resolver', 'webhook'] "
        "{'path': '/services/x', 'message': {'a': 'b'}}",
    ]


def test_a_certificate_for_another_name_is_refused(tmp_path: Path) -> None:
    out = inside(
        tmp_path,
        """
        import ssl
        with internet.Internet(directory) as net, socket.create_connection((internet.WEBHOOK, 443), 5) as plain:
            try:
                ssl.create_default_context(cafile=net.ca).wrap_socket(plain, server_hostname="example.com")
            except ssl.SSLCertVerificationError as error:
                print(error.verify_message)
    """,
    )
    assert "Hostname mismatch" in out


def test_refuses_a_namespace_that_has_another_interface(tmp_path: Path) -> None:
    out = inside(
        tmp_path,
        """
        from pyroute2 import IPRoute
        with IPRoute() as routes:
            routes.link("add", ifname="other", kind="veth", peer="peer")
        try:
            with internet.Internet(directory):
                print("started")
        except RuntimeError as error:
            print(error)
    """,
    )
    assert "not an empty network namespace: it has other" in out


def test_ends_with_its_user(tmp_path: Path) -> None:
    out = inside(
        tmp_path,
        """
        with internet.Internet(directory) as net:
            pid = net._process.pid
        print(pathlib.Path(f"/proc/{pid}").exists())
        from pyroute2 import IPRoute
        with IPRoute() as routes:
            print(routes.link_lookup(ifname="uplink"))
    """,
    )
    assert out.split("\n")[0] == "False"
