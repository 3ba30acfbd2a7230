"""The files in ``policies/``: complete, commented, and equal to the default posture."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from isolator.policy.cluster import Cluster
from isolator.policy.host import HostConfig
from isolator.policy.keys import SWITCHES
from isolator.policy.parse.host_file import OF_A_RUN, parse_host_config
from isolator.policy.parse.load import check_ceiling, parse_plugin_policy

SHIPPED = Path(__file__).parents[2] / "policies"


def settings(config: HostConfig) -> dict[str, Any]:
    return config.model_dump(exclude={"source", "where"})


def test_host_toml_as_shipped_is_the_default_posture() -> None:
    found = parse_host_config((SHIPPED / "host.toml").read_bytes(), source="host.toml")
    assert settings(found) == settings(HostConfig())


def with_examples(text: str) -> str:
    """The file with each commented example (``#key = value``) in place of the line that it is an example for."""
    lines: list[str] = []
    section = 0
    for line in re.sub(r"(?m)^#(\[[a-z.]+\])$", r"\1", text).splitlines():  # a table that is an example as a whole
        if line.startswith("["):
            section = len(lines)
        example = re.match(r"#([a-z_]+) *= ", line)
        if example:
            lines[section:] = [old for old in lines[section:] if not old.startswith(f"{example[1]} = ")]
        lines.append(line.removeprefix("#") if example else line)
    return "\n".join(lines)


def test_host_toml_shows_every_key() -> None:
    """Take every example: each must be a known key with a good value, and each key must be there."""
    text = with_examples((SHIPPED / "host.toml").read_text())
    parse_host_config(text.encode(), source="host.toml")
    data = tomllib.loads(text)
    numbers = set(HostConfig().defaults.model_dump())
    assert numbers <= set(data["ceiling"])
    assert numbers <= set(data["defaults"])
    assert {"hooks", "permissions", "egress", "read", "syscalls", *(s.name for s in SWITCHES)} <= set(data["ceiling"])
    assert set(data["roles"]) == {"viewer", "emitter", "operator", "caller", "runner"}
    of_a_run = {limit.name for limit in OF_A_RUN}
    assert set(data["runner"]) == {"cages", "all_tasks", "all_memory", "share", "egress", "read", "syscalls"} | of_a_run
    assert set(data["network"]) == {"exceptions", "resolvers", "virtual", "proxy", "proxy_resolves"}
    assert set(data["inbound"]) == {"addresses", "ports"}
    assert set(data["packages"]) == {"npm", "pypi", "ca", "timeout"}
    assert set(data["restart"]) == {"backoff_min", "backoff_max", "crashes", "window"}
    assert set(data["audit"]) == set(HostConfig().audit.model_dump())
    assert set(data["console"]) == {"port", "emit"} and set(data["ingress"]["shop"]) == {"secret_file", "events"}
    assert set(data["cluster"]) == set(Cluster.model_fields) - {"secret"}
    assert set(data["trust"]) == {"require", "withdrawn", "publishers", "certifiers"}
    assert set(data["trust"]["publishers"]["acme"]) == {"key", "names"}
    assert set(data["metrics"]) == {"address", "port"}
    assert settings(parse_host_config(text.encode(), source="host.toml")) != settings(HostConfig())
    assert {"uid_range", "plugin_dirs", "may_degrade"} <= set(data)


def test_shipped_policies_fit_the_shipped_host() -> None:
    host = parse_host_config((SHIPPED / "host.toml").read_bytes(), source="host.toml")
    for path in sorted(SHIPPED.rglob("*.toml")):
        if path.name != "host.toml":
            check_ceiling(parse_plugin_policy(path.read_bytes(), source=path.name), host)
