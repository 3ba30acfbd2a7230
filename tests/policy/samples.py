"""Manifests, policies and hosts that several tests share."""

from __future__ import annotations

import json
from typing import Any

from isolator.policy.grant import PluginPolicy
from isolator.policy.host import HostConfig
from isolator.policy.parse.host_file import parse_host_config
from isolator.policy.parse.load import parse_plugin_policy
from isolator.policy.request import ManifestCore, synthesise_manifest
from isolator.reader.manifest import parse_manifest, parse_manifest_core

MANIFEST: dict[str, Any] = {
    "name": "slack-deploy-notifier",
    "version": "1.2.0",
    "description": "Posts deploy results to a channel",
    "api_version": "1",
    "binary": "./slack-notifier",
    "args": [],
    "hooks": ["deploy.started", "deploy.completed", "deploy.failed"],
    "permissions": ["read:deployments", "read:projects"],
    "config_schema": {
        "slack_webhook_url": {"type": "string", "required": True, "secret": True},
        "channel": {"type": "string", "default": "#deployments"},
    },
    "sandbox": {
        "network": {"egress": [{"host": "hooks.slack.com", "ports": [443], "reason": "post the message"}]},
        "filesystem": {"state": "64M", "tmp": "32M"},
        "resources": {"memory": "256M", "cpu": "25%", "tasks": 64, "nofile": 1024},
    },
    "transport": {"mode": "oneshot"},
    "delivery": {"timeout": "10s", "attempts": 12, "order_by": "project_id"},
    "activation": {"start": "lazy", "idle": "never"},
    "health": {"ping": False},
}
"""The manifest of the design, whole."""

POLICY = """\
# policies/slack-deploy-notifier.toml
[grant]
hooks       = ["deploy.*"]
permissions = ["read:deployments", "read:projects"]
egress      = ["hooks.slack.com:443"]

[limits]                 # these are also the defaults
memory = "256M"
cpu    = "25%"
tasks  = 64
nofile = 1024

[filesystem]
read = ["/etc/ssl/certs"]     # bind-mounted read-only
state = "64M"                 # persistent, size-capped

[syscalls]
profile = "default"
"""
"""The policy of the design, whole."""

DEFAULT = HostConfig()
"""A host without a host.toml."""

OPEN = parse_host_config(
    b"[inbound]\nports = ['8000-8099']\n[network]\nexceptions = ['10.0.0.5:5432']", source="host.toml"
)
"""A host that lets ports be forwarded in, and an address of its own network be reached."""


def manifest(**changes: Any) -> ManifestCore:
    """The design's manifest with top-level keys replaced; None removes one."""
    data = {key: value for key, value in (MANIFEST | changes).items() if value is not None}
    return parse_manifest_core(json.dumps(data, indent=2).encode())


def asking(**sandbox: Any) -> ManifestCore:
    """The design's manifest with another ``sandbox``."""
    return manifest(sandbox=sandbox)


def policy(text: str = POLICY) -> PluginPolicy:
    """A policy as if read from ``policies/p.toml``."""
    return parse_plugin_policy(text.encode(), source="policies/p.toml")


def synthesised() -> ManifestCore:
    """The manifest that is made for a single binary."""
    return parse_manifest(synthesise_manifest("google-indexer", "ab" * 32, "indexer", ["deploy.completed"]))
