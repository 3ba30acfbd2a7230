"""``[cluster]`` of host.toml: what is read, and one line for each mistake."""

from __future__ import annotations

import pytest

from isolator.errors import UsageError
from isolator.policy.cluster import Cluster
from isolator.policy.host import HostConfig
from isolator.policy.parse.host_file import parse_host_config

GOOD = '[cluster]\nname = "h-1"\nservers = ["10.0.0.1", "[fd00::1]:4223", "nats.example:4222"]\n'


def _read(text: str) -> HostConfig:
    return parse_host_config(text.encode(), source="host.toml")


def test_settings_are_read_and_servers_have_the_usual_port() -> None:
    servers = ("10.0.0.1:4222", "[fd00::1]:4223", "nats.example:4222")
    assert _read(GOOD).cluster == Cluster(name="h-1", servers=servers)
    more = 'credentials = "/etc/a"\nca = "/etc/b"\nlabels = ["eu", "gpu.2"]\noutbox = "2M"\ndistrusted = ["h-2"]\n'
    found = _read(GOOD + more).cluster
    assert found is not None
    assert (found.credentials, found.ca, found.labels, found.outbox) == ("/etc/a", "/etc/b", ("eu", "gpu.2"), 2 << 20)
    assert found.distrusted == ("h-2",)


def test_host_without_it_has_none_and_its_digest_is_as_before() -> None:
    assert _read("").cluster is None
    assert _read("").digest() != _read(GOOD).digest()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[cluster]\n", "cluster.name is missing"),
        ('[cluster]\nname = "h"\n', "cluster.servers: names no server"),
        (GOOD.replace("h-1", "H 1"), "small letters"),
        (GOOD.replace("h-1", "h.1"), "small letters"),
        (GOOD.replace("10.0.0.1", "nats://10.0.0.1"), "is a URL"),
        (GOOD.replace("10.0.0.1", "10.0.0.0/8"), "is not HOST:PORT"),
        (GOOD.replace("10.0.0.1", "*.example.com"), "is not HOST:PORT"),
        (GOOD + 'labels = ["EU"]\n', "is not a label"),
        (GOOD + 'distrusted = ["h.2"]\n', "small letters"),
        (GOOD + 'outbox = "1k"\n', "at least 1048576 bytes"),
        (GOOD + 'credentials = "a"\n', "is not an absolute path"),
        (GOOD + 'tls = false\nca = "/etc/b"\n', "not looked at without tls"),
        (GOOD + 'secret = "x"\n', "cluster.secret: unknown key"),
    ],
)
def test_mistake_is_refused_with_its_line(text: str, line: str) -> None:
    with pytest.raises(UsageError) as refused:
        _read(text)
    assert line in str(refused.value)
