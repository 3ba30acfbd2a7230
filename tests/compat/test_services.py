"""Real servers on the pretend internet, and their clients in a cage: through the broker, to the granted name alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compat.layer import Layer
from tests.compat.program import Program, Result, Service
from tests.compat.rows import BROKER
from tests.compat.rows.services import SERVICES
from tests.compat.sandboxes import isolator
from tests.compat.served import served
from tests.support.internet_servers import WEB
from tests.support.pretend_internet import PretendInternet, pretend_internet

HOST = "service.example.com"


@pytest.fixture(scope="module")
def pretend() -> Iterator[PretendInternet]:
    with pretend_internet() as made:
        made.internet.dns.records[HOST] = [WEB]
        yield made


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
