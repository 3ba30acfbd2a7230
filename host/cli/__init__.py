"""Commands that talk to the daemon, one file per group; ``main`` is the root of the whole command line."""
