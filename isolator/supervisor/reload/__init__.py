"""Renewal of the running daemon: parts of it are replaced, and nothing that runs in a cage notices."""
