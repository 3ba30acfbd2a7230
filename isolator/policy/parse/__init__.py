"""Readers of manifests, policy files and ``host.toml``."""
