"""Plugins as the host knows them: registry, manifest, config and secrets, logs."""
