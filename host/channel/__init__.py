"""Channels to a sidecar: one-shot and stream."""
