"""Channels between the processes, and the types of their messages."""
