"""The whole daemon, driven through the command line, on real cages."""
