"""One daemon with a console, for all tests of a file."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.linux import netlink, netns
from tests.console.support import KEYS, Console
from tests.system.daemon import daemon


@pytest.fixture(scope="module")
def network() -> Iterator[int]:
    fd = netns.in_new_network(netns.current_network)
    netns.in_network(fd, netlink.bring_up_loopback)
    yield fd
    os.close(fd)


@pytest.fixture(scope="module")
def console(network: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    secret: Path = tmp_path_factory.mktemp("secrets") / "shop"
    secret.write_text("".join(f"whsec_{base64.b64encode(key).decode()}\n" for key in KEYS))
    secret.chmod(0o600)
    toml = (
        "[roles]\nviewer = [61100]\nemitter = [61101]\ncaller = [61103]\n[console]\nport = 8090\nemit = true\n"
        f'[ingress.shop]\nsecret_file = "{secret}"\nevents = ["deploy.completed"]\n'
    )
    with daemon(host_toml=toml, network=network) as d:
        yield Console(d, network)
