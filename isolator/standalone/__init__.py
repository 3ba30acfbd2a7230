"""Cages without a daemon: ``isolator run`` and ``isolator prove``."""
