"""Ways to reach a sidecar."""
