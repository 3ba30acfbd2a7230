"""Plugins of ``tests/compat/plugins``: built as authors build them, and run by a daemon on the pretend internet."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.compat.layer import STORE, Layer
from tests.compat.other_side import OtherSide
from tests.compat.program import Plugin
from tests.support.internet_servers import WEB
from tests.support.pretend_internet import PretendInternet, pretend_internet
from tests.support.timeouts import seconds
from tests.system.daemon import Daemon, daemon, event

SOURCES = Path(__file__).parent / "plugins"
BUILD_PATIENCE = seconds(800)
PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True)
class Platform:
    """A daemon, and the world that its plugins talk to."""

    pretend: PretendInternet
    side: OtherSide
    daemon: Daemon


@dataclass(frozen=True)
class Delivery:
    """What became of one event in one plugin."""

    outcome: dict[str, Any]
    denials: list[dict[str, Any]]


@contextlib.contextmanager
def platform() -> Iterator[Platform]:
    """A daemon without plugins."""
    toml = f'[network]\nresolvers = ["{WEB}"]\n'
    # Certificates of this host's own environment come along into a cage, and for requests they go before a plugin's.
    with pytest.MonkeyPatch.context() as patch:
        for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            patch.delenv(name, raising=False)
        with pretend_internet() as pretend, daemon(host_toml=toml, network=pretend.host_fd) as made:
            yield Platform(pretend, OtherSide(pretend), made)


def missing(plugin: Plugin) -> bool:
    """Whether the tool of its build is neither on this host nor among its packages."""
    return not plugin.packages and shutil.which(plugin.tool, path=PATH) is None


def built(plugin: Plugin, layer: Layer | None) -> Path:
    """The plugin's folder with what its ``build`` makes, in the layer if it needs packages; kept for the next run."""
    files = [*sorted((SOURCES / plugin.name).iterdir()), *sorted(SOURCES.glob("serve.*"))]
    content = hashlib.sha256(os.readlink("/usr/bin/python3").encode())
    for file in files:
        content.update(file.name.encode() + b"\0" + file.read_bytes())
    place = STORE / "plugins"
    place.mkdir(parents=True, exist_ok=True)
    folder = place / f"{plugin.name}-{content.hexdigest()[:12]}"
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for old in place.glob(f"{plugin.name}-????????????"):
                shutil.rmtree(old)
            _build(plugin, folder, layer)
    return folder


def _build(plugin: Plugin, folder: Path, layer: Layer | None) -> None:
    workshop = folder.parent / "new"
    shutil.rmtree(workshop, ignore_errors=True)
    shutil.copytree(SOURCES, workshop, ignore=lambda _, names: [n for n in names if n == "__pycache__"])
    command = ["timeout", str(int(BUILD_PATIENCE)), "sh", "-eu", "build"]  # it ends what the script started, too
    if layer is not None:
        command = layer.inside("env", "-C", str(workshop / plugin.name), *command, network="/proc/self/ns/net")
    try:
        done = subprocess.run(
            command, cwd=workshop / plugin.name, capture_output=True, text=True, check=False,
            env={**os.environ, "PATH": f"{PATH}:{os.environ['PATH']}"}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"its build failed: {done.stdout}{done.stderr}"
        (workshop / plugin.name).rename(folder)
    finally:
        shutil.rmtree(workshop)


def deliver(platform: Platform, plugin: Plugin, folder: Path) -> Delivery:
    """Register it under its own policy, hand it one event, and remove it again."""
    d = platform.daemon
    policy = folder / "policy.toml"
    for place in tomllib.loads(policy.read_text())["grant"]["egress"]:
        platform.pretend.internet.dns.records[place.partition(":")[0]] = [WEB]
    policies = d.root / "etc/isolator/policies"
    policies.mkdir(parents=True, exist_ok=True)
    shutil.copy(policy, policies / f"{plugin.name}.toml")
    config = ["--config", f"ca_file=@{platform.pretend.directory / 'ca.pem'}"]
    if "token" in json.loads((folder / "plugin.json").read_text())["config_schema"]:
        config += ["--config", "token=s3cret"]
    platform.side.serve(plugin)
    d.cli("plugin", "add", str(folder), *config, "--yes")
    try:
        wait = ("--wait", "--timeout", str(seconds(120)))
        sent = d.json("event", "emit", "deploy.completed", event(1), *wait, code=None)
        [delivery] = d.json("event", "show", sent["id"])["deliveries"]
        return Delivery(delivery, d.json("plugin", "denials", plugin.name))
    finally:
        d.cli("plugin", "remove", plugin.name, "--yes")


def check(platform: Platform, plugin: Plugin, delivery: Delivery) -> None:
    """Assert that the work was done, on both sides, at once, and that nothing was refused to it."""
    assert delivery.outcome["state"] == "ok", delivery
    assert delivery.outcome["attempts"] == 1, delivery
    assert plugin.detail in str(json.loads(delivery.outcome["reply"])["result"]["detail"]), delivery
    assert not [part for part in plugin.received if part not in platform.side.log], platform.side.log
    assert not delivery.denials
