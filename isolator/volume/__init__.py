"""Persistent ``/state`` of a plugin: one capped ext4 image each."""
