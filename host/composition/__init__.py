"""The host as one: its parts composed, and handed on to the process that takes its place."""
