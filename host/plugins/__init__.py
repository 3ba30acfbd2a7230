"""Plugins on the host's side: registry, manifest, config and secrets, logs."""
