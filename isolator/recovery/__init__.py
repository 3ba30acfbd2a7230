"""Journal of everything that is made outside a process, and its clearing after a crash."""
