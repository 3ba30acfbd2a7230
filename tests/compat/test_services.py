"""Real servers on the pretend internet, and their clients in a cage: through the broker, to the granted name alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compat.layer import UID, Layer
from tests.compat.program import Program, Result, Service
from tests.compat.rows import BROKER
from tests.compat.rows.services import SERVICES
from tests.compat.sandboxes import ENVIRONMENT, WAIT, as_user, isolator
from tests.support.internet_servers import WEB
from tests.support.pretend_internet import PretendInternet, pretend_internet

HOST = "service.example.com"


@pytest.fixture(scope="module")
def pretend() -> Iterator[PretendInternet]:
    with pretend_internet() as made:
        made.internet.dns.records[HOST] = [WEB]
        yield made


@pytest.fixture(scope="module")
def shown() -> Iterator[Path]:
    """A folder that cages may read and servers, too: the authority's certificate, and a key for ssh."""
    folder = Path(f"/srv/isolator-shown-{os.getpid()}")
    folder.mkdir(mode=0o755)
    try:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        (folder / "key").chmod(0o644)
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def served(service: Service, pretend: PretendInternet, installed: Layer, shown: Path) -> Iterator[None]:
    """The server, as an ordinary user in namespaces of its own: it ends with them."""
    begin = f"{WAIT}\nmkdir work\ncd work\ncp ../shown/ca.pem ../shown/key.pem ."
    ready = f"up {service.port} || {{ cat log >&2; exit 1; }}\necho ready\nwait\n"
    script = f"{begin}\n{service.server}\n{ready}"
    command = installed.inside(
        "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c",
        f'exec 3<"$1" 4<"$2" && mount -t tmpfs -o mode=1777 none /tmp && cp -r {shown} /tmp/shown && cd /tmp && '
        f'cat <&3 >shown/ca.pem && install -o {UID} -m 0600 /dev/stdin shown/key.pem <&4 && shift 2 && exec "$@"', "sh",
        str(pretend.directory / "ca.pem"), str(pretend.directory / "key.pem"), *as_user(), "env", "-i", *ENVIRONMENT,
        "bash", "-euo", "pipefail", "-c", script,
        network=f"/proc/{os.getpid()}/fd/{pretend.internet.fd}",
    )  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize("service", SERVICES, ids=[service.name for service in SERVICES])
def test_client_reaches_its_server_through_the_broker(
    service: Service, pretend: PretendInternet, installed: Layer, shown: Path, root: Path, seen: list[Result]
) -> None:
    (root / "etc/isolator").mkdir(parents=True, exist_ok=True)
    (root / "etc/isolator/host.toml").write_text(f'[network]\nresolvers = ["{WEB}"]\n')
    shutil.copy(pretend.directory / "ca.pem", shown)
    flags = f"{service.flags} --egress {HOST}:{service.port}".strip()
    client = f"export HOST={HOST} CA={shown}/ca.pem\n{service.client}"
    program = Program(service.name, service.work, client, f"{flags} --read {shown}")
    with served(service, pretend, installed, shown):
        network = f"/proc/{os.getpid()}/fd/{pretend.host_fd}"
        ending = isolator(root, program, installed, network=network)
        seen.append(Result(BROKER, service.name, service.work, flags.replace(HOST, "HOST"), ending.done))
        assert ending.done, f"exit {ending.code}: {ending.output}"
        # The same without the grant, so that the broker and nothing else is what let it through.
        refused = isolator(root, Program(service.name, "", client, f"--read {shown}"), installed, network=network)
        assert not refused.done
