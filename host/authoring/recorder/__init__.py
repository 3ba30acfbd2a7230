"""Recorder: pretend answers of the names that a plugin was granted, for ``isolator dev`` and ``plugin test`` alone."""
