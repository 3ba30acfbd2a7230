"""The command line: its root, and the commands that talk to the daemon."""
