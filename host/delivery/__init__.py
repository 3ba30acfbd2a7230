"""Delivery from the queue to the sidecar: workers, attempts, outcomes, health."""
