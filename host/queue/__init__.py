"""Durable delivery queue."""
