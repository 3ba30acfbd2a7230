"""Channels to a sidecar: one-shot, stream and HTTP."""
