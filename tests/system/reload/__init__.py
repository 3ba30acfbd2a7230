"""The daemon is renewed while it works, and nobody notices."""
