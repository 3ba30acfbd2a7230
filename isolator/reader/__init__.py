"""Reader of strangers' manifests (PROCESS R), without privilege, for one answer. Nothing that is root imports it."""
